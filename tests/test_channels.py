"""Channels with real other ends: mail, an ntfy-like service, JSON and forms, plugins."""

from __future__ import annotations

import email
import email.policy
import html
import html.parser
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from conftest import TOKEN, House, Process, Webhook, free_port, launch, wait_until

import larm as program

SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000


def channel(*urls: str, **named: str) -> str:
    """[channels] with "phone" of these URLs, and others."""
    text = f"[channels]\nphone = {json.dumps(list(urls))}\n" if urls else "[channels]\n"
    return text + "".join(f'{name} = "{url}"\n' for name, url in named.items())


def monitor(key: str = "job", name: str = "", note: str = "") -> str:
    table = f'[monitors.{key}]\ninterval = "1h"\ntoken = "{TOKEN}-{key}"\n'
    table += f"name = {json.dumps(name, ensure_ascii=False)}\n" if name else ""
    return table + (f"note = {json.dumps(note, ensure_ascii=False)}\n" if note else "")


def deliver(larm: House, after_ms: int = 3 * SECOND, to: str = "phone") -> None:
    larm.clock.advance(after_ms)
    while larm.notifier.attempt(to):
        pass


def states(larm: House) -> list[str]:
    return [row["state"] for row in larm.rows("SELECT state FROM deliveries ORDER BY id")]


def error(larm: House) -> str:
    return str(larm.rows("SELECT error FROM deliveries ORDER BY id")[-1]["error"])


@dataclass
class Mailbox:
    """A real SMTP server. `answer`: what a message gets: an SMTP reply, or "drop"."""

    port: int
    answer: str = "250 OK"
    messages: list[EmailMessage] = field(default_factory=list)
    refused: int = 0
    rcpt_answer: str = "250 OK"

    @property
    def url(self) -> str:
        return (f"mailto://127.0.0.1:{self.port}/?mode=insecure&from=larm@sender.example"
                "&to=oncall@receiver.example&cto=2&rto=2")

    async def handle_RCPT(self, _: Any, __: Any, envelope: Any, address: str, ___: Any) -> str:
        if self.rcpt_answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        else:
            self.refused += 1
        return self.rcpt_answer

    async def handle_DATA(self, server: Any, _: Any, envelope: Any) -> str:
        if self.answer.startswith("250"):
            self.messages.append(
                email.message_from_bytes(envelope.content, policy=email.policy.default)
            )
        else:
            self.refused += 1
        if self.answer == "drop":
            server.transport.abort()
        return self.answer


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox(free_port())
    controller = Controller(mailbox, hostname="127.0.0.1", port=mailbox.port)
    controller.start()
    yield mailbox
    controller.stop()


@dataclass
class Service:
    """An HTTP service that keeps what it is sent: paths, headers and bodies. `answer`: a status;
    "ntfy": as an ntfy server of one's own does, that takes messages of 4,096 bytes and no files.
    """

    port: int
    requests: list[tuple[str, Any, bytes]] = field(default_factory=list)
    answer: int | str = 200
    refused: int = 0
    slow: threading.Event | None = None

    @property
    def published(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, _, body in self.requests]


@pytest.fixture
def service() -> Iterator[Service]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if service.slow:
                service.slow.wait(30)
            status = service.answer
            if status == "ntfy":
                is_message = self.path == "/" and len(body) <= 8_192
                fits = is_message and len(json.loads(body)["message"].encode()) <= 4_096
                status = 200 if fits else 400
            if status == 200:
                service.requests.append((self.path, self.headers, body))
            else:
                service.refused += 1
            self.send_response(int(status))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"id": "1", "event": "message"}')

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service = Service(server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield service
    server.shutdown()
    server.server_close()


def parts(message: EmailMessage) -> dict[str, str]:
    return {part.get_content_type(): part.get_content().replace("\r\n", "\n")
            for part in message.walk() if not part.is_multipart()}


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}


def shown(page: str) -> str:
    """What a reader sees of HTML, line by line."""
    text = re.sub(r"<br ?/?>\s*", "\n", page)
    return html.unescape(re.sub(r"<[^>]*>", "", text)).replace("\u00a0", " ").strip()


# Mail


def test_an_alert_comes_by_mail_with_a_subject_and_a_readable_text(house, mailbox):
    larm = house(channel(mailbox.url) + monitor(name="Nightly backup", note="Runs on nas"))
    larm.ping("job", "3", body="no space left")
    deliver(larm)
    [message] = mailbox.messages
    assert message["Subject"] == "DOWN: Nightly backup"
    assert "larm@sender.example" in message["From"]
    for text in parts(message).values():
        lines = shown(text).splitlines()
        assert lines[0].startswith("Nightly backup is down: exit status 3")
        assert [line for line in lines[1:] if line] == [
            "Output:", "no space left", "Runs on nas", "http://127.0.0.1:5276/monitor/job",
        ]


@pytest.mark.parametrize("where", ["answer", "rcpt_answer"])
def test_a_greylisted_mail_is_tried_again_and_comes_once(house, mailbox, where):
    setattr(mailbox, where, "451 4.7.1 Greylisted, try again later")
    larm = house(channel(mailbox.url) + monitor())
    larm.ping("job", "fail")
    deliver(larm)
    deliver(larm, 11 * SECOND)
    assert (states(larm), mailbox.messages) == (["pending"], [])
    setattr(mailbox, where, "250 OK")
    deliver(larm, MINUTE)
    deliver(larm, HOUR)
    assert states(larm) == ["sent"]
    assert [message["Subject"] for message in mailbox.messages] == ["DOWN: job"]


def test_a_rejected_mail_stays_pending_with_the_reason_and_without_the_address(house, mailbox):
    mailbox.answer = "550 5.1.1 No such user"
    larm = house(channel(mailbox.url) + monitor())
    larm.ping("job", "fail")
    deliver(larm)
    assert states(larm) == ["pending"]
    assert error(larm) not in ("", "None")
    assert "oncall" not in error(larm)


def test_a_mail_server_that_drops_the_connection_is_tried_again(house, mailbox):
    mailbox.answer = "drop"
    larm = house(channel(mailbox.url) + monitor())
    larm.ping("job", "fail")
    deliver(larm)
    assert states(larm) == ["pending"]
    mailbox.answer = "250 OK"
    deliver(larm, MINUTE)
    assert states(larm) == ["sent"]
    assert len(mailbox.messages) == 1


# An ntfy-compatible service, JSON and forms


def test_an_alert_comes_by_ntfy(house, service):
    larm = house(channel(f"ntfy://127.0.0.1:{service.port}/my-topic") + monitor(name="Bäckup 🎉"))
    larm.ping("job", "fail")
    deliver(larm)
    [published] = service.published
    assert published["topic"] == "my-topic"
    assert published["title"] == "DOWN: Bäckup 🎉"
    assert "Bäckup 🎉 is down: the job reported a failure" in published["message"]


def test_a_long_digest_keeps_to_what_ntfy_takes_in_one_message(house, service):
    service.answer = "ntfy"
    url = f"ntfy://127.0.0.1:{service.port}/my-topic"
    keys = [f"job-{number:03}" for number in range(400)]
    larm = house(channel(url) + "".join(monitor(key) for key in keys))
    for key in keys:
        larm.ping(key, "fail")
    deliver(larm)
    [published] = service.published
    assert published["title"] == "DOWN: 400 monitors"
    named = set(re.findall(r"job-\d{3}", published["message"]))
    more = re.search(r"And (\d+) more: http://127.0.0.1:5276/$", published["message"])
    assert len(named) + int(more[1]) == 400


@pytest.mark.parametrize("letter", ["x", "ж"])
def test_an_alert_with_much_output_keeps_to_what_ntfy_takes(house, service, letter):
    service.answer = "ntfy"
    larm = house(channel(f"ntfy://127.0.0.1:{service.port}/my-topic") + monitor(note="n" * 2_000))
    larm.ping("job", "1", body=f"{letter * 400}\n" * 12)
    deliver(larm)
    assert states(larm) == ["sent"]
    assert service.published[0]["title"] == "DOWN: job"


def test_an_alert_comes_as_a_form(house, service):
    larm = house(channel(f"form://127.0.0.1:{service.port}/hook") + monitor(name="A & B = 100 %"))
    larm.ping("job", "fail")
    deliver(larm)
    [(path, _, body)] = service.requests
    sent = dict(urllib.parse.parse_qsl(body.decode()))
    assert path == "/hook"
    assert sent["title"] == "DOWN: A & B = 100 %"
    assert "A & B = 100 % is down" in sent["message"]


@pytest.mark.parametrize("answer", [301, 400, 401, 403, 404, 429, 500, 503])
def test_any_other_answer_than_a_success_is_none(house, service, answer):
    service.answer = answer
    larm = house(channel(f"json://127.0.0.1:{service.port}/a-secret-path") + monitor())
    larm.ping("job", "fail")
    deliver(larm)
    assert states(larm) == ["pending"]
    assert "a-secret-path" not in error(larm)


def test_a_service_that_hangs_longer_than_its_timeout_has_not_accepted(house, service):
    service.slow = threading.Event()
    larm = house(channel(f"json://127.0.0.1:{service.port}/?rto=0.2") + monitor())
    larm.ping("job", "fail")
    deliver(larm)
    service.slow.set()
    assert states(larm) == ["pending"]


@pytest.mark.parametrize(
    "url",
    [
        "json://127.0.0.1:1/a-secret-path", "json://no-such-host.invalid/a-secret-path",
        "ntfy://127.0.0.1:1/a-secret-path", "ntfy://no-such-host.invalid/a-secret-path",
        "mailto://127.0.0.1:1/?mode=insecure&from=a@b.example&to=a-secret-path@c.example",
        "mailto://u:p@no-such-host.invalid/?smtp=no-such-host.invalid&to=a-secret-path@c.example",
    ],
)
def test_without_the_internet_an_alert_stays_pending_with_a_reason_that_shows_no_secret(
    house, url
):
    larm = house(channel(url) + monitor())
    larm.ping("job", "fail")
    deliver(larm)
    assert states(larm) == ["pending"]
    assert error(larm) not in ("", "None")
    assert "a-secret-path" not in error(larm)


def test_what_comes_back_after_it_disappeared_gets_what_it_missed_with_the_time(house, service):
    port = free_port()
    larm = house(channel(f"json://127.0.0.1:{port}/") + monitor())
    larm.ping("job", "fail")
    deliver(larm)
    larm.reload(larm.text.replace(str(port), str(service.port)))
    deliver(larm, HOUR)
    [sent] = service.published
    assert sent["title"] == "DOWN: job"
    assert "2027-01-15 08:00:00+00:00" in sent["message"]
    assert "This alert is late" in sent["message"]


# A channel of several URLs


def test_a_url_that_is_dead_repeats_nothing_to_the_good_one(house, webhook):
    larm = house(channel(webhook.url, "json://127.0.0.1:1/") + monitor())
    larm.ping("job", "fail")
    for _ in range(12):
        deliver(larm, HOUR)
    assert webhook.titles() == ["DOWN: job"]
    assert states(larm) == ["pending"]


@pytest.mark.parametrize("dead_first", [False, True])
def test_beside_a_dead_url_the_good_one_gets_each_later_alert_once(house, webhook, dead_first):
    urls = [webhook.url, "json://127.0.0.1:1/"]
    urls = urls[::-1] if dead_first else urls
    larm = house(channel(*urls) + monitor("one") + monitor("two"))
    for key, action in [("one", "fail"), ("two", "fail"), ("one", ""), ("two", "")]:
        larm.ping(key, action)
        for _ in range(3):
            deliver(larm, 10 * MINUTE)
    assert len(webhook.alerts) == 4
    assert [title[:4] for title in webhook.titles()] == ["DOWN", "DOWN", "UP: ", "UP: "]


def test_a_url_that_comes_back_gets_what_it_missed_and_the_good_one_nothing_again(
    house, webhooks
):
    good, bad = webhooks(), webhooks()
    bad.answer = 500
    larm = house(channel(good.url, bad.url) + monitor("one") + monitor("two"))
    larm.ping("one", "fail")
    deliver(larm)
    larm.ping("two", "fail")
    deliver(larm)
    bad.answer = 200
    deliver(larm, HOUR)
    assert good.titles() == ["DOWN: one", "DOWN: two"]
    assert bad.titles() == ["DOWN: 2 monitors"]
    assert states(larm) == ["sent", "sent"]


# Bad input: nothing that comes from outside steers what shows it

NASTY = {
    "markdown": "**bold** [click](http://evil.example) `code` # x _y_ ~z~ > q",
    "html": "<script>alert(1)</script><img src=x onerror=alert(2)> & &lt; \"quoted\" 'single'",
    "links": "<a href='http://evil.example'>your bank</a>",
    "emoji": "🎉 ✅ é ß 漢字",
    "rtl": "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "templates": "{{7*7}} ${HOME} %s %(x)s {0} \\n $(id)",
}


@pytest.mark.parametrize("text", NASTY.values(), ids=list(NASTY))
def test_a_plain_channel_shows_names_notes_and_output_as_they_are(house, webhook, text):
    larm = house(channel(webhook.url + "?format=text") + monitor(name=text, note=text))
    larm.ping("job", "1", body=text)
    deliver(larm)
    [alert] = webhook.alerts
    assert alert["title"] == f"DOWN: {text}"
    assert alert["message"].splitlines()[0].startswith(f"{text} is down: exit status 1")
    assert alert["message"].splitlines().count(text) == 2


@pytest.mark.parametrize("text", NASTY.values(), ids=list(NASTY))
@pytest.mark.parametrize("kind", ["json", "mail"])
def test_html_shows_the_same_text_and_nothing_that_was_injected(
    house, webhook, mailbox, text, kind
):
    url = webhook.url + "?format=html" if kind == "json" else mailbox.url + "&format=html"
    larm = house(channel(url) + monitor(name=text, note=text))
    larm.ping("job", "1", body=text)
    deliver(larm)
    if kind == "json":
        [alert] = webhook.alerts
        title, page = alert["title"], alert["message"]
    else:
        [message] = mailbox.messages
        title, page = message["Subject"], parts(message)["text/html"]
        assert " ".join(text.split()) in " ".join(parts(message)["text/plain"].split())
    assert title == f"DOWN: {text}"
    found = Tags(page)
    assert found.tags <= {"html", "head", "body", "br", "p", "div", "pre"}
    assert found.attributes == set()
    lines = [" ".join(line.split()) for line in shown(page).splitlines()]
    assert lines.count(" ".join(text.split())) == 2


def test_html_in_a_digest_injects_nothing(house, webhook):
    keys = [f"job-{number}" for number in range(30)]
    larm = house(channel(webhook.url + "?format=html")
                 + "".join(monitor(key, f"<b>{key}</b>") for key in keys))
    for key in keys:
        larm.ping(key, "fail")
    deliver(larm)
    [alert] = webhook.alerts
    assert Tags(alert["message"]).tags <= {"br", "p"}
    assert all(f"<b>{key}</b>" in shown(alert["message"]) for key in keys)


@pytest.mark.parametrize(
    ("output", "seen"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://evil.example\x1b\\a link\x1b]8;;\x1b\\", "a link"),
        ("a\x00b\x07c\x08d", "abcd"),
        ("\u202eevil\u202c", "evil"),
        ("\u2066x\u2069", "x"),
        ("50 %\rdone", "done"),
        ("one\r\ntwo", "one\ntwo"),
        ("tab\there", "tab\there"),
    ],
)
def test_output_steers_no_terminal_and_turns_no_reading_direction(house, webhook, output, seen):
    larm = house(channel(webhook.url) + monitor())
    larm.ping("job", "1", body=output)
    deliver(larm)
    text = webhook.alerts[0]["message"]
    assert text.partition("Output:\n")[2].rpartition("\nhttp://")[0] == seen


def test_output_of_long_lines_is_cut_to_what_people_read(house, webhook):
    larm = house(channel(webhook.url) + monitor(note="n" * 50_000))
    larm.ping("job", "1", body=("x" * 10_000 + "\n") * 5)
    deliver(larm)
    [alert] = webhook.alerts
    assert len(alert["message"]) < 6_000
    assert alert["message"].endswith("http://127.0.0.1:5276/monitor/job")


def test_a_name_of_10_kb_is_cut_in_title_and_text_and_where_others_name_it(house, webhook):
    larm = house(channel(webhook.url) + monitor(name="n" * 10_000)
                 + monitor("other", "m" * 10_000) + 'depends_on = ["job"]\n')
    larm.ping("job", "fail")
    deliver(larm)
    [alert] = webhook.alerts
    assert len(alert["title"]) < 250
    assert len(alert["message"]) < 2_000


def test_a_mail_s_headers_hold_nothing_of_the_job_s_output(house, mailbox):
    larm = house(channel(mailbox.url) + monitor(name="a Bcc: x@evil.example"))
    larm.ping("job", "1", body="x\r\nBcc: victim@evil.example\r\n\r\n.\r\nQUIT")
    deliver(larm)
    [message] = mailbox.messages
    assert message["Bcc"] is None
    assert "Bcc: victim@evil.example" in parts(message)["text/plain"]


def test_a_line_with_a_single_dot_does_not_end_the_mail(house, mailbox):
    larm = house(channel(mailbox.url + "&format=text") + monitor(note="the note"))
    larm.ping("job", "1", body="before\n.\nafter")
    deliver(larm)
    lines = parts(mailbox.messages[0])["text/plain"].splitlines()
    assert lines[lines.index("before"):][:4] == ["before", ".", "after", "the note"]


# Plugins of Apprise's, or one's own, that misbehave

PLUGINS = """
import logging, sys
from apprise.decorators import notify
import larm

SECRET = "hunter2-is-secret"

@notify(on="raises")
def raises(body, title, notify_type, meta, **_):
    raise RuntimeError("can't reach " + str(meta["url"]))

@notify(on="prints")
def prints(body, title, notify_type, meta, **_):
    print("sending to", meta["url"], flush=True)
    print("sending to", meta["url"], file=sys.stderr, flush=True)

@notify(on="logs")
def logs(body, title, notify_type, meta, **_):
    for name in ("apprise", "requests", "a_plugin", ""):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "posting to %s", meta["url"])
    return False

@notify(on="exits")
def exits(body, title, notify_type, meta, **_):
    raise SystemExit(3)

larm.main(sys.argv[1:] or ["serve"])
"""
SECRET = "hunter2-is-secret"


@pytest.fixture
def plugged(tmp_path, webhook) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def run(*schemes: str) -> Process:
        named = {scheme: f"{scheme}://user:{SECRET}@host/{SECRET}" for scheme in schemes}
        started.append(
            launch(tmp_path, channel(good=webhook.url, **named) + monitor(), code=PLUGINS)
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()


def test_plugins_that_raise_print_or_log_are_caught_and_show_no_secret(
    plugged, webhook: Webhook
):
    larm = plugged("raises", "prints", "logs")
    larm.ping(f"{TOKEN}-job", "/fail")
    tried = "SELECT channel, state, error FROM deliveries WHERE attempts > 0"
    wait_until(lambda: len(larm.rows(tried)) == 4)
    found = {row["channel"]: row for row in larm.rows(tried)}
    assert webhook.titles() == ["DOWN: job"]
    assert found["raises"]["state"] == found["logs"]["state"] == "pending"
    assert found["raises"]["error"]
    assert found["logs"]["error"]
    assert not any(SECRET in str(row["error"]) for row in found.values())
    assert larm.get("/health").status == 200
    assert SECRET not in larm.log


def test_a_plugin_that_raises_systemexit_ends_nothing_and_is_tried_again(plugged, webhook):
    larm = plugged("exits")
    larm.ping(f"{TOKEN}-job", "/fail")
    wait_until(lambda: webhook.alerts)
    tried = "SELECT state, error FROM deliveries WHERE channel = 'exits' AND attempts > 0"
    wait_until(lambda: larm.rows(tried))
    assert larm.rows(tried)[0]["state"] == "pending"
    assert larm.get("/health").status == 200


def test_an_error_is_on_one_line_and_short(monkeypatch):
    def fails(*_: object, **__: object) -> bool:
        raise RuntimeError("several\nlines " * 100)

    monkeypatch.setattr(program._apprise().Apprise, "notify", fails)
    found = program.send(["json://127.0.0.1:1/"], "title", "body", "info")
    assert "\n" not in found
    assert len(found) <= 300
