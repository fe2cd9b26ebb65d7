"""What Prometheus scrapes, read by its own client's parser, and the badges."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from conftest import TOKEN, Answer, House, Webhook, ask, open_web
from prometheus_client.parser import text_string_to_metric_families

import larm as program
from larm import DAY, HOUR, MINUTE, SECOND, STATES

JOBS = f"""
[channels]
phone = "json://127.0.0.1:9/"
[monitors.job]
name = "Nightly backup"
interval = "1h"
grace = "10m"
token = "{TOKEN}"
[monitors.other]
interval = "1h"
"""
Samples = dict[tuple[str, ...], float]


@pytest.fixture
def rooms(house) -> House:
    return house(JOBS)


@pytest.fixture
def web(rooms) -> program.Web:
    return open_web(rooms)


def scrape(web: program.Web) -> dict[str, Samples]:
    """The samples' values by name, then by their labels' values."""
    answer = ask(web, "/metrics")
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


def values(web: program.Web, name: str) -> Samples:
    return scrape(web)[name]


# The format


def test_the_metrics_are_in_the_text_format(web):
    answer = ask(web, "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.body.decode().splitlines()
    assert answer.body.endswith(b"\n")
    assert "" not in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert names == [line.split()[2] for line in lines if line.startswith("# HELP")]


def test_the_names_follow_prometheuss_conventions(web):
    for family in text_string_to_metric_families(ask(web, "/metrics").body.decode()):
        assert re.fullmatch("(larm|process)_[a-z_]+", family.name)
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
        assert not re.search("_(ms|minutes|hours|milliseconds)(_|$)", family.name)


@pytest.mark.parametrize("name", ['a "quoted" one', "back\\slash", "two\nlines", "\\n", 'x"} 1\n#',
                                  "öre ✓ 密", " ", "a\rb\u2028c", "{}", "a,b=c", "%s %(x)s {0}"])
def test_a_channel_may_have_any_name(house, name):
    rooms = house(f'[channels]\n{json.dumps(name)} = "json://127.0.0.1:9/"\n'
                  "[monitors.job]\ninterval = 60\n")
    assert values(open_web(rooms), "larm_deliveries_pending") == {(name,): 0}


# The values


def test_a_monitors_state_is_1_and_its_others_are_0(rooms, web):
    found = values(web, "larm_monitor_state")
    assert len(found) == 2 * len(STATES)
    assert [key for key, value in found.items() if value] == [("job", "pending"),
                                                              ("other", "pending")]
    rooms.ping("job")
    for state, pass_by in (("up", HOUR), ("late", 11 * MINUTE), ("down", 0)):
        shown = values(web, "larm_monitor_state")
        assert {one: shown["job", one] for one in STATES} == {one: one == state for one in STATES}
        rooms.watch_for(pass_by + 1, 10 * SECOND)


def test_a_paused_monitor_is_paused_and_has_no_deadline(rooms, web):
    rooms.ping("job")
    assert ("job",) in values(web, "larm_monitor_deadline_timestamp_seconds")
    assert ask(web, "/api/v1/monitors/job/pause", "POST").status == 200
    found = scrape(web)
    assert found["larm_monitor_state"]["job", "paused"] == 1
    assert "larm_monitor_deadline_timestamp_seconds" not in found


def test_moments_are_in_seconds(rooms, web):
    rooms.clock.advance(123)
    rooms.ping("job")
    now = rooms.clock.now() / 1000
    found = scrape(web)
    assert found["larm_monitor_last_heartbeat_timestamp_seconds"] == {("job",): now}
    assert found["larm_monitor_deadline_timestamp_seconds"] == {("job",): now + 4_200}
    assert found["process_start_time_seconds"] == {(): now - 0.123}
    assert found["larm_build_info"] == {(program.__version__,): 1}


def test_the_last_runs_duration_is_that_of_the_newest_end_of_a_run(rooms, web):
    assert "larm_monitor_last_duration_seconds" not in scrape(web)
    for took, end in ((5_000, ""), (1_500, "fail")):
        rooms.ping("job", "start")
        rooms.clock.advance(took)
        rooms.ping("job", end)
    assert values(web, "larm_monitor_last_duration_seconds") == {("job",): 1.5}


def test_events_are_counted_from_the_start(rooms, web):
    rooms.ping("job", "fail")
    assert values(web, "larm_events_total") == {("job", "down"): 1, ("job", "up"): 0,
                                                ("other", "down"): 0, ("other", "up"): 0}
    rooms.ping("job")
    rooms.watch_for(2 * HOUR, MINUTE)
    for _ in range(2):
        assert values(web, "larm_events_total")["job", "down"] == 2
        assert values(web, "larm_events_total")["job", "up"] == 1
    assert values(open_web(rooms), "larm_events_total")["job", "down"] == 0


def test_pruning_makes_no_counter_go_down(house):
    rooms = house('keep = "1d"\n[monitors.job]\ninterval = "1h"\n')
    web = open_web(rooms)
    for count in range(1, 5):
        rooms.ping("job")
        rooms.watch_for(DAY, 10 * MINUTE)
        found = values(web, "larm_events_total")
        assert found == {("job", "down"): count, ("job", "up"): count - 1}
    assert len(rooms.events()) < 5
    rooms.store.write(lambda db: db.execute("DELETE FROM events"))
    assert values(web, "larm_events_total") == found
    rooms.ping("job")
    assert values(web, "larm_events_total") == {("job", "down"): 4, ("job", "up"): 4}


def test_deliveries_are_counted_by_channel_and_result(house, webhook: Webhook):
    rooms = house(JOBS.replace("json://127.0.0.1:9/", webhook.url))
    web = open_web(rooms)
    assert values(web, "larm_deliveries_total") == {("phone", "sent"): 0, ("phone", "failed"): 0}
    webhook.answer = 500
    rooms.ping("job", "fail")
    rooms.clock.advance(3 * SECOND)
    rooms.notifier.attempt("phone")
    found = scrape(web)
    assert found["larm_deliveries_total"] == {("phone", "sent"): 0, ("phone", "failed"): 1}
    assert found["larm_deliveries_pending"] == {("phone",): 1}
    webhook.answer = 200
    rooms.clock.advance(MINUTE)
    rooms.notifier.attempt("phone")
    found = scrape(web)
    assert found["larm_deliveries_total"] == {("phone", "sent"): 1, ("phone", "failed"): 1}
    assert found["larm_deliveries_pending"] == {("phone",): 0}


def test_throttled_pings_are_counted(rooms, web):
    for action in ("", "start"):
        for _ in range(5):
            rooms.ping("job", action)
    assert values(web, "larm_pings_throttled_total") == {(): 8}


def test_commits_are_counted_and_timed(rooms, web):
    before = scrape(web)
    for _ in range(3):
        rooms.store.write(lambda db: db.execute("UPDATE clock SET alive_at = alive_at"))
    after = scrape(web)
    assert after["larm_commit_seconds_count"][()] == before["larm_commit_seconds_count"][()] + 3
    assert after["larm_commit_seconds_sum"][()] > before["larm_commit_seconds_sum"][()]


def test_gaps_are_counted_and_measured(rooms, web):
    rooms.watch_for(MINUTE)
    rooms.clock.advance(90 * SECOND)  # nobody ticked
    rooms.watcher.tick(SECOND)
    found = scrape(web)
    assert found["larm_gaps_total"] == {(): 1}
    assert found["larm_gap_seconds_total"][()] == pytest.approx(90, abs=2)
    rooms.watch_for(MINUTE)
    rooms.clock.set_wall(-HOUR)  # a gap of less than nothing
    rooms.watch_for(10 * SECOND)
    assert values(web, "larm_gaps_total") == {(): 2}
    assert values(web, "larm_gap_seconds_total") == found["larm_gap_seconds_total"]


def test_a_pause_is_no_gap(rooms, web):
    ask(web, "/api/v1/monitors/job/pause", "POST")
    rooms.watch_for(MINUTE)
    ask(web, "/api/v1/monitors/job/resume", "POST")
    assert rooms.rows("SELECT * FROM gaps")
    assert values(web, "larm_gaps_total") == {(): 0}


def test_metrics_are_those_of_the_configuration(rooms, web):
    rooms.ping("job", "fail")
    rooms.reload('[monitors.new]\ninterval = 60\n')
    web.use(rooms.config)
    found = scrape(web)
    assert {labels[0] for labels in found["larm_monitor_state"]} == {"new"}
    assert found["larm_events_total"] == {("new", "down"): 0, ("new", "up"): 0}
    assert "larm_deliveries_total" not in found


def test_a_thousand_monitors_cost_as_many_queries_as_one(house):
    def queries(count: int) -> list[str]:
        rooms = house("".join(f"[monitors.job-{n}]\ninterval = 60\n" for n in range(count)))
        web = open_web(rooms)
        asked: list[str] = []
        with rooms.store.reading() as db:
            db.set_trace_callback(asked.append)
        assert len(values(web, "larm_monitor_state")) == 5 * count
        rooms.store.close()
        return [statement for statement in asked if not statement.startswith("--")]

    assert 3 < len(queries(1)) == len(queries(1_000)) < 10


# Badges

SVG = "{http://www.w3.org/2000/svg}"


def badge(answer: Answer) -> tuple[list[str], list[str]]:
    """(texts, colours) of a badge that is right as a drawing."""
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
    return [text.text for text in texts], [box.get("fill") for box in boxes]


def named(house: Any, name: str) -> Answer:
    text = json.dumps(name, ensure_ascii=False)
    rooms = house(f"[monitors.job]\ninterval = 60\nname = {text}\n")
    return ask(open_web(rooms), "/badge/job.svg")


def test_a_badge_shows_the_monitors_name_and_state(rooms, web):
    colours = set()
    rooms.ping("job")
    for state, pass_by in (("up", HOUR), ("late", 11 * MINUTE), ("down", 0)):
        texts, [_, colour] = badge(ask(web, "/badge/job.svg"))
        assert texts == ["Nightly backup", state]
        colours.add(colour)
        rooms.watch_for(pass_by + 1, 10 * SECOND)
    assert badge(ask(web, "/badge/other.svg"))[0] == ["other", "pending"]
    assert len(colours) == 3


def test_the_badge_of_all_shows_the_most_urgent_state(rooms, web):
    def text() -> str:
        return badge(ask(web, "/badge/all.svg"))[0][1]

    assert text() == "2 pending"
    rooms.ping("job")
    assert text() == "1 up"
    rooms.ping("other")
    assert text() == "2 up"
    rooms.clock.advance(HOUR + 1)
    assert text() == "2 late"
    rooms.ping("other", "fail")
    assert text() == "1 down"
    assert badge(ask(web, "/badge/all.svg"))[0][0] == "monitors"


def test_a_monitor_called_all_leaves_the_badge_of_all_alone(house):
    web = open_web(house("[monitors.all]\ninterval = 60\n[monitors.b]\ninterval = 60\n"))
    assert badge(ask(web, "/badge/all.svg"))[0] == ["monitors", "2 pending"]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a & b", "\"quoted\" 'twice'",
                                  "{{name}}", "]]>", "% if x:", "öre ✓", "密码备份", "𝔘𝔫𝔦"])
def test_a_badge_shows_any_name_as_text(house, name):
    assert badge(named(house, name))[0] == [name, "pending"]


@pytest.mark.parametrize(("name", "shown"), [("A very long name " * 10, 40), ("x" * 40, 40),
                                             ("x" * 41, 40), ("x" * 39, 39), ("密" * 50, 40)])
def test_a_badge_cuts_a_long_name(house, name, shown):
    [text, _], _ = badge(named(house, name))
    assert len(text) == shown
    assert text == name if len(name) == shown else text == name[:39] + "…"


def test_a_badge_loads_nothing(web):
    svg = ask(web, "/badge/job.svg").body.decode().replace(SVG[1:-1], "")
    assert not re.search(r"https?:|//|href|src|<style|style=|<script|url\((?!#)", svg)


@pytest.mark.parametrize("path", ["/badge/nobody.svg", "/badge/job.png", "/badge/job", "/badge/",
                                  "/badge/.svg", "/badge/job.svg/"])
def test_there_is_no_other_badge(web, path):
    assert ask(web, path).status == 404


def test_the_head_of_a_badge_is_the_badge_without_its_body(web):
    answer = ask(web, "/badge/job.svg", "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Type"].startswith("image/svg+xml")
