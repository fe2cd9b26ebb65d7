"""Law 5: time that Larm did not watch is held against nobody, and gives nobody a fresh interval."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time

import pytest
from conftest import START, FakeClock, House

import larm as program
from larm import DAY, HOUR, MINUTE, SECOND

JOB = 'timezone = "UTC"\n[monitors.job]\ninterval = "1h"\ngrace = "10m"\n'
OTHER = '[monitors.other]\ninterval = "1h"\n'
WHOLE = HOUR + 10 * MINUTE  # what a ping gives JOB
YEAR = 365 * DAY

SET_BY = [6 * SECOND, 3 * DAY, 30 * YEAR, -6 * SECOND, -3 * DAY, -5 * YEAR]

both_ways = pytest.mark.parametrize("crash", [False, True])
however_set = pytest.mark.parametrize("by", SET_BY)


def watched(house, ms: int, text: str = JOB, clock: FakeClock | None = None) -> House:
    """A Larm whose job has pinged once, so long ago."""
    larm = house(text, clock)
    larm.ping("job")
    larm.watch(ms, step=MINUTE)
    return larm


def start_later(larm: House, away: int, set_by: int = 0) -> None:
    """Stop, and start again after so long, the clock having been set meanwhile."""
    larm.stop()
    larm.clock.advance(away)
    larm.clock.set_wall(set_by)
    larm.clock.resync()
    larm.open()


def assert_goes_down_after(larm: House, ms: int) -> None:
    """No event for so long, then one."""
    larm.watch(ms, step=ms)
    assert larm.events() == []
    larm.watch(1)
    assert [event["reason"] for event in larm.events()] == ["missed"]


# Off and on again


@both_ways
def test_ten_minutes_off_move_every_deadline_by_ten_minutes(house, crash):
    keys = [f"job-{number}" for number in range(20)]
    larm = house("".join(
        f'[monitors.{key}]\ninterval = "{number + 1}m"\ngrace = 0\n'
        for number, key in enumerate(keys)
    ))
    for key in keys:
        larm.ping(key)
    larm.watch(59_500)
    before = {key: larm.monitor(key)["deadline_at"] for key in keys}
    larm.restart(10 * MINUTE, crash=crash)
    larm.tick()
    assert larm.events() == []
    moved = {larm.monitor(key)["deadline_at"] - before[key] for key in keys}
    assert len(moved) == 1
    assert 0 <= moved.pop() - 10 * MINUTE <= (SECOND if crash else 0)


@both_ways
def test_a_restart_gives_no_fresh_interval(house, crash):
    larm = watched(house, WHOLE - MINUTE)
    larm.restart(10 * MINUTE, crash=crash)
    assert_goes_down_after(larm, MINUTE)


def test_a_crash_counts_from_the_last_tick(house):
    larm = watched(house, 7_000)
    larm.clock.advance(900)
    larm.restart(10 * MINUTE, crash=True)
    assert larm.left("job") == WHOLE - 7_000


def test_a_crash_right_after_a_start_moves_no_deadline_twice(house):
    larm = watched(house, MINUTE)
    for _ in range(3):
        larm.restart(10 * MINUTE, crash=True)
    assert larm.left("job") == WHOLE - MINUTE


@both_ways
def test_larm_that_restarts_all_the_time_notices_silence(house, crash):
    larm = watched(house, 0, JOB.replace("1h", "1m").replace("10m", "10s"))
    for _ in range(35):
        assert larm.events() == []
        larm.watch(2_000)
        larm.restart(2_000, crash=crash)
    larm.watch(2_000)
    [event] = larm.events()
    assert abs(event["at"] - START - 35 * 4_000) <= 2_000


@both_ways
def test_what_was_overdue_before_the_stop_is_noticed_after_it_once(house, crash):
    larm = watched(house, WHOLE)
    larm.clock.advance(1)
    larm.restart(10 * MINUTE, crash=crash)
    larm.watch(5_000)
    assert [event["reason"] for event in larm.events()] == ["missed"]


@both_ways
def test_a_down_monitor_stays_down_over_a_restart(house, crash):
    larm = house(JOB)
    larm.ping("job", "fail")
    larm.restart(10 * MINUTE, crash=crash)
    larm.watch(WHOLE, step=MINUTE)
    assert larm.changes() == [("down", "failed", 0)]
    assert larm.monitor("job")["since"] == START


def test_a_ping_between_the_last_tick_and_a_crash_counts(house):
    larm = watched(house, 30 * MINUTE)
    larm.clock.advance(600)
    larm.ping("job")
    larm.clock.advance(300)
    larm.restart(10 * MINUTE, crash=True)
    assert WHOLE - 300 <= larm.left("job") <= WHOLE


# Stopped, suspended


@pytest.mark.parametrize("away", [10_001, 10 * MINUTE, 3 * DAY])
def test_a_stopped_process_moves_its_deadlines(house, away):
    larm = watched(house, 30 * MINUTE)
    larm.sleep_through(away)
    assert larm.events() == []
    assert_goes_down_after(larm, WHOLE - 30 * MINUTE)


def test_a_suspended_machine_moves_its_deadlines(house):
    """The monotonic clock stands still meanwhile."""
    larm = watched(house, WHOLE - MINUTE)
    larm.clock.set_wall(8 * HOUR)
    larm.tick()
    assert_goes_down_after(larm, MINUTE)


@pytest.mark.parametrize("after", [MINUTE, 30 * MINUTE])  # throttled, or stored
def test_a_ping_before_the_tick_that_finds_the_gap_gets_its_interval_and_no_more(house, after):
    larm = watched(house, after)
    larm.clock.advance(4 * MINUTE)
    larm.ping("job")
    larm.clock.advance(50)  # unwatched, too
    larm.tick(late=4 * MINUTE + 50)
    assert len(larm.stored("job")) == (1 if after == MINUTE else 2)
    assert larm.left("job") == WHOLE


# The clock is set


@however_set
def test_a_clock_that_is_set_moves_the_deadlines_with_it(house, by):
    larm = watched(house, WHOLE - MINUTE)
    larm.clock.set_wall(by)
    larm.clock.advance(SECOND)
    larm.tick()
    assert larm.clock.now() == START + WHOLE - MINUTE + SECOND + by
    assert_goes_down_after(larm, MINUTE - SECOND)


@however_set
def test_a_clock_that_is_set_and_mended_leaves_every_deadline_where_it_was(house, by):
    larm = watched(house, 0)
    for change in (by, -by):
        larm.watch(MINUTE)
        larm.clock.set_wall(change)
        larm.tick()
    assert larm.monitor("job")["deadline_at"] == START + WHOLE
    assert larm.events() == []


@however_set
@both_ways
def test_gaps_after_the_clock_was_set_are_given_back_too_and_none_twice(house, by, crash):
    """Though the last ping may be dated in the future by now."""
    larm = watched(house, 20 * MINUTE)
    larm.clock.set_wall(by)
    larm.tick()
    larm.restart(5_000, crash=crash)
    assert larm.left("job") == WHOLE - 20 * MINUTE
    larm.watch(MINUTE)
    larm.sleep_through(10 * MINUTE)
    larm.restart(10 * MINUTE, crash=crash)
    assert larm.left("job") == WHOLE - 21 * MINUTE


@however_set
def test_a_clock_that_was_set_while_larm_was_off_alerts_nobody(house, by):
    """When Larm was alive last may be in the future then; so may be the second start's."""
    larm = watched(house, WHOLE - 2 * MINUTE)
    start_later(larm, MINUTE, by)
    larm.watch(MINUTE)
    larm.restart(10 * MINUTE)
    assert_goes_down_after(larm, MINUTE)


def test_a_clock_that_creeps_moves_no_deadline(house):
    larm = watched(house, 0)
    for _ in range(100):
        larm.clock.set_wall(20)
        larm.watch(SECOND)
    assert larm.monitor("job")["deadline_at"] == START + WHOLE


@however_set
@pytest.mark.parametrize("order", [
    ["ping", "set", "tick"], ["set", "ping", "tick"], ["set", "tick", "ping"],
    ["set", "ping", "tick", "ping"],
], ids=" ".join)  # fmt: skip
def test_pings_that_are_under_way_while_the_clock_is_set_have_their_whole_interval(
    house, by, order
):
    """They are dated before or after it, and all wait for the disk."""
    larm = watched(house, 30 * MINUTE)
    steps = {"set": lambda: larm.clock.set_wall(by), "tick": larm.tick,
             "ping": lambda: larm.ping("job")}  # fmt: skip
    larm.queue_up(*(steps[step] for step in order))
    larm.tick()
    assert larm.left("job") == WHOLE
    larm.watch(30 * MINUTE, step=MINUTE)
    larm.ping("job")
    assert (larm.left("job"), larm.events()) == (WHOLE, [])


# A clock that was wrong


def test_a_wrong_clock_prunes_no_history_at_once(house):
    text = 'keep = "10d"\n' + JOB
    larm = house(text)
    for action in ("fail", "", "log"):
        larm.ping("job", action)
        larm.watch(HOUR, step=MINUTE)
    before = larm.stored("job"), larm.stored("job", "fail"), larm.changes()
    for wrong in (2 * YEAR, 12 * YEAR, -START):  # 2029; 2038, the last of some clocks; 1970
        larm.clock.set_wall(wrong)
        larm.watch(5 * MINUTE)
        start_later(larm, SECOND)  # a fresh start of Larm trusts it no more
        larm.watch(5 * MINUTE)
        larm.clock.set_wall(-wrong)
        larm.watch(5 * MINUTE)
    assert (larm.stored("job"), larm.stored("job", "fail"), larm.changes()) == before


def test_hours_off_before_a_start_in_1970_are_told_once_the_clock_is_set(house):
    larm = watched(house, 20 * MINUTE)
    start_later(larm, 5 * HOUR, -START)
    larm.watch(5_000)
    larm.ping("job")
    larm.watch(5_000)
    assert larm.state("job") == "up"
    larm.clock.set_wall(START)
    larm.watch(2 * MINUTE)
    page = larm.ask("/").body.decode()
    assert "2027-01-15 08:20:00" in page
    assert "2027-01-15 13:20:" in page
    assert larm.left("job") == WHOLE - 5_000 - 2 * MINUTE
    assert larm.monitor("job")["last_heartbeat_at"] == larm.clock.now() - 5_000 - 2 * MINUTE
    assert larm.events("job") == []


# Which time counts as the last that Larm was seen


def test_a_backup_put_in_place_of_the_database_counts_from_the_backup(house):
    """What lies beside it tells of another database's last tick."""
    larm = watched(house, 20 * MINUTE)
    larm.stop()
    shutil.copy(larm.folder / "larm.db", larm.folder / "backup")
    larm.open()
    for _ in range(5):
        larm.ping("job")
        larm.watch(HOUR, step=MINUTE)
    larm.stop()
    shutil.copy(larm.folder / "backup", larm.folder / "larm.db")
    larm.clock.advance(MINUTE)
    larm.open()
    larm.tick()
    assert larm.events() == []
    assert larm.left("job") == WHOLE - 20 * MINUTE


def test_a_database_without_its_lock_file_counts_from_what_it_says_itself(house):
    now = time.time_ns() // 1_000_000  # a new lock file's time is the real one
    larm = watched(house, 20_000, clock=FakeClock(now - 60_000))
    larm.stop()
    for path in larm.folder.glob("larm.db?*"):
        path.unlink()
    larm.clock.advance(40_000)
    larm.open()
    assert larm.left("job") == WHOLE - 20_000


def test_a_start_that_was_refused_does_not_count_as_being_alive(house):
    now = time.time_ns() // 1_000_000  # it may touch the lock file, in real time
    larm = watched(house, 20_000, clock=FakeClock(now - 60_000))
    larm.stop()
    [version] = larm.sql("PRAGMA user_version")
    larm.sql("PRAGMA user_version = 99")
    with pytest.raises(program.StoreError):
        larm.open()
    larm.sql(f"PRAGMA user_version = {version['user_version']}")
    larm.clock.advance(50_000)
    larm.open()
    assert larm.left("job") == WHOLE - 20_000


# Nothing can be written


@pytest.mark.parametrize("lasts", [SECOND, 3 * SECOND, 9 * SECOND, HOUR])
def test_an_outage_of_the_database_is_held_against_no_job_however_short(house, lasts):
    """A job pings in time, gets 503, and tries again a while after the end of it."""
    left = 500
    larm = watched(house, WHOLE - left)
    with larm.full_disk():
        larm.ping("job", status=503)
        for _ in range(5):
            larm.clock.advance(lasts // 5)
            with contextlib.suppress(program.Unrecordable):
                larm.tick()
    larm.recover()
    assert larm.events() == []
    assert abs(larm.left("job") - left) <= lasts // 5  # to a tick
    larm.watch(100)
    larm.ping("job")
    larm.watch(MINUTE)
    assert larm.events() == []


def test_a_gap_that_can_not_be_written_is_made_up_for_later(house):
    larm = watched(house, 20 * MINUTE)
    with larm.full_disk():
        larm.ping("job", "log", status=503)
        for _ in range(2):
            with contextlib.suppress(program.Unrecordable):
                larm.sleep_through(10 * MINUTE)
    larm.recover()
    assert larm.events() == []
    assert larm.left("job") == WHOLE - 20 * MINUTE


@pytest.mark.parametrize("first", ["ping", "tick"])
def test_a_clock_change_that_the_database_refuses_at_first_moves_every_deadline_once(house, first):
    larm = watched(house, 20 * MINUTE)
    with larm.full_disk():
        if first == "ping":
            larm.ping("job", "log", status=503)
        larm.clock.set_wall(HOUR)
        for _ in range(2):
            with contextlib.suppress(program.Unrecordable):
                larm.tick()
    larm.recover()
    larm.restart(crash=True)
    assert larm.left("job") == WHOLE - 20 * MINUTE
    larm.ping("job")
    assert larm.left("job") == WHOLE


def test_a_gap_that_waited_for_a_hanging_disk_is_given_back_once(house):
    larm = watched(house, 20 * MINUTE)
    with larm.hanging_disk():
        tick = threading.Thread(target=larm.sleep_through, args=(10 * MINUTE,))
        tick.start()
        time.sleep(0.1)
    tick.join()
    larm.tick()
    assert larm.left("job") == WHOLE - 20 * MINUTE


# Runs


RUN = JOB + 'max_runtime = "10m"\n'


def test_a_second_start_restarts_the_run(house):
    """The machine rebooted: max_runtime counts from the second."""
    larm = house(RUN)
    larm.ping("job", "start")
    larm.watch(5 * MINUTE, step=MINUTE)
    larm.ping("job", "start")
    larm.watch(10 * MINUTE, step=MINUTE)
    assert larm.events() == []
    larm.watch(SECOND)
    assert larm.changes() == [("down", "overran", 15 * MINUTE)]


def test_max_runtime_that_is_taken_out_and_put_back_during_a_run_is_not_forgotten(house):
    larm = house(RUN)
    larm.ping("job", "start")
    larm.watch(4 * MINUTE, step=MINUTE)
    larm.save(JOB)
    larm.watch(4 * MINUTE, step=MINUTE)
    larm.save(RUN)
    larm.watch(2 * MINUTE + SECOND)
    assert larm.changes() == [("down", "overran", 10 * MINUTE)]


def test_overlapping_runs_that_end_in_one_commit_are_both_closed(house):
    larm = house(RUN)
    for rid in ("A", "B"):
        larm.ping("job", "start", rid=rid)
        larm.watch(MINUTE)
    larm.queue_up(*[lambda rid=rid: larm.ping("job", rid=rid) for rid in ("A", "B")])
    assert not larm.monitor("job")["running"]
    larm.watch(HOUR, step=MINUTE)
    assert larm.events() == []


@both_ways
def test_a_run_keeps_the_time_that_it_had_left(house, crash):
    larm = house(RUN)
    larm.ping("job", "start")
    larm.watch(4 * MINUTE, step=MINUTE)
    larm.sleep_through(HOUR)
    larm.clock.set_wall(DAY)
    larm.tick()
    larm.restart(HOUR, crash=crash)
    larm.watch(6 * MINUTE, step=MINUTE)
    assert larm.events() == []
    larm.watch(SECOND)
    assert [event["reason"] for event in larm.events()] == ["overran"]


# Paused, removed


def test_pausing_twice_keeps_when_the_pause_began(house):
    larm = watched(house, 10 * MINUTE)
    for span in (None, "2h", None):
        larm.pause("job", span)
        larm.watch(10 * MINUTE, step=MINUTE)
        assert larm.monitor("job")["since"] == START + 10 * MINUTE


def test_resuming_a_monitor_that_was_up_keeps_since_when(house):
    larm = watched(house, 10 * MINUTE)
    larm.pause("job")
    larm.watch(HOUR, step=MINUTE)
    larm.resume("job")
    monitor = larm.monitor("job")
    assert (monitor["state"], monitor["since"], larm.left("job")) == ("up", START, WHOLE)


@both_ways
@pytest.mark.parametrize("away", [10 * MINUTE, 3 * HOUR])
def test_after_a_timed_pause_that_ends_while_larm_is_off_there_is_a_whole_interval(
    house, away, crash
):
    larm = watched(house, 10 * MINUTE)
    larm.pause("job", "15m")
    larm.watch(10 * MINUTE)
    larm.restart(away, crash=crash)
    while larm.state("job") == "paused":
        larm.watch(SECOND)
    assert larm.clock.now() - START - 20 * MINUTE - away <= 5 * MINUTE + 2 * SECOND
    assert WHOLE - 2 * SECOND <= larm.left("job") <= WHOLE
    larm.watch(WHOLE - 2 * SECOND, step=MINUTE)
    assert larm.events() == []


def test_a_removed_monitor_that_is_put_back_has_the_time_that_it_had_left(house):
    """So has its run."""
    text = JOB + 'max_runtime = "30m"\n'
    larm = watched(house, 10 * MINUTE, text + OTHER)
    larm.ping("job", "start")
    larm.watch(10 * MINUTE, step=MINUTE)
    token = larm.token("job")
    larm.save(OTHER)
    larm.watch(MINUTE)
    larm.ping("job")  # the token is not accepted meanwhile
    larm.restart(10 * MINUTE)
    larm.watch(3 * HOUR, step=MINUTE)
    larm.save(text + OTHER)
    assert (larm.token("job"), larm.left("job")) == (token, WHOLE - 20 * MINUTE)
    larm.watch(20 * MINUTE, step=MINUTE)
    assert larm.events("job") == []
    larm.watch(SECOND)
    assert [event["reason"] for event in larm.events("job")] == ["overran"]


# Uptime


@pytest.mark.parametrize("unwatched", ["removed", "paused", "off"])
def test_time_that_is_not_watched_counts_neither_as_up_nor_as_down(house, unwatched):
    """Of 12 hours that were watched, one was spent down."""
    text = JOB.replace("1h", "7d")
    larm = watched(house, HOUR, text + OTHER)
    larm.ping("job", "fail")
    larm.watch(HOUR, step=MINUTE)
    larm.ping("job")
    if unwatched == "off":
        larm.restart(12 * HOUR)
    elif unwatched == "paused":
        larm.pause("job")
        larm.watch(12 * HOUR, step=HOUR)
        larm.resume("job")
    else:
        larm.save(OTHER)
        larm.watch(12 * HOUR, step=HOUR)
        larm.save(text + OTHER)
    larm.watch(10 * HOUR, step=HOUR)
    assert larm.monitor("job")["uptime"]["24h"] == round(100 * 11 / 12, 2)


def test_time_down_before_and_after_a_removal_counts_and_what_is_between_does_not(house):
    text = JOB.replace("1h", "7d")
    larm = watched(house, 2 * HOUR, text + OTHER)
    larm.ping("job", "fail")
    larm.watch(HOUR, step=MINUTE)
    larm.save(OTHER)
    larm.watch(20 * HOUR, step=HOUR)
    larm.save(text + OTHER)
    assert larm.state("job") == "down"
    larm.watch(HOUR, step=MINUTE)
    assert larm.monitor("job")["uptime"]["24h"] == 50.0


def test_there_is_no_figure_for_a_span_longer_than_keep_nor_for_what_was_never_heard_of(house):
    larm = house('keep = "8d"\n' + JOB.replace("1h", "7d") + OTHER)
    for _ in range(8):
        larm.ping("job")
        larm.watch(5 * DAY, step=HOUR)
    uptime = larm.monitor("job")["uptime"]
    assert uptime == {"24h": 100.0, "7d": 100.0, "30d": None, "90d": None}
    assert set(larm.monitor("other")["uptime"].values()) == {None}


def test_a_kill_right_after_a_small_step_back_was_written_moves_no_deadline(house):
    """Between the commit and the next tick that the lock file gets."""
    larm = house(JOB)
    larm.ping("job")
    larm.watch(20 * MINUTE, step=MINUTE)
    larm.clock.set_wall(-20 * SECOND)
    store, mark_tick = larm.larm.store, larm.larm.store.mark_tick

    def is_killed_after_the_commit(now: int) -> None:
        [clock] = larm.sql("SELECT alive_at FROM clock")
        if clock["alive_at"] != larm.clock.wall_ms:
            mark_tick(now)

    store.mark_tick = is_killed_after_the_commit
    larm.tick()
    left = larm.left("job")
    larm.restart(5 * MINUTE, crash=True)
    assert larm.left("job") == left
