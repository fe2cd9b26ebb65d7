"""Signals: what start, success, fail, exit statuses and log do to a monitor and to its runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, START, TOKEN, FakeClock, House, Process, Webhook, launch, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

import larm

SECOND, MINUTE, HOUR, DAY = larm.SECOND, larm.MINUTE, larm.HOUR, larm.DAY
JOB = '[monitors.job]\ninterval = "1h"\ngrace = "10m"\nmax_runtime = "20m"\n'
WINDOW = 6 * MINUTE  # of JOB
OTHER = '[monitors.other]\ninterval = "366d"\n'
NIGHTLY = """timezone = "UTC"
[channels]
hook = "{}"
[monitors.job]
schedule = "0 3 * * *"
grace = "1h"
"""  # START is at 08:00, 19 hours before the first night's run

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def after(house: House, ms: int, action: str = "", rid: str | None = None,
          body: str | None = None) -> None:
    """Watch for so long, then ping."""
    house.watch_for(ms, step=MINUTE)
    house.ping("job", action, rid=rid, body=body)


def events(house: House) -> list[tuple[str, str | None, int]]:
    """(type, reason, minutes since START) of each."""
    return [(one["type"], one["reason"], (one["at"] - START) // MINUTE) for one in house.events()]


def running(house: House) -> list[str | None]:
    """The rids of the open runs."""
    return [row["rid"] for row in house.rows("SELECT rid FROM runs ORDER BY id")]


def durations(house: House) -> list[tuple[str, int | None]]:
    """The stored ends of runs, and how many minutes each took."""
    return [
        (one["signal"], one["duration_ms"] and one["duration_ms"] // MINUTE)
        for one in house.heartbeats("job") if one["signal"] in ("success", "fail")
    ]


def pause_and_resume(house: House, between: Callable[[], None] = lambda: None) -> None:
    for verb in ("pause", "resume"):
        monitor, now = house.config.monitors["job"], house.clock.now()
        house.store.write(lambda db, verb=verb, monitor=monitor, now=now: larm.pause_or_resume(
            db, monitor, verb, None, now
        ))
        if verb == "pause":
            between()


def alerts(house: House, webhook: Webhook) -> list[dict[str, str]]:
    """What has reached the channel by now."""
    house.watch_for(4 * SECOND)
    while house.notifier.attempt("hook"):
        pass
    return webhook.alerts


# The state table

CELLS = {
    ("pending", "success"): ("up", []),
    ("pending", "fail"): ("down", [("down", "failed")]),
    ("pending", "start"): ("pending", []),
    ("pending", "log"): ("pending", []),
    ("pending", "overran"): ("down", [("down", "overran")]),
    ("up", "success"): ("up", []),
    ("up", "fail"): ("down", [("down", "failed")]),
    ("up", "start"): ("up", []),
    ("up", "log"): ("up", []),
    ("up", "missed"): ("down", [("down", "missed")]),
    ("up", "overran"): ("down", [("down", "overran")]),
    ("down", "success"): ("up", [("up", None)]),
    ("down", "fail"): ("down", []),
    ("down", "start"): ("down", []),
    ("down", "log"): ("down", []),
    ("down", "overran"): ("down", []),
}
PATHS = {"pending": [], "up": [""], "down": ["", "fail"]}  # the pings that lead to a state


def test_the_table_has_exactly_these_cells():
    def told(state, what, then, event):
        reason = larm.REASONS.get(what) if event == "down" else None
        return (state, what), (then, [(event, reason)] if event else [])

    assert dict(told(*cell, *then) for cell, then in larm.TRANSITIONS.items()) == CELLS


@pytest.mark.parametrize(("state", "what"), CELLS, ids="-".join)
def test_each_cell_of_the_table_is_what_happens(house, state, what):
    here = house(JOB)
    if what == "overran":
        here.ping("job", "start", rid="old")
    for action in PATHS[state]:
        here.ping("job", action, rid="other")
    known = len(here.events())
    assert here.state("job") == state
    here.clock.advance(MINUTE)
    if what in ("missed", "overran"):
        here.watch_for(70 * MINUTE if what == "missed" else 20 * MINUTE, step=MINUTE)
    else:
        here.ping("job", "" if what == "success" else what)
    then, brought = CELLS[state, what]
    assert here.state("job") == then
    assert [(one["type"], one["reason"]) for one in here.events()[known:]] == brought


@pytest.mark.parametrize("state", ["pending", "down"])
def test_what_is_pending_or_down_has_no_deadline_to_miss(house, state):
    here = house(JOB)
    for action in PATHS[state]:
        here.ping("job", action)
    known = here.events()
    here.watch_for(2 * HOUR, step=MINUTE)
    assert here.events() == known
    assert here.monitor("job")["deadline_at"] is None


@pytest.mark.parametrize(("action", "signal", "status"), [
    ("0", "success", 0), ("1", "fail", 1), ("137", "fail", 137), ("255", "fail", 255),
])  # fmt: skip
def test_an_exit_status_of_0_is_a_success_and_any_other_a_failure(house, action, signal, status):
    here = house(JOB)
    here.ping("job", action)
    [heartbeat] = here.heartbeats("job")
    assert (heartbeat["signal"], heartbeat["exit_status"]) == (signal, status)
    assert here.state("job") == {"success": "up", "fail": "down"}[signal]


# Starts and ends

def test_a_run_lasts_from_its_start_to_its_end(house):
    here = house(JOB)
    here.ping("job", "start")
    after(here, 7 * MINUTE)
    assert durations(here) == [("success", 7)]
    assert here.monitor("job")["last_duration_ms"] == 7 * MINUTE
    assert running(here) == []


def test_a_failed_run_has_a_duration_too(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    after(here, 7 * MINUTE, "3", rid="a")
    assert durations(here) == [("fail", 7)]
    assert running(here) == []


def test_an_end_without_a_start_has_no_duration(house):
    here = house(JOB)
    here.ping("job", rid="a")
    assert durations(here) == [("success", None)]


def test_an_end_with_a_rid_that_did_not_start_ends_no_run_with_another_rid(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    after(here, 7 * MINUTE, rid="b")
    assert durations(here) == [("success", None)]
    assert running(here) == ["a"]


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_overlapping_runs_end_in_any_order(house, order):
    here = house(JOB.replace("1h", "1d"))
    started = {}
    for rid in "abc":
        here.watch_for(3 * HOUR, step=HOUR)
        started[rid] = here.clock.now()
        here.ping("job", "start", rid=rid)
    for rid in order:
        here.clock.advance(MINUTE)
        here.ping("job", rid=rid)
        assert here.monitor("job")["last_duration_ms"] == here.clock.now() - started[rid]
    assert running(here) == []


def test_a_run_without_a_rid_is_ended_by_the_next_end_and_takes_those_before_it_with_it(house):
    here = house(JOB)
    for _ in range(3):
        here.ping("job", "start")
        here.clock.advance(WINDOW)
    here.ping("job")
    assert durations(here) == [("success", WINDOW // MINUTE)]
    assert running(here) == []


def test_an_end_closes_every_run_with_its_rid(house):
    """As when a start is sent again because its answer was late, or a job is started again."""
    here = house(JOB)
    here.ping("job", "start", rid="a")
    after(here, WINDOW, "start", rid="a")
    after(here, MINUTE, rid="a")
    here.watch_for(30 * MINUTE, step=MINUTE)
    assert running(here) == []
    assert events(here) == []


def test_a_rid_may_be_used_again_for_the_next_run(house):
    here = house(JOB)
    for _ in range(3):
        after(here, 30 * MINUTE, "start", rid="nightly")
        after(here, 10 * MINUTE, rid="nightly")
    assert durations(here) == [("success", 10)] * 3
    assert events(here) == []


def test_an_end_before_its_start_in_a_clock_that_was_set_back_takes_no_negative_time(house):
    here = house(JOB)
    here.ping("job", "start")
    here.clock.set_wall(-HOUR)
    here.tick()
    here.ping("job")
    assert durations(here) == [("success", 0)]


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_between_start_and_end_changes_nothing_about_the_run(house, crash):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    here.tick()
    here.restart(5 * MINUTE, crash=crash)
    after(here, 10 * MINUTE, rid="a")
    assert durations(here) == [("success", 15)]
    assert running(here) == []


def test_a_log_neither_starts_nor_ends_a_run(house):
    here = house(JOB)
    here.ping("job", "log")
    assert running(here) == []
    here.ping("job", "start")
    after(here, MINUTE, "log", body="half way")
    assert running(here) == [None]


@repeatable
@given(st.lists(
    st.tuples(st.sampled_from(["start", "start", "", "0", "fail", "3", "log"]),
              st.sampled_from([None, None, "a", "b", "c"]), st.integers(0, 2 * WINDOW)),
    max_size=25,
))  # fmt: skip
def test_ends_are_paired_with_starts_as_the_rules_say(steps):
    """By rid, else with the last open start; one without a rid takes those before it with it."""
    open_runs: list[tuple[str | None, int]] = []
    lasted = None
    with tempfile.TemporaryDirectory() as folder:
        here = House(Path(folder), '[monitors.job]\ninterval = "1h"\ngrace = "366d"\n')
        for action, rid, wait in steps:
            if action == "start" and rid is not None and rid in [run[0] for run in open_runs]:
                continue
            here.clock.advance(wait + WINDOW if action == "start" else wait)  # none is throttled
            now = here.clock.now()
            here.ping("job", action, rid=rid)
            if action == "start":
                open_runs.append((rid, now))
            elif action != "log":
                own = [run for run in open_runs if run[0] == rid]
                unnamed = [run for run in open_runs if run[0] is None]
                found = own or unnamed or (open_runs if rid is None else [])
                if found:
                    index = open_runs.index(found[-1])
                    lasted = now - found[-1][1]
                    open_runs = [run for run in open_runs[:index] if run[0] is not None] + (
                        open_runs[index + 1 :]
                    )
            assert running(here) == [run[0] for run in open_runs]
            assert here.monitor("job")["last_duration_ms"] == lasted
        here.stop()


# Runs and the throttle

def test_a_success_within_the_success_window_still_ends_its_run(house):
    here = house(JOB)
    here.ping("job")
    after(here, MINUTE, "start")
    after(here, MINUTE)
    assert durations(here) == [("success", None)], "the second one is throttled"
    assert here.monitor("job")["last_duration_ms"] == MINUTE
    assert running(here) == []
    here.watch_for(30 * MINUTE, step=MINUTE)
    assert events(here) == []


def test_a_throttled_end_moves_the_deadline(house):
    here = house(JOB)
    here.ping("job")
    after(here, MINUTE, "start")
    after(here, MINUTE)
    assert here.monitor("job")["deadline_at"] == START + 72 * MINUTE


@pytest.mark.parametrize("ends", [("", ""), ("fail", "fail"), ("1", "2"), ("", "fail")])
def test_the_ends_of_overlapping_runs_close_them_whatever_the_window(house, ends):
    here = house(JOB)
    here.ping("job")
    after(here, 7 * MINUTE, "start", rid="a")
    after(here, 8 * MINUTE, "start", rid="b")
    after(here, 2 * MINUTE, ends[0], rid="b")
    after(here, 1 * MINUTE, ends[1], rid="a")
    assert running(here) == []
    after(here, 1 * MINUTE, rid="another")
    known = events(here)
    here.watch_for(30 * MINUTE, step=MINUTE)
    assert events(here) == known


def test_a_start_soon_after_an_ended_run_is_watched_for_overrunning(house):
    """As when a job is tried by hand before it is due, or again after it failed."""
    here = house(JOB)
    here.ping("job", "start")
    after(here, MINUTE)
    after(here, MINUTE, "start")
    here.watch_for(21 * MINUTE, step=MINUTE)
    assert events(here) == [("down", "overran", 22)]


def test_a_throttled_start_leaves_the_run_before_it_as_it_is(house):
    here = house(JOB)
    here.ping("job", "start")
    after(here, MINUTE, "start")
    assert len(running(here)) == 1
    after(here, MINUTE)
    assert here.monitor("job")["last_duration_ms"] == 2 * MINUTE


def test_a_failure_soon_after_a_pause_that_ended_a_down_brings_it_down(house):
    here = house(JOB)
    here.ping("job", "fail")
    here.clock.advance(MINUTE)
    pause_and_resume(here)
    assert here.state("job") == "up"
    after(here, MINUTE, "fail")
    assert here.state("job") == "down"


def test_a_failure_soon_after_it_was_enabled_again_brings_it_down(house):
    here = house(JOB)
    here.ping("job", "fail")
    here.reload(JOB + "enabled = false\n")
    here.clock.advance(MINUTE)
    here.reload(JOB)
    assert here.state("job") == "up"
    after(here, MINUTE, "fail")
    assert here.state("job") == "down"


def test_the_success_of_a_late_run_brings_it_up_whatever_the_window(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    after(here, 19 * MINUTE, rid="b")
    here.watch_for(2 * MINUTE, step=MINUTE)
    assert here.state("job") == "down"
    here.ping("job", rid="a")
    assert here.state("job") == "up"
    assert running(here) == []


def test_runs_of_a_job_that_comes_every_second_are_paired(house):
    here = house('[monitors.job]\ninterval = 1\ngrace = 2\nmax_runtime = 5\n')
    for _ in range(60):
        here.ping("job", "start")
        here.clock.advance(300)
        here.tick()
        here.ping("job", "0")
        assert here.monitor("job")["last_duration_ms"] == 300
        here.clock.advance(700)
        here.tick()
    assert events(here) == []
    assert running(here) == []


def test_of_10_000_starts_without_an_end_only_so_many_are_kept(house):
    here = house(JOB)
    for _ in range(10_000):
        here.ping("job", "start")
        here.clock.advance(WINDOW // 30)
        here.ping("job", "start", rid="r" * 64)
    assert len(running(here)) <= larm.OPEN_RUNS
    assert len(here.heartbeats("job")) <= 10_000 // 30 + 2


def test_starts_and_ends_at_any_speed_are_bounded_in_rows_and_alerts(house):
    here = house('[channels]\nhook = "json://127.0.0.1:9"\n' + JOB)
    for number in range(2_000):
        here.ping("job", ("start", "fail", "start", "")[number % 4], rid=str(number % 8 // 2))
        here.clock.advance(100)
    span = 2_000 * 100
    windows = -(-span // WINDOW)
    assert len(here.heartbeats("job")) <= 10 + 3 * windows + 10 + 10
    assert len(here.events()) <= 10 + 2 * windows
    here.tick()
    [row] = here.rows("SELECT COUNT(*) AS n FROM deliveries")
    assert row["n"] <= larm.FLAPS + 2


# Overrunning

@pytest.mark.parametrize("state", ["pending", "up"])
def test_a_run_that_does_not_end_is_down_from_its_start_plus_max_runtime(house, state):
    here = house(JOB)
    for action in PATHS[state]:
        here.ping("job", action)
    after(here, 7 * MINUTE, "start")
    here.clock.advance(20 * MINUTE)
    here.tick()
    assert events(here) == []
    here.clock.advance(1)
    here.tick()
    assert [(one["reason"], one["at"]) for one in here.events()] == [
        ("overran", START + 27 * MINUTE)
    ]


def test_a_run_that_overran_is_noticed_once_and_a_later_success_brings_it_up(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    here.watch_for(2 * HOUR, step=MINUTE)
    here.restart(MINUTE)
    after(here, MINUTE, rid="a")
    assert events(here) == [("down", "overran", 20), ("up", None, 122)]
    assert durations(here) == [("success", 122)]
    here.watch_for(30 * MINUTE, step=MINUTE)
    assert len(events(here)) == 2


def test_without_max_runtime_no_run_overruns(house):
    here = house('[monitors.job]\ninterval = "1h"\n')
    here.ping("job", "start")
    here.watch_for(3 * DAY, step=HOUR)
    assert events(here) == []


def test_each_of_two_runs_may_overrun(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    after(here, 10 * MINUTE, "start", rid="b")
    after(here, 11 * MINUTE, rid="another")
    here.watch_for(10 * MINUTE, step=MINUTE)
    assert [one[0] for one in events(here)] == ["down", "up", "down"]


def test_a_start_counts_as_no_success_and_moves_no_deadline(house):
    here = house(JOB)
    here.ping("job")
    before = here.monitor("job")
    after(here, 65 * MINUTE, "start")
    assert here.state("job") == "late"
    for column in ("received_at", "expected_at", "deadline_at", "counts_from"):
        assert here.monitor("job")[column] == before[column]
    here.watch_for(10 * MINUTE, step=MINUTE)
    assert events(here) == [("down", "missed", 70)]


def test_of_a_run_and_a_deadline_that_pass_within_one_tick_the_first_is_the_event(house):
    here = house(JOB.replace("20m", "69m59s"))
    here.ping("job")
    here.ping("job", "start")
    here.watch_for(70 * MINUTE - 1_500, step=MINUTE)
    here.clock.advance(1_900)
    here.tick()
    [event] = here.events()
    assert (event["reason"], event["at"]) == ("overran", START + 70 * MINUTE - SECOND)


@pytest.mark.parametrize("how", ["stop", "crash", "stopped", "clock forward", "clock back"])
def test_a_run_keeps_the_time_that_it_had_left(house, how):
    here = house(JOB)
    here.ping("job", "start")
    here.watch_for(15 * MINUTE, step=MINUTE)
    if how in ("stop", "crash"):
        here.restart(3 * HOUR, crash=how == "crash")
    elif how == "stopped":
        here.clock.advance(3 * HOUR)
        here.watcher.tick(0)
    else:
        here.clock.set_wall(3 * HOUR if how == "clock forward" else -3 * HOUR)
    here.tick()
    back = here.clock.now()
    here.watch_for(5 * MINUTE)
    assert events(here) == []
    here.watch_for(SECOND)
    assert [(one["reason"], one["at"]) for one in here.events()] == [
        ("overran", back + 5 * MINUTE)
    ]


def test_a_run_that_started_within_a_gap_loses_only_the_rest_of_it(house):
    """As pings that were taken by a process whose watcher hung."""
    here = house(JOB)
    here.tick()
    here.clock.advance(2 * MINUTE)
    here.ping("job", "start")
    here.clock.advance(2 * MINUTE)
    here.watcher.tick(0)
    here.watch_for(20 * MINUTE)
    assert events(here) == []
    here.watch_for(SECOND)
    assert events(here) == [("down", "overran", 24)]


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_was_under_way_while_paused_does_not_overrun(house, before):
    here = house(JOB)
    here.ping("job")
    if before:
        after(here, 10 * MINUTE, "start")
        pause_and_resume(here, lambda: here.watch_for(5 * MINUTE, step=MINUTE))
    else:
        pause_and_resume(here, lambda: after(here, 10 * MINUTE, "start"))
    here.watch_for(40 * MINUTE, step=MINUTE)
    assert events(here) == []
    here.ping("job")
    assert running(here) == []
    assert here.monitor("job")["last_duration_ms"] == (55 if before else 40) * MINUTE - (
        0 if not before else 10 * MINUTE
    )


def test_a_run_that_ended_while_paused_is_ended(house):
    here = house(JOB)
    here.ping("job", "start")
    pause_and_resume(here, lambda: after(here, MINUTE))
    assert running(here) == []


def test_a_paused_monitor_does_not_overrun(house):
    here = house(JOB)
    here.ping("job", "start")
    pause_and_resume(here, lambda: here.watch_for(2 * HOUR, step=MINUTE))
    assert events(here) == []


def test_a_run_of_a_removed_monitor_keeps_the_time_that_it_had_left(house):
    here = house(JOB + OTHER)
    here.ping("job", "start")
    here.watch_for(15 * MINUTE, step=MINUTE)
    here.reload(OTHER)
    here.watch_for(HOUR, step=MINUTE)
    here.reload(JOB + OTHER)
    here.watch_for(5 * MINUTE, step=MINUTE)
    assert events(here) == []
    here.watch_for(2 * SECOND)
    assert events(here) == [("down", "overran", 80)]


def test_a_restart_while_it_was_removed_gives_a_run_no_more_than_it_had_left(house):
    here = house(JOB + OTHER)
    here.ping("job", "start")
    here.watch_for(15 * MINUTE, step=MINUTE)
    here.reload(OTHER)
    here.restart(HOUR)
    here.reload(JOB + OTHER)
    here.watch_for(5 * MINUTE + SECOND)
    assert events(here) == [("down", "overran", 80)]


def test_a_changed_max_runtime_counts_from_the_start_of_the_run_under_way(house):
    here = house(JOB)
    here.ping("job", "start")
    here.watch_for(15 * MINUTE, step=MINUTE)
    here.reload(JOB.replace("20m", "40m"))
    here.watch_for(25 * MINUTE, step=MINUTE)
    assert events(here) == []
    here.watch_for(MINUTE)
    assert events(here) == [("down", "overran", 40)]


def test_a_removed_max_runtime_limits_no_run_any_more(house):
    here = house(JOB)
    here.ping("job", "start")
    here.watch_for(15 * MINUTE, step=MINUTE)
    here.reload(JOB.replace('max_runtime = "20m"\n', ""))
    here.watch_for(25 * MINUTE, step=MINUTE)
    assert events(here) == []


# What alerts say

def nightly(house: Callable[..., House], webhook: Webhook, more: str = "") -> House:
    """A monitor with a schedule, at 03:00 of the night after its first success."""
    here = house(NIGHTLY.format(webhook.url) + more)
    here.ping("job", "start", rid="first")
    here.ping("job", rid="first")
    here.watch_for(19 * HOUR, step=10 * MINUTE)
    return here


def test_an_alert_says_that_a_job_did_not_start(house, webhook):
    here = nightly(house, webhook)
    here.watch_for(HOUR, step=10 * MINUTE)
    [alert] = alerts(here, webhook)
    assert "no heartbeat by 2027-01-16 04:00:00+00:00" in alert["message"]
    assert "It did not start." in alert["message"]


def test_an_alert_says_that_a_job_runs_too_long(house, webhook):
    here = nightly(house, webhook)
    here.ping("job", "start", rid="night")
    here.watch_for(HOUR, step=10 * MINUTE)
    [alert] = alerts(here, webhook)
    assert "It started 2027-01-16 03:00:00+00:00 and has not ended yet." in alert["message"]
    assert "did not start" not in alert["message"]


def test_a_job_that_never_sends_starts_is_not_said_not_to_have_started(house, webhook):
    here = house(NIGHTLY.format(webhook.url))
    here.ping("job")
    here.watch_for(20 * HOUR, step=10 * MINUTE)
    [alert] = alerts(here, webhook)
    assert "start" not in alert["message"].lower()


def test_the_alert_does_not_say_did_not_start_of_a_job_that_said_it_started(house, webhook):
    """Tried by hand at 01:30, and started by cron at 03:00."""
    here = nightly(house, webhook)
    after(here, 22 * HOUR + 30 * MINUTE, "start")
    after(here, MINUTE)
    after(here, 89 * MINUTE, "start")
    here.watch_for(HOUR, step=10 * MINUTE)
    message = alerts(here, webhook)[-1]["message"]
    assert "no heartbeat by 2027-01-17 04:00" in message
    assert "It started 2027-01-17 03:00:00+00:00 and has not ended yet." in message


def test_a_killed_run_of_an_earlier_night_is_not_taken_for_this_nights(house, webhook):
    here = nightly(house, webhook)
    here.ping("job", "start", rid="killed")
    after(here, 10 * MINUTE, rid="by hand")
    after(here, 23 * HOUR + 50 * MINUTE, "start", rid="second")
    after(here, 10 * MINUTE, rid="second")
    here.watch_for(25 * HOUR, step=10 * MINUTE)
    [alert] = alerts(here, webhook)
    assert "no heartbeat by 2027-01-18 04:00" in alert["message"]
    assert "It did not start." in alert["message"]


def test_an_alert_says_how_long_a_run_may_last(house, webhook):
    here = nightly(house, webhook, 'max_runtime = "30m"\n')
    here.ping("job", "start")
    here.watch_for(31 * MINUTE, step=MINUTE)
    [alert] = alerts(here, webhook)
    assert alert["title"] == "DOWN: job"
    assert "a run has not ended within 30 min (2027-01-16 03:30:00+00:00" in alert["message"]


def test_an_alert_says_the_exit_status_how_long_it_ran_and_the_last_10_lines(house, webhook):
    here = nightly(house, webhook)
    here.ping("job", "start")
    output = "".join(f"line {number}\n" for number in range(1, 31))
    after(here, 12 * MINUTE, "42", body=output)
    [alert] = alerts(here, webhook)
    assert "exit status 42 after 12 min" in alert["message"]
    assert "Output:\n" + "".join(output.splitlines(True)[-10:]) in alert["message"]
    assert "line 20\n" not in alert["message"]


def test_a_failure_while_down_alerts_nobody_again_and_the_reminder_shows_it(house, webhook):
    here = nightly(house, webhook, 'remind = "6h"\n')
    here.watch_for(2 * HOUR, step=10 * MINUTE)
    after(here, MINUTE, "7", body="the newest output")
    [first] = alerts(here, webhook)
    assert first["title"] == "DOWN: job"
    here.watch_for(6 * HOUR, step=10 * MINUTE)
    reminder = alerts(here, webhook)[-1]
    assert len(webhook.alerts) == 2
    assert reminder["title"] == "STILL DOWN: job"
    assert "exit status 7" in reminder["message"]
    assert "the newest output" in reminder["message"]
    assert len(here.events()) == 1


def test_the_newest_of_many_failures_is_the_one_that_is_told(house):
    here = house(JOB)
    here.ping("job", "1", body="first")
    for number in range(2, 6):
        after(here, WINDOW, str(number), body=f"number {number}")
    [event] = here.events()
    [told] = here.rows("SELECT * FROM heartbeats WHERE id = ?", event["heartbeat_id"])
    assert (told["exit_status"], told["body"]) == (5, "number 5")
    assert event["at"] == START


def test_escape_codes_are_kept_raw_and_shown_harmlessly(house, webhook):
    here = nightly(house, webhook)
    body = "\x1b[2J\x1b[31mred\x1b[0m\x1b]0;title\x07\x00nul\x08\x9b31m \u202eturned"
    here.ping("job", "fail", body=body)
    [alert] = alerts(here, webhook)
    assert here.heartbeats("job")[-1]["body"] == body
    shown = alert["message"]
    assert "red" in shown
    assert "nul" in shown
    assert all(one.isprintable() or one == "\n" for one in shown)


# What is kept

def prune(house: House, keep: int = 90 * DAY) -> None:
    before = house.clock.now() - keep
    for _ in range(3):
        house.store.write(lambda db: larm.prune_events(db, before))
        house.store.write(lambda db: larm.prune_heartbeats(db, 0, 10, before))


def test_the_last_100_heartbeats_keep_their_bodies_and_so_do_those_of_events(house):
    here = house(JOB)
    after(here, WINDOW, "1", body="failed")
    for number in range(150):
        after(here, WINDOW, ("", "log", "start")[number % 3], body=f"body {number}")
    prune(here)
    bodies = [one["body"] for one in here.heartbeats("job")]
    newest = [f"body {number}" for number in range(50, 150)]
    assert bodies == ["failed", "body 0", *[None] * 49, *newest]


def test_a_failure_keeps_its_body_for_as_long_as_its_event(house):
    here = house(JOB)
    here.ping("job", "1", body="failed")
    after(here, WINDOW)
    here.clock.advance(100 * DAY)
    prune(here, keep=101 * DAY)
    assert here.heartbeats("job")[0]["body"] == "failed"
    prune(here)
    assert here.heartbeats("job") == []
    assert here.events() == []


def test_a_monitor_that_is_down_keeps_the_newest_failure(house):
    here = house(JOB)
    here.ping("job", "1", body="first")
    after(here, WINDOW, "2", body="newest")
    here.clock.advance(100 * DAY)
    prune(here)
    assert [one["body"] for one in here.heartbeats("job")] == ["newest"]


# Rhythm

def beats(*times: int, lasted: int | None = None) -> list[dict[str, object]]:
    return [{"at": at, "signal": "success", "duration_ms": lasted} for at in reversed(times)]


def monitor(house: Callable[..., House], settings: str) -> larm.Monitor:
    here = house(f'timezone = "UTC"\n[monitors.job]\n{settings}')
    here.stop()
    return here.config.monitors["job"]


def test_the_rhythm_is_the_shortest_the_typical_and_the_longest(house):
    job = monitor(house, 'interval = "1d"\ngrace = "1h"\n')
    found = larm.rhythm(job, beats(START, START + DAY, START + 2 * DAY + HOUR, START + 3 * DAY))
    assert found.apart == larm.Spread(DAY - HOUR, DAY, DAY + HOUR)
    assert found.lasted is None


def test_starts_failures_and_logs_are_not_in_the_rhythm(house):
    job = monitor(house, 'interval = "1d"\n')
    others = [{"at": START + HOUR, "signal": one, "duration_ms": None}
              for one in ("log", "fail", "start")]
    found = larm.rhythm(job, [*others, *beats(START, START + DAY, lasted=MINUTE)])
    assert found.apart == larm.Spread(DAY, DAY, DAY)
    assert found.lasted == larm.Spread(MINUTE, MINUTE, MINUTE)


@pytest.mark.parametrize("count", [0, 1])
def test_a_rhythm_needs_two_heartbeats(house, count):
    found = larm.rhythm(monitor(house, 'interval = "1d"\n'), beats(*[START] * count))
    assert found.lines() == []


@pytest.mark.parametrize(("setting", "apart", "advised"), [
    ('interval = "1d"\ngrace = "5m"\n', DAY + 20 * MINUTE, 'try grace = "30m"'),
    ('interval = "1d"\ngrace = 0\n', DAY + 5 * SECOND, 'a grace of 0 will alert'),
    ('interval = "1d"\n', HOUR, 'try interval = "1h"'),
    ('interval = "1h"\n', DAY, 'try interval = "1d"'),
])  # fmt: skip
def test_settings_that_do_not_fit_get_a_line_of_advice(house, setting, apart, advised):
    times = [START + number * apart for number in range(10)]
    advice = larm.rhythm(monitor(house, setting), beats(*times)).advice
    assert advised in (advice or "")
    assert "\n" not in (advice or "")


@pytest.mark.parametrize("apart", [20 * SECOND, MINUTE, 50 * MINUTE, HOUR, 5 * HOUR, DAY, 8 * DAY])
def test_advice_that_was_followed_is_not_given_again(house, apart):
    times = [START + number * apart for number in range(20)]
    setting = 'interval = "3650s"\n' if apart > 2 * HOUR else 'interval = "12d"\n'
    for _ in range(3):  # an interval, then perhaps a grace
        advice = larm.rhythm(monitor(house, setting), beats(*times)).advice
        if advice is None:
            return
        advised = advice.partition(": try ")[2] + "\n"
        setting = advised if advised.startswith("interval") else setting + advised
    raise AssertionError(advice)


@pytest.mark.parametrize("setting", ['interval = "1d"\n', 'schedule = "0 3 * * *"\n'])
def test_settings_that_fit_get_no_advice(house, setting):
    times = [START + 19 * HOUR + number * DAY + number % 3 * MINUTE for number in range(10)]
    assert larm.rhythm(monitor(house, setting), beats(*times)).advice is None


@pytest.mark.parametrize(("off", "said"), [
    (HOUR, "1 h after"), (-HOUR, "1 h before"), (5 * HOUR + 30 * MINUTE, "5 h 30 min after"),
])  # fmt: skip
def test_a_job_in_another_timezone_gets_the_advice_to_look_at_it(house, off, said):
    times = [START + 19 * HOUR + off + number * DAY + number * SECOND for number in range(10)]
    advice = larm.rhythm(monitor(house, 'schedule = "0 3 * * *"\n'), beats(*times)).advice
    assert advice == f"they come exactly {said} the schedule: timezone?"


@pytest.mark.parametrize("expression", ["0 0 29 2 *", "* * * * *", "*/5 9-17 * * 1-5", "@yearly"])
@pytest.mark.parametrize("apart", [MINUTE, DAY, 30 * DAY])
def test_any_schedule_with_any_heartbeats_has_a_rhythm(house, expression, apart):
    job = monitor(house, f'schedule = "{expression}"\n')
    times = [START + number * apart for number in range(6)]
    assert larm.rhythm(job, beats(*times)).apart == larm.Spread(apart, apart, apart)


def test_status_shows_the_rhythm_of_the_monitors_that_are_named(tmp_path):
    # The command reads the real clock: the heartbeats are of the last days before it.
    clock = FakeClock(larm.Clock().now() - 6 * DAY)
    here = House(tmp_path, '[monitors.job]\ninterval = "1d"\ngrace = "1m"\n', clock)
    for _ in range(6):
        here.ping("job", "start")
        after(here, 4 * MINUTE)
        here.clock.advance(DAY)
        here.tick()
    here.stop()
    write_config(tmp_path, here.text)

    def status(*keys: str) -> str:
        return subprocess.run(
            [sys.executable, ROOT / "larm.py", "status", *keys],
            cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True,
        ).stdout

    named = status("job")
    assert "job: heartbeats come every 1 d typically, 1 d to 1 d\n" in named
    assert "job: runs take 4 min typically, 4 min to 4 min\n" in named
    assert named.count("advice:") == 1
    assert 'try grace = "5m"' in named
    assert "typically" not in status()


# Over HTTP

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Larm with plenty of monitors, a token for each test."""
    names = [f"job-{number:02}" for number in range(80)]
    toml = "".join(
        f'[monitors.{name}]\ninterval = "1d"\ntoken = "token-of-{name}-x"\n' for name in names
    )
    process = launch(tmp_path_factory.mktemp("signals"), toml)
    process.tokens = iter(f"token-of-{name}-x" for name in names)
    yield process
    process.kill()


def stored(server: Process, token: str, columns: str = "signal, exit_status, rid, body") -> list:
    rows = server.rows(
        f"SELECT {columns} FROM heartbeats h JOIN monitors m ON m.id = h.monitor_id "
        "WHERE m.key = ? ORDER BY h.id", token.removeprefix("token-of-").removesuffix("-x"),
    )
    return [tuple(row.values()) for row in rows]


def open_rids(server: Process, token: str) -> list[str | None]:
    key = token.removeprefix("token-of-").removesuffix("-x")
    return [row["rid"] for row in server.rows(
        "SELECT rid FROM runs r JOIN monitors m ON m.id = r.monitor_id WHERE m.key = ?", key
    )]


MEANINGLESS = ["/256", "/-1", "/0x1", "/00", "/01", "/1000", "/1.0", "/+1", "/%D9%A1", "//start",
               "/START", "/Fail", "/start/", "/start/extra", "/start%00", "/log.txt", "/0/", "/%20",
               "/%30%30", "/success", "/1e1", "/start;a", "/\u0661"]


@pytest.mark.parametrize("behind", MEANINGLESS, ids=range(len(MEANINGLESS)))
def test_what_has_no_meaning_gets_the_same_answer_and_stores_nothing(server, behind):
    token = next(server.tokens)
    path = behind.encode("utf-8").decode("latin-1")
    answer = server.get("/api/heartbeat/" + token + path.replace("\xd9\xa1", "%D9%A1"))
    assert (answer.status, answer.body) == (200, b'{"status": "ok"}')
    assert stored(server, token) == []


@pytest.mark.parametrize("action", ["", "/start", "/fail", "/log", "/0", "/255", "/256"])
def test_every_answer_says_the_body_limit_and_lets_any_page_ping(server, action):
    known = server.ping(next(server.tokens), action)
    unknown = server.ping("nobody-ever-made-this-token", action)
    for answer in (known, unknown):
        assert answer.headers["Ping-Body-Limit"] == "10000"
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        answer.headers.pop("Date")
    assert known == unknown


@pytest.mark.parametrize(("query", "rid"), [
    ("?rid=" + "r" * 64, "r" * 64),
    ("?rid=" + "r" * 65, None),
    ("?rid=" + "r" * 10_000, None),
    ("?rid=", None),
    ("?RID=a", None),
    ("?rid=%1b%5b2J%00%0a%ff", "\x1b[2J\x00\n\ufffd"),
    ("?other=1&rid=run-1", "run-1"),
    ("?rid=%E2%9C%93", "✓"),
])  # fmt: skip
def test_a_rid_pairs_whatever_its_characters_and_is_none_beyond_its_length(server, query, rid):
    token = next(server.tokens)
    for action in ("/start", "/0"):
        server.ping(token, action + query)
    assert [row[2] for row in stored(server, token)] == [rid, rid]
    assert open_rids(server, token) == []
    [start, end] = stored(server, token, "duration_ms")
    assert start == (None,)
    assert end[0] is not None


@pytest.mark.parametrize(("body", "kept"), [
    (b"x" * 9_999_000 + b"the end", "x" * 9_993 + "the end"),
    (b"\xff\xfe ok", "\ufffd\ufffd ok"),
    (b"a\x00b", "a\x00b"),
    (b"\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
    (b"\r\n\r\n", "\r\n\r\n"),
], ids=["10 MB", "invalid UTF-8", "NUL", "ANSI", "line ends"])  # fmt: skip
@pytest.mark.parametrize("action", ["/start", "/fail", "/7", "/log", ""])
def test_a_body_of_anything_is_kept_with_every_signal(server, action, body, kept):
    token = next(server.tokens)
    assert server.get(f"/api/heartbeat/{token}{action}", "POST", body).status == 200
    [(signal, _, _, text)] = stored(server, token)
    assert text == kept
    assert signal == {"": "success", "/7": "fail"}.get(action, action[1:])


def test_a_start_that_was_answered_is_there_after_a_kill_9_and_its_end_pairs(start):
    text = f'[monitors.job]\ninterval = "1d"\nmax_runtime = "1h"\ntoken = "{TOKEN}"\n'
    process = start(text)
    for rid in ("?rid=a", ""):
        assert process.ping(action="/start" + rid).status == 200
    process.kill()
    assert [row["rid"] for row in process.rows("SELECT rid FROM runs")] == ["a"], "one a window"
    process = start(text)
    process.ping(action="/0?rid=a")
    assert process.rows("SELECT * FROM runs") == []
    [end] = process.rows("SELECT duration_ms FROM heartbeats WHERE signal = 'success'")
    assert end["duration_ms"] > 0


# Unmodified clients

def test_runitors_requests_pair_and_tell_it_the_body_limit(server):
    """As its source has them: POST, text/plain, the start without a body, the exit code."""
    token, rid = next(server.tokens), "0f2a1b52-8e3e-4b0a-9d7e-7a4c5d1e2f30"
    headers = {"Content-Type": "text/plain", "User-Agent": "runitor/v1.4.1"}
    base = f"/api/heartbeat/{token}"
    start = server.get(f"{base}/start?rid={rid}", "POST", b"", headers)
    assert start.headers["Ping-Body-Limit"] == "10000"
    server.get(f"{base}/3?rid={rid}", "POST", b"[runitor] output", headers)
    assert stored(server, token) == [("start", None, rid, None),
                                     ("fail", 3, rid, "[runitor] output")]
    assert open_rids(server, token) == []


def test_the_python_client_healthchecks_io_pings(server):
    client = pytest.importorskip("healthchecks_io", reason="healthchecks-io is not installed here")
    token = next(server.tokens)
    with client.Client(api_key="none", ping_url=f"{server.url}/api/heartbeat/") as pings:
        assert pings.start_ping(uuid=token, data="begins")[0]
        assert pings.success_ping(uuid=token, data="went well")[0]
        assert pings.fail_ping(uuid=token, data="did not")[0]
        assert pings.exit_code_ping(0, uuid=token, data="now it did")[0]
    assert stored(server, token, "signal, exit_status, body, duration_ms IS NOT NULL") == [
        ("start", None, "begins", 0), ("success", None, "went well", 1),
        ("fail", None, "did not", 0), ("success", 0, "now it did", 0),
    ]


def test_the_python_client_healthchecks_decorator_pings(server):
    client = pytest.importorskip(
        "healthchecks_decorator", reason="healthchecks-decorator is not installed here"
    )
    token = next(server.tokens)

    @client.healthcheck(url=f"{server.url}/api/heartbeat/{token}", send_start=True)
    def job(fails: bool) -> None:
        if fails:
            raise ConnectionError

    job(False)
    with pytest.raises(ConnectionError):
        job(True)
    assert [row[0] for row in stored(server, token)][:2] == ["start", "success"]
    assert stored(server, token)[-1][0] == "fail"
