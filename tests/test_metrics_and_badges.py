"""What Prometheus scrapes, read by its own client's parser, and the badges."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest
from conftest import START, TOKEN, Answer, House
from prometheus_client.parser import text_string_to_metric_families
from receivers import Phone, channels, monitor

import larm
from larm import DAY, HOUR, MINUTE, SECOND

STATES = ("up", "late", "down", "pending", "paused")
JOBS = channels(phone="json://127.0.0.1:9/") + monitor(
    interval="1h", grace="10m", name="Nightly backup", token=TOKEN
) + monitor("other", "1h", "10m", notify=[])
Samples = dict[tuple[str, ...], float]


@pytest.fixture
def rooms(house: Callable[..., House]) -> House:
    return house(JOBS)


def scrape(rooms: House) -> dict[str, Samples]:
    """The samples' values by name, then by their labels' values."""
    answer = rooms.ask("/metrics")
    assert answer.status == 200
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        assert family.documentation
        assert family.type in ("gauge", "counter", "summary")
        for sample in family.samples:
            values = tuple(sample.labels.values())
            assert values not in found.setdefault(sample.name, {})
            found[sample.name][values] = sample.value
    return found


# The format


def test_the_metrics_are_in_the_text_format_and_named_by_prometheuss_conventions(rooms):
    answer = rooms.ask("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.body.decode().splitlines()
    assert answer.body.endswith(b"\n")
    assert "" not in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 10
    assert names == [line.split()[2] for line in lines if line.startswith("# HELP")]
    for family in text_string_to_metric_families(answer.body.decode()):
        assert re.fullmatch("(larm|process)_[a-z_]+", family.name)
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
        assert not re.search("_(ms|minutes|hours|milliseconds)(_|$)", family.name)


@pytest.mark.parametrize("name", ['a "quoted" one', "back\\slash", "\\n", 'x"} 1#', "öre ✓ 密",
                                  "{}", "a,b=c", "%s %(x)s {0}"])
def test_a_channel_may_have_any_name(house, name):
    rooms = house(channels(**{json.dumps(name): "json://127.0.0.1:9/"}) + monitor())
    assert scrape(rooms)["larm_deliveries_pending"] == {(name,): 0}


# The values


def test_a_monitors_state_is_1_and_its_others_are_0(rooms):
    found = scrape(rooms)["larm_monitor_state"]
    assert len(found) == 2 * len(STATES)
    assert {key for key, value in found.items() if value} == {("job", "pending"),
                                                              ("other", "pending")}
    rooms.ping("job")
    for state, pass_by in (("up", HOUR), ("late", 11 * MINUTE), ("down", 0)):
        shown = scrape(rooms)["larm_monitor_state"]
        assert {one: shown["job", one] for one in STATES} == {one: one == state for one in STATES}
        rooms.watch(pass_by + 1, 10 * SECOND)


def test_a_paused_monitor_is_paused_and_has_no_deadline(rooms):
    rooms.ping("job")
    assert ("job",) in scrape(rooms)["larm_monitor_deadline_timestamp_seconds"]
    rooms.pause("job")
    found = scrape(rooms)
    assert found["larm_monitor_state"]["job", "paused"] == 1
    assert "larm_monitor_deadline_timestamp_seconds" not in found


def test_moments_and_durations_are_in_seconds(rooms):
    assert "larm_monitor_last_duration_seconds" not in scrape(rooms)
    for took, end in ((5_000, "fail"), (1_500, "")):
        rooms.ping("job", "start")
        rooms.clock.advance(took)
        rooms.ping("job", end)
    now = (START + 6_500) / 1000
    found = scrape(rooms)
    assert found["larm_monitor_last_duration_seconds"] == {("job",): 1.5}
    assert found["larm_monitor_last_heartbeat_timestamp_seconds"] == {("job",): now}
    assert found["larm_monitor_deadline_timestamp_seconds"] == {("job",): now + 4_200}
    assert found["process_start_time_seconds"] == {(): START / 1000}
    assert found["larm_build_info"] == {(larm.__version__,): 1}


def test_events_are_counted_from_the_start(rooms):
    rooms.ping("job", "fail")
    assert scrape(rooms)["larm_events_total"] == {
        ("job", "down"): 1, ("job", "up"): 0, ("other", "down"): 0, ("other", "up"): 0}
    rooms.ping("job")
    rooms.watch(2 * HOUR, MINUTE)
    for _ in range(2):
        found = scrape(rooms)["larm_events_total"]
        assert (found["job", "down"], found["job", "up"]) == (2, 1)
    rooms.restart()
    assert scrape(rooms)["larm_events_total"]["job", "down"] == 0


def test_pruning_makes_no_counter_go_down(house):
    rooms = house('keep = "1d"\n' + monitor(interval="1h"))
    for count in range(1, 5):
        rooms.ping("job")
        rooms.watch(DAY, 10 * MINUTE)
        found = scrape(rooms)["larm_events_total"]
        assert found == {("job", "down"): count, ("job", "up"): count - 1}
    rooms.watch(2 * DAY, 10 * MINUTE)
    assert len(rooms.events()) < 4
    assert scrape(rooms)["larm_events_total"] == found


def test_deliveries_are_counted_by_channel_and_result(house):
    phone = Phone(answer=False)
    rooms = house(channels(phone) + monitor())
    assert scrape(rooms)["larm_deliveries_total"] == {("phone", "sent"): 0, ("phone", "failed"): 0}
    for sent, failed in ((0, 1), (1, 1)):
        rooms.ping("job", "fail")
        rooms.watch(3 * SECOND if failed > sent else 3 * MINUTE)
        rooms.deliver()
        found = scrape(rooms)
        assert found["larm_deliveries_total"]["phone", "sent"] == sent
        assert found["larm_deliveries_total"]["phone", "failed"] >= failed
        assert found["larm_deliveries_pending"] == {("phone",): 1 - sent}
        phone.answer = True


def test_commits_are_counted_and_timed(rooms):
    before = scrape(rooms)
    for number in range(3):
        rooms.ping("job" if number else "other", "log")
        rooms.clock.advance(MINUTE)
    after = scrape(rooms)
    assert after["larm_commit_seconds_count"][()] >= before["larm_commit_seconds_count"][()] + 3
    assert after["larm_commit_seconds_sum"][()] > before["larm_commit_seconds_sum"][()]


def test_gaps_are_counted_and_measured_and_a_pause_is_none(rooms):
    rooms.pause("other")
    rooms.watch(MINUTE)
    rooms.resume("other")
    assert scrape(rooms)["larm_gaps_total"] == {(): 0}
    rooms.sleep_through(90 * SECOND)
    found = scrape(rooms)
    assert found["larm_gaps_total"] == {(): 1}
    assert found["larm_gap_seconds_total"][()] == pytest.approx(90, abs=2)
    rooms.watch(MINUTE)
    rooms.clock.set_wall(-HOUR)  # a gap of less than nothing
    rooms.watch(10 * SECOND)
    assert scrape(rooms)["larm_gap_seconds_total"] == found["larm_gap_seconds_total"]


def test_metrics_are_those_of_the_configuration(rooms):
    rooms.ping("job", "fail")
    rooms.save(monitor("new"))
    found = scrape(rooms)
    assert {labels[0] for labels in found["larm_monitor_state"]} == {"new"}
    assert found["larm_events_total"] == {("new", "down"): 0, ("new", "up"): 0}
    assert "larm_deliveries_total" not in found


# Badges

SVG = "{http://www.w3.org/2000/svg}"


def badge(answer: Answer) -> tuple[list[str], list[str]]:
    """(texts, colours) of a badge that is right as a drawing and loads nothing."""
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "image/svg+xml; charset=UTF-8"
    svg = ElementTree.fromstring(answer.body)
    assert svg.tag == f"{SVG}svg"
    assert svg.get("role") == "img"
    assert svg.find(f"{SVG}title").text == svg.get("aria-label")
    texts = svg.findall(f".//{SVG}text")
    boxes = svg.findall(f"{SVG}g/{SVG}rect")
    assert svg.get("aria-label") == ": ".join(text.text for text in texts)
    left, right = (int(box.get("width")) for box in boxes)
    assert int(svg.get("width")) == left + right
    for text, start, end in zip(texts, (0, left), (left, left + right), strict=True):
        assert start < int(text.get("x")) < int(text.get("x")) + int(text.get("textLength")) < end
    names = {name for one in svg.iter() for name in one.attrib}
    assert not names & {"href", "src", "style", "onload"}
    return [text.text for text in texts], [box.get("fill") for box in boxes]


def test_a_badge_shows_the_monitors_name_and_state_each_in_a_colour(rooms):
    colours = set()
    rooms.ping("job")
    for state, pass_by in (("up", HOUR), ("late", 11 * MINUTE), ("down", 0)):
        texts, [_, colour] = badge(rooms.ask("/badge/job.svg"))
        assert texts == ["Nightly backup", state]
        colours.add(colour)
        rooms.watch(pass_by + 1, 10 * SECOND)
    assert badge(rooms.ask("/badge/other.svg"))[0] == ["other", "pending"]
    assert len(colours) == 3


def test_the_badge_of_all_shows_the_most_urgent_state(rooms):
    def text() -> str:
        [name, text], _ = badge(rooms.ask("/badge/all.svg"))
        assert name == "monitors"
        return text

    assert text() == "2 pending"
    rooms.ping("job")
    assert text() == "1 up"
    rooms.ping("other")
    assert text() == "2 up"
    rooms.watch(HOUR + SECOND, MINUTE)
    assert text() == "2 late"
    rooms.ping("other", "fail")
    assert text() == "1 down"
    for key in ("job", "other"):
        rooms.pause(key)
    assert text() == "2 paused"


def test_a_monitor_called_all_has_its_badge(house):
    rooms = house(monitor("all", name="All of it") + monitor("other"))
    rooms.ping("all")
    assert badge(rooms.ask("/badge/all.svg"))[0] == ["All of it", "up"]
    assert badge(rooms.ask("/badge/other.svg"))[0] == ["other", "pending"]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a & b", "\"quoted\" 'twice'",
                                  "{{name}}", "]]>", "% if x:", "öre ✓", "密码备份", "𝔘𝔫𝔦"])
def test_a_badge_shows_any_name_as_text(house, name):
    assert badge(house(monitor(name=name)).ask("/badge/job.svg"))[0] == [name, "pending"]


@pytest.mark.parametrize(("name", "shown"), [("A very long name " * 10, 40), ("x" * 40, 40),
                                             ("x" * 41, 40), ("x" * 39, 39), ("密" * 50, 40)])
def test_a_badge_cuts_a_long_name(house, name, shown):
    [text, _], _ = badge(house(monitor(name=name)).ask("/badge/job.svg"))
    assert len(text) == shown
    assert text == name if len(name) == shown else text == name[:39] + "…"


def test_there_is_no_other_badge(rooms):
    for path in ("nobody.svg", "job.png", "job", "", ".svg", "job.svg/", "JOB.svg"):
        assert rooms.ask(f"/badge/{path}").status == 404, path
