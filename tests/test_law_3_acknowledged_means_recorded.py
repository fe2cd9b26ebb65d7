"""Law 3: every ping that was answered 200 and not throttled is in the database."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    TOKEN,
    Answer,
    Process,
    launch,
    run_larm,
    wait_until,
)

PINGERS = 32
JOB = f'[monitors.job]\ninterval = "1d"\ntoken = "{TOKEN}"\n'


def tokens(count: int) -> list[str]:
    return [f"a-token-of-one-ping-{number:05}" for number in range(count)]


def monitors(count: int) -> str:
    return "".join(
        f'[monitors.m{number}]\ninterval = "1d"\ntoken = "{token}"\n'
        for number, token in enumerate(tokens(count))
    )


# Killed at any moment


class Pingers:
    """Threads that ping each token once, as fast as they are answered."""

    def __init__(self, port: int, tokens: list[str]) -> None:
        self.acknowledged: list[str] = []
        self.threads = [
            threading.Thread(target=self._ping, args=(port, tokens[number::PINGERS]))
            for number in range(PINGERS)
        ]
        for thread in self.threads:
            thread.start()

    def _ping(self, port: int, tokens: list[str]) -> None:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(client), contextlib.suppress(OSError, http.client.HTTPException):
            for token in tokens:
                client.request("GET", f"/api/heartbeat/{token}")
                answer = client.getresponse()
                if answer.status == 200:
                    self.acknowledged.append(token)
                answer.read()

    def join(self) -> None:
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize("least", [0, 0.1, 0.2, 0.3])
def test_what_was_answered_before_a_kill_9_is_in_the_database(start, least):
    everyone = tokens(4_000)
    larm = start(monitors(len(everyone)))
    pingers = Pingers(larm.port, everyone)
    wait_until(lambda: pingers.acknowledged)
    after = least + random.uniform(0, 0.1)
    time.sleep(after)
    larm.popen.send_signal(signal.SIGKILL)
    larm.popen.wait()
    pingers.join()
    rows = larm.rows("SELECT key FROM heartbeats h JOIN monitors m ON m.id = monitor_id")
    recorded = [everyone[int(row["key"][1:])] for row in rows]
    assert 0 < len(pingers.acknowledged) < len(everyone), f"not in their middle: {after} s"
    assert set(pingers.acknowledged) - set(recorded) == set(), f"killed after {after} s"
    assert len(recorded) == len(set(recorded))


def test_what_was_answered_before_a_kill_9_is_known_after_a_restart(start):
    larm = start(JOB)
    larm.ping()
    larm.popen.kill()
    larm.popen.wait()
    again = start(JOB, port=larm.port)
    [row] = again.rows("SELECT state, received_at FROM monitors")
    assert row["state"] == "up"
    assert row["received_at"] is not None


# While nothing can be recorded


class Disk:
    """A disk of its own, that can be full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.filler = folder / "filler"

    def fill(self) -> None:
        with contextlib.suppress(OSError), self.filler.open("ab", buffering=0) as filler:
            while filler.write(b"x" * 4096):
                pass

    def empty(self) -> None:
        self.filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no disk to fill, since a tmpfs can't be mounted: {done.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def on(disk: Disk, count: int) -> str:
    return f'database = "{disk.folder / "larm.db"}"\n{monitors(count)}'


def ping_until_full(larm: Process, unpinged: Iterator[str]) -> list[str]:
    """The tokens that were acknowledged before the first that was not."""
    acknowledged = []
    for token in unpinged:
        answer = larm.get(f"/api/heartbeat/{token}", "POST", b"x" * 10_000)
        if answer.status != 200:
            assert answer.status == 503
            return acknowledged
        acknowledged.append(token)
    raise AssertionError("the disk did not become full")


def refused(answer: Answer) -> bool:
    return answer.status == 503 and answer.headers.get("Retry-After", "").isdigit()


def test_a_full_disk_is_503_with_retry_after_for_every_token(start, disk):
    larm = start(on(disk, 400))
    disk.fill()
    unpinged = iter(tokens(400))
    ping_until_full(larm, unpinged)
    known, unknown = larm.ping(next(unpinged)), larm.ping("nobody-ever-made-this-token")
    assert refused(known)
    assert (known.status, known.body) == (unknown.status, unknown.body)
    assert known.headers.keys() == unknown.headers.keys()
    assert known.headers["Retry-After"] == unknown.headers["Retry-After"]


def test_a_disk_that_stays_full_is_503_for_every_token_and_one_line_in_the_log(start, disk):
    larm = start(on(disk, 400))
    disk.fill()
    unpinged = iter(tokens(400))
    ping_until_full(larm, unpinged)
    end = time.monotonic() + 3.5  # Larm tries every second whether there is room
    answers = set()
    while time.monotonic() < end:
        unknown = larm.ping("nobody-ever-made-this-token")
        known = larm.get(f"/api/heartbeat/{next(unpinged)}", "POST", b"x" * 10_000)
        answers.add((unknown.status, known.status))
        time.sleep(0.05)
    assert "Traceback" not in larm.log
    full = [line for line in larm.log.splitlines() if "disk is full" in line]
    assert (answers, len(full)) == ({(503, 503)}, 1)


def test_what_was_answered_200_on_a_disk_that_became_full_is_recorded(start, disk):
    larm = start(on(disk, 400))
    disk.fill()
    acknowledged = ping_until_full(larm, iter(tokens(400)))
    larm.popen.kill()
    larm.popen.wait()
    disk.empty()
    again = start(on(disk, 400), port=larm.port)
    states = {one["id"]: one["state"] for one in status(again)}
    assert [states[f"m{number}"] for number in range(len(acknowledged))] == (
        ["up"] * len(acknowledged)
    )


def status(larm: Process) -> list[dict[str, str]]:
    """What `larm.py status` says of each monitor: it knows where the database is."""
    return json.loads(run_larm(larm.folder, "status", "--json").stdout)["data"]


def test_with_room_on_the_disk_pings_are_recorded_again(start, disk):
    larm = start(on(disk, 400))
    disk.fill()
    unpinged = iter(tokens(400))
    ping_until_full(larm, unpinged)
    disk.empty()
    known = next(unpinged)
    wait_until(lambda: larm.ping(known).status == 200, seconds=5)
    assert larm.ping("nobody-ever-made-this-token").status == 200
    assert next(one for one in status(larm) if known in one["ping_url"])["state"] == "up"


def test_health_says_that_the_disk_is_full_and_when_it_is_not(start, disk):
    larm = start(on(disk, 400))
    disk.fill()
    ping_until_full(larm, iter(tokens(400)))
    health = larm.get("/health")
    assert (health.status, "full" in health.json["reason"]) == (503, True)
    disk.empty()
    wait_until(lambda: larm.get("/health").status == 200, seconds=5)


def damage(database: Path) -> None:
    """Overwrite the pages where the heartbeats' table and index begin."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        tables = db.execute("SELECT rootpage FROM sqlite_master WHERE tbl_name = 'heartbeats'")
        pages = [row[0] for row in tables]
        [size] = db.execute("PRAGMA page_size").fetchone()
    with database.open("r+b") as file:
        for page in pages:
            file.seek((page - 1) * size)
            file.write(b"\xa5" * size)


def test_a_damaged_database_is_503_for_every_token_and_for_health(start):
    larm = start(JOB)
    larm.stop()
    damage(larm.folder / "larm.db")
    again = start(JOB, port=larm.port)
    assert refused(again.ping())
    assert refused(again.ping("nobody-ever-made-this-token"))
    assert again.get("/health").status == 503
    assert "Traceback" not in again.log


# What is kept of a ping


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Iterator[str]]]:
    """A running Larm, and tokens of it that nobody has pinged."""
    larm = launch(tmp_path_factory.mktemp("larm"), monitors(100))
    yield larm, iter(tokens(100))
    larm.kill()


@pytest.fixture
def kept(shared) -> Callable[..., dict[str, object] | None]:
    """kept(rest, ...): what is stored of a ping to that place behind a token."""
    larm, unpinged = shared

    def ping(rest: str = "", *arguments: object, **keywords: object) -> dict[str, object] | None:
        token = next(unpinged)
        assert larm.get(f"/api/heartbeat/{token}{rest}", *arguments, **keywords).status == 200
        rows = larm.rows(
            "SELECT h.* FROM heartbeats h JOIN monitors m ON m.id = monitor_id WHERE key = ?",
            f"m{int(token[-5:])}",
        )
        return rows[0] if rows else None

    return ping


def test_the_last_10_000_bytes_of_a_body_are_kept(kept):
    body = os.urandom(6_000).hex().encode()
    assert kept("", "POST", body)["body"] == body[-10_000:].decode()


def test_a_body_of_10_000_bytes_is_kept_whole(kept):
    body = os.urandom(5_000).hex().encode()
    assert kept("", "POST", body)["body"] == body.decode()


def test_the_end_of_a_large_body_is_kept(kept):
    assert kept("", "POST", b"x" * 5_000_000 + b"the end")["body"] == "x" * 9_993 + "the end"


def test_text_is_kept_as_it_is(kept):
    assert kept("", "POST", "Åtta öre → 8 ✓\n\0\r\n".encode())["body"] == "Åtta öre → 8 ✓\n\0\r\n"


def test_undecodable_bytes_are_replaced(kept):
    assert kept("", "POST", b"a\xff\xfeb\xc3")["body"] == "a\ufffd\ufffdb\ufffd"


def test_a_letter_that_is_cut_in_two_is_replaced(kept):
    assert kept("", "POST", "å".encode() * 5_000 + b"x")["body"] == "\ufffd" + "å" * 4_999 + "x"


def test_no_body_is_none(kept):
    assert kept()["body"] is None


def test_the_method_and_the_user_agent_are_kept(kept):
    row = kept("", "PROPFIND", headers={"User-Agent": "backup.sh/1"})
    assert (row["method"], row["user_agent"]) == ("PROPFIND", "backup.sh/1")


def test_who_sent_it_is_kept(kept):
    assert kept()["sender"] == "127.0.0.1"


@pytest.mark.parametrize("rid", ["r", "550e8400-e29b-41d4-a716-446655440000", "x" * 64])
def test_the_rid_is_kept(kept, rid):
    assert kept(f"/start?rid={rid}")["rid"] == rid


@pytest.mark.parametrize(("query", "rid"), [("rid=a%20b%2F%C3%A5", "a b/å"), ("x=1&rid=r&y", "r")])
def test_the_rid_is_decoded(kept, query, rid):
    assert kept(f"?{query}")["rid"] == rid


@pytest.mark.parametrize("query", ["", "?rid=", "?rid=" + "x" * 65])
def test_a_rid_that_is_none_is_not_kept(kept, query):
    assert kept(query)["rid"] is None


@pytest.mark.parametrize(
    ("action", "signal", "exit_status"),
    [("", "success", None), ("/0", "success", 0), ("/start", "start", None), ("/log", "log", None),
     ("/fail", "fail", None), ("/1", "fail", 1), ("/255", "fail", 255)],
)  # fmt: skip
def test_the_signal_and_the_exit_status_are_kept(kept, action, signal, exit_status):
    row = kept(action)
    assert (row["signal"], row["exit_status"]) == (signal, exit_status)


@pytest.mark.parametrize("action", ["/256", "/-1", "/00", "/success", "/start/", "//", "/0/1"])
def test_what_means_nothing_is_not_stored(kept, action):
    assert kept(action) is None
