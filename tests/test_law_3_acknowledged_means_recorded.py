"""Law 3: every ping that was answered 200 and not throttled is in the database."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, Process, launch, wait_until

PINGERS = 32
UNKNOWN = "nobody-ever-made-this-token"


def tokens(count: int) -> list[str]:
    return [f"a-token-of-one-ping-{number:05}" for number in range(count)]


def monitors(count: int) -> str:
    return "".join(
        f'[monitors.m{number}]\ninterval = "1d"\ntoken = "{token}"\n'
        for number, token in enumerate(tokens(count))
    )


def up(larm: Process) -> set[str]:
    """The tokens of the monitors that are up: each was pinged once, and it is recorded."""
    found = larm.get("/api/v1/monitors").json["data"]
    return {one["ping_url"].rpartition("/")[2] for one in found if one["state"] == "up"}


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


@pytest.mark.parametrize("least", [1, 500])
def test_what_was_answered_before_a_kill_9_is_known_after_the_restart(start, least):
    everyone = tokens(2_000)
    larm = start(monitors(len(everyone)))
    pingers = Pingers(larm.port, everyone)
    after = least + random.randint(0, 500)
    wait_until(lambda: len(pingers.acknowledged) >= after)
    larm.kill()
    pingers.join()
    assert len(pingers.acknowledged) < len(everyone), f"not in their middle: {after}"
    again = start(monitors(len(everyone)), port=larm.port)
    assert set(pingers.acknowledged) - up(again) == set(), f"killed after {after}"


# Stopped


def test_a_stop_answers_what_was_accepted_and_refuses_what_comes_later(start):
    larm = start(monitors(8))
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda token=token: answers.append(larm.ping(token)))
               for token in (*tokens(8), UNKNOWN)]  # fmt: skip
    with contextlib.closing(
        sqlite3.connect(larm.folder / "larm.db", isolation_level=None)
    ) as other:
        other.execute("BEGIN EXCLUSIVE")  # so that they take a while
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        larm.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(larm.port), 3)
        other.execute("ROLLBACK")
    for thread in threads:
        thread.join()
    assert [answer.status for answer in answers] == [200] * len(threads)
    assert larm.popen.wait(10) == 0
    assert up(start(monitors(8), port=larm.port)) == set(tokens(8))


def refuses(port: int) -> bool:
    """Whether a new connection is refused, as `curl --retry-connrefused` waits for."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


# While nothing can be recorded


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own, that can be full."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"no disk to fill, since a tmpfs can't be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], timeout=30, check=True)


@dataclass
class FullDisk:
    """What was seen of a Larm whose disk was full for 2.5 s, and then was not."""

    acknowledged: list[str] = field(default_factory=list)  # before the first that was not
    while_full: list[tuple[Answer, Answer]] = field(default_factory=list)  # unknown, known
    health: list[Answer] = field(default_factory=list)  # full, not full
    log: str = ""
    pinged_after: str = ""
    up: set[str] = field(default_factory=set)  # then
    up_again: set[str] = field(default_factory=set)  # after a kill -9 and a restart


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> FullDisk:
    seen, unpinged = FullDisk(), iter(tokens(400))
    folder = tmp_path_factory.mktemp("full")
    with small_disk(folder / "disk", "2m") as disk:
        text = f'database = "{disk / "larm.db"}"\n{monitors(400)}'
        larm = launch(folder, text)

        def ping() -> tuple[str, Answer]:
            token = next(unpinged)
            return token, larm.get(f"/api/heartbeat/{token}", "POST", b"x" * 10_000)

        try:
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
            token, answer = ping()
            while answer.status == 200:
                seen.acknowledged.append(token)
                token, answer = ping()
            end = time.monotonic() + 2.5  # Larm tries every second whether there is room
            while time.monotonic() < end:
                seen.while_full.append((larm.ping(UNKNOWN), ping()[1]))
                time.sleep(0.05)
            seen.health.append(larm.get("/health"))
            filler.unlink()
            seen.pinged_after, _ = wait_until(
                lambda: (found := ping())[1].status == 200 and found, seconds=5
            )
            wait_until(lambda: larm.get("/health").status == 200, seconds=5)
            seen.health.append(larm.get("/health"))
            seen.up, seen.log = up(larm), larm.log
            larm.kill()
            larm = launch(folder, text, larm.port)
            seen.up_again = up(larm)
        finally:
            larm.kill()
    return seen


def test_a_full_disk_is_503_with_retry_after_for_every_token(full_disk):
    for answer in (answer for pair in full_disk.while_full for answer in pair):
        assert answer.status == 503
        assert answer.headers["Retry-After"].isdigit()
    [(unknown, known)] = full_disk.while_full[-1:]
    for answer in (unknown, known):
        answer.headers.pop("Date")
    assert unknown == known


def test_a_full_disk_is_one_line_in_the_log_and_so_is_its_end(full_disk):
    assert "Traceback" not in full_disk.log
    assert full_disk.log.count("disk is full") == 1
    assert full_disk.log.count("can be written again") == 1


def test_health_says_that_the_disk_is_full_and_when_it_is_not(full_disk):
    full, mended = full_disk.health
    assert (full.status, "full" in full.json["reason"]) == (503, True)
    assert mended.status == 200


def test_what_was_answered_200_before_and_after_the_disk_was_full_is_recorded(full_disk):
    acknowledged = {*full_disk.acknowledged, full_disk.pinged_after}
    assert acknowledged <= full_disk.up
    assert acknowledged <= full_disk.up_again


def test_a_body_that_finds_no_room_in_the_temporary_folder_is_answered(start, tmp_path):
    """Waitress keeps bodies of more than 512 kB there; a cut connection would tell nobody why."""
    with small_disk(tmp_path / "temporary", "256k") as temporary:
        larm = start(monitors(40), TMPDIR=str(temporary))
        unpinged = iter(tokens(40))
        for size in (1_000, 600_000, 5_000_000, 600_000, 9_000_000, 1_000):
            token = next(unpinged)
            known = larm.get(f"/api/heartbeat/{token}", "POST", b"x" * size)
            unknown = larm.get(f"/api/heartbeat/{UNKNOWN}", "POST", b"x" * size)
            for answer in (known, unknown):
                answer.headers.pop("Date")
            assert known == unknown
            assert known.status in ((200,) if size == 1_000 else (200, 503))
            assert (token in up(larm)) is (known.status == 200)
        assert "Traceback" not in larm.log
        assert larm.log.count("temporary") <= 1


def damage(database: Path) -> None:
    """Overwrite the pages where the heartbeats' table and its indexes begin, and let who has the
    database open know that something in it has changed.
    """
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        tables = db.execute("SELECT rootpage FROM sqlite_master WHERE tbl_name = 'heartbeats'")
        pages = [row[0] for row in tables]
        [size] = db.execute("PRAGMA page_size").fetchone()
        [version] = db.execute("PRAGMA user_version").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with database.open("r+b") as file:
            for page in pages:
                file.seek((page - 1) * size)
                file.write(b"\xa5" * size)
        db.execute(f"PRAGMA user_version = {version}")


def test_a_damaged_database_is_503_for_every_token_and_for_health(start):
    larm = start(monitors(4))
    assert larm.ping(tokens(1)[0]).status == 200
    damage(larm.folder / "larm.db")
    wait_until(lambda: larm.get("/health").status == 503)
    for token in (tokens(1)[0], UNKNOWN, tokens(2)[1], "", UNKNOWN, tokens(3)[2]):
        answer = larm.ping(token)
        assert (answer.status, answer.headers.get("Retry-After", "").isdigit()) == (503, True)
    assert "Traceback" not in larm.log
    assert len(larm.log.splitlines()) < 8


# What is kept of a ping


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """kept(rest, ...): what is stored of a ping to that place behind a token; None: nothing."""
    larm, unpinged = launch(tmp_path_factory.mktemp("larm"), monitors(100)), iter(tokens(100))

    def ping(rest: str = "", *arguments: object, **keywords: object) -> dict[str, Any] | None:
        token = next(unpinged)
        assert larm.get(f"/api/heartbeat/{token}{rest}", *arguments, **keywords).status == 200
        found = larm.get(f"/api/v1/monitors/m{int(token[-5:])}/heartbeats").json["data"]
        return found[0] if found else None

    yield ping
    larm.kill()


LARGE = os.urandom(6_000).hex().encode()


@pytest.mark.parametrize(("body", "text"), [
    (None, None),
    (LARGE[:10_000], LARGE[:10_000].decode()),
    (LARGE, LARGE[-10_000:].decode()),
    (b"x" * 9_999_000 + b"the end", "x" * 9_993 + "the end"),
    ("Åtta öre → 8 ✓\n\0\r\n".encode(), "Åtta öre → 8 ✓\n\0\r\n"),
    (b"\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
    (b"\r\n\r\n", "\r\n\r\n"),
    (b"a\xff\xfeb\xc3", "a\ufffd\ufffdb\ufffd"),
    ("å".encode() * 5_000 + b"x", "\ufffd" + "å" * 4_999 + "x"),
], ids=["none", "10,000 bytes", "more", "10 MB", "text", "colours", "line ends", "undecodable",
        "a letter that is cut in two"])  # fmt: skip
def test_the_last_10_000_bytes_of_a_body_are_kept(kept, body, text):
    for action in ("", "/fail"):
        assert kept(action, "POST" if body else "GET", body)["body"] == text


@pytest.mark.parametrize(("query", "rid"), [
    ("?rid=r", "r"), ("?rid=550e8400-e29b-41d4-a716-446655440000",
                      "550e8400-e29b-41d4-a716-446655440000"),
    ("?rid=" + "x" * 64, "x" * 64), ("?rid=a%20b%2F%C3%A5", "a b/å"), ("?x=1&rid=r&y", "r"),
    ("?rid=%1b%5b2J%00%0a%ff", "\x1b[2J\x00\n\ufffd"),
    ("", None), ("?rid=", None), ("?RID=a", None), ("?rid=" + "x" * 65, None),
    ("?rid=" + "x" * 9_000, None),
], ids=lambda value: str(value)[:15])  # fmt: skip
def test_a_rid_of_1_to_64_characters_is_kept(kept, query, rid):
    assert kept(f"/start{query}")["rid"] == rid


def test_who_sent_it_and_how_is_kept(kept):
    before = time.time()
    found = kept("", "PROPFIND", headers={"User-Agent": "backup.sh/1"})
    assert (found["method"], found["user_agent"], found["from"]) == (
        "PROPFIND", "backup.sh/1", "127.0.0.1"
    )  # fmt: skip
    at = time.mktime(time.strptime(found["at"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
    assert before - 2 < at < before + 2


def test_a_user_agent_of_any_length_is_cut(kept):
    assert len(kept("", headers={"User-Agent": "u" * 20_000})["user_agent"]) <= 1_000


@pytest.mark.parametrize(("action", "signal", "exit_status"), [
    ("", "success", None), ("/0", "success", 0), ("/start", "start", None), ("/log", "log", None),
    ("/fail", "fail", None), ("/1", "fail", 1), ("/255", "fail", 255),
])  # fmt: skip
def test_the_signal_and_the_exit_status_are_kept(kept, action, signal, exit_status):
    found = kept(action)
    assert (found["signal"], found["exit_status"]) == (signal, exit_status)
