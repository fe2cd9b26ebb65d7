"""From a job that falls silent to the alert that arrives: real processes, webhooks and mail."""

from __future__ import annotations

import email
import email.policy
import time
from collections.abc import Iterator
from email.message import EmailMessage
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from conftest import (
    TOKEN,
    Process,
    free_port,
    in_ms,
    wait_until,
)

from larm import format_duration

JOB = f"""
[monitors.nightly-backup]
name = "Nightly backup"
interval = 1
grace = 1
token = "{TOKEN}"
note = "Runs on nås ✓; log in /var/log/backup.log"
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


def events(larm: Process) -> list[dict[str, Any]]:
    """Oldest first, in milliseconds."""
    found: list[dict[str, Any]] = in_ms(larm.get("/api/v1/events").json["data"])
    return found[::-1]


def text_of(mail: EmailMessage) -> str:
    part = mail.get_body(("plain", "html"))
    assert part is not None
    return str(part.get_content())


# Alerts


def test_silence_return_and_failure_are_one_alert_each_on_every_channel(start, webhooks, mailbox):
    webhook, other = webhooks(), webhooks()
    urls = channels(phone=webhook.url, mail=mailbox.url, other=other.url)
    job = JOB + 'notify = ["phone", "mail"]\n' + DAILY + 'notify = ["other"]\n'
    larm = start(urls + job.replace(TOKEN, "another-token-for-tests", 1))
    failed_at = time.time()
    larm.get(f"/api/heartbeat/{TOKEN}/3", "POST", "rsync: ✗ no space\n".encode())
    pinged_at = time.time()
    larm.ping("another-token-for-tests")

    down, down_mail = wait_until(lambda: webhook.alerts and mailbox.mails
                                 and (webhook.alerts[0], mailbox.mails[0]))  # fmt: skip
    alerted_at = time.time()
    [event] = [one for one in events(larm) if one["monitor"] == "nightly-backup"]
    assert event["at"] / 1000 == pytest.approx(pinged_at + 2, abs=0.5)
    assert alerted_at - event["at"] / 1000 < 5
    assert (down["title"], down["type"]) == ("DOWN: Nightly backup", "failure")
    assert str(down_mail["Subject"]) == "DOWN: Nightly backup"
    assert (down_mail["From"], down_mail["To"]) == ("larm@example.com", "me@example.com")
    for text in (down["message"], text_of(down_mail)):
        assert "Nightly backup is down: no heartbeat by 20" in text
        assert "Last heartbeat: 20" in text
        assert "every 1 s, with 1 s grace" in text
        assert "Runs on nås ✓; log in /var/log/backup.log" in text
        assert f"{larm.url}/monitor/nightly-backup" in text

    def up_again() -> bool:
        larm.ping("another-token-for-tests")  # and again, or it would be down before the alert
        return len(webhook.alerts) > 1 and len(mailbox.mails) > 1

    wait_until(up_again)
    [_, event] = [one for one in events(larm) if one["monitor"] == "nightly-backup"]
    lasted = format_duration(round(event["down_seconds"] * 1000))
    assert (webhook.alerts[1]["title"], webhook.alerts[1]["type"]) == (
        "UP: Nightly backup", "success"
    )  # fmt: skip
    for text in (webhook.alerts[1]["message"], text_of(mailbox.mails[1])):
        assert f"Nightly backup is up again, after {lasted} down" in text
    assert webhook.titles() == mailbox.subjects() == ["DOWN: Nightly backup", "UP: Nightly backup"]

    [failure] = other.alerts
    assert other.arrived[0] - failed_at < 5
    assert failure["title"] == "DOWN: job"
    assert "exit status 3" in failure["message"]
    assert "rsync: ✗ no space" in failure["message"]


def test_a_channel_that_hangs_delays_no_other_and_gets_its_alert_after_a_kill_9(start, webhooks):
    hanging, working = webhooks(), webhooks()
    hanging.answer = "hang"
    toml = channels(hanging=hanging.url, working=working.url) + DAILY
    larm = start(toml)
    failed_at = time.time()
    larm.ping(action="/fail")
    wait_until(lambda: working.alerts)
    assert working.arrived[0] - failed_at < 4.5
    wait_until(lambda: hanging.refused and "sent" in [
        one["state"] for one in events(larm)[0]["deliveries"]])  # fmt: skip
    larm.kill()
    hanging.answer = 200
    again = start(toml, port=larm.port)
    wait_until(lambda: hanging.alerts, seconds=20)
    wait_until(lambda: {one["state"] for one in events(again)[0]["deliveries"]} == {"sent"})
    assert hanging.titles() == working.titles() == ["DOWN: job"]
    assert len(events(again)) == 1


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
    viewer = {"Authorization": "Bearer a-dashboard-password"}
    url = larm.get("/api/v1/monitors/made", headers=viewer).json["data"]["ping_url"]
    made_token = url.rpartition("/")[2]
    larm.ping(made_token)
    larm.ping(action="/no-such-action")
    larm.ping(action="/fail")
    larm.get("/", headers={"Authorization": "Bearer a-wrong-password"})
    larm.get(f"/{TOKEN}")
    larm.get(f"/%0a{TOKEN}/%ff", "POST", b"x")
    wait_until(lambda: working.alerts and larm.log.count("not sent") == 2)
    larm.stop()
    for unwanted in (TOKEN, made_token, "a-dashboard-password", "a-wrong-password",
                     "hunter2secret", "a-path", "secret-key", "another-path", "to-nowhere",
                     "json://", "heartbeat/", "HTTP/1", "Traceback", "no-such-action"):  # fmt: skip
        assert unwanted not in larm.log
    assert "working: sent DOWN: job" in larm.log


