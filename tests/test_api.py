"""The JSON API: its shapes, its lists, its errors and its tests of channels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import START, TOKEN, Answer, House, Process, Webhook, wait_until
from receivers import Phone, channels, monitor

import larm
from larm import DAY, HOUR, MINUTE, SECOND

NOWHERE = "json://127.0.0.1:9/"
JOBS = channels(phone=NOWHERE, **{'"a/b c"': NOWHERE}) + monitor(
    interval="1h", grace="10m", name="Nightly backup", token=TOKEN, notify=["phone"], note="A note",
) + monitor("other", "90.5s", "0s", notify=[])


@pytest.fixture
def rooms(house: Callable[..., House]) -> House:
    return house(JOBS)


def data(rooms: House, path: str) -> Any:
    answer = rooms.ask(f"/api/v1/{path}")
    assert answer.status == 200, answer
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json.keys() == {"data"}
    return answer.json["data"]


def iso(after_start: int) -> str:
    return larm.iso_utc(START + after_start)


def is_error(answer: Answer, status: int, kind: str) -> bool:
    """Whether an answer is an error as the API words it."""
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json.keys() == {"error"}
    assert answer.json["error"].keys() == {"type", "message"}
    assert 0 < len(answer.json["error"]["message"]) <= 300
    return (answer.status, answer.json["error"]["type"]) == (status, kind)


# Monitors


def test_a_monitor_is_as_the_interface_has_it(rooms):
    rooms.ping("job", "start")
    rooms.clock.advance(1_500)
    rooms.ping("job")
    assert data(rooms, "monitors/job") == {
        "id": "job", "name": "Nightly backup", "check_type": "heartbeat", "enabled": True,
        "state": "up", "since": iso(1_500), "running": False, "interval_seconds": 3600,
        "schedule": None, "timezone": None, "grace_seconds": 600, "last_heartbeat_at": iso(1_500),
        "last_duration_ms": 1_500, "expected_at": iso(HOUR + 1_500),
        "deadline_at": iso(HOUR + 10 * MINUTE + 1_500),
        "uptime": dict.fromkeys(("24h", "7d", "30d", "90d")), "channels": ["phone"],
        "note": "A note", "ping_url": f"http://127.0.0.1:5276/api/heartbeat/{TOKEN}",
    }  # fmt: skip
    rooms.ping("job", "start")
    assert data(rooms, "monitors/job")["running"] is True


def test_a_monitor_with_a_schedule_says_which_and_where(house):
    rooms = house('[monitors.job]\nschedule = "30 4 * * *"\ntimezone = "Asia/Tokyo"\n')
    rooms.ping("job")
    found = data(rooms, "monitors/job")
    assert (found["schedule"], found["timezone"]) == ("30 4 * * *", "Asia/Tokyo")
    assert (found["interval_seconds"], found["grace_seconds"]) == (86_400, 3_600)
    assert found["expected_at"] == iso(11 * HOUR + 30 * MINUTE)


def test_the_monitors_stand_in_the_order_of_the_file(rooms):
    monitors = data(rooms, "monitors")
    assert [one["id"] for one in monitors] == ["job", "other"]
    assert monitors == [data(rooms, "monitors/job"), data(rooms, "monitors/other")]
    assert (monitors[1]["interval_seconds"], monitors[1]["grace_seconds"]) == (90.5, 0)


def test_the_uptime_is_in_percent_and_null_where_larm_is_younger(house):
    rooms = house(monitor(interval="1d", grace="1h", token=TOKEN))
    for day in range(8):
        if day != 3:
            rooms.ping("job")
        rooms.watch(DAY, 6 * HOUR)
    down = 100 * (1 - 23 / (7 * 24))  # from 1 h after the missed one on
    assert data(rooms, "monitors/job")["uptime"] == {"24h": 100.0, "7d": round(down, 2),
                                                     "30d": None, "90d": None}


def test_the_summary_counts_each_state(house):
    rooms = house("".join(monitor(key, "1h", "10m") for key in ("up", "late", "down", "pending"))
                  + monitor("paused") + monitor("disabled", enabled=False))
    counts = {"up": 0, "late": 0, "down": 0, "pending": 5, "paused": 1, "total": 6}
    assert data(rooms, "summary") == counts
    rooms.ping("late")
    rooms.watch(HOUR + MINUTE, MINUTE)
    rooms.ping("up")
    rooms.ping("down", "fail")
    rooms.pause("paused")
    assert data(rooms, "summary") == {"up": 1, "late": 1, "down": 1, "pending": 1, "paused": 2,
                                      "total": 6}
    assert list(data(rooms, "summary")) == list(counts)


# Heartbeats and events


def test_a_heartbeat_is_as_the_interface_has_it(rooms):
    rooms.ask(f"/api/heartbeat/{TOKEN}/3?rid=r-1", "POST", "öre\x00✓".encode(), "192.0.2.1",
              USER_AGENT="curl/8")
    assert data(rooms, "monitors/job/heartbeats") == [{
        "id": 1, "at": iso(0), "signal": "fail", "exit_status": 3, "duration_ms": None,
        "method": "POST", "from": "192.0.2.1", "user_agent": "curl/8", "rid": "r-1",
        "body": "öre\x00✓",
    }]  # fmt: skip


def test_heartbeats_are_a_monitors_own_newest_first(rooms):
    assert data(rooms, "monitors/job/heartbeats") == []
    for action in ("start", "log", ""):
        rooms.ping("job", action)
        rooms.ping("other", action)
        rooms.clock.advance(SECOND)
    found = data(rooms, "monitors/job/heartbeats")
    assert [one["signal"] for one in found] == ["success", "log", "start"]
    assert [one["duration_ms"] for one in found] == [2_000, None, None]
    others = data(rooms, "monitors/other/heartbeats")
    assert not {one["id"] for one in others} & {one["id"] for one in found}


def test_an_event_is_as_the_interface_has_it(rooms):
    rooms.ping("job")
    rooms.ping("other")
    rooms.watch(2 * HOUR, 10 * MINUTE)
    rooms.ping("job")
    up, down, others = data(rooms, "events")
    pending = {"channel": "phone", "state": "pending", "attempts": 0, "at": None, "error": None}
    [delivery] = down.pop("deliveries")
    assert delivery.keys() == pending.keys()
    assert down == {
        "id": down["id"], "monitor": "job", "type": "down", "at": iso(HOUR + 10 * MINUTE),
        "reason": "missed", "last_heartbeat_at": iso(0), "down_seconds": None,
    }  # fmt: skip
    assert up == {
        "id": up["id"], "monitor": "job", "type": "up", "at": iso(2 * HOUR), "reason": None,
        "last_heartbeat_at": iso(0), "down_seconds": 3000, "deliveries": [pending],
    }  # fmt: skip
    assert (others["monitor"], others["deliveries"]) == ("other", [])
    assert up["id"] > down["id"] > others["id"]


def test_an_event_tells_what_became_of_its_deliveries(rooms):
    rooms.ping("job", "fail")
    rooms.watch(3 * SECOND)
    rooms.deliver()  # nobody listens there
    [[delivery]] = [event["deliveries"] for event in data(rooms, "events")]
    assert "127.0.0.1" in delivery.pop("error")
    assert delivery == {"channel": "phone", "state": "pending", "attempts": 1, "at": iso(3_000)}


def test_the_events_of_a_monitor_that_is_gone_stay(rooms):
    rooms.ping("job", "fail")
    rooms.save(monitor("new"))
    assert [event["monitor"] for event in data(rooms, "events")] == ["job"]
    assert rooms.ask("/api/v1/monitors/job").status == 404


# Lists


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Where job has 126 heartbeats and events, and another as many between them."""
    rooms = House(tmp_path_factory.mktemp("larm"),
                  channels(phone=NOWHERE, mail=NOWHERE) + monitor(interval="1s", remind="1d")
                  + monitor("other", "1s"))
    for number in range(126):
        for key in ("other", "job"):
            rooms.ping(key, "" if number % 2 else "fail")
        rooms.clock.advance(SECOND)
    return rooms


LISTS = pytest.mark.parametrize("path", ["monitors/job/heartbeats", "events"])


@LISTS
@pytest.mark.parametrize("limit", [7, 63, 125, 126, 127, 1000])
def test_pages_hold_each_one_once_from_the_newest_to_the_oldest(long, path, limit):
    found: list[Any] = []
    total = 126 if "job" in path else 252
    while page := data(long, f"{path}?limit={limit}"
                       + (f"&before={found[-1]['id']}" if found else "")):
        assert len(page) == min(limit, total - len(found))
        found += page
    assert len(found) == total == len({one["id"] for one in found})
    assert [one["id"] for one in found] == sorted((one["id"] for one in found), reverse=True)


@LISTS
def test_a_page_has_100_where_no_limit_is_given(long, path):
    assert len(data(long, path)) == 100


def test_each_event_of_a_page_has_its_own_deliveries(long):
    for event in data(long, "events?limit=3&before=100"):
        assert {one["channel"] for one in event["deliveries"]} == {"phone", "mail"}


@LISTS
def test_before_any_id_is_fine_whether_or_not_it_was_ever_there(long, path):
    newest = data(long, f"{path}?limit=1")
    assert data(long, f"{path}?limit=1&before={newest[0]['id'] + 1}") == newest
    assert data(long, f"{path}?limit=1&before=999999999999999999") == newest
    assert data(long, f"{path}?before=1") == []


def test_before_a_pruned_id_is_what_is_older_and_kept(house):
    rooms = house('keep = "2d"\n' + monitor(interval="1h"))
    rooms.ping("job", "fail")
    rooms.clock.advance(HOUR)
    rooms.ping("job")
    [up, down] = data(rooms, "events")
    beats = data(rooms, "monitors/job/heartbeats")
    rooms.watch(4 * DAY, HOUR)
    rooms.watch(5 * MINUTE, MINUTE)
    for path, old in (("events", (up, down)), ("monitors/job/heartbeats", beats)):
        assert not {one["id"] for one in data(rooms, path)} & {one["id"] for one in old}, path
        for one in old:
            assert data(rooms, f"{path}?before={one['id']}") == []
            assert data(rooms, f"{path}?limit=5&before={one['id'] + 1}") == []


@LISTS
@pytest.mark.parametrize("name", ["limit", "before"])
def test_a_limit_or_an_id_that_is_none_is_an_invalid_request(long, path, name):
    numbers = ["-1", "0", "1e9", "99999999999999999999", "", "1.5", "+1", "%20", "1%20", "ten",
               "0x10", "%D9%A1", "%ff", "%ed%a0%80", "null", "1_0", "1,2", "'"]
    for number in [*numbers, *["1001"] * (name == "limit")]:
        answer = long.ask(f"/api/v1/{path}?{name}={number}")
        assert is_error(answer, 400, "invalid_request"), number
        assert name in answer.json["error"]["message"]


# Errors

GETS = ["/api/v1/summary", "/api/v1/monitors", "/api/v1/monitors/job",
        "/api/v1/monitors/job/heartbeats", "/api/v1/events"]
POSTS = ["/api/v1/monitors/job/pause", "/api/v1/monitors/job/resume", "/api/v1/channels/phone/test"]
PAGES = ["/", "/monitor/job", "/badge/job.svg", "/badge/all.svg", "/metrics", "/login", "/health"]


def test_what_is_not_there_is_not_found(rooms):
    for path in (
        "", "v1", "v1/", "v2/monitors", "v1/monitors/", "v1/Monitors", "v1/monitors/nobody",
        "v1/monitors/nobody/heartbeats", "v1/monitors/JOB", "v1/monitors/job/", "v1/events/1",
        "v1/monitors/job/nothing", "v1/channels", "v1/monitors/%00", "v1/monitors/%ff", "%ff",
        "v1/monitors/" + "a" * 9_000, "v1/monitors/http:%2f%2fx", "v1/monitors/all",
    ):  # fmt: skip
        assert is_error(rooms.ask(f"/api/{path}"), 404, "not_found"), path
    for path in ("nothing", "monitors/nobody/pause", "monitors/nobody/resume", "monitors/job/stop"):
        assert is_error(rooms.ask(f"/api/v1/{path}", "POST"), 404, "not_found"), path
    message = rooms.ask("/api/v1/monitors/nobody").json["error"]["message"]
    assert "nobody" in message


def test_below_a_path_what_is_not_there_names_the_right_place(house):
    rooms = house('url = "https://home.example/larm"\n' + JOBS)
    for path in ("/nothing", "/larm/nothing", "/larmed/", "/larmX/api/v1/monitors"):
        answer = rooms.ask(path)
        assert answer.status == 404
        assert b"/larm/" in answer.body, path
    message = rooms.ask("/larm/api/v1/monitors/nobody").json["error"]["message"]
    assert "nobody" in message
    assert rooms.ask("/monitor/job").status == rooms.ask("/larm").status == 200


def test_each_path_takes_its_method_only(rooms):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"):
        for path in GETS:
            answer = rooms.ask(path, method)
            assert is_error(answer, 405, "method_not_allowed"), (path, method)
            assert answer.headers["Allow"] == "GET, HEAD"
        for path in PAGES:
            answer = rooms.ask(path, method)
            assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD"), (path, method)
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "FOO"):
        for path in (*POSTS, "/monitor/job/pause", "/monitor/job/test", "/monitor/job/ping"):
            answer = rooms.ask(path, method)
            assert (answer.status, answer.headers["Allow"]) == (405, "POST"), (path, method)
    assert rooms.state("job") == "pending"


def test_the_head_of_an_answer_is_the_answer_without_its_body(rooms):
    for path in (*GETS, *PAGES):
        whole, head = rooms.ask(path), rooms.ask(path, "HEAD")
        assert (head.status, head.headers, head.body) == (whole.status, whole.headers, b""), path


def test_what_can_not_be_written_is_unavailable_and_what_can_be_read_is_not(rooms):
    with rooms.full_disk():
        answer = rooms.ask("/api/v1/monitors/job/pause", "POST")
        assert is_error(answer, 503, "unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert rooms.ask("/monitor/job/pause", "POST").status == 503
        assert {rooms.ask(path).status for path in GETS} == {200}
    rooms.recover()
    assert rooms.state("job") == "pending"


def test_a_database_that_can_not_be_read_is_unavailable_everywhere(rooms):
    rooms.ping("job")
    rooms.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    file = rooms.folder / "larm.db"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        for path in GETS:
            assert is_error(rooms.ask(path), 503, "unavailable"), path
        for path in ("/", "/monitor/job", "/metrics", "/badge/job.svg"):
            assert rooms.ask(path).status == 503, path
    finally:
        file.write_bytes(whole)
    assert rooms.ask("/").status == 200


def test_nobody_elses_page_may_read_an_answer(rooms):
    for path in (*GETS, *PAGES):
        names = {name.lower() for name in rooms.ask(path, ORIGIN="https://evil.example").headers}
        assert not [name for name in names if name.startswith("access-control-")]


def test_a_pause_for_null_is_one_without_an_end(rooms):
    answer = rooms.ask("/api/v1/monitors/job/pause", "POST", b'{"for": null}')
    assert (answer.status, answer.json["data"]["state"]) == (200, "paused")
    rooms.watch(40 * DAY, DAY)
    assert rooms.state("job") == "paused"


# Tests of channels


def test_a_channel_test_sends_an_alert(house, webhook: Webhook):
    rooms = house(channels(phone=webhook.url) + monitor())
    assert rooms.post("channels/phone/test") == {"sent": True, "error": None}
    [alert] = webhook.alerts
    assert (alert["title"], alert["type"]) == ("Test alert from Larm", "info")
    assert "http://127.0.0.1:5276/" in alert["message"]
    assert rooms.events() == []


def test_a_channel_test_says_why_it_was_not_sent_but_not_the_channels_url(house, webhook: Webhook):
    webhook.answer = 500
    rooms = house(channels(phone=f"{webhook.url}/a-secret-of-the-channel") + monitor())
    answer = rooms.ask("/api/v1/channels/phone/test", "POST")
    assert (answer.status, answer.json["data"]["sent"]) == (200, False)
    assert "500" in answer.json["data"]["error"]
    assert b"a-secret" not in answer.body


def test_a_channel_may_have_any_name_and_an_unknown_one_is_not_found(rooms):
    answer = rooms.ask("/api/v1/channels/a%2Fb%20c/test", "POST")
    assert (answer.status, answer.json["data"]["sent"]) == (200, False)
    for name in ("mail", "Phone", "%00", "a", "phone/test"):
        assert is_error(rooms.ask(f"/api/v1/channels/{name}/test", "POST"), 404, "not_found"), name


def test_channel_tests_run_one_at_a_time(house):
    phone, other = Phone(), Phone("other")
    phone.answer = phone.hang
    rooms = house(channels(phone, other) + monitor())
    with ThreadPoolExecutor() as threads:
        first = threads.submit(rooms.ask, "/api/v1/channels/phone/test", "POST")
        wait_until(lambda: phone.tries)
        for path in ("/api/v1/channels/other/test", "/monitor/job/test"):
            answer = rooms.ask(path, "POST")
            assert (answer.status, other.tries) == (503, 0)
            assert b"under way" in answer.body
        phone.hanging.set()
        assert first.result(10).json["data"]["sent"] is False
    assert wait_until(lambda: rooms.ask("/api/v1/channels/other/test", "POST").status == 200)


@pytest.mark.parametrize("path", ["/api/v1/channels/phone/test", "/monitor/job/test"])
def test_32_tests_of_a_hanging_channel_keep_no_ping_and_no_page_out(
        start: Callable[..., Process], webhook: Webhook, path):
    webhook.answer = "hang"
    process = start(channels(phone=webhook.url) + monitor(token=TOKEN))

    def ask() -> None:
        with contextlib.suppress(OSError):  # Larm is stopped while it waits
            process.get(path, "POST", b"")

    for _ in range(32):
        threading.Thread(target=ask, daemon=True).start()
    wait_until(lambda: webhook.refused)
    for action in ("", "/fail", "/0"):
        assert process.ping(TOKEN, action).status == 200
    for page in ("/", "/monitor/job", "/api/v1/summary", "/health"):
        assert process.get(page).status == 200
    assert webhook.refused == 1
    assert process.stop() == 0
