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
from conftest import Process, Webhook, in_ms, launch, wait_until

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
STOPPED_FOR = 12  # seconds, at least; from 10 on Larm takes note


def token(key: str) -> str:
    return f"a-token-for-{key}-0001"


def job(key: str, interval: str, grace: int = 0) -> str:
    return (f'[monitors.{key}]\ninterval = "{interval}"\ngrace = {grace}\n'
            f'token = "{token(key)}"\n')  # fmt: skip


def monitor(larm: Process, key: str) -> dict[str, Any]:
    found: dict[str, Any] = in_ms(larm.get(f"/api/v1/monitors/{key}").json["data"])
    return found


def events(larm: Process) -> list[tuple[str, str, int]]:
    """(monitor, type, at), oldest first."""
    found = in_ms(larm.get("/api/v1/events").json["data"])
    return [(one["monitor"], one["type"], one["at"]) for one in found[::-1]]


def downs(larm: Process, key: str) -> list[int]:
    return [at for name, type, at in events(larm) if (name, type) == (key, "down")]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


# Stopped and killed


@dataclass
class Stopped:
    larm: Process
    before: dict[str, dict[str, Any]]  # the monitors
    since: int = field(default_factory=now_ms)


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
    deadline_at = monitor(larm, "short")["deadline_at"]
    larm.kill()
    killed_at = now_ms()
    time.sleep(2.1)  # more than the interval
    again = start(toml, port=larm.port)
    started_at = now_ms()  # at the latest
    assert events(again) == [] or events(again)[0][2] > started_at - SECOND
    [down] = wait_until(lambda: downs(again, "short"))
    away = down - deadline_at
    assert 2_100 - 1_100 < away <= started_at - killed_at + 100  # but for a tick, at most


# With its clock set


Set = Callable[[int], None]


@pytest.fixture
def faketime(tmp_path: Path) -> Iterator[tuple[Set, dict[str, str]]]:
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
    before = set(Path("/dev/shm").glob("*faketime_*"))
    yield set_to, {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",  # files keep their times when the clock is set
    }
    for left in set(Path("/dev/shm").glob("*faketime_*")) - before:  # by those that are killed
        left.unlink(missing_ok=True)


JOBS = job("job", "1h", grace=600) + job("paused", "1h") + job("down", "1h")
BY = [HOUR, -HOUR, 30 * DAY, -3 * DAY]


def channel(webhook: Webhook) -> str:
    return f'[channels]\nphone = "{webhook.url}"\n'


def test_a_clock_that_is_set_while_larm_runs_moves_every_deadline_and_alerts_nobody(
    start, faketime, webhook
):
    set_to, environ = faketime
    larm = start(channel(webhook) + JOBS, **environ)
    pinged_at = now_ms()
    for key in ("job", "paused"):
        larm.ping(token(key))
    larm.get("/api/v1/monitors/paused/pause", "POST", b'{"for": "2h"}')
    offset = 0
    for number, by in enumerate(BY, 1):
        offset += by
        set_to(offset)
        wait_until(lambda number=number: larm.log.count("the clock was set ") == number)
        way = "forward" if by > 0 else "back"
        assert f"the clock was set {way} by" in larm.log.splitlines()[-1]
        left = monitor(larm, "job")["deadline_at"] - offset - now_ms()
        assert abs(left - (70 * MINUTE - (now_ms() - pinged_at))) < 2 * SECOND
        assert monitor(larm, "paused")["state"] == "paused"
    assert larm.get("/health").status == 200
    assert events(larm) == []
    assert (webhook.alerts, webhook.refused) == ([], 0)
    larm.ping(token("down"), "/fail")
    [down] = downs(larm, "down")
    assert abs(down - offset - now_ms()) < MINUTE


def test_a_start_in_1970_alerts_nobody_until_the_clock_is_set_and_keeps_what_was_left(
    start, faketime, webhook
):
    """A Raspberry Pi without a clock, whose power was lost, before NTP answers."""
    set_to, environ = faketime
    toml = channel(webhook) + JOBS + job("short", "1s")
    larm = start(toml, **environ)
    larm.ping(token("job"))
    deadline_at, killed_at = monitor(larm, "job")["deadline_at"], now_ms()
    larm.kill()

    set_to(-now_ms())
    larm = start(toml, port=larm.port, **environ)
    assert "nobody is alerted until it is set" in larm.log
    assert "1970-01-01" in larm.log
    assert 69 * MINUTE <= monitor(larm, "job")["deadline_at"] <= 71 * MINUTE, "what it had left"
    for key in ("paused", "short"):
        larm.ping(token(key))
    larm.ping(token("down"), "/fail")
    assert downs(larm, "down")[0] < DAY
    time.sleep(4)  # the 3 s in which alerts are gathered, and a tick
    assert (webhook.alerts, webhook.refused) == ([], 0)
    assert downs(larm, "short") == []

    set_to(0)
    wait_until(lambda: "the clock was set forward" in larm.log)
    wait_until(lambda: webhook.alerts)
    assert "DOWN" in webhook.titles()[0]
    found = monitor(larm, "job")
    assert found["state"] == "up"
    assert -2 * SECOND < found["deadline_at"] - deadline_at < now_ms() - killed_at + SECOND
    for key in ("paused", "down"):
        found = in_ms(larm.get(f"/api/v1/monitors/{key}/heartbeats").json["data"])
        moments = [one["at"] for one in found] + [monitor(larm, key)["since"]]
        assert all(abs(at - now_ms()) < MINUTE for at in moments), key
    assert all(abs(at - now_ms()) < MINUTE for _, _, at in events(larm))
    assert downs(larm, "job") == downs(larm, "paused") == []
    larm.ping(token("job"))
    assert monitor(larm, "job")["state"] == "up"


# Stopped, and now let go on


def test_a_stopped_process_alerts_nobody_and_gives_the_time_back(stopped):
    """SIGSTOP, as a paused virtual machine or container does."""
    larm, before = stopped.larm, stopped.before
    time.sleep(max(0, stopped.since / SECOND + STOPPED_FOR - time.time()))
    stood = now_ms() - stopped.since
    larm.popen.send_signal(signal.SIGCONT)
    wait_until(lambda: "Larm did not watch for" in larm.log)
    moved = {key: lambda key=key: monitor(larm, key)["deadline_at"] for key in before}
    wait_until(lambda: moved["hour"]() != before["hour"]["deadline_at"])
    away = moved["hour"]() - before["hour"]["deadline_at"]
    assert abs(away - stood) < 3 * SECOND
    [down] = wait_until(lambda: downs(larm, "short"))  # no fresh interval, either
    assert abs(down - before["short"]["deadline_at"] - away) < SECOND
    assert "Larm itself was not running" in larm.get("/").body.decode()
