"""Measure Larm against its targets, and beside a bare Bottle route on Waitress in the same run.

    python tests/bench.py [NAME...]    all parts (some 10 minutes), or those named (see --help)

Needs Linux and wrk (Debian: apt-get install wrk); everything stays on loopback. Under load only the
ratios mean something: rounds take the bare route and Larm in turn; lines show medians over rounds.
"""

import argparse
import http.client
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import NamedTuple

LARM = Path(__file__).resolve().parent.parent / "larm.py"
MONITORS = 10_000
CONNECTIONS = (32, 128, 400)
# One success a tenth of an interval is stored. As load goes through all tokens before one comes
# again, 2 s throttle nothing below 50,000 pings/s; the grace keeps up what waits for its next one.
UNTHROTTLED = 'interval = "2s"\ngrace = "1h"'
THROTTLED = 'interval = "1d"\ngrace = "1h"'
Load = dict[str, float]  # of wrk: counts, answered and recorded (stored as well) a second, ms

BARE = """
import logging, sys, bottle, waitress
bottle.route("/api/heartbeat/<token>", "ANY", lambda token: {"status": "ok"})
bottle.route("/health", "GET", lambda: {"status": "ok"})
logging.getLogger("waitress").setLevel(logging.CRITICAL)  # as Larm does
waitress.serve(bottle.app(), listen="127.0.0.1:" + sys.argv[1], threads=32, connection_limit=1000)
"""
LOAD = """
local requests, number = {}, -1  -- wrk asks for one that it does not send: the last
init = function(arguments)
  for path in io.lines(arguments[1]) do table.insert(requests, wrk.format("GET", path)) end
end
request = function() number = number % #requests + 1; return requests[number] end
done = function(all, latency)
  local bad = all.errors
  print("TOTAL", all.requests, bad.connect + bad.read + bad.write + bad.status + bad.timeout,
        all.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3)
end
"""
JOB = """
import os, sys, time
started = time.monotonic()
for number in range(5_000):
    time.sleep(max(0, started + float(sys.argv[1]) * number / 5_000 - time.monotonic()))
    os.write(1, b"%09d\\n" % number * 1_000)
"""


def monitors(settings: str, count: int = MONITORS, first: int = 0) -> str:
    return "\n".join(f'[monitors.job-{number}]\ntoken = "token-{number:016d}"\n{settings}'
                     for number in range(first, first + count))


def pings(count: int = MONITORS, prefix: str = "token") -> list[str]:
    """The paths of so many monitors' pings, in a scattered order."""
    return [f"/api/heartbeat/{prefix}-{number * 7919 % count:016d}" for number in range(count)]


def pairs() -> list[str]:
    """/start and /0 in turn, an end so far behind its start that this has been answered."""
    starts, apart = pings(), max(CONNECTIONS)
    both = zip(starts, starts[-apart:] + starts[:-apart], strict=True)
    return [path for start, end in both for path in (f"{start}/start", f"{end}/0")]


def kilobytes(file: str, field: str) -> int:
    return int(Path(file).read_text().partition(f"\n{field}:")[2].partition("kB")[0] or 0)


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int  # on 127.0.0.1
    folder: str  # of Larm; "" is the bare route

    def get(self, path: str, **headers: str) -> tuple[float, http.client.HTTPResponse, bytes]:
        """The milliseconds until the whole answer was here, the answer and its body."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            began = time.monotonic()
            connection.request("GET", path, headers=headers)
            body = (answer := connection.getresponse()).read()
            return (time.monotonic() - began) * 1000, answer, body

    def count(self, rows: str) -> int:
        with closing(sqlite3.connect(f"file:{self.folder}/larm.db?mode=ro", uri=True)) as database:
            return int(database.execute(f"SELECT COUNT(*) FROM {rows}").fetchone()[0])

    def heartbeats(self) -> int:
        """How many are stored, once no more are on their way."""
        found, before = 0, -1
        while self.folder and found != before:
            time.sleep(0.3)  # longer than UNTHROTTLED's window, too
            before, found = found, self.count("heartbeats")
        return found

    def load(self, connections: int, seconds: int, paths: list[str]) -> Load:
        """Each connection's last ping may be stored after wrk has ended, and not be answered."""
        before, folder = self.heartbeats(), tempfile.mkdtemp()
        Path(folder, "lua").write_text(LOAD)
        Path(folder, "paths").write_text("\n".join(paths))
        printed = subprocess.check_output(
            ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "10", "-s",
             f"{folder}/lua", f"http://127.0.0.1:{self.port}", "--", f"{folder}/paths"])
        count, errors, took, middle, p99 = map(float, printed.split(b"TOTAL")[1].split())
        assert count, "nothing was answered"
        stored = self.heartbeats() - before if self.folder else count
        return {"answered": count / took, "recorded": min(count, stored) / took, "median": middle,
                "p99": p99, "errors": errors, "count": count, "stored": stored}


@contextmanager
def serving(toml: str = "", up: int = 0, folder: str = "") -> Iterator[Server]:
    """Larm, with so many monitors pinged; without a configuration the bare route."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", BARE, f"{port}"]
    if toml:
        folder = folder or tempfile.mkdtemp()
        Path(folder, "larm.toml").write_text(f'listen = "127.0.0.1:{port}"\n{toml}')
        command = [sys.executable, f"{LARM}", "-c", f"{folder}/larm.toml"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            server, paths = Server(process, port, folder), pings(up)
            while process.poll() is None:
                with suppress(OSError):
                    if server.get("/health")[1].status == 200:
                        break
                time.sleep(0.01)
            while paths:  # 64 again, as wrk may end before some are answered
                paths = paths[max(1, int(server.load(32, 1, paths)["count"]) - 64):]
            yield server
        finally:
            process.kill()


class Bench(NamedTuple):
    """The parts, and what they need; each says what it finds, a line a target."""

    seconds: int
    rounds: int
    verdicts: list[bool]

    def say(self, what: str, value: float, unit: str, target: str = "", fine: bool = True) -> None:
        """A value beside its target; where something else is wrong, not `fine`, it is missed."""
        verdict = ""
        if target:
            sign, bound = target.split()
            met = fine and (value <= float(bound) if sign == "<=" else value >= float(bound))
            verdict = "met" if met else "missed"
            self.verdicts.append(met)
        print(f"{what:<36}{value:8.2f} {unit:<64}{target:<8}{verdict}".rstrip(), flush=True)

    def fsync_ms(self) -> float:
        """The median time of appending a page and syncing it, to judge the disk by."""
        times = [time.monotonic()]
        with tempfile.TemporaryFile(buffering=0) as file:
            for _ in range(50):
                file.write(b"x" * 4096)
                os.fsync(file.fileno())
                times.append(time.monotonic())
        return median(end - start for start, end in pairwise(times)) * 1000

    def loads(self, settings: str, *rows: tuple[str, list[str], dict[str, str]], up: int = MONITORS,
              count: int = MONITORS, connections: tuple[int, ...] = CONNECTIONS) -> None:
        """Say figures of Larm as parts of the bare route's in the same round. A row: name, paths
        (each round begins 10,000 further), targets (`answered`: nothing may be stored)."""
        with serving() as bare, serving(monitors(settings, count), up) as larm:
            for many, (name, paths, targets) in product(connections, rows):
                rounds = [(bare.load(many, self.seconds, pings()),
                           larm.load(many, self.seconds, paths[MONITORS * number:] or paths))
                          for number in range(self.rounds)]
                errors = sum(load["errors"] for _, load in rounds)
                share = median(load["stored"] / load["count"] for _, load in rounds)
                for field, target in targets.items():
                    values = [(base[field], mine[field]) for base, mine in rounds]
                    base, mine = map(median, zip(*values, strict=True))
                    fine = not errors and (field == "answered") == (share == 0)
                    self.say(f"{name}, {many} at once: {field}", median(b / a for a, b in values),
                             f"of bare: {mine:.0f} of {base:.0f}; {errors:.0f} errors, stored/"
                             f"answered {share:.3f}", target, fine)

    def pings(self) -> None:
        self.loads(UNTHROTTLED, ("pings", pings(), {"recorded": ">= 0.9", "p99": "<= 3"}),
                   ("/start, /0", pairs(), {"recorded": ">= 0.7"}))

    def first(self) -> None:
        """10,000 monitors a round, never pinged; none comes twice below 5,000 pings/s."""
        fresh, short = pings(MONITORS * self.rounds), self._replace(seconds=2)
        short.loads(UNTHROTTLED, ("first pings", fresh, {"recorded": ">= 0.7"}), up=0,
                    count=len(fresh), connections=(128,))

    def throttled(self) -> None:
        self.loads(THROTTLED, ("throttled", pings(), {"answered": ">= 1"}),
                   ("unknown", pings(prefix="unknown"), {"answered": ">= 1"}))

    def one(self) -> None:
        rounds = []
        with serving() as bare, serving(monitors(UNTHROTTLED), MONITORS) as larm:
            for _ in range(self.rounds):
                base, mine = (at.load(1, self.seconds, pings())["median"] for at in (bare, larm))
                rounds.append((mine - base - self.fsync_ms(), mine, base))
        added, mine, base = map(median, zip(*rounds, strict=True))
        self.say("one ping at a time", added, f"ms: {mine:.2f} - {base:.2f} (bare) - fsync", "<= 1")

    def memory(self) -> None:
        for count, target in ((1_000, "<= 40"), (100_000, "<= 250")):
            with serving(monitors(THROTTLED, count)) as larm:
                larm.load(32, self.seconds, pings(count))
                pss = kilobytes(f"/proc/{larm.process.pid}/smaps_rollup", "Pss") / 1024
            self.say(f"memory, {count:,} monitors", pss, "MB PSS after a load of pings", target)

    def idle(self) -> None:
        with serving(monitors(THROTTLED), MONITORS) as larm:
            clock, seconds = ~larm.process.pid << 3 | 2, 5 * self.seconds  # clock_getcpuclockid(3)
            time.sleep(3)  # for what the pings have left to be done
            before = time.clock_gettime(clock)
            time.sleep(seconds)
            busy = (time.clock_gettime(clock) - before) / seconds * 100
        self.say("idle, 10,000 silent monitors", busy, f"% of a core over {seconds} s", "<= 0.5")

    def start(self) -> None:
        toml, folder = monitors(THROTTLED, 100_000), tempfile.mkdtemp()
        for name in ("first start", "start after kill -9"):
            began = time.monotonic()
            with serving(toml, folder=folder):
                took = time.monotonic() - began
            self.say(f"{name}, 100,000 monitors", took, "s until /health answers", "<= 8")

    def due(self) -> None:
        """1,000 monitors that a schedule makes due in the same moment, 5 s after a full minute."""
        toml = monitors('schedule = "* * * * *"\ngrace = "5s"', 1_000)
        time.sleep(60 - time.time() % 60 if time.time() % 60 > 25 else 0)  # ping in one minute
        with serving(f"{toml}\n{monitors(THROTTLED, 99_000, 1_000)}", up=1_000) as larm:
            deadline, found = int(time.time() // 60 * 60 + 65), 0
            while found < 1_000 and time.time() < deadline + 30:
                time.sleep(0.02)
                found = larm.count(f"events WHERE type = 'down' AND at = {deadline * 1000}")
        self.say("1,000 of 100,000 due at once", time.time() - deadline,
                 f"s until {found} events are stored", "<= 2", found == 1_000)

    def midnight(self) -> None:
        """1,000 jobs start and end in one second, each ping on a connection of its own."""
        paths = [f"{path}/start" for path in pings(1_000)] + pings(1_000)
        with serving(monitors('interval = "20s"\ngrace = "1h"', 1_000), 1_000) as larm:
            time.sleep(2)  # a tenth of the interval since each was pinged
            before, most = larm.heartbeats(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # not Larm's, which runs
            calls, pool, began = [], ThreadPoolExecutor(), time.monotonic()
            for number, path in enumerate(paths):
                time.sleep(max(0, began + number / len(paths) - time.monotonic()))
                calls.append(socket.create_connection(("127.0.0.1", larm.port), timeout=30))
                calls[-1].sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                if number == 1_000:
                    page = pool.submit(larm.get, "/")
            good = sum(call.recv(12) == b"HTTP/1.0 200" for call in calls)
            took, stored = time.monotonic() - began, larm.heartbeats() - before
        self.say("2,000 connections in a second", took, f"s until the last answer; {good} are 200, "
                 f"{stored} stored", "<= 3", good == stored == len(paths))
        self.say("the page meanwhile", page.result()[0] / 1000, "s", "<= 1")

    def page(self) -> None:
        tag = ""
        found: dict[str, list[tuple[float, float]]] = {"first paint": [], "refresh": []}
        with serving(monitors(THROTTLED, 1_000), 1_000) as larm:
            for number, path in enumerate(pings(10 * self.rounds)):
                larm.get(f"{path}/1")  # a failure, so that the page has changed
                refresh = {"X-Larm-Refresh": "1", "If-None-Match": tag} if number % 2 else {}
                took, answer, body = larm.get("/", **refresh)
                tag = answer.headers.get("ETag", "")
                found["refresh" if refresh else "first paint"].append((took, len(body) / 1000))
        for name, rounds in found.items():
            took, size = map(median, zip(*rounds, strict=True))
            self.say(f"{name}, 1,000 monitors", took, f"ms; {size:.0f} kB of at most 400, ETag: "
                     f"{tag or 'none'}", "<= 200", size <= 400 and tag != "")

    def reload(self) -> None:
        toml = "\n".join(f'[monitors.job-{number}]\nschedule = "{number % 60} {number // 60 % 24} '
                         f'* * {number // 1440}"' for number in range(10_000))
        with serving(toml) as larm:
            path, saved = Path(larm.folder, "larm.toml"), time.monotonic()
            path.write_text(path.read_text().rpartition("=")[0] + '= "1 2 3 4 *"')
            while b"1 2 3 4 *" not in larm.get("/api/v1/monitors/job-9999")[2]:
                assert time.monotonic() < saved + 60, "not in force within a minute"
                time.sleep(0.02)
            took = time.monotonic() - saved
        self.say("reload, 1 of 10,000 schedules", took, "s from saving until in force", "<= 2")

    def run(self) -> None:
        """A job that prints 50 MB, with and without `run`: how much longer it takes, and memory."""
        found: dict[str, list[tuple[float, int]]] = {}
        with serving(monitors(THROTTLED, 1)) as larm, tempfile.TemporaryFile() as printed:
            url = f"http://127.0.0.1:{larm.port}{pings(1)[0]}"
            for name in ("plain", "run", "plain, flat out", "run, flat out") * self.rounds:
                wrapper = [f"{LARM}", "run", "--url", url, "--", sys.executable] * ("run" in name)
                pace = "0" if "flat" in name else f"{2.5 * self.seconds}"
                printed.truncate(printed.seek(0))
                peak, began = 0, time.monotonic()
                command = [sys.executable, *wrapper, "-c", JOB, pace]
                with subprocess.Popen(command, stdout=printed) as process:
                    while process.poll() is None:
                        peak = max(peak, kilobytes(f"/proc/{process.pid}/status", "VmHWM"))
                        time.sleep(0.005)
                found.setdefault(name, []).append((time.monotonic() - began, peak))
                assert printed.seek(0, os.SEEK_END) == 50_000_000, "output was lost"
        for name, rounds in found.items():
            took, peak = (median(values) for values in zip(*rounds, strict=True))
            plain = median(took for took, _ in found[name.replace("run", "plain")])
            unit = f"of {plain:.2f} s; RSS {peak / 1024:.1f} MB"
            self.say(f"50 MB of output, {name}", took / plain, unit)


PARTS = ("pings", "first", "one", "throttled", "memory", "idle", "start", "due", "midnight", "page",
         "reload", "run")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Larm against its targets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=int, default=4, help="of load in one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, too
    bench = Bench(given.seconds, given.rounds, [])
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        print(f"{len(os.sched_getaffinity(0))} cores, fsync {bench.fsync_ms():.2f} ms, Python "
              f"{sys.version.split()[0]}, Waitress {version('waitress')}, SQLite "
              f"{sqlite3.sqlite_version}; {given.rounds} rounds of {given.seconds} s")
        for name in given.names or PARTS:
            try:
                getattr(bench, name)()
            except Exception as error:  # what a Larm can't do is missed, and ends nothing else
                bench.say(name, 0, f"{type(error).__name__}: {error}"[:60], "<= 0", False)
    print(f"{sum(bench.verdicts)} of {len(bench.verdicts)} targets met")


if __name__ == "__main__":
    main()
