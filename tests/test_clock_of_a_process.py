"""Law 5 with a real process: stopped, killed, and with its clock set by libfaketime.

libfaketime moves the wall clock of one process while its monotonic clock goes on, as when somebody
or NTP sets the time. A suspended machine can't be shown this way, since there the monotonic clock
stands still while the process does: FakeClock.set_wall is the same to Larm, and covers it in
test_law_5_gaps.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Process, Webhook, launch, wait_until

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
STOPPED_FOR = 12  # seconds, at least; from 10 on Larm takes note


def token(key: str) -> str:
    return f"a-token-for-{key}-0001"


def job(key: str, interval: str, grace: int = 0) -> str:
    return (f'[monitors.{key}]\ninterval = "{interval}"\ngrace = {grace}\n'
            f'token = "{token(key)}"\n')  # fmt: skip


def monitor(larm: Process, key: str) -> dict[str, Any]:
    [row] = larm.rows("SELECT * FROM monitors WHERE key = ?", key)
    return row


def gaps(larm: Process) -> list[dict[str, Any]]:
    return larm.rows("SELECT * FROM gaps WHERE monitor_id IS NULL ORDER BY id")


def downs(larm: Process, key: str) -> list[int]:
    rows = larm.rows("SELECT e.at FROM events e JOIN monitors m ON m.id = monitor_id"
                     " WHERE key = ? AND type = 'down'", key)  # fmt: skip
    return [row["at"] for row in rows]


# Stopped and killed


@dataclass
class Stopped:
    larm: Process
    before: dict[str, dict[str, Any]]  # the monitors' rows
    since: float = field(default_factory=time.monotonic)


@pytest.fixture(scope="module", autouse=True)
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stopped]:
    """A Larm that gets SIGSTOP at the beginning: the other tests run while it must stand still."""
    larm = launch(tmp_path_factory.mktemp("stopped"), job("short", "4s") + job("hour", "1h"))
    try:
        for key in ("short", "hour"):
            assert larm.ping(token(key)).status == 200
        before = {key: monitor(larm, key) for key in ("short", "hour")}
        larm.popen.send_signal(signal.SIGSTOP)
        yield Stopped(larm, before)
    finally:
        larm.kill()


def test_a_killed_process_alerts_nobody_and_gives_the_time_back(start):
    toml = job("short", "2s")
    larm = start(toml)
    larm.ping(token("short"))
    before = monitor(larm, "short")
    larm.stop(signal.SIGKILL)
    time.sleep(2.1)  # more than the interval
    again = start(toml, port=larm.port)
    [gap] = gaps(again)
    [down] = wait_until(lambda: downs(again, "short"))
    away = gap["to_at"] - max(gap["from_at"], before["counts_from"])
    assert down == before["deadline_at"] + away
    assert away >= 1_000  # but for a tick, at most


# With its clock set


Set = Callable[[int], None]


@pytest.fixture
def faketime(tmp_path: Path) -> tuple[Set, dict[str, str]]:
    """(set the clock of the process to so many milliseconds from the real one, its environment)."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("libfaketime is missing: apt-get install faketime")
    offset = tmp_path / "offset"

    def set_to(ms: int) -> None:
        new = tmp_path / "offset.new"
        new.write_text(f"{ms / SECOND:+.3f}")
        new.rename(offset)

    set_to(0)
    return set_to, {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",  # files keep their times when the clock is set
    }


@pytest.fixture
def set_to(faketime: tuple[Set, dict[str, str]]) -> Set:
    return faketime[0]


@pytest.fixture
def start_faked(start: Any, faketime: tuple[Set, dict[str, str]]) -> Iterator[Any]:
    """As start(), under libfaketime."""
    return lambda toml, port=0: start(toml, port=port, **faketime[1])


def now_ms() -> int:
    return time.time_ns() // 1_000_000


JOBS = job("job", "1h", grace=600) + job("paused", "1h") + job("down", "1h")
BY = [HOUR, -HOUR, 30 * DAY, -3 * DAY]


def channel(webhook: Webhook) -> str:
    return f'[channels]\nphone = "{webhook.url}"\n'


def test_a_clock_that_is_set_while_larm_runs_moves_every_deadline_and_alerts_nobody(
    start_faked, set_to, webhook
):
    larm = start_faked(channel(webhook) + JOBS)
    for key in ("job", "paused"):
        larm.ping(token(key))
    larm.get("/api/v1/monitors/paused/pause", "POST", b'{"for": "2h"}')
    deadline_at = monitor(larm, "job")["deadline_at"]
    resumes_at = monitor(larm, "paused")["resumes_at"]
    offset = 0
    for number, by in enumerate(BY, 1):
        offset += by
        set_to(offset)
        wait_until(lambda number=number: len(gaps(larm)) == number)
        gap = gaps(larm)[-1]
        set_by = gap["to_at"] - gap["from_at"]
        assert abs(set_by - by) < 3 * SECOND
        deadline_at, resumes_at = deadline_at + set_by, resumes_at + set_by
        assert monitor(larm, "job")["deadline_at"] == deadline_at
        assert monitor(larm, "paused")["resumes_at"] == resumes_at
        way = "forward" if by > 0 else "back"
        wait_until(lambda number=number: larm.log.count("the clock was set ") == number)
        assert f"the clock was set {way} by" in larm.log.splitlines()[-1]
        assert abs(deadline_at - offset - now_ms() - 70 * MINUTE) < MINUTE  # what it had left
    assert larm.get("/health").status == 200
    assert larm.rows("SELECT * FROM events") == []
    assert (webhook.alerts, webhook.refused) == ([], 0)
    larm.ping(token("down"), "/fail")
    [down] = downs(larm, "down")
    assert abs(down - offset - now_ms()) < MINUTE


def test_a_start_in_1970_alerts_nobody_until_the_clock_is_set(start_faked, set_to, webhook):
    """A Raspberry Pi without a clock, before NTP answers."""
    set_to(-now_ms())
    larm = start_faked(channel(webhook) + JOBS + job("short", "1s"))
    assert "nobody is alerted until it is set" in larm.log
    assert "1970-01-01" in larm.log
    for key in ("job", "short"):
        larm.ping(token(key))
    larm.ping(token("down"), "/fail")
    [failed] = larm.rows("SELECT * FROM heartbeats WHERE signal = 'fail'")
    assert failed["at"] < DAY
    time.sleep(4)  # the 3 s in which alerts are gathered, and a tick
    assert (webhook.alerts, webhook.refused) == ([], 0)
    assert downs(larm, "short") == []

    set_to(0)
    wait_until(lambda: "the clock was set forward" in larm.log)
    wait_until(lambda: webhook.alerts)
    assert "DOWN" in webhook.titles()[0]
    row = monitor(larm, "job")
    assert row["state"] == "up"
    assert row["deadline_at"] == row["counts_from"] + 70 * MINUTE
    for table, column in (("heartbeats", "at"), ("events", "at"), ("monitors", "created_at"),
                          ("monitors", "since"), ("monitors", "counts_from")):
        for found in larm.rows(f"SELECT {column} AS at FROM {table} WHERE {column} NOT NULL"):
            assert abs(found["at"] - now_ms()) < MINUTE, (table, column)
    assert downs(larm, "job") == []
    assert gaps(larm) == []


def test_a_restart_in_1970_keeps_what_was_left_until_the_clock_is_set(start_faked, set_to, webhook):
    """The same machine, with a database from before its power was lost."""
    toml = channel(webhook) + JOBS
    larm = start_faked(toml)
    larm.ping(token("job"))
    before = monitor(larm, "job")
    larm.stop(signal.SIGKILL)
    set_to(-now_ms())
    again = start_faked(toml, port=larm.port)
    assert "nobody is alerted until it is set" in again.log
    assert 0 <= monitor(again, "job")["deadline_at"] <= 71 * MINUTE
    set_to(0)
    wait_until(lambda: "the clock was set forward" in again.log)
    wait_until(lambda: monitor(again, "job")["deadline_at"] > DAY)
    assert abs(monitor(again, "job")["deadline_at"] - before["deadline_at"]) < MINUTE
    again.ping(token("job"))
    assert monitor(again, "job")["state"] == "up"
    assert again.rows("SELECT * FROM events") == []
    assert again.rows("SELECT * FROM heartbeats WHERE at < ?", DAY) == []


# Stopped, and now let go on


def test_a_stopped_process_alerts_nobody_and_gives_the_time_back(stopped):
    """SIGSTOP, as a paused virtual machine or container does."""
    larm, before = stopped.larm, stopped.before
    time.sleep(max(0, stopped.since + STOPPED_FOR - time.monotonic()))
    stood = (time.monotonic() - stopped.since) * SECOND
    larm.popen.send_signal(signal.SIGCONT)

    wait_until(lambda: "Larm was stopped for" in larm.log)
    [gap] = wait_until(lambda: gaps(larm))
    away = {key: gap["to_at"] - max(gap["from_at"], row["counts_from"])
            for key, row in before.items()}  # fmt: skip
    assert abs(away["hour"] - stood) < 3 * SECOND
    assert monitor(larm, "hour")["deadline_at"] == before["hour"]["deadline_at"] + away["hour"]
    [down] = wait_until(lambda: downs(larm, "short"))  # no fresh interval, either
    assert down == before["short"]["deadline_at"] + away["short"]
    assert "Larm itself was not running" in larm.get("/").body.decode()
