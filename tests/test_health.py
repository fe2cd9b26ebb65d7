"""Larm's own troubles: each is told once, and so is its end; and another Larm's watchdog."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import TOKEN, House, Process, wait_until, write_config
from receivers import Phone, channels, live, monitor

from larm import HOUR, MINUTE, SECOND, Unrecordable

JOB = monitor("job", "366d", "1h", token=TOKEN)


@pytest.fixture
def phone() -> Phone:
    return Phone()


@pytest.fixture
def larm(house, phone) -> House:
    return house(channels(phone) + JOB)


def go_on(larm: House, ms: int, step: int = MINUTE) -> None:
    live(larm, ms, step)


# Gaps


@pytest.mark.parametrize("crash", [False, True])
def test_a_gap_longer_than_an_hour_is_told_once_with_its_span(house, phone, crash):
    """Through every channel, though no monitor uses it; however often Larm is killed meanwhile."""
    mail = Phone("mail")
    larm = house('timezone = "UTC"\n' + channels(phone, mail) + JOB + "notify = []\n")
    go_on(larm, 2 * MINUTE)
    larm.restart(3 * HOUR, crash=crash)
    larm.restart(SECOND, crash=True)  # before it was told
    larm.deliver()
    larm.restart(SECOND, crash=True)
    go_on(larm, 5 * MINUTE)
    larm.restart(MINUTE, crash=crash)
    go_on(larm, 5 * MINUTE)
    for one in (phone, mail):
        [message] = one.messages
        assert message.title.startswith("LARM: Larm itself was not running from 2027-01-15 08:0")
        assert re.search(r"to 2027-01-15 11:0\d:\d\d\+00:00", message.body)


def test_two_gaps_are_told_one_by_one(larm, phone):
    go_on(larm, 2 * MINUTE)
    larm.restart(3 * HOUR)
    go_on(larm, 2 * MINUTE)
    larm.sleep_through(3 * HOUR)
    larm.larm.notifier.wait(10)
    go_on(larm, 2 * MINUTE)
    assert len(phone.messages) == 2


@pytest.mark.parametrize("by", [0, 55 * MINUTE])
def test_neither_the_first_start_nor_a_gap_of_less_than_an_hour_is_told(larm, phone, by):
    go_on(larm, 2 * MINUTE)
    larm.restart(by)
    go_on(larm, 5 * MINUTE)
    assert phone.messages == []


@pytest.mark.parametrize("by", [-3 * HOUR, 3 * HOUR])
def test_of_a_clock_that_was_set_nobody_is_told_that_larm_was_not_running(larm, phone, by):
    go_on(larm, 2 * MINUTE)
    larm.clock.set_wall(by)
    go_on(larm, 5 * MINUTE)
    assert "not running" not in "".join(phone.titles() + phone.bodies())


# The disk


@pytest.fixture
def disk(monkeypatch) -> SimpleNamespace:
    """`free`: bytes that the operating system says are free."""
    disk, statvfs = SimpleNamespace(free=10**11), os.statvfs

    def stat(path: str) -> os.statvfs_result:
        real = list(statvfs(path))
        real[0] = real[1] = 1  # the sizes of a block
        real[2], real[3], real[4] = 10**12, disk.free, disk.free
        return os.statvfs_result(real)

    monkeypatch.setattr(os, "statvfs", stat)
    return disk


def test_a_disk_that_is_nearly_full_is_told_once_and_so_is_its_end(disk, larm, phone):
    go_on(larm, 2 * MINUTE)
    assert phone.messages == []
    disk.free = 1_000_000
    go_on(larm, 2 * HOUR)
    larm.restart(MINUTE)
    go_on(larm, HOUR)
    [message] = phone.messages
    assert (message.title, message.type) == ("LARM: the disk is nearly full", "warning")
    disk.free = 10**11
    go_on(larm, 2 * HOUR)
    assert phone.titles()[1:] == ["LARM: the disk has room again"]
    assert phone.messages[1].type == "success"


def test_a_disk_about_the_limit_of_50_mb_is_told_once(disk, larm, phone):
    for number in range(60):
        disk.free = 50_000_000 + (-1) ** number
        go_on(larm, 2 * MINUTE)
    assert phone.titles() == ["LARM: the disk is nearly full"]


# Channels


@pytest.fixture
def two(house, phone) -> tuple[House, Phone, Phone]:
    """A Larm with a good and a bad channel, and both of them."""
    bad = Phone("bad", answer=False)
    larm = house(channels(phone, bad) + JOB)
    larm.ping("job", "fail")
    return larm, phone, bad


def test_a_channel_that_takes_nothing_for_an_hour_is_told_once_through_the_others(two):
    larm, good, bad = two
    go_on(larm, 50 * MINUTE)
    assert good.titles() == ["DOWN: job"]
    go_on(larm, 10 * HOUR)
    larm.restart(MINUTE)
    go_on(larm, 3 * HOUR)
    assert good.titles()[1:] == ["LARM: channel bad has taken no alert for an hour"]
    bad.answer = True
    go_on(larm, 3 * HOUR)
    assert good.titles()[2:] == ["LARM: channel bad works again"]
    assert bad.titles() == ["DOWN: job"]


def test_a_channel_that_failed_for_less_than_an_hour_is_not_told(two):
    larm, good, bad = two
    go_on(larm, 30 * MINUTE)
    bad.answer = True
    go_on(larm, 5 * HOUR)
    assert good.titles() == bad.titles() == ["DOWN: job"]


@pytest.mark.parametrize("by", [-3 * HOUR, 3 * HOUR])
def test_a_clock_that_is_set_makes_no_channel_fail_for_hours(two, by):
    larm, good, _ = two
    go_on(larm, 5 * MINUTE)
    larm.clock.set_wall(by)
    go_on(larm, 40 * MINUTE)
    assert not any("channel bad" in title for title in good.titles())
    go_on(larm, 90 * MINUTE)
    assert [title for title in good.titles() if "channel" in title] == [
        "LARM: channel bad has taken no alert for an hour"
    ]


def test_a_channel_in_trouble_that_is_removed_from_the_file_is_no_longer_in_trouble(two):
    larm, good, _ = two
    go_on(larm, 3 * HOUR)
    larm.save(channels(good) + JOB)
    go_on(larm, 3 * HOUR)
    assert len(good.messages) == 3
    assert good.messages[-1].type == "success"
    assert good.titles()[-1].startswith("LARM: channel bad")


# A saved file


def test_a_mistake_that_stands_for_less_than_a_minute_is_not_told(larm, phone):
    text = larm.text
    larm.save(text + 'intervall = "1h"\n')
    go_on(larm, 50 * SECOND, step=SECOND)
    larm.save(text + 'intervall = "2h"\n')
    go_on(larm, 5 * SECOND, step=SECOND)
    larm.save(text)
    go_on(larm, 5 * MINUTE)
    assert phone.messages == []


def test_mistakes_that_have_stood_for_a_minute_are_told_once_each_and_so_is_their_end(larm, phone):
    text = larm.text
    for wrong in ("intervall = 1", "intervall = 1 # the same", "noote = 1", ""):
        larm.save(f"{text}{wrong}\n")
        go_on(larm, 2 * MINUTE, step=5 * SECOND)
    go_on(larm, HOUR)
    first, second, end = phone.messages
    assert "intervall" in first.body
    assert "noote" in second.body
    assert "is in force again" in end.body
    assert [message.type for message in phone.messages] == ["warning", "warning", "success"]
    assert all(title.startswith("LARM: ") for title in phone.titles())
    larm.save(text + "intervall = 1\n")
    go_on(larm, 2 * MINUTE)
    assert len(phone.messages) == 4  # after its end it is told anew


def test_a_mistake_s_alert_shows_no_secret(larm, phone):
    larm.save(larm.text + '[channels.x]\ny = "json://hunter2@host/hunter2"\n')
    go_on(larm, 2 * MINUTE, step=5 * SECOND)
    larm.save(larm.text.partition("[channels.x]")[0] + 'password = "hunter2\n')
    go_on(larm, 2 * MINUTE, step=5 * SECOND)
    assert phone.messages
    assert "hunter2" not in "".join(phone.titles() + phone.bodies())


def test_a_file_that_was_corrected_while_larm_was_stopped_is_told_to_be_in_force_again(larm, phone):
    text = larm.text
    larm.save(text + "intervall = 1\n")
    go_on(larm, 2 * MINUTE, step=5 * SECOND)
    larm.restart(MINUTE, text=text)
    go_on(larm, 2 * MINUTE)
    assert len(phone.messages) == 2
    assert "is in force again" in phone.bodies()[1]


# The database


def cannot_record(larm: House, seconds: int, phone: Phone) -> list[str]:
    """A tick each second while the disk is full; then it has room, and Larm finds out. Returns what
    the phone was told meanwhile.
    """

    def tick() -> bool:
        with contextlib.suppress(Unrecordable):
            larm.tick()
            return True
        return False

    with larm.full_disk():
        larm.ping("job", "log", status=503)
        for _ in range(seconds):
            larm.clock.advance(SECOND)
            tick()
        time.sleep(0.1)  # for what is told at once
        told = phone.titles()
    wait_until(tick)
    larm.larm.notifier.wait(10)
    return told


def test_what_can_t_be_recorded_for_less_than_10_s_is_not_told(larm, phone):
    go_on(larm, SECOND)
    cannot_record(larm, 8, phone)
    go_on(larm, HOUR)
    assert phone.messages == []


def test_what_can_t_be_recorded_for_10_s_is_told_at_once_and_so_is_its_end(house, phone):
    mail = Phone("mail")
    larm = house(channels(phone, mail) + JOB)
    go_on(larm, SECOND)
    told = cannot_record(larm, 40, phone)
    go_on(larm, HOUR)
    assert told == ["LARM: heartbeats can't be recorded"]
    for one in (phone, mail):
        assert one.titles() == [*told, "LARM: heartbeats are recorded again"]


def test_a_disk_that_is_full_again_at_once_keeps_the_news_for_later(larm, phone):
    go_on(larm, SECOND)
    cannot_record(larm, 12, phone)
    cannot_record(larm, 3, phone)
    go_on(larm, HOUR)
    assert phone.titles() == [
        "LARM: heartbeats can't be recorded", "LARM: heartbeats are recorded again"
    ]


def test_a_full_disk_is_logged_once_and_pings_are_told(larm, phone, caplog):
    go_on(larm, SECOND)
    larm.ping("job")
    caplog.clear()
    cannot_record(larm, 60, phone)
    assert len([record for record in caplog.records if record.name == "larm"]) <= 4
    larm.ping("job", "fail")
    assert larm.state("job") == "down"


# Several at once


def test_several_troubles_of_larm_are_one_message_that_does_not_call_them_monitors(
    disk, larm, phone
):
    go_on(larm, 5 * SECOND)
    larm.save(larm.text + "intervall = 1\n")
    disk.free = 1
    go_on(larm, 58 * SECOND, step=58 * SECOND)
    larm.clock.advance(3 * SECOND)
    larm.tick()
    go_on(larm, 10 * SECOND, step=SECOND)
    told = "\n".join(phone.bodies())
    assert "the disk is nearly full" in told
    assert "intervall" in told
    for title in phone.titles():
        assert title.startswith("LARM: ")
        assert "monitor" not in title


# The watchdog


class Other:
    """Another watcher: what it was asked for, and the status that it answers."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.paths: list[str] = []
        self.answer = 200

    def pings(self, seconds: float) -> int:
        """How many come in the next so many seconds."""
        before = len(self.paths)
        time.sleep(seconds)
        return len(self.paths) - before


@pytest.fixture
def other() -> Iterator[Other]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.paths.append(self.path)
            self.send_response(found.answer)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Other(server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def test_the_watchdog_is_pinged_while_larm_is_well_and_its_failure_is_logged_once(start, other):
    url = f"http://127.0.0.1:{other.port}/other/a-secret"
    larm: Process = start(f'{JOB}[watchdog]\nping = "{url}"\ninterval = "1s"\n')

    def told() -> list[str]:
        return [line for line in larm.log.splitlines() if "the watchdog" in line]

    wait_until(lambda: other.paths)
    assert set(other.paths) == {"/other/a-secret"}
    assert told() == []

    other.answer = 503
    wait_until(told)
    assert other.pings(1.5) >= 1
    assert len(told()) == 1
    assert "503" in told()[0]
    other.answer = 200
    wait_until(lambda: len(told()) == 2)
    assert "reached again" in told()[1]
    assert "a-secret" not in larm.log

    limit = resource.prlimit(larm.popen.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(larm.popen.pid, resource.RLIMIT_FSIZE, (0, limit[1]))  # a full disk
    assert larm.ping(action="/fail").status == 503
    time.sleep(0.2)
    assert other.pings(1.3) == 0
    resource.prlimit(larm.popen.pid, resource.RLIMIT_FSIZE, limit)
    wait_until(lambda: other.pings(0.1))

    write_config(larm.folder, f'listen = "127.0.0.1:{larm.port}"\n{JOB}')
    larm.popen.send_signal(signal.SIGHUP)
    wait_until(lambda: "watchdog changed" in larm.log)
    assert other.pings(1.3) == 0
