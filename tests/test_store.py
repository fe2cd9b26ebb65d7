"""The Store: what is on disk, who may use it, how it is written, and what is kept."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, START, House, hang, wait_until

import larm as program

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
JOB = '[monitors.job]\ninterval = "1h"\ngrace = "10m"\n'
OTHER = '[monitors.other]\ninterval = "1h"\n'
WHOLE = HOUR + 10 * MINUTE  # what a ping gives JOB


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[], program.Store]]:
    """opened(): a Store on tmp_path's larm.db."""
    stores: list[program.Store] = []

    def build() -> program.Store:
        stores.append(program.Store(tmp_path / "larm.db"))
        return stores[-1]

    yield build
    for store in stores:
        with contextlib.suppress(OSError):
            store.close()


def left(larm: House, key: str = "job") -> int:
    """Milliseconds until the deadline."""
    return int(larm.monitor(key)["deadline_at"]) - larm.clock.now()


def tables(path: Path) -> None:
    """Make it another program's database."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")


@contextlib.contextmanager
def busy(store: program.Store) -> Iterator[None]:
    """Keep the writer busy, so that whatever is submitted meanwhile becomes one batch."""
    go = hang(store)
    try:
        yield
    finally:
        go.set()


@contextlib.contextmanager
def full_disk(larm: House) -> Iterator[None]:
    """No file of this process may become longer than the WAL is now."""
    size = Path(f"{larm.config.database}-wal").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The file


def test_the_database_is_in_wal_mode_and_fully_synchronous_with_foreign_keys(opened):
    store = opened()
    pragmas = ("journal_mode", "synchronous", "foreign_keys", "application_id", "user_version")
    found = {name: store._db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas}
    assert found == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1,
        "application_id": program.APPLICATION_ID, "user_version": len(program.MIGRATIONS),
    }  # fmt: skip


def test_only_its_owner_may_read_any_of_its_files(opened, tmp_path):
    store = opened()
    store.write(lambda db: program.write_alive(db, 1))
    files = sorted(tmp_path.glob("larm.db*"))
    assert [file.name[7:] for file in files] == ["", "-shm", "-wal", ".lock"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_database_that_others_could_read_is_closed_to_them(opened, tmp_path):
    opened().close()
    (tmp_path / "larm.db").chmod(0o644)
    opened()
    assert (tmp_path / "larm.db").stat().st_mode & 0o777 == 0o600


def test_a_reading_connection_writes_nothing(opened):
    with opened().reading() as db, pytest.raises(sqlite3.OperationalError, match="readonly"):
        program.write_alive(db, 1)


def test_a_second_start_finds_what_the_first_one_wrote(opened):
    store = opened()
    store.write(lambda db: program.write_alive(db, 17))
    store.close()
    assert opened().last_alive_at() == 17


# Refused


def test_a_database_of_a_newer_larm_is_refused_and_left_alone(opened, tmp_path):
    opened().close()
    with contextlib.closing(sqlite3.connect(tmp_path / "larm.db")) as db:
        db.execute("PRAGMA user_version = 99")
    before = (tmp_path / "larm.db").read_bytes()
    with pytest.raises(program.StoreError, match=r"larm\.db: .*newer Larm.*99.*update larm\.py"):
        opened()
    assert (tmp_path / "larm.db").read_bytes() == before


def test_another_program_s_database_is_refused_and_left_alone(opened, tmp_path):
    tables(tmp_path / "larm.db")
    before = (tmp_path / "larm.db").read_bytes()
    with pytest.raises(program.StoreError, match=r"larm\.db: .*belongs to another program"):
        opened()
    assert (tmp_path / "larm.db").read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(opened, tmp_path):
    (tmp_path / "larm.db").write_text("a shopping list\n" * 100)
    with pytest.raises(program.StoreError, match=r"larm\.db: .*not a database"):
        opened()
    assert (tmp_path / "larm.db").read_text() == "a shopping list\n" * 100


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(program.StoreError, match=r"nowhere/larm\.db: .*No such file or directory"):
        program.Store(tmp_path / "nowhere" / "larm.db")


def test_a_refused_database_can_be_opened_once_it_is_put_right(opened, tmp_path):
    tables(tmp_path / "larm.db")
    with pytest.raises(program.StoreError):
        opened()
    (tmp_path / "larm.db").unlink()
    opened()


def test_a_second_larm_on_the_same_database_is_refused(opened):
    opened()
    expected = rf"larm\.db: another Larm \(process {os.getpid()}\) is running on it"
    with pytest.raises(program.StoreError, match=expected):
        opened()


def test_the_lock_is_dropped_when_its_process_dies(opened, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", "import larm, pathlib, time; store = larm.Store(pathlib.Path("
         f"{str(tmp_path / 'larm.db')!r})); print('open', flush=True); time.sleep(60)"],
        cwd=ROOT, stdout=subprocess.PIPE,
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(program.StoreError, match=f"process {other.pid}"):
            opened()
        other.send_signal(signal.SIGKILL)
        other.wait()
        opened()


# The writer


def test_what_queues_up_is_committed_as_one(house):
    keys = [f"job-{number}" for number in range(32)]
    larm = house("".join(f'[monitors.{key}]\ninterval = "1h"\n' for key in keys))
    before = larm.store.stored
    threads = [threading.Thread(target=larm.ping, args=(key,)) for key in keys]
    with busy(larm.store):
        for thread in threads:
            thread.start()
        wait_until(lambda: larm.store._queue.qsize() == len(keys))
    for thread in threads:
        thread.join()
    assert {larm.state(key) for key in keys} == {"up"}
    assert larm.store.stored - before == 2  # what kept the writer busy, and the pings


def test_a_caller_is_answered_once_its_write_is_on_disk(opened):
    store = opened()
    with busy(store):
        write = store.submit(lambda db: program.write_alive(db, 17))
        assert store.last_alive_at() is None
    write.result()
    assert store.last_alive_at() == 17


def test_an_operation_that_fails_harms_no_other_of_its_batch(opened):
    store = opened()

    def fails(db: sqlite3.Connection) -> None:
        program.write_alive(db, 13)
        raise ValueError("its own fault")

    with busy(store):
        before = store.submit(lambda db: program.write_alive(db, 17))
        faulty = store.submit(fails)
        after = store.submit(lambda db: db.execute("SELECT alive_at FROM clock").fetchone()[0])
    before.result()
    with pytest.raises(ValueError, match="its own fault"):
        faulty.result()
    assert after.result() == 17
    assert store.failure is None


def test_a_ping_that_can_not_be_stored_harms_no_other_of_its_batch(house):
    keys = [f"job-{number}" for number in range(8)]
    larm = house("".join(f'[monitors.{key}]\ninterval = "1h"\n' for key in keys))
    larm.store.write(lambda db: db.execute(
        "CREATE TRIGGER fault BEFORE INSERT ON heartbeats WHEN new.body = 'bad' "
        "BEGIN SELECT RAISE(ABORT, 'fault'); END"
    ))
    errors: list[Exception] = []

    def ping(key: str) -> None:
        try:
            larm.ping(key, body="bad" if key == "job-3" else None)
        except sqlite3.Error as error:
            errors.append(error)

    threads = [threading.Thread(target=ping, args=(key,)) for key in keys]
    with busy(larm.store):
        for thread in threads:
            thread.start()
        wait_until(lambda: larm.store._queue.qsize() == len(keys))
    for thread in threads:
        thread.join()
    assert [str(error) for error in errors] == ["fault"]
    assert [key for key in keys if larm.state(key) != "up"] == ["job-3"]


def test_a_store_that_is_closed_takes_no_writes(opened):
    store = opened()
    store.close()
    with pytest.raises(program.Unrecordable, match="stopping"):
        store.write(lambda db: program.write_alive(db, 17))


def test_what_was_queued_at_the_close_is_written(opened):
    store = opened()
    with busy(store):
        write = store.submit(lambda db: program.write_alive(db, 17))
        closing = threading.Thread(target=store.close)
        closing.start()
    write.result()
    closing.join()
    assert opened().last_alive_at() == 17


# The disk is full


def test_on_a_full_disk_no_ping_is_taken_whatever_its_token(house):
    larm = house(JOB + OTHER)
    with full_disk(larm):
        with pytest.raises(program.Unrecordable):
            larm.ping("job")
        for token in (larm.watched["job"].token, larm.watched["other"].token, "unknown", ""):
            with pytest.raises(program.Unrecordable):
                larm.intake.receive(token, "", lambda signal, _: program.Ping(signal))


def test_pings_are_taken_again_soon_after_there_is_space(house):
    larm = house(JOB)
    with full_disk(larm), pytest.raises(program.Unrecordable):
        larm.ping("job")
    since = time.monotonic()
    wait_until(lambda: larm.store.failure is None)
    assert time.monotonic() - since < 2.5
    larm.ping("job")
    assert larm.state("job") == "up"
    assert len(larm.heartbeats("job")) == 1


def test_the_disk_stays_full_for_as_long_as_it_is(house):
    larm = house(JOB)
    with full_disk(larm):
        with pytest.raises(program.Unrecordable):
            larm.ping("job")
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # the writer probes once a second
            assert larm.store.failure
            time.sleep(0.01)


def test_a_full_disk_is_logged_once_and_so_is_its_end(house, caplog):
    larm = house(JOB)
    with full_disk(larm):
        for _ in range(3):
            with pytest.raises(program.Unrecordable):
                larm.ping("job")
    wait_until(lambda: larm.store.failure is None)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "can't be written" in line]) == 1
    assert len([line for line in lines if "can be written again" in line]) == 1


def test_what_was_stored_before_the_disk_was_full_can_be_read(house):
    larm = house(JOB)
    larm.ping("job")
    with full_disk(larm):
        with pytest.raises(program.Unrecordable):
            larm.ping("job", "fail")
        assert larm.state("job") == "up"
        assert len(larm.heartbeats("job")) == 1


def test_in_a_damaged_database_no_ping_is_taken_whatever_its_token(house):
    """Law 1: else the answer tells a valid token from others."""
    larm = house(JOB)
    larm.store.write(lambda db: db.executemany(
        "INSERT INTO heartbeats (monitor_id, at, signal, method, body) "
        "VALUES (1, 1, 'log', 'GET', ?)", [("x" * 3_000,)] * 200,
    ))
    larm.stop()
    pages = bytearray(larm.config.database.read_bytes())
    for start in range(40 * 4_096, len(pages), 4_096):  # beyond those of the schema
        pages[start : start + 200] = b"\xff" * 200
    larm.config.database.write_bytes(pages)
    larm.open()
    with pytest.raises(Exception, match="malformed"):
        larm.ping("job", "fail")
    with pytest.raises(program.Unrecordable):
        larm.intake.receive("unknown", "", lambda signal, _: program.Ping(signal))


# What is kept


def fill(larm: House, count: int, at: int) -> None:
    larm.store.write(lambda db: db.executemany(
        "INSERT INTO heartbeats (monitor_id, at, signal, method) VALUES (?, ?, 'success', 'GET')",
        [(larm.watched["job"].id, at + number) for number in range(count)],
    ))


def prune_all(larm: House) -> None:
    for _ in range(12):
        larm.clock.advance(1)
        larm.tick()


def test_of_heartbeats_the_newest_1000_are_kept(house):
    larm = house(JOB)
    fill(larm, 2_700, START)
    prune_all(larm)
    assert [one["at"] - START for one in larm.heartbeats("job")] == list(range(1_700, 2_700))


def test_heartbeats_and_events_are_kept_for_keep(house):
    larm = house('keep = "2d"\n' + JOB.replace("1h", "30d"))
    larm.ping("job", "fail")
    larm.ping("job")
    larm.clock.advance(2 * DAY)
    prune_all(larm)  # ends a few milliseconds later
    assert (larm.events(), larm.heartbeats("job")) == ([], [])


def test_what_is_not_older_than_keep_stays(house):
    larm = house('keep = "2d"\n' + JOB.replace("1h", "30d"))
    larm.ping("job", "fail")
    larm.ping("job")
    larm.clock.advance(2 * DAY - MINUTE)
    prune_all(larm)
    assert (len(larm.events()), len(larm.heartbeats("job"))) == (2, 2)


def test_gaps_are_kept_for_keep(house):
    larm = house('keep = "2d"\n' + JOB)
    larm.restart(MINUTE)
    larm.clock.advance(2 * DAY)
    prune_all(larm)
    assert larm.rows("SELECT * FROM gaps") == []


def test_a_failure_s_heartbeat_is_kept_with_its_event(house):
    larm = house(JOB)
    larm.ping("job", "1", body="no space left on device")
    fill(larm, 1_500, START + 1)
    prune_all(larm)
    bodies = [one["body"] for one in larm.heartbeats("job") if one["body"]]
    assert bodies == ["no space left on device"]
    assert len(larm.heartbeats("job")) <= 1_001


def test_an_event_that_is_not_delivered_yet_is_kept(house):
    larm = house('keep = "2d"\n[channels]\nphone = "json://127.0.0.1:9/"\n' + JOB)
    larm.ping("job", "fail")
    larm.clock.advance(3 * DAY)
    prune_all(larm)
    assert len(larm.events()) == 1
    larm.ping("job")
    prune_all(larm)
    assert [event["type"] for event in larm.events()] == ["down", "up"]
    larm.store.write(lambda db: db.execute("UPDATE deliveries SET state = 'sent'"))
    prune_all(larm)
    assert [event["type"] for event in larm.events()] == ["up"]
    assert len(larm.rows("SELECT * FROM deliveries")) == 1


def test_the_down_event_of_a_monitor_that_is_still_down_is_kept(house):
    larm = house('keep = "2d"\n' + JOB)
    larm.ping("job", "fail")
    larm.clock.advance(3 * DAY)
    prune_all(larm)
    assert [event["type"] for event in larm.events()] == ["down"]


def test_each_of_many_monitors_is_pruned(house):
    keys = [f"job-{number}" for number in range(45)]
    larm = house('keep = "2d"\n' + "".join(f'[monitors.{key}]\ninterval = "1d"\n' for key in keys))
    for key in keys:
        larm.ping(key, "log")
    larm.clock.advance(3 * DAY)
    prune_all(larm)
    assert larm.rows("SELECT * FROM heartbeats") == []


def test_a_removed_monitor_s_heartbeats_are_kept_for_keep_and_no_longer(house):
    larm = house('keep = "2d"\n' + JOB + OTHER)
    larm.ping("job")
    larm.reload('keep = "2d"\n' + OTHER)
    prune_all(larm)
    assert len(larm.rows("SELECT * FROM heartbeats")) == 1
    larm.clock.advance(3 * DAY)
    prune_all(larm)
    assert larm.rows("SELECT * FROM heartbeats") == []


# Monitors come and go


def test_a_made_token_survives_removal_and_return(house):
    larm = house(JOB + OTHER)
    token = larm.watched["job"].token
    assert re.fullmatch(r"[0-9a-f]{32}", token)
    larm.restart(MINUTE, text=OTHER)
    assert "job" not in larm.watched
    larm.restart(MINUTE, text=JOB + OTHER)
    assert larm.watched["job"].token == token


def test_a_made_token_is_in_force_again_when_the_file_s_own_is_taken_out(house):
    larm = house(JOB)
    token = larm.watched["job"].token
    larm.reload(JOB + 'token = "0123456789abcdef"\n')
    assert larm.watched["job"].token == "0123456789abcdef"
    larm.reload(JOB)
    assert larm.watched["job"].token == token


def test_a_removed_monitor_s_token_is_not_accepted(house):
    larm = house(JOB + OTHER)
    token = larm.watched["job"].token
    larm.reload(OTHER)
    larm.intake.receive(token, "", lambda signal, _: program.Ping(signal))
    assert larm.rows("SELECT * FROM heartbeats") == []


def test_a_removed_monitor_is_not_watched(house):
    larm = house(JOB + OTHER)
    larm.ping("job")
    larm.reload(OTHER)
    larm.watch_for(3 * HOUR, step=MINUTE)
    assert larm.events() == []


def test_a_monitor_that_is_put_back_goes_on_with_the_time_that_it_had_left(house):
    larm = house(JOB + OTHER)
    larm.ping("job")
    larm.watch_for(20 * MINUTE, step=MINUTE)
    larm.reload(OTHER)
    larm.watch_for(5 * HOUR, step=HOUR)
    larm.reload(JOB + OTHER)
    assert left(larm) == WHOLE - 20 * MINUTE
    assert larm.state("job") == "up"


def test_a_monitor_that_is_put_back_has_its_history(house):
    larm = house(JOB + OTHER)
    larm.ping("job")
    larm.ping("job", "fail")
    larm.reload(OTHER)
    larm.reload(JOB + OTHER)
    assert [event["type"] for event in larm.events("job")] == ["down"]
    assert len(larm.heartbeats("job")) == 2
    assert larm.state("job") == "down"


def test_a_disabled_monitor_stores_pings_and_changes_no_state(house):
    larm = house(JOB + "enabled = false\n")
    for action in ("", "fail", "start"):
        larm.ping("job", action)
    assert [one["signal"] for one in larm.heartbeats("job")] == ["success", "fail", "start"]
    assert larm.monitor("job")["state"] == "pending"
    assert larm.state("job") == "paused"
    assert larm.events() == []


@pytest.mark.parametrize(("before", "pinged"), [("up", "fail"), ("down", "")])
def test_a_monitor_that_is_disabled_keeps_its_state(house, before, pinged):
    larm = house(JOB)
    larm.ping("job", "" if before == "up" else "fail")
    events = larm.events()
    larm.reload(JOB + "enabled = false\n")
    larm.watch_for(3 * HOUR, step=MINUTE)
    larm.ping("job", pinged)
    assert larm.monitor("job")["state"] == before
    assert larm.events() == events


def test_a_monitor_that_is_enabled_again_has_one_interval_and_its_grace(house):
    larm = house(JOB)
    larm.ping("job")
    larm.reload(JOB + "enabled = false\n")
    larm.watch_for(3 * HOUR, step=MINUTE)
    larm.reload(JOB)
    assert left(larm) == WHOLE
    larm.watch_for(WHOLE, step=MINUTE)
    assert larm.events() == []


def test_saving_the_same_file_moves_nothing(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(20 * MINUTE, step=MINUTE)
    before = larm.monitor("job")
    larm.reload(JOB + 'note = "new"\n')
    assert larm.monitor("job") == before


@pytest.mark.parametrize(("interval", "grace"), [("2h", "10m"), ("30m", "10m"), ("1h", "0s")])
def test_a_changed_rhythm_counts_from_the_last_received_ping(house, interval, grace):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(5 * MINUTE, step=MINUTE)
    larm.ping("job")  # throttled
    larm.watch_for(5 * MINUTE, step=MINUTE)
    larm.reload(f'[monitors.job]\ninterval = "{interval}"\ngrace = "{grace}"\n')
    expected = program.parse_duration(interval) + program.parse_duration(grace)
    assert larm.monitor("job")["deadline_at"] == START + 5 * MINUTE + expected


def test_a_changed_rhythm_keeps_what_gaps_have_given(house):
    larm = house(JOB)
    larm.ping("job")
    larm.restart(3 * HOUR, text=JOB.replace("1h", "2h"))
    assert left(larm) == 2 * HOUR + 10 * MINUTE


def test_a_deadline_that_a_shorter_interval_leaves_behind_is_missed(house):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(50 * MINUTE, step=MINUTE)
    larm.reload(JOB.replace("1h", "20m"))
    larm.watch_for(1_000)
    assert [event["at"] for event in larm.events()] == [START + 30 * MINUTE]


# The cost of a tick


def overdue(db, now):
    return program.due_monitors(db, "deadline_at", now)


def held_or_due(db, now):
    return program.due_monitors(db, "alert_at", now)


@pytest.mark.parametrize(
    ("query", "index"),
    [(overdue, "monitors_by_deadline"), (program.next_due_at, "monitors_by_deadline"),
     (held_or_due, "monitors_by_alert")],
)
def test_what_is_due_is_found_by_a_partial_index(opened, query, index):
    with opened().reading() as db:
        statements: list[str] = []
        db.set_trace_callback(statements.append)
        query(db, START)
        db.set_trace_callback(None)
        plan = [row["detail"] for row in db.execute(f"EXPLAIN QUERY PLAN {statements[0]}")]
    found = [line for line in plan if "monitors" in line]
    assert index in found[0]
    assert all("USING" in line for line in found)
    assert not any("TEMP B-TREE" in line for line in plan)
