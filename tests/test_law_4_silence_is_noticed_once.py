"""Law 4: silence is noticed once, dated at the deadline itself, and a failure always."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time

import pytest
from conftest import START, TOKEN, FakeClock, in_ms, wait_until

from larm import DAY, HOUR, SECOND

JOB = '[monitors.job]\ninterval = "1m"\ngrace = "10s"\n'
NOWHERE = '[channels]\nphone = "json://127.0.0.1:9/"\nmail = "json://127.0.0.1:9/"\n'
WHOLE = 70_000  # what a ping gives JOB
MISSED = ("down", "missed", WHOLE)


def test_a_missed_deadline_is_one_down_event_dated_at_it(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch(65_000)
    assert (larm.state("job"), larm.events()) == ("late", [])
    larm.watch(300_000)
    assert larm.changes() == [MISSED]
    assert larm.state("job") == "down"
    assert larm.events()[0]["last_heartbeat_at"] == START


def test_a_success_after_it_is_one_up_event_with_the_time_it_was_down(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch(300_000)
    larm.ping("job")
    larm.ping("job")
    assert larm.changes() == [MISSED, ("up", None, 300_000)]
    assert [event["down_ms"] for event in larm.events()] == [None, 230_000]
    assert larm.state("job") == "up"


def test_a_monitor_that_was_never_pinged_misses_nothing(house):
    larm = house(JOB)
    larm.watch(DAY, step=HOUR)
    assert (larm.state("job"), larm.events()) == ("pending", [])


def test_a_deadline_is_not_missed_while_it_is_now(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch(WHOLE)
    larm.ping("job")
    larm.watch(WHOLE)
    assert larm.events() == []
    larm.watch(1)
    assert larm.changes() == [("down", "missed", 2 * WHOLE)]


def test_the_watcher_sleeps_no_longer_than_to_the_deadline(house):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(69_600)
    sleep = larm.larm.tick(69_600)
    assert sleep < 500
    larm.clock.advance(sleep)
    larm.larm.tick(sleep)
    assert larm.changes() == [MISSED]


def test_a_down_monitor_is_not_noticed_again_after_a_restart(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch(80_000)
    for crash in (False, True):
        larm.restart(600_000, crash=crash)
        larm.watch(200_000)
    assert larm.changes() == [MISSED]


def test_a_crash_right_after_the_deadline_loses_no_event(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch(70_000)
    larm.clock.advance(500)
    larm.restart(crash=True)
    larm.watch(2_000)
    assert [event["type"] for event in larm.events()] == ["down"]


def test_600_monitors_that_miss_one_deadline_are_600_events_within_2_seconds(house):
    keys = [f"job-{number}" for number in range(600)]
    larm = house("".join(
        f'[monitors.{key}]\ninterval = "1m"\ngrace = "10s"\ntoken = "a-token-for-{key}"\n'
        for key in keys
    ))
    larm.tokens = {key: f"a-token-for-{key}" for key in keys}
    for key in keys:
        larm.ping(key)
    larm.watch(70_000, step=35_000)
    slept = planned = 1
    while slept < 2_000:
        larm.clock.advance(planned)
        planned = larm.larm.tick(planned)
        slept += planned
    events = larm.events()
    assert sorted(event["monitor"] for event in events) == sorted(keys)
    assert {event["at"] for event in events} == {START + WHOLE}


# Failures that jobs report themselves


@pytest.mark.parametrize(("steps", "expected"), [
    (["fail"], [("down", "failed", 0)]),  # the first ping may be one
    (["", "1"], [("down", "failed", 5_000)]),
    (["", "255"], [("down", "failed", 5_000)]),
    (["0", "fail"], [("down", "failed", 5_000)]),
    (["", "fail", "fail", "1"], [("down", "failed", 5_000)]),  # no second event
    (["", "fail", 300_000], [("down", "failed", 5_000)]),  # and it misses nothing
    (["", 80_000, "fail"], [("down", "failed", WHOLE)]),  # with the newest reason
    (["fail", "0"], [("down", "failed", 0), ("up", None, 5_000)]),
    (["", "fail", "", "fail", ""], [("down", "failed", 5_000), ("up", None, 10_000),
                                    ("down", "failed", 15_000), ("up", None, 20_000)]),
])  # fmt: skip
def test_a_reported_failure_is_down_at_once_and_once(house, steps, expected):
    """Pings 5 s apart, and silences."""
    larm = house(JOB)
    for step in steps:
        if isinstance(step, int):
            larm.watch(step)
        else:
            larm.ping("job", step)
            larm.watch(5_000)
    assert larm.changes() == expected
    assert larm.state("job") == expected[-1][0]


def test_a_failure_keeps_what_the_job_said(house):
    larm = house(JOB)
    larm.ping("job", "3", body="no space left")
    [heartbeat] = larm.heartbeats("job")
    assert (heartbeat["signal"], heartbeat["exit_status"]) == ("fail", 3)
    assert heartbeat["body"] == "no space left"
    assert "no space left" in larm.ask("/monitor/job").body.decode()


# One transaction


def channels(event):
    return sorted((one["channel"], one["state"]) for one in event["deliveries"])


def test_every_event_comes_with_a_delivery_for_each_channel(house):
    larm = house(NOWHERE + JOB)
    larm.ping("job", "fail")
    larm.ping("job")
    for event in larm.events():
        assert channels(event) == [("mail", "pending"), ("phone", "pending")]


@pytest.mark.parametrize("table", ["events", "deliveries"])
@pytest.mark.parametrize("what", ["silence", "fail", "success"])
def test_a_fault_while_the_state_changes_leaves_nothing_behind(house, table, what):
    larm = house(NOWHERE + JOB)
    larm.ping("job", "fail" if what == "success" else "")
    larm.watch(WHOLE if what == "silence" else 1_000)
    larm.clock.advance(1)
    before = larm.monitor("job"), larm.events(), larm.heartbeats("job")
    larm.sql(f"CREATE TRIGGER fault AFTER INSERT ON {table}"
             " BEGIN SELECT RAISE(ABORT, 'fault'); END")  # fmt: skip
    if what == "silence":
        with contextlib.suppress(Exception):
            larm.tick()
    else:
        larm.ping("job", "" if what == "success" else "fail", status=503)
    assert (larm.monitor("job"), larm.events(), larm.heartbeats("job")) == before
    larm.sql("DROP TRIGGER fault")
    if what == "silence":
        larm.watch(2_000)
    else:
        larm.ping("job", "" if what == "success" else "fail")
    [event] = larm.events()[len(before[1]):]
    assert event["at"] == START + (WHOLE if what == "silence" else 1_001)
    assert channels(event) == [("mail", "pending"), ("phone", "pending")]


# The watcher and pings race


@pytest.mark.parametrize("action", ["", "fail"])
@pytest.mark.parametrize("first", ["ping", "watcher"])
def test_a_ping_that_races_the_watcher_changes_the_state_once(house, first, action):
    """Both come just after the deadline, and wait for the disk."""
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(WHOLE + 1)
    steps = [lambda: larm.ping("job", action), larm.tick]
    larm.queue_up(*steps[:: 1 if first == "ping" else -1])
    larm.watch(3_000)
    assert larm.changes() in {  # by who of the two got to the database first
        "": ([], [MISSED, ("up", None, WHOLE + 1)]),
        "fail": ([("down", "failed", WHOLE + 1)], [("down", "failed", WHOLE)]),
    }[action][: 1 if first == "ping" else 2]
    assert larm.state("job") == ("down" if action else "up")


def test_a_ping_that_waited_for_the_disk_is_in_time(house):
    """The deadline passes, and is judged, while it waits."""
    larm = house(JOB)
    larm.ping("job")
    larm.watch(69_000)
    with larm.hanging_disk():
        waiting = [threading.Thread(target=larm.ping, args=("job",))]
        waiting[0].start()
        time.sleep(0.05)
        larm.clock.advance(1_500)
        waiting.append(threading.Thread(target=larm.tick))
        waiting[1].start()
        time.sleep(0.05)
    for thread in waiting:
        thread.join()
    larm.watch(5_000)
    assert larm.events() == []
    assert larm.left("job") == WHOLE - 6_500


class BusyClock(FakeClock):
    """A clock that keeps the thread named "held" as soon as it has read it, as the scheduler of a
    busy machine may, until it is let go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read, self.go = threading.Event(), threading.Event()

    def monotonic(self) -> int:
        found = super().monotonic()
        if threading.current_thread().name == "held":
            self.read.set()
            self.go.wait(10)
        return found


@pytest.mark.parametrize("set_by", [0, HOUR, -HOUR])
def test_a_ping_that_has_its_date_and_is_not_in_the_queue_yet_is_in_time(house, set_by):
    """The lock must not be let go between the two: the deadline passes, or the clock is set."""
    clock = BusyClock()
    larm = house(JOB, clock)
    larm.ping("job")
    larm.watch(69_000)
    held = threading.Thread(target=larm.ping, args=("job",), name="held")
    held.start()
    assert clock.read.wait(10)
    clock.set_wall(set_by)
    clock.advance(1_001)
    tick = threading.Thread(target=larm.tick)
    tick.start()
    tick.join(0.2)
    clock.go.set()
    held.join()
    tick.join()
    larm.tick()
    assert larm.events() == []
    assert WHOLE - 1_001 <= larm.left("job") <= WHOLE


def test_a_ping_in_time_is_in_time_however_close_the_watcher_is_behind_it(house):
    """The wait between the two is tuned to where sometimes this one is first, sometimes that."""
    larm = house(JOB)
    wait = known = 0
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            larm.ping("job")
            larm.watch(WHOLE, step=WHOLE)
            ping = threading.Thread(target=larm.ping, args=("job",))
            ping.start()
            for _ in range(wait):
                pass
            larm.watch(1)
            ping.join()
            newest = larm.api("events?limit=1")
            was_late = bool(newest) and newest[0]["id"] != known
            known = newest[0]["id"] if newest else 0
            wait = max(0, wait + (60 if was_late else -60))
    finally:
        sys.setswitchinterval(before)
    changes = larm.changes()
    for (_, _, missed), (_, _, back) in zip(changes[::2], changes[1::2], strict=True):
        assert missed < back


@pytest.mark.parametrize("first", ["pause", "watcher"])
def test_a_monitor_that_is_paused_just_then_is_called_down_before_it_or_not_at_all(house, first):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(WHOLE + 1)
    steps = [lambda: larm.pause("job"), larm.tick]
    larm.queue_up(*steps[:: 1 if first == "pause" else -1])
    larm.watch(3_000)
    assert larm.changes() in ([], [MISSED])[: 1 if first == "pause" else 2]
    assert larm.state("job") == "paused"


# Ticks that come late


def test_a_machine_that_is_always_slow_does_not_keep_silence_from_being_noticed(house):
    larm = house(JOB + '[monitors.other]\ninterval = "1h"\n')
    larm.ping("job")
    while larm.clock.now() < START + WHOLE + 15_000:  # each tick is 3 s late
        larm.ping("other")
        larm.clock.advance(SECOND + 3_000)
        larm.tick(late=3_000)
    assert larm.changes() == [MISSED]


# With a real process


def test_the_first_attempt_is_under_way_within_5_seconds_of_the_deadline(start, webhook):
    larm = start(
        f'[channels]\nphone = "{webhook.url}"\n'
        f'[monitors.job]\ninterval = 1\ngrace = 0\ntoken = "{TOKEN}"\n'
    )
    larm.ping()
    wait_until(lambda: webhook.alerts)
    [down] = in_ms(larm.get("/api/v1/events").json["data"])
    assert webhook.arrived[0] - down["at"] / 1000 < 5
    assert webhook.titles() == ["DOWN: job"]


def test_a_ping_that_comes_while_the_process_is_stopped_for_seconds_is_in_time(start):
    """That is too short for a gap; the watcher must not be quicker than the server."""
    larm = start(f'[monitors.job]\ninterval = 1.5\ngrace = 0\ntoken = "{TOKEN}"\n')
    larm.ping()
    time.sleep(0.7)
    larm.popen.send_signal(signal.SIGSTOP)
    waiting = threading.Thread(target=larm.ping)
    waiting.start()
    time.sleep(2)
    larm.popen.send_signal(signal.SIGCONT)
    waiting.join()
    time.sleep(0.7)
    assert larm.get("/api/v1/events").json["data"] == []
