"""Law 5: time that Larm did not watch is held against nobody, and gives nobody a fresh interval."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest
from conftest import START, FakeClock, House, hang, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import larm as program

JOB = '[monitors.job]\ninterval = "1h"\ngrace = "10m"\n'
MINUTE, HOUR, DAY, YEAR = 60_000, 3_600_000, 86_400_000, 31_557_600_000
WHOLE = HOUR + 10 * MINUTE  # what a ping gives JOB
TICK = 1_000

SET_BY = [6_000, 5 * MINUTE, 3 * DAY, 30 * YEAR, -6_000, -5 * MINUTE, -3 * DAY, -5 * YEAR]


def left(larm: House, key: str = "job") -> int:
    """Milliseconds until the deadline."""
    return int(larm.monitor(key)["deadline_at"]) - larm.clock.now()


def stop_process(larm: House, ms: int) -> None:
    """SIGSTOP, and SIGCONT after so long: the tick that was due comes late."""
    larm.clock.advance(TICK + ms)
    larm.watcher.tick(TICK)


def start_later(larm: House, away_ms: int, set_by_ms: int = 0) -> None:
    """Stop, and start again after so long, the clock having been set meanwhile."""
    larm.stop()
    larm.clock.advance(away_ms)
    larm.clock.set_wall(set_by_ms)
    larm.clock.resync()
    larm.open()


def assert_goes_down_after(larm: House, ms: int) -> None:
    """No event for so long, then one."""
    larm.clock.advance(ms)
    larm.tick()
    assert larm.events() == []
    larm.clock.advance(1)
    larm.tick()
    assert [event["reason"] for event in larm.events()] == ["missed"]


# Off and on again


@pytest.mark.parametrize("crash", [False, True])
def test_ten_minutes_off_move_50_deadlines_by_ten_minutes(house, crash):
    keys = [f"job-{number}" for number in range(50)]
    larm = house("".join(
        f'[monitors.{key}]\ninterval = "{number + 1}m"\ngrace = 0\n'
        for number, key in enumerate(keys)
    ))
    for key in keys:
        larm.ping(key)
    larm.watch_for(59_500)
    before = {key: larm.monitor(key)["deadline_at"] for key in keys}
    larm.restart(10 * MINUTE, crash=crash)
    larm.tick()
    assert larm.events() == []
    moved = {larm.monitor(key)["deadline_at"] - before[key] for key in keys}
    assert len(moved) == 1
    assert 0 <= moved.pop() - 10 * MINUTE <= (TICK if crash else 0)


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_gives_no_fresh_interval(house, crash):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(WHOLE - MINUTE)
    larm.restart(10 * MINUTE, crash=crash)
    assert_goes_down_after(larm, MINUTE)


def test_a_crash_counts_from_the_last_tick(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(7_000)
    larm.clock.advance(900)
    larm.restart(10 * MINUTE, crash=True)
    assert left(larm) == WHOLE - 7_000


@pytest.mark.parametrize("crash", [False, True])
def test_100_restarts_do_not_blind_larm(house, crash):
    larm = house(JOB)
    larm.ping("job")
    for _ in range(100):
        larm.watch_for(3_000)
        larm.clock.advance(500)
        larm.restart(2_000, crash=crash)
    away = 100 * 2_000
    moved = larm.monitor("job")["deadline_at"] - (START + WHOLE)
    assert 0 <= moved - away <= (100 * TICK if crash else 0)


@pytest.mark.parametrize("crash", [False, True])
def test_larm_that_restarts_all_the_time_notices_silence(house, crash):
    larm = house('[monitors.job]\ninterval = "1m"\ngrace = 0\n')
    larm.ping("job")
    for _ in range(31):
        larm.watch_for(2_000)
        larm.restart(2_000, crash=crash)
    larm.tick()
    assert len(larm.events()) == 1


@pytest.mark.parametrize("crash", [False, True])
def test_what_was_overdue_before_the_stop_is_noticed_after_it_once(house, crash):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(WHOLE)
    larm.clock.advance(1)
    larm.restart(10 * MINUTE, crash=crash)
    larm.watch_for(5_000)
    assert [event["reason"] for event in larm.events()] == ["missed"]


def test_a_down_monitor_stays_down_over_a_restart(house):
    larm = house(JOB)
    larm.ping("job", "fail")
    larm.restart(10 * MINUTE)
    larm.watch_for(WHOLE, step=MINUTE)
    assert [event["type"] for event in larm.events()] == ["down"]
    assert larm.monitor("job")["since"] == START


def test_a_start_on_a_database_that_nobody_used_is_no_gap(house):
    larm = house(JOB)
    assert larm.rows("SELECT * FROM gaps") == []


def test_a_crash_while_starting_moves_no_deadline_twice(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(MINUTE)
    larm.store.write(lambda db: db.execute(
        "CREATE TRIGGER crash BEFORE UPDATE ON clock BEGIN SELECT RAISE(ABORT, 'crash'); END"
    ))
    larm.crash()
    larm.clock.advance(10 * MINUTE)
    with pytest.raises(sqlite3.Error, match="crash"):
        larm.open()
    larm.store.write(lambda db: db.execute("DROP TRIGGER crash"))
    larm.restart(0, crash=True)
    assert left(larm) == WHOLE - MINUTE


def test_a_ping_between_the_last_tick_and_a_crash_counts(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(30 * MINUTE, step=MINUTE)
    larm.clock.advance(600)
    larm.ping("job")
    larm.clock.advance(300)
    larm.restart(10 * MINUTE, crash=True)
    assert WHOLE - 300 <= left(larm) <= WHOLE


def test_the_gap_is_kept_for_those_who_ask_whether_larm_was_watching(house):
    larm = house(JOB)
    larm.watch_for(30_000)
    larm.restart(10 * MINUTE)
    [gap] = larm.rows("SELECT from_at, to_at FROM gaps")
    assert gap == {"from_at": START + 30_000, "to_at": START + 30_000 + 10 * MINUTE}


# Stopped, suspended


@pytest.mark.parametrize("away", [10_001, 10 * MINUTE, 3 * DAY])
def test_a_stopped_process_moves_its_deadlines(house, away):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(30 * MINUTE, step=MINUTE)
    before = left(larm)
    stop_process(larm, away)
    assert larm.events() == []
    assert left(larm) == before - TICK
    assert_goes_down_after(larm, before - TICK)


def test_a_ping_before_the_tick_that_finds_the_gap_gets_its_interval_and_no_more(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(30 * MINUTE, step=MINUTE)
    larm.clock.advance(10 * MINUTE)
    larm.ping("job")
    larm.clock.advance(50)  # unwatched, too
    larm.watcher.tick(TICK)
    assert left(larm) == WHOLE


def test_a_throttled_ping_before_the_tick_that_finds_the_gap_counts(house):
    larm = house(JOB)
    larm.ping("job")
    larm.clock.advance(5 * MINUTE)
    larm.ping("job")
    larm.watcher.tick(TICK)
    assert len(larm.heartbeats("job")) == 1
    assert left(larm) == WHOLE


def test_a_suspended_machine_moves_its_deadlines(house):
    """The monotonic clock stands still meanwhile."""
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(WHOLE - MINUTE, step=MINUTE)
    larm.clock.set_wall(8 * HOUR)
    larm.clock.advance(TICK)
    larm.tick()
    assert_goes_down_after(larm, MINUTE - TICK)


# The clock is set


@pytest.mark.parametrize("by", SET_BY)
def test_a_clock_that_is_set_moves_the_deadlines_with_it(house, by):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(WHOLE - MINUTE, step=MINUTE)
    larm.clock.set_wall(by)
    larm.clock.advance(TICK)
    larm.tick()
    assert larm.clock.now() == START + WHOLE - MINUTE + TICK + by
    assert_goes_down_after(larm, MINUTE - TICK)


@pytest.mark.parametrize("by", SET_BY)
def test_a_clock_that_is_set_and_mended_leaves_every_deadline_where_it_was(house, by):
    larm = house(JOB)
    larm.ping("job")
    for change in (by, -by):
        larm.watch_for(MINUTE)
        larm.clock.set_wall(change)
        larm.tick()
    assert larm.monitor("job")["deadline_at"] == START + WHOLE
    assert larm.events() == []


@pytest.mark.parametrize("by", SET_BY)
def test_a_ping_after_the_clock_was_set_has_its_whole_interval(house, by):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(30 * MINUTE, step=MINUTE)
    larm.clock.set_wall(by)
    larm.ping("job")  # the watcher has not found out yet
    larm.tick()
    assert left(larm) == WHOLE
    larm.watch_for(30 * MINUTE, step=MINUTE)
    larm.ping("job")
    assert left(larm) == WHOLE


@pytest.mark.parametrize("by", SET_BY)
@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_soon_after_the_clock_was_set_moves_nothing_twice(house, by, crash):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(20 * MINUTE, step=MINUTE)
    larm.clock.set_wall(by)
    larm.tick()
    larm.restart(5_000, crash=crash)
    assert left(larm) == WHOLE - 20 * MINUTE


@pytest.mark.parametrize("by", SET_BY)
def test_a_gap_after_the_clock_was_set_is_given_back_too(house, by):
    """Though the last ping may be dated in the future by now."""
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(2 * MINUTE, step=MINUTE)
    larm.clock.set_wall(by)
    larm.tick()
    stop_process(larm, 10 * MINUTE)
    assert left(larm) == WHOLE - 2 * MINUTE - TICK


@pytest.mark.parametrize("by", SET_BY)
def test_a_restart_after_the_clock_was_set_while_larm_ran_gives_its_time_back(house, by):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(2 * MINUTE, step=MINUTE)
    larm.clock.set_wall(by)
    larm.tick()
    larm.watch_for(MINUTE)
    larm.restart(10 * MINUTE)
    assert left(larm) == WHOLE - 3 * MINUTE


@pytest.mark.parametrize("by", SET_BY)
def test_a_clock_that_was_set_while_larm_was_off_alerts_nobody(house, by):
    """alive_at may be in the future then."""
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(WHOLE - MINUTE, step=MINUTE)
    start_later(larm, MINUTE, by)
    assert_goes_down_after(larm, MINUTE)


@pytest.mark.parametrize("by", [-5 * MINUTE, -3 * DAY])
def test_the_second_restart_after_the_clock_was_set_back_gives_its_time_back_too(house, by):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(MINUTE)
    start_later(larm, MINUTE, by)
    larm.watch_for(MINUTE)
    larm.restart(10 * MINUTE)
    assert left(larm) == WHOLE - 2 * MINUTE


def test_a_clock_that_creeps_moves_no_deadline(house):
    larm = house(JOB)
    larm.ping("job")
    for _ in range(100):
        larm.clock.set_wall(20)
        larm.watch_for(TICK)
    assert larm.rows("SELECT * FROM gaps") == []
    assert larm.monitor("job")["deadline_at"] == START + WHOLE


# Which time counts as the last that Larm was seen


def test_a_backup_put_in_place_of_the_database_counts_from_the_backup(house):
    """The lock file that lies beside it tells of another database's last tick."""
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(20 * MINUTE, step=MINUTE)
    larm.stop()
    shutil.copy(larm.config.database, larm.folder / "backup")
    larm.open()
    for _ in range(20):
        larm.ping("job")
        larm.watch_for(HOUR, step=MINUTE)
    larm.stop()
    shutil.copy(larm.folder / "backup", larm.config.database)
    larm.clock.advance(MINUTE)
    larm.open()
    larm.tick()
    assert larm.events() == []
    assert left(larm) == WHOLE - 20 * MINUTE


def test_a_database_without_its_lock_file_counts_from_alive_at(house):
    now = time.time_ns() // 1_000_000  # the new lock file's time is the real one
    larm = house(JOB, FakeClock(now - 60_000))
    larm.ping("job")
    larm.watch_for(20_000)
    larm.stop()
    Path(f"{larm.config.database}.lock").unlink()
    larm.clock.advance(40_000)
    larm.open()
    assert left(larm) == WHOLE - 20_000


def test_a_start_that_was_refused_does_not_count_as_being_alive(house):
    now = time.time_ns() // 1_000_000  # it may touch the lock file, in real time
    larm = house(JOB, FakeClock(now - 60_000))
    larm.ping("job")
    larm.watch_for(20_000)
    larm.stop()
    with sqlite3.connect(larm.config.database) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(program.StoreError):
        program.Store(larm.config.database)
    with sqlite3.connect(larm.config.database) as db:
        db.execute(f"PRAGMA user_version = {len(program.MIGRATIONS)}")
    db.close()
    larm.clock.advance(50_000)
    larm.open()
    assert left(larm) == WHOLE - 20_000


# What else there is


def test_a_removed_monitor_gets_the_time_off_once(house):
    other = '[monitors.other]\ninterval = "1h"\n'
    larm = house(JOB + other)
    larm.ping("job")
    larm.watch_for(20 * MINUTE, step=MINUTE)
    larm.reload(other)
    larm.watch_for(MINUTE)
    larm.restart(10 * MINUTE, text=other)
    larm.watch_for(MINUTE)
    larm.reload(JOB + other)
    assert left(larm) == WHOLE - 20 * MINUTE


def test_a_gap_that_can_not_be_written_is_made_up_for_later(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(20 * MINUTE, step=MINUTE)
    larm.store.failure = "disk full"
    for _ in range(2):
        with pytest.raises(program.Unrecordable):
            stop_process(larm, 10 * MINUTE)
    larm.store.failure = None
    larm.tick()
    assert larm.events() == []
    assert left(larm) == WHOLE - 20 * MINUTE


def test_a_gap_that_is_written_after_all_is_not_written_again(house, monkeypatch):
    monkeypatch.setattr(program, "_ANSWER_WITHIN", 0.2)  # seconds, of 30
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(20 * MINUTE, step=MINUTE)
    go = hang(larm.store)
    with pytest.raises(program.Unrecordable):
        stop_process(larm, 10 * MINUTE)  # the disk hangs for longer than a caller waits
    go.set()
    wait_until(lambda: larm.rows("SELECT * FROM gaps"))
    larm.tick()
    assert left(larm) == WHOLE - 20 * MINUTE - TICK


@settings(deadline=None, derandomize=True, database=None, max_examples=80)
@given(st.lists(
    st.tuples(st.just("watch"), st.integers(0, 5 * MINUTE))
    | st.tuples(st.just("ping"), st.integers(0, MINUTE))
    | st.tuples(st.sampled_from(["stop", "crash", "sigstop"]), st.integers(10_001, DAY))
    | st.tuples(
        st.sampled_from(["set", "set while off"]),
        st.sampled_from(SET_BY) | st.integers(5_001, DAY) | st.integers(-DAY, -5_001),
    ),
    min_size=1, max_size=10,
))  # fmt: skip
def test_no_sequence_of_gaps_changes_the_time_that_is_left(steps):
    """It runs down by the time that Larm watched, and by nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        larm = House(Path(folder), JOB)
        larm.ping("job")
        expected = WHOLE
        for what, ms in steps:
            if what == "watch":
                larm.watch_for(ms, step=MINUTE)
                expected -= ms
            elif what == "ping":
                larm.ping("job")
                larm.tick()
                larm.watch_for(ms, step=MINUTE)
                expected = WHOLE - ms
            elif what == "sigstop":
                stop_process(larm, ms)
                expected -= TICK
            elif what == "set":
                larm.clock.set_wall(ms)
                larm.tick()
            elif what == "set while off":
                start_later(larm, MINUTE, ms)
            else:
                larm.tick()
                larm.restart(ms, crash=what == "crash")
            assert left(larm) == expected, f"after {what} {ms}"
        assert larm.events() == []
        larm.stop()


@pytest.mark.parametrize("by", [HOUR, -HOUR])
def test_a_ping_before_a_clock_change_is_on_disk_after_all_leads_to_no_alert(house, by):
    """The database is locked just when the change is written; a ping comes at the recovery."""
    larm = house(JOB)
    larm.ping("job")
    larm.tick()
    larm.store.write(lambda db: db.execute("PRAGMA busy_timeout = 0").fetchall())
    larm.clock.set_wall(by)
    with contextlib.closing(sqlite3.connect(larm.config.database)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(program.Unrecordable):
            larm.tick()
        larm.clock.advance(30_000)
    wait_until(lambda: larm.store.failure is None)
    larm.ping("job")
    larm.tick()
    larm.watch_for(MINUTE)
    assert larm.events() == []
    assert left(larm) >= WHOLE - MINUTE
