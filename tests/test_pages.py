"""The dashboard and a monitor's page: what they say to whom, and that nothing but text comes of any
text. test_access.py has who may see them, test_browser.py how they look and feel.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import TOKEN, House, wait_until
from cronsim import CronSim
from receivers import Phone, channels, monitor

from larm import DAY, HOUR, MINUTE, SECOND

# Every clock starts on Friday, 15 January 2027, at 08:00 UTC.
UTC = 'timezone = "UTC"\n'
NOWHERE = channels(phone="json://127.0.0.1:9/a-secret-of-the-channel")
JOB = monitor(interval="1d", grace="30m", name="Nightly backup", token=TOKEN)
FAR = "203.0.113.9"


@dataclass
class Page:
    status: int
    headers: dict[str, str]
    html: str

    @property
    def text(self) -> str:
        """What a reader sees of it, on one line."""
        return seen(re.sub(r"<(style|script|title)>.*?</\1>", "", self.html, flags=re.DOTALL))

    @property
    def headline(self) -> str:
        return seen(re.findall(r"<h1[^>]*>(.*?)</h1>", self.html, re.DOTALL)[0])

    @property
    def answer(self) -> str:
        """What the banner says below its headline."""
        return seen(re.findall(r"</h1><p>(.*?)</p>", self.html, re.DOTALL)[0])

    def section(self, title: str) -> Page:
        end = "(?=<h2>|<details id|</main>)"
        found = re.findall(rf"<h2>{title}</h2>(.*?){end}", self.html, re.DOTALL)
        return Page(self.status, self.headers, "".join(found))

    def rows(self, kind: str = "rows") -> list[list[str]]:
        """The texts of the cells of a table."""
        body = re.findall(rf'<table class="{kind}">.*?<tbody>(.*?)</tbody>', self.html, re.DOTALL)
        return [[seen(re.sub("<title>.*?</title>", "", cell))
                 for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
                for row in re.findall(r"<tr[^>]*>(.*?)</tr>", "".join(body), re.DOTALL)]

    @property
    def facts(self) -> dict[str, str]:
        pairs = re.findall(r"<dt[^>]*>(.*?)</dt><dd[^>]*>(.*?)</dd>", self.html, re.DOTALL)
        return {seen(name): seen(fact) for name, fact in pairs}


def seen(text: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", text)).split())


def look(rooms: House, path: str = "/", method: str = "GET", body: bytes = b"",
         peer: str = "127.0.0.1", **headers: str) -> Page:
    answer = rooms.ask(path, method, body, peer, **headers)
    return Page(answer.status, answer.headers, answer.body.decode())


def jobs(count: int, **more: object) -> str:
    return "".join(monitor(f"job-{n}", "1h", "10m", **more) for n in range(count))


# The banner


@pytest.mark.parametrize(("toml", "pings", "pass_by", "headline"), [
    (JOB, [], 0, "Waiting for the first ping"),
    (JOB, ["job"], 0, "The only monitor is up"),
    (jobs(3), ["job-0", "job-1", "job-2"], 0, "All 3 are up"),
    (jobs(3) + monitor("off", enabled=False), ["job-0", "job-1", "job-2"], 0, "3 of 4 are up"),
    (JOB + jobs(2), ["job", "job-0", "job/fail"], HOUR,
     "1 of 3 is down: Nightly backup, since 08:00"),
    (jobs(5), [f"job-{n}/fail" for n in range(5)], 0,
     "5 of 5 are down: job-0, since 08:00; job-1, since 08:00; job-2, since 08:00 and 2 more"),
    (JOB, ["job"], DAY + MINUTE, "1 of 1 is late: Nightly backup, since 08:00"),
    (JOB + "enabled = false\n", [], 0, "Nothing is watched"),
])
def test_the_banner_says_how_things_stand(house, toml, pings, pass_by, headline):
    rooms = house(UTC + NOWHERE + toml)
    for one in pings:
        rooms.ping(*one.split("/"))
    rooms.live(pass_by, 10 * MINUTE)
    assert look(rooms).headline == headline


def test_the_banner_says_what_else_is_so_and_when_larm_last_heard(house):
    rooms = house(UTC + NOWHERE + JOB + jobs(4))
    for key, action in (("job", "fail"), ("job-0", ""), ("job-1", "")):
        rooms.ping(key, action)
    rooms.live(61 * MINUTE, MINUTE)
    rooms.ping("job-0")
    rooms.pause("job-3")
    rooms.live(3 * MINUTE, MINUTE)
    page = look(rooms)
    assert page.headline == "1 of 5 is down: Nightly backup, since 08:00"
    assert page.answer == "1 late, 1 up, 1 pending, 1 paused. Last heartbeat 3 min ago."


def test_with_one_monitor_down_each_fact_stands_there_once(house):
    """Why, since when, who was told and what to do, without a click."""
    rooms = house(UTC + channels(Phone()) + jobs(2)
                  + JOB + 'note = "If the disk is full: prune, then run it again."\n')
    for key in ("job", "job-0", "job-1"):
        rooms.ping(key)
    rooms.live(5 * MINUTE, MINUTE)
    rooms.ping("job", "3", "copying\nno space left on device\n")
    rooms.live(3 * SECOND)
    rooms.deliver()
    rooms.live(20 * MINUTE, MINUTE)
    page = look(rooms)
    for fact in ("exit status 3", "no space left on device", "prune, then run it again",
                 "1 of 3 is down", "20 min", "since 08:05"):
        assert page.text.lower().count(fact) == 1, fact
    assert page.section("What happened").rows("past") == [["08:05", "Nightly backup", "down",
                                                           "phone"]]
    assert page.section("Needs attention").html == ""


# The table


def test_what_is_down_stands_first_then_what_is_late_then_the_files_order(house):
    rooms = house(UTC + NOWHERE + "".join(
        monitor(key, "1d" if key != "b" else "1h", "2h") for key in "abcdef"))
    for key, action in (("b", ""), ("c", ""), ("d", "fail"), ("e", ""), ("f", "fail")):
        rooms.ping(key, action)
    rooms.pause("e")
    rooms.live(HOUR + MINUTE, MINUTE)
    states = [(row[0], row[1].split()[0]) for row in look(rooms).rows() if len(row) > 1]
    assert states == [("d", "down"), ("f", "down"), ("b", "late"), ("a", "pending"), ("c", "up"),
                      ("e", "paused")]


def test_below_what_is_not_up_stands_its_sentence_its_note_and_the_end_of_its_output(house):
    rooms = house(UTC + NOWHERE + "".join(
        monitor(key, "1h", "10m", note=f"The note of {key}.", token=f"the-token-of-{key}")
        for key in ("up", "late", "down", "pending", "paused")) + monitor("off", enabled=False))
    rooms.ping("late")
    rooms.live(HOUR + MINUTE, MINUTE)
    rooms.ping("up", "log", "a log")
    rooms.ping("up", "", "the output of up")
    rooms.ping("down", "fail", "one\ntwo\nthree\nfour\n\n")
    rooms.pause("paused", "2h")
    rows = {row[0]: below[0] for row, below in itertools.pairwise(look(rooms).rows())
            if len(row) > 1 and len(below) == 1}
    curl = "curl -fsS -m 10 --retry 5 --retry-connrefused -o /dev/null "
    assert rows == {
        "down": "The job reported a failure. The note of down. two three four",
        "late": "Down at 09:10 unless it pings. The note of late.",
        "pending": "Watched from its first heartbeat on. The note of pending. "
                   f"{curl}http://127.0.0.1:5276/api/heartbeat/the-token-of-pending",
        "paused": "Until 11:01. The note of paused.",
        "off": "By enabled = false in its settings.",
    }


def test_the_columns_say_when_it_came_and_when_it_is_due(house):
    rooms = house(UTC + NOWHERE + JOB + jobs(1) + monitor("new") + monitor("weekly", "1w"))
    for key in ("job", "job-0", "weekly"):
        rooms.ping(key)
    rooms.ping("job", "start")
    rooms.live(HOUR + 5 * MINUTE, MINUTE)
    page = look(rooms)
    assert re.findall("<th scope=[^>]*>(.*?)</th>", page.html)[:6] == [
        "Monitor", "State", "Last heartbeat", "Next due", "90 days, to today", "Uptime"]
    rows = {row[0]: row[1:4] for row in page.rows() if len(row) > 1}
    assert rows == {
        "Nightly backup": ["up 1 h", "1 h ago, running 1 h", "tomorrow 08:00"],
        "job-0": ["late 5 min", "1 h ago", "was due 09:00"],
        "weekly": ["up 1 h", "1 h ago", "22 Jan 08:00"],
        "new": ["pending", "", ""],  # no dashes
    }
    assert "—" not in page.text


def test_a_state_is_shown_by_a_mark_and_a_word_too(house):
    rooms = house(NOWHERE + JOB)
    marks = set()
    for action, state in (("", "up"), ("fail", "down")):
        rooms.ping("job", action)
        page = look(rooms)
        assert page.rows()[0][1].split()[0] == state
        assert re.search(rf'class="[^"]*\b{state}\b', page.html)
        marks |= set(re.findall(rf'\.{state} {{[^}}]*--mark: "(.)"', page.html))
    assert len(marks) == 2


@pytest.mark.parametrize(("days", "shown"), [
    (0, "since 3 h: 100 %"), (1, "24 h: 100 %"), (8, "7 d: 100 %"), (31, "30 d: 100 %"),
    (95, "90 d: 100 %"),
])
def test_uptime_names_its_period_and_on_the_first_day_since_when(house, days, shown):
    rooms = house('keep = "1000d"\n' + UTC + NOWHERE + monitor(interval="12h", grace="1h"))
    for _ in range(2 * days + 1):
        rooms.ping("job")
        rooms.live(12 * HOUR if days else 3 * HOUR, 3 * HOUR)
    assert look(rooms).rows()[0][5] == shown
    assert shown in look(rooms, "/monitor/job").facts["Up"]


def test_the_first_days_figure_knows_what_was_down(house):
    rooms = house(UTC + NOWHERE + JOB)
    for action, hours in (("", 2), ("fail", 1), ("", 1)):
        rooms.ping("job", action)
        rooms.live(hours * HOUR, 10 * MINUTE)
    assert look(rooms).rows()[0][5] == "since 4 h: 75 %"


def test_many_that_are_not_up_do_not_bury_the_page(house):
    rooms = house(UTC + NOWHERE + jobs(60))
    page = look(rooms)
    assert len([row for row in page.rows() if len(row) == 6]) == 60
    assert 0 < page.html.count("curl -fsS") <= 20


# What needs attention: Larm's own troubles only


def attention(rooms: House, path: str = "/") -> str:
    return look(rooms, path).section("Needs attention").text


def test_no_monitor_is_a_trouble_of_larms_own(house):
    rooms = house(UTC + channels(Phone()) + JOB + jobs(3))
    for key in ("job", "job-0", "job-1"):
        rooms.ping(key, "fail" if key == "job" else "")
    rooms.pause("job-1")
    rooms.live(2 * HOUR)
    assert attention(rooms) == ""


def test_that_nobody_would_be_alerted_needs_attention(house):
    rooms = house(JOB)
    assert "Nobody is alerted" in attention(rooms)
    rooms.save(NOWHERE + JOB)
    assert attention(rooms) == ""


def test_mistakes_in_the_file_need_attention_until_they_are_mended(house):
    rooms = house(NOWHERE + JOB)
    rooms.save(rooms.text + 'intervall = "1d"\ngrace = "30m"\n[channels]\n')
    assert "larm.toml" in attention(rooms)
    rooms.save(NOWHERE + JOB + 'intervall = "1d"\n')
    assert "monitors.job.intervall" in attention(rooms)
    assert "did you mean interval?" in attention(rooms)
    rooms.save(NOWHERE + JOB)
    assert attention(rooms) == ""


def test_that_larm_was_not_running_needs_attention_for_a_day(house):
    rooms = house(UTC + NOWHERE + monitor(interval="7d"))
    rooms.ping("job")
    rooms.restart(HOUR)
    assert re.search(r"Larm itself was not running from 2027-01-15 08:00:\S+ to "
                     r"2027-01-15 09:00:", attention(rooms))
    rooms.live(25 * HOUR, HOUR)
    assert attention(rooms) == ""


def test_a_channel_that_fails_needs_attention_until_it_is_back(house):
    phone = Phone(answer=False)
    rooms = house(UTC + channels(phone) + JOB)
    rooms.ping("job", "fail")
    rooms.live(3 * SECOND)
    rooms.deliver()
    assert re.search(r"Channel phone.*last failed 2027-01-15 08:00:03.*1 alert waiting",
                     attention(rooms))
    assert rooms.events()[0]["deliveries"][0]["error"] in attention(rooms)
    phone.answer = True
    rooms.live(10 * MINUTE)
    assert attention(rooms) == ""


def test_an_unknown_token_can_be_found_by_its_first_characters(house):
    rooms = house(NOWHERE + JOB)
    for _ in range(3):
        rooms.ask("/api/heartbeat/mistyped-token-of-the-backup", peer="192.168.1.5")
    rooms.clock.advance(4 * MINUTE)
    page = look(rooms)
    assert re.search(r"Unknown token .?mist.?… was pinged 3 times from 192.168.1.5, last 4 min ago",
                     page.text)
    assert "mistyped-token" not in page.html


def test_a_known_token_with_an_unknown_action_is_named_on_both_pages(house):
    rooms = house(NOWHERE + JOB)
    for action in ("", "fail", "0", "log", "start"):
        rooms.ping("job", action)
    assert attention(rooms) == ""
    rooms.ping("job", "done")
    for path in ("/", "/monitor/job"):
        assert "/done, which means nothing, 1 time from 127.0.0.1" in attention(rooms, path)
    assert TOKEN not in look(rooms).html


def test_of_odd_pings_the_newest_20_are_remembered(house):
    rooms = house(NOWHERE + JOB)
    for number in range(300):
        rooms.ask(f"/api/heartbeat/{number:04}")
    found = re.findall(r"(\d{4}).?…", attention(rooms))
    assert found == [f"{number:04}" for number in range(299, 279, -1)]


def test_a_disk_that_can_not_be_written_needs_attention(house):
    rooms = house(NOWHERE + JOB)
    with rooms.full_disk():
        rooms.ping("job", status=503)
        page = look(rooms)
        assert page.status == 200
        assert "can't" in page.section("Needs attention").text
    rooms.recover()
    rooms.ping("job")
    assert look(rooms).headline == "The only monitor is up"


# What happened


def test_what_happened_is_the_last_20_events_of_all_with_durations_and_who_was_told(house):
    phone, mail = Phone(), Phone("mail", answer=False)
    rooms = house(UTC + channels(phone, mail)
                  + monitor("a", "1d", notify=["phone", "mail"]) + monitor("b", "1d", notify=[])
                  + monitor("c", "1d", notify=["phone"]))
    for key, action in (("b", "1"), ("a", ""), ("a", "fail"), ("c", "fail")):
        rooms.ping(key, action)
        rooms.live(3 * SECOND)
        rooms.deliver()
    rooms.live(2 * HOUR, MINUTE)
    rooms.ping("b")
    rows = look(rooms).section("What happened").rows("past")
    assert rows[0] == ["10:00", "b", "up again after 2 h", "nobody"]
    assert [row[:3] for row in rows[1:]] == [
        ["08:00", "c", "down"], ["08:00", "a", "down"], ["08:00", "b", "down: exit status 1"]]
    assert (rows[1][3], rows[3][3]) == ("phone", "nobody")
    assert "phone" in rows[2][3].split()
    assert re.search(r"mail ?: not yet \(\w.*notification\.?\)", rows[2][3])
    for _ in range(12):
        rooms.clock.advance(3 * HOUR)
        rooms.ping("b", "fail")
        rooms.ping("b")
    rooms.save(rooms.text.replace("[monitors.b]", "[monitors.d]"))
    page = look(rooms).section("What happened")
    assert len(page.rows("past")) == 20
    assert {row[1] for row in page.rows("past")} == {"b"}
    assert "/monitor/b" not in page.html  # which is gone


def test_a_monitors_page_tells_its_own_events(house):
    rooms = house(UTC + NOWHERE + JOB + jobs(1))
    rooms.ping("job-0", "fail")
    rooms.ping("job", "fail")
    rooms.clock.advance(90 * MINUTE)
    rooms.ping("job")
    rows = look(rooms, "/monitor/job").section("What happened").rows("past")
    assert [row[:2] for row in rows] == [["09:30", "up again after 1 h 30 min"],
                                         ["08:00", "down: the job reported a failure"]]


# The days


@dataclass
class Bar:
    """Of the 90 days, counted from the oldest: which are drawn how, and how high the red stands."""

    title: str
    kinds: dict[str, set[int]]
    reds: dict[int, int]
    lines: set[str]  # at which heights the kinds are drawn


def bar(rooms: House, path: str = "/", **asked: str) -> Bar:
    svg = re.findall(r"<svg[^>]*><title>.*?</svg>", look(rooms, path, **asked).html, re.DOTALL)[0]
    paths: dict[str, str] = {}
    for kind, path in re.findall(r'<path class="?(\w+)"? d="([^"]*)"', svg):
        paths[kind] = paths.get(kind, "") + path
    kinds = {kind: {int(x) // 3 + n for x, width in re.findall(r"M(\d+) \d+h(\d+)", path)
                    for n in range((int(width) + 1) // 3)}
             for kind, path in paths.items() if kind != "down"}
    reds = {int(x) // 3: abs(int(end) - int(start) * (to == "V")) for x, start, to, end
            in re.findall(r"M(\d+) ?(\d+)([vV])(-?\d+)", paths.get("down", ""))}
    return Bar(html.unescape(re.findall("<title>(.*?)</title>", svg)[0]), kinds, reds,
               set(re.findall(r"M\d+ (\d+)h", svg)))


def test_each_day_of_the_bar_is_as_it_was(house):
    rooms = house(UTC + NOWHERE + monitor(interval="7d"))
    for action, days in (("", 2), ("fail", 2), ("", 1)):  # 15 to 17, 19 and 20 January
        rooms.ping("job", action)
        rooms.live(days * DAY, DAY)
    one = bar(rooms)
    assert one.title == "Down 19 Jan 8 h, 18 Jan all day, 17 Jan 16 h"
    assert one.kinds["none"] == set(range(84))
    assert one.kinds["up"] == {84, 85, 86, 88, 89}
    assert one.reds.keys() == {86, 87, 88}
    assert one.reds[87] > one.reds[86] > one.reds[88]
    assert len(one.lines) == 2  # a height for each kind


def test_how_long_a_day_was_down_is_how_high_its_red_part_stands(house):
    rooms = house(UTC + NOWHERE + monitor(interval="7d"))
    for down in (4 * MINUTE, HOUR, 5 * HOUR, 15 * HOUR):
        rooms.ping("job", "fail")
        rooms.live(down, down)
        rooms.ping("job")
        rooms.live(DAY - down, DAY - down)
    heights = [height for _, height in sorted(bar(rooms).reds.items())]
    assert len(heights) == 4
    assert heights == sorted(heights)
    assert heights[0] >= 3  # minutes can be seen
    assert heights[3] - heights[0] >= 5
    assert len(set(heights)) >= 3


def test_a_day_on_which_nobody_watched_is_neither_up_nor_down(house):
    rooms = house(UTC + NOWHERE + JOB)
    rooms.ping("job")
    rooms.restart(4 * DAY)
    assert bar(rooms).kinds["unwatched"] == {85, 86, 87, 88, 89}
    rooms.ping("job")
    rooms.pause("job")
    rooms.live(2 * DAY, DAY)
    one = bar(rooms)
    assert one.kinds["unwatched"] == {83, 84, 85, 86, 87, 88, 89}
    assert (one.kinds.keys(), one.reds) == ({"none", "unwatched"}, {})


def test_a_monitor_without_a_ping_has_no_data(house):
    rooms = house(UTC + NOWHERE + JOB)
    rooms.live(3 * DAY, DAY)
    assert (bar(rooms).title, bar(rooms).kinds) == ("No data", {"none": set(range(90))})


# A monitor's page


def test_a_monitors_page_begins_with_its_state_and_how_to_ping_it(house):
    rooms = house(UTC + NOWHERE + JOB)
    rooms.ping("job")
    rooms.live(3 * HOUR, HOUR)
    page = look(rooms, "/monitor/job")
    assert page.headline == "Nightly backup"
    assert page.answer == "Up since 08:00 (3 h): next due tomorrow 08:00, then 30 min grace."
    url = f"http://127.0.0.1:5276/api/heartbeat/{TOKEN}"
    main = page.html[page.html.index("<main>"):]
    assert main.index(f"<code>{url}</code>") < main.index("Ping now") < main.index("90 days")
    assert re.search('<button[^>]*type="button"[^>]*>Copy', main)


@pytest.mark.parametrize(("do", "pass_by", "says"), [
    ("", 0, "Never pinged: watched from its first heartbeat on."),
    ("start", 5 * MINUTE, "Never pinged: watched from its first heartbeat on. "
                          "Running since 08:00."),
    ("|start", 2 * HOUR, "Up since 08:00 (2 h): next due tomorrow 08:00, then 30 min grace. "
                         "Running since 08:00."),
    ("", DAY + 10 * MINUTE, "Never pinged: watched from its first heartbeat on."),
    ("|", DAY + 10 * MINUTE, "Late since 08:00 (10 min): down at 08:30 unless it pings."),
    ("|", 2 * DAY, "Down since yesterday 08:30 (23 h): no heartbeat came in time."),
    ("|7", MINUTE, "Down since 08:00 (1 min): exit status 7."),
    ("|start", 3 * HOUR + MINUTE, "Down since 11:00 (1 min): a run has not ended within 3 h. "
                         "Running since 08:00."),
    ("|pause", HOUR, "Paused since 08:00 (1 h): until it is resumed."),
    ("|pause 1d", HOUR, "Paused since 08:00 (1 h): until tomorrow 08:00."),
])
def test_the_sentence_of_each_state(house, do, pass_by, says):
    rooms = house(UTC + channels(Phone()) + JOB + 'max_runtime = "3h"\n')
    for one in do.split("|") if do else ():
        verb, *more = one.split() or [""]
        rooms.pause("job", *more) if verb == "pause" else rooms.ping("job", verb)
    rooms.live(pass_by, min(pass_by or 1, 10 * MINUTE))
    assert look(rooms, "/monitor/job").answer == says


def test_a_monitors_page_says_what_is_set(house):
    rooms = house(UTC + channels(Phone(), Phone("mail")) + monitor("router", "5m") + """
        [monitors.job]
        schedule = "30 4 * * *"
        grace = "1h"
        max_runtime = "2h"
        remind = "1d"
        quiet = ["22:00-07:00", "12:30-13:00"]
        depends_on = ["router"]
        note = "Runs on nas"
    """)
    rooms.ping("job")
    page = look(rooms, "/monitor/job")
    assert page.facts.items() >= {
        "Key": "job", "Depends on": "router", "Time limit": "2 h a run", "Alerts to": "phone, mail",
        "Reminders": "every 1 d while down", "Quiet": "22:00 to 07:00, 12:30 to 13:00",
        "Next times": "tomorrow 04:30, 17 Jan 04:30, 18 Jan 04:30",
        "Last heartbeat": "08:00 (under 1 min ago)",
    }.items()
    assert page.facts["Expected"].endswith("with 1 h grace")
    assert page.text.count("Runs on nas") == 1
    assert look(rooms, "/monitor/router").facts.keys() == {"Expected", "Key", "Alerts to"}


@pytest.mark.parametrize(("more", "says"), [
    ({"depends_on": ["router"]}, "held: router is down"),
    ({"quiet": ["07:00-09:30"]}, "quiet until 09:30"),
])
def test_what_is_held_says_why(house, more, says):
    phone = Phone()
    rooms = house(UTC + channels(phone) + monitor("router", "1h", notify=[])
                  + monitor("job", "1h", "10m", **more))
    rooms.ping("router", "fail")
    rooms.ping("job", "fail")
    rooms.live(10 * SECOND, SECOND)
    assert phone.messages == []
    for path in ("/", "/monitor/job"):
        assert re.search(f"[Aa]lert held: ?.*{says}", look(rooms, path).text), path
        assert "held: held" not in look(rooms, path).text


def test_a_monitors_page_tells_its_rhythm_its_runs_and_gives_advice(house):
    rooms = house(UTC + NOWHERE + monitor(interval="1h", grace="5m"))
    for number in range(6):
        rooms.ping("job", "start")
        rooms.live((4 + number) * MINUTE, MINUTE)
        rooms.ping("job")
        rooms.live(53 * MINUTE + 2 * MINUTE * number, MINUTE)
    facts = look(rooms, "/monitor/job").facts
    assert facts["Heartbeats"] == "1 h 4 min typically, 58 min to 1 h 10 min apart"
    assert facts["Runs take"] == "7 min typically, 4 min to 9 min"
    assert 'try grace = "15m"' in facts["Advice"]


def runs(page: Page) -> list[list[str]]:
    return page.section("Runs").rows("past runs")


def test_a_run_is_one_row_with_its_duration_and_its_output(house):
    rooms = house(UTC + NOWHERE + JOB)
    steps = [("start", 5, ""), ("", 60, "\x1b[32mfine\x1b[0m\n2 files"), ("start", 65, ""),
             ("3", 1, "50%\r100%\nbroken"), ("log", 1, "half way"), ("start", 0, "")]
    for action, minutes, body in steps:
        rooms.ping("job", action, body, USER_AGENT="larm/0.2")
        rooms.clock.advance(minutes * MINUTE)
    page = look(rooms, "/monitor/job")
    assert runs(page) == [
        ["10:12:00", "still running", "", "127.0.0.1 larm/0.2", ""],
        ["10:11:00", "output", "", "127.0.0.1 larm/0.2", "1 line half way"],
        ["10:10:00", "failed, exit status 3", "1 h 5 min", "127.0.0.1 larm/0.2",
         "2 lines 100% broken"],
        ["08:05:00", "success", "5 min", "127.0.0.1 larm/0.2", "2 lines fine 2 files"],
    ]
    assert "fine\n2 files</pre>" in page.html
    chart = page.section("Runs")
    assert "at most 1 h 5 min (10:10)" in chart.text
    heights = re.findall(r'class="(\w+)" d="M\d+ 80v-(\d+)"', chart.html)
    assert {name for name, _ in heights} == {"up", "down", "paused"}
    assert max(heights, key=lambda one: int(one[1]))[0] == "down"


def test_older_runs_are_a_link_away_and_each_stands_on_one_page(house):
    rooms = house(UTC + NOWHERE + JOB)
    for number in range(41):
        rooms.ping("job", "start")
        rooms.clock.advance(HOUR)
        rooms.ping("job", "", f"output number {number}.")
        rooms.clock.advance(23 * HOUR)
    found, path = [], "/monitor/job"
    while path:
        page = look(rooms, path)
        found += runs(page)
        older = re.findall(r'href="(/monitor/job\?before=\d+)"', page.html)
        path = older[0] if older else ""
    numbers = [int(re.findall(r"number (\d+)\.", row[4])[0]) for row in found if row[4]]
    assert numbers == list(range(41))[::-1]
    assert {(row[1], row[2]) for row in found} == {("success", "1 h")}


def test_before_any_id_is_fine_on_a_page_and_what_is_none_is_said(house):
    rooms = house(NOWHERE + JOB)
    rooms.ping("job")
    for before in ("1", "2", "999", "9" * 18):
        assert look(rooms, f"/monitor/job?before={before}").status == 200
    for before in ("", "x", "-1", "9" * 40, "%F0%9F%98%80", "1'"):
        assert look(rooms, f"/monitor/job?before={before}").status in (200, 400)


@pytest.mark.parametrize(("said", "shown"), [
    ("\x1b[1;31mred\x1b[0m", "red"),
    ("\x1b]0;a title\x07text", "text"),
    ("\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("10%\r50%\r100%\r\ndone", "100%\ndone"),
    ("a\x00b\x08c\x9bd\x7f", "abcd"),
    ("a\x1b(Bb", "ab"),
    ("smile 😀 שלום\ttab", "smile 😀 שלום\ttab"),
])  # fmt: skip
def test_output_is_shown_as_a_terminal_would_leave_it(house, said, shown):
    rooms = house(NOWHERE + JOB)
    rooms.ping("job", "fail", said)
    for path in ("/", "/monitor/job"):
        assert f">{shown}</pre>" in look(rooms, path).html, path


# How to ping


def how(rooms: House) -> dict[str, str]:
    found = re.findall(r"<th>([^<]*)</th><td><pre>(.*?)</pre>",
                       look(rooms, "/monitor/job").section("How to ping").html, re.DOTALL)
    return {html.unescape(where): html.unescape(what) for where, what in found}


def test_how_to_ping_has_the_real_url_in_every_language(house):
    rooms = house(NOWHERE + JOB)
    found = how(rooms)
    url = f"http://127.0.0.1:5276/api/heartbeat/{TOKEN}"
    assert len(found) >= 5
    assert [where for where, what in found.items() if url not in what] == []
    for where in ("crontab", "systemd service", "Shell, with its failures"):
        curl = "curl -fsS -m 10 --retry 5 --retry-connrefused -o /dev/null "
        assert f"{curl}{url}" in found[where], where


@pytest.mark.parametrize("interval", ["30s", "1m", "90s", "5m", "45m", "1h", "90m", "6h", "7h",
                                      "23h", "1d", "36h", "2d", "5d", "1w", "10d", "30d", "31d",
                                      "60d", "366d"])
def test_the_crontab_line_fits_the_interval(house, interval):
    """Its times are never further apart than the interval, nor much more often than need be."""
    rooms = house(UTC + NOWHERE + monitor(interval=interval))
    seconds = rooms.monitor("job")["interval_seconds"]
    times = " ".join(how(rooms)["crontab"].split()[:5])
    begin = datetime(2027, 1, 1)
    moments = list(itertools.islice(CronSim(times, begin), 500))
    apart = [later - earlier for earlier, later in itertools.pairwise(moments)]
    if seconds >= 60:
        assert max(apart) <= timedelta(seconds=seconds), times
    assert max(apart) * 12 >= timedelta(seconds=seconds), times
    assert (max(apart) == timedelta(weeks=1)) == (interval in ("1w", "10d", "30d"))


def test_the_crontab_line_of_a_schedule_is_the_schedule(house):
    rooms = house(NOWHERE + '[monitors.job]\nschedule = "15 3 * * 1-5"\ntoken = "a%token"\n'
                  .replace("a%token", TOKEN))
    assert how(rooms)["crontab"].startswith("15 3 * * 1-5 /")


def test_adding_a_monitor_shows_no_monitors_token(house):
    rooms = house(NOWHERE + JOB)
    rooms.ping("job")
    page = look(rooms)
    assert "larm.py add " in page.text
    assert str(rooms.folder / "larm.toml") in page.text
    assert "/api/heartbeat/TOKEN" in page.text
    assert TOKEN not in page.html
    assert re.search("<details[^>]*><summary>Add a monitor", page.html)
    assert "open" not in re.findall("<details([^>]*)><summary>Add a monitor", page.html)[0]


# Buttons


def press(rooms: House, verb: str, body: bytes = b"", **headers: str) -> Page:
    return look(rooms, f"/monitor/job/{verb}", "POST", body, **headers)


def test_a_button_pauses_and_another_resumes(house):
    rooms = house(UTC + NOWHERE + JOB)
    rooms.ping("job")
    page = press(rooms, "pause", b"for=1h")
    assert (page.status, page.headers["Location"]) == (303, "/monitor/job")
    page = look(rooms, "/monitor/job")
    assert "until 09:00" in page.answer
    assert ("Resume" in page.html, ">Pause<" in page.html) == (True, False)
    press(rooms, "resume")
    assert look(rooms, "/monitor/job").answer.startswith("Up since")
    assert press(rooms, "pause", b"for=").status == 303
    assert "until it is resumed" in look(rooms, "/monitor/job").answer


def test_ping_now_is_a_heartbeat_from_whoever_pressed_it(house):
    rooms = house(NOWHERE + JOB)
    page = press(rooms, "ping")
    assert (page.status, page.headers["Location"]) == (303, "/monitor/job")
    [beat] = rooms.heartbeats("job")
    assert (beat["signal"], beat["from"], rooms.state("job")) == ("success", "127.0.0.1", "up")
    with rooms.full_disk():
        assert press(rooms, "ping").status == 503
    rooms.recover()


def outcome(rooms: House) -> str:
    return str(wait_until(lambda: look(rooms, "/monitor/job").facts.get("Test of phone")))


def test_a_button_tests_the_channels_and_the_page_says_when_and_what_came_of_it(house):
    phone, other = Phone(), Phone("other")
    rooms = house(UTC + channels(phone, other) + monitor(notify=["phone"]))
    assert "Send a test alert to phone<" in look(rooms, "/monitor/job").html
    assert press(rooms, "test").status == 303
    assert outcome(rooms) == "sent (08:00)"
    assert (phone.titles(), other.tries) == (["Test alert from Larm"], 0)
    assert rooms.post("channels/other/test")["sent"] is True
    assert "Test of other" not in look(rooms, "/monitor/job").facts  # it alerts there only
    phone.answer = False
    rooms.live(2 * HOUR, HOUR)
    wait_until(lambda: press(rooms, "test").status == 303)
    wait_until(lambda: phone.tries == 2)
    assert re.fullmatch(r"not sent: .* \(10:00\)", outcome(rooms))
    rooms.save(rooms.text + monitor("another"))
    assert "Test of phone" in look(rooms, "/monitor/job").facts
    rooms.save(rooms.text.replace("tests://phone", "tests://phone?new=yes"))
    assert "Test of phone" not in look(rooms, "/monitor/job").facts


def test_a_button_that_is_not_there_or_can_not_be_pressed_does_nothing(house):
    rooms = house(NOWHERE + JOB)
    assert press(rooms, "delete").status == 404
    assert look(rooms, "/monitor/nobody/pause", "POST").status == 404
    assert press(rooms, "pause", b"for=never").status == 400
    assert press(rooms, "pause", ORIGIN="https://evil.example").status == 403
    assert rooms.state("job") == "pending"
    assert press(rooms, "pause", b"\xff" * 20_000).status == 303
    for key, labels in (("job", ["Resume"]), ("off", [])):
        rooms.save(NOWHERE + JOB + monitor("off", enabled=False, notify=[]))
        buttons = re.findall("<button[^>]*>([^<]*)<", look(rooms, f"/monitor/{key}").html)
        assert [one for one in buttons if one in ("Pause", "Resume")] == labels


@pytest.mark.parametrize("action", ["fail", "3", "start", "log"])
def test_a_monitor_whose_first_ping_was_no_success_is_shown_paused_and_resumed(house, action):
    rooms = house(UTC + NOWHERE + JOB)
    rooms.ping("job", action)
    for verb in (None, "pause", "resume", "pause"):
        if verb:
            assert press(rooms, verb).status == 303
        for path in ("/", "/monitor/job", "/badge/job.svg", "/metrics", "/api/v1/monitors"):
            assert rooms.ask(path).status == 200, (verb, path)
        rooms.live(10 * MINUTE, MINUTE)
    rooms.restart(HOUR)
    assert look(rooms, "/monitor/job").answer.startswith("Paused since")


# A reload


def test_a_reload_while_pages_are_drawn_breaks_none(house):
    rooms = house(NOWHERE + JOB + jobs(20))
    texts = [rooms.text + monitor("new"), rooms.text]
    for key in ("job", "job-3"):
        rooms.ping(key, "fail")
    done, found, failed = threading.Event(), [], []

    def draw() -> None:
        paths = itertools.cycle(["/", "/monitor/new", "/api/v1/monitors", "/metrics", "/badge/"
                                 "all.svg", "/api/v1/events", "/monitor/job"])
        while not done.is_set():
            path = next(paths)
            try:
                found.append((path, rooms.ask(path).status))
            except Exception as error:
                failed.append((path, error))

    drawing = [threading.Thread(target=draw) for _ in range(3)]
    for thread in drawing:
        thread.start()
    for number in range(30):
        rooms.save(texts[number % 2])
    done.set()
    for thread in drawing:
        thread.join()
    assert failed == []
    assert len(found) > 30
    assert {status for path, status in found if path != "/monitor/new"} == {200}
    assert {status for path, status in found if path == "/monitor/new"} <= {200, 404}


def test_a_new_monitor_has_its_page_before_the_database_knows_it(house):
    rooms = house(NOWHERE + JOB)
    with rooms.hanging_disk():
        saving = threading.Thread(target=rooms.save, args=(rooms.text + monitor("new"),))
        saving.start()
        assert look(rooms, "/monitor/new").status in (200, 404)
        assert look(rooms).status == 200
    saving.join()
    assert look(rooms, "/monitor/new").status == 200


# The refresh: only what has changed


def refreshed(rooms: House, path: str = "/", mark: str = "", **more: str) -> Page:
    return look(rooms, path, X_LARM_REFRESH="1", IF_NONE_MATCH=mark, **more)


@pytest.mark.parametrize("path", ["/", "/monitor/job", "/?q=job"])
def test_a_refresh_sends_only_what_has_changed(house, path):
    rooms = house(UTC + NOWHERE + JOB + jobs(15))
    rooms.ping("job")
    rooms.live(30 * SECOND)
    whole, part = look(rooms, path), refreshed(rooms, path)
    assert part.headers["Content-Type"].startswith("text/html")
    assert len(part.html) < len(whole.html) - 5_000
    for piece in re.findall("<title>.*?</title>|<link .*?>|<main>.*</main>", whole.html, re.DOTALL):
        assert piece in part.html
    mark = part.headers["Etag"]
    assert look(rooms, path, IF_NONE_MATCH=mark).status == 200  # the whole page is never 304
    again = refreshed(rooms, path, mark)
    assert (again.status, again.html, again.headers["Etag"]) == (304, "", mark)
    rooms.live(15 * SECOND)
    assert refreshed(rooms, path, mark).status == 304  # nothing to be seen has changed
    rooms.ping("job", "fail")
    after = refreshed(rooms, path, mark)
    assert (after.status, after.headers["Etag"] != mark) == (200, True)
    assert "down" in after.text.lower()


def test_a_refresh_says_who_may_not_see_it_any_more(house):
    rooms = house(NOWHERE + JOB + jobs(1))
    marks = {path: refreshed(rooms, path).headers["Etag"] for path in ("/", "/monitor/job")}
    rooms.save('password = "a new one"\n' + rooms.text)
    assert refreshed(rooms, "/", marks["/"]).status == 401
    rooms.save('password = "a new one"\npublic = true\n' + NOWHERE + jobs(1))
    assert refreshed(rooms, "/monitor/job", marks["/monitor/job"]).status == 404
    assert refreshed(rooms, "/", marks["/"]).status == 200


# Any text


NASTY = [
    "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "\"' onmouseover='x",
    "{{7*7}} {{!style}}", "% import os", "</title></style></main>", "&lt;b&gt;", "]]>", "<!--",
    "\u202eevil", "😀" * 50, "w" * 500,
]  # fmt: skip
PLACES = {  # where a text may come from: the pages that show it
    "name": "/ /monitor/job", "note": "/ /monitor/job", "output": "/ /monitor/job",
    "log": "/monitor/job", "agent": "/monitor/job", "rid": "/monitor/job",
    "error": "/ /monitor/job", "test": "/monitor/job", "channel": "/ /monitor/job",
    "sender": "/ /monitor/job", "action": "/ /monitor/job", "mistake": "/", "filter": "/?q=",
}  # fmt: skip


class Tags(HTMLParser):
    """A page's elements with the names of their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, *(name for name, _ in attrs)))


def full_of(make: Callable[..., House], text: str) -> tuple[House, dict[str, Page]]:
    """A Larm that was told `text` wherever that is possible, and its pages."""
    line = "".join(letter for letter in text if letter.isprintable())
    said = {place: f"{place}{line}" for place in PLACES} | {"note": f"note{text}",
                                                            "output": f"output{text}"}
    phone = Phone()

    def refuse(what: str) -> Callable[[], bool]:
        def answer() -> bool:
            logging.getLogger("apprise").warning("%s", said[what])
            return False

        return answer

    phone.answer = refuse("error")
    rooms = make(UTC + channels(**{json.dumps(said["channel"], ensure_ascii=False): phone.url})
                 + monitor(interval="1d", name=said["name"], note=said["note"], token=TOKEN))
    latin = {place: one.encode().decode("latin-1") for place, one in said.items()}
    rooms.ping("job", "log", said["log"])
    rooms.ping("job", "1", said["output"], said["rid"][:64], USER_AGENT=latin["agent"],
               X_FORWARDED_FOR=latin["sender"])
    rooms.ask(f"/api/heartbeat/{TOKEN}/{quote(said['action'][:20])}")
    rooms.ask(f"/api/heartbeat/{quote(text[:4])}", X_FORWARDED_FOR=latin["sender"])
    rooms.live(3 * SECOND)
    rooms.deliver()
    phone.answer = refuse("test")
    tries = phone.tries
    rooms.ask("/monitor/job/test", "POST")
    wait_until(lambda: phone.tries > tries)
    wait_until(lambda: "Test of" in look(rooms, "/monitor/job").text)
    rooms.save(rooms.text + f"{json.dumps(said['mistake'], ensure_ascii=False)} = 1\n")
    return rooms, {path: look(rooms, path + (quote(said["filter"]) if "?" in path else ""))
                   for path in ("/", "/?q=", "/monitor/job")}


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, ...]]]:
    def make(text: str) -> House:
        return House(tmp_path_factory.mktemp("larm"), text)

    _, pages = full_of(make, "mere")
    return {path: Tags(page.html).found for path, page in pages.items()}


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_any_text_is_shown_as_text_wherever_it_comes_from(house, harmless, nasty):
    _, pages = full_of(house, nasty)
    for path, page in pages.items():
        assert page.status == 200
        assert Tags(page.html).found == harmless[path]
    for place, where in PLACES.items():
        for path in where.split():
            shown = html.escape(f"{place}{nasty}")[:15 if place == "action" else 40]
            as_said = nasty.isascii() or place not in ("agent", "sender", "action")
            as_said &= place != "mistake" or '"' not in nasty
            if nasty.isprintable() and as_said:
                assert shown in pages[path].html, (place, path)


@pytest.mark.parametrize("path", ["/", "/monitor/job"])
def test_a_page_loads_nothing_and_its_own_style_and_script_are_allowed_by_its_policy(house, path):
    page = look(house(NOWHERE + JOB), path)
    for kind in ("style", "script"):
        [found] = re.findall(rf"<{kind}>(.*?)</{kind}>", page.html, re.DOTALL)
        wanted = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{wanted}'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"<[^>]* (style|on\w+)=", page.html)
    assert not re.search(r"(?:src|href|url\()=?\"?(?:https?:)?//", page.html)


# Filter


def test_the_filter_finds_names_keys_and_states_and_is_there_from_15_monitors_on(house):
    rooms = house(NOWHERE + jobs(14))
    assert 'role="search"' not in look(rooms).html
    rooms.save(NOWHERE + jobs(15))
    assert 'role="search"' in look(rooms).html
    rooms.save(NOWHERE + JOB + jobs(20))
    rooms.ping("job-7")

    def found(asked: str) -> list[str]:
        return [row[0] for row in look(rooms, f"/?q={quote(asked)}").rows() if len(row) > 1]

    assert found("NIGHTLY") == ["Nightly backup"]
    assert found("job-1") == ["job-1", *(f"job-{number}" for number in range(10, 20))]
    assert "job-7" not in found("pending job")
    assert len(found("")) == 21
    assert found("nothing of the kind") == []
    assert 'value="nightly"' in look(rooms, "/?q=nightly").html
    assert look(rooms, "/?q=%ff%00&q=2").status == 200


# In public, below a path, in words


def test_in_public_states_are_shown_and_nothing_else(house):
    rooms = house('public = true\npassword = "a password"\n' + UTC + NOWHERE + JOB
                  + 'note = "A note"\n')
    rooms.tokens["job"] = TOKEN
    rooms.ping("job")
    rooms.ping("job", "3", "the output")
    rooms.ask("/api/heartbeat/mistyped", peer="192.168.1.5")
    rooms.live(2 * MINUTE)
    for path in ("/", "/monitor/job"):
        page = look(rooms, path, peer=FAR)
        assert page.status == 200
        assert "exit status 3" in page.text.lower()
        assert "since 08:00" in page.text
        assert bar(rooms, path, peer=FAR).title.startswith("Down 15 Jan")
        for hidden in ("A note", "the output", "phone", "<form", "mist", "192.168", TOKEN,
                       "/api/heartbeat/", "larm.toml", "Who was told", "Needs attention"):
            assert hidden not in page.html, hidden


def test_every_link_and_form_stays_below_the_path_of_url(house):
    rooms = house('url = "https://home.example/larm"\n' + NOWHERE + jobs(20))
    for _ in range(25):
        rooms.ping("job-1", "log", "x")
        rooms.clock.advance(HOUR)
    for path in ("/larm/", "/larm/monitor/job-1", "/larm/?q=job"):
        found = re.findall(r'(?:href|action)="([^"#d][^"]*)"', look(rooms, path).html)
        assert len(found) > 2
        assert [link for link in found if not link.startswith("/larm/")] == []
    posted = look(rooms, "/larm/monitor/job-1/pause", "POST")
    assert posted.headers["Location"] == "/larm/monitor/job-1"


def test_an_error_page_says_its_own_sentence(house):
    rooms = house(NOWHERE + JOB)
    for path, method, status, says in (
        ("/nothing", "GET", 404, "There is no such page"),
        ("/monitor/nobody", "GET", 404, "There is no monitor .?nobody"),
        ("/badge/nobody.svg", "GET", 404, "There is no monitor .?nobody"),
        ("/", "POST", 405, "does not take that method"),
        ("/monitor/job/pause", "POST", 403, "another site"),
    ):
        page = look(rooms, path, method, ORIGIN="https://evil.example")
        assert page.status == status
        assert re.search(says, page.answer), page.answer
        assert str(status) in page.headline
        assert 'href="/"' in page.html  # a way out
    assert "for" in look(rooms, "/monitor/job/pause", "POST", b"for=never").answer or (
        "never" in look(rooms, "/monitor/job/pause", "POST", b"for=never").answer)


# Sizes


@pytest.fixture
def memory_house(tmp_path: Path) -> Iterator[Callable[[str], House]]:
    """A House on a disk that costs nothing: thousands of pings come one by one."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield lambda text: House(Path(folder), text)


def filled(make: Callable[..., House], count: int) -> House:
    """Monitors with two outages each within the last 90 days."""
    rooms = make('keep = "366d"\n' + UTC + NOWHERE + "".join(
        monitor(f"a-usual-name-{n}", "100d", name=f"A usual name {n}", token=f"a-token-{n:05}")
        for n in range(count)))
    rooms.tokens = {f"a-usual-name-{n}": f"a-token-{n:05}" for n in range(count)}
    for month in range(3):
        for key in rooms.tokens:
            rooms.clock.advance(30 * DAY // count)
            rooms.ping(key, "fail" if month else "")
            if month:
                rooms.clock.advance(MINUTE)
                rooms.ping(key)
        rooms.tick()
    return rooms


def test_a_dashboard_of_1000_monitors_is_at_most_400_kb_and_quickly_drawn(memory_house):
    rooms = filled(memory_house, 1_000)
    took = []
    for _ in range(3):
        began = time.thread_time()
        page = look(rooms)
        took.append(time.thread_time() - began)
        began = time.thread_time()
        part = refreshed(rooms)
        took.append(time.thread_time() - began)
    assert page.headline == "All 1000 are up"
    assert len([row for row in page.rows() if len(row) == 6]) == 1_000
    assert len(page.html.encode()) <= 400_000
    assert len(part.html.encode()) <= 400_000
    assert min(took) < 0.5, took  # seconds of CPU; half of it where nothing else runs


def test_a_dashboard_of_50_monitors_is_at_most_60_kb(memory_house):
    assert len(look(filled(memory_house, 50)).html.encode()) <= 60_000
