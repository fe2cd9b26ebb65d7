"""The parts that tests share: a clock that obeys, the rooms without a server, a real process,
and real receivers of alerts. State lives in tmp_path, ports are free ports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

ROOT = Path(__file__).parent.parent
LARM = ("-m", "larm")  # as `python larm.py`, but for compiling it anew each time
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started with & or nohup: what the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)  # start would inherit that
sys.path.insert(0, str(ROOT))
QUICK: str | None = "/dev/shm"  # a disk in memory, where no fsync takes long, if it has room
if not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free < 2_000_000_000:
    QUICK = None
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", QUICK or tempfile.gettempdir())  # of tmp_path

import larm  # noqa: E402 - only importable once the path is set

TOKEN = "a-token-for-the-tests"
START = 1_800_000_000_000  # 2027-01-15 08:00:00 UTC, where every test's clock starts


class FakeClock(larm.Clock):
    """A Clock whose wall and monotonic time move only when a test says so."""

    def __init__(self, now: int = START) -> None:
        self.wall_ms = now
        self.monotonic_ms = 50_000
        super().__init__(lambda: self.wall_ms * 1_000_000, lambda: self.monotonic_ms * 1_000_000)

    def advance(self, ms: int) -> None:
        """Time passes, for both clocks."""
        self.wall_ms += ms
        self.monotonic_ms += ms

    def set_wall(self, by_ms: int) -> None:
        """Somebody, or NTP, sets the wall clock; or the machine was suspended."""
        self.wall_ms += by_ms


def write_config(folder: Path, text: str) -> Path:
    path = folder / "larm.toml"
    path.write_text(text)
    return path


class House:
    """A whole Larm in this process, on a real database, with a FakeClock and without threads that
    tick: a test lets time pass itself. It is spoken to as users do: by WSGI, the API and its file.
    """

    def __init__(self, folder: Path, text: str, clock: FakeClock | None = None) -> None:
        self.folder = folder
        self.clock = clock or FakeClock()
        self.text = text
        self.tokens: dict[str, str] = {}
        self.open()

    def open(self) -> None:
        """Start, as `larm.py serve` does, but for the server and the threads."""
        path = write_config(self.folder, self.text)
        self.larm = larm.Larm(larm.load(path, os.environ), self.clock)
        self.larm.begin()
        self.ticked_at = self.clock.monotonic_ms

    def save(self, text: str) -> None:
        """Save another larm.toml while Larm runs, and let Larm look at it."""
        self.text = text
        write_config(self.folder, text)
        self.larm.reload_asked = True
        self.larm.reload_if_saved()

    def stop(self) -> None:
        """A clean stop, as at SIGTERM."""
        self.larm.close()

    def crash(self) -> None:
        """As by kill -9: what only memory knows is lost; what was committed is on disk."""
        self.larm.store.close()

    def restart(self, after_ms: int = 0, text: str | None = None, crash: bool = False) -> None:
        """Stop, let time pass, start again; with another configuration where one is given."""
        self.crash() if crash else self.stop()
        self.clock.advance(after_ms)
        self.clock.resync()
        self.text = text or self.text
        self.open()

    # Time

    def tick(self, late: int = 0) -> None:
        """A step of the watcher that comes when it was planned, or so many milliseconds late."""
        passed = self.clock.monotonic_ms - self.ticked_at
        self.ticked_at = self.clock.monotonic_ms
        self.larm.tick(passed - late)

    def watch(self, ms: int, step: int = 1_000) -> None:
        """Let time pass with a tick each step, as the running watcher would."""
        end = self.clock.monotonic_ms + ms
        while self.clock.monotonic_ms < end:
            self.clock.advance(min(step, end - self.clock.monotonic_ms))
            self.tick()

    def live(self, ms: int, step: int = 60_000) -> None:
        """As watch(), with the receivers' answers: no attempt to send is under way when the clock
        moves, which would look as if the disk, or the receiver, had taken that long.
        """
        end = self.clock.monotonic_ms + ms
        while self.clock.monotonic_ms < end:
            self.watch(min(step, end - self.clock.monotonic_ms), step)
            self.larm.notifier.wait(10)

    def sleep_through(self, ms: int) -> None:
        """Larm is stopped (SIGSTOP, a paused virtual machine) for so long, then ticks."""
        self.clock.advance(ms)
        self.tick(late=ms)

    def deliver(self) -> None:
        """Send what is due by now, and wait until the receivers have answered."""
        self.tick()
        self.larm.notifier.wait(10)

    # HTTP

    def ask(self, path: str, method: str = "GET", body: bytes = b"", peer: str = "127.0.0.1",
            **headers: str) -> Answer:
        return ask(self.larm.web, path, method, body, peer, **headers)

    def token(self, key: str) -> str:
        """Of a monitor, as its ping URL has it."""
        return str(self.api(f"monitors/{key}")["ping_url"]).rpartition("/")[2]

    def ping(self, key: str, action: str = "", body: str = "", rid: str | None = None,
             status: int = 200, **headers: str) -> None:
        """A job's ping: action is "", "start", "fail", "3", "log"; it must be answered `status`."""
        if not (token := self.tokens.get(key)):
            token = self.tokens[key] = self.token(key)
        path = f"/api/heartbeat/{token}" + (f"/{action}" if action else "")
        path += f"?rid={quote(rid)}" if rid is not None else ""
        answer = self.ask(path, "POST" if body else "GET", body.encode(), **headers)
        assert answer.status == status, answer

    def api(self, path: str) -> Any:
        """The data of a GET to the API, every moment in it in milliseconds."""
        answer = self.ask(f"/api/v1/{path}")
        assert answer.status == 200, answer
        return in_ms(answer.json["data"])

    def post(self, path: str, **asked: object) -> Any:
        """The data of a POST to the API: post("monitors/job/pause", **{"for": "2h"})."""
        answer = self.ask(f"/api/v1/{path}", "POST", json.dumps(asked).encode())
        assert answer.status == 200, answer
        return in_ms(answer.json["data"])

    def monitor(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api(f"monitors/{key}")
        return found

    def state(self, key: str) -> str:
        return str(self.monitor(key)["state"])

    def left(self, key: str) -> int:
        """Milliseconds until the deadline."""
        return int(self.monitor(key)["deadline_at"]) - self.clock.now()

    def events(self, key: str | None = None) -> list[dict[str, Any]]:
        """What the API lists, oldest first, all of it, with `down_ms` for down_seconds."""
        return [event | {"down_ms": event["down_seconds"] and round(event["down_seconds"] * 1000)}
                for event in self.pages("events") if key in (None, event["monitor"])]

    def changes(self, key: str | None = None) -> list[tuple[str, str | None, int]]:
        """(type, reason, milliseconds since START) of each event."""
        return [(one["type"], one["reason"], one["at"] - START) for one in self.events(key)]

    def heartbeats(self, key: str) -> list[dict[str, Any]]:
        """What the API lists, oldest first, all of it."""
        return self.pages(f"monitors/{key}/heartbeats")

    def stored(self, key: str, signal: str = "success") -> list[int]:
        """When the stored heartbeats with that signal came, in milliseconds since START."""
        return [one["at"] - START for one in self.heartbeats(key) if one["signal"] == signal]

    def pages(self, path: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            before = f"&before={found[-1]['id']}" if found else ""
            page = self.api(f"{path}?limit=1000{before}")
            found += page
            if len(page) < 1000:
                return found[::-1]

    def pause(self, key: str, span: str | None = None) -> None:
        self.post(f"monitors/{key}/pause", **({"for": span} if span else {}))

    def resume(self, key: str) -> None:
        self.post(f"monitors/{key}/resume")

    # Faults

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of this process may grow: SQLite can't write, as on a full disk."""
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    @contextlib.contextmanager
    def hanging_disk(self) -> Iterator[None]:
        """The writer waits for the disk while this lasts (with another thread's pings inside)."""
        began, go = threading.Event(), threading.Event()

        def wait(_: sqlite3.Connection) -> None:
            began.set()
            go.wait(30)

        self.larm.store.submit(wait)
        assert began.wait(10)
        try:
            yield
        finally:
            go.set()

    def queue_up(self, *steps: Callable[[], object]) -> list[Any]:
        """Each step in a thread of its own, one after the other, all waiting for the disk; then the
        disk answers. What they returned.
        """
        with ThreadPoolExecutor(len(steps)) as threads:
            with self.hanging_disk():
                waiting = []
                for step in steps:
                    waiting.append(threads.submit(step))
                    time.sleep(0.05)  # it has queued up by then; if not, less is proven
            return [one.result(15) for one in waiting]

    def recover(self) -> None:
        """The disk takes writes again: tick until Larm has found that out."""

        def recorded() -> bool:
            with contextlib.suppress(larm.Unrecordable):
                self.tick()
                return True
            return False

        wait_until(recorded)

    def sql(self, text: str, *values: object) -> list[dict[str, Any]]:
        """Look into the database file, as sqlite3 on the command line does. For sizes and faults
        only: what Larm knows is asked for by its API.
        """
        with contextlib.closing(sqlite3.connect(self.folder / "larm.db", timeout=10)) as db, db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(text, values)]


def in_ms(value: Any) -> Any:
    """JSON with each ISO moment as milliseconds since the epoch."""
    if isinstance(value, dict):
        return {name: in_ms(one) for name, one in value.items()}
    if isinstance(value, list):
        return [in_ms(one) for one in value]
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", value):
        return round(datetime.fromisoformat(value).timestamp() * 1000)
    return value


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Callable[..., House]]:
    """house(toml, clock=None): a House; each is closed at the end of the test."""
    built: list[House] = []

    def build(text: str, clock: FakeClock | None = None) -> House:
        built.append(House(tmp_path, text, clock))
        return built[-1]

    yield build
    for one in built:
        with contextlib.suppress(Exception):
            one.larm.store.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """The condition's first true value; fails the test if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(web: Any, path: str, method: str = "GET", body: bytes = b"",
        peer: str = "127.0.0.1", **headers: str) -> Answer:
    """Call the WSGI application as Waitress does, from this machine where no peer is named."""
    path, _, query = path.partition("?")
    given: list[Any] = []
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method, "PATH_INFO": unquote(path, "latin-1"), "QUERY_STRING": query,
        "SERVER_NAME": "larm", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": peer, "HTTP_HOST": "localhost", "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
        **{f"HTTP_{name.upper()}": value for name, value in headers.items()},
    }  # fmt: skip
    answer = b"".join(web(environ, lambda status, headers, *_: given.extend((status, headers))))
    return Answer(int(given[0].split()[0]), dict(given[1]), answer)


@dataclass
class Process:
    """A real larm.py."""

    folder: Path
    port: int
    popen: subprocess.Popen[bytes]
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, method: str = "GET", body: bytes | None = None,
            headers: dict[str, str] | None = None) -> Answer:
        request = urllib.request.Request(
            self.url + path, data=body, method=method, headers=headers or {}
        )
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def ping(self, token: str = TOKEN, action: str = "") -> Answer:
        return self.get(f"/api/heartbeat/{token}{action}")

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(self.folder / "larm.db", timeout=10)) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(sql, values)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(15)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


def run_larm(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run larm.py to its end in a folder, as a user would."""
    path = os.pathsep.join([*([environ["PYTHONPATH"]] if "PYTHONPATH" in environ else []),
                            str(ROOT)])
    return subprocess.run(
        [sys.executable, *LARM, *arguments],
        cwd=folder, env={**os.environ, **environ, "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=60, check=False,
    )


def launch(
    folder: Path, text: str, port: int = 0, code: str = "", **environ: str
) -> Process:
    """Start a larm.py that listens on a free port, or on that one, and wait until it answers.

    `code`: Python to run instead of larm.py, with larm importable.
    """
    port = port or free_port()
    folder.mkdir(exist_ok=True)
    write_config(folder, f'listen = "127.0.0.1:{port}"\n{text}')
    log_file = folder / f"log-{len(list(folder.glob('log-*')))}"
    with log_file.open("wb") as log:
        popen = subprocess.Popen(
            [sys.executable, *(["-c", code] if code else LARM)],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
            stderr=log, stdout=log, stdin=subprocess.DEVNULL,
        )
    process = Process(folder, port, popen, log_file)

    def answers() -> bool:
        assert popen.poll() is None, process.log
        with contextlib.suppress(OSError):
            return process.get("/health").status in (200, 503)
        return False

    try:
        wait_until(answers)
    except BaseException:
        process.kill()
        raise
    return process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """start(toml): a running larm.py that answers. start(toml, folder=..., port=...) starts another
    one, or the same once more.
    """
    started: list[Process] = []

    def run(text: str, folder: Path = tmp_path, port: int = 0, **environ: str) -> Process:
        started.append(launch(folder, text, port, **environ))
        return started[-1]

    yield run
    for process in started:
        process.kill()


@dataclass
class Webhook:
    """A real HTTP receiver for json:// channels. `answer` decides what the next alerts get: an HTTP
    status, "hang" (no answer), "drip" (a byte of an answer a second, for ever) or "close".
    """

    port: int
    answer: int | str = 200
    alerts: list[dict[str, Any]] = field(default_factory=list)  # accepted ones
    arrived: list[float] = field(default_factory=list)  # time.time() of each accepted one
    refused: int = 0  # that came and were not accepted

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.port}/hook"

    def titles(self) -> list[str]:
        return [alert["title"] for alert in self.alerts]

    def bodies(self) -> list[str]:
        return [alert["message"] for alert in self.alerts]


@pytest.fixture
def webhooks() -> Iterator[Callable[[], Webhook]]:
    """webhooks(): another Webhook."""
    servers: list[ThreadingHTTPServer] = []
    closing = threading.Event()

    def build() -> Webhook:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if webhook.answer == 200:
                    webhook.arrived.append(time.time())
                    webhook.alerts.append(json.loads(body))
                else:
                    webhook.refused += 1
                if webhook.answer == "hang":
                    closing.wait(300)
                while webhook.answer == "drip" and not closing.wait(1):
                    self.wfile.write(b"H")
                if isinstance(webhook.answer, int):
                    self.send_response(webhook.answer)
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign] # a caller that hung up
        webhook = Webhook(server.server_port)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return webhook

    yield build
    closing.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def webhook(webhooks: Callable[[], Webhook]) -> Webhook:
    return webhooks()
