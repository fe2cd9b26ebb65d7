"""Larm's own health: each trouble is told once, and so is its end; and another Larm's watchdog."""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import START, TOKEN, FakeClock, House, Process, launch, wait_until, write_config

import larm as program

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
JOB = f'[monitors.job]\ninterval = "366d"\ntoken = "{TOKEN}"\n'


def channels(**urls: str) -> str:
    return "[channels]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())


def watch(larm: House, ms: int, step: int = MINUTE) -> None:
    """Let time pass, with a tick and what is due for the channels after each step."""
    end = larm.clock.monotonic() + ms
    while larm.clock.monotonic() < end:
        larm.clock.advance(min(step, end - larm.clock.monotonic()))
        larm.tick()
        for channel in larm.config.channels:
            while larm.notifier.attempt(channel):
                pass


@pytest.fixture
def larm(house, webhook) -> House:
    return house(channels(phone=webhook.url) + JOB)


# Gaps


@pytest.mark.parametrize("crash", [False, True])
def test_a_gap_longer_than_an_hour_is_told_once_with_its_span(larm, webhook, crash):
    watch(larm, 2 * MINUTE)
    larm.restart(3 * HOUR, crash=crash)
    watch(larm, 5 * MINUTE)
    larm.restart(MINUTE, crash=crash)
    watch(larm, 5 * MINUTE)
    [alert] = webhook.alerts
    assert alert["title"].startswith("LARM: Larm itself was not running from 2027-01-15 08:0")
    assert re.search(r"to 2027-01-15 11:0\d:00\+00:00", alert["message"])


def test_a_gap_is_told_once_even_if_larm_is_killed_before_and_after_it_is_queued(larm, webhook):
    watch(larm, 2 * MINUTE)
    larm.restart(3 * HOUR, crash=True)
    larm.restart(SECOND, crash=True)  # before the first look at its own health
    larm.tick()
    larm.restart(SECOND, crash=True)  # after it, yet before anything was sent
    watch(larm, 5 * MINUTE)
    assert len(webhook.alerts) == 1


def test_a_gap_of_less_than_an_hour_is_not_told(larm, webhook):
    watch(larm, 2 * MINUTE)
    larm.restart(55 * MINUTE)
    watch(larm, 5 * MINUTE)
    assert webhook.alerts == []


def test_the_first_start_ever_is_no_gap(larm, webhook):
    watch(larm, 5 * MINUTE)
    assert webhook.alerts == []


def test_two_gaps_are_told_one_by_one(larm, webhook):
    for _ in range(2):
        watch(larm, 2 * MINUTE)
        larm.restart(3 * HOUR)
    watch(larm, 2 * MINUTE)
    assert len(webhook.alerts) == 2


def test_a_gap_is_told_to_every_channel_though_no_monitor_uses_it(house, webhooks):
    one, two = webhooks(), webhooks()
    larm = house(channels(one=one.url, two=two.url) + JOB + "notify = []\n")
    watch(larm, 2 * MINUTE)
    larm.restart(3 * HOUR)
    watch(larm, 2 * MINUTE)
    assert len(one.alerts) == len(two.alerts) == 1


# The disk


def test_a_disk_that_is_nearly_full_is_told_once_and_so_is_its_end(
    larm, webhook, monkeypatch
):
    free = program.LITTLE_SPACE - 1
    monkeypatch.setattr(program, "free_space", lambda _: free)
    watch(larm, 2 * HOUR)
    [alert] = webhook.alerts
    assert alert["title"] == "LARM: the disk is nearly full"
    assert alert["type"] == "warning"
    larm.restart(MINUTE)
    watch(larm, HOUR)
    assert len(webhook.alerts) == 1
    free = 10 * program.LITTLE_SPACE
    watch(larm, 2 * HOUR)
    assert webhook.titles()[1:] == ["LARM: the disk has room again"]
    assert webhook.alerts[1]["type"] == "success"


def test_a_disk_about_the_limit_is_told_once(larm, webhook, monkeypatch):
    amounts = iter([program.LITTLE_SPACE - 1, program.LITTLE_SPACE + 1] * 1_000)
    monkeypatch.setattr(program, "free_space", lambda _: next(amounts))
    watch(larm, HOUR)
    assert webhook.titles() == ["LARM: the disk is nearly full"]


def test_free_space_is_that_of_the_database_s_disk(tmp_path):
    assert program.free_space(tmp_path) > 0


# Channels


@pytest.fixture
def two(house, webhooks):
    """A Larm with a good and a bad channel, and both of them."""
    good, bad = webhooks(), webhooks()
    bad.answer = 500
    larm = house(channels(good=good.url, bad=bad.url) + JOB)
    larm.ping("job", "fail")
    return larm, good, bad


def test_a_channel_that_has_failed_for_an_hour_is_told_once_through_the_others(two):
    larm, good, bad = two
    watch(larm, 50 * MINUTE)
    assert good.titles() == ["DOWN: job"]
    watch(larm, 10 * HOUR)
    larm.restart(MINUTE)
    watch(larm, 3 * HOUR)
    assert good.titles()[1:] == ["LARM: channel bad has taken no alert for an hour"]
    assert bad.alerts == []


def test_a_channel_that_works_again_is_told_through_the_others(two):
    larm, good, bad = two
    watch(larm, 3 * HOUR)
    bad.answer = 200
    watch(larm, 3 * HOUR)
    assert good.titles()[2:] == ["LARM: channel bad works again"]
    assert bad.titles() == ["DOWN: job"]


def test_a_channel_that_failed_for_less_than_an_hour_is_not_told(two):
    larm, good, bad = two
    watch(larm, 30 * MINUTE)
    bad.answer = 200
    watch(larm, 5 * HOUR)
    assert good.titles() == bad.titles() == ["DOWN: job"]


def test_a_channel_in_trouble_that_is_removed_from_the_file_is_no_longer_in_trouble(two):
    larm, good, _ = two
    watch(larm, 3 * HOUR)
    larm.reload(channels(good=good.url) + JOB)
    watch(larm, 3 * HOUR)
    assert len(good.titles()) == 3
    assert good.alerts[-1]["type"] == "success"
    assert [row["type"] for row in larm.rows("SELECT type FROM events WHERE topic LIKE 'channel%'")
            ] == ["down", "up"]


# A saved file


def test_mistakes_in_a_saved_file_are_told_once_each_content_and_so_is_their_end(larm, webhook):
    for mistakes in (["a: wrong"], ["a: wrong"], ["b: wrong"], ["a: wrong"], [], []):
        larm.health.note_file(mistakes)
        watch(larm, MINUTE)
    assert len(webhook.alerts) == 3
    assert "a: wrong" in webhook.alerts[0]["message"]
    assert "b: wrong" in webhook.alerts[1]["message"]
    assert "is in force again" in webhook.alerts[2]["message"]
    assert [alert["type"] for alert in webhook.alerts] == ["warning", "warning", "success"]


def test_the_same_mistake_after_its_end_is_told_anew(larm, webhook):
    for mistakes in (["a: wrong"], [], ["a: wrong"]):
        larm.health.note_file(mistakes)
        watch(larm, MINUTE)
    assert len(webhook.alerts) == 3


@pytest.fixture
def processes(tmp_path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def run(text: str, code: str = "larm.main(['serve'])", port: int = 0) -> Process:
        started.append(launch(tmp_path, text, port, code=f"import larm\n{code}"))
        return started[-1]

    yield run
    for process in started:
        process.kill()


FAST = "larm.DIGEST_WITHIN = 50; larm.LOOK = 0.05\n"
SERVE = FAST + "larm.main(['serve'])"


def save(larm: Process, text: str) -> None:
    write_config(larm.folder, f'listen = "127.0.0.1:{larm.port}"\n{text}')


def test_a_file_that_was_corrected_while_larm_was_stopped_is_told_to_be_in_force_again(
    processes, webhook
):
    text = channels(phone=webhook.url) + JOB
    larm = processes(text, SERVE)
    save(larm, text + 'intervall = "1h"\n')
    wait_until(lambda: webhook.alerts)
    assert "intervall" in webhook.alerts[0]["message"]
    assert "/hook" not in webhook.alerts[0]["message"]
    assert larm.stop() == 0
    larm = processes(text, SERVE, larm.port)
    wait_until(lambda: len(webhook.alerts) == 2)
    assert "is in force again" in webhook.alerts[1]["message"]


# The database


def test_what_can_t_be_recorded_for_less_than_10_s_is_not_told(larm, webhook):
    for _ in range(9):
        assert larm.health.note_recording("disk full") is None
        larm.clock.advance(SECOND)
    larm.health.note_recording(None)
    watch(larm, HOUR)
    assert webhook.alerts == []


def test_what_can_t_be_recorded_for_10_s_is_told_at_once_and_its_end_afterwards(larm, webhook):
    assert larm.health.note_recording("disk full") is None
    larm.clock.advance(10 * SECOND)
    assert "disk full" in larm.health.note_recording("disk full")
    larm.health.note_recording(None)
    watch(larm, HOUR)
    assert webhook.titles() == ["LARM: heartbeats are recorded again"]
    rows = larm.rows("SELECT type, at, down_ms FROM events WHERE topic = 'database' ORDER BY id")
    assert [(row["type"], row["at"] - START) for row in rows] == [("down", 0), ("up", 10 * SECOND)]
    assert rows[1]["down_ms"] == 10 * SECOND


def test_a_disk_that_is_full_again_at_once_keeps_the_news_for_later(larm, webhook):
    larm.health.note_recording("disk full")
    larm.clock.advance(10 * SECOND)
    larm.health.note_recording("disk full")
    larm.store.failure = "disk full"
    with pytest.raises(program.Unrecordable):
        larm.health.note_recording(None)
    larm.health.note_recording("disk full")
    larm.store.failure = None
    larm.clock.advance(2 * SECOND)
    larm.health.note_recording(None)
    watch(larm, HOUR)
    assert webhook.titles() == ["LARM: heartbeats are recorded again"]


FULL_DISK = """
import pathlib, sqlite3
transact = larm.Store._transact
def fails(self, writes):
    if pathlib.Path("full").exists():
        raise sqlite3.OperationalError("database or disk is full")
    transact(self, writes)
larm.Store._transact = fails
note_recording = larm.Health.note_recording
def counted(self, failure):
    with open("looks", "a") as file:
        file.write("x")
    return note_recording(self, failure)
larm.Health.note_recording = counted
larm.UNRECORDED_FOR = 300
larm.TICK = 50
"""


def test_while_the_disk_is_full_each_channel_is_told_once_and_of_the_end_once(
    processes, webhooks
):
    one, two = webhooks(), webhooks()
    larm = processes(channels(one=one.url, two=two.url) + JOB, FULL_DISK + SERVE)
    (larm.folder / "full").touch()
    assert larm.ping().status == 503
    wait_until(lambda: one.alerts and two.alerts)
    assert larm.get("/health").status == 503
    logged = larm.log.count("\n")
    looks = larm.folder / "looks"
    looked = looks.stat().st_size
    wait_until(lambda: looks.stat().st_size > looked + 20)
    assert one.titles() == two.titles() == ["LARM: heartbeats can't be recorded"]
    assert "disk is full" in one.alerts[0]["message"]
    assert larm.log.count("\n") == logged
    (larm.folder / "full").unlink()
    wait_until(lambda: len(one.alerts) == len(two.alerts) == 2)
    assert one.titles()[1] == two.titles()[1] == "LARM: heartbeats are recorded again"
    assert larm.ping().status == 200


# Several at once


def test_several_troubles_of_larm_are_one_message_that_does_not_call_them_monitors(
    larm, webhook, monkeypatch
):
    monkeypatch.setattr(program, "free_space", lambda _: 1)
    larm.clock.advance(MINUTE)
    larm.tick()
    larm.health.note_file(["a: wrong"])
    watch(larm, 10 * SECOND, step=SECOND)
    [alert] = webhook.alerts
    assert "the disk is nearly full" in alert["message"]
    assert "a: wrong" in alert["message"]
    assert alert["title"].startswith("LARM: ")
    assert "monitor" not in alert["title"]


# The watchdog


class Seconds:
    """Stands for Larm's stop event: each wait does the next thing, and at the end says stop."""

    def __init__(self, *things: Callable[[], None]) -> None:
        self.things = iter(things)

    def wait(self, _: float) -> bool:
        thing = next(self.things, None)
        if thing is not None:
            thing()
        return thing is None

    def is_set(self) -> bool:
        return False


def nothing() -> None:
    pass


@pytest.fixture
def fed(tmp_path, monkeypatch) -> Iterator[program.Larm]:
    """A Larm with a watchdog every 3 s; its pings are in `pinged`, and fail with `error`."""
    text = JOB + '[watchdog]\nping = "http://other.invalid/api/heartbeat/a-secret"\ninterval = 3\n'
    config = program.load(write_config(tmp_path, text), {})
    larm = program.Larm(config, FakeClock())
    larm.begin()
    larm.pinged, larm.error = [], None

    def fetch(url: str) -> str | None:
        larm.pinged.append(url)
        return larm.error

    monkeypatch.setattr(program, "fetch", fetch)
    yield larm
    larm.store.close()


def feed(larm: program.Larm, *things: Callable[[], None]) -> int:
    """How many pings the watchdog gets while these happen, one a second."""
    larm._stopping = Seconds(*things)
    before = len(larm.pinged)
    larm._feed()
    return len(larm.pinged) - before


def test_the_watchdog_is_pinged_every_interval(fed):
    assert feed(fed, *[nothing] * 9) == 3
    assert set(fed.pinged) == {"http://other.invalid/api/heartbeat/a-secret"}


def test_the_watchdog_is_not_pinged_while_nothing_can_be_recorded(fed):
    fed.store.failure = "disk full"
    assert feed(fed, *[nothing] * 9) == 0
    fed.store.failure = None
    assert feed(fed, *[nothing] * 3) == 1


def test_the_watchdog_is_not_pinged_while_the_watcher_does_not_tick(fed):
    fed.clock.advance(11 * SECOND)
    assert feed(fed, *[nothing] * 9) == 0
    fed.watcher.tick(11 * SECOND)
    assert feed(fed, *[nothing] * 3) == 1


@pytest.mark.parametrize(
    ("due_ago", "tried_ago", "pings"),
    [(0, None, 1), (4 * MINUTE, None, 1), (6 * MINUTE, None, 0), (0, 50 * MINUTE, 1),
     (-HOUR, 61 * MINUTE, 0)],
)
def test_the_watchdog_is_not_pinged_while_a_delivery_is_stuck(fed, due_ago, tried_ago, pings):
    now = fed.clock.now()

    def put(db: sqlite3.Connection) -> None:
        program.report(db, "disk", "down", "text", ["phone"], now)
        db.execute("UPDATE deliveries SET due_at = ?, first_tried_at = ?",
                   (now - due_ago, tried_ago and now - tried_ago))

    fed.store.write(put)
    assert feed(fed, *[nothing] * 3) == pings
    fed.store.write(lambda db: db.execute("UPDATE deliveries SET state = 'sent'") and None)
    assert feed(fed, *[nothing] * 3) == 1


def test_a_watchdog_that_is_not_reached_is_logged_once_and_so_is_its_return(fed, caplog):
    def fail() -> None:
        fed.error = "refused"

    def work() -> None:
        fed.error = None

    with caplog.at_level(logging.INFO):
        feed(fed, *[nothing] * 3, fail, *[nothing] * 11, work, *[nothing] * 5)
    told = [record.getMessage() for record in caplog.records if "watchdog" in record.getMessage()]
    assert told == ["the watchdog was not reached: refused", "the watchdog is reached again"]


def test_without_a_watchdog_nothing_is_pinged(tmp_path, fed):
    fed.use(program.load(write_config(tmp_path, JOB), {}))
    assert feed(fed, *[nothing] * 9) == 0


@pytest.fixture
def other() -> Iterator[tuple[int, list[str], list[int]]]:
    """Another watcher: its port, what was asked of it, and the status that it answers."""
    paths: list[str] = []
    answer = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(answer[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_port, paths, answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
def test_only_a_success_counts_as_reached_and_the_reason_shows_no_secret(other, status):
    port, _, answer = other
    url = f"http://127.0.0.1:{port}/api/heartbeat/a-secret"
    assert program.fetch(url) is None
    answer[0] = status
    assert str(status) in program.fetch(url)
    assert "a-secret" not in program.fetch(url)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid", "[::1]:1"])
def test_a_watchdog_that_is_not_there_is_a_reason_that_shows_no_secret(host):
    reason = program.fetch(f"http://{host}/api/heartbeat/a-secret")
    assert reason
    assert "a-secret" not in reason


def test_a_running_larm_pings_its_watchdog(processes, other):
    port, paths, _ = other
    larm = processes(
        JOB + f'[watchdog]\nping = "http://127.0.0.1:{port}/other/a-secret"\ninterval = 1\n'
    )
    wait_until(lambda: len(paths) == 2)
    assert set(paths) == {"/other/a-secret"}
    assert "a-secret" not in larm.log


