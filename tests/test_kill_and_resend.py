"""Law 6 with real processes: hundreds of events, 5 channels that fail at random, kills -9."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, wait_until, write_config
from receivers import channels, monitor

EVENTS, KILLS = 300, 10
A_LIFE = 30  # events at most; what is left comes after the last kill
CHANNELS = ("one", "two", "three", "four", "five")
NAMES = [f"event-{number:04}" for number in range(EVENTS)]

# A Larm that is begun again each time that it was killed, with a Clock that runs 30 times as fast:
# a digest takes 100 ms, the first pause 350. What takes long, to import all that it needs, is done
# once: each life is a fork, a process of its own. It reports the failures that it is asked for on
# its standard input, one after the other, and prints when it begins, each name that was answered,
# and that it is over.
SUPERVISOR = """
import io, os, sys, threading, time
from pathlib import Path
import apprise, requests
import larm

SPEED, began = 30, (time.time_ns(), time.monotonic_ns())
wall = lambda: began[0] + SPEED * (time.time_ns() - began[0])
monotonic = lambda: began[1] + SPEED * (time.monotonic_ns() - began[1])
apprise.Apprise.instantiate("json://localhost")

def live(names):
    house = larm.Larm(larm.load(Path("larm.toml"), os.environ), larm.Clock(wall, monotonic))
    house.begin()
    os.write(1, f"life {os.getpid()}\\n".encode())
    threading.Thread(target=fail, args=(house.web, names), daemon=True).start()
    wait = 0
    while True:
        time.sleep(wait / 1000 / SPEED)
        wait = house.tick(max(1000, wait))

def fail(web, names):
    for name in names:
        environ = {"REQUEST_METHOD": "POST", "QUERY_STRING": "", "wsgi.input": io.BytesIO(),
                   "PATH_INFO": f"/api/heartbeat/token-of-the-{name}/fail", "SERVER_NAME": "larm",
                   "SERVER_PORT": "80", "REMOTE_ADDR": "127.0.0.1", "CONTENT_LENGTH": "0",
                   "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr}
        assert b"".join(web(environ, lambda *_: None)) == b'{"status": "ok"}'
        os.write(1, f"{name}\\n".encode())  # whole, or not at all

for line in sys.stdin:
    life, *names = line.split()
    os.environ["LIFE"] = life
    if not (child := os.fork()):
        try:
            live(names)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1] != 9:
        sys.exit("it ended by itself")
    print("over", flush=True)
"""


class Receivers:
    """The channels' other ends. Of what arrives a fifth is not answered and a fifth refused, but
    none three times in a row; what counts as accepted is kept, as (life of Larm, names), and
    `on_accepted` is called before Larm hears of it.
    """

    def __init__(self, seed: int) -> None:
        self.accepted: dict[str, list[tuple[int, list[str]]]] = {name: [] for name in CHANNELS}
        self.refused = 0
        self.on_accepted: Callable[[], None] = lambda: None
        dice, lock, receivers = random.Random(seed), threading.Lock(), self
        in_a_row = Counter[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                _, channel, life = self.path.split("/")
                with lock:
                    fate = dice.choice(["accept"] * 3 + ["refuse", "drop"])
                    if fate == "accept" or in_a_row[channel] == 2:
                        fate, in_a_row[channel] = "accept", 0
                        found = re.findall(r"event-\d{4}", json.loads(body)["message"])
                        receivers.accepted[channel].append((int(life), list(dict.fromkeys(found))))
                        receivers.on_accepted()
                    else:
                        in_a_row[channel] += 1
                        receivers.refused += 1
                if fate != "drop":
                    with contextlib.suppress(OSError):  # Larm was killed meanwhile
                        self.send_response(200 if fate == "accept" else 500)
                        self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign] - cut by a kill
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def receivers() -> Iterator[Receivers]:
    built = Receivers(seed=1)
    yield built
    built.server.shutdown()
    built.server.server_close()


class Supervised:
    """Larm under SUPERVISOR, killed once `happened` was called as often as `begin` said."""

    def __init__(self, folder: Path) -> None:
        self.errors = (folder / "errors").open("w+")
        self.popen = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR], cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "LIFE": "0"},
        )
        self.lock = threading.Lock()
        self.life = self.pid = self.left = 0
        self.kind = ""
        self.killed, self.over = threading.Event(), threading.Event()
        self.over.set()
        self.todo: list[str] = list(NAMES)
        threading.Thread(target=self.read, daemon=True).start()

    def begin(self, events: int, kind: str = "", times: int = 0) -> None:
        """The next life, in which so many failures happen, and in which it is killed when so many
        of them were answered, or so many messages accepted.
        """
        assert self.over.wait(15), self.said()
        self.over.clear()
        self.killed.clear()
        self.kind, self.left = kind, times
        self.life += 1
        assert self.popen.stdin
        self.popen.stdin.write(" ".join([str(self.life), *self.todo[:events]]) + "\n")
        self.popen.stdin.flush()
        wait_until(lambda: self.pid or self.killed.is_set())

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def read(self) -> None:
        assert self.popen.stdout
        for line in self.popen.stdout:
            if line.startswith("life"):
                self.pid = int(line.split()[1])
            elif line.startswith("over"):
                self.over.set()
            else:
                assert self.todo.pop(0) == line.strip()
                self.happened("answered")

    def happened(self, kind: str) -> None:
        if kind == self.kind and self.pid:
            self.left -= 1
            if self.left == 0:
                self.kill()

    def kill(self) -> None:
        with self.lock:
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)
                self.kind, self.pid = "", 0
                self.killed.set()


@pytest.fixture
def supervised(tmp_path, receivers) -> Iterator[Supervised]:
    port = receivers.server.server_port
    write_config(tmp_path, channels(
        **{name: f"json://127.0.0.1:{port}/{name}/${{LIFE}}" for name in CHANNELS}
    ) + "".join(monitor(name, "366d", "0s", token=f"token-of-the-{name}") for name in NAMES))
    larm = Supervised(tmp_path)
    yield larm
    os.killpg(larm.popen.pid, signal.SIGKILL)
    larm.popen.wait()


def test_events_reach_5_failing_channels_in_order_across_kills(
    supervised, receivers
):
    larm, dice = supervised, random.Random(2)
    receivers.on_accepted = lambda: larm.happened("accepted")
    for _ in range(KILLS):
        kind = dice.choice(["answered", "accepted"])
        larm.begin(A_LIFE, kind, dice.randint(1, A_LIFE if kind == "answered" else 12))
        if not larm.killed.wait(0.2):
            larm.kill()
    larm.begin(EVENTS)
    wait_until(lambda: larm.todo == [], seconds=60)

    def reached(channel: str) -> int:
        return len({name for _, names in receivers.accepted[channel] for name in names})

    wait_until(lambda: all(reached(one) == EVENTS for one in CHANNELS), seconds=60)
    time.sleep(0.1)
    repeated = 0
    for messages in receivers.accepted.values():
        first_told = list(dict.fromkeys(name for _, names in messages for name in names))
        assert first_told == NAMES  # each is one event, told in the order in which they happened
        last_of = dict(messages)  # life: what it told last
        told = Counter(name for _, names in messages for name in names)
        for name in (name for name, times in told.items() if times > 1):
            *before, _ = [life for life, names in messages if name in names]
            assert all(name in last_of[life] for life in before)  # accepted, and not yet noted
            assert len(set(before)) == len(before)
            repeated += 1
    kept = sum(map(len, receivers.accepted.values()))
    print(f"\n{EVENTS} events, {len(CHANNELS)} channels, {KILLS} kills: {kept} messages accepted, "
          f"{receivers.refused} not; {repeated} of {EVENTS * len(CHANNELS)} alerts told again")
    assert receivers.refused > 10
    assert "Traceback" not in larm.said()
