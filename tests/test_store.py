"""The Store: what is on disk, who may use it, how it is written, and what is kept (law 8)."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, START, TOKEN, FakeClock, House, Webhook, run_larm, wait_until

import larm as program

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
JOB = '[monitors.job]\ninterval = "1h"\ngrace = "10m"\n'
OTHER = '[monitors.other]\ninterval = "1h"\n'
WHOLE = HOUR + 10 * MINUTE  # what a ping gives JOB


def rows(here: House) -> dict[str, int]:
    """How many rows each table has."""
    tables = here.sql("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {name: here.sql(f"SELECT COUNT(*) AS n FROM {name}")[0]["n"]
            for name in (table["name"] for table in tables)}  # fmt: skip


def is_in_the_file(here: House, text: str) -> bool:
    """Whether any row of the database has that text."""
    with contextlib.closing(sqlite3.connect(here.folder / "larm.db")) as db:
        return any(text in line for line in db.iterdump() if line.startswith("INSERT"))


# The file


def test_the_database_is_in_wal_mode_and_fully_synchronous_with_foreign_keys(house):
    here, found = house(JOB), {}

    def look(db: sqlite3.Connection) -> None:
        for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout",
                     "application_id"):  # fmt: skip
            found[name] = db.execute(f"PRAGMA {name}").fetchone()[0]

    here.larm.store.submit(look)
    wait_until(lambda: len(found) == 5)
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1,
                     "busy_timeout": 10_000, "application_id": 0x4C41524D}  # fmt: skip


def test_only_its_owner_may_read_any_of_its_files(house, tmp_path):
    here = house(JOB)
    here.stop()
    (tmp_path / "larm.db").chmod(0o644)
    here.open()
    here.ping("job")
    files = sorted(tmp_path.glob("larm.db*"))
    assert [file.name[7:] for file in files] == ["", "-shm", "-wal", ".lock"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def other_program(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")


def newer_larm(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA application_id = 0x4C41524D")
        db.execute("PRAGMA user_version = 99")


def shopping_list(path: Path) -> None:
    path.write_text("a shopping list\n" * 1_000)


@pytest.mark.parametrize(("made", "says"), [
    (newer_larm, r"larm\.db: .*newer Larm.*99.*update larm\.py"),
    (other_program, r"larm\.db: .*belongs to another program"),
    (shopping_list, r"larm\.db: .*not a database"),
])  # fmt: skip
def test_what_is_not_a_database_of_this_larm_is_refused_in_one_line_and_left_alone(
    house, tmp_path, made, says
):
    made(tmp_path / "larm.db")
    before = (tmp_path / "larm.db").read_bytes()
    with pytest.raises(program.StoreError, match=says) as error:
        house(JOB)
    assert "\n" not in str(error.value)
    assert (tmp_path / "larm.db").read_bytes() == before
    (tmp_path / "larm.db").unlink()
    house(JOB)  # and once it is put right, the same process can open it


def test_a_folder_that_does_not_exist_is_named(house):
    with pytest.raises(program.StoreError, match=r"nowhere/larm\.db: .*No such file or directory"):
        house('database = "nowhere/larm.db"\n' + JOB)


def test_a_second_larm_on_the_same_database_is_refused(house):
    house(JOB)
    expected = rf"larm\.db: another Larm \(process {os.getpid()}\) is running on it"
    with pytest.raises(program.StoreError, match=expected):
        house(JOB)


def test_the_lock_is_dropped_when_its_process_dies(house, tmp_path):
    (tmp_path / "larm.toml").write_text(JOB)
    other = subprocess.Popen(
        [sys.executable, "-c", "import larm, os, pathlib, time; larm.Larm(larm.load("
         "pathlib.Path('larm.toml'), os.environ), larm.Clock()); print('open', flush=True);"
         "time.sleep(60)"],
        cwd=tmp_path, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(program.StoreError, match=f"process {other.pid}"):
            house(JOB)
        other.kill()
        other.wait()
        house(JOB)


# The writer


def in_threads(here: House, **bodies: str) -> list[threading.Thread]:
    """A failure of each of these monitors, with that body, on its way to the writer."""
    threads = [threading.Thread(target=here.ping, args=(key.replace("_", "-"), "fail", body))
               for key, body in bodies.items()]  # fmt: skip
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    return threads


def test_a_ping_is_answered_once_it_is_on_disk(house):
    here = house(JOB)
    here.token("job")
    with here.hanging_disk():
        [thread] = in_threads(here, job="output")
        assert thread.is_alive()
        assert here.heartbeats("job") == []
    thread.join(10)
    assert [one["body"] for one in here.heartbeats("job")] == ["output"]


def test_a_ping_that_can_not_be_stored_harms_no_other_of_its_batch(house):
    keys = [f"job-{number}" for number in range(8)]
    here = house("".join(f'[monitors.{key}]\ninterval = "1h"\n' for key in keys))
    for key in keys:
        here.tokens[key] = here.token(key)
    here.sql("CREATE TRIGGER fault BEFORE INSERT ON heartbeats WHEN new.body = 'bad' "
             "BEGIN SELECT RAISE(ABORT, 'fault'); END")  # fmt: skip
    with here.hanging_disk():
        bodies = {key.replace("-", "_"): "bad" if key == "job-3" else "good" for key in keys}
        threads = in_threads(here, **bodies)
    for thread in threads:
        thread.join(10)
    assert [key for key in keys if here.state(key) != "down"] == ["job-3"]


def test_pings_are_taken_again_soon_after_there_is_space(house, caplog):
    here = house(JOB)
    here.ping("job")
    with here.full_disk():
        for _ in range(3):
            here.ping("job", "fail", status=503)
            time.sleep(0.5)  # the writer tries once a second
        assert here.state("job") == "up", "what was stored before can be read"
        assert here.ask("/health").status == 503
    began = time.monotonic()
    token = here.tokens["job"]
    wait_until(lambda: here.ask(f"/api/heartbeat/{token}/fail").status == 200, 3)
    assert time.monotonic() - began < 2.5
    assert here.state("job") == "down"
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "can't be written" in line]) == 1
    assert len([line for line in lines if "can be written again" in line]) == 1


def test_a_stop_writes_what_was_queued_and_then_nothing_more(house):
    here = house(JOB)
    here.token("job")
    with here.hanging_disk():
        threads = in_threads(here, job="last words")
        stopping = threading.Thread(target=here.stop)
        stopping.start()
        time.sleep(0.2)
    for thread in (*threads, stopping):
        thread.join(10)
    assert here.ask(f"/api/heartbeat/{here.tokens['job']}").status == 503
    here.open()
    assert [one["body"] for one in here.heartbeats("job")] == ["last words"]


# What is kept: growth has an end (law 8)


def test_a_fast_monitor_among_1000_does_not_outgrow_pruning(house):
    """Whatever the throttle lets in, and while deadlines are due in every tick."""
    others = "".join(
        f'[monitors.m{number}]\ninterval = {number + 5}\ngrace = 0\n' for number in range(1_000)
    )
    here = house(f'[monitors.fast]\ninterval = 1\ngrace = "1h"\ntoken = "{TOKEN}"\n' + others)
    for number in range(300):
        here.ping(f"m{number}")
    most = most_bodies = 0
    for second in range(240):
        for number in range(10):
            action = ("", "/log", "/start?rid=a", "/0?rid=a")[number % 4]
            here.ask(f"/api/heartbeat/{TOKEN}{action}", "POST", b"x" * 1_000)
            here.clock.advance(100)
        here.tick()
        if second % 20 == 19:
            found = here.heartbeats("fast")
            most = max(most, len(found))
            most_bodies = max(most_bodies, sum(one["body"] is not None for one in found))
    assert len(here.events()) > 200, "deadlines were due in these ticks"
    assert 1_000 <= most <= 1_060
    assert 100 <= most_bodies <= 160
    here.watch(30 * SECOND)
    found = here.heartbeats("fast")
    assert 1_000 <= len(found) <= 1_060


def test_each_of_many_monitors_is_pruned(house):
    keys = [f"job-{number}" for number in range(120)]
    here = house('keep = "2d"\n' + "".join(
        f'[monitors.{key}]\ninterval = "9d"\n' for key in keys))  # fmt: skip
    for key in keys:
        here.ping(key, "log")
    assert all(len(here.heartbeats(key)) == 1 for key in keys)
    here.watch(2 * DAY + HOUR, step=HOUR)
    here.watch(30 * SECOND)
    assert rows(here)["heartbeats"] == 0


def test_heartbeats_events_and_gaps_are_kept_for_keep_and_no_longer(house):
    here = house('keep = "2d"\n' + JOB.replace("1h", "30d"))
    here.ping("job", "fail")
    here.ping("job")
    here.restart(MINUTE)
    here.watch(2 * DAY - HOUR, step=HOUR)
    assert (len(here.events()), len(here.heartbeats("job"))) == (2, 2)
    here.watch(2 * HOUR, step=MINUTE)
    assert (here.events(), here.heartbeats("job")) == ([], [])
    assert here.state("job") == "up"
    assert not any(found for name, found in rows(here).items() if name not in ("clock", "monitors"))


def test_a_failure_s_heartbeat_with_its_output_is_kept_with_its_event(house):
    here = house('[monitors.job]\ninterval = 60\ngrace = "1h"\n')
    here.ping("job", "1", body="no space left on device")
    for number in range(1_300):
        here.clock.advance(6 * SECOND)
        here.ping("job", body=f"{number}")
        if number % 5 == 0:
            here.tick()
    here.watch(30 * SECOND)
    found = here.heartbeats("job")
    assert found[0]["body"] == "no space left on device"
    assert [event["type"] for event in here.events()] == ["down", "up"]
    assert len(found) <= 1_061


def test_a_monitor_that_flaps_for_ever_keeps_its_newest_10_000_events(house):
    here = house(JOB)
    for action in ("fail", "", "fail", ""):
        here.ping("job", action)
    assert [event["type"] for event in here.events()] == ["down", "up"] * 2
    here.sql("INSERT INTO events (monitor_id, type, at) "
             "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 12000) "
             "SELECT (SELECT id FROM monitors), IIF(i % 2, 'down', 'up'), ? FROM n", START)
    here.restart(MINUTE)
    here.watch(10 * SECOND)
    assert 9_000 <= rows(here)["events"] <= 10_000
    assert rows(here)["heartbeats"] <= 4
    assert here.events()[-1]["type"] == "up"


def test_reminders_add_no_rows(house, webhook):
    here = house(
        f'keep = "3d"\n[channels]\nphone = "{webhook.url}"\n' + JOB + 'remind = "1h"\n'
    )
    here.ping("job", "fail")
    here.live(10 * SECOND)
    before = rows(here)
    here.live(30 * HOUR, step=10 * MINUTE)
    assert 25 <= webhook.titles().count("STILL DOWN: job") <= 30
    after = rows(here)
    assert after.pop("messages", 0) <= 10  # what keeps to so many messages an hour
    before.pop("messages", 0)
    assert after == before
    assert len(here.events()) == 1


def test_what_is_of_monitors_and_channels_that_are_gone_goes_after_keep(house, webhook):
    gone = f'gone-channel = "{webhook.url}"\n'
    top = f'keep = "2d"\n[channels]\nphone = "{webhook.url}"\n'
    monitor = '[monitors.gone-monitor]\ninterval = "1h"\ntoken = "a-token-of-the-gone"\n'
    here = house(top + gone + monitor + OTHER)
    here.ping("gone-monitor", "start", body="output of the gone")
    here.ping("gone-monitor", "fail", body="output of the gone")
    here.ping("other")
    here.live(10 * SECOND)
    assert len(webhook.alerts) == 2
    here.save(top + OTHER)
    here.watch(47 * HOUR, step=HOUR)
    words = ("gone-monitor", "gone-channel", "output of the gone")
    assert all(is_in_the_file(here, word) for word in words), "until then it can be put back"
    for _ in range(60):
        here.watch(HOUR, step=30 * MINUTE)
        here.ping("other")
    assert [word for word in words if is_in_the_file(here, word)] == []


def test_what_is_not_delivered_yet_is_kept(house, webhook):
    webhook.answer = 500
    here = house(
        f'keep = "1d"\n[channels]\nphone = "{webhook.url}"\n' + JOB.replace("1h", "30d")
    )
    here.ping("job", "fail")
    here.ping("job")
    here.live(2 * DAY, step=HOUR)
    assert len(here.events()) == 2
    webhook.answer = 200
    here.live(12 * HOUR, step=HOUR)
    assert webhook.alerts
    here.live(HOUR, step=MINUTE)
    assert here.events() == []


def test_the_down_event_of_a_monitor_that_is_still_down_is_kept(house):
    here = house('keep = "2d"\n' + JOB)
    here.ping("job", "fail", body="the newest failure")
    here.watch(9 * DAY, step=HOUR)
    assert [event["type"] for event in here.events()] == ["down"]
    assert here.heartbeats("job")[0]["body"] == "the newest failure"


@pytest.mark.parametrize("how", ["at the start", "while it runs"])
def test_a_wrong_date_prunes_no_history(house, how):
    """A machine that boots in 2050, or somebody who sets the clock, until it is set right."""
    here = house('keep = "2d"\n' + JOB.replace("1h", "30d"))
    here.ping("job", "fail")
    here.ping("job")
    here.watch(2 * HOUR, step=MINUTE)
    if how == "at the start":
        here.stop()
        here.clock.set_wall(9_000 * DAY)
        here.clock.resync()
        here.open()
    else:
        here.clock.set_wall(9_000 * DAY)
    here.watch(10 * MINUTE)
    here.clock.set_wall(-9_000 * DAY)
    here.watch(10 * MINUTE)
    assert (len(here.events()), len(here.heartbeats("job"))) == (2, 2)


# Monitors come and go


def test_a_made_token_survives_removal_and_return_for_as_long_as_keep(house):
    """Also where there is no other history of the monitor."""
    top = 'keep = "2d"\n'
    here = house(top + JOB + OTHER)
    token = here.token("job")
    assert re.fullmatch(r"[0-9a-f]{32}", token)
    here.restart(MINUTE, text=top + OTHER)
    assert here.ask("/api/v1/monitors/job").status == 404
    here.watch(47 * HOUR, step=HOUR)
    here.restart(MINUTE, text=top + JOB + OTHER)
    assert here.token("job") == token
    here.save(top + OTHER)
    here.watch(50 * HOUR, step=HOUR)
    here.save(top + JOB + OTHER)
    assert here.token("job") != token


def test_a_made_token_is_in_force_again_when_the_file_s_own_is_taken_out(house):
    here = house(JOB)
    token = here.token("job")
    here.save(JOB + 'token = "0123456789"\n')
    assert here.token("job") == "0123456789"
    here.save(JOB)
    assert here.token("job") == token


def test_a_removed_monitor_is_not_watched_and_its_token_is_not_accepted(house):
    here = house(JOB + OTHER)
    here.ping("job")
    here.save(OTHER)
    here.ping("job", "fail")
    here.watch(3 * HOUR, step=MINUTE)
    assert here.events() == []
    here.save(JOB + OTHER)
    assert len(here.heartbeats("job")) == 1


def test_a_monitor_that_is_put_back_has_its_history_and_the_time_that_it_had_left(house):
    here = house(JOB + OTHER)
    here.ping("job", "fail")
    here.ping("job")
    here.watch(20 * MINUTE, step=MINUTE)
    here.save(OTHER)
    here.watch(5 * HOUR, step=HOUR)
    here.save(JOB + OTHER)
    assert here.left("job") == WHOLE - 20 * MINUTE
    assert here.state("job") == "up"
    assert [event["type"] for event in here.events("job")] == ["down", "up"]
    assert len(here.heartbeats("job")) == 2


@pytest.mark.parametrize(("action", "pinged"), [("", "fail"), ("fail", ""), (None, "fail")])
def test_a_disabled_monitor_keeps_its_state_stores_pings_and_is_enabled_as_resumed(
    house, action, pinged
):
    here = house(JOB)
    if action is not None:
        here.ping("job", action)
    events, stored = here.events(), len(here.heartbeats("job"))
    here.save(JOB + "enabled = false\n")
    here.watch(3 * HOUR, step=MINUTE)
    for one in (pinged, "start"):
        here.ping("job", one)
    assert here.state("job") == "paused"
    assert (here.events(), len(here.heartbeats("job"))) == (events, stored + 2)
    here.save(JOB)
    assert here.state("job") == ("pending" if action is None else "up")
    if action is not None:
        assert here.left("job") == WHOLE
    here.watch(WHOLE - MINUTE, step=MINUTE)
    assert here.events() == events


@pytest.mark.parametrize(("interval", "grace", "ms"), [
    ("2h", "10m", 130 * MINUTE), ("30m", "10m", 40 * MINUTE), ("1h", "0s", HOUR),
])  # fmt: skip
def test_a_changed_rhythm_counts_from_the_last_received_ping(house, interval, grace, ms):
    here = house(JOB)
    here.ping("job")
    here.watch(5 * MINUTE, step=MINUTE)
    here.ping("job")  # throttled
    here.watch(5 * MINUTE, step=MINUTE)
    here.save(f'[monitors.job]\ninterval = "{interval}"\ngrace = "{grace}"\n')
    assert here.monitor("job")["deadline_at"] == START + 5 * MINUTE + ms


def test_a_changed_rhythm_keeps_what_gaps_have_given(house):
    here = house(JOB)
    here.ping("job")
    here.restart(3 * HOUR, text=JOB.replace("1h", "2h"))
    assert here.left("job") == 2 * HOUR + 10 * MINUTE


# A database of version 0.1 (its story stands in schema_1.sql and the comments below)

LEFT_AT = START + 526 * MINUTE  # when 0.1 was stopped
ON = """timezone = "UTC"
[channels]
phone = "{phone}"
mail = "{mail}"
"""
MIGRATED = {
    "up": 'interval = "1d"\ngrace = "30m"',
    "named": 'name = "With its own token"\ninterval = "1d"\ntoken = "token-of-the-file-1"',
    "nightly": 'schedule = "0 3 * * *"\ngrace = "30m"',
    "failed": 'interval = "1d"\nremind = "1d"\nnotify = ["phone", "mail"]',
    "missed": 'interval = "1h"\ngrace = "5m"\nnotify = ["phone"]',
    "overran": 'interval = "1d"\nmax_runtime = "30m"\nnotify = ["phone"]',
    "pending": 'interval = "1d"',
    "paused-for-2d": 'interval = "1h"',
    "paused": 'interval = "1h"\nnotify = ["phone"]',
    "disabled": 'interval = "1h"\nenabled = false',
    "running": 'interval = "1d"\nmax_runtime = "10h"',
    "endless": 'interval = "1d"',
    "switch": 'interval = "4h"\ngrace = 0\nnotify = ["phone"]',
    "behind-switch": 'interval = "10m"\ngrace = 0\ndepends_on = ["switch"]\nnotify = ["phone"]',
    "router": 'interval = "10m"\ngrace = 0\nnotify = ["phone"]',
    "behind-router": 'interval = "1d"\ndepends_on = ["router"]\nnotify = ["phone"]',
    "flapping": 'interval = "1h"\nnotify = ["phone"]',
}
REMOVED = '[monitors.removed]\ninterval = "1d"\ngrace = "2h"\nnotify = ["phone"]\n'
NUMBERS = {key: number for number, key in enumerate(
    [*list(MIGRATED)[:10], "removed", *list(MIGRATED)[10:]], 1)}  # fmt: skip


def migrated_toml(phone: str = "json://127.0.0.1:9/", mail: str = "json://127.0.0.1:9/") -> str:
    return ON.format(phone=phone, mail=mail) + "".join(
        f"[monitors.{key}]\n{settings}\n" for key, settings in MIGRATED.items()
    )


@pytest.fixture
def migrated(tmp_path) -> Iterator[Callable[..., House]]:
    """migrated(toml, after): Larm starts on the old database so many milliseconds later."""
    built: list[House] = []
    with contextlib.closing(sqlite3.connect(tmp_path / "larm.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(Path(__file__).with_name("schema_1.sql").read_text())

    def build(text: str, after: int = 30 * MINUTE) -> House:
        built.append(House(tmp_path, text, FakeClock(LEFT_AT + after)))
        return built[-1]

    yield build
    for one in built:
        one.larm.store.close()


def minutes(at: int | None) -> float | None:
    return None if at is None else (at - START) / MINUTE


def test_a_migrated_monitor_has_its_state_its_token_and_its_running_deadline(migrated):
    here = migrated(migrated_toml())
    found = {one["id"]: one for one in here.api("monitors")}
    states = {key: one["state"] for key, one in found.items()}
    assert states == {
        "up": "up", "named": "up", "nightly": "up", "failed": "down", "missed": "down",
        "overran": "down", "pending": "pending", "paused-for-2d": "paused", "paused": "paused",
        "disabled": "paused", "running": "up", "endless": "up", "switch": "up",
        "behind-switch": "down", "router": "down", "behind-router": "down", "flapping": "down",
    }  # fmt: skip
    tokens = {key: one["ping_url"].rpartition("/")[2] for key, one in found.items()}
    assert tokens == {key: f"{NUMBERS[key]:02}" * 16 for key in MIGRATED} | {
        "named": "token-of-the-file-1"
    }
    # each had that many minutes left at its start, by what Larm's absence then had given it
    deadlines = {key: minutes(one["deadline_at"]) for key, one in found.items()
                 if one["deadline_at"]}  # fmt: skip
    assert deadlines == {
        "up": 1590 + 30, "named": 1731 + 30, "nightly": 1290 + 30, "running": 1620 + 30,
        "endless": 1620 + 30, "switch": 720 + 30,
    }  # fmt: skip
    since = {key: minutes(one["since"]) for key, one in found.items() if one["state"] != "up"}
    assert since == {
        "failed": 25, "missed": 130, "overran": 60, "pending": 0, "paused-for-2d": 40,
        "paused": 40, "disabled": 111, "behind-switch": 520, "router": 35, "behind-router": 40,
        "flapping": 171,
    }  # fmt: skip
    assert minutes(found["named"]["last_heartbeat_at"]) == 111, "throttled, yet received"
    assert found["failed"]["last_duration_ms"] == 5 * MINUTE
    assert {key for key, one in found.items() if one["running"]} == {"overran", "running",
                                                                    "endless"}  # fmt: skip


def test_a_migrated_monitor_has_its_history(migrated):
    here = migrated(migrated_toml() + REMOVED)
    assert len(here.events()) == 21
    assert sum(len(here.heartbeats(key)) for key in NUMBERS) == 39
    [event] = here.events("failed")
    assert (event["type"], event["reason"], minutes(event["at"])) == ("down", "failed", 25)
    deliveries = {one["channel"]: (one["state"], one["attempts"]) for one in event["deliveries"]}
    assert deliveries == {"phone": ("sent", 1), "mail": ("pending", 6)}
    assert [one["body"] for one in here.heartbeats("failed")] == [
        None, "disk is full\nno space left on device\n", "still full"
    ]  # fmt: skip
    [start, end] = here.heartbeats("paused")
    assert (start["signal"], end["exit_status"], end["duration_ms"]) == ("start", 2, 10 * MINUTE)
    assert [(one["type"], one["down_ms"]) for one in here.events("removed")] == [
        ("down", None), ("up", 5 * MINUTE)
    ]  # fmt: skip
    assert (here.state("removed"), here.left("removed")) == ("up", (1595 - 111) * MINUTE)
    assert here.token("removed") == "11" * 16
    page = here.ask("/monitor/failed").body.decode()
    assert "still full" in page, "the newest failure is the one that is told"
    assert here.ask("/").status == 200


def test_a_migrated_run_has_its_limit_and_pauses_their_ends(migrated):
    here = migrated(migrated_toml())
    here.ping("endless", rid="B")
    assert here.monitor("endless")["last_duration_ms"] == here.clock.now() - START - 240 * MINUTE
    here.ping("running", rid="C")
    assert here.monitor("running")["running"], "A has not ended"
    here.live(800 * MINUTE, step=10 * MINUTE)
    assert here.changes("running")[0] == ("down", "overran", (840 + 30) * MINUTE)
    assert here.changes("overran") == [("down", "overran", 60 * MINUTE)], "once"
    assert here.state("paused-for-2d") == here.state("paused") == "paused"
    here.live(1_720 * MINUTE, step=10 * MINUTE)
    assert here.state("paused-for-2d") == "up"
    assert here.state("paused") == here.state("disabled") == "paused"
    here.live(2 * HOUR)
    [(_, reason, at)] = here.changes("paused-for-2d")
    assert reason == "missed"
    assert 0 <= at - (3_040 + 30 + 66) * MINUTE <= 10 * MINUTE  # a tick of this test
    here.resume("paused")
    assert here.left("paused") == 66 * MINUTE


def test_what_was_not_told_yet_is_told_after_the_migration_and_nothing_twice(migrated, webhooks):
    phone, mail = webhooks(), webhooks()
    here = migrated(migrated_toml(phone.url, mail.url))

    def told_by(channel: Webhook) -> str:
        return "\n".join(channel.titles() + channel.bodies())

    here.live(HOUR)
    assert "failed is down" in told_by(mail)
    assert "Larm itself was not running" in told_by(mail)
    told = told_by(phone)
    assert "behind-switch is down" in told, "the switch's verdict is waited for no longer"
    assert "behind-router" not in told, "the router is down"
    assert "behind-switch" not in told_by(mail), "its monitor does not notify that channel"
    for key in ("missed", "flapping", "router", "failed"):
        assert f"{key} is down" not in told, "that was told"
    assert "overran" not in told, "that was for a channel which is gone"
    [event] = here.events("overran")
    assert [(one["channel"], one["state"]) for one in event["deliveries"]] == [("old", "failed")]
    here.ping("router")
    here.live(10 * SECOND)
    assert "router is up again" in told_by(phone)
    here.live(70 * MINUTE)
    assert "behind-router is down" in told_by(phone)
    assert "STILL DOWN: failed" not in told_by(phone)
    here.live(17 * HOUR)
    assert told_by(phone).count("STILL DOWN: failed") == 1


def test_until_larm_has_migrated_it_the_verbs_say_in_one_line_what_to_do(migrated, tmp_path):
    del migrated  # but the database is there
    (tmp_path / "larm.toml").write_text(migrated_toml())
    for verb in (["status"], ["pause", "up"], ["resume", "paused"]):
        done = run_larm(tmp_path, *verb)
        [line] = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (1, "")
        assert "an older Larm wrote" in line
        assert "start Larm once" in line


def test_a_migration_that_is_cut_off_is_done_again_whole(migrated, tmp_path):
    """A disk that is full in its middle leaves the old database as it was."""
    before = (tmp_path / "larm.db").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before // 2, limit[1]))
    try:
        with pytest.raises(program.StoreError):
            migrated(migrated_toml())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with contextlib.closing(sqlite3.connect(tmp_path / "larm.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 1
        assert db.execute("SELECT COUNT(*) FROM runs").fetchone()[0] == 4
    assert len(migrated(migrated_toml()).events()) == 21
