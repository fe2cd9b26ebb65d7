"""Law 2: extra pings never alert, and at most one success a window is stored."""

from __future__ import annotations

import itertools
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import START, House
from hypothesis import given, settings
from hypothesis import strategies as st

import larm as program

JOB = '[monitors.job]\ninterval = "1m"\ngrace = "10s"\n'
WINDOW = 6_000  # of JOB
HOUR, DAY = 3_600_000, 86_400_000

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def ping_after(larm: House, ms: int, action: str = "") -> None:
    larm.clock.advance(ms)
    larm.ping("job", action)


def stored(larm: House, signal: str = "success") -> list[int]:
    """When the stored heartbeats came, since START."""
    return [one["at"] - START for one in larm.heartbeats("job") if one["signal"] == signal]


def set_wall_while_off(larm: House, by_ms: int) -> None:
    larm.stop()
    larm.clock.set_wall(by_ms)
    larm.clock.resync()
    larm.open()


def test_of_200_pings_in_one_interval_at_most_10_are_stored(house):
    larm = house(JOB)
    for _ in range(200):
        larm.ping("job")
        larm.clock.advance(300)
    assert stored(larm) == list(range(0, 60_000, WINDOW))


def test_a_window_ends_to_the_millisecond(house):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, WINDOW - 1)
    ping_after(larm, 1)
    assert stored(larm) == [0, WINDOW]


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_opens_no_new_window(house, crash):
    larm = house(JOB)
    larm.ping("job")
    larm.restart(after_ms=WINDOW - 1, crash=crash)
    larm.ping("job")
    larm.clock.advance(1)
    larm.ping("job")
    assert len(stored(larm)) <= 2
    assert WINDOW - 1 not in stored(larm)


def test_start_and_log_have_a_window_of_their_own(house):
    larm = house(JOB)
    for action in ("start", "start", "", "", "log", "log"):
        ping_after(larm, 100, action)
    assert [one["signal"] for one in larm.heartbeats("job")] == ["start", "success", "log"]


def test_start_and_log_are_no_sign_of_life(house):
    larm = house(JOB)
    larm.ping("job")
    for _ in range(12):
        larm.watch_for(6_000)
        larm.ping("job", "start")
        larm.ping("job", "log")
    assert [event["at"] for event in larm.events()] == [START + 70_000]


@repeatable
@given(
    st.integers(1_000, 3_000) | st.sampled_from([60_000, DAY]),
    st.lists(st.tuples(st.floats(0, 0.3), st.booleans()), min_size=5, max_size=30),
)
def test_at_most_one_success_a_window_is_stored(interval, steps):
    with tempfile.TemporaryDirectory() as folder:
        larm = House(Path(folder), f"[monitors.job]\ninterval = {interval / 1000}\n")
        for fraction, restarts in steps:
            ping_after(larm, round(interval * fraction))
            if restarts:
                larm.restart(0)
        times = stored(larm)
        larm.stop()
    window = -(-interval // 10)
    assert all(later - earlier >= window for earlier, later in itertools.pairwise(times))


def test_the_deadline_counts_from_the_last_received_ping(house):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, WINDOW - 1)
    larm.tick()
    assert stored(larm) == [0]
    assert larm.monitor("job")["deadline_at"] == START + WINDOW - 1 + 70_000


def test_the_deadline_counts_from_the_last_received_ping_after_a_clean_restart(house):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, WINDOW - 1)
    larm.restart(after_ms=0)
    assert larm.monitor("job")["deadline_at"] == START + WINDOW - 1 + 70_000


def test_a_crash_loses_no_throttled_ping_that_a_tick_has_seen(house):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, WINDOW - 1)
    larm.tick()
    larm.restart(after_ms=0, crash=True)
    assert larm.monitor("job")["deadline_at"] == START + WINDOW - 1 + 70_000


@pytest.mark.parametrize("after_a_gap", [False, True])
def test_a_throttled_ping_outlives_a_disk_that_was_full_for_a_moment(house, after_a_gap):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, WINDOW - 1)
    if after_a_gap:
        larm.clock.set_wall(HOUR)
    larm.store.failure = "disk full"
    with pytest.raises(program.Unrecordable):
        larm.tick()
    larm.store.failure = None
    larm.tick()
    larm.restart(after_ms=0)
    left = larm.monitor("job")["deadline_at"] - larm.clock.now()
    assert left == 70_000


def test_a_throttled_ping_counts_with_the_interval_of_a_file_saved_just_then(house):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, WINDOW - 1)
    larm.reload(JOB.replace("1m", "2h"))
    larm.tick()
    assert larm.monitor("job")["deadline_at"] == START + WINDOW - 1 + 2 * HOUR + 10_000


@repeatable
@given(
    st.integers(1_000, 5_000) | st.sampled_from([60_000, HOUR, 3 * DAY]),
    st.sampled_from([0, 0, 0.001, 0.1]),
    st.lists(
        st.tuples(
            st.sampled_from([0, 0.01, 0.0999, 0.1, 1, 1]) | st.floats(0, 1),
            st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["tick", "tick", "restart"])),
                     max_size=3),
        ),
        min_size=2, max_size=15,
    ),
)  # fmt: skip
def test_pings_never_further_apart_than_the_interval_never_alert(interval, grace, steps):
    """Whichever of them the throttle dropped, and whenever Larm looked or was restarted."""
    grace = round(interval * grace)
    text = f"[monitors.job]\ninterval = {interval / 1000}\ngrace = {grace / 1000}\n"
    with tempfile.TemporaryDirectory() as folder:
        larm = House(Path(folder), text)
        larm.ping("job")
        restarted = False
        for fraction, looks in steps:
            next_ping = larm.clock.now() + round(interval * fraction)
            for share, what in sorted(looks):
                larm.clock.advance(round((next_ping - larm.clock.now()) * share))
                if what == "tick":
                    larm.tick()
                else:
                    larm.restart(after_ms=(next_ping - larm.clock.now()) // 2)
                    restarted = True
            larm.clock.advance(next_ping - larm.clock.now())
            larm.tick()
            larm.ping("job")
        larm.tick()
        deadline_at = larm.monitor("job")["deadline_at"]
        assert larm.events() == []
        assert larm.state("job") == "up"
        assert restarted or deadline_at == larm.clock.now() + interval + grace
        larm.clock.advance(interval + grace)
        larm.tick()
        assert larm.events() == []
        larm.clock.advance(1)
        larm.tick()
        assert [event["at"] for event in larm.events()] == [deadline_at]
        larm.stop()


@pytest.mark.parametrize("running", [False, True])
def test_a_last_heartbeat_from_the_future_drops_no_real_pings(house, running):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(WINDOW)
    if running:
        larm.clock.set_wall(-HOUR)
        larm.tick()
    else:
        set_wall_while_off(larm, -HOUR)
    for _ in range(5):
        larm.ping("job")
        larm.clock.advance(WINDOW)
    assert len(stored(larm)) == 6


def test_a_recovery_is_stored_whatever_the_window(house):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, 100, "fail")
    ping_after(larm, 100)
    assert stored(larm) == [0, 200]
    assert larm.state("job") == "up"


def test_a_failure_is_stored_whatever_the_window(house):
    larm = house(JOB)
    for action in ("fail", "", "fail"):
        ping_after(larm, 100, action)
    assert stored(larm, "fail") == [100, 300]
    assert larm.state("job") == "down"


@pytest.mark.parametrize("crash", [False, True])
def test_a_recovery_after_a_restart_is_stored_whatever_the_window(house, crash):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, 100, "fail")
    larm.restart(100, crash=crash)
    larm.ping("job")
    assert larm.state("job") == "up"


def test_state_changes_are_stored_whatever_the_window_ten_times_an_interval(house):
    larm = house(JOB)
    for number in range(400):
        ping_after(larm, 100, "fail" if number % 2 else "")
    assert 10 <= len(larm.events()) <= 10 + 2 * 40_000 // WINDOW
    assert len(larm.heartbeats("job")) <= 12 + 2 * 40_000 // WINDOW


def test_the_first_success_after_ten_changes_and_a_window_brings_it_up(house):
    larm = house(JOB)
    for number in range(40):
        ping_after(larm, 50, "" if number % 2 else "fail")
    larm.watch_for(WINDOW)
    larm.ping("job")
    assert larm.state("job") == "up"


def test_the_first_success_after_a_missed_deadline_brings_it_up(house):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, WINDOW - 1)
    larm.watch_for(80_000)
    assert larm.state("job") == "down"
    larm.ping("job")
    assert larm.state("job") == "up"


def test_a_success_that_could_not_be_recorded_throttles_none_after_it(house):
    larm = house(JOB)
    larm.ping("job", "fail")
    larm.store.write(lambda db: db.execute(
        "CREATE TRIGGER fault BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'fault'); END"
    ))
    with pytest.raises(Exception, match="fault"):
        larm.ping("job")
    larm.store.write(lambda db: db.execute("DROP TRIGGER fault"))
    ping_after(larm, 1)
    assert larm.state("job") == "up"


@pytest.mark.parametrize("before", ["pending", "down"])
def test_a_success_while_paused_throttles_none_after_resuming(house, before):
    larm = house(JOB)
    if before == "down":
        larm.ping("job", "fail")
    larm.reload(JOB + "enabled = false\n")
    ping_after(larm, 100)
    larm.reload(JOB)
    assert larm.state("job") == {"pending": "pending", "down": "up"}[before]
    ping_after(larm, 100)
    assert larm.state("job") == "up"


def test_of_pings_from_many_threads_at_one_moment_one_is_stored(house):
    larm = house(JOB)
    start = threading.Barrier(16)

    def pings() -> None:
        start.wait()
        for _ in range(50):
            larm.ping("job")

    threads = [threading.Thread(target=pings) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored(larm) == [0]


def test_pings_from_many_threads_store_at_most_one_a_window(house):
    larm = house(JOB)
    over = threading.Event()

    def pings() -> None:
        while not over.is_set():
            larm.ping("job")

    threads = [threading.Thread(target=pings) for _ in range(12)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        with larm.intake.lock:  # the FakeClock's two times move as one
            larm.clock.advance(250)
        larm.tick()
    over.set()
    for thread in threads:
        thread.join()
    times = stored(larm)
    assert all(later - earlier >= WINDOW for earlier, later in itertools.pairwise(times))
    assert len(times) >= 75_000 // WINDOW // 2
    assert larm.events() == []
