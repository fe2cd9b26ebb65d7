"""The pages: what they answer, what they show whom, and that nothing but text comes of any text."""

from __future__ import annotations

import html
import io
import itertools
import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from conftest import START, House
from hypothesis import given
from hypothesis import strategies as st

import larm as program

DAY, HOUR, MINUTE, SECOND = program.DAY, program.HOUR, program.MINUTE, program.SECOND
JOB = '[monitors.job]\nname = "Nightly backup"\ninterval = "1d"\ngrace = "30m"\n'
NOWHERE = '[channels]\nphone = "json://127.0.0.1:9/a-secret-of-the-channel"\n'


@dataclass
class Page:
    status: int
    headers: dict[str, str]
    html: str

    @property
    def text(self) -> str:
        """What a reader sees of it, on one line."""
        body = re.sub(r"<(style|script|title)>.*?</\1>", "", self.html, flags=re.DOTALL)
        return " ".join(html.unescape(re.sub("<[^>]+>", " ", body)).split())

    @property
    def headline(self) -> str:
        return html.unescape(re.findall(r"<h1[^>]*>(.*?)</h1>", self.html, re.DOTALL)[0])


class Site:
    """A House with its pages."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.web = program.Web(
            house.store, house.clock, house.intake, house.watcher, house.notifier
        )
        self.web.use(house.config)

    def get(self, path: str = "/", method: str = "GET", body: bytes = b"", **environ: str) -> Page:
        """A page as this machine sees it; `environ` may say who else asks."""
        url = urlsplit(path)
        found: list[Any] = []
        asked: dict[str, Any] = {
            "REQUEST_METHOD": method, "PATH_INFO": url.path, "QUERY_STRING": url.query,
            "SERVER_NAME": "larm", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost", "wsgi.url_scheme": "http",
            "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(), **environ,
        }  # fmt: skip
        answer = b"".join(self.web(asked, lambda status, headers, *_: found.extend(
            (int(status[:3]), dict(headers)))))
        return Page(found[0], found[1], answer.decode())

    def as_anyone(self, path: str = "/", **environ: str) -> Page:
        return self.get(path, REMOTE_ADDR="203.0.113.9", **environ)


@pytest.fixture
def site(house: Callable[..., House]) -> Callable[..., Site]:
    """site(toml): the pages of a House with that configuration."""
    return lambda text: Site(house(text))


def jobs(count: int) -> str:
    return "".join(f'[monitors.job-{n}]\ninterval = "1h"\n' for n in range(count))


# The answer


def test_before_the_first_ping_the_page_says_how_to_ping(site):
    larm = site(NOWHERE + JOB)
    page = larm.get()
    url = larm.house.config.ping_url(larm.house.watched["job"].token)
    assert page.headline == "Waiting for the first ping"
    assert f"curl -fsS -m 10 --retry 5 {url}" in page.text


def test_the_page_says_how_to_add_a_monitor(site):
    larm = site(JOB)
    page = larm.get()
    assert str(larm.house.config.path) in page.text
    assert "[monitors.nightly-backup]" in page.text


def test_all_is_well_in_a_headline(site):
    larm = site(NOWHERE + jobs(3))
    for number in range(3):
        larm.house.ping(f"job-{number}")
    page = larm.get()
    assert page.headline == "All 3 monitors are up"
    assert "Needs attention" not in page.text


def test_one_monitor_is_called_by_its_name(site):
    larm = site(JOB)
    larm.house.ping("job")
    assert larm.get().headline == "Nightly backup is up"


def test_what_is_down_stands_first_with_since_when_and_why(site):
    larm = site(NOWHERE + JOB + jobs(2))
    for key in ("job", "job-0", "job-1"):
        larm.house.ping(key)
    larm.house.clock.advance(5 * MINUTE)
    larm.house.ping("job", "3", "copying\ndisk full\n")
    larm.house.clock.advance(2 * HOUR - SECOND)
    page = larm.get()
    assert page.headline == "Nightly backup is down"
    assert "(1 h): exit status 3. Last heartbeat 2 h ago." in page.text
    assert "disk full" in page.text
    assert page.text.index("Needs attention") < page.text.index("disk full")
    assert "Also 2 late" in page.text


def test_a_missed_heartbeat_is_the_reason(site):
    larm = site(JOB)
    larm.house.ping("job")
    larm.house.watch_for(26 * HOUR, HOUR // 6)
    assert "(1 h): no heartbeat came in time. Last heartbeat 1 d ago." in larm.get().text


def test_several_that_are_down_are_counted_and_named(site):
    larm = site(jobs(5))
    for number in range(5):
        larm.house.ping(f"job-{number}", "fail" if number < 4 else "")
        larm.house.ping(f"job-{number}", "fail" if number < 4 else "")
    page = larm.get()
    assert page.headline == "4 of 5 monitors are down"
    assert "job-0 for now, job-1 for now, job-2 for now and 1 more." in page.text


def test_a_late_one_is_not_called_down(site):
    larm = site(JOB)
    larm.house.ping("job")
    larm.house.clock.advance(DAY + 10 * MINUTE)
    page = larm.get()
    assert page.headline == "Nightly backup is late"
    assert "due 10 min ago, down in 20 min unless it pings" in page.text


def test_when_everything_is_paused_nothing_is_watched(site):
    assert site(JOB + "enabled = false\n").get().headline == "Nothing is watched"


def test_a_state_is_shown_by_shape_and_word_too(site):
    larm = site(JOB)
    larm.house.ping("job")
    page = larm.get()
    assert 'href="#up"' in page.html
    assert re.search(r"<td[^>]*>up ", page.html)


# What needs attention


@pytest.mark.parametrize(("channels", "alarming"), [("", True), (NOWHERE, False)])
def test_that_nobody_would_be_alerted_needs_attention(site, channels, alarming):
    assert ("Nobody is alerted" in site(channels + JOB).get().text) == alarming


def test_mistakes_in_the_file_need_attention(site):
    larm = site(JOB)
    larm.web.mistakes = ["larm.toml: monitors.job.intervall: no such setting"]
    assert "monitors.job.intervall: no such setting" in larm.get().text


def test_that_larm_was_not_running_needs_attention_for_a_day(site):
    larm = site(JOB)
    larm.house.watcher.tick(-HOUR)  # a tick that comes an hour late
    assert "Larm itself was not running from" in larm.get().text
    larm.house.clock.advance(25 * HOUR)
    assert "Larm itself was not running from" not in larm.get().text


def test_a_mistyped_token_can_be_found_by_its_first_characters(site):
    larm = site(JOB)
    for _ in range(3):
        larm.get("/api/heartbeat/mistyped-token-of-the-backup", REMOTE_ADDR="192.168.1.5")
    larm.house.clock.advance(4 * MINUTE)
    page = larm.get()
    assert '"mist"… was pinged 3 times from 192.168.1.5, last 4 min ago' in page.text
    assert "mistyped-token" not in page.html


def test_a_known_token_is_no_stranger(site):
    larm = site(JOB)
    for action in ("", "/fail", "/done", "/1/2"):
        larm.get(f"/api/heartbeat/{larm.house.watched['job'].token}{action}")
    assert larm.house.intake.strangers() == []


def test_of_unknown_tokens_the_newest_20_are_remembered(site):
    larm = site(JOB)
    for number in range(1_000):
        larm.get(f"/api/heartbeat/{number:04}")
    larm.get("/api/heartbeat/0990")
    starts = [one.start for one in larm.house.intake.strangers()]
    assert starts[:2] == ["0990", "0999"]
    assert len(starts) == len(set(starts)) == 20


def test_many_problems_do_not_bury_the_page(site):
    larm = site(jobs(60))
    assert larm.get().html.count("curl -fsS") <= 5
    assert "57 more were never pinged" in larm.get().text


# The days


def kinds(larm: Site) -> list[str]:
    """The titles of a monitor's bar."""
    bar = re.findall(r'<svg class="days".*?</svg>', larm.get().html, re.DOTALL)[0]
    return re.findall(r"<title>(.*?)</title>", bar)


def test_each_day_of_the_bar_says_what_became_of_it(site):
    """The clock starts on 15 January 2027, at 08:00 UTC."""
    larm = site(f'timezone = "UTC"\n{JOB}')
    larm.house.ping("job")
    larm.house.clock.advance(2 * DAY)
    larm.house.ping("job")
    larm.house.ping("job", "fail")  # 17 January, 08:00
    larm.house.clock.advance(2 * DAY)
    larm.house.ping("job")  # 19 January, 08:00
    larm.house.clock.advance(DAY)
    assert kinds(larm) == ["23 Oct–14 Jan: no data", "15–16 Jan: up", "17 Jan: down 16 h",
                           "18 Jan: down all day", "19 Jan: down 8 h", "20 Jan: up"]


def test_a_day_on_which_nobody_watched_is_neither_up_nor_down(site):
    larm = site(f'timezone = "UTC"\n{JOB}')
    larm.house.ping("job")
    larm.house.restart(4 * DAY)
    assert kinds(Site(larm.house))[1:] == ["15–19 Jan: not watched"]


def test_a_monitor_that_is_paused_is_not_watched(site):
    larm = site(f'timezone = "UTC"\n{JOB}')
    larm.house.ping("job")
    larm.get("/monitor/job/pause", "POST")
    larm.house.clock.advance(DAY)
    assert kinds(larm)[1:] == ["15–16 Jan: not watched"]


def test_a_monitor_without_a_ping_has_no_data(site):
    larm = site(f'timezone = "UTC"\n{JOB}')
    larm.house.clock.advance(3 * DAY)
    assert kinds(larm) == ["21 Oct–18 Jan: no data"]


@given(st.lists(st.integers(0, 90 * DAY), max_size=12, unique=True), st.booleans())
def test_the_days_and_the_uptime_figure_say_the_same(moments, first_is_down):
    types = ["down", "up"] if first_is_down else ["up", "down"]
    changes: list[Any] = [
        {"at": at, "type": types[number % 2]} for number, at in enumerate(sorted(moments))
    ]
    now = 90 * DAY
    days = program.days_of(changes, [], 0, range(0, now + 1, DAY), now)
    percent = 100 * (1 - sum(down for _, down in days) / now)
    assert program.uptime(changes, [], 0, now, now) == round(percent, 2)
    assert {kind for kind, down in days if not down} <= {"up"}


@given(st.lists(st.tuples(st.integers(0, 1_000), st.integers(0, 1_000))),
       st.integers(0, 1_000), st.integers(0, 1_000))
def test_coverage_is_what_counting_says(spans, one, other):
    start, end = sorted((one, other))
    counted = sum(any(begin <= at < finish for begin, finish in spans) for at in range(start, end))
    assert program.coverage(spans)(start, end) == counted


def test_a_day_of_summer_time_is_a_day():
    zone = program.zoneinfo.ZoneInfo("Europe/Stockholm")
    days = program.midnights(zone, 90, START + 90 * DAY)  # 15 April, after summer time began
    lengths = [end - start for start, end in itertools.pairwise(days)]
    assert len(lengths) == 90
    assert sorted(set(lengths)) == [23 * HOUR, DAY]
    assert lengths.count(23 * HOUR) == 1


# A monitor's page


def test_a_monitors_page_begins_with_its_state_in_a_sentence(site):
    larm = site(JOB)
    larm.house.ping("job")
    larm.house.clock.advance(3 * HOUR)
    page = larm.get("/monitor/job")
    assert page.headline == "Nightly backup"
    assert "Up. Last heartbeat 3 h ago, next due in 21 h, 30 min grace." in page.text


def test_a_monitors_page_shows_heartbeats_with_their_output(site):
    larm = site(JOB)
    larm.house.ping("job", body="\x1b[32mfine\x1b[0m\n2 files")
    larm.house.clock.advance(DAY)
    larm.house.ping("job", "3", "50%\r100%\nbroken")
    page = larm.get("/monitor/job")
    assert "failed, exit status 3" in page.text
    assert "fine\n2 files</pre>" in page.html
    assert "100%\nbroken</pre>" in page.html
    assert page.html.count("<path", page.html.index('class="beats"')) == 2


def test_older_heartbeats_are_a_link_away(site):
    larm = site(JOB)
    for number in range(45):
        larm.house.ping("job", body=f"output number {number}.")
        larm.house.clock.advance(DAY)
    seen, path = [], "/monitor/job"
    while path:
        page = larm.get(path)
        seen += re.findall(r"output number (\d+)\.", page.html)
        older = re.findall(r'href="(/monitor/job\?before=\d+)"', page.html)
        path = older[0] if older else ""
    assert [int(number) for number in seen] == list(range(45))[::-1]


@pytest.mark.parametrize("before", ["", "x", "-1", "9" * 40, "%F0%9F%98%80", "1'"])
def test_a_made_up_before_does_no_harm(site, before):
    larm = site(JOB)
    larm.house.ping("job")
    assert larm.get(f"/monitor/job?before={before}").status == 200


def test_events_say_which_channel_was_told_and_which_was_not(site):
    larm = site(NOWHERE + JOB)
    larm.house.ping("job")
    larm.house.ping("job", "fail")
    [due] = larm.house.rows("SELECT id FROM deliveries")
    now = larm.house.clock.now()
    larm.house.store.write(lambda db: program.note_attempt(
        db, "phone", [due["id"]], "pending", now, now + MINUTE, "Connection refused"))
    page = larm.get("/monitor/job")
    assert "down: the job reported a failure" in page.text
    assert re.search(r"phone: pending [-0-9]+ [:0-9]+, 1 attempt, Connection refused", page.text)


@pytest.mark.parametrize("where", ["crontab", "systemd service", "Python", "Node.js", "Ruby",
                                   "Shell, with its failures"])
def test_how_to_ping_has_the_real_url(site, where):
    larm = site(JOB)
    url = larm.house.config.ping_url(larm.house.watched["job"].token)
    found = dict(program.snippets(larm.house.config.monitors["job"], url))
    assert url in found[where]
    assert found[where] in html.unescape(larm.get("/monitor/job").html)


@pytest.mark.parametrize(("said", "shown"), [
    ("\x1b[1;31mred\x1b[0m", "red"),
    ("\x1b]0;a title\x07text", "text"),
    ("\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("10%\r50%\r100%\r\ndone", "100%\ndone"),
    ("a\x00b\x08c\x9bd\x7f", "abcd"),
    ("tab\there", "tab\there"),
    ("\x1b", ""),
    ("a\x1b(Bb", "ab"),
    ("smile 😀 שלום", "smile 😀 שלום"),
])  # fmt: skip
def test_output_is_shown_as_a_terminal_would_leave_it(said, shown):
    assert program.plain(said) == shown


@given(st.text())
def test_output_keeps_no_control_code(said):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", program.plain(said))


# Bad input


NASTY = [
    "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "\"' onmouseover='x",
    "{{7*7}} {{!style}}", "% import os", "</title></style>", "😀" * 50, "\u202eevil", "w" * 10_000,
    "&lt;b&gt;", "]]>", "<!--",
]  # fmt: skip


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
@pytest.mark.parametrize("path", ["/", "/monitor/job"])
def test_any_text_is_shown_as_text(site, nasty, path):
    printable = "".join(letter for letter in nasty if letter.isprintable())
    name, note = (json.dumps(text, ensure_ascii=False) for text in (printable, nasty))
    larm = site(f'[monitors.job]\nname = {name}\nnote = {note}\ninterval = "1d"\n')
    larm.house.ping("job")
    larm.house.ping("job", "1", nasty)
    larm.get(f"/api/heartbeat/{nasty[:100].encode().decode('latin-1')}")
    larm.web.mistakes = [nasty]
    page = larm.get(f"{path}?q={quote(printable)}")
    assert page.status == 200
    assert len(re.findall("<script", page.html)) == 1
    assert len(re.findall("<style", page.html)) == 1
    assert "<img" not in page.html
    assert "49" not in page.headline
    assert not re.search(r"<[^>]*\son\w+=", page.html)
    assert html.escape(printable).replace("&#x27;", "&#039;") in page.html


def test_a_token_with_html_is_text(site):
    larm = site(JOB)
    larm.get("/api/heartbeat/<b>x")
    assert "&lt;b&gt;" in larm.get().html
    assert "<b>&quot;<b>" not in larm.get().html


# Filter


def test_the_filter_is_there_from_15_monitors_on(site):
    assert 'role="search"' not in site(jobs(14)).get().html


def test_the_filter_finds_names_keys_and_states(site):
    larm = site(JOB + jobs(20))
    larm.house.ping("job-7")

    def found(asked: str) -> list[str]:
        return re.findall(r'<tr id="m-([^"]+)"', larm.get(f"/?q={quote(asked)}").html)

    assert found("NIGHTLY") == ["job"]
    assert found("job-1") == ["job-1", *(f"job-{number}" for number in range(10, 20))]
    assert "job-7" not in found("pending job")
    assert len(found("")) == 21
    assert found("nothing of the kind") == []
    assert 'value="nightly"' in larm.get("/?q=nightly").html


# Buttons


def test_a_button_pauses_and_another_resumes(site):
    larm = site(JOB)
    larm.house.ping("job")
    page = larm.get("/monitor/job/pause", "POST", b"for=1h")
    assert (page.status, page.headers["Location"]) == (303, "/monitor/job")
    assert "Paused since" in larm.get("/monitor/job").text
    assert larm.house.monitor("job")["resumes_at"] == START + HOUR
    larm.get("/monitor/job/resume", "POST")
    assert "Up. Last heartbeat" in larm.get("/monitor/job").text


def test_a_pause_without_a_time_lasts_until_resumed(site):
    larm = site(JOB)
    assert larm.get("/monitor/job/pause", "POST", b"for=").status == 303
    assert larm.house.monitor("job")["resumes_at"] is None


def test_a_button_tests_the_channels_and_the_page_says_what_came_of_it(site):
    larm = site(NOWHERE + JOB)
    assert larm.get("/monitor/job/test", "POST").status == 303
    page = larm.get("/monitor/job")
    assert "phone: test not sent: " in page.text
    assert "a-secret-of-the-channel" not in page.html


@pytest.mark.parametrize("sign", [
    {"HTTP_SEC_FETCH_SITE": "cross-site"}, {"HTTP_ORIGIN": "https://evil.example"},
    {"HTTP_ORIGIN": "null"},
])  # fmt: skip
def test_another_sites_page_can_press_no_button(site, sign):
    larm = site(JOB)
    page = larm.get("/monitor/job/pause", "POST", **sign)
    assert page.status == 403
    assert "another site" in page.text
    assert larm.house.monitor("job")["watching"] == "yes"


@pytest.mark.parametrize(("path", "body", "status"), [
    ("/monitor/nobody/pause", b"", 404), ("/monitor/job/delete", b"", 404),
    ("/monitor/job/pause", b"for=never", 400), ("/monitor/job/pause", b"\xff" * 20_000, 303),
])  # fmt: skip
def test_a_button_that_is_not_there_does_nothing(site, path, body, status):
    assert site(JOB).get(path, "POST", body).status == status


# In public


def test_in_public_the_state_is_shown_and_nothing_else(site):
    larm = site('public = true\npassword = "a password"\n' + NOWHERE + JOB + 'note = "A note"\n')
    larm.house.ping("job")
    larm.house.ping("job", "3", "the output")
    larm.get("/api/heartbeat/mistyped", REMOTE_ADDR="192.168.1.5")
    larm.web.mistakes = ["a mistake"]
    for path in ("/", "/monitor/job"):
        page = larm.as_anyone(path)
        assert page.status == 200
        assert "exit status 3" in page.text
        assert 'class="days"' in page.html
        for hidden in ("A note", "the output", "phone", "<form", "a mistake", "mist", "192.168",
                       "/api/heartbeat/", "larm.toml", larm.house.watched["job"].token):
            assert hidden not in page.html, hidden


def test_in_public_only_viewers_press_buttons(site):
    larm = site('public = true\npassword = "a password"\n' + JOB)
    assert larm.get("/monitor/job/pause", "POST", REMOTE_ADDR="203.0.113.9").status == 401
    assert larm.house.monitor("job")["watching"] == "yes"


# Under a path, in bounds


def test_every_link_and_form_stays_below_the_path_of_url(site):
    larm = site('url = "https://home.example/larm"\n' + NOWHERE + jobs(20))
    larm.house.ping("job-1")
    for path in ("/larm/", "/larm/monitor/job-1"):
        found = re.findall(r'(?:href|action)="([^"#d][^"]*)"', larm.get(path).html)
        assert found
        assert [link for link in found if not link.startswith("/larm/")] == []
    posted = larm.get("/larm/monitor/job-1/pause", "POST")
    assert posted.headers["Location"] == "/larm/monitor/job-1"


def test_a_dashboard_of_50_monitors_is_one_page_of_at_most_60_kb(site):
    """After a season with two outages of each, and two days without Larm."""
    larm = site(NOWHERE + "".join(
        f'[monitors.a-usual-name-{n}]\nname = "A usual name {n}"\ninterval = "1h"\n'
        for n in range(50)))
    house = larm.house
    house.clock.advance(95 * DAY)
    now = house.clock.now()

    def live(db: sqlite3.Connection) -> None:
        program.write_alive(db, now)
        db.execute("INSERT INTO gaps (from_at, to_at) VALUES (?, ?)",
                   (now - 9 * DAY, now - 7 * DAY))
        for n, watched in enumerate(house.watched.values()):
            for month in range(2):
                at = now - 30 * DAY * month - (n % 20 + 2) * DAY - n * HOUR
                db.executemany(
                    "INSERT INTO events (monitor_id, type, at) VALUES (?, ?, ?)",
                    [(watched.id, "down", at), (watched.id, "up", at + 3 * HOUR)],
                )
        db.execute("UPDATE monitors SET state = 'up', received_at = :now, expected_at = :now,"
                   "deadline_at = :now, counts_from = :now", {"now": now})

    house.store.write(live)
    page = larm.get()
    assert page.headline == "All 50 monitors are up"
    assert len(page.html.encode()) <= 60_000
    assert not re.search(r'(?:src|href|url\()="?(?:https?:)?//', page.html)


def test_the_number_of_queries_does_not_grow_with_the_monitors(site):
    larm = site(jobs(1))

    def queries(count: int) -> int:
        larm.house.reload(jobs(count))
        larm.web.use(larm.house.config)
        seen: list[str] = []
        with larm.house.store.reading() as db:
            db.set_trace_callback(seen.append)
        assert larm.get().status == 200
        return len(seen)

    assert queries(1) == queries(30) > 0


def test_1000_monitors_have_a_page(site):
    larm = site(jobs(1_000))
    assert larm.get().html.count('<tr id="m-') == 1_000


def test_a_channel_that_fails_needs_attention_of_viewers_only(site):
    larm = site("public = true\n[channels]\nphone = 'json://127.0.0.1:9/secret-path'\n"
                '[monitors.job]\ninterval = "1h"\n')
    larm.house.ping("job", "fail")
    [due] = larm.house.rows("SELECT id FROM deliveries")
    now = larm.house.clock.now()
    larm.house.store.write(lambda db: program.note_attempt(
        db, "phone", [due["id"]], "pending", now, now + MINUTE, "Connection refused"))
    assert "channel phone: last failed" in larm.get("/").text
    assert "Connection refused" in larm.get("/").text
    assert "phone" not in larm.get("/", HTTP_VIA="a proxy").text


def test_a_flapping_monitor_needs_attention(site):
    larm = site('[monitors.job]\ninterval = "1h"\n')
    for _ in range(4):
        for action in ("fail", ""):
            larm.house.clock.advance(10 * MINUTE)
            larm.house.ping("job", action)
    assert "job is flapping" in larm.get("/").text
