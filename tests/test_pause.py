"""Pause and resume, from the command line and the API, and what both do to alerts and uptime."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    QUICK,
    START,
    Answer,
    FakeClock,
    House,
    Process,
    run_larm,
    wait_until,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from larm import DAY, HOUR, MINUTE, SECOND

JOB = '[monitors.job]\ninterval = "1h"\ngrace = "10m"\n'
OFF = '[monitors.off]\ninterval = "1h"\nenabled = false\n'
WHOLE = HOUR + 10 * MINUTE  # what a ping, and a resumption, gives JOB
PASSWORD = "a-dashboard-password"
# The command line


def state(larm: Process, key: str) -> str:
    return str(larm.get(f"/api/v1/monitors/{key}").json["data"]["state"])


def done(folder: Path, *arguments: str) -> str:
    """The line on stdout with which a verb succeeds."""
    result = run_larm(folder, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    [line] = result.stdout.splitlines()
    return line


def refused(folder: Path, code: int, *arguments: str) -> str:
    """The line on stderr with which a verb fails."""
    result = run_larm(folder, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    [line] = result.stderr.splitlines()
    assert "Traceback" not in line
    return line


def test_the_verbs_pause_and_resume_whether_or_not_larm_runs(start):
    text = JOB + '[monitors.short]\ninterval = 1\ngrace = 0\n'
    larm = start(text)
    for key in ("job", "short"):
        url = larm.get(f"/api/v1/monitors/{key}").json["data"]["ping_url"]
        larm.ping(url.rpartition("/")[2])
    assert "short" in done(larm.folder, "pause", "short")
    wait_until(lambda: state(larm, "short") == "paused", 5)
    assert "job" in done(larm.folder, "pause", "job", "2h")
    wait_until(lambda: state(larm, "job") == "paused", 5)

    def events() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = larm.get("/api/v1/events").json["data"]
        return [event for event in found if event["type"] == "down"]

    before = len(events())
    time.sleep(1.5)  # more than the interval
    assert len(events()) == before
    done(larm.folder, "resume", "short")
    wait_until(lambda: len(events()) > before, 5)

    larm.stop()
    assert "job" in done(larm.folder, "resume", "job")
    assert "1 s" in done(larm.folder, "pause", "short", "1")  # seconds, as the message says
    larm = start(text, port=larm.port)
    assert state(larm, "job") == "up"
    wait_until(lambda: state(larm, "short") in ("up", "late", "down"), 6)


def test_what_a_verb_can_not_do_is_one_line(house):
    here = house(JOB + OFF)
    for verb in ("pause", "resume"):
        line = refused(here.folder, 1, verb, "off")
        assert "off is disabled in the file" in line
        assert "enabled = true" in line
        assert "did you mean job?" in refused(here.folder, 2, verb, "jub")
    for duration in ("soon", "0s", "-5m", "1000d", ""):
        assert duration in refused(here.folder, 2, "pause", "job", duration)
    assert [here.state(key) for key in ("job", "off")] == ["pending", "paused"]


def test_a_monitor_that_larm_has_not_seen_yet_can_not_be_paused(tmp_path):
    write_config(tmp_path, JOB)
    assert "start Larm" in refused(tmp_path, 1, "pause", "job")


# The API


def post(here: House, path: str, body: object = None, **headers: str) -> Answer:
    if not isinstance(body, bytes):
        body = b"" if body is None else json.dumps(body).encode()
    return here.ask(f"/api/v1/monitors/{path}", "POST", body, **headers)


def test_pause_and_resume_answer_with_the_monitor(house):
    here = house(JOB)
    here.ping("job")
    before = here.monitor("job")
    here.watch(MINUTE)
    answer = post(here, "job/pause", {"for": "2h"})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json.keys() == {"data"}
    assert answer.json["data"].keys() == before.keys()
    paused = here.monitor("job")
    assert (paused["id"], paused["state"], paused["enabled"]) == ("job", "paused", True)
    assert (paused["expected_at"], paused["deadline_at"]) == (None, None)
    assert paused["since"] == here.clock.now()
    here.watch(2 * HOUR - SECOND, step=MINUTE)
    assert here.state("job") == "paused"
    here.watch(2 * SECOND)
    assert here.state("job") == "up"
    post(here, "job/pause")
    here.watch(MINUTE)
    answer = post(here, "job/resume")
    assert answer.json["data"]["state"] == "up"
    assert here.left("job") == WHOLE


@pytest.mark.parametrize("body", [
    None, {}, {"for": None}, {"for": "2h"}, {"for": 7200}, {"for": 1.5}, {"for": "1h30m"},
    b" {} \n",
], ids=repr)  # fmt: skip
def test_a_pause_may_have_a_length_or_none(house, body):
    here = house(JOB)
    assert post(here, "job/pause", body).json["data"]["state"] == "paused"
    assert post(here, "job/resume").status == 200


@pytest.mark.parametrize("body", [
    {"for": "soon"}, {"for": "0s"}, {"for": -1}, {"for": True}, {"for": []},
    {"for": 1e12}, {"for": 10**400}, {"fro": "2h"}, {"for": "2h", "more": 1}, [], "2h", 7200,
    b"null", b"for=2h", b"{", b"\xff", b'{"for": NaN}', b'{"for": Infinity}', b"[" * 9_000,
], ids=lambda body: repr(body)[:20])  # fmt: skip
def test_a_body_that_is_none_of_these_is_an_invalid_request(house, body):
    here = house(JOB)
    answer = post(here, "job/pause", body)
    assert answer.status == 400
    assert answer.json["error"].keys() == {"type", "message"}
    assert answer.json["error"]["type"] == "invalid_request"
    assert answer.json["error"]["message"]
    assert "date" not in answer.json["error"]["message"]
    assert here.state("job") == "pending"


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_who_may_not_and_what_can_not_be_paused_is_refused_by_name(house, verb):
    here = house(f'public = true\npassword = "{PASSWORD}"\n' + JOB + OFF)
    viewer = {"AUTHORIZATION": f"Bearer {PASSWORD}"}
    refusals = [
        (post(here, f"job/{verb}"), 401, "unauthorized"),
        (post(here, f"job/{verb}", AUTHORIZATION="Bearer another-password"), 401, "unauthorized"),
        (post(here, f"off/{verb}", **viewer), 400, "invalid_request"),
        (post(here, f"nobody/{verb}", **viewer), 404, "not_found"),
        *((here.ask(f"/api/v1/monitors/job/{verb}", method, **viewer), 405, "method_not_allowed")
          for method in ("GET", "PUT", "DELETE")),
        *((post(here, f"job/{verb}", **viewer, **headers), 403, "forbidden") for headers in (
            {"ORIGIN": "https://evil.example"}, {"ORIGIN": "null"},
            {"ORIGIN": "http://127.0.0.1:1"}, {"ORIGIN": "http://[evil"},
            {"SEC_FETCH_SITE": "cross-site"}, {"SEC_FETCH_SITE": "same-site"})),
    ]  # fmt: skip
    for answer, status, type in refusals:
        assert (answer.status, answer.json["error"]["type"]) == (status, type)
        assert answer.json["error"]["message"]
    assert "off is disabled in the file" in refusals[2][0].json["error"]["message"]
    assert "nobody" in refusals[3][0].json["error"]["message"]
    own = {"ORIGIN": "http://localhost", "SEC_FETCH_SITE": "same-origin"}
    assert here.ask("/api/v1/monitors/job", **viewer).json["data"]["state"] == "pending"
    assert post(here, f"job/{verb}", **viewer, **own).status == 200


def test_without_a_password_only_who_comes_from_this_machine_may_pause(house):
    here = house(JOB)
    answer = post(here, "job/pause", X_FORWARDED_FOR="192.0.2.1")
    assert (answer.status, answer.json["error"]["type"]) == (403, "forbidden")
    assert here.state("job") == "pending"


# What a pause does


@pytest.mark.parametrize("before", ["", "fail"])
@pytest.mark.parametrize("action", ["", "fail", "3", "log", "start"])
def test_a_ping_to_a_paused_monitor_is_stored_and_changes_no_state(house, before, action):
    here = house(JOB)
    here.ping("job", before)
    here.watch(20 * MINUTE, step=MINUTE)
    events = here.events()
    here.pause("job")
    at = here.clock.now()
    here.watch(MINUTE)
    here.ping("job", action)
    here.tick()
    assert len(here.heartbeats("job")) == 2
    assert (here.state("job"), here.monitor("job")["since"]) == ("paused", at)
    assert here.events() == events
    if not action:
        assert here.monitor("job")["last_heartbeat_at"] == here.clock.now()


def test_to_pause_twice_forgets_neither_since_when_nor_the_newest_end(house):
    here = house(JOB)
    here.ping("job")
    at = here.clock.now()
    here.pause("job", "2m")
    here.watch(MINUTE)
    here.pause("job")  # until resumed, from now on
    here.watch(5 * MINUTE)
    assert (here.state("job"), here.monitor("job")["since"]) == ("paused", at)
    here.pause("job", "2m")
    here.watch(2 * MINUTE + SECOND)
    assert here.state("job") == "up"


def test_to_resume_what_is_watched_changes_nothing(house):
    here = house(JOB)
    here.resume("job")
    assert here.state("job") == "pending"
    here.ping("job")
    here.watch(20 * MINUTE, step=MINUTE)
    here.resume("job")
    assert here.left("job") == WHOLE - 20 * MINUTE


def test_a_monitor_that_was_never_pinged_is_pending_again_after_its_pause(house):
    here = house(JOB)
    here.pause("job")
    here.ping("job")
    here.resume("job")
    here.watch(DAY, step=HOUR)
    assert here.state("job") == "pending"
    assert here.events() == []


def test_a_monitor_whose_only_ping_was_a_failure_is_resumed_and_shown(house):
    """Nothing that was heard of it is a success: a View can't be half filled."""
    here = house(JOB)
    here.ping("job", "fail")
    here.pause("job")
    here.watch(HOUR, step=MINUTE)
    here.resume("job")
    assert here.state("job") == "up"
    for page in ("/", "/monitor/job", "/metrics", "/api/v1/monitors", "/api/v1/summary"):
        assert here.ask(page).status == 200


@pytest.mark.parametrize("action", ["", "fail"])
def test_a_resumed_monitor_has_one_interval_and_its_grace_from_now(house, action):
    here = house(JOB)
    here.ping("job", action)
    here.watch(MINUTE)
    since = here.monitor("job")["since"]
    here.pause("job")
    here.watch(DAY, step=HOUR)
    here.resume("job")
    before, resumed_at = here.changes(), here.clock.now()
    assert here.state("job") == "up"
    assert here.monitor("job")["since"] == (resumed_at if action else since)
    here.watch(WHOLE, step=MINUTE)
    assert here.changes() == before
    here.watch(SECOND)
    assert here.changes()[len(before):] == [("down", "missed", resumed_at + WHOLE - START)]


def test_a_resumed_schedule_expects_its_next_occurrence(house):
    here = house('[monitors.job]\nschedule = "0 12 * * *"\ntimezone = "UTC"\ngrace = "10m"\n')
    here.ping("job")  # at 08:00
    here.pause("job")
    here.watch(DAY - HOUR, step=HOUR)
    here.resume("job")
    assert here.monitor("job")["deadline_at"] == START + DAY + 4 * HOUR + 10 * MINUTE


def test_the_first_ping_after_a_pause_counts_though_one_came_just_before_its_end(house):
    here = house(JOB)
    here.ping("job")
    here.pause("job")
    here.watch(HOUR, step=MINUTE)
    here.ping("job")
    here.clock.advance(SECOND)
    here.resume("job")
    here.watch(5 * MINUTE)
    here.ping("job")
    here.tick()
    assert here.left("job") == WHOLE


@pytest.mark.parametrize("crash", [False, True])
def test_a_timed_pause_keeps_the_time_that_it_had_left_across_a_restart(house, crash):
    here = house(JOB)
    here.ping("job")
    here.pause("job", "1h")
    here.watch(20 * MINUTE, step=MINUTE)
    here.restart(10 * MINUTE, crash=crash)
    here.watch(40 * MINUTE - SECOND, step=MINUTE)
    assert here.state("job") == "paused"
    here.watch(2 * SECOND)
    assert here.state("job") == "up"
    assert abs(here.left("job") - WHOLE) <= 2 * SECOND
    assert here.events() == []


def test_a_pause_without_end_lasts_across_restarts_reloads_and_removal(house):
    here = house(JOB + OFF)
    here.ping("job")
    here.pause("job")
    for _ in range(3):
        here.restart(DAY)
        here.watch(DAY, step=HOUR)
    for text in (JOB + 'note = "New"\n' + OFF, OFF, JOB + OFF):
        here.save(text)
        here.watch(3 * HOUR, step=MINUTE)
    assert here.state("job") == "paused"
    assert here.events() == []


def test_enabled_false_wins_over_a_timed_pause(house):
    here = house(JOB)
    here.ping("job")
    here.pause("job", "1h")
    here.save(JOB + "enabled = false\n")
    here.watch(DAY, step=HOUR)
    assert here.state("job") == "paused"
    assert here.events() == []
    here.save(JOB)
    assert here.state("job") == "up"
    assert here.left("job") == WHOLE


# Alerts


def with_channel(url: str) -> str:
    return f'[channels]\nphone = "{url}"\n'


def test_what_happened_before_a_pause_is_told_and_nothing_after(house, webhook):
    """Law 6: also where the pause comes within the 3 s in which alerts are gathered."""
    here = house(with_channel(webhook.url) + JOB + 'remind = "1h"\n')
    here.ping("job", "fail", body="it broke")
    here.pause("job")
    here.live(5 * SECOND)
    assert webhook.titles() == ["DOWN: job"]
    assert "it broke" in webhook.bodies()[0]
    here.live(4 * HOUR)
    assert webhook.titles() == ["DOWN: job"], "no reminder"
    here.ping("job", "fail")
    here.ping("job")
    here.live(MINUTE)
    here.resume("job")
    here.live(MINUTE)
    assert [title for title in webhook.titles()[1:] if "DOWN" in title] == []


# Uptime

WEEKLY = '[monitors.job]\ninterval = "7d"\n'


def uptime(here: House) -> dict[str, float | None]:
    found: dict[str, float | None] = here.monitor("job")["uptime"]
    return found


def test_what_is_younger_unwatched_never_heard_of_or_pruned_has_no_uptime(house):
    here = house(WEEKLY)
    here.ping("job")
    here.watch(23 * HOUR, step=HOUR)
    assert set(uptime(here).values()) == {None}, "younger than any span"
    here.restart(0, text='keep = "5d"\n' + WEEKLY + JOB.replace("job", "never") + OFF)
    here.pause("never")
    here.watch(8 * DAY, step=HOUR)
    found = uptime(here)
    assert found["24h"] is not None
    assert found["7d"] is None, "what is longer ago than `keep` is not known"
    for key in ("never", "off"):
        assert set(here.monitor(key)["uptime"].values()) == {None}


steps = st.lists(
    st.tuples(st.sampled_from(["ok", "fail", "pause", "resume", "off", "removed", "disabled",
                               "wait"]),
              st.integers(1, 150)),
    min_size=3, max_size=14,
)  # fmt: skip


@settings(derandomize=True, deadline=None, database=None, max_examples=40)
@given(steps)
def test_uptime_is_what_sampling_every_10_minutes_says(steps):
    """Whatever happens: pauses, removal and Larm's absence are left out, and a pause's end is up.

    Lasting for so many times 10 minutes each, after a first hour that is up.
    """
    ten = 10 * MINUTE
    samples: list[bool | None] = []  # up? None: not watched
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        yearly = WEEKLY.replace("7d", "366d") + OFF
        here = House(Path(folder), yearly, FakeClock())
        here.ping("job")
        is_up, is_paused = True, False
        token = here.tokens["job"]

        def pass_time(count: int, is_watched: bool = True) -> None:
            here.watch(count * ten, step=ten)
            samples.extend([is_up if is_watched and not is_paused else None] * count)

        pass_time(6)
        for what, count in steps:
            if what in ("ok", "fail"):
                here.ask(f"/api/heartbeat/{token}/{'0' if what == 'ok' else '1'}")
                is_up = is_up if is_paused else what == "ok"
            elif what == "pause":
                here.pause("job")
                is_paused = True
            elif what == "resume" and is_paused:
                here.resume("job")
                is_up, is_paused = True, False
            elif what == "off":
                here.restart(count * ten)
                samples.extend([None] * count)
                continue
            elif what in ("removed", "disabled"):
                here.save(OFF if what == "removed" else yearly.replace(OFF, "enabled = false"))
                pass_time(count, is_watched=False)
                here.save(yearly)
                is_up = is_up or (what == "disabled" and not is_paused)
                continue
            pass_time(count)
        shown = uptime(here)
        here.stop()
    spans = {"24h": 144, "7d": 7 * 144}
    for name, count in spans.items():
        found = [one for one in samples[-count:] if one is not None]
        expected = round(100 * sum(found) / len(found), 2) if found else None
        if len(samples) <= count:
            assert shown[name] is None or len(samples) == count
        elif expected is None or shown[name] is None:
            assert shown[name] == expected
        else:
            assert shown[name] == pytest.approx(expected, abs=0.02)
