"""A demo house: 12 monitors with 90 days of history, one of each state.

    python tests/demo.py            serve it until Ctrl-C
    python tests/demo.py .github    write the README's picture of it into that folder
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zoneinfo import ZoneInfo

from conftest import FakeClock, House, Process, launch

from larm import DAY, HOUR, MINUTE, SECOND

ZONE = ZoneInfo("Europe/Stockholm")
PICTURE_LIMIT = 150_000  # bytes
LIVELY = ("router", "home-assistant", "mail-queue")  # every few minutes
MONITORS = """
[defaults]
remind = "1d"

[monitors.router]
name = "Router"
interval = "5m"
grace = "2m"

[monitors.nightly-backup]
name = "Nightly backup"
schedule = "30 3 * * *"
grace = "30m"
max_runtime = "2h"
quiet = ["22:00-07:00"]
depends_on = ["router"]
note = "Runs on nas; log in /var/log/backup.log"

[monitors.offsite-backup]
name = "Offsite backup"
interval = "1d"
grace = "2h"
note = "Repository locked? restic unlock, then run it again."

[monitors.certificates]
name = "Certificates of home.example"
interval = "7d"
grace = "1d"
note = "certbot renew on proxy"

[monitors.database-dump]
name = "Database dump"
interval = "6h"
grace = "2h"

[monitors.home-assistant]
name = "Home Assistant"
interval = "5m"
grace = "2m"

[monitors.mail-queue]
name = "Mail queue"
interval = "10m"
grace = "5m"

[monitors.transcoding]
name = "Video transcoding"
interval = "12h"
grace = "2h"
max_runtime = "4h"

[monitors.weekly-report]
name = "Weekly report"
interval = "7d"
grace = "6h"

[monitors.photos]
name = "Photo sync"
interval = "1d"
grace = "6h"
"""
NEW = """
[monitors.solar]
name = "Solar statistics"
interval = "1h"

[monitors.laptop]
name = "Laptop backup"
interval = "1d"
note = "Not set up yet"
"""
OUTPUT = """scanning /srv
processed 14032 files, 31.7 GiB in 6:12
Fatal: unable to open repository at sftp:box:
lock is held by PID 4121 on nas
"""
FAILURES = {  # by monitor and days ago: (exit status, hours until it is well again, output);
    # 0 hours: the next run is
    ("nightly-backup", 71): (1, 9, "no space left on device"),
    ("offsite-backup", 41): (1, 26, "Connection reset by peer"),
    ("database-dump", 33): (2, 2, "FATAL: the database system is starting up"),
    ("nightly-backup", 12): (1, 0, "no space left on device"),
    ("router", 20): (1, 0.1, ""),
    ("home-assistant", 55): (1, 15, ""),
    ("mail-queue", 6): (1, 1.5, "214 mails wait"),
}
MISSED = {("photos", 28), ("offsite-backup", 62)}  # no ping came on that day
Step = tuple[int, str, str, str]  # when, which monitor, its action, its output


@contextlib.contextmanager
def receiver() -> Iterator[str]:
    """The URL of channels that accept whatever comes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"json://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def history(now: int) -> list[Step]:
    """What the jobs sent within the 90 days before `now`, the oldest first."""
    chance, steps = random.Random(12), list[Step]()
    today = datetime.datetime.fromtimestamp(now / 1000, ZONE).date()
    for days in range(90, -1, -1):
        date = today - datetime.timedelta(days)
        runs = [("router", 1), ("home-assistant", 2), ("mail-queue", 3), ("photos", 6),
                ("offsite-backup", 5.2), ("nightly-backup", 3.5),
                *(("database-dump", hour) for hour in (0, 6, 12, 18)),
                *(("transcoding", hour) for hour in (1, 13)),
                *([("weekly-report", 8)] if days % 7 == 3 else [])]
        for key, hour in runs:
            clock = datetime.time(int(hour), int(hour % 1 * 60))
            at = round(datetime.datetime.combine(date, clock, ZONE).timestamp() * 1000)
            if (key, days) in MISSED or (key == "photos" and days < 2):
                continue
            if key in ("nightly-backup", "offsite-backup", "transcoding"):
                steps.append((at, key, "start", ""))
                at += round(chance.uniform(9, 14) * MINUTE * (4 if key == "transcoding" else 1))
            if (key, days) in FAILURES and hour == dict(runs)[key]:
                status, hours, output = FAILURES[key, days]
                steps.append((at, key, str(status), output))
                at += round(hours * HOUR)
                if not hours:
                    continue
            steps.append((at, key, "", ""))
    steps += [(now - 7 * DAY * week - 40 * MINUTE, "certificates", "", "") for week in range(1, 13)]
    failed, saved = now - 3 * HOUR, now - 174 * MINUTE
    steps = [step for step in steps if step[0] < failed - 10 * MINUTE]
    steps += [(failed - 6 * MINUTE, "offsite-backup", "start", ""),
              (failed, "offsite-backup", "1", OUTPUT),
              (now - 2 * DAY, "photos", "pause", ""),
              *((saved - 1, key, "", "") for key in LIVELY),
              (saved, "", "save", ""),  # from here on the lively ones come every few minutes
              (now - 100 * MINUTE, "database-dump", "", ""),
              (now - 47 * MINUTE, "transcoding", "start", "")]
    for minutes in range(2, 174, 4):
        for key in (*LIVELY, *["solar"] * (minutes % 40 == 2)):
            steps.append((now - minutes * MINUTE, key, "", ""))
    return sorted(steps)


def build(folder: Path, channels: str) -> str:
    """Fill a database with all that, up to now; returns the larm.toml to be served."""
    head = (f'url = "http://nas.lan:5276"\ntimezone = "{ZONE.key}"\n[channels]\n'
            f'phone = "{channels}/phone"\nmail = "{channels}/mail"\n')
    now = time.time_ns() // 1_000_000
    slow = MONITORS
    for interval in ('"5m"', '"10m"'):  # of the lively ones, until the last hours
        slow = slow.replace(f"interval = {interval}", 'interval = "2d"')
    house = House(folder, head + slow, FakeClock(now - 91 * DAY))

    def live_until(moment: int) -> None:
        while (left := moment - house.clock.now()) > 0:
            house.clock.advance(min(left, 6 * HOUR))
            house.deliver()

    for at, key, action, output in history(now):
        live_until(at)
        if action in ("pause", "save"):
            house.pause(key) if action == "pause" else house.save(head + MONITORS + NEW)
        else:
            house.ping(key, action, output, USER_AGENT="larm/0.2", X_FORWARDED_FOR="192.168.1.7")
            live_until(at + 4 * SECOND)  # people are told at once
    live_until(now)
    house.stop()
    return house.text


@contextlib.contextmanager
def serving() -> Iterator[Process]:
    """A real Larm that serves the demo house."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, receiver() as channels:
        process = launch(Path(folder), build(Path(folder), channels))
        process.ping("mistyped-token")
        try:
            yield process
        finally:
            process.stop()


def keep_alive(process: Process) -> None:
    """Ping what comes every few minutes, for ever."""
    monitors = process.get("/api/v1/monitors").json["data"]
    urls = [one["ping_url"] for one in monitors if one["id"] in LIVELY]
    while True:
        for url in urls:
            process.ping(url.rpartition("/")[2])
        time.sleep(60)


def take_picture(process: Process, path: Path) -> None:
    """The dashboard in light and in dark, side by side, in a PNG."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        halves = []
        for scheme in ("light", "dark"):
            page = chromium.new_page(viewport={"width": 1180, "height": 860}, color_scheme=scheme)
            page.goto(process.url)
            halves.append(base64.b64encode(page.screenshot()).decode())
        page = chromium.new_page(viewport={"width": 1480, "height": 540})
        levels = " ".join(f"{level / 31:.3f}" for level in range(32))  # fewer colours, fewer bytes
        few = "".join(f'<feFunc{one} type="discrete" tableValues="{levels}"/>' for one in "RGB")
        page.set_content(
            '<body style="display: flex; margin: 0; filter: url(#few)"><svg width="0" height="0">'
            '<filter id="few" color-interpolation-filters="sRGB"><feComponentTransfer>'
            f"{few}</feComponentTransfer></filter></svg>" + "".join(
                f'<img width="740" src="data:image/png;base64,{half}">' for half in halves))
        page.screenshot(path=path)
        chromium.close()
    if (size := path.stat().st_size) > PICTURE_LIMIT:
        sys.exit(f"{path} has {size} bytes; at most {PICTURE_LIMIT} are allowed")
    print(f"{path}: {size} bytes")


def main() -> None:
    with serving() as process:
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1])
            folder.mkdir(exist_ok=True)
            take_picture(process, folder / "dashboard.png")
            return
        print(f"The demo house: {process.url}/ (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            keep_alive(process)


if __name__ == "__main__":
    main()
