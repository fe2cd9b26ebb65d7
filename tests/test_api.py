"""The JSON API: its shapes, its pages, its errors, and the README's examples of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import requests
import yaml
from conftest import ROOT, TOKEN, Answer, House, Webhook, ask, open_web, wait_until

import larm as program
from larm import HOUR, MINUTE, SECOND

CHANNELS = '[channels]\nphone = "json://127.0.0.1:9/"\n"a/b c" = "json://127.0.0.1:9/"\n'
JOBS = CHANNELS + f"""
[monitors.job]
name = "Nightly backup"
interval = "1h"
grace = "10m"
token = "{TOKEN}"
notify = ["phone"]
note = "A note"
[monitors.other]
interval = "90.5s"
grace = 0
notify = []
"""


@pytest.fixture
def rooms(house) -> House:
    return house(JOBS)


@pytest.fixture
def web(rooms) -> program.Web:
    return open_web(rooms)


@pytest.fixture
def data(web) -> Callable[..., Any]:
    """data(path below /api/v1/): what a viewer gets."""

    def get(path: str, **headers: str) -> Any:
        answer = ask(web, f"/api/v1/{path}", **headers)
        assert answer.status == 200, answer.body
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.json.keys() == {"data"}
        return answer.json["data"]

    return get


def iso(ms: int) -> str:
    return program.iso_utc(ms)


def is_error(answer: Answer, status: int, kind: str) -> bool:
    """Whether an answer is an error as the API words it."""
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json.keys() == {"error"}
    assert answer.json["error"].keys() == {"type", "message"}
    assert answer.json["error"]["message"]
    return (answer.status, answer.json["error"]["type"]) == (status, kind)


def receive(rooms: House, key: str, action: str = "", **more: Any) -> None:
    rooms.intake.receive(
        rooms.watched[key].token,
        action,
        lambda signal, status: program.Ping(signal, exit_status=status, **more),
    )


# Monitors


def test_a_monitor_is_as_the_interface_has_it(rooms, data):
    now = rooms.clock.now()
    rooms.ping("job")
    uptime = dict.fromkeys(("24h", "7d", "30d", "90d"))
    assert data("monitors/job") == {
        "id": "job", "name": "Nightly backup", "check_type": "heartbeat", "enabled": True,
        "state": "up", "since": iso(now), "running": False, "interval_seconds": 3600,
        "schedule": None, "timezone": None, "grace_seconds": 600, "last_heartbeat_at": iso(now),
        "last_duration_ms": None, "expected_at": iso(now + HOUR),
        "deadline_at": iso(now + HOUR + 10 * MINUTE), "uptime": uptime, "channels": ["phone"],
        "note": "A note", "ping_url": f"http://127.0.0.1:5276/api/heartbeat/{TOKEN}",
    }  # fmt: skip


def test_the_monitors_stand_in_the_order_of_the_file(data):
    monitors = data("monitors")
    assert [monitor["id"] for monitor in monitors] == ["job", "other"]
    assert monitors == [data("monitors/job"), data("monitors/other")]
    assert monitors[1]["interval_seconds"] == 90.5


# Heartbeats


def test_a_heartbeat_is_as_the_interface_has_it(rooms, data):
    receive(rooms, "job", "3", method="POST", sender="192.0.2.1", user_agent="curl/8", rid="r-1",
            body="öre\x00✓")
    assert data("monitors/job/heartbeats") == [{
        "id": 1, "at": iso(rooms.clock.now()), "signal": "fail", "exit_status": 3,
        "duration_ms": None, "method": "POST", "from": "192.0.2.1", "user_agent": "curl/8",
        "rid": "r-1", "body": "öre\x00✓",
    }]  # fmt: skip


def test_heartbeats_are_a_monitors_own_newest_first(rooms, data):
    for action in ("start", "log", ""):
        rooms.ping("job", action)
        rooms.ping("other", action)
        rooms.clock.advance(SECOND)
    heartbeats = data("monitors/job/heartbeats")
    assert [one["signal"] for one in heartbeats] == ["success", "log", "start"]
    assert [one["id"] for one in heartbeats] == [5, 3, 1]
    assert [one["id"] for one in data("monitors/other/heartbeats")] == [6, 4, 2]


def test_a_monitor_that_was_never_pinged_has_no_heartbeats(data):
    assert data("monitors/job/heartbeats") == []


# Events


def test_an_event_is_as_the_interface_has_it(rooms, data):
    start = rooms.clock.now()
    rooms.ping("job")
    rooms.ping("other")
    rooms.watch_for(2 * HOUR, 10 * MINUTE)
    rooms.ping("job")
    up, down, others = data("events")
    went_down = start + HOUR + 10 * MINUTE
    pending = {"channel": "phone", "state": "pending", "attempts": 0, "at": None, "error": None}
    assert down == {
        "id": 2, "monitor": "job", "type": "down", "at": iso(went_down), "reason": "missed",
        "last_heartbeat_at": iso(start), "down_seconds": None, "deliveries": [pending],
    }  # fmt: skip
    assert up == {
        "id": 3, "monitor": "job", "type": "up", "at": iso(start + 2 * HOUR), "reason": None,
        "last_heartbeat_at": iso(start), "down_seconds": 3000, "deliveries": [pending],
    }  # fmt: skip
    assert (others["monitor"], others["deliveries"]) == ("other", [])


def test_an_event_tells_what_became_of_its_deliveries(rooms, data):
    rooms.ping("job", "fail")
    rooms.clock.advance(3 * SECOND)
    assert not rooms.notifier.attempt("phone")  # nobody listens there
    [[delivery]] = [event["deliveries"] for event in data("events")]
    assert delivery.pop("error")
    assert delivery == {"channel": "phone", "state": "pending", "attempts": 1,
                        "at": iso(rooms.clock.now())}


def test_the_events_of_a_monitor_that_is_gone_stay(rooms, data):
    rooms.ping("job", "fail")
    rooms.reload("[monitors.new]\ninterval = 60\n")
    assert [event["monitor"] for event in data("events")] == ["job"]


# Pages


@pytest.fixture
def long(rooms) -> House:
    """Where job has 250 heartbeats and 250 events, other as many heartbeats between them."""

    def fill(db: Any) -> None:
        for number in range(1, 251):
            for monitor in (1, 2):
                db.execute("INSERT INTO heartbeats (monitor_id, at, signal, method) "
                           "VALUES (?, ?, 'log', 'GET')", (monitor, number))
            db.execute("INSERT INTO events (monitor_id, type, at) VALUES (1, 'down', ?)", (number,))
            for channel in ("phone", "mail"):
                db.execute("INSERT INTO deliveries (event_id, channel, due_at) VALUES (?, ?, 0)",
                           (number, channel))

    rooms.store.write(fill)
    return rooms


LISTS = pytest.mark.parametrize("path", ["monitors/job/heartbeats", "events"])


@LISTS
@pytest.mark.parametrize("limit", [1, 7, 100, 125, 249, 250, 251, 1000])
@pytest.mark.usefixtures("long")
def test_pages_hold_each_one_once_from_the_newest_to_the_oldest(data, path, limit):
    found: list[Any] = []
    while page := data(f"{path}?limit={limit}" + (f"&before={found[-1]['id']}" if found else "")):
        assert len(page) == min(limit, 250 - len(found))
        found += page
        if limit == 1 and len(found) == 5:
            return
    assert [one["at"] for one in found] == [iso(at) for at in range(250, 0, -1)]


@LISTS
@pytest.mark.usefixtures("long")
def test_a_page_has_100_where_no_limit_is_given(data, path):
    assert len(data(path)) == 100


@pytest.mark.usefixtures("long")
def test_each_event_of_a_page_has_its_own_deliveries(data):
    assert [[one["channel"] for one in event["deliveries"]]
            for event in data("events?limit=3&before=100")] == [["phone", "mail"]] * 3


@LISTS
def test_the_next_page_begins_where_the_last_ended_though_that_was_pruned(long, data, path):
    last = data(f"{path}?limit=10")[-1]["id"]
    expected = data(f"{path}?limit=10&before={last}")
    for table in ("deliveries", "heartbeats", "events"):
        column = "event_id" if table == "deliveries" else "id"
        long.store.write(lambda db, sql=f"DELETE FROM {table} WHERE {column} = {last}":
                         db.execute(sql))
    assert data(f"{path}?limit=10&before={last}") == expected


BAD_NUMBERS = ["-1", "0", "1e9", "1001", "99999999999999999999", "", "1.5", "+1", "%20", "1%20",
               "ten", "0x10", "%D9%A1", "%ff", "%ed%a0%80", "null", "1_0", "1,2", "'"]


@LISTS
@pytest.mark.parametrize("number", BAD_NUMBERS)
@pytest.mark.parametrize("name", ["limit", "before"])
@pytest.mark.usefixtures("long")
def test_a_limit_or_an_id_that_is_none_is_an_invalid_request(web, path, name, number):
    answer = ask(web, f"/api/v1/{path}?{name}={number}")
    assert is_error(answer, 400, "invalid_request")
    assert name in answer.json["error"]["message"]


@LISTS
def test_an_id_before_there_is_any_is_an_invalid_request(web, path):
    assert is_error(ask(web, f"/api/v1/{path}?before=1"), 400, "invalid_request")


# Errors


@pytest.mark.parametrize("path", [
    "/api/", "/api/v1", "/api/v1/", "/api/v2/monitors", "/api/v1/monitors/", "/api/v1/Monitors",
    "/api/v1/monitors/nobody", "/api/v1/monitors/nobody/heartbeats", "/api/v1/monitors/JOB",
    "/api/v1/monitors/job/", "/api/v1/monitors/job/nothing", "/api/v1/events/1", "/api/v1/channels",
    "/api/v1/monitors/%00", "/api/v1/monitors/%ff", "/api/%ff", "/api/v1/monitors/" + "a" * 9_000,
    "/api/v1/monitors/http:%2f%2fx", "/api/heartbeat",
])  # fmt: skip
def test_what_is_not_there_is_not_found(web, path):
    answer = ask(web, path)
    assert is_error(answer, 404, "not_found")
    assert len(answer.body) < 500


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/api/v1/monitors/nobody/pause",
                                  "/api/v1/monitors/nobody/resume", "/api/v1/monitors/job/paused"])
def test_nothing_can_be_posted_to_what_is_not_there(web, path):
    assert is_error(ask(web, path, "POST"), 404, "not_found")


GETS = ["/api/v1/monitors", "/api/v1/monitors/job", "/api/v1/monitors/job/heartbeats",
        "/api/v1/events"]
POSTS = ["/api/v1/monitors/job/pause", "/api/v1/monitors/job/resume", "/api/v1/channels/phone/test"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"])
@pytest.mark.parametrize("path", GETS)
def test_what_is_read_takes_get_and_head_only(web, path, method):
    answer = ask(web, path, method)
    assert is_error(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "FOO"])
@pytest.mark.parametrize("path", POSTS)
def test_what_changes_something_takes_post_only(rooms, web, path, method):
    answer = ask(web, path, method)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert method == "HEAD" or is_error(answer, 405, "method_not_allowed")
    assert rooms.state("job") == "pending"


@pytest.mark.parametrize("path", ["/", "/monitor/job", "/badge/job.svg", "/badge/all.svg",
                                  "/metrics", "/health"])
def test_pages_take_get_and_head_only_too(web, path):
    answer = ask(web, path, "OPTIONS")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", GETS)
def test_the_head_of_an_answer_is_the_answer_without_its_body(web, path):
    whole, head = ask(web, path), ask(web, path, "HEAD")
    assert (head.status, head.headers, head.body) == (200, whole.headers, b"")


def test_what_can_not_be_written_is_unavailable(rooms, web):
    rooms.store.write(lambda db: db.execute("PRAGMA query_only = ON"))
    answer = ask(web, "/api/v1/monitors/job/pause", "POST")
    assert is_error(answer, 503, "unavailable")
    assert int(answer.headers["Retry-After"]) > 0


def test_a_mistake_of_larms_own_is_an_error_in_the_same_shape(rooms, web, caplog):
    rooms.store.write(lambda db: db.execute("ALTER TABLE events RENAME TO lost"))
    answer = ask(web, "/api/v1/events")
    assert is_error(answer, 500, "unavailable")
    assert "lost" not in answer.body.decode()
    assert "no such table: events" in caplog.text


def test_nobody_elses_page_may_read_an_answer(web):
    for path in (*GETS, "/metrics", "/badge/all.svg", "/"):
        names = {name.lower() for name in ask(web, path, Origin="https://evil.example").headers}
        assert not [name for name in names if name.startswith("access-control-")]


# Channel tests

JOB = "[monitors.job]\ninterval = 60\n"


def test_a_channel_test_sends_an_alert(house, webhook: Webhook):
    rooms = house(f'[channels]\nphone = "{webhook.url}"\n{JOB}')
    answer = ask(open_web(rooms), "/api/v1/channels/phone/test", "POST")
    assert (answer.status, answer.json) == (200, {"data": {"sent": True, "error": None}})
    [alert] = webhook.alerts
    assert (alert["title"], alert["type"]) == ("Test alert from Larm", "info")
    assert alert["message"].endswith("http://127.0.0.1:5276/")


def test_a_channel_test_says_why_it_was_not_sent_but_not_the_channels_url(house, webhook: Webhook):
    webhook.answer = 500
    rooms = house(f'[channels]\nphone = "{webhook.url}/a-secret-of-the-channel"\n{JOB}')
    answer = ask(open_web(rooms), "/api/v1/channels/phone/test", "POST")
    assert (answer.status, answer.json["data"]["sent"]) == (200, False)
    assert "500" in answer.json["data"]["error"]
    assert b"a-secret" not in answer.body


def test_a_channel_may_have_any_name(web):
    answer = ask(web, "/api/v1/channels/a%2Fb%20c/test", "POST")
    assert (answer.status, answer.json["data"]["sent"]) == (200, False)


@pytest.mark.parametrize("name", ["mail", "Phone", "%00", "a", "phone/test"])
def test_an_unknown_channel_is_not_found(web, name):
    assert is_error(ask(web, f"/api/v1/channels/{name}/test", "POST"), 404, "not_found")


# The README


README = (ROOT / "README.md").read_text()
SECTION = README.partition("\n## HTTP API\n")[2].partition("\n## ")[0]
PASSWORD = "a-password-of-many-words"
HOME = "a-token-for-home-assistant"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


@pytest.fixture
def larm(start, webhook: Webhook) -> Any:
    """As the README's readers have it."""
    process = start(f"""
        password = "{PASSWORD}"
        [channels]
        phone = "{webhook.url}"
        [monitors.nightly-backup]
        interval = "1d"
        max_runtime = "2h"
        token = "{TOKEN}"
        note = "..."
        [monitors.home-assistant]
        interval = "5m"
        token = "{HOME}"
    """)
    process.ping(TOKEN, "/fail")
    process.ping()
    return process


def filled_in(text: str, larm: Any) -> str:
    text = text.replace("http://nas.lan:5276", larm.url).replace("nas.lan:5276", larm.url[7:])
    return text.replace("PASSWORD", PASSWORD).replace("TOKEN", TOKEN)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed here")
def test_the_readmes_curl_examples_work(larm, webhook, tmp_path):
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 10
    assert [line for line in commands if not line.startswith("curl -fsS ")] == []
    for command in commands:
        done = subprocess.run(["bash", "-c", filled_in(command, larm)], cwd=tmp_path, timeout=30,
                              capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
        if "/api/v1/" in command:
            assert json.loads(done.stdout).keys() == {"data"}, command
    assert "Test alert from Larm" in wait_until(webhook.titles)
    asked = "\n".join(commands)
    for path in (*GETS, *POSTS, "/badge/", "/metrics", "/health"):
        assert path.replace("/job", "/nightly-backup") in asked


def test_the_readmes_answers_have_the_fields_that_larm_gives(larm):
    headers = {"Authorization": f"Bearer {PASSWORD}"}
    shown = [json.loads(block) for block in blocks("json")]
    for path, example in zip(("monitors/nightly-backup", "monitors/nightly-backup/heartbeats",
                              "events"), shown, strict=True):
        found = larm.get(f"/api/v1/{path}", headers=headers).json["data"]
        found = found[0] if isinstance(found, list) else found
        assert list(example) == list(found)
        if "deliveries" in example:
            assert example["deliveries"][0].keys() == found["deliveries"][0].keys()


def test_the_readmes_prometheus_configuration_scrapes_larm(larm):
    [config] = [block for block in blocks("yaml") if "scrape_configs" in block]
    [job] = yaml.safe_load(filled_in(config, larm))["scrape_configs"]
    [[target]] = [one["targets"] for one in job["static_configs"]]
    authorization = f"Bearer {job['authorization']['credentials']}"
    answer = requests.get(f"http://{target}/metrics", headers={"Authorization": authorization},
                          timeout=10)
    assert answer.status_code == 200
    [rules] = [block for block in blocks("yaml") if "alert:" in block]
    for rule in yaml.safe_load(rules)["groups"][0]["rules"]:
        metric = re.match(r"[a-z_]+", rule["expr"])[0]
        assert metric == "up" or f"\n{metric}{{" in answer.text


def test_the_readmes_home_assistant_configuration_reads_and_pings(larm):
    [config] = [block for block in blocks("yaml") if "rest_command" in block]
    parsed = yaml.safe_load(filled_in(config.replace("TOKEN", HOME), larm))
    [rest] = parsed["rest"]
    found = requests.get(rest["resource"], headers=rest["headers"], timeout=10).json()
    for sensor in rest["sensor"]:
        assert set(sensor["json_attributes"]) <= found["data"].keys()
        assert sensor["json_attributes_path"] == "$.data"
        assert sensor["value_template"] == "{{ value_json.data.state }}"
    [(name, command)] = parsed["rest_command"].items()
    [automation] = parsed["automation"]
    assert automation["actions"] == [{"action": f"rest_command.{name}"}]
    assert requests.get(command["url"], timeout=10).json() == {"status": "ok"}
    [pinged] = larm.rows("SELECT key FROM monitors m JOIN heartbeats h ON h.monitor_id = m.id "
                         "WHERE h.signal = 'success' AND key <> 'nightly-backup'")
    assert pinged == {"key": "home-assistant"}
