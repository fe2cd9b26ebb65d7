"""Signals: what start, success, fail, exit statuses and log do to a monitor and to its runs."""

from __future__ import annotations

import codecs
import html
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    QUICK,
    START,
    TOKEN,
    Answer,
    FakeClock,
    House,
    Process,
    Webhook,
    launch,
    run_larm,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import larm

SECOND, MINUTE, HOUR, DAY = larm.SECOND, larm.MINUTE, larm.HOUR, larm.DAY
JOB = f'[monitors.job]\ninterval = "1h"\ngrace = "10m"\nmax_runtime = "20m"\ntoken = "{TOKEN}"\n'
WINDOW = 6 * MINUTE  # of JOB
OTHER = '[monitors.other]\ninterval = "366d"\n'
NIGHTLY = """timezone = "UTC"
[channels]
hook = "{}"
[monitors.job]
schedule = "0 3 * * *"
grace = "1h"
"""  # START is at 08:00, 19 hours before the first night's run


def after(house: House, ms: int, action: str = "", rid: str | None = None, body: str = "") -> None:
    """Watch for so long, then ping."""
    house.live(ms)
    house.ping("job", action, rid=rid, body=body)


def events(house: House) -> list[tuple[str, str | None, int]]:
    """(type, reason, minutes since START) of each."""
    return [(type, reason, at // MINUTE) for type, reason, at in house.changes()]


def durations(house: House) -> list[tuple[str, int | None]]:
    """The stored ends of runs, and how many minutes each took."""
    return [
        (one["signal"], one["duration_ms"] and one["duration_ms"] // MINUTE)
        for one in house.heartbeats("job") if one["signal"] in ("success", "fail")
    ]


def is_running(house: House) -> bool:
    return bool(house.monitor("job")["running"])


def lasted(house: House) -> int | None:
    """How many milliseconds the last run took."""
    found: int | None = house.monitor("job")["last_duration_ms"]
    return found


def pause_and_resume(house: House, between: Callable[[], None] = lambda: None) -> None:
    house.pause("job")
    between()
    house.resume("job")


def rows(house: House) -> int:
    """How many rows the database has, of whatever."""
    tables = house.sql("SELECT name FROM sqlite_master WHERE type = 'table'")
    return sum(house.sql(f"SELECT COUNT(*) AS n FROM {table['name']}")[0]["n"] for table in tables)


# The state table

CELLS = {
    ("pending", "success"): ("up", []),
    ("pending", "fail"): ("down", [("down", "failed")]),
    ("pending", "start"): ("pending", []),
    ("pending", "log"): ("pending", []),
    ("pending", "overran"): ("down", [("down", "overran")]),
    ("up", "success"): ("up", []),
    ("up", "fail"): ("down", [("down", "failed")]),
    ("up", "start"): ("up", []),
    ("up", "log"): ("up", []),
    ("up", "missed"): ("down", [("down", "missed")]),
    ("up", "overran"): ("down", [("down", "overran")]),
    ("down", "success"): ("up", [("up", None)]),
    ("down", "fail"): ("down", []),
    ("down", "start"): ("down", []),
    ("down", "log"): ("down", []),
    ("down", "overran"): ("down", []),
}
PATHS = {"pending": [], "up": [""], "down": ["", "fail"]}  # the pings that lead to a state


@pytest.mark.parametrize(("state", "what"), CELLS, ids="-".join)
def test_each_cell_of_the_table_is_what_happens(house, state, what):
    here = house(JOB)
    if what == "overran":
        here.ping("job", "start", rid="old")
    for action in PATHS[state]:
        here.ping("job", action, rid="other")
    known = len(here.events())
    assert here.state("job") == state
    here.clock.advance(MINUTE)
    if what in ("missed", "overran"):
        here.watch(70 * MINUTE if what == "missed" else 20 * MINUTE, step=MINUTE)
    else:
        here.ping("job", "" if what == "success" else what)
    then, brought = CELLS[state, what]
    assert here.state("job") == then
    assert [(one["type"], one["reason"]) for one in here.events()[known:]] == brought


@pytest.mark.parametrize("state", ["pending", "down"])
def test_what_is_pending_or_down_has_no_deadline_to_miss(house, state):
    here = house(JOB)
    for action in PATHS[state]:
        here.ping("job", action)
    known = here.events()
    assert here.monitor("job")["deadline_at"] is None
    here.watch(2 * HOUR, step=MINUTE)
    assert here.events() == known


@pytest.mark.parametrize(("action", "signal", "status"), [
    ("0", "success", 0), ("1", "fail", 1), ("137", "fail", 137), ("255", "fail", 255),
])  # fmt: skip
def test_an_exit_status_of_0_is_a_success_and_any_other_a_failure(house, action, signal, status):
    here = house(JOB)
    here.ping("job", action)
    [heartbeat] = here.heartbeats("job")
    assert (heartbeat["signal"], heartbeat["exit_status"]) == (signal, status)
    assert here.state("job") == {"success": "up", "fail": "down"}[signal]


# What a call means

AS = ("success", None, None)  # the signal, the exit status and the body of a plain ping
FORMS: dict[str, tuple[str, int | None, str | None] | None] = {  # T: the token; None: no ping
    "/api/heartbeat/T": AS,
    "/ping/T": AS,
    "/ping/T/start": ("start", None, None),
    "/ping/T/fail": ("fail", None, None),
    "/ping/T/3": ("fail", 3, None),
    "/ping/T/log": ("log", None, None),
    "/api/push/T": AS,
    "/api/push/T?status=up&msg=OK&ping=12": ("success", None, "OK"),
    "/api/push/T?status=down&msg=no%20route%20%E2%9C%97": ("fail", None, "no route ✗"),
    "/api/push/T?status=down&msg=": ("fail", None, None),
    "/api/push/T/fail": ("fail", None, None),
    f"/api/push/T?msg={'m' * 3_000}&status=down": ("fail", None, "m" * 3_000),
    # empty segments and white space mean nothing
    "/api/heartbeat//T/0": ("success", 0, None),
    "/api/heartbeat/T//fail": ("fail", None, None),
    "/api/heartbeat/T/fail/": ("fail", None, None),
    "/api/heartbeat/T/": AS,
    "/api/heartbeat/T%0D": AS,
    "/api/heartbeat/T%20": AS,
    "/api/heartbeat/%20T%0A/%203%09": ("fail", 3, None),
    "/api/heartbeat/T/%20/": AS,
    "/api/heartbeat/T/fail%0D": ("fail", None, None),
    "/ping///T//start//": ("start", None, None),
    "/api/push/T%0D?status=down": ("fail", None, None),
    # ?status= and ?msg= anywhere
    "/api/heartbeat/T?status=down": ("fail", None, None),
    "/api/heartbeat/T?status=up": AS,
    "/ping/T/?rid=a&status=down": ("fail", None, None),
    "/ping/T/fail?msg=hello": ("fail", None, "hello"),
    "/api/heartbeat/T?msg=a+b": ("success", None, "a b"),
    # but not behind an action
    "/api/heartbeat/T/start?status=down": ("start", None, None),
    "/api/push/T/0?status=down": ("success", 0, None),
    "/api/push/T/log?status=down&msg=x": ("log", None, "x"),
    # what has no meaning
    **{f"/api/heartbeat/T{behind}": None for behind in (
        "/256", "/-1", "/0x1", "/00", "/01", "/1000", "/1.0", "/+1", "/START", "/Fail",
        "/start/extra", "/start%00", "/log.txt", "/success", "/1e1", "/start;a", "/%D9%A1",
        "/0/1", "/st%20art", "/T")},
    "/ping/T/nonsense?status=down": None,
    "/api/push/T/down": None,
}  # fmt: skip


def as_stored(heartbeats: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [(one["signal"], one["exit_status"], one["body"]) for one in heartbeats]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Process]:
    """A Larm with plenty of monitors, under a prefix; a token for each test."""
    names = [f"job-{number:02}" for number in range(len(FORMS) + 20)]
    toml = 'url = "http://larm.example/larm"\n' + "".join(
        f'[monitors.{name}]\ninterval = "1d"\ntoken = "token-of-{name}-x"\n' for name in names
    )
    process = launch(tmp_path_factory.mktemp("signals"), toml)
    process.tokens = iter(f"token-of-{name}-x" for name in names)
    yield process
    process.kill()


def stored(server: Process, token: str) -> list[dict[str, Any]]:
    """The heartbeats, oldest first."""
    key = token.removeprefix("token-of-").removesuffix("-x")
    found: list[dict[str, Any]] = server.get(
        f"/larm/api/v1/monitors/{key}/heartbeats"
    ).json["data"]
    return found[::-1]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[:40])
def test_each_form_of_a_ping_means_what_it_says(house, server, form):
    """Without a server, and behind the real one, under a prefix."""
    here, kept = house(JOB), [FORMS[form]] if FORMS[form] else []
    answer = here.ask(form.replace("T", TOKEN, 1))
    assert (answer.status, answer.body) == (200, b'{"status": "ok"}')
    assert as_stored(here.heartbeats("job")) == kept
    assert here.monitor("job")["running"] is bool(kept and kept[0] and kept[0][0] == "start")

    token = next(server.tokens)
    answer = server.get("/larm" + form.replace("T", token, 1))
    assert (answer.status, answer.body) == (200, b'{"status": "ok"}')
    assert as_stored(stored(server, token)) == kept


def test_a_ping_beside_the_prefix_is_none(server):
    token = next(server.tokens)
    for path in (f"/larmX/ping/{token}", f"/lar/ping/{token}", f"/larm/larm/ping/{token}",
                 f"/ping-pong/{token}", f"/larm/api/{token}", f"/x/api/heartbeat/{token}"):
        assert server.get(path).status == 404
    assert stored(server, token) == []


def test_a_body_is_kept_and_not_what_the_query_says(house):
    here = house(JOB)
    here.ask(f"/api/push/{TOKEN}?status=down&msg=of+the+query", "POST", b"of the body")
    assert here.heartbeats("job")[0]["body"] == "of the body"


@pytest.mark.parametrize("action", ["nonsense", "256", "<b>bold"])
def test_a_known_token_with_an_unknown_action_changes_nothing_and_is_shown(house, action):
    here = house(JOB + OTHER)
    here.ping("job")
    here.watch(MINUTE)
    before = here.monitor("job")
    assert action not in here.ask("/monitor/job").body.decode()
    for _ in range(3):
        here.ask(f"/api/heartbeat/{TOKEN}/{action}", "POST", b"some output")
    here.ask("/api/heartbeat/nobody-ever-made-this-token/of-a-stranger")
    after = here.monitor("job")
    assert after | {"uptime": None} == before | {"uptime": None}
    assert len(here.heartbeats("job")) == 1
    shown = action.replace("<", "&lt;").replace(">", "&gt;")
    for page in ("/monitor/job", "/"):
        assert shown in here.ask(page).body.decode()
        assert "<b>bold" not in here.ask(page).body.decode()
    assert shown not in here.ask("/monitor/other").body.decode()
    assert here.events() == []


UTF_16 = "Säkert ✓\r\n" * 3_000  # 60 kB: its byte order mark is far from what is kept


@pytest.mark.parametrize(("body", "content_type", "text"), [
    (codecs.BOM_UTF8 + "ö".encode(), "", "ö"),
    (codecs.BOM_UTF16_LE + "dir: ö\r\n".encode("utf-16-le"), "", "dir: ö\r\n"),  # PowerShell
    (codecs.BOM_UTF16_BE + "ö".encode("utf-16-be"), "text/plain; charset=utf-8", "ö"),
    (codecs.BOM_UTF16_LE + UTF_16.encode("utf-16-le"), "", UTF_16[-5_000:]),
    ("ö".encode("utf-16-le"), "text/plain; charset=UTF-16LE", "ö"),
    ("ö €".encode("cp1252"), 'text/plain; charset="windows-1252"', "ö €"),
    ("ö".encode("latin-1"), "text/plain;charset=ISO-8859-1;x=y", "ö"),
    (b"\x81\xf6", "text/plain; charset=windows-1252", "\ufffdö"),
    ("ö".encode("latin-1"), "text/plain", "\ufffd"),
    ("ö".encode(), "text/plain; charset=no-such-charset", "ö"),
    ("ö".encode(), "text/plain; charset=", "ö"),
    *[("ö".encode(), f"text/plain; charset={name}", "ö")
      for name in ("base64", "zip", "rot13", "undefined", "hex", "mbcs")],
    (b"\xff ok", "text/plain; charset=utf-8", "\ufffd ok"),
], ids=lambda value: repr(value)[:25])  # fmt: skip
def test_a_body_is_text_by_its_mark_else_its_charset_else_utf_8(house, body, content_type, text):
    here = house(JOB)
    answer = larm_ask(here, f"/api/heartbeat/{TOKEN}/fail", body, content_type)
    assert answer.status == 200
    assert here.heartbeats("job")[0]["body"] == text


def larm_ask(here: House, path: str, body: bytes, content_type: str) -> Answer:
    """A POST with a content type, which WSGI keeps apart from the other headers."""
    web = here.larm.web

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        environ |= {"CONTENT_TYPE": content_type, "CONTENT_LENGTH": str(len(body))}
        return web(environ, start_response)

    from conftest import ask

    return ask(application, path, "POST", body)


def test_a_charset_is_heeded_by_the_real_server_too(server):
    token = next(server.tokens)
    body = codecs.BOM_UTF16_LE + UTF_16.encode("utf-16-le")
    server.get(f"/larm/ping/{token}/log", "POST", body)
    server.get(f"/larm/ping/{token}/fail", "POST", "ö €".encode("cp1252"),
               {"Content-Type": "text/plain; charset=cp1252"})  # fmt: skip
    assert as_stored(stored(server, token)) == [
        ("log", None, UTF_16[-5_000:]), ("fail", None, "ö €")
    ]  # fmt: skip


@pytest.mark.parametrize(("peer", "forwarded", "proxies", "sender"), [
    ("203.0.113.9", None, None, "203.0.113.9"),
    ("203.0.113.9", "198.51.100.7", None, "203.0.113.9"),  # a stranger says so
    ("127.0.0.1", "192.0.2.1, 198.51.100.7", None, "198.51.100.7"),  # what the proxy has added
    ("::1", "198.51.100.7", None, "198.51.100.7"),
    ("127.0.0.1", "2001:db8::7", None, "2001:db8::7"),
    ("127.0.0.1", "198.51.100.7", [], "127.0.0.1"),
    ("10.1.2.3", "198.51.100.7", None, "10.1.2.3"),
    ("10.1.2.3", "192.0.2.1, 198.51.100.7,10.9.9.9 , 10.0.0.1", ["10.0.0.0/8"], "198.51.100.7"),
    ("127.0.0.1", "198.51.100.7", ["10.0.0.0/8"], "127.0.0.1"),
    ("::ffff:10.1.2.3", "198.51.100.7", ["10.0.0.0/8"], "198.51.100.7"),
])  # fmt: skip
def test_a_ping_is_from_its_peer_or_from_whom_a_proxy_says(
    house, peer, forwarded, proxies, sender
):
    top = "" if proxies is None else f"proxies = {proxies}\n".replace("'", '"')
    here = house(top + JOB)
    headers = {"X_Forwarded_For": forwarded} if forwarded else {}
    assert here.ask(f"/api/heartbeat/{TOKEN}", peer=peer, **headers).status == 200
    assert here.heartbeats("job")[0]["from"] == sender


def test_a_ping_is_from_whom_a_proxy_says_behind_the_real_server_too(server):
    token = next(server.tokens)
    server.get(f"/larm/ping/{token}", headers={"X-Forwarded-For": "192.0.2.1, 198.51.100.7"})
    assert [one["from"] for one in stored(server, token)] == ["198.51.100.7"]


# Starts and ends


@pytest.mark.parametrize(("action", "signal"), [("", "success"), ("0", "success"), ("3", "fail")])
@pytest.mark.parametrize("rid", [None, "a"])
def test_a_run_lasts_from_its_start_to_its_end(house, action, signal, rid):
    here = house(JOB)
    here.ping("job", "start", rid=rid)
    assert is_running(here)
    after(here, 7 * MINUTE, action, rid=rid)
    assert durations(here) == [(signal, 7)]
    assert lasted(here) == 7 * MINUTE
    assert not is_running(here)


def test_an_end_without_a_start_has_no_duration(house):
    here = house(JOB)
    here.ping("job", rid="a")
    assert durations(here) == [("success", None)]


def test_an_end_with_a_rid_that_did_not_start_ends_no_run_with_another_rid(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    after(here, 7 * MINUTE, rid="b")
    assert durations(here) == [("success", None)]
    assert is_running(here)


@pytest.mark.parametrize("order", ["abc", "bca", "cba"])
def test_overlapping_runs_end_in_any_order(house, order):
    here = house(JOB.replace("1h", "1d").replace("20m", "1d"))
    started = {}
    for rid in "abc":
        here.watch(3 * HOUR, step=HOUR)
        started[rid] = here.clock.now()
        here.ping("job", "start", rid=rid)
    for rid in order:
        assert is_running(here)
        here.clock.advance(MINUTE)
        here.ping("job", rid=rid)
        assert lasted(here) == here.clock.now() - started[rid]
    assert not is_running(here)


@pytest.mark.parametrize("ends", [("", ""), ("fail", "fail"), ("1", "2"), ("", "fail")])
def test_two_runs_that_end_at_the_same_moment_both_end(house, ends):
    """Within one commit, or one window: no second end is dropped, and no run overruns later."""
    here = house(JOB)
    here.ping("job")
    for rid in "ab":
        after(here, 7 * MINUTE, "start", rid=rid)
    here.watch(MINUTE)
    with here.hanging_disk():
        threads = [threading.Thread(target=here.ping, args=("job", end, "", rid))
                   for end, rid in zip(ends, "ab", strict=True)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join(10)
    assert not is_running(here)
    here.ping("job", rid="another")
    known = events(here)
    here.watch(30 * MINUTE, step=MINUTE)
    assert events(here) == known


def test_a_start_restarts_the_open_run_of_its_rid(house):
    """A machine that reboots during a job: what counts is the second start, however soon."""
    for rid in (None, "a"):
        here = house(JOB)
        here.ping("job", "start", rid=rid)
        after(here, MINUTE, "start", rid=rid)
        here.watch(20 * MINUTE - SECOND, step=MINUTE)
        assert here.events() == []
        here.watch(2 * SECOND)
        assert here.changes() == [("down", "overran", 21 * MINUTE)]
        after(here, 4 * MINUTE - SECOND, rid=rid)
        assert lasted(here) == 24 * MINUTE
        assert not is_running(here)
        here.stop()
        (here.folder / "larm.db").unlink()


def test_a_rid_may_be_used_again_for_the_next_run(house):
    here = house(JOB)
    for _ in range(3):
        after(here, 30 * MINUTE, "start", rid="nightly")
        after(here, 10 * MINUTE, rid="nightly")
    assert durations(here) == [("success", 10)] * 3
    assert events(here) == []


@pytest.mark.parametrize("back", [HOUR, -HOUR])
def test_a_clock_that_is_set_makes_no_run_last_for_hours_or_less_than_nothing(house, back):
    here = house(JOB)
    here.ping("job", "start")
    here.clock.set_wall(-back)
    here.tick()
    after(here, MINUTE)
    assert 0 <= (lasted(here) or 0) <= 2 * MINUTE


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_between_start_and_end_changes_nothing_about_the_run(house, crash):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    here.tick()
    here.restart(5 * MINUTE, crash=crash)
    assert is_running(here)
    after(here, 10 * MINUTE, rid="a")
    assert durations(here) == [("success", 15)]
    assert not is_running(here)


def test_a_log_neither_starts_nor_ends_a_run(house):
    here = house(JOB)
    here.ping("job", "log")
    assert not is_running(here)
    here.ping("job", "start")
    after(here, MINUTE, "log", body="half way")
    assert is_running(here)


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(st.sampled_from([[None], ["a", "b", "c"]]), st.lists(
    st.tuples(st.sampled_from(["start", "start", "", "0", "fail", "3", "log"]),
              st.integers(0, 2), st.integers(0, 2 * WINDOW)),
    max_size=20,
))  # fmt: skip
def test_ends_are_paired_with_starts_by_rid(rids, steps):
    open_runs: dict[str | None, int] = {}
    last = None
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        here = House(Path(folder), '[monitors.job]\ninterval = "1h"\ngrace = "366d"\n')
        for action, number, wait in steps:
            rid = rids[number % len(rids)]
            here.clock.advance(wait)
            here.ping("job", action, rid=rid)
            if action == "start":
                open_runs[rid] = here.clock.now()
            elif action != "log" and rid in open_runs:
                last = here.clock.now() - open_runs.pop(rid)
            assert (is_running(here), lasted(here)) == (bool(open_runs), last)
        here.stop()


# Runs and the throttle


def test_a_success_within_the_success_window_still_ends_its_run_and_moves_the_deadline(house):
    here = house(JOB)
    here.ping("job")
    after(here, MINUTE, "start")
    after(here, MINUTE)
    assert durations(here) == [("success", None)], "the second one is throttled"
    assert lasted(here) == MINUTE
    assert not is_running(here)
    here.watch(30 * MINUTE, step=MINUTE)
    assert events(here) == []
    assert here.monitor("job")["deadline_at"] == START + 72 * MINUTE


def test_a_start_soon_after_an_ended_run_is_watched_for_overrunning(house):
    """As when a job is tried by hand before it is due, or again after it failed."""
    here = house(JOB)
    here.ping("job", "start")
    after(here, MINUTE)
    after(here, MINUTE, "start")
    here.watch(21 * MINUTE, step=MINUTE)
    assert events(here) == [("down", "overran", 22)]


@pytest.mark.parametrize("how", ["paused", "disabled"])
def test_a_failure_soon_after_a_pause_that_ended_a_down_brings_it_down(house, how):
    here = house(JOB)
    here.ping("job", "fail")
    if how == "paused":
        pause_and_resume(here, lambda: here.watch(MINUTE))
    else:
        here.save(JOB + "enabled = false\n")
        here.watch(MINUTE)
        here.save(JOB)
    assert here.state("job") == "up"
    after(here, MINUTE, "fail")
    assert here.state("job") == "down"


def test_the_success_of_a_late_run_brings_it_up_whatever_the_window(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    after(here, 19 * MINUTE, rid="b")
    here.watch(2 * MINUTE, step=MINUTE)
    assert here.state("job") == "down"
    here.ping("job", rid="a")
    assert here.state("job") == "up"
    assert not is_running(here)


def test_runs_of_a_job_that_comes_every_second_are_paired(house):
    here = house('[monitors.job]\ninterval = 1\ngrace = 2\nmax_runtime = 5\n')
    for _ in range(60):
        here.ping("job", "start")
        here.clock.advance(300)
        here.tick()
        here.ping("job", "0")
        assert lasted(here) == 300
        here.clock.advance(700)
        here.tick()
    assert events(here) == []
    assert not is_running(here)


def test_starts_without_an_end_at_any_speed_are_bounded_in_rows(house):
    here = house(JOB.replace('max_runtime = "20m"\n', ""))
    here.ping("job")
    for number in range(3_000):
        here.clock.advance(WINDOW // 60)
        here.ping("job", "start", rid=f"r-{number}" if number % 2 else None)
        if number % 10 == 0:
            here.tick()
    here.watch(10 * SECOND)
    assert len(here.heartbeats("job")) < 500
    assert rows(here) < 600
    assert is_running(here)


def test_starts_and_ends_at_any_speed_are_bounded_in_rows_and_alerts(house, webhook):
    here = house(f'[channels]\nhook = "{webhook.url}"\n' + JOB)
    for number in range(2_000):
        here.ping("job", ("start", "fail", "start", "")[number % 4], rid=str(number % 8 // 2))
        here.clock.advance(100)
        if number % 10 == 0:
            here.tick()
    here.deliver()
    windows = 1 + 2_000 * 100 // WINDOW
    assert len(here.heartbeats("job")) <= 30 + 3 * windows
    assert rows(here) < 200 + 3 * 1_000, "each change of state is an event"
    assert len(webhook.alerts) <= 7


# Overrunning


@pytest.mark.parametrize("state", ["pending", "up"])
def test_a_run_that_does_not_end_is_down_from_its_start_plus_max_runtime(house, state):
    here = house(JOB)
    for action in PATHS[state]:
        here.ping("job", action)
    after(here, 7 * MINUTE, "start")
    here.watch(20 * MINUTE, step=MINUTE)
    assert events(here) == []
    here.clock.advance(1)
    here.tick()
    assert here.changes() == [("down", "overran", 27 * MINUTE)]


def test_a_run_that_overran_is_noticed_once_and_a_later_success_brings_it_up(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    here.watch(2 * HOUR, step=MINUTE)
    here.restart(MINUTE)
    after(here, MINUTE, rid="a")
    assert events(here) == [("down", "overran", 20), ("up", None, 122)]
    assert durations(here) == [("success", 122)]
    here.watch(30 * MINUTE, step=MINUTE)
    assert len(events(here)) == 2


def test_without_max_runtime_no_run_overruns(house):
    here = house('[monitors.job]\ninterval = "1h"\n')
    here.ping("job", "start")
    here.watch(3 * DAY, step=HOUR)
    assert events(here) == []


def test_each_of_two_runs_may_overrun(house):
    here = house(JOB)
    here.ping("job", "start", rid="a")
    after(here, 10 * MINUTE, "start", rid="b")
    after(here, 11 * MINUTE, rid="another")
    here.watch(10 * MINUTE, step=MINUTE)
    assert events(here) == [("down", "overran", 20), ("up", None, 21), ("down", "overran", 30)]


def test_a_start_counts_as_no_success_and_moves_no_deadline(house):
    here = house(JOB)
    here.ping("job")
    before = here.monitor("job")
    after(here, 65 * MINUTE, "start")
    assert here.state("job") == "late"
    for name in ("last_heartbeat_at", "expected_at", "deadline_at"):
        assert here.monitor("job")[name] == before[name]
    here.watch(6 * MINUTE, step=MINUTE)
    assert events(here) == [("down", "missed", 70)]


def test_of_a_run_and_a_deadline_that_pass_within_one_tick_the_first_is_the_event(house):
    here = house(JOB.replace("20m", "69m59s"))
    here.ping("job")
    here.ping("job", "start")
    here.watch(70 * MINUTE - 1_500, step=MINUTE)
    here.clock.advance(1_900)
    here.tick()
    assert here.changes() == [("down", "overran", 70 * MINUTE - SECOND)]


@pytest.mark.parametrize("how", ["stop", "crash", "stopped", "clock forward", "clock back"])
def test_a_run_keeps_the_time_that_it_had_left(house, how):
    here = house(JOB)
    here.ping("job", "start")
    here.watch(15 * MINUTE, step=MINUTE)
    if how in ("stop", "crash"):
        here.restart(3 * HOUR, crash=how == "crash")
    elif how == "stopped":
        here.sleep_through(3 * HOUR)
    else:
        here.clock.set_wall(3 * HOUR if how == "clock forward" else -3 * HOUR)
    here.tick()
    back = here.clock.now() - START
    here.watch(5 * MINUTE)
    assert events(here) == []
    here.watch(SECOND)
    assert here.changes() == [("down", "overran", back + 5 * MINUTE)]


def test_a_run_that_started_within_a_gap_loses_only_the_rest_of_it(house):
    """As pings that were taken by a process whose watcher hung."""
    here = house(JOB)
    here.tick()
    here.clock.advance(2 * MINUTE)
    here.ping("job", "start")
    here.sleep_through(2 * MINUTE)
    here.watch(20 * MINUTE)
    assert events(here) == []
    here.watch(SECOND)
    assert events(here) == [("down", "overran", 24)]


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_was_under_way_while_paused_does_not_overrun(house, before):
    here = house(JOB)
    here.ping("job")
    if before:
        after(here, 10 * MINUTE, "start")
        pause_and_resume(here, lambda: here.watch(5 * MINUTE, step=MINUTE))
    else:
        pause_and_resume(here, lambda: after(here, 10 * MINUTE, "start"))
    here.watch(40 * MINUTE, step=MINUTE)
    assert events(here) == []
    here.ping("job")
    assert not is_running(here)
    assert lasted(here) == (45 if before else 40) * MINUTE


def test_a_run_that_ended_while_paused_is_ended(house):
    here = house(JOB)
    here.ping("job", "start")
    pause_and_resume(here, lambda: after(here, MINUTE))
    assert not is_running(here)


def test_a_paused_monitor_does_not_overrun(house):
    here = house(JOB)
    here.ping("job", "start")
    pause_and_resume(here, lambda: here.watch(2 * HOUR, step=MINUTE))
    assert events(here) == []


@pytest.mark.parametrize("restarted", [False, True])
def test_a_run_of_a_removed_monitor_keeps_the_time_that_it_had_left(house, restarted):
    here = house(JOB + OTHER)
    here.ping("job", "start")
    here.watch(15 * MINUTE, step=MINUTE)
    here.save(OTHER)
    if restarted:
        here.restart(HOUR)
    else:
        here.watch(HOUR, step=MINUTE)
    here.save(JOB + OTHER)
    here.watch(5 * MINUTE, step=MINUTE)
    assert events(here) == []
    here.watch(2 * SECOND)
    assert events(here) == [("down", "overran", 80)]


def test_a_changed_max_runtime_counts_from_the_start_of_the_run_under_way(house):
    here = house(JOB)
    here.ping("job", "start")
    here.watch(15 * MINUTE, step=MINUTE)
    here.save(JOB.replace("20m", "40m"))
    here.watch(25 * MINUTE, step=MINUTE)
    assert events(here) == []
    here.watch(MINUTE)
    assert events(here) == [("down", "overran", 40)]


@pytest.mark.parametrize("is_put_back", [False, True])
def test_a_max_runtime_that_is_taken_out_limits_no_run_until_it_is_put_back(house, is_put_back):
    here = house(JOB)
    here.ping("job", "start")
    here.watch(15 * MINUTE, step=MINUTE)
    here.save(JOB.replace('max_runtime = "20m"\n', ""))
    here.watch(25 * MINUTE, step=MINUTE)
    assert events(here) == []
    if is_put_back:
        here.save(JOB.replace('"20m"', '"45m"'))
        here.watch(6 * MINUTE, step=MINUTE)
        assert events(here) == [("down", "overran", 45)]


# What alerts say


def alerts(house: House, webhook: Webhook) -> list[dict[str, str]]:
    """What has reached the channel by now."""
    house.live(4 * SECOND)
    return webhook.alerts


def nightly(house: Callable[..., House], webhook: Webhook, more: str = "") -> House:
    """A monitor with a schedule, at 03:00 of the night after its first success."""
    here = house(NIGHTLY.format(webhook.url) + more)
    here.ping("job", "start", rid="first")
    here.ping("job", rid="first")
    here.live(19 * HOUR, step=10 * MINUTE)
    return here


def test_an_alert_says_that_a_job_did_not_start(house, webhook):
    here = nightly(house, webhook)
    here.live(HOUR, step=10 * MINUTE)
    [alert] = alerts(here, webhook)
    assert "no heartbeat by 2027-01-16 04:00:00+00:00" in alert["message"]
    assert "It did not start." in alert["message"]


def test_an_alert_says_that_a_job_runs_too_long(house, webhook):
    here = nightly(house, webhook)
    here.ping("job", "start", rid="night")
    here.live(HOUR, step=10 * MINUTE)
    [alert] = alerts(here, webhook)
    assert "It started 2027-01-16 03:00:00+00:00 and has not ended yet." in alert["message"]
    assert "did not start" not in alert["message"]


def test_a_job_that_never_sends_starts_is_not_said_not_to_have_started(house, webhook):
    here = house(NIGHTLY.format(webhook.url))
    here.ping("job")
    here.live(20 * HOUR, step=10 * MINUTE)
    [alert] = alerts(here, webhook)
    assert "start" not in alert["message"].lower()


def test_the_alert_does_not_say_did_not_start_of_a_job_that_said_it_started(house, webhook):
    """Tried by hand at 01:30, and started by cron at 03:00."""
    here = nightly(house, webhook)
    after(here, 22 * HOUR + 30 * MINUTE, "start")
    after(here, MINUTE)
    after(here, 89 * MINUTE, "start")
    here.live(HOUR, step=10 * MINUTE)
    message = alerts(here, webhook)[-1]["message"]
    assert "no heartbeat by 2027-01-17 04:00" in message
    assert "It started 2027-01-17 03:00:00+00:00 and has not ended yet." in message


def test_a_killed_run_of_an_earlier_night_is_not_taken_for_this_nights(house, webhook):
    here = nightly(house, webhook)
    here.ping("job", "start", rid="killed")
    after(here, 10 * MINUTE, rid="by hand")
    after(here, 23 * HOUR + 50 * MINUTE, "start", rid="second")
    after(here, 10 * MINUTE, rid="second")
    here.live(25 * HOUR, step=10 * MINUTE)
    [alert] = alerts(here, webhook)
    assert "no heartbeat by 2027-01-18 04:00" in alert["message"]
    assert "It did not start." in alert["message"]


def test_a_failure_while_down_alerts_nobody_again_and_the_reminder_shows_it(house, webhook):
    here = nightly(house, webhook, 'remind = "6h"\n')
    here.live(2 * HOUR, step=10 * MINUTE)
    after(here, MINUTE, "7", body="the newest output")
    [first] = alerts(here, webhook)
    assert first["title"] == "DOWN: job"
    here.live(6 * HOUR, step=10 * MINUTE)
    reminder = alerts(here, webhook)[-1]
    assert len(webhook.alerts) == 2
    assert reminder["title"] == "STILL DOWN: job"
    assert "exit status 7" in reminder["message"]
    assert "the newest output" in reminder["message"]
    assert len(here.events()) == 1


# What is kept


def test_the_last_100_heartbeats_keep_their_bodies_and_so_do_those_of_events(house):
    here = house(JOB)
    here.ping("job", "1", body="failed")
    for number in range(250):
        after(here, WINDOW, ("", "log", "start", "")[number % 4], body=f"body {number}")
    here.watch(10 * SECOND)
    bodies = [one["body"] for one in here.heartbeats("job") if one["body"]]
    assert bodies[0] == "failed"
    assert 100 <= len(bodies) <= 150
    assert bodies[-100:] == [f"body {number}" for number in range(150, 250)]


def test_a_failure_keeps_its_body_for_as_long_as_its_event(house):
    here = house('keep = "2d"\n' + JOB)
    here.ping("job", "1", body="failed")
    after(here, MINUTE)
    for _ in range(2):
        here.watch(DAY - MINUTE, step=HOUR)
        here.ping("job")
    assert here.heartbeats("job")[0]["body"] == "failed"
    here.watch(3 * HOUR, step=MINUTE)
    assert "failed" not in [one["body"] for one in here.heartbeats("job")]
    assert START not in [one["at"] for one in here.events()]


def test_a_monitor_that_is_down_keeps_its_newest_failure(house):
    here = house('keep = "2d"\n' + JOB)
    here.ping("job", "1", body="first")
    after(here, WINDOW, "2", body="newest")
    here.watch(10 * DAY, step=HOUR)
    assert [one["body"] for one in here.heartbeats("job")] == ["newest"]
    assert [one["type"] for one in here.events()] == ["down"]


# Rhythm


def beat(here: House, apart: int, count: int, lasts: int = 0) -> str:
    """Let a job come so often; what its page then says."""
    for _ in range(count):
        if lasts:
            here.ping("job", "start")
        after(here, lasts)
        here.watch(apart - lasts, step=HOUR)
    return here.ask("/monitor/job").body.decode()


@pytest.mark.parametrize(("setting", "apart", "advised"), [
    ('interval = "1d"\ngrace = "5m"\n', DAY + 20 * MINUTE, 'grace = "30m"'),
    ('interval = "1d"\n', 3 * HOUR, 'interval = "3h"'),
    ('interval = "1h"\n', DAY, 'interval = "1d"'),
    ('interval = "1d"\n', DAY, None),
])  # fmt: skip
def test_settings_that_do_not_fit_get_a_line_of_advice_after_three_intervals(
    house, setting, apart, advised
):
    here = house('timezone = "UTC"\n[monitors.job]\n' + setting)
    assert re.search("try (grace|interval) = ", beat(here, apart, 3)) is None
    found = re.search("try ((grace|interval) = \"[^\"]*\")", html.unescape(beat(here, apart, 4)))
    assert (found and found[1]) == advised


def test_a_job_in_another_timezone_gets_the_advice_to_look_at_it(house):
    here = house('timezone = "UTC"\n[monitors.job]\nschedule = "0 3 * * *"\n')
    assert "exactly 5 h after the schedule: timezone?" in beat(here, DAY, 7)


def test_status_shows_the_rhythm_of_the_monitors_that_are_named(tmp_path):
    # The command reads the real clock: the heartbeats are of the last days before it.
    clock = FakeClock(larm.Clock().now() - 6 * DAY)
    here = House(tmp_path, '[monitors.job]\ninterval = "1d"\ngrace = "1m"\n', clock)
    for _ in range(6):
        here.ping("job", "start")
        after(here, 4 * MINUTE)
        here.watch(DAY, step=HOUR)
    here.stop()
    named = run_larm(tmp_path, "status", "job").stdout
    assert "every 1 d typically" in named
    assert "4 min typically" in named
    assert 'try grace = "5m"' in named
    assert "typically" not in run_larm(tmp_path, "status").stdout


# Unmodified clients


def test_runitors_requests_pair_and_tell_it_the_body_limit(server):
    """As its source has them: POST, text/plain, the start without a body, the exit code."""
    token, rid = next(server.tokens), "0f2a1b52-8e3e-4b0a-9d7e-7a4c5d1e2f30"
    headers = {"Content-Type": "text/plain", "User-Agent": "runitor/v1.4.1"}
    base = f"/larm/ping/{token}"
    start = server.get(f"{base}/start?rid={rid}", "POST", b"", headers)
    assert start.headers["Ping-Body-Limit"] == "10000"
    server.get(f"{base}/3?rid={rid}", "POST", b"[runitor] output", headers)
    found = stored(server, token)
    assert as_stored(found) == [("start", None, None), ("fail", 3, "[runitor] output")]
    assert [one["rid"] for one in found] == [rid, rid]
    assert found[1]["duration_ms"] is not None


def test_the_python_client_healthchecks_io_pings(server):
    client = pytest.importorskip("healthchecks_io", reason="healthchecks-io is not installed here")
    token = next(server.tokens)
    with client.Client(api_key="none", ping_url=f"{server.url}/larm/ping/") as pings:
        assert pings.start_ping(uuid=token, data="begins")[0]
        assert pings.success_ping(uuid=token, data="went well")[0]
        assert pings.fail_ping(uuid=token, data="did not")[0]
        assert pings.exit_code_ping(0, uuid=token, data="now it did")[0]
    found = stored(server, token)
    assert as_stored(found) == [
        ("start", None, "begins"), ("success", None, "went well"), ("fail", None, "did not"),
        ("success", 0, "now it did"),
    ]  # fmt: skip
    assert [one["duration_ms"] is not None for one in found] == [False, True, False, False]


def test_the_python_client_healthchecks_decorator_pings(server):
    client = pytest.importorskip(
        "healthchecks_decorator", reason="healthchecks-decorator is not installed here"
    )
    token = next(server.tokens)

    @client.healthcheck(url=f"{server.url}/larm/ping/{token}", send_start=True)
    def job(fails: bool) -> None:
        if fails:
            raise ConnectionError

    job(False)
    with pytest.raises(ConnectionError):
        job(True)
    signals = [one["signal"] for one in stored(server, token)]
    assert (signals[:2], signals[-1]) == (["start", "success"], "fail")
