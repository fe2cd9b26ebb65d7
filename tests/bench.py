"""Measure Larm against a bare Bottle route on Waitress, in one run, with the same load tool.

    python tests/bench.py         everything
    python tests/bench.py run     only the job wrapper, without wrk

Needs wrk (Debian: apt-get install wrk). Everything stays on loopback. What counts are the ratios:
machines are noisy, and a figure means little beside another machine's.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

LARM = Path(__file__).parent.parent / "larm.py"
sys.path.insert(0, str(LARM.parent))

import larm  # noqa: E402 - only importable once the path is set

MONITORS = 1_000
CONNECTIONS = 32
SECONDS = 4  # of load in one measurement
JOB_SECONDS = 10  # of a job that prints 50 MB; what `run` costs is hardly more in a longer one
ROUNDS = 3  # of all measurements, in turn, so that a machine's drift meets each alike

BARE = """
import sys, bottle, waitress
app = bottle.Bottle()
app.route("/api/heartbeat/<token>", "ANY", lambda token: {"status": "ok"})
waitress.serve(app, listen="127.0.0.1:" + sys.argv[1], threads=32, _quiet=True)
"""

JOB = """
import os, sys, time
started = time.monotonic()
for number in range(5_000):
    time.sleep(max(0, started + float(sys.argv[1]) * number / 5_000 - time.monotonic()))
    os.write(1, b"%09d\\n" % number * 1_000)
"""

RANDOM_TOKENS = """
math.randomseed(tonumber(os.getenv("SEED")))
request = function()
  return wrk.format("GET", string.format("/api/heartbeat/token-%016d", math.random(0, 999)))
end
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(url: str) -> None:
    for _ in range(1000):
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.005)
    raise SystemExit(f"{url} did not answer")


def put_load_on(port: int, script: Path) -> float:
    """Requests answered a second."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "-s", str(script),
               f"http://127.0.0.1:{port}"]
    environ = dict(os.environ, SEED=str(time.monotonic_ns() % 100_000))
    printed = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    if "Non-2xx" in printed.stdout:
        raise SystemExit(printed.stdout)
    match = re.search(r"Requests/sec:\s+([\d.]+)", printed.stdout)
    assert match, printed.stdout
    return float(match[1])


class Running:
    """A Larm with 1,000 monitors of one interval, in a folder of its own."""

    def __init__(self, folder: Path, interval: str) -> None:
        self.port = free_port()
        self.database = folder / "larm.db"
        folder.mkdir()
        lines = [f'listen = "127.0.0.1:{self.port}"']
        for number in range(MONITORS):
            lines.append(f"[monitors.job-{number}]")
            lines.append(f'interval = "{interval}"\ngrace = "1h"\ntoken = "token-{number:016d}"')
        (folder / "larm.toml").write_text("\n".join(lines))
        command = [sys.executable, str(LARM), "-c", str(folder / "larm.toml")]
        started = time.monotonic()
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(f"http://127.0.0.1:{self.port}/health")
        self.start_seconds = time.monotonic() - started

    def stored(self) -> int:
        with sqlite3.connect(self.database) as db:
            return int(db.execute("SELECT MAX(id) FROM heartbeats").fetchone()[0] or 0)

    def pss_megabytes(self) -> float:
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        assert match
        return int(match[1]) / 1024

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)


def fsync_ms(folder: Path) -> float:
    """The median time of writing and syncing one page, to judge the disk by."""
    times = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(50):
            file.write(b"x" * 4096)
            file.flush()
            started = time.monotonic()
            os.fsync(file.fileno())
            times.append(time.monotonic() - started)
    return statistics.median(times) * 1000


def many_schedules(folder: Path) -> tuple[float, float]:
    """Seconds to load 10,000 monitors with different schedules, and to apply a change of one."""
    lines = [
        f'[monitors.job-{number}]\nschedule = "{number % 60} {number // 60 % 24} * * '
        f'{number // 1440}"\ntimezone = "Europe/Stockholm"'
        for number in range(10_000)
    ]
    path = folder / "larm.toml"
    path.write_text("\n".join(lines))
    started = time.monotonic()
    config = larm.load(path, {})
    loaded = time.monotonic() - started
    running = larm.Larm(config, larm.Clock())
    running.begin()
    path.write_text("\n".join([*lines[:-1], lines[-1].replace("* * 6", "* * 5")]))
    started = time.monotonic()
    changed = larm.load(path, {})
    assert larm.describe_changes(config, changed) == "monitors changed: job-9999"
    running.use(changed)
    applied = time.monotonic() - started
    running.store.close()
    return loaded, applied


def job_wrapper(folder: Path) -> None:
    """A job that prints 50 MB, with and without `run`: how much longer it takes, `run`'s memory."""
    (folder / "job.py").write_text(JOB)
    running = Running(folder / "wrapped", "1d")
    url = f"http://127.0.0.1:{running.port}/api/heartbeat/token-{0:016d}"
    job = [sys.executable, str(folder / "job.py")]
    wrapper = [sys.executable, str(LARM), "run", "--url", url, "--"]
    figures: dict[str, list[float]] = {"plain": [], "run": [], "plain flat out": [],
                                       "run flat out": []}
    memory = []
    for _ in range(ROUNDS):
        for name, times in figures.items():
            duration = "0" if name.endswith("flat out") else str(JOB_SECONDS)
            prefix = wrapper if name.startswith("run") else []
            with (folder / "printed").open("wb") as printed:
                started = time.monotonic()
                process = subprocess.Popen([*prefix, *job, duration], stdout=printed)
                _, status, usage = os.wait4(process.pid, 0)
                times.append(time.monotonic() - started)
            assert status == 0
            with (folder / "printed").open("rb") as printed:
                for number in range(5_000):
                    assert printed.read(10_000) == b"%09d\n" % number * 1_000
            if prefix:
                memory.append(usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10))
    running.stop()
    medians = {name: statistics.median(times) for name, times in figures.items()}
    print(f"\na job that prints 50 MB into a file, medians of {ROUNDS} rounds")
    for name, median in medians.items():
        times_plain = median / medians[name.replace("run", "plain")]
        print(f"{name:<15}{median:8.2f} s  {times_plain:5.3f} of plain")
    print(f"memory         {max(memory):8.1f} MB RSS at most, of run")


def main() -> None:
    if sys.argv[1:] == ["run"]:
        with tempfile.TemporaryDirectory() as folder_name:
            job_wrapper(Path(folder_name))
        return
    if not shutil.which("wrk"):
        raise SystemExit("needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        script = folder / "random.lua"
        script.write_text(RANDOM_TOKENS)
        rates: dict[str, list[float]] = {
            name: [] for name in ("bare", "answered", "recorded", "throttled")
        }
        starts, memory = [], []
        for number in range(ROUNDS):
            port = free_port()
            bare = subprocess.Popen([sys.executable, "-c", BARE, str(port)])
            wait_for(f"http://127.0.0.1:{port}/api/heartbeat/x")
            rates["bare"].append(put_load_on(port, script))
            bare.kill()
            bare.wait()

            # A random token comes again within its window of 100 ms now and then, so that some of
            # the answered pings are throttled; recorded counts those that are in the database.
            running = Running(folder / f"recorded-{number}", "1s")
            starts.append(running.start_seconds)
            put_load_on(running.port, script)  # every monitor has been pinged and is up now
            before = running.stored()
            rates["answered"].append(put_load_on(running.port, script))
            rates["recorded"].append((running.stored() - before) / SECONDS)
            memory.append(running.pss_megabytes())
            running.stop()

            running = Running(folder / f"throttled-{number}", "1d")
            put_load_on(running.port, script)  # whatever is stored is stored now
            before = running.stored()
            rates["throttled"].append(put_load_on(running.port, script))
            assert running.stored() == before
            memory.append(running.pss_megabytes())
            running.stop()
        disk = fsync_ms(folder)
        loaded, applied = many_schedules(folder)
        job_wrapper(folder)
    bare_rate = statistics.median(rates["bare"])
    print(f"\n{CONNECTIONS} connections, random tokens of {MONITORS} monitors, medians of {ROUNDS} "
          f"rounds of {SECONDS} s; {os.cpu_count()} cores, fsync {disk:.2f} ms")
    for what, rate in rates.items():
        rate_median = statistics.median(rate)
        print(f"{what:<10}{rate_median:8.0f} pings/s  {rate_median / bare_rate:5.2f} of bare")
    print(f"memory    {max(memory):8.1f} MB PSS with {MONITORS} monitors")
    print(f"load      {loaded:8.2f} s for 10,000 monitors with schedules")
    print(f"reload    {applied:8.2f} s where one of them has changed")
    print(f"start     {statistics.median(starts):8.2f} s until /health answers")


if __name__ == "__main__":
    main()
