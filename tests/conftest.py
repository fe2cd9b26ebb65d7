"""The parts that tests share: a clock that obeys, the rooms without a server, a real process,
and real receivers of alerts. State lives in tmp_path, ports are free ports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

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
    """Larm's rooms up to the notifier's outbox, on a real database, with a FakeClock and without
    threads of their own: a test ticks the watcher itself.
    """

    def __init__(self, folder: Path, text: str, clock: FakeClock | None = None) -> None:
        self.folder = folder
        self.clock = clock or FakeClock()
        self.text = text
        self.open()

    def open(self) -> None:
        self.config = larm.load(write_config(self.folder, self.text), {})
        self.store = larm.Store(self.config.database)
        self.intake = larm.Intake(self.store, self.clock)
        self.watcher = larm.Watcher(self.store, self.clock, self.intake)
        self.health = larm.Health(self.store, self.clock, self.watcher)
        self.notifier = larm.Notifier(self.store, self.clock)
        self.watcher.begin()
        self.use()

    def reload(self, text: str) -> None:
        """Apply another configuration while running."""
        self.text = text
        self.config = larm.load(write_config(self.folder, self.text), {})
        self.use()

    def use(self) -> None:
        now = self.clock.now()

        def put(db: sqlite3.Connection) -> None:
            watched = larm.adopt(db, self.config.monitors.values(), now)
            self.intake.use(watched)
            self.watcher.use(watched, self.config.keep)
            self.watched = {one.monitor.key: one for one in watched}

        self.store.write(put)
        self.health.use(self.config)
        self.notifier.use(self.config)

    def stop(self) -> None:
        """A clean stop, as at SIGTERM."""
        self.watcher.end()
        self.store.close()

    def crash(self) -> None:
        """As by kill -9: what only memory knows is lost; what was committed is on disk."""
        self.store.close()

    def restart(self, after_ms: int, text: str | None = None, crash: bool = False) -> None:
        """Stop, let time pass, start again; with another configuration where one is given."""
        self.crash() if crash else self.stop()
        self.clock.advance(after_ms)
        self.text = text or self.text
        self.open()

    def ping(
        self, key: str, action: str = "", body: str | None = None, rid: str | None = None
    ) -> None:
        self.intake.receive(
            self.watched[key].token,
            action,
            lambda signal, status: larm.Ping(signal, exit_status=status, body=body, rid=rid),
        )

    def tick(self) -> None:
        """A tick of the watcher that comes when it was planned."""
        self.watcher.tick(self.clock.monotonic() - self.watcher.ticked)
        self.health.check()

    def watch_for(self, ms: int, step: int = 1_000) -> None:
        """Let time pass with a tick each step, as the running watcher would."""
        end = self.clock.now() + ms
        while self.clock.now() < end:
            self.clock.advance(min(step, end - self.clock.now()))
            self.tick()

    def rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        with self.store.reading() as db:
            return [dict(row) for row in db.execute(sql, values)]

    def monitor(self, key: str) -> dict[str, Any]:
        return self.rows("SELECT * FROM monitors WHERE key = ?", key)[0]

    def state(self, key: str) -> str:
        with self.store.reading() as db:
            row = larm.read_monitors(db)[key]
        return larm.shown_state(row, self.config.monitors[key], self.clock.now())

    def events(self, key: str | None = None) -> list[dict[str, Any]]:
        rows = self.rows(
            "SELECT e.*, m.key FROM events e JOIN monitors m ON m.id = e.monitor_id ORDER BY e.id"
        )
        return [row for row in rows if key in (None, row["key"])]

    def heartbeats(self, key: str) -> list[dict[str, Any]]:
        return self.rows(
            "SELECT * FROM heartbeats WHERE monitor_id = ? ORDER BY id", self.watched[key].id
        )


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
            one.store.close()


def hang(store: larm.Store) -> threading.Event:
    """Hold up the store's writer, as a disk that hangs does, until the event is set."""
    began, go = threading.Event(), threading.Event()

    def wait(_: sqlite3.Connection) -> None:
        began.set()
        go.wait(10)

    store.submit(wait)
    assert began.wait(10)
    return go


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


def open_web(house: House) -> larm.Web:
    """The house's door to HTTP, without a server."""
    web = larm.Web(house.store, house.clock, house.intake, house.watcher, house.notifier)
    web.use(house.config)
    return web


def ask(web: larm.Web, path: str, method: str = "GET", body: bytes = b"",
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
    return subprocess.run(
        [sys.executable, str(ROOT / "larm.py"), *arguments],
        cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60,
        check=False,
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
            [sys.executable, *(["-c", code] if code else [str(ROOT / "larm.py")])],
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
    """A real HTTP receiver for json:// channels. `answer` decides what the next alerts get:
    an HTTP status, or "hang".
    """

    port: int
    answer: int | str = 200
    alerts: list[dict[str, Any]] = field(default_factory=list)  # accepted ones
    arrived: list[float] = field(default_factory=list)  # time.time() of each accepted one
    refused: int = 0

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.port}/hook"

    def titles(self) -> list[str]:
        return [alert["title"] for alert in self.alerts]


@pytest.fixture
def webhooks() -> Iterator[Callable[[], Webhook]]:
    """webhooks(): another Webhook."""
    servers: list[ThreadingHTTPServer] = []
    closing = threading.Event()

    def build() -> Webhook:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if webhook.answer == "hang":
                    closing.wait(60)
                    return
                if webhook.answer == 200:
                    webhook.arrived.append(time.time())
                    webhook.alerts.append(json.loads(body))
                else:
                    webhook.refused += 1
                self.send_response(int(webhook.answer))
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
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
