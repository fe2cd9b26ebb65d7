"""Law 6 with real processes: 1,000 events, 5 channels that fail at random, 20 kills -9."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import Process, launch, wait_until

EVENTS, KILLS = 1_000, 20
A_LIFE = 45  # events; what is left comes after the last kill
CHANNELS = ("one", "two", "three", "four", "five")
NAMES = [f"event-{number:04}" for number in range(EVENTS)]

# Starts Larm again each time that it was killed. What takes long, to import all that it needs, is
# done once: each life is a fork, a process of its own.
SUPERVISOR = """
import os, pathlib
import apprise, bottle, requests, waitress
import larm

larm.PAUSES = (20, 40, 60, 80)
larm.DIGEST_WITHIN = 40
larm.TICK = 50
apprise.Apprise.instantiate("json://localhost")
status = life = 0
while status in (0, 9):
    life += 1
    os.environ["LIFE"] = str(life)
    child = os.fork()
    if not child:
        larm.main(["serve"])
        os._exit(1)
    pathlib.Path("pid.new").write_text(f"{child} {life}")
    os.rename("pid.new", "pid")
    status = os.waitpid(child, 0)[1] or 1
"""


class Receivers:
    """The channels' other ends. Of what arrives a fifth is not answered and a fifth refused; what
    counts as accepted is kept, as (life of Larm, names), and `on_accepted` is called before Larm
    hears of it.
    """

    def __init__(self, seed: int) -> None:
        self.accepted: dict[str, list[tuple[int, list[str]]]] = {name: [] for name in CHANNELS}
        self.refused = 0
        self.on_accepted: Callable[[], None] = lambda: None
        dice, lock, receivers = random.Random(seed), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                _, channel, life = self.path.split("/")
                with lock:
                    fate = dice.choice(["accept"] * 3 + ["refuse", "drop"])
                    if fate == "accept":
                        found = re.findall(r"event-\d{4}", json.loads(body)["message"])
                        message = int(life), list(dict.fromkeys(found))
                        receivers.accepted[channel].append(message)
                        receivers.on_accepted()
                    else:
                        receivers.refused += 1
                if fate != "drop":
                    with contextlib.suppress(OSError):  # Larm was killed meanwhile
                        self.send_response(200 if fate == "accept" else 500)
                        self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign] - kills cut requests short
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def channels(self) -> str:
        port = self.server.server_port
        return "[channels]\n" + "".join(
            f'{name} = "json://127.0.0.1:{port}/{name}/${{LIFE}}"\n' for name in CHANNELS
        )


@pytest.fixture
def receivers() -> Iterator[Receivers]:
    built = Receivers(seed=1)
    yield built
    built.server.shutdown()
    built.server.server_close()


class Supervised:
    """Larm under SUPERVISOR, killed once `happened` was called as often as `arm` said."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.killed = threading.Event()
        self._kind, self._left = "", 0
        self._pid = 0

    def life(self) -> tuple[int, int]:
        pid, number = (self.process.folder / "pid").read_text().split()
        return int(pid), int(number)

    def arm(self, kind: str, times: int, life: int) -> None:
        """Once that life has begun."""
        wait_until(lambda: self.life()[1] == life)
        self._pid = self.life()[0]
        self.killed.clear()
        self._kind, self._left = kind, times

    def happened(self, kind: str) -> None:
        if kind == self._kind:
            self._left -= 1
            if self._left == 0:
                self.kill()

    def kill(self) -> None:
        self._kind = ""
        os.kill(self._pid, signal.SIGKILL)
        self.killed.set()

    def fail_jobs(self, todo: list[str], count: int) -> None:
        """Report the first of these failures, in order; those that are answered are taken off the
        list. Ends with Larm's life.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.process.port, timeout=10)
        with contextlib.closing(connection):
            for _ in range(min(count, len(todo))):
                while True:
                    try:
                        connection.request("POST", f"/api/heartbeat/token-of-the-{todo[0]}/fail")
                        assert connection.getresponse().read() == b'{"status": "ok"}'
                        break
                    except (OSError, http.client.HTTPException):
                        connection.close()  # it is on its way up, or was killed
                        if self.killed.wait(0.01):
                            return
                todo.pop(0)
                self.happened("answered")


@pytest.fixture
def supervised(tmp_path, receivers) -> Iterator[Supervised]:
    monitors = "".join(
        f'[monitors.{name}]\ninterval = "1d"\ntoken = "token-of-the-{name}"\n' for name in NAMES
    )
    process = launch(tmp_path, receivers.channels + monitors, code=SUPERVISOR, LIFE="0")
    larm = Supervised(process)
    yield larm
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(larm.life()[0], signal.SIGKILL)


def test_1000_events_reach_5_failing_channels_in_order_across_20_kills(supervised, receivers):
    larm, dice, todo = supervised, random.Random(2), list(NAMES)
    receivers.on_accepted = lambda: larm.happened("accepted")
    for life in range(1, KILLS + 1):
        kind = dice.choice(["answered", "accepted"])
        larm.arm(kind, dice.randint(1, A_LIFE if kind == "answered" else 15), life)
        larm.fail_jobs(todo, A_LIFE)
        if not larm.killed.wait(0.5):
            larm.kill()
    larm.arm("", 0, KILLS + 1)
    larm.fail_jobs(todo, EVENTS)
    assert todo == []
    pending = "SELECT COUNT(*) AS count FROM deliveries WHERE state = 'pending'"
    wait_until(lambda: larm.process.rows(pending)[0]["count"] == 0, seconds=20)

    rows = larm.process.rows("SELECT key FROM events JOIN monitors m ON m.id = monitor_id "
                             "ORDER BY events.id")
    happened = [row["key"] for row in rows]
    assert happened == NAMES  # each is one event
    repeated = 0
    for messages in receivers.accepted.values():
        first_told = list(dict.fromkeys(name for _, names in messages for name in names))
        assert first_told == happened
        last_of = dict(messages)  # life: what it told last
        told = Counter(name for _, names in messages for name in names)
        for name in (name for name, times in told.items() if times > 1):
            *before, _ = [life for life, names in messages if name in names]
            assert all(name in last_of[life] for life in before)
            assert len(set(before)) == len(before)
            repeated += 1
    kept = sum(map(len, receivers.accepted.values()))
    print(f"\n{EVENTS} events, {len(CHANNELS)} channels, {KILLS} kills: {kept} messages accepted, "
          f"{receivers.refused} not; {repeated} of {EVENTS * len(CHANNELS)} alerts told again")
    assert receivers.refused > 50
    assert " ERROR " not in larm.process.log
