"""From a job that falls silent to the alert that arrives: real processes, webhooks and mail."""

from __future__ import annotations

import email
import email.policy
import os
import re
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from conftest import TOKEN, Process, Webhook, free_port, run_larm, wait_until, write_config

from larm import format_duration

JOB = f"""
[monitors.nightly-backup]
name = "Nightly backup"
interval = 2
grace = 1
token = "{TOKEN}"
note = "Runs on nas; log in /var/log/backup.log"
"""
DAILY = f'[monitors.job]\ninterval = "1d"\ntoken = "{TOKEN}"\n'
STOP_WITHIN = 5  # seconds


class Mailbox:
    """A real SMTP server that keeps what it gets."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.port = free_port()
        self.controller = Controller(self, hostname="127.0.0.1", port=self.port)

    async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:
        mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        return "250 kept"

    @property
    def url(self) -> str:
        return f"mailto://127.0.0.1:{self.port}?from=larm@example.com&to=me@example.com"

    def subjects(self) -> list[str]:
        return [str(mail["Subject"]) for mail in self.mails]


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    box = Mailbox()
    box.controller.start()
    yield box
    box.controller.stop()


def channels(**urls: str) -> str:
    return "[channels]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())


def events(larm: Process) -> list[str]:
    return [row["type"] for row in larm.rows("SELECT type FROM events ORDER BY id")]


def kill(larm: Process) -> None:
    larm.popen.kill()
    larm.popen.wait()


# Alerts


def test_silence_and_return_are_one_alert_each_on_every_channel(start, webhook, mailbox):
    larm = start(channels(phone=webhook.url, mail=mailbox.url) + JOB)
    pinged_at = time.time()
    larm.ping()

    down, down_mail = wait_until(lambda: webhook.alerts and mailbox.mails
                                 and (webhook.alerts[0], mailbox.mails[0]))  # fmt: skip
    alerted_at = time.time()
    [event] = larm.rows("SELECT * FROM events")
    assert event["at"] / 1000 == pytest.approx(pinged_at + 3, abs=0.5)
    assert alerted_at - event["at"] / 1000 < 5
    assert (down["title"], down["type"]) == ("DOWN: Nightly backup", "failure")
    assert str(down_mail["Subject"]) == "DOWN: Nightly backup"
    assert (down_mail["From"], down_mail["To"]) == ("larm@example.com", "me@example.com")
    for text in (down["message"], text_of(down_mail)):
        assert "Nightly backup is down: no heartbeat by 20" in text
        assert "Last heartbeat: 20" in text
        assert "every 2 s, with 1 s grace" in text
        assert "Runs on nas; log in /var/log/backup.log" in text
        assert f"{larm.url}/monitor/nightly-backup" in text

    def up_again() -> bool:
        larm.ping()  # and again, or it would be down again before the alert is there
        return len(webhook.alerts) > 1 and len(mailbox.mails) > 1

    wait_until(up_again)
    up, up_mail = webhook.alerts[1], mailbox.mails[1]
    [_, event] = larm.rows("SELECT * FROM events ORDER BY id")
    lasted = format_duration(event["down_ms"])
    assert (up["title"], up["type"]) == ("UP: Nightly backup", "success")
    for text in (up["message"], text_of(up_mail)):
        assert f"Nightly backup is up again, after {lasted} down" in text

    assert larm.stop() == 0
    assert events(larm) == ["down", "up"]
    assert webhook.titles() == mailbox.subjects() == ["DOWN: Nightly backup", "UP: Nightly backup"]


def text_of(mail: EmailMessage) -> str:
    part = mail.get_body(("plain", "html"))
    assert part is not None
    return str(part.get_content())


def test_a_failure_is_alerted_with_its_exit_status_and_output(start, webhook, mailbox):
    larm = start(channels(phone=webhook.url, mail=mailbox.url) + DAILY)
    larm.get(f"/api/heartbeat/{TOKEN}/3", "POST", "rsync: ✗ no space left\n".encode())
    wait_until(lambda: webhook.alerts and mailbox.mails)
    for text in (webhook.alerts[0]["message"], text_of(mailbox.mails[0])):
        assert "exit status 3" in text
        assert "rsync: ✗ no space left" in text


def test_an_alert_that_a_kill_9_came_before_arrives_after_the_restart(start, webhooks):
    broken, hanging = webhooks(), webhooks()
    broken.answer, hanging.answer = 500, "hang"
    toml = channels(broken=broken.url, hanging=hanging.url) + DAILY
    larm = start(toml)
    larm.ping(action="/fail")
    wait_until(lambda: broken.refused)
    kill(larm)
    broken.answer = hanging.answer = 200
    again = start(toml, port=larm.port)
    wait_until(lambda: broken.alerts and hanging.alerts, seconds=20)
    wait_until(lambda: not again.rows("SELECT * FROM deliveries WHERE state <> 'sent'"))
    assert broken.titles() == hanging.titles() == ["DOWN: job"]
    assert events(again) == ["down"]


def test_a_channel_that_hangs_delays_no_other(start, webhooks):
    hanging, working = webhooks(), webhooks()
    hanging.answer = "hang"
    larm = start(channels(hanging=hanging.url, working=working.url) + DAILY)
    failed_at = time.time()
    larm.ping(action="/fail")
    wait_until(lambda: working.alerts, seconds=4)
    assert working.arrived[0] - failed_at < 4
    assert hanging.titles() == []


def test_a_stop_is_held_against_no_job(start, webhook):
    toml = channels(phone=webhook.url) + JOB
    larm = start(toml)
    larm.ping()
    larm.stop()
    time.sleep(3.5)  # more than the interval and the grace, and it can't be had any faster
    again = start(toml, port=larm.port)
    time.sleep(1.5)  # a tick, at least, and no more than what was left
    again.ping()
    assert (events(again), webhook.alerts) == ([], [])
    assert again.rows("SELECT state FROM monitors") == [{"state": "up"}]


# Stopping


@pytest.fixture
def stopping(start, webhook) -> Callable[[], Process]:
    """stopping(): a Larm in the middle of things: a channel hangs, and clients hold connections."""
    webhook.answer = "hang"
    clients: list[socket.socket] = []

    def build() -> Process:
        larm = start(channels(phone=webhook.url) + DAILY)
        larm.ping(action="/fail")
        for sent in (b"", b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx",
                     b"GET /health HTTP/1.1\r\n\r\n"):  # fmt: skip
            client = socket.create_connection(("127.0.0.1", larm.port), timeout=10)
            client.sendall(sent)
            clients.append(client)
        clients[-1].recv(1_000)  # answered, and kept open
        wait_until(lambda: connected_to(larm, webhook))
        return larm

    yield build
    for client in clients:
        client.close()


def connected_to(larm: Process, webhook: Webhook) -> bool:
    """Whether the process has a connection to that port, in the kernel's words."""
    target = f"0100007F:{webhook.port:04X} 01"
    table = Path(f"/proc/{larm.popen.pid}/net/tcp").read_text()
    return target in table


def stop_well(larm: Process, number: int) -> None:
    """Send the signal; what a stop leaves behind is as it has to be."""
    signalled_at = time.time()
    assert larm.stop(number) == 0
    assert time.time() - signalled_at < STOP_WITHIN
    assert not list(larm.folder.glob("larm.db-*"))  # the WAL is closed
    [row] = larm.rows("SELECT alive_at FROM clock")
    assert signalled_at - 0.01 <= row["alive_at"] / 1000 <= time.time()
    assert "Traceback" not in larm.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_well(start, number):
    larm = start(DAILY)
    larm.ping()
    stop_well(larm, number)


def test_a_signal_stops_it_well_whatever_hangs(stopping):
    stop_well(stopping(), signal.SIGTERM)


def test_a_second_signal_does_no_harm(start):
    larm = start(DAILY)
    larm.ping()
    larm.popen.send_signal(signal.SIGTERM)
    stop_well(larm, signal.SIGINT)


# What keeps it from starting


def refusal(folder: Path, toml: str, listen: str = "") -> str:
    """The one line on stderr with which it does not start."""
    write_config(folder, f'listen = "{listen or f"127.0.0.1:{free_port()}"}"\n{toml}')
    done = run_larm(folder)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert "Traceback" not in line
    return line


def test_a_port_in_use_is_one_clear_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refusal(tmp_path, DAILY, f"127.0.0.1:{port}")
    assert f"127.0.0.1:{port} can't be used: Address already in use" in line


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid", "[2001:db8::1]"])
def test_an_address_that_is_not_here_is_one_clear_line(tmp_path, host):
    assert f"{host.strip('[]')}" in refusal(tmp_path, DAILY, f"{host}:5276")


def test_a_refused_start_leaves_the_wal_closed(tmp_path):
    refusal(tmp_path, DAILY, "203.0.113.1:5276")
    assert not list(tmp_path.glob("larm.db-*"))


def test_a_missing_database_folder_is_one_clear_line(tmp_path):
    line = refusal(tmp_path, 'database = "nowhere/larm.db"\n' + DAILY)
    assert "nowhere/larm.db" in line
    assert "No such file or directory" in line


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder that can't be written, not even by root."""
    folder = tmp_path / "unwritable"
    folder.mkdir(mode=0o500)
    if os.geteuid() != 0:
        yield folder
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"root can write everywhere here: no read-only tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_database_folder_that_is_not_writable_is_one_clear_line(tmp_path, unwritable):
    line = refusal(tmp_path, f'database = "{unwritable}/larm.db"\n' + DAILY)
    assert re.search("unwritable/larm.db.*(Read-only file system|Permission denied)", line)


def test_a_database_that_is_a_folder_is_one_clear_line(tmp_path):
    (tmp_path / "larm.db").mkdir()
    assert "larm.db: can't be used as the database: Is a directory" in refusal(tmp_path, DAILY)


def test_a_database_of_a_newer_larm_is_one_clear_line(tmp_path):
    with closing(sqlite3.connect(tmp_path / "larm.db")) as db:
        db.execute("PRAGMA user_version = 999")
    assert "newer Larm" in refusal(tmp_path, DAILY)


def test_another_programs_database_is_one_clear_line_and_stays_as_it_is(tmp_path):
    with closing(sqlite3.connect(tmp_path / "larm.db")) as db:
        db.execute("CREATE TABLE monitors (id INTEGER)")
    before = (tmp_path / "larm.db").read_bytes()
    assert "another program" in refusal(tmp_path, DAILY)
    assert (tmp_path / "larm.db").read_bytes() == before


def test_what_is_no_database_is_one_clear_line_and_stays_as_it_is(tmp_path):
    (tmp_path / "larm.db").write_text("my diary\n" * 1_000)
    assert "not a database" in refusal(tmp_path, DAILY)
    assert (tmp_path / "larm.db").read_text() == "my diary\n" * 1_000


def test_a_second_larm_on_the_same_database_is_one_clear_line(start):
    larm = start(DAILY)
    line = refusal(larm.folder, DAILY)
    assert f"another Larm (process {larm.popen.pid}) is running" in line
    assert larm.ping().status == 200


def test_a_larm_that_was_killed_is_no_second_one(start):
    larm = start(DAILY)
    kill(larm)
    assert start(DAILY, port=larm.port).ping().status == 200


# The log (law 9)


def test_no_secret_and_no_request_is_in_the_log(start, webhooks):
    refusing, working = webhooks(), webhooks()
    refusing.answer = 500
    urls = {
        "refusing": f"json://me:hunter2secret@127.0.0.1:{refusing.port}/a-path?+Key=secret-key",
        "working": f"{working.url}/another-path",
        "gone": "json://127.0.0.1:9/the-path-to-nowhere",
    }
    made = '[monitors.made]\ninterval = "1d"\n'
    larm = start('password = "a-dashboard-password"\n' + channels(**urls) + DAILY + made)
    [row] = larm.rows("SELECT made_token FROM monitors WHERE key = 'made'")
    larm.ping(row["made_token"])
    larm.ping(action="/fail")
    larm.get("/", headers={"Authorization": "Bearer a-dashboard-password"})
    larm.get("/", headers={"Authorization": "Bearer a-wrong-password"})
    larm.get(f"/{TOKEN}")
    larm.get(f"/%0a{TOKEN}/%ff", "POST", b"x")
    wait_until(lambda: working.alerts and larm.log.count("not sent") == 2)
    larm.stop()
    for unwanted in (TOKEN, row["made_token"], "a-dashboard-password", "a-wrong-password",
                     "hunter2secret", "a-path", "secret-key", "another-path", "to-nowhere",
                     "json://", "heartbeat/", "HTTP/1", "Traceback"):  # fmt: skip
        assert unwanted not in larm.log
    assert "working: sent DOWN: job" in larm.log
