"""Channels with real other ends: mail, an ntfy-like service, JSON and forms, plugins; and what may
stand in an alert.
"""

from __future__ import annotations

import email
import email.policy
import html
import html.parser
import json
import logging
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import apprise
import markdown
import pytest
import requests
from aiosmtpd.controller import Controller
from conftest import ROOT, TOKEN, House, free_port, launch, wait_until
from receivers import Phone, channels, deliveries, live, ping_all, service, states
from receivers import monitor as table

from larm import HOUR, MINUTE, SECOND


def monitor(key: str = "job", **more: object) -> str:
    return table(key, "1d", "1h", **more)


def error(larm: House, channel: str = "phone") -> str:
    return str(deliveries(larm, channel)[-1]["error"])


@pytest.fixture
def phone() -> Phone:
    return Phone()


@dataclass
class Mailbox:
    """A real SMTP server. `answer`: what a message gets: an SMTP reply, or "drop"."""

    port: int
    answer: str = "250 OK"
    rcpt_answer: str = "250 OK"
    messages: list[EmailMessage] = field(default_factory=list)

    @property
    def url(self) -> str:
        return (f"mailto://127.0.0.1:{self.port}/?mode=insecure&from=larm@sender.example"
                "&to=oncall@receiver.example&cto=2&rto=2")

    async def handle_RCPT(self, _: Any, __: Any, envelope: Any, address: str, ___: Any) -> str:
        if self.rcpt_answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return self.rcpt_answer

    async def handle_DATA(self, server: Any, _: Any, envelope: Any) -> str:
        if self.answer.startswith("250"):
            self.messages.append(
                email.message_from_bytes(envelope.content, policy=email.policy.default)
            )
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
    """An HTTP service that keeps what it is sent: paths and bodies. `answer`: a status; "ntfy": as
    an ntfy server of one's own does, that takes messages of 4,096 bytes and no files.
    """

    port: int
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    answer: int | str = 200

    @property
    def published(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.requests]


@pytest.fixture
def http() -> Iterator[Service]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = service.answer
            if status == "ntfy":
                is_message = self.path == "/" and len(body) <= 8_192
                fits = is_message and len(json.loads(body)["message"].encode()) <= 4_096
                status = 200 if fits else 400
            if status == 200:
                service.requests.append((self.path, body))
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


def rendered(text: str) -> str:
    """Markdown as HTML, each of CommonMark's escaped characters standing for itself."""
    escaped = re.sub(r"\\([!-/:-@[-`{-~])", lambda found: f"&#{ord(found[1])};", text)
    return markdown.markdown(escaped, extensions=["nl2br"])


# Mail


def test_an_alert_comes_by_mail_with_a_subject_and_a_readable_text(house, mailbox):
    larm = house(channels(phone=mailbox.url) + monitor(name="Nightly backup", note="Runs on nas"))
    larm.ping("job", "3", body="no space left")
    live(larm)
    [message] = mailbox.messages
    assert message["Subject"] == "DOWN: Nightly backup"
    assert "larm@sender.example" in message["From"]
    for text in parts(message).values():
        lines = [line for line in shown(text).splitlines() if line]
        assert lines[0].startswith("Nightly backup is down: exit status 3")
        assert lines[1:] == [
            "Output:", "no space left", "Runs on nas", "http://127.0.0.1:5276/monitor/job",
        ]


@pytest.mark.parametrize(("where", "answer"), [
    ("answer", "451 4.7.1 Greylisted, try again later"),
    ("rcpt_answer", "451 4.7.1 Greylisted, try again later"),
    ("answer", "550 5.1.1 No such user"), ("answer", "drop"),
])  # fmt: skip
def test_a_mail_that_is_not_accepted_is_tried_again_and_comes_once(house, mailbox, where, answer):
    setattr(mailbox, where, answer)
    larm = house(channels(phone=mailbox.url) + monitor())
    larm.ping("job", "fail")
    live(larm)
    live(larm, 12 * SECOND)
    assert (states(larm), mailbox.messages) == (["pending"], [])
    assert deliveries(larm)[0]["attempts"] == 2
    assert error(larm) not in ("", "None")
    assert "oncall" not in error(larm)
    setattr(mailbox, where, "250 OK")
    live(larm, MINUTE)
    live(larm, HOUR, step=MINUTE)
    assert states(larm) == ["sent"]
    assert [message["Subject"] for message in mailbox.messages] == ["DOWN: job"]


def test_output_neither_adds_a_header_to_a_mail_nor_ends_it(house, mailbox):
    larm = house(channels(phone=mailbox.url + "&format=text")
                 + monitor(name="a Bcc: x@evil.example"))
    larm.ping("job", "1", body="x\r\nBcc: victim@evil.example\r\n\r\n.\r\nQUIT")
    live(larm)
    [message] = mailbox.messages
    assert message["Bcc"] is None
    lines = parts(message)["text/plain"].splitlines()
    assert lines[lines.index("x"):][:5] == ["x", "Bcc: victim@evil.example", "", ".", "QUIT"]


# An ntfy-compatible service, JSON and forms


def test_an_alert_comes_by_ntfy_and_as_a_form(house, http):
    larm = house(channels(ntfy=f"ntfy://127.0.0.1:{http.port}/my-topic",
                          form=f"form://127.0.0.1:{http.port}/hook")
                 + monitor(name="Bäckup & 🎉 = 100 %"))
    larm.ping("job", "fail")
    live(larm)
    requests = dict(http.requests)
    ntfy = json.loads(requests["/"])
    form = dict(urllib.parse.parse_qsl(requests["/hook"].decode()))
    assert ntfy["topic"] == "my-topic"
    for sent in (ntfy, form):
        assert sent["title"] == "DOWN: Bäckup & 🎉 = 100 %"
        assert "Bäckup & 🎉 = 100 % is down: the job reported a failure" in sent["message"]


def test_a_long_digest_keeps_to_what_ntfy_takes_in_one_message(house, http):
    http.answer = "ntfy"
    keys = [f"job-{number:03}" for number in range(400)]
    larm = house(channels(phone=f"ntfy://127.0.0.1:{http.port}/my-topic")
                 + "".join(monitor(key) for key in keys))
    ping_all(larm, "fail")
    live(larm)
    [published] = http.published
    assert published["title"] == "DOWN: 400 monitors"
    named = set(re.findall(r"job-\d{3}", published["message"]))
    more = re.search(r"And (\d+) more: http://127.0.0.1:5276/$", published["message"])
    assert len(named) + int(more[1]) == 400


@pytest.mark.parametrize("letter", ["x", "ж", "&"])
def test_an_alert_with_much_output_keeps_to_what_ntfy_takes(house, http, letter):
    http.answer = "ntfy"
    larm = house(channels(phone=f"ntfy://127.0.0.1:{http.port}/t") + monitor(note="n" * 2_000))
    larm.ping("job", "1", body=f"{letter * 400}\n" * 12 + "the last line")
    live(larm)
    assert states(larm) == ["sent"]
    [published] = http.published
    assert published["title"] == "DOWN: job"
    assert "the last line" in published["message"]


def test_any_other_answer_than_a_success_is_none_and_shows_no_secret(house, http):
    answers = [301, 400, 401, 403, 404, 429, 500, 503]
    larm = house(channels(phone=f"json://127.0.0.1:{http.port}/a-secret-path") + monitor())
    larm.ping("job", "fail")
    for tried, answer in enumerate(answers, 1):
        http.answer = answer
        live(larm, 2 * HOUR, step=2 * HOUR)
        assert (states(larm), deliveries(larm)[0]["attempts"]) == (["pending"], tried)
        assert str(answer) in error(larm) or answer == 301
        assert "a-secret-path" not in error(larm)
    http.answer = 200
    live(larm, 2 * HOUR, step=2 * HOUR)
    assert [sent["title"] for sent in http.published] == ["DOWN: job"]


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
    larm = house(channels(phone=url) + monitor())
    larm.ping("job", "fail")
    live(larm)
    assert states(larm) == ["pending"]
    assert error(larm) not in ("", "None")
    assert "a-secret-path" not in error(larm)


# Secrets


@pytest.mark.parametrize("secret", ["hunter2", "p@ss/w:rd hunter2", "grün&hunter2=x"])
def test_no_secret_is_in_an_error_or_the_log_however_it_is_written(
    house, phone, monkeypatch, caplog, secret
):
    quoted = [urllib.parse.quote(secret, safe=""), urllib.parse.quote(secret),
              urllib.parse.quote_plus(secret), urllib.parse.quote(secret, safe="").lower()]
    texts = [secret, *quoted]

    def leaks() -> bool:
        for text in texts:
            logging.getLogger("apprise").warning("can't post to tests://me:%s@phone/x", text)
            logging.getLogger("apprise").warning("wrong password %s!", text)
        return False

    phone.answer = leaks
    monkeypatch.setenv("SECRET", secret)
    larm = house(channels(phone="tests://me:${SECRET}@phone/${SECRET}") + monitor())
    larm.ping("job", "fail")
    live(larm)
    assert phone.tries == 1  # it went to the right host
    logged = [one.getMessage() for one in caplog.records if one.name != "apprise"]
    said = error(larm) + str(logged) + str(larm.post("channels/phone/test")["error"])
    said += str(larm.api("events")) + larm.ask("/").body.decode()
    assert "wrong password" in said
    assert not [text for text in texts if text in said]
    assert "hunter2" not in said


# A channel of several URLs


@pytest.mark.parametrize("dead_first", [False, True])
def test_a_url_that_is_dead_repeats_nothing_to_the_good_one_and_keeps_nothing_from_it(
    house, phone, dead_first
):
    urls = [phone.url, "json://127.0.0.1:1/"]
    larm = house(channels(phone=urls[::-1] if dead_first else urls)
                 + monitor("one") + monitor("two"))
    for key, action in [("one", "fail"), ("two", "fail"), ("one", ""), ("two", "")]:
        larm.ping(key, action)
        live(larm, 20 * MINUTE, step=30 * SECOND)
    assert phone.titles() == ["DOWN: one", "DOWN: two", "UP: one", "UP: two"]
    assert set(states(larm)) == {"pending"}


def test_a_url_that_comes_back_gets_what_it_missed_and_the_good_one_nothing_again(house, phone):
    bad = Phone("bad", answer=False)
    larm = house(channels(phone=[phone.url, bad.url]) + monitor("one") + monitor("two"))
    larm.ping("one", "fail")
    live(larm)
    larm.ping("two", "fail")
    live(larm)
    bad.answer = True
    live(larm, HOUR, step=10 * SECOND)
    assert phone.titles() == ["DOWN: one", "DOWN: two"]
    assert bad.titles() == ["DOWN: 2 monitors"]
    assert states(larm) == ["sent", "sent"]


# Nothing that comes from outside steers what shows it

NASTY = {
    "markdown": "**bold** [click](http://evil.example) `code` # x _y_ ~z~ > q",
    "heading": "# heading",
    "html": "<script>alert(1)</script><img src=x onerror=alert(2)> & &lt; \"quoted\" 'single'",
    "links": "<a href='http://evil.example'>your bank</a>",
    "emoji": "🎉 ✅ é ß 漢字",
    "rtl": "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "templates": "{{7*7}} ${HOME} %s %(x)s {0} \\n $(id)",
}


@pytest.mark.parametrize("text", NASTY.values(), ids=list(NASTY))
@pytest.mark.parametrize("kind", ["text", "html", "markdown", "mail"])
def test_every_format_shows_the_same_text_and_nothing_that_was_injected(
    house, webhook, mailbox, text, kind
):
    url = mailbox.url + "&format=html" if kind == "mail" else f"{webhook.url}?format={kind}"
    name = text.replace("${", "$ {")
    larm = house(channels(phone=url) + monitor(name=name, note=name))
    larm.ping("job", "1", body=text)
    live(larm)
    if kind == "mail":
        [message] = mailbox.messages
        title, page = message["Subject"], parts(message)["text/html"]
        assert " ".join(text.split()) in " ".join(parts(message)["text/plain"].split())
    else:
        [alert] = webhook.alerts
        title, page = alert["title"], alert["message"]
    assert title == f"DOWN: {name}"
    if kind == "text":
        lines = page.splitlines()
    else:
        page = rendered(page) if kind == "markdown" else page
        found = Tags(page)
        assert found.tags <= {"html", "head", "body", "br", "p", "div", "pre"}
        assert found.attributes == set()
        lines = [" ".join(line.split()) for line in shown(page).splitlines()]
    assert lines[0].startswith(f"{name} is down: exit status 1")
    assert text in lines
    assert name in lines


def test_html_in_a_digest_injects_nothing(house, webhook):
    keys = [f"job-{number}" for number in range(30)]
    larm = house(channels(phone=webhook.url + "?format=html")
                 + "".join(monitor(key, name=f"<b>{key}</b>") for key in keys))
    ping_all(larm, "fail")
    live(larm)
    [alert] = webhook.alerts
    assert Tags(alert["message"]).tags <= {"br", "p"}
    assert all(f"<b>{key}</b>" in shown(alert["message"]) for key in keys)


# The job's output


def output(larm: House, phone: Phone, body: str | bytes) -> str:
    """What the alert shows of a failed job's output."""
    body = body.encode() if isinstance(body, str) else body
    answer = larm.ask(f"/api/heartbeat/{larm.token('job')}/1", "POST", body)
    assert answer.status == 200
    live(larm)
    text = phone.bodies()[-1]
    return text.partition("Output:\n")[2].rpartition("\nhttp://")[0]


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://evil.example\x1b\\a link\x1b]8;;\x1b\\", "a link"),
        ("a\x00b\x07cd", "abcd"),
        ("\u202eevil\u202c", "evil"),
        ("\u2066x\u2069", "x"),
        ("10 %\r50 %\rdone", "done"),
        ("one\rlonger", "longer"),
        ("10 %\r20 %\r", "20 %"),
        ("10 %\r20 %\r\x1b[0m", "20 %"),
        ("10 %\r20 %\r\x1b[0m\nend", "20 %\nend"),
        ("downloading\r\x1b[Kdone", "done"),
        ("12345\rab", "ab345"),
        ("one\r\ntwo", "one\ntwo"),
        ("tab\there", "tab\there"),
        (b"\xff\xfe" + "no spåce left".encode("utf-16-le"), "no spåce left"),
        (b"\xfe\xff" + "no spåce\r\nleft".encode("utf-16-be"), "no spåce\nleft"),
        (b"\xef\xbb\xbfutf-8", "utf-8"),
        (b"broken \xff here", "broken \ufffd here"),
    ],
)
def test_output_is_what_a_terminal_leaves_and_steers_nothing(house, phone, body, seen):
    larm = house(channels(phone) + monitor())
    assert output(larm, phone, body) == seen


CALLS = ["@everyone", "@here", "@channel", "<@123>", "<@&123>", "<@!123>", "<!here>", "<!channel>",
         "<#123>", "<!subteam^S1>"]


def test_nothing_in_a_job_s_output_calls_people(house, phone):
    larm = house(channels(phone) + monitor())
    seen = output(larm, phone, "hey " + " ".join(CALLS) + "\nme@example.com")
    assert [call for call in CALLS if call in seen] == []
    assert "hey" in seen
    assert "everyone" in seen
    assert seen.endswith("\nme@example.com")


@pytest.mark.parametrize("url", [
    "discord://4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js",
    "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#general",
    "mmost://localhost/3ccdd113474722377935511fc85d3dd4",
])  # fmt: skip
def test_services_that_format_and_call_get_the_output_as_it_is_between_fences(
    house, monkeypatch, url
):
    """What such a service is sent is taken where Requests would send it."""
    sent: list[str] = []

    def take(*_: object, data: object = None, **more: object) -> Any:
        sent.append(str(more.get("json") or json.loads(str(data))))
        answer = requests.Response()
        answer.status_code, answer._content = 200, b"ok"
        return answer

    monkeypatch.setattr(requests.Session, "request", take)
    larm = house(channels(phone=url) + monitor())
    larm.ping("job", "1", body="**hey** " + " ".join(CALLS) + "\n```\n@everyone")
    live(larm)
    assert states(larm) == ["sent"], error(larm)
    said = re.sub(r"```.*?```", "", "".join(sent), flags=re.DOTALL)
    assert "hey" in "".join(sent)
    assert "hey" not in said
    assert [call for call in CALLS if call in said] == []


@pytest.mark.parametrize("room", [300, 500, 800, 2_000])
def test_of_the_output_as_many_of_its_last_lines_as_fit_are_shown_and_at_most_10(
    house, phone, monkeypatch, room
):
    monkeypatch.setattr(service(phone.url), "body_maxlen", room)
    larm = house(channels(phone) + monitor())
    lines = [f"{number:02} {'x' * 57}" for number in range(20)]
    seen = output(larm, phone, "\n".join(lines) + "\n").splitlines()
    assert 1 <= len(seen) <= 10
    assert seen == lines[-len(seen):]
    text = phone.bodies()[0]
    assert len(text) <= room
    assert len(seen) == 10 or len(text) + 61 > room - 15


def test_a_last_line_that_is_too_long_is_cut_and_not_left_out(house, phone, monkeypatch):
    monkeypatch.setattr(service(phone.url), "body_maxlen", 600)
    larm = house(channels(phone) + monitor(note="the note"))
    seen = output(larm, phone, "before\n" + "y" * 10_000)
    assert "y" * 200 in seen
    assert len(phone.bodies()[0]) <= 600
    assert phone.bodies()[0].endswith("the note\nhttp://127.0.0.1:5276/monitor/job")


@pytest.mark.parametrize("kind", ["html", "markdown"])
@pytest.mark.parametrize("room", [300, 401, 700])
def test_a_service_that_counts_after_escaping_cuts_in_no_entity(
    house, webhook, monkeypatch, kind, room
):
    url = f"{webhook.url}?format={kind}"
    monkeypatch.setattr(service(url), "body_maxlen", room)
    larm = house(channels(phone=url) + monitor())
    larm.ping("job", "1", body="<&>\"'_*" * 9 + "\n" + "the last line, with <&> in it\n")
    live(larm)
    assert states(larm) == ["sent"]
    [alert] = webhook.alerts
    page = alert["message"]
    assert len(page) <= room
    if kind == "html":
        assert not re.search(r"&(?![a-z]+;|#\w+;)", page)
        assert "the last line, with <&> in it" in shown(page)
    assert page.endswith("/monitor/job") or "/monitor/job" in shown(page)


@pytest.mark.parametrize("overflow", ["", "?overflow=truncate"])
def test_what_does_not_fit_at_all_comes_in_parts_unless_the_url_says_otherwise(
    house, phone, monkeypatch, overflow
):
    monkeypatch.setattr(service(phone.url), "body_maxlen", 300)
    larm = house(channels(phone=phone.url + overflow) + monitor(note="word " * 150 + "end"))
    larm.ping("job", "fail")
    live(larm)
    assert states(larm) == ["sent"]
    assert max(map(len, phone.bodies())) <= 300
    assert len(phone.messages) == (1 if overflow else 4)
    assert ("end" in phone.bodies()[-1]) is not bool(overflow)


def test_what_is_long_is_cut_to_what_people_read(house, phone):
    larm = house(channels(phone) + monitor(name="n" * 10_000, note="o" * 50_000)
                 + monitor("other", name="m" * 10_000, depends_on=["job"]))
    assert output(larm, phone, ("x" * 10_000 + "\n") * 5)
    [message] = phone.messages
    assert len(message.title) < 250
    assert len(message.body) < 6_000
    assert message.body.endswith("http://127.0.0.1:5276/monitor/job")


# Plugins of Apprise's, or one's own, that misbehave

PLUGINS = f"""
import logging, runpy, sys
from apprise.decorators import notify

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

@notify(on="raises")
def raises(body, title, notify_type, meta, **_):
    raise RuntimeError("can't reach " + str(meta["url"]))

@notify(on="exits")
def exits(body, title, notify_type, meta, **_):
    raise SystemExit("can't reach " + str(meta["url"]))

sys.argv = ["larm.py", "serve"]
runpy.run_path({str(ROOT / "larm.py")!r}, run_name="__main__")
"""


def test_plugins_that_raise_exit_print_or_log_are_caught_and_show_no_secret(
    tmp_path, webhook
):
    secret = "hunter2-is-secret"
    schemes = ("prints", "logs", "raises", "exits")
    named = {scheme: f"{scheme}://user:{secret}@host/{secret}" for scheme in schemes}
    larm = launch(tmp_path, channels(good=webhook.url, **named) + monitor(token=TOKEN),
                  code=PLUGINS)
    try:
        larm.ping(action="/fail")

        def tried() -> dict[str, Any] | None:
            [event] = larm.get("/api/v1/events").json["data"]
            found = {one["channel"]: one for one in event["deliveries"]}
            return found if all(one["attempts"] for one in found.values()) else None

        found = wait_until(tried)
        assert {name: one["state"] for name, one in found.items()} == {
            "good": "sent", "prints": "sent", "logs": "pending", "raises": "pending",
            "exits": "pending",
        }
        assert all(found[name]["error"] for name in ("logs", "raises", "exits"))
        assert webhook.titles() == ["DOWN: job"]
        assert larm.get("/health").status == 200
        assert secret not in str(found) + larm.get("/").body.decode() + larm.log
    finally:
        larm.kill()


def test_an_error_is_on_one_line_and_short(house, monkeypatch, phone):
    def fails(*_: object, **__: object) -> bool:
        raise RuntimeError("several\nlines " * 100)

    monkeypatch.setattr(apprise.Apprise, "notify", fails)
    larm = house(channels(phone) + monitor())
    larm.ping("job", "fail")
    live(larm)
    assert "\n" not in error(larm)
    assert len(error(larm)) <= 300
