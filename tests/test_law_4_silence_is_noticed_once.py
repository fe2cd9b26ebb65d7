"""Law 4: one missed deadline, one down event, dated at the deadline itself."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
from conftest import START, House, hang, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import larm as program

JOB = '[monitors.job]\ninterval = "1m"\ngrace = "10s"\n'
NOWHERE = '[channels]\nphone = "json://127.0.0.1:9/"\nmail = "json://127.0.0.1:9/"\n'
DEADLINE = START + 70_000  # of JOB, pinged at START


def changes(larm: House) -> list[tuple[str, str | None, int]]:
    return [(event["type"], event["reason"], event["at"]) for event in larm.events()]


def execute(larm: House, sql: str) -> None:
    larm.store.write(lambda db: db.execute(sql))


def test_a_missed_deadline_is_one_down_event_dated_at_it(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(300_000)
    assert changes(larm) == [("down", "missed", DEADLINE)]
    assert larm.state("job") == "down"


def test_a_success_after_it_is_one_up_event_with_the_time_it_was_down(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(300_000)
    larm.ping("job")
    larm.ping("job")
    down, up = larm.events()
    assert (up["type"], up["at"], up["down_ms"]) == ("up", START + 300_000, 230_000)
    assert down["type"] == "down"
    assert larm.state("job") == "up"


def test_the_event_says_what_was_heard_and_expected_before_it(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(75_000)
    [down] = larm.events()
    assert (down["last_heartbeat_at"], down["expected_at"]) == (START, START + 60_000)


def test_a_monitor_that_was_never_pinged_misses_nothing(house):
    larm = house(JOB)
    larm.watch_for(86_400_000, step=3_600_000)
    assert larm.events() == []
    assert larm.state("job") == "pending"


def test_a_deadline_is_not_missed_while_it_is_now(house):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(70_000)
    larm.tick()
    assert larm.events() == []
    larm.clock.advance(1)
    larm.tick()
    assert changes(larm) == [("down", "missed", DEADLINE)]


def test_a_ping_at_the_deadline_is_in_time(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(70_000)
    larm.ping("job")
    larm.watch_for(70_000)
    assert larm.events() == []


def test_late_is_no_event(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(65_000)
    assert larm.state("job") == "late"
    assert larm.events() == []


def test_the_watcher_sleeps_no_longer_than_to_the_deadline(house):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(69_600)
    sleep = larm.watcher.tick(69_600)
    larm.clock.advance(sleep)
    larm.tick()
    assert sleep < 500
    assert changes(larm) == [("down", "missed", DEADLINE)]


def test_a_down_monitor_that_restarts_is_not_noticed_again(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(80_000)
    for crash in (False, True):
        larm.restart(600_000, crash=crash)
        larm.watch_for(200_000)
    assert len(larm.events()) == 1


# Failures that jobs report themselves


@pytest.mark.parametrize("action", ["fail", "1", "255"])
def test_a_reported_failure_is_down_at_once(house, action):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(5_000)
    larm.ping("job", action)
    assert changes(larm) == [("down", "failed", START + 5_000)]
    assert larm.state("job") == "down"


def test_the_first_ping_may_be_a_failure(house):
    larm = house(JOB)
    larm.ping("job", "fail")
    assert changes(larm) == [("down", "failed", START)]


def test_a_repeated_failure_is_no_second_event(house):
    larm = house(JOB)
    larm.ping("job")
    for _ in range(5):
        larm.ping("job", "fail")
        larm.watch_for(30_000)
    assert len(larm.events()) == 1


def test_a_failure_after_a_missed_deadline_is_no_second_event(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(80_000)
    larm.ping("job", "fail")
    assert changes(larm) == [("down", "failed", DEADLINE)]  # with the newest reason


def test_a_failed_monitor_misses_no_deadline(house):
    larm = house(JOB)
    larm.ping("job")
    larm.ping("job", "fail")
    larm.watch_for(300_000)
    assert changes(larm) == [("down", "failed", START)]


def test_exit_status_0_is_a_success(house):
    larm = house(JOB)
    larm.ping("job", "fail")
    larm.ping("job", "0")
    assert [event["type"] for event in larm.events()] == ["down", "up"]


def test_a_failure_keeps_its_heartbeat_with_the_event(house):
    larm = house(JOB)
    larm.ping("job", "3", body="disk full")
    [down], [heartbeat] = larm.events(), larm.heartbeats("job")
    assert down["heartbeat_id"] == heartbeat["id"]
    assert (heartbeat["exit_status"], heartbeat["body"]) == (3, "disk full")


# One transaction


def test_every_event_comes_with_a_delivery_for_each_channel(house):
    larm = house(NOWHERE + JOB)
    larm.ping("job", "fail")
    larm.ping("job")
    rows = larm.rows("SELECT event_id, channel, state FROM deliveries ORDER BY id")
    assert [tuple(row.values()) for row in rows] == [
        (1, "phone", "pending"), (1, "mail", "pending"),
        (2, "phone", "pending"), (2, "mail", "pending"),
    ]  # fmt: skip


@pytest.mark.parametrize("table", ["events", "deliveries"])
def test_a_fault_while_calling_down_leaves_nothing_behind(house, table):
    larm = house(NOWHERE + JOB)
    larm.ping("job")
    larm.clock.advance(71_000)
    execute(larm, f"CREATE TRIGGER fault AFTER INSERT ON {table} "
                  "BEGIN SELECT RAISE(ABORT, 'fault'); END")
    before = larm.monitor("job")
    with pytest.raises(Exception, match="fault"):
        larm.tick()
    assert larm.monitor("job") == before
    assert larm.events() == []
    assert larm.rows("SELECT * FROM deliveries") == []
    execute(larm, "DROP TRIGGER fault")
    larm.clock.advance(1_000)
    larm.tick()
    assert changes(larm) == [("down", "missed", DEADLINE)]
    assert len(larm.rows("SELECT * FROM deliveries")) == 2


@pytest.mark.parametrize("action", ["fail", ""])
def test_a_fault_while_a_ping_changes_the_state_leaves_nothing_behind(house, action):
    larm = house(NOWHERE + JOB)
    larm.ping("job", "" if action else "fail")
    larm.clock.advance(1_000)
    before = larm.monitor("job"), larm.events(), larm.heartbeats("job")
    execute(larm, "CREATE TRIGGER fault AFTER INSERT ON deliveries "
                  "BEGIN SELECT RAISE(ABORT, 'fault'); END")
    with pytest.raises(Exception, match="fault"):
        larm.ping("job", action)
    assert (larm.monitor("job"), larm.events(), larm.heartbeats("job")) == before
    execute(larm, "DROP TRIGGER fault")
    larm.ping("job", action)
    assert len(larm.events()) == len(before[1]) + 1


def test_a_crash_right_after_the_deadline_loses_no_event(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(70_000)
    larm.clock.advance(500)
    larm.restart(0, crash=True)
    larm.watch_for(2_000)
    assert [event["type"] for event in larm.events()] == ["down"]


# The watcher and pings race


@pytest.mark.parametrize("first", ["ping", "watcher"])
@pytest.mark.parametrize(("action", "expected"), [("", []), ("fail", ["down"])])
def test_a_ping_that_races_the_watcher_changes_the_state_once(house, first, action, expected):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(70_001)
    steps = {"ping": lambda: larm.ping("job", action), "watcher": larm.tick}
    order = ["ping", "watcher"] if first == "ping" else ["watcher", "ping"]
    go = hang(larm.store)
    threads = []
    for waiting, name in enumerate(order, 1):  # both queue up behind a busy writer
        threads.append(threading.Thread(target=steps[name]))
        threads[-1].start()
        wait_until(lambda waiting=waiting: larm.store._queue.qsize() == waiting)
    go.set()
    for thread in threads:
        thread.join()
    larm.tick()
    assert [event["type"] for event in larm.events()] == expected
    assert larm.state("job") == ("down" if expected else "up")


def test_500_monitors_that_miss_one_deadline_are_500_events_in_one_tick(house):
    keys = [f"job-{number}" for number in range(500)]
    larm = house("".join(f'[monitors.{key}]\ninterval = "1m"\ngrace = "10s"\n' for key in keys))
    for key in keys:
        larm.ping(key)
    larm.clock.advance(70_500)
    larm.tick()
    assert sorted(event["key"] for event in larm.events()) == sorted(keys)
    assert {event["at"] for event in larm.events()} == {DEADLINE}
    larm.watch_for(3_000)
    assert len(larm.events()) == 500


# Ticks that come late


@pytest.mark.parametrize("late", [2_000, 9_999])
def test_a_late_tick_judges_nothing_until_the_next(house, late):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(69_500)
    larm.clock.advance(1_000 + late)
    larm.watcher.tick(1_000)
    assert larm.events() == []
    larm.clock.advance(1_000)
    larm.tick()
    assert changes(larm) == [("down", "missed", DEADLINE)]


def test_a_ping_that_waited_for_a_late_tick_is_in_time(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(69_500)
    larm.clock.advance(4_000)
    larm.watcher.tick(1_000)
    larm.ping("job")
    larm.watch_for(10_000)
    assert larm.events() == []


@pytest.mark.parametrize("waits", ["the judgement", "alive_at"])
def test_a_tick_that_waited_for_the_disk_judges_nothing_until_the_next(house, waits):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(69_500)
    larm.clock.advance(501)
    if waits == "alive_at":
        larm.watcher._alive_written -= 30_000
    go = hang(larm.store)
    tick = threading.Thread(target=larm.tick)
    tick.start()
    wait_until(lambda: larm.store._queue.qsize() == 1)
    larm.clock.advance(2_500)  # so long; pings may be waiting, too
    go.set()
    tick.join()
    assert larm.events() == []
    larm.ping("job")
    larm.watch_for(10_000)
    assert larm.events() == []


def test_a_disk_that_is_always_slow_does_not_keep_silence_from_being_noticed(house):
    larm = house(JOB + '[monitors.other]\ninterval = "1h"\n')
    larm.ping("job")
    planned = 1_000
    for _ in range(40):  # each tick takes 3 s, and has a throttled ping to write
        larm.ping("other")
        larm.clock.advance(planned)
        planned = larm.watcher.tick(planned)
        larm.clock.advance(3_000)
    assert changes(larm) == [("down", "missed", DEADLINE)]


# Any sequence


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    st.sampled_from([1_000, 60_000, 86_400_000]),
    st.sampled_from([0, 0.1]),
    st.lists(
        st.tuples(
            st.sampled_from([1, 1.0999, 1.1, 1.1001]) | st.floats(0.2, 5),
            st.sampled_from(["", "", "", "fail"]),
        ),
        min_size=1, max_size=15,
    ),
)  # fmt: skip
def test_events_are_dated_as_a_small_oracle_says(interval, grace, steps):
    """Each step: so many intervals of silence, then a ping."""
    grace = round(interval * grace)
    text = f"[monitors.job]\ninterval = {interval / 1000}\ngrace = {grace / 1000}\n"
    expected: list[tuple[str, str | None, int, int | None]] = []
    deadline_at = down_since = last_fail = None
    with tempfile.TemporaryDirectory() as folder:
        larm = House(Path(folder), text)
        for silence, action in [(0, ""), *steps]:
            larm.clock.advance(round(interval * silence))
            larm.tick()
            now = larm.clock.now()
            if deadline_at is not None and deadline_at < now:
                expected.append(("down", "missed", deadline_at, None))
                down_since, deadline_at = deadline_at, None
            larm.ping("job", action)
            if action == "fail" and down_since is None:
                expected.append(("down", "failed", now, None))
                down_since, deadline_at, last_fail = now, None, now
            elif action == "fail" and (last_fail is None or now - last_fail >= interval / 10):
                expected[-1] = ("down", "failed", expected[-1][2], None)  # the newest reason
                last_fail = now
            elif action == "":
                if down_since is not None:
                    expected.append(("up", None, now, now - down_since))
                down_since, deadline_at = None, now + interval + grace
        events = larm.events()
        larm.stop()
    assert [(one["type"], one["reason"], one["at"], one["down_ms"]) for one in events] == expected


# With a real process


def test_the_first_attempt_is_under_way_within_5_seconds_of_the_deadline(start, webhook):
    larm = start(
        f'[channels]\nphone = "{webhook.url}"\n'
        '[monitors.job]\ninterval = 1\ngrace = 0\ntoken = "a-token-for-the-tests"\n'
    )
    larm.ping()
    wait_until(lambda: webhook.alerts)
    [down] = larm.rows("SELECT * FROM events")
    assert webhook.arrived[0] - down["at"] / 1000 < 5
    assert webhook.titles() == ["DOWN: job"]


def test_a_monitor_that_is_paused_just_then_is_not_called_down(house):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(70_001)
    with larm.store.reading() as db:
        due = program.due_monitors(db, "deadline_at", larm.clock.now())
    job, now = larm.config.monitors["job"], larm.clock.now()
    larm.store.write(lambda db: program.pause_or_resume(db, job, "pause", None, now))
    larm.store.write(lambda db: larm.watcher._call_down(db, due, ()))
    assert (larm.events(), larm.state("job")) == ([], "paused")


def test_requests_that_wait_for_the_server_put_the_judgement_off_but_not_for_ever(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watcher.is_backlogged = lambda: True
    larm.watch_for(71_000)
    assert larm.events() == []
    larm.watch_for(3_000)
    assert len(larm.events()) == 1


def test_more_than_a_batch_that_miss_one_deadline_do_not_wait_for_a_second_each(house):
    count = 2 * program.BATCH + 1
    larm = house("".join(f'[monitors.job-{n}]\ninterval = "1m"\n' for n in range(count)))
    for key in larm.watched:
        larm.ping(key)
    larm.clock.advance(70_000)
    slept = 0
    while len(larm.events()) < count:
        slept += larm.watcher.tick(larm.clock.monotonic() - larm.watcher.ticked)
    assert slept < 1_100
