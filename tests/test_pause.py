"""Pause and resume, from the command line and the API, and what both do to uptime."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    START,
    Answer,
    House,
    Process,
    launch,
    run_larm,
    wait_until,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import larm as program
from larm import DAY, HOUR, MINUTE

JOB = '[monitors.job]\ninterval = "1h"\ngrace = "10m"\n'
WHOLE = HOUR + 10 * MINUTE  # what a ping, and a resumption, gives JOB
PASSWORD = "a-dashboard-password"


def token(key: str) -> str:
    return f"a-token-for-{key}-0001"


def jobs(*keys: str, more: str = "") -> str:
    return "".join(
        f'[monitors.{key}]\ninterval = "1h"\ntoken = "{token(key)}"\n{more}\n' for key in keys
    )


KEYS = ("cli", "api", "twice", "timed", "quiet", "shape", "forms", "refused", "never")
TOML = (
    jobs(*KEYS) + jobs("off", more="enabled = false")
    + f'[monitors.short]\ninterval = 1\ngrace = 0\ntoken = "{token("short")}"\n'
)  # fmt: skip


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    """One without a password, one with."""
    texts = TOML, f'public = true\npassword = "{PASSWORD}"\n' + jobs("job")
    both = [launch(tmp_path_factory.mktemp("larm"), text) for text in texts]
    try:
        yield both
        assert not any("Traceback" in one.log for one in both)
    finally:
        for one in both:
            one.kill()


@pytest.fixture
def larm(processes: list[Process]) -> Process:
    return processes[0]


@pytest.fixture
def guarded(processes: list[Process]) -> Process:
    return processes[1]


def monitor(larm: Process, key: str) -> dict[str, Any]:
    found: dict[str, Any] = larm.get(f"/api/v1/monitors/{key}").json["data"]
    return found


def state(larm: Process, key: str) -> str:
    return str(monitor(larm, key)["state"])


def post(larm: Process, path: str, body: object = None, **headers: str) -> Answer:
    if not isinstance(body, bytes):
        body = b"" if body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return larm.get(f"/api/v1/monitors/{path}", "POST", body, names)


def stored(larm: Process, key: str) -> int:
    return len(larm.rows("SELECT h.id FROM heartbeats h JOIN monitors m ON m.id = monitor_id"
                         " WHERE key = ?", key))  # fmt: skip


def done(larm: Process, *arguments: str) -> str:
    """The line on stdout with which a verb succeeds."""
    result = run_larm(larm.folder, *arguments)
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


# The command line


def test_a_running_larm_notices_that_a_monitor_is_paused_and_resumed(larm):
    larm.ping(token("cli"))
    assert "cli" in done(larm, "pause", "cli")
    wait_until(lambda: state(larm, "cli") == "paused", 5)
    assert "cli" in done(larm, "resume", "cli")
    wait_until(lambda: state(larm, "cli") == "up", 5)


def test_a_monitor_that_is_paused_while_larm_runs_is_not_alerted_till_it_is_resumed(larm):
    larm.ping(token("short"))
    done(larm, "pause", "short")
    [paused] = larm.rows("SELECT unwatched_at FROM monitors WHERE key = 'short'")
    wait_until(lambda: time.time() * 1000 > paused["unwatched_at"] + 2_200)
    assert state(larm, "short") == "paused"
    events = ("SELECT e.* FROM events e JOIN monitors m ON m.id = monitor_id"
              f" WHERE key = 'short' AND e.at > {paused['unwatched_at']}")  # fmt: skip
    assert larm.rows(events) == []
    done(larm, "resume", "short")
    [down] = wait_until(lambda: larm.rows(events))
    [gap] = larm.rows("SELECT g.* FROM gaps g JOIN monitors m ON m.id = monitor_id"
                      " WHERE key = 'short'")  # fmt: skip
    assert down["at"] == gap["to_at"] + 1_000


def test_a_timed_pause_ends_by_itself_while_larm_runs(larm):
    larm.ping(token("timed"))
    assert "1 s" in done(larm, "pause", "timed", "1s")
    assert state(larm, "timed") in ("paused", "up")
    wait_until(lambda: state(larm, "timed") == "up", 6)
    assert len(larm.rows("SELECT g.* FROM gaps g JOIN monitors m ON m.id = monitor_id"
                         " WHERE key = 'timed'")) == 1  # fmt: skip


def test_pause_and_resume_work_while_larm_does_not_run(start):
    larm = start(jobs("job"))
    larm.ping(token("job"))
    larm.stop()
    done(larm, "pause", "job", "2h")
    assert "paused" in run_larm(larm.folder, "status").stdout
    again = start(jobs("job"), port=larm.port)
    assert state(again, "job") == "paused"
    again.stop()
    done(again, "resume", "job")
    assert state(start(jobs("job"), port=larm.port), "job") == "up"


def test_to_pause_twice_is_no_mistake_nor_is_to_resume_what_is_watched(larm):
    done(larm, "resume", "twice")
    done(larm, "pause", "twice", "1s")
    done(larm, "pause", "twice")  # until resumed, from now on
    [row] = larm.rows("SELECT resumes_at FROM monitors WHERE key = 'twice'")
    assert row["resumes_at"] is None
    done(larm, "resume", "twice")
    done(larm, "resume", "twice")
    assert state(larm, "twice") == "pending"


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_what_larm_toml_disables_is_neither_paused_nor_resumed(larm, verb):
    line = refused(larm.folder, 1, verb, "off")
    assert "off is disabled in the file" in line
    assert "enabled = true" in line
    assert state(larm, "off") == "paused"


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_an_unknown_key_is_unusable_and_told_the_nearest(larm, verb):
    assert "did you mean forms?" in refused(larm.folder, 2, verb, "form")


@pytest.mark.parametrize("duration", ["soon", "0", "0s", "-5m", "2x", "", "1000d", "1h1h"])
def test_a_duration_that_is_none_is_unusable(larm, duration):
    line = refused(larm.folder, 2, "pause", "forms", duration)
    assert duration in line
    assert state(larm, "forms") == "pending"


def test_a_duration_may_be_a_number_of_seconds(larm):
    """As the message for a wrong one says."""
    assert "1 min 30 s" in done(larm, "pause", "never", "90")


def test_a_monitor_that_larm_has_not_seen_yet_can_not_be_paused(tmp_path):
    write_config(tmp_path, jobs("job"))
    line = refused(tmp_path, 1, "pause", "job")
    assert "start Larm" in line


# The API


def test_pause_and_resume_answer_with_the_monitor(larm):
    larm.ping(token("api"))
    before = monitor(larm, "api")
    paused = post(larm, "api/pause", {"for": "2h"})
    assert paused.status == 200
    assert paused.headers["Content-Type"] == "application/json"
    data = paused.json["data"]
    assert paused.json.keys() == {"data"}
    assert data.keys() == before.keys()
    assert (data["id"], data["state"], data["enabled"]) == ("api", "paused", True)
    assert (data["expected_at"], data["deadline_at"]) == (None, None)
    [row] = larm.rows("SELECT * FROM monitors WHERE key = 'api'")
    assert row["resumes_at"] - row["unwatched_at"] == 2 * HOUR
    assert data["since"] == program.iso_utc(row["unwatched_at"])

    resumed = post(larm, "api/resume")
    assert resumed.status == 200
    data = resumed.json["data"]
    assert data == monitor(larm, "api") | {"uptime": data["uptime"]}
    assert data["state"] == "up"
    [gap] = larm.rows("SELECT * FROM gaps WHERE monitor_id = ?", row["id"])
    assert data["deadline_at"] == program.iso_utc(gap["to_at"] + HOUR + 6 * MINUTE)


@pytest.mark.parametrize("body", [
    None, {}, {"for": "2h"}, {"for": 7200}, {"for": 1.5}, {"for": "1h30m"}, b" {} \n",
], ids=repr)
def test_a_pause_may_have_a_length_or_none(larm, body):
    assert post(larm, "forms/pause", body).json["data"]["state"] == "paused"
    assert post(larm, "forms/resume").status == 200


@pytest.mark.parametrize("body", [
    {"for": "soon"}, {"for": "0s"}, {"for": -1}, {"for": True}, {"for": None}, {"for": []},
    {"for": 1e12}, {"for": 10**400}, {"fro": "2h"}, {"for": "2h", "more": 1}, [], "2h", 7200,
    None, b"for=2h", b"{", b"\xff", b'{"for": NaN}', b'{"for": Infinity}', b"[" * 9_000,
], ids=lambda body: repr(body)[:20])
def test_a_body_that_is_none_of_these_is_an_invalid_request(larm, body):
    answer = post(larm, "refused/pause", b"null" if body is None else body)
    assert answer.status == 400
    assert answer.json["error"].keys() == {"type", "message"}
    assert answer.json["error"]["type"] == "invalid_request"
    assert answer.json["error"]["message"]
    assert state(larm, "refused") == "pending"


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_what_larm_toml_disables_is_an_invalid_request(larm, verb):
    answer = post(larm, f"off/{verb}")
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request")
    assert "off is disabled in the file" in answer.json["error"]["message"]


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_an_unknown_monitor_is_not_found(larm, verb):
    answer = post(larm, f"nobody/{verb}")
    assert (answer.status, answer.json["error"]["type"]) == (404, "not_found")
    assert "nobody" in answer.json["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_only_POST_pauses_and_resumes(larm, method, verb):
    answer = larm.get(f"/api/v1/monitors/quiet/{verb}", method)
    assert (answer.status, answer.json["error"]["type"]) == (405, "method_not_allowed")
    assert state(larm, "quiet") == "pending"


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_without_the_password_it_is_unauthorized_in_public_too(guarded, verb):
    for headers in ({}, {"Authorization": "Bearer another-password"}):
        answer = post(guarded, f"job/{verb}", **headers)
        assert (answer.status, answer.json["error"]["type"]) == (401, "unauthorized")
    assert post(guarded, f"job/{verb}", Authorization=f"Bearer {PASSWORD}").status == 200


def test_who_does_not_come_from_this_machine_is_forbidden(larm):
    answer = post(larm, "shape/pause", X_Forwarded_For="192.0.2.1")
    assert (answer.status, answer.json["error"]["type"]) == (403, "forbidden")
    assert state(larm, "shape") == "pending"


@pytest.mark.parametrize("headers", [
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://[evil"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
], ids=str)
def test_a_page_of_another_site_is_forbidden(larm, guarded, headers):
    for process, path, more in ((larm, "shape", {}),
                                (guarded, "job", {"Authorization": f"Bearer {PASSWORD}"})):
        answer = post(process, f"{path}/pause", **headers, **more)
        assert (answer.status, answer.json["error"]["type"]) == (403, "forbidden")
        assert state(process, path) == "pending"


def test_larms_own_page_may_pause(larm):
    own = {"Origin": larm.url, "Sec_Fetch_Site": "same-origin"}
    assert post(larm, "shape/pause", **own).json["data"]["state"] == "paused"
    assert post(larm, "shape/resume", **own).json["data"]["state"] == "pending"


# What a pause does


def change(larm: House, verb: str, ms: int | None = None, key: str = "job") -> None:
    now = larm.clock.now()
    monitor = larm.config.monitors[key]
    larm.store.write(lambda db: program.pause_or_resume(db, monitor, verb, ms, now))


def kinds(larm: House) -> list[str]:
    return [event["type"] for event in larm.events()]


@pytest.mark.parametrize("action", ["", "fail", "3", "log", "start"])
def test_a_ping_to_a_paused_monitor_is_stored_and_changes_no_state(house, action):
    larm = house(JOB)
    larm.ping("job")
    larm.watch_for(20 * MINUTE, step=MINUTE)
    change(larm, "pause")
    before = larm.monitor("job")
    larm.ping("job", action)
    larm.tick()
    assert len(larm.heartbeats("job")) == 2
    after = larm.monitor("job")
    for column in ("state", "since", "watching", "unwatched_at", "resumes_at"):
        assert after[column] == before[column]
    assert larm.events() == []
    if not action:
        assert after["received_at"] == larm.clock.now()


def test_a_success_brings_up_no_paused_monitor_that_is_down(house):
    larm = house(JOB)
    larm.ping("job", "fail")
    change(larm, "pause")
    larm.ping("job")
    assert (kinds(larm), larm.monitor("job")["state"]) == (["down"], "down")


def test_a_monitor_that_was_never_pinged_is_pending_again_after_its_pause(house):
    larm = house(JOB)
    change(larm, "pause")
    larm.ping("job")
    change(larm, "resume")
    larm.watch_for(DAY, step=HOUR)
    assert larm.state("job") == "pending"
    assert larm.events() == []


@pytest.mark.parametrize("action", ["", "fail"])
def test_a_resumed_monitor_has_one_interval_and_its_grace_from_now(house, action):
    larm = house(JOB)
    larm.ping("job", action)
    larm.watch_for(MINUTE)
    change(larm, "pause")
    larm.watch_for(DAY, step=HOUR)
    change(larm, "resume")
    before = larm.events()
    assert larm.state("job") == "up"
    resumed_at = larm.clock.now()
    larm.watch_for(WHOLE, step=MINUTE)
    assert larm.events() == before
    larm.watch_for(1_000)
    assert larm.events()[-1]["at"] == resumed_at + WHOLE


def test_a_resumed_schedule_expects_its_next_occurrence(house):
    larm = house('[monitors.job]\nschedule = "0 12 * * *"\ntimezone = "UTC"\ngrace = "10m"\n')
    larm.ping("job")  # at 08:00
    change(larm, "pause")
    larm.watch_for(DAY - HOUR, step=HOUR)
    change(larm, "resume")
    assert larm.monitor("job")["deadline_at"] == START + DAY + 4 * HOUR + 10 * MINUTE


def test_the_first_ping_after_a_pause_counts_though_one_came_just_before_its_end(house):
    larm = house(JOB)
    larm.ping("job")
    change(larm, "pause")
    larm.watch_for(HOUR, step=MINUTE)
    larm.ping("job")
    larm.clock.advance(1_000)
    change(larm, "resume")
    larm.watch_for(5 * MINUTE)
    larm.ping("job")
    larm.tick()
    assert larm.monitor("job")["deadline_at"] == larm.clock.now() + WHOLE


@pytest.mark.parametrize("crash", [False, True])
def test_a_timed_pause_ends_across_a_restart(house, crash):
    """It keeps the time that it had left, as everything that runs."""
    larm = house(JOB)
    larm.ping("job")
    change(larm, "pause", HOUR)
    larm.watch_for(20 * MINUTE, step=MINUTE)
    larm.restart(10 * MINUTE, crash=crash)
    larm.watch_for(40 * MINUTE - 1_000, step=MINUTE)
    assert larm.state("job") == "paused"
    larm.watch_for(2_000)
    assert larm.state("job") == "up"
    assert abs(larm.monitor("job")["deadline_at"] - larm.clock.now() - WHOLE) <= 2_000
    assert larm.events() == []


def test_a_pause_without_end_lasts_across_restarts(house):
    larm = house(JOB)
    larm.ping("job")
    change(larm, "pause")
    for _ in range(5):
        larm.restart(DAY)
        larm.watch_for(DAY, step=HOUR)
    assert larm.state("job") == "paused"
    assert larm.events() == []


def test_enabled_false_wins_over_a_timed_pause(house):
    larm = house(JOB)
    larm.ping("job")
    change(larm, "pause", HOUR)
    larm.reload(JOB + "enabled = false\n")
    larm.watch_for(DAY, step=HOUR)
    assert larm.state("job") == "paused"
    assert larm.monitor("job")["watching"] == "disabled"
    assert larm.events() == []
    larm.reload(JOB)
    assert larm.monitor("job")["deadline_at"] == larm.clock.now() + WHOLE


def test_a_paused_monitor_stays_paused_over_a_reload_and_its_removal(house):
    other = '[monitors.other]\ninterval = "1h"\n'
    larm = house(JOB + other)
    larm.ping("job")
    change(larm, "pause")
    for text in (JOB + 'note = "New"\n' + other, other, JOB + other):
        larm.reload(text)
        larm.watch_for(3 * HOUR, step=MINUTE)
    assert larm.state("job") == "paused"
    assert larm.events() == []


# Uptime


def shown_uptime(larm: House) -> dict[str, float | None]:
    with larm.store.reading() as db:
        [monitor] = program.describe_monitors(db, larm.config, larm.clock.now(), ["job"])
    uptime: dict[str, float | None] = monitor["uptime"]
    return uptime


def down_for_an_hour_of_the_first_two(house: Any) -> House:
    larm: House = house('[monitors.job]\ninterval = "7d"\n')
    larm.ping("job")
    larm.watch_for(HOUR, step=MINUTE)
    larm.ping("job", "fail")
    larm.watch_for(HOUR, step=MINUTE)
    return larm


OF_12_HOURS = round(100 * 11 / 12, 2)


def test_a_pause_is_left_out_of_the_uptime(house):
    larm = down_for_an_hour_of_the_first_two(house)
    change(larm, "pause")
    larm.watch_for(12 * HOUR, step=HOUR)
    change(larm, "resume")
    larm.watch_for(10 * HOUR, step=HOUR)
    assert shown_uptime(larm)["24h"] == OF_12_HOURS


def test_a_pause_that_is_not_over_yet_is_left_out_of_the_uptime_too(house):
    larm = down_for_an_hour_of_the_first_two(house)
    change(larm, "pause")
    larm.watch_for(22 * HOUR, step=HOUR)
    assert shown_uptime(larm)["24h"] == 50.0


def test_a_monitor_that_is_disabled_is_left_out_of_the_uptime_too(house):
    larm = down_for_an_hour_of_the_first_two(house)
    larm.reload('[monitors.job]\ninterval = "7d"\nenabled = false\n')
    larm.watch_for(22 * HOUR, step=HOUR)
    assert shown_uptime(larm)["24h"] == 50.0


def test_the_time_that_larm_was_off_is_left_out_of_the_uptime(house):
    larm = down_for_an_hour_of_the_first_two(house)
    larm.ping("job")
    larm.restart(12 * HOUR)
    larm.watch_for(10 * HOUR, step=HOUR)
    assert shown_uptime(larm)["24h"] == OF_12_HOURS


def test_a_monitor_that_is_younger_has_no_uptime_yet(house):
    larm = down_for_an_hour_of_the_first_two(house)
    assert set(shown_uptime(larm).values()) == {None}


def test_a_monitor_that_was_not_watched_at_all_has_no_uptime(house):
    larm = house(JOB)
    change(larm, "pause")
    larm.watch_for(8 * DAY, step=HOUR)
    change(larm, "resume")
    assert shown_uptime(larm) == {"24h": None, "7d": None, "30d": None, "90d": None}


def gap(from_at: int, to_at: int, own: bool = False) -> dict[str, Any]:
    return {"monitor_id": 1 if own else None, "from_at": from_at, "to_at": to_at}


def event(type: str, at: int) -> dict[str, Any]:
    return {"type": type, "at": at}


@pytest.mark.parametrize(("changes", "gaps", "percent"), [
    ([], [], 100.0),
    ([event("down", -50)], [], 0.0),
    ([event("up", -50)], [], 100.0),
    ([event("down", 25), event("up", 50)], [], 75.0),
    ([event("down", -50), event("up", 50)], [], 50.0),
    ([event("down", 75)], [], 75.0),
    ([event("down", 25), event("up", 50)], [gap(0, 50)], 100.0),
    ([event("down", 25), event("up", 75)], [gap(0, 50)], 50.0),
    ([event("down", 25)], [gap(25, 50, own=True)], 100.0),  # resumed: up
    ([event("down", 25)], [gap(25, 50)], 33.33),  # Larm was off: down still
    ([event("down", 50)], [gap(-50, 20), gap(10, 40), gap(30, 40)], 16.67),  # they overlap
    ([event("down", 50)], [gap(80, 20)], 50.0),  # the clock was set back
    ([], [gap(-10, 110)], None),
    ([event("down", 50)], [gap(0, 40), gap(40, 100, own=True)], None),
])
def test_uptime_is_the_part_of_the_watched_time_that_was_not_down(changes, gaps, percent):
    assert program.uptime(changes, gaps, -1_000, 100, 100) == percent


def sampled_uptime(changes: list[Any], gaps: list[Any], span: int, now: int) -> float | None:
    """The oracle: ask every second of the span whether it was watched, and whether down."""
    turns = {change["at"]: change["type"] for change in changes}
    turns |= {gap["to_at"]: "up" for gap in gaps if gap["monitor_id"]}
    watched = down = 0
    state = "up"
    for second in range(min([0, *turns]), now):
        state = turns.get(second, state)
        if second >= now - span and not any(g["from_at"] <= second < g["to_at"] for g in gaps):
            watched += 1
            down += state == "down"
    return round(100 * (1 - down / watched), 2) if watched else None


@settings(derandomize=True, deadline=None, database=None, max_examples=500)
@given(
    st.lists(st.integers(-20, 59), unique=True, max_size=12).map(sorted), st.booleans(),
    st.lists(st.tuples(st.integers(-20, 60), st.integers(0, 30), st.booleans()), max_size=4),
)  # fmt: skip
def test_uptime_is_what_sampling_every_second_says(moments, first_is_down, spans):
    types = ("down", "up") if first_is_down else ("up", "down")
    changes = [event(types[number % 2], at) for number, at in enumerate(moments)]
    gaps = [gap(from_at, min(60, from_at + length), own) for from_at, length, own in spans
            if not (own and from_at + length in moments)]  # in the same instant: either may be last
    expected = sampled_uptime(changes, gaps, 60, 60)
    assert program.uptime(changes, gaps, -1_000, 60, 60) == expected
