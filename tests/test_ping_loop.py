"""The ping loop: whoever is slow, many, odd or in the way, a good ping is answered soon, and none
is cut without an answer. What HTTP allows besides is in test_law_1_one_answer.py.

The loop stands on insides of Waitress, of 2.1.2 (Debian 12's) to its newest release. To run these
tests with an old one:

    python3 -m venv old
    old/bin/pip install waitress==2.1.2 bottle apprise cronsim pytest
    old/bin/python -m pytest tests/test_ping_loop.py
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import selectors
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Process, launch, wait_until

UNKNOWN = "no-such-token"
OK, CLOSE = b'{"status": "ok"}', b"Connection: close\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: larm\r\n%s\r\n"
FILES = 6_000  # that the tests themselves open
RUN = "import resource, larm\n{}\nraise SystemExit(larm.main(['serve']))"


def monitors(count: int) -> str:
    return "".join(
        f'[monitors.m{number:04}]\ninterval = "1d"\ntoken = "token-of-one-ping-{number:04}"\n'
        for number in range(count)
    )


def few_files(soft: int, hard: int) -> str:
    return RUN.format(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))")


@dataclass
class Server(Process):
    """A larm.py with monitors that are pinged once each, so that nothing is throttled."""

    numbers: Iterator[int] = field(default_factory=itertools.count)

    def fresh(self) -> str:
        return f"token-of-one-ping-{next(self.numbers):04}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=15)

    def send(self, request: bytes, delay: float = 0) -> bytes:
        """All that comes back until the server closes the connection. The request comes so many
        seconds after it was opened.
        """
        with self.connect() as connection:
            time.sleep(delay)
            connection.sendall(request)
            return connection.makefile("rb").read()

    def time_of_a_ping(self) -> float:
        """Seconds that a good ping takes, on a connection of its own."""
        started = time.monotonic()
        assert self.send(ping(self.fresh())).endswith(OK)
        return time.monotonic() - started

    def up(self) -> int:
        """How many monitors were pinged, and it was stored."""
        return int(self.get("/api/v1/summary").json["data"]["up"])

    def refuses(self) -> bool:
        with contextlib.suppress(OSError), self.connect():
            return False
        return True


def ping(token: str, headers: bytes = CLOSE, method: bytes = b"GET", version: bytes = b"1.1",
         body: bytes = b"") -> bytes:
    return b"%s /api/heartbeat/%s HTTP/%s\r\nHost: larm\r\n%s\r\n%s" % (
        method, token.encode(), version, headers, body
    )  # fmt: skip


def promised(seconds: float) -> float:
    """A promise of the README, on a machine that has nothing else to do; else four times as long.
    """
    return seconds * (1 if os.getloadavg()[0] <= (os.cpu_count() or 1) else 4)


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limits[1] < FILES:
        pytest.skip(f"needs {FILES} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """serve(count=300, code=""): a Larm that runs, with so many monitors."""
    started: list[Server] = []

    def run(count: int = 300, **keywords: Any) -> Server:
        started.append(Server(**vars(launch(tmp_path, monitors(count), **keywords))))
        return started[-1]

    yield run
    for one in started:
        one.kill()


@pytest.fixture(scope="module")
def larm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all the tests that leave it as it was."""
    server = Server(**vars(launch(tmp_path_factory.mktemp("larm"), monitors(100))))
    yield server
    server.kill()


class Crowd:
    """Many connections at once, by one thread; each asks once, and is closed when it is answered.
    """

    def __init__(self, port: int, requests: list[bytes]) -> None:
        self.began = time.monotonic()
        self.replies: list[bytes] = []
        self.errors: list[object] = []
        self._selector = selectors.DefaultSelector()
        for number, request in enumerate(requests):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", port))
            self._selector.register(connection, selectors.EVENT_WRITE, request)
            if number % 50 == 0:
                self.turn(0)

    def turn(self, timeout: float) -> None:
        """Send and read what can be sent and read within so many seconds."""
        for key, event in self._selector.select(timeout):
            connection: Any = key.fileobj
            try:
                if event & selectors.EVENT_WRITE:
                    connection.sendall(key.data)
                    self._selector.modify(connection, selectors.EVENT_READ)
                    continue
                reply = connection.recv(65_536)
                self.replies.append(reply)
                if not reply:
                    self.errors.append("cut")
            except OSError as error:
                self.errors.append(error)
            self._selector.unregister(connection)
            connection.close()

    def finish(self, within: float) -> float:
        """Wait until all are answered, at most so many seconds; how many it took from the start."""
        end = time.monotonic() + within
        while self._selector.get_map() and time.monotonic() < end:
            self.turn(0.05)
        return time.monotonic() - self.began


# What HTTP allows


def test_the_connection_is_kept_as_http_says_and_head_has_no_body(larm):
    with larm.connect() as connection:
        for _ in range(3):
            connection.sendall(ping(larm.fresh(), b""))
            reply = connection.recv(65_536)
            assert b"\r\nConnection:" not in reply
            assert reply.endswith(OK)
    closed = larm.send(ping(larm.fresh(), b"", version=b"1.0"))
    assert b"\r\nConnection: close\r\n" in closed
    assert closed.endswith(OK)
    kept = larm.send(ping(larm.fresh(), b"Connection: keep-alive\r\n", version=b"1.0")
                     + ping(larm.fresh(), b"", version=b"1.0"))
    assert kept.count(OK) == 2
    head = larm.send(ping(larm.fresh(), method=b"HEAD"))
    assert b"\r\nContent-Length: 16\r\n" in head
    assert head.endswith(b"\r\n\r\n")


def test_pipelined_pings_and_pages_are_answered_in_their_order(larm):
    before = larm.up()
    replies = larm.send(
        ping(larm.fresh(), b"") + HEALTH % b"" + ping(UNKNOWN, b"") * 20 + HEALTH % b""
        + b"".join(ping(larm.fresh(), b"") for _ in range(20)) + ping(larm.fresh())
    )  # fmt: skip
    heads = replies.split(b"HTTP/1.1 ")[1:]
    assert [head[:8] for head in heads] == [b"200 OK\r\n"] * 44
    assert [n for n, head in enumerate(heads) if b"Ping-Body-Limit" not in head] == [1, 22]
    assert larm.up() - before == 22


def test_a_ping_in_any_pieces_is_answered_once(larm):
    before = larm.up()
    with larm.connect() as connection:
        for byte in ping(larm.fresh()):
            connection.sendall(bytes([byte]))
        assert connection.makefile("rb").read().count(OK) == 1
    with larm.connect() as connection:  # that sends no more, and listens
        connection.sendall(ping(larm.fresh(), b""))
        connection.shutdown(socket.SHUT_WR)
        assert connection.makefile("rb").read().endswith(OK)
    with larm.connect() as connection:  # that does not even listen
        connection.sendall(ping(larm.fresh()))
    wait_until(lambda: larm.up() == before + 3)


@pytest.mark.parametrize("chunked", [False, True])
def test_of_a_large_body_the_end_is_kept(larm, chunked):
    body = b"".join(b"%09d\n" % number for number in range(990_000))
    headers, sent = b"Content-Length: %d\r\n" % len(body), body
    if chunked:
        headers, sent = b"Transfer-Encoding: chunked\r\n", b""
        for start in range(0, len(body), 1 << 20):
            part = body[start : start + (1 << 20)]
            sent += b"%x;a=b\r\n%s\r\n" % (len(part), part)
        sent += b"0\r\n\r\n"
    token = larm.fresh()
    assert larm.send(ping(token, headers + CLOSE, b"PUT", body=sent)).endswith(OK)
    [stored] = larm.get(f"/api/v1/monitors/m{token[-4:]}/heartbeats").json["data"]
    assert stored["body"] == body[-10_000:].decode()


# Many, and slow ones


def test_2000_connections_in_a_second_are_answered_within_3_s_and_the_page_in_1(serve):
    """Where the system lets a process open 256 files, unless it asks for more, as macOS does."""
    larm = serve(2_010, code=few_files(256, FILES))
    page, ended = [], threading.Event()

    def look() -> None:
        while not ended.wait(0.3):
            started = time.monotonic()
            assert larm.get("/monitor/m2001").status == 200
            page.append(time.monotonic() - started)

    looking = threading.Thread(target=look)
    looking.start()
    crowd = Crowd(larm.port, [ping(larm.fresh()) for _ in range(2_000)])
    took = crowd.finish(15)
    ended.set()
    looking.join()
    assert crowd.errors == []
    assert len(crowd.replies) == 2_000
    assert all(reply.endswith(OK) for reply in crowd.replies)
    assert larm.up() == 2_000
    assert took < promised(3)
    assert max(page) < promised(1)

    def sockets() -> int:
        files = Path(f"/proc/{larm.popen.pid}/fd")
        links = [os.readlink(one) for one in files.iterdir() if one.is_symlink()]
        return sum(link.startswith("socket:") for link in links)

    wait_until(lambda: sockets() == 1)  # the listener's


BEGUN = (b"", b"GET /api/hear", b"GET /", b"POST /api/heartbeat/x HTTP/1.1\r\nContent-Length: 99999"
         b"\r\n\r\n")  # fmt: skip


@pytest.mark.parametrize(("files", "connections"), [(100, 400), (FILES, 4_600)])
def test_whoever_is_slow_keeps_no_good_ping_waiting(serve, files, connections):
    """They connect, begin to ask, and send a byte now and then. Some lose their connection."""
    larm = serve(code=few_files(files, files))
    crowd: list[socket.socket] = []
    waited = []
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.3):
            for number, one in enumerate(crowd):
                with contextlib.suppress(OSError):
                    one.send(b"x" if number % 4 else b"")

    threading.Thread(target=trickle).start()
    try:
        for number in range(connections):
            one = larm.connect()
            crowd.append(one)
            with contextlib.suppress(OSError):
                one.sendall(BEGUN[number % 4])
            if number % (connections // 20) == 0:
                waited.append(larm.time_of_a_ping())
        waited += [larm.time_of_a_ping() for _ in range(10)]
    finally:
        ended.set()
        for one in crowd:
            one.close()
    assert max(waited) < promised(2)


def test_a_request_that_is_given_up_is_answered_503(serve):
    larm = serve(code=few_files(100, 100))
    with larm.connect() as slow:
        slow.sendall(ping(larm.fresh(), b"Content-Length: 5\r\n", b"POST", body=b"hell"))
        time.sleep(0.5)
        crowd = [larm.connect() for _ in range(100)]
        reply = slow.makefile("rb").read()
        assert reply.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nConnection: close\r\n" in reply
        for one in crowd:
            one.close()
    assert larm.up() == 0


COUNTED = """
call = larm.Web.__call__

def counted(self, environ, start_response):
    larm.log.info("asked for %s", environ["PATH_INFO"])
    return call(self, environ, start_response)

larm.Web.__call__ = counted
"""


def test_who_does_not_read_the_answers_gets_no_more_of_them(serve):
    """Or it would hold a thread of the few that answer pages, and all their memory, for ever."""
    larm = serve(600, code=RUN.format(COUNTED))
    with socket.socket() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        greedy.connect(("127.0.0.1", larm.port))
        greedy.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)

        def answered(since: float) -> int:
            time.sleep(since)
            return larm.log.count("asked for /metrics")

        wait_until(lambda: answered(0) == answered(1) > 0)
        assert answered(0) < 30
        assert larm.time_of_a_ping() < promised(2)


# While Larm stops


@dataclass
class Pingers:
    """Threads that ping one after the other, each ping on a connection, until one is refused."""

    larm: Server
    count: int
    delay: float = 0
    replies: list[bytes] = field(default_factory=list)
    errors: list[OSError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.threads = [threading.Thread(target=self._ping) for _ in range(self.count)]
        for thread in self.threads:
            thread.start()

    def _ping(self) -> None:
        while True:
            try:
                self.replies.append(self.larm.send(ping(self.larm.fresh()), self.delay))
            except ConnectionRefusedError:
                return
            except OSError as error:
                self.errors.append(error)

    def join(self) -> None:
        for thread in self.threads:
            thread.join()
        assert self.errors == []
        assert all(reply.endswith(OK) for reply in self.replies)


def test_a_stop_under_load_cuts_nobody(serve):
    """Neither those who ping one after the other, nor those who had connected unnoticed."""
    larm = serve(5_000)
    requests = [ping(larm.fresh()) for _ in range(500)]
    pingers = Pingers(larm, 16)
    time.sleep(0.3)
    larm.popen.send_signal(signal.SIGSTOP)  # so that nobody accepts them
    crowd = Crowd(larm.port, requests)
    crowd.turn(0.1)
    larm.popen.send_signal(signal.SIGTERM)
    larm.popen.send_signal(signal.SIGCONT)
    crowd.finish(15)
    pingers.join()
    assert larm.popen.wait(15) == 0
    assert crowd.errors == []
    assert len(crowd.replies) == 500
    assert all(reply.endswith(OK) for reply in crowd.replies)
    assert serve(5_000).up() == len(pingers.replies) + 500


def test_what_is_under_way_at_a_stop_is_answered_and_what_does_not_come_in_whole_by_503(serve):
    larm = serve()
    with contextlib.ExitStack() as stack:
        kept, busy, body, head = (stack.enter_context(larm.connect()) for _ in range(4))
        kept.sendall(ping(larm.fresh(), b""))
        assert kept.recv(65_536).endswith(OK)
        busy.sendall(HEALTH[:5])
        body.sendall(ping(larm.fresh(), b"Content-Length: 5\r\n", b"POST", body=b"hell"))
        head.sendall(b"POST /api/he")
        time.sleep(0.3)
        larm.popen.send_signal(signal.SIGTERM)
        wait_until(larm.refuses)
        refused = time.monotonic()
        kept.sendall(ping(larm.fresh(), b""))
        reply = kept.makefile("rb").read()
        assert b"\r\nConnection: close\r\n" in reply
        assert reply.endswith(OK)
        busy.sendall(HEALTH[5:] % b"")
        assert busy.makefile("rb").read().startswith(b"HTTP/1.1 200 OK\r\n")
        for one in (body, head):
            assert one.makefile("rb").read().split()[1] == b"503"
        assert time.monotonic() - refused > 1.5, "they had time"
    assert larm.popen.wait(15) == 0


def test_while_the_disk_hangs_pages_are_answered_and_at_a_stop_pings_too(serve):
    larm = serve()
    with contextlib.closing(sqlite3.connect(larm.folder / "larm.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        crowd = Crowd(larm.port, [ping(larm.fresh()) for _ in range(200)])
        crowd.turn(0.1)
        started = time.monotonic()
        assert larm.get("/health").status == 200
        assert larm.get("/monitor/m0001").status == 200
        assert time.monotonic() - started < promised(1)
        assert crowd.replies == []
        db.execute("COMMIT")
        crowd.finish(15)
        assert (larm.up(), len(crowd.replies)) == (200, 200)
        db.execute("BEGIN IMMEDIATE")
        with larm.connect() as once, larm.connect() as kept:
            once.sendall(ping(larm.fresh()))
            kept.sendall(ping(larm.fresh(), b"") + ping(UNKNOWN, b"") * 2)
            time.sleep(0.3)
            larm.popen.send_signal(signal.SIGTERM)
            assert once.makefile("rb").read().count(b"HTTP/1.1 503") == 1
            assert kept.makefile("rb").read().count(b"HTTP/1.1 503") == 3
        db.execute("ROLLBACK")
    assert larm.popen.wait(15) == 0


def test_with_little_to_do_it_stops_soon_and_waits_for_what_comes_over_a_slow_network(serve):
    larm = serve(500)
    with larm.connect() as kept:
        kept.sendall(ping(larm.fresh(), b""))
        assert kept.recv(65_536).endswith(OK)
        pingers = Pingers(larm, 8, delay=0.05)
        time.sleep(0.5)
        started = time.monotonic()
        assert larm.stop() == 0
        assert time.monotonic() - started < promised(1.5)
        pingers.join()
        assert kept.recv(1) == b""


# Another Waitress


def test_with_a_waitress_of_other_insides_pings_take_threads(serve):
    larm = serve(code=RUN.format("import waitress; del waitress.task.WSGITask"))
    assert "Waitress has changed" in larm.log
    before = larm.up()
    assert larm.send(ping(larm.fresh())).endswith(OK)
    assert larm.send(ping(UNKNOWN)).endswith(OK)
    assert larm.up() == before + 1
    assert larm.stop() == 0
