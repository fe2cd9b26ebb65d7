"""Law 2: extra pings never alert, and at most one success a window is stored."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from conftest import QUICK, START, House
from hypothesis import given, settings
from hypothesis import strategies as st

from larm import DAY, HOUR, MINUTE, SECOND, Unrecordable

JOB = '[monitors.job]\ninterval = "1m"\ngrace = "10s"\n'
WINDOW = 6_000  # of JOB
WHOLE = 70_000  # what a ping gives JOB

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def ping_after(larm: House, ms: int, action: str = "", **more: object) -> None:
    larm.clock.advance(ms)
    larm.ping("job", action, **more)


# One success a window


def test_of_200_pings_in_one_interval_10_are_stored(house):
    larm = house(JOB)
    for _ in range(200):
        larm.ping("job")
        larm.clock.advance(300)
    assert larm.stored("job") == list(range(0, 60_000, WINDOW))


@pytest.mark.parametrize("crash", [None, False, True])
def test_a_window_ends_to_the_millisecond_also_over_a_restart(house, crash):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(WINDOW - 1)
    if crash is not None:
        larm.restart(crash=crash)
    larm.ping("job")
    ping_after(larm, 1)
    assert larm.stored("job") == [0, WINDOW]


def test_a_ping_that_the_database_refused_opens_no_window(house):
    larm = house(JOB.replace("1m", "100s"))  # a window of 10 s
    larm.ping("job")
    larm.restart()
    with larm.full_disk():
        ping_after(larm, 9_000, "log", status=503)
        larm.ping("job", status=503)
    larm.recover()
    ping_after(larm, 2_000)
    assert larm.stored("job") == [0, 11_000]


def test_a_success_that_a_fault_kept_from_being_recorded_throttles_none_after_it(house):
    larm = house(JOB)
    larm.ping("job", "fail")
    larm.sql("CREATE TRIGGER fault BEFORE INSERT ON events"
             " BEGIN SELECT RAISE(ABORT, 'fault'); END")  # fmt: skip
    larm.ping("job", status=503)
    larm.sql("DROP TRIGGER fault")
    ping_after(larm, 1)
    assert (larm.stored("job"), larm.state("job")) == ([1], "up")


def test_a_start_between_two_successes_does_not_matter(house):
    larm = house(JOB)
    for action in ("", "start", "", "start", "0"):
        ping_after(larm, 1_000, action)
    assert larm.stored("job") == [1_000]


def test_log_has_a_window_of_its_own(house):
    larm = house(JOB)
    for action in ("", "log", "", "log"):
        ping_after(larm, 100, action)
    assert (larm.stored("job"), larm.stored("job", "log")) == ([100], [200])


def test_starts_are_bounded_too(house):
    larm = house(JOB)
    for number in range(200):
        ping_after(larm, 300, "start", rid=f"run {number}")
    assert len(larm.heartbeats("job")) <= 20


def test_concurrent_first_pings_of_one_batch_store_one(house):
    larm = house(JOB)
    larm.token("job")
    larm.queue_up(*[lambda: larm.ping("job")] * 8)
    assert larm.stored("job") == [0]


def test_pings_from_many_threads_store_at_most_one_a_window(house):
    larm = house(JOB)
    over = threading.Event()

    def pings() -> None:
        while not over.is_set():
            larm.ping("job")

    with ThreadPoolExecutor(6) as threads:
        pinging = [threads.submit(pings) for _ in range(6)]
        for _ in range(120):
            larm.clock.advance(500)
            larm.tick()
        over.set()
    for one in pinging:
        one.result()  # each was answered 200
    times = larm.stored("job")
    assert all(later - earlier >= WINDOW for earlier, later in itertools.pairwise(times))
    assert len(times) > 1  # as many as the threads got turns
    assert larm.events() == []


@repeatable
@given(
    st.sampled_from([SECOND, 1_234, MINUTE, DAY]),
    st.lists(
        st.tuples(
            st.sampled_from([0, 0.01, 0.499, 0.5, 0.999, 1]) | st.floats(0, 1.5),
            st.sampled_from(["", "", "", "0", "start", "log", "1", "stop", "crash"]),
        ),
        min_size=5, max_size=25,
    ),
)  # fmt: skip
def test_what_is_stored_counts_from_the_last_success_that_was_stored(interval, steps):
    """Exactly, whatever came between. A success that changes the state is stored in any case, ten
    times an interval: here a history fails four times at most.
    """
    window = -(-interval // 10)
    expected: list[int] = []
    state, fails = "pending", 0
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        larm = House(Path(folder), f"[monitors.job]\ninterval = {interval / 1000}\n")
        for fraction, action in steps:
            larm.clock.advance(round(window * fraction))
            if action in ("stop", "crash"):
                larm.restart(crash=action == "crash")
            elif action != "1" or fails < 4:
                larm.ping("job", action)
            if action in ("", "0"):
                now = larm.clock.now() - START
                if state != "up" or now - expected[-1] >= window:
                    expected.append(now)
                state = "up"
            elif action == "1" and fails < 4:
                state, fails = "down", fails + 1
        assert larm.stored("job") == expected
        larm.crash()


# What changes the state is heard, however often


@pytest.mark.parametrize("crash", [None, False, True])
def test_a_failure_and_a_recovery_are_stored_whatever_the_window(house, crash):
    larm = house(JOB)
    for action, state in (("", "up"), ("fail", "down"), ("", "up"), ("1", "down"), ("0", "up")):
        ping_after(larm, 100, action)
        assert larm.state("job") == state
        if crash is not None:
            larm.restart(crash=crash)
    assert (larm.stored("job"), larm.stored("job", "fail")) == ([100, 300, 500], [200, 400])


def test_a_signal_always_changes_the_state_and_what_is_stored_stays_bounded(house):
    """ "1d" has a window of more than two hours: all of this happens within one."""
    larm = house(JOB.replace("1m", "1d"))
    for number in range(60):
        ping_after(larm, 4_000, body=f"good {number}")
        assert larm.state("job") == "up"
        ping_after(larm, 4_000, "1", body=f"bad {number}")
        assert larm.state("job") == "down"
    assert [(event["type"], event["at"] - START) for event in larm.events()] == [
        ("up" if number % 2 else "down", 8_000 + 4_000 * number) for number in range(119)
    ]
    heartbeats = larm.heartbeats("job")
    assert len(heartbeats) <= 12
    newest = max(heartbeats, key=lambda one: one["at"])
    assert (newest["signal"], newest["body"]) == ("fail", "bad 59")


def test_a_success_within_the_window_ends_an_overrun(house):
    larm = house(JOB.replace("1m", "1h") + 'max_runtime = "1m"\n')
    larm.ping("job")
    larm.ping("job", "start")
    larm.watch(62_000)
    assert larm.state("job") == "down"
    larm.ping("job")
    assert larm.state("job") == "up"


def test_a_success_right_after_a_failure_that_is_still_under_way_brings_it_up(house):
    """Though the success before is so fresh that a further one would be dropped."""
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, 100)
    larm.queue_up(partial(larm.ping, "job", "fail"), partial(larm.ping, "job"))
    assert [event["type"] for event in larm.events()] == ["down", "up"]
    assert larm.state("job") == "up"


@pytest.mark.parametrize("before", ["pending", "down"])
def test_a_success_while_paused_throttles_none_after_resuming(house, before):
    larm = house(JOB)
    if before == "down":
        larm.ping("job", "fail")
    larm.pause("job")
    ping_after(larm, 100)
    larm.resume("job")
    ping_after(larm, 100)
    assert (larm.state("job"), larm.left("job")) == ("up", WHOLE)


@pytest.mark.parametrize("when", ["off", "running", "a ping is under way"])
def test_a_clock_that_is_set_back_drops_no_real_pings(house, when):
    """The last heartbeat is dated in the future then."""
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(WINDOW // 2)
    if when != "a ping is under way":
        larm.ping("job")
    if when == "off":
        larm.stop()
        larm.clock.set_wall(-HOUR)
        larm.clock.resync()
        larm.open()
    elif when == "running":
        larm.clock.set_wall(-HOUR)
        larm.tick()
    else:
        set_back = partial(larm.clock.set_wall, -HOUR)
        larm.queue_up(partial(larm.ping, "job"), set_back, larm.tick)
    for _ in range(5):
        larm.clock.advance(WINDOW)
        larm.ping("job")
    assert len(larm.stored("job")) == 6


# What is not stored is a sign of life


def test_start_and_log_are_no_sign_of_life(house):
    larm = house(JOB)
    larm.ping("job")
    for _ in range(12):
        larm.watch(6_000)
        larm.ping("job", "start")
        larm.ping("job", "log")
    assert larm.changes() == [("down", "missed", WHOLE)]


def throttled(house) -> House:
    """One ping stored, and two that are not, the last of them WINDOW - 1 ms later."""
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, WINDOW - 10)
    ping_after(larm, 9)
    return larm


@pytest.mark.parametrize("then", ["clean restart", "crash after half a minute"])
def test_the_deadline_counts_from_the_last_ping_received(house, then):
    larm = throttled(house)
    if then == "clean restart":
        larm.restart()
    else:
        larm.watch(31_000)
        larm.restart(crash=True)
    assert larm.stored("job") == [0]
    assert larm.monitor("job")["deadline_at"] == START + WINDOW - 1 + WHOLE


@pytest.mark.parametrize("noticed", ["at once", "at the next write"])
def test_a_throttled_ping_outlives_a_disk_that_was_full_for_a_while(house, noticed):
    larm = house(JOB)
    larm.ping("job")
    ping_after(larm, 1_000)
    ping_after(larm, 4_000)
    with larm.full_disk():
        if noticed == "at once":
            larm.ping("job", "log", status=503)
        for _ in range(40):
            larm.clock.advance(SECOND)
            with contextlib.suppress(Unrecordable):
                larm.tick()
    larm.recover()
    larm.restart()
    watched = 0 if noticed == "at once" else 25_000  # until the first write, half a minute after 0
    assert abs(larm.left("job") - WHOLE + watched) <= SECOND


def test_a_throttled_ping_counts_with_the_interval_of_a_file_saved_just_then(house):
    larm = throttled(house)
    larm.save(JOB.replace("1m", "2h"))
    assert larm.monitor("job")["deadline_at"] == START + WINDOW - 1 + 2 * HOUR + 10_000


def test_a_throttled_ping_counts_for_a_monitor_that_is_removed_just_then_and_put_back(house):
    larm = throttled(house)
    larm.save(JOB.replace("job", "other"))
    larm.watch(40_000)
    larm.save(JOB)
    assert larm.left("job") == WHOLE


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
        min_size=2, max_size=12,
    ),
)  # fmt: skip
def test_pings_never_further_apart_than_the_interval_never_alert(interval, grace, steps):
    """Whichever of them the throttle dropped, and whenever Larm looked or was restarted."""
    grace = round(interval * grace)
    text = f"[monitors.job]\ninterval = {interval / 1000}\ngrace = {grace / 1000}\n"
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        larm = House(Path(folder), text)
        larm.ping("job")
        for fraction, looks in steps:
            next_ping = larm.clock.now() + round(interval * fraction)
            for share, what in sorted(looks):
                larm.clock.advance(round((next_ping - larm.clock.now()) * share))
                if what == "tick":
                    larm.tick()
                else:
                    larm.restart(after_ms=(next_ping - larm.clock.now()) // 2)
            larm.clock.advance(next_ping - larm.clock.now())
            larm.tick()
            larm.ping("job")
        larm.tick()
        assert (larm.events(), larm.state("job")) == ([], "up")
        larm.clock.advance(interval + grace)  # and this one was the last
        larm.tick()
        assert larm.events() == []
        larm.clock.advance(1)
        larm.tick()
        assert [event["at"] for event in larm.events()] == [larm.clock.now() - 1]
        larm.crash()
