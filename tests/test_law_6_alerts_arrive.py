"""Law 6: an alert arrives at least once, and no channel waits for another."""

from __future__ import annotations

import contextlib
import re
import threading
import time

import apprise
import pytest
from conftest import START, House, wait_until
from receivers import Phone, channels, deliveries, live, monitor, ping_all, states

from larm import DAY, HOUR, MINUTE, SECOND, Unrecordable

PAUSES = [10 * SECOND, 30 * SECOND, MINUTE, 5 * MINUTE, 15 * MINUTE, HOUR, HOUR]
DAYLONG = {"interval": "1d", "grace": "1h"}  # nothing of it is due while alerts are tried again


@pytest.fixture
def phone() -> Phone:
    return Phone()


@pytest.fixture
def larm(house, phone) -> House:
    return house(channels(phone) + monitor("job", **DAYLONG))


@pytest.fixture
def refused(larm, phone) -> House:
    """A Larm whose alert was refused once."""
    phone.answer = False
    larm.ping("job", "fail")
    live(larm)
    assert phone.tries == 1
    return larm


# Sent means accepted


def test_an_accepted_alert_is_sent_once_and_stays_so(larm, phone):
    larm.ping("job", "fail")
    live(larm)
    live(larm, 3 * HOUR, step=MINUTE)
    [delivery] = deliveries(larm)
    assert (delivery["state"], delivery["attempts"], delivery["error"]) == ("sent", 1, None)
    assert phone.titles() == ["DOWN: job"]


def test_a_refused_alert_is_pending_with_the_reason_and_arrives_once_it_is_accepted(refused, phone):
    [delivery] = deliveries(refused)
    assert (delivery["state"], delivery["attempts"]) == ("pending", 1)
    assert delivery["error"]
    phone.answer = True
    live(refused, 15 * SECOND)
    [delivery] = deliveries(refused)
    assert (delivery["state"], delivery["attempts"]) == ("sent", 2)
    assert phone.titles() == ["DOWN: job"]


def test_the_pauses_grow_from_10_s_to_an_hour(refused, phone):
    for tried, pause in enumerate(PAUSES, 1):
        live(refused, pause * 95 // 100, step=DAY)
        assert phone.tries == tried, pause
        live(refused, pause // 5, step=DAY)
        assert phone.tries == tried + 1, pause


def test_a_held_alert_hurries_no_retry(house, phone):
    """The router's is refused, its child's waits for the router, another for the night's end."""
    phone.answer = False
    larm = house('timezone = "UTC"\n' + channels(phone) + monitor("router")
                 + monitor("job", depends_on=["router"]) + monitor("late", quiet=["07:00-12:00"]))
    for key in ("router", "job", "late"):
        larm.ping(key)
    live(larm, 3 * HOUR, step=20 * SECOND)
    assert phone.tries <= len(PAUSES) + 2


def test_channels_that_failed_together_are_not_all_tried_again_in_the_same_moment(house):
    phones = [Phone(f"phone-{number}", answer=False) for number in range(12)]
    larm = house(channels(*phones) + monitor("job", **DAYLONG))
    larm.ping("job", "fail")
    live(larm)
    tried_again = []
    for _ in range(20):
        live(larm, 100, step=100)
        assert {phone.tries for phone in phones} == {1}
        larm.clock.advance(350)
    for _ in range(25):
        live(larm, 100, step=100)
        tried_again.append(sum(phone.tries == 2 for phone in phones))
    assert tried_again[-1] == 12
    assert len(set(tried_again)) >= 4


def test_after_3_days_a_delivery_has_failed_and_what_came_later_has_3_days_of_its_own(house, phone):
    phone.answer = False
    larm = house(channels(phone) + monitor("old", **DAYLONG) + monitor("new", **DAYLONG))
    larm.ping("old", "fail")
    live(larm)
    live(larm, 2 * DAY, step=HOUR)
    larm.ping("new", "fail")
    live(larm, DAY - 2 * HOUR, step=HOUR)
    assert states(larm) == ["pending", "pending"]
    live(larm, 4 * HOUR, step=10 * MINUTE)
    assert states(larm) == ["failed", "pending"]
    phone.answer = True
    live(larm, 2 * HOUR, step=10 * MINUTE)
    assert states(larm) == ["failed", "sent"]
    assert phone.titles() == ["DOWN: new"]


@pytest.mark.parametrize("by", [-HOUR, -30 * DAY, 2 * HOUR, 30 * DAY])
def test_a_clock_that_is_set_neither_delays_nor_hurries_a_retry(refused, phone, by):
    refused.clock.set_wall(by)
    live(refused, 9 * SECOND, step=SECOND)
    assert phone.tries == 1
    live(refused, 4 * SECOND, step=SECOND)
    assert phone.tries == 2
    assert states(refused) == ["pending"]


@pytest.mark.parametrize("by", [-30 * DAY, 30 * DAY])
def test_a_clock_that_is_set_during_an_attempt_gives_nothing_up(refused, phone, by):
    go = threading.Event()
    phone.answer = lambda: go.wait(20) and False
    refused.watch(12 * SECOND)
    wait_until(lambda: phone.tries == 2)
    refused.clock.set_wall(by)
    refused.tick()
    go.set()
    refused.larm.notifier.wait(10)
    assert states(refused) == ["pending"]
    phone.answer = True
    live(refused, 40 * SECOND)
    assert states(refused) == ["sent"]


@pytest.mark.parametrize("by", [-HOUR, -30 * DAY, 30 * DAY])
def test_a_clock_set_while_larm_was_off_delays_no_delivery(larm, phone, by):
    larm.ping("job", "fail")
    larm.stop()
    larm.clock.set_wall(by)
    larm.clock.resync()
    larm.open()
    live(larm)
    assert "DOWN: job" in "".join(phone.titles() + phone.bodies())


class Like:
    """What Apprise 2 answers with: an object that is like a bool."""

    def __init__(self, accepted: bool) -> None:
        self.accepted = accepted

    def __bool__(self) -> bool:
        return self.accepted


@pytest.mark.parametrize(
    ("answer", "state"),
    [(True, "sent"), (False, "pending"), (None, "pending"), (Like(True), "sent"),
     (Like(False), "pending"), (RuntimeError("a plugin's\nfault"), "pending"),
     (SystemExit(3), "pending")],
)  # fmt: skip
def test_only_apprise_s_true_is_a_success_and_what_it_raises_is_a_refusal(
    larm, monkeypatch, answer, state
):
    def answers(*_: object, **__: object) -> object:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(apprise.Apprise, "notify", answers)
    larm.ping("job", "fail")
    live(larm)
    [delivery] = deliveries(larm)
    assert (delivery["state"], delivery["attempts"]) == (state, 1)
    if isinstance(answer, RuntimeError):
        assert "a plugin's fault" in delivery["error"]


# Channels


def test_an_alert_goes_to_every_channel_of_its_monitor_and_to_no_other(house, phone):
    mail = Phone("mail")
    larm = house(channels(phone, mail) + monitor("both") + monitor("one", notify=["phone"])
                 + monitor("silent", notify=[]))
    for key in ("both", "one", "silent"):
        larm.ping(key, "fail")
        live(larm)
    assert phone.titles() == ["DOWN: both", "DOWN: one"]
    assert mail.titles() == ["DOWN: both"]
    assert [len(event["deliveries"]) for event in larm.events()] == [2, 1, 0]


@pytest.mark.parametrize("trouble", ["hang", "drip", "close", 500])
def test_a_channel_in_trouble_delays_no_other(house, webhooks, trouble):
    bad, good = webhooks(), webhooks()
    bad.answer = trouble
    larm = house(channels(bad=bad.url, good=good.url) + monitor("job") + monitor("other"))
    for number, key in enumerate(("job", "other"), 1):
        larm.ping(key, "fail")
        larm.watch(5 * SECOND)
        wait_until(lambda number=number: len(good.alerts) == number, seconds=3)
    assert good.titles() == ["DOWN: job", "DOWN: other"]
    assert bad.alerts == []
    assert "sent" not in states(larm, "bad")


@pytest.mark.parametrize("how", ["hang", "drip"])
def test_an_attempt_that_takes_over_a_minute_has_failed_and_the_next_takes_the_url_in_force(
    house, webhooks, how
):
    wrong, right = webhooks(), webhooks()
    wrong.answer = how
    text = monitor("job", **DAYLONG)
    larm = house(channels(phone=wrong.url + "?rto=300&cto=300") + text)
    larm.ping("job", "fail")
    larm.clock.advance(4 * SECOND)
    larm.tick()
    wait_until(lambda: wrong.refused == 1)
    larm.watch(50 * SECOND)
    assert deliveries(larm)[0]["error"] is None
    larm.watch(12 * SECOND)
    wait_until(lambda: deliveries(larm)[0]["error"])
    assert states(larm) == ["pending"]
    larm.save(channels(phone=right.url) + text)
    larm.clock.advance(15 * SECOND)
    larm.deliver()
    assert right.titles() == ["DOWN: job"]
    assert states(larm) == ["sent"]


def test_a_url_that_is_corrected_while_an_attempt_hangs_is_used_within_a_minute(house, phone):
    phone.answer = phone.hang
    text, right = monitor("job", **DAYLONG), Phone("right")
    larm = house(channels(phone) + text)
    larm.ping("job", "fail")
    larm.clock.advance(4 * SECOND)
    larm.tick()
    wait_until(lambda: phone.tries == 1)
    larm.save(channels(phone=right.url) + text)
    for _ in range(80):
        larm.watch(SECOND)
        time.sleep(0.005)
    wait_until(lambda: right.messages)
    assert right.titles() == ["DOWN: job"]


def test_a_channel_that_always_hangs_takes_few_threads_and_recovers(house, phone):
    phone.answer = phone.hang
    text, right = monitor("job", **DAYLONG), Phone("right")
    larm = house(channels(phone) + text)
    before = threading.active_count()
    larm.ping("job", "fail")
    for _ in range(40):
        larm.clock.advance(HOUR)
        larm.tick()
        time.sleep(0.02)
    assert phone.tries >= 2
    assert threading.active_count() - before <= 10
    larm.save(channels(phone=right.url) + text)
    for _ in range(15):
        larm.watch(5 * SECOND)
        time.sleep(0.01)
    wait_until(lambda: right.messages, seconds=3)


def test_a_url_that_was_corrected_is_tried_at_once(refused, phone):
    live(refused, 10 * HOUR, step=MINUTE)  # the pauses have grown to an hour
    right = Phone("right")
    refused.save(refused.text.replace(phone.url, right.url))
    live(refused)
    assert right.titles() == ["DOWN: job"]


def test_a_channel_that_was_removed_fails_with_the_reason(refused):
    refused.save(monitor("job", **DAYLONG))
    live(refused, 15 * SECOND)
    [delivery] = deliveries(refused)
    assert delivery["state"] == "failed"
    assert "the channel is not in" in delivery["error"]


# Order and digests


def test_several_alerts_within_3_s_are_one_message_that_lists_each(house, phone):
    keys = ["one", "two", "three"]
    larm = house(channels(phone) + "".join(monitor(key) for key in keys))
    for key in keys:
        larm.ping(key, "fail")
        live(larm, 1_400, step=700)
        assert phone.messages == [] or key == "three"
    live(larm, SECOND)
    assert phone.titles() == ["DOWN: 3 monitors"]
    for key in keys:
        assert f"{key} is down" in phone.bodies()[0]
        assert f"http://127.0.0.1:5276/monitor/{key}" in phone.bodies()[0]


def test_alerts_more_than_3_s_apart_are_several_messages(house, phone):
    larm = house(channels(phone) + "".join(monitor(key) for key in ("one", "two", "three")))
    for key in ("one", "two", "three"):
        larm.ping(key, "fail")
        live(larm, 3_500, step=500)
    live(larm)
    assert phone.titles() == ["DOWN: one", "DOWN: two", "DOWN: three"]


def test_alerts_arrive_in_the_order_of_their_events(house, phone):
    phone.answer = False
    larm = house(channels(phone) + monitor("one") + monitor("two"))
    larm.ping("one", "fail")
    live(larm)
    larm.ping("two", "fail")  # due before the first one's next try
    phone.answer = True
    live(larm, MINUTE)
    told = "".join(phone.bodies())
    assert told.index("one ") < told.index("two is down")
    assert states(larm) == ["sent", "sent"]


def test_500_silent_monitors_are_one_message_a_channel_within_5_s_of_the_deadline(house, phone):
    mail = Phone("mail")
    keys = [f"job-{number:03}" for number in range(500)]
    larm = house(channels(phone, mail) + "".join(monitor(key) for key in keys))
    ping_all(larm)
    live(larm, 69 * SECOND, step=3 * SECOND)
    live(larm, 6 * SECOND, step=SECOND)  # the deadline, and 5 s
    for one in (phone, mail):
        assert one.titles() == ["DOWN: 500 monitors"]
        assert all(key in one.bodies()[0] for key in keys)
    assert set(states(larm)) == {"sent"}


# Stops, crashes and disks


@pytest.mark.parametrize("crash", [False, True])
def test_what_was_pending_at_the_stop_is_sent_after_the_start_once(larm, phone, crash):
    larm.ping("job", "fail")
    larm.restart(MINUTE, crash=crash)
    live(larm)
    larm.restart(MINUTE, crash=crash)
    live(larm, HOUR, step=MINUTE)
    assert phone.titles() == ["DOWN: job"]


@pytest.mark.parametrize("crash", [False, True])
def test_pauses_go_on_where_they_were_after_a_restart(refused, phone, crash):
    live(refused, MINUTE, step=SECOND)
    assert phone.tries == 3
    refused.restart(0, crash=crash)
    live(refused, 30 * SECOND)
    assert phone.tries == 3
    live(refused, 45 * SECOND)
    assert phone.tries == 4
    assert deliveries(refused)[0]["attempts"] == 4


@pytest.fixture
def under_way(larm, phone) -> tuple[House, threading.Event]:
    """A Larm whose alert the channel is about to accept: once the event is set."""
    go = threading.Event()
    phone.answer = lambda: go.wait(20)
    larm.ping("job", "fail")
    larm.clock.advance(4 * SECOND)
    larm.tick()
    wait_until(lambda: phone.tries)
    return larm, go


def test_a_stop_waits_for_what_is_being_sent(under_way, phone):
    larm, go = under_way
    threading.Timer(0.2, go.set).start()
    larm.restart(MINUTE)
    assert phone.titles() == ["DOWN: job"]
    live(larm, HOUR, step=MINUTE)
    assert phone.titles() == ["DOWN: job"]
    assert states(larm) == ["sent"]


def test_what_was_accepted_but_not_noted_before_a_crash_is_sent_again(under_way, phone):
    """At least once: nobody knows of it any more."""
    larm, go = under_way
    with larm.full_disk():
        go.set()
        wait_until(lambda: phone.messages)
        time.sleep(0.1)
        larm.crash()
    larm.clock.advance(MINUTE)
    larm.clock.resync()
    larm.open()
    live(larm)
    live(larm, HOUR, step=MINUTE)
    assert states(larm) == ["sent"]
    assert phone.titles() == ["DOWN: job", "DOWN: job"]


def test_what_was_accepted_is_not_sent_again_for_a_full_disk(under_way, phone):
    larm, go = under_way

    def tick() -> bool:
        with contextlib.suppress(Unrecordable):
            larm.tick()
            return True
        return False

    with larm.full_disk():
        go.set()
        wait_until(lambda: phone.messages)
        time.sleep(0.1)
        for _ in range(100):
            larm.clock.advance(SECOND)
            tick()
    wait_until(tick)
    wait_until(lambda: states(larm) == ["sent"])
    live(larm, HOUR, step=MINUTE)
    assert [title for title in phone.titles() if "LARM" not in title] == ["DOWN: job"]


def test_what_was_accepted_is_not_sent_again_for_a_disk_that_hangs(under_way, phone):
    larm, go = under_way
    with larm.hanging_disk():
        go.set()
        wait_until(lambda: phone.messages)
        larm.clock.advance(HOUR)
        time.sleep(0.3)
    wait_until(lambda: states(larm) == ["sent"])
    live(larm, HOUR, step=MINUTE)
    assert [title for title in phone.titles() if "LARM" not in title] == ["DOWN: job"]


# What they say


@pytest.fixture
def backup(house, phone) -> House:
    return house(
        'timezone = "Europe/Stockholm"\nurl = "https://home.example/larm"\n' + channels(phone)
        + monitor("backup", "1h", "10m", name="Nightly backup", note="Runs on nas",
                  max_runtime="30m")
    )


def told(larm: House, phone: Phone) -> str:
    """The text of the next alert, and the only one."""
    live(larm)
    [message] = phone.messages
    return message.body


def test_a_missed_deadline_says_when_and_what_was_expected(backup, phone):
    backup.ping("backup")
    live(backup, 70 * MINUTE + SECOND, step=MINUTE)
    live(backup)
    [message] = phone.messages
    assert (message.title, message.type) == ("DOWN: Nightly backup", "failure")
    first, *more = message.body.splitlines()
    assert re.fullmatch(r"Nightly backup is down: no heartbeat by 2027-01-15 10:10:00\+01:00, "
                        r"[1-5] s ago\.", first)
    assert more == [
        "Last heartbeat: 2027-01-15 09:00:00+01:00, 1 h 10 min before.",
        "Expected: every 1 h, with 10 min grace.",
        "Runs on nas",
        "https://home.example/larm/monitor/backup",
    ]


def test_a_failure_says_the_exit_status_and_the_last_lines_of_output(backup, phone):
    backup.ping("backup", "3", body="".join(f"line {number}\n" for number in range(40)))
    text = told(backup, phone)
    assert "exit status 3" in text
    assert "2027-01-15 09:00:00+01:00" in text
    assert re.findall(r"line (\d+)", text) == [str(number) for number in range(30, 40)]
    assert "Last heartbeat" not in text  # there was none


def test_a_failure_without_a_status_says_that_the_job_reported_it(backup, phone):
    backup.ping("backup", "fail")
    assert "the job reported a failure" in told(backup, phone)


def test_a_run_that_does_not_end_says_its_limit(backup, phone):
    backup.ping("backup")
    backup.ping("backup", "start")
    live(backup, 30 * MINUTE + SECOND, step=MINUTE)
    assert "has not ended within 30 min" in told(backup, phone)


def test_a_recovery_says_when_and_how_long_it_lasted(backup, phone):
    backup.ping("backup", "fail")
    live(backup)
    phone.messages.clear()
    live(backup, 2 * HOUR - 4 * SECOND, step=MINUTE)
    backup.ping("backup")
    text = told(backup, phone)
    assert (phone.messages[0].title, phone.messages[0].type) == ("UP: Nightly backup", "success")
    assert "2 h" in text
    assert "2027-01-15 11:00:00+01:00" in text
    assert "https://home.example/larm/monitor/backup" in text


def test_an_alert_says_that_larm_itself_was_not_running_meanwhile(backup, phone):
    backup.ping("backup")
    live(backup, 30 * MINUTE, step=MINUTE)
    backup.restart(20 * MINUTE)
    live(backup, 40 * MINUTE + SECOND, step=MINUTE)
    span = "from 2027-01-15 09:30:00+01:00 to 2027-01-15 09:50:00+01:00"
    assert f"Larm itself was not running {span}" in told(backup, phone)


@pytest.mark.parametrize("gap", ["before", "short", "after", "set forward", "set back"])
def test_an_alert_says_nothing_of_a_gap_that_has_nothing_to_do_with_it(backup, phone, gap):
    backup.ping("backup")
    live(backup, MINUTE, step=MINUTE)
    if gap == "before":
        backup.restart(20 * MINUTE)
        backup.ping("backup")
    elif gap == "short":
        backup.restart(5 * SECOND)
    elif gap.startswith("set"):
        backup.clock.set_wall(20 * MINUTE if gap == "set forward" else -20 * MINUTE)
        backup.deliver()
    phone.answer = gap != "after"
    live(backup, 70 * MINUTE + SECOND, step=MINUTE)
    if gap == "after":
        assert backup.state("backup") == "down"
        backup.restart(20 * MINUTE)
        phone.answer = True
        live(backup, HOUR, step=MINUTE)
    live(backup)
    assert "DOWN: Nightly backup" in phone.titles()
    assert "not running" not in "".join(phone.bodies())


def test_a_gap_is_told_of_those_monitors_only_whose_heartbeat_it_may_have_hidden(house, phone):
    larm = house(channels(phone) + monitor("one", "1h", "10m") + monitor("two", "20m", "10m"))
    larm.ping("one")
    live(larm, 25 * MINUTE, step=5 * MINUTE)
    larm.ping("two")
    larm.restart(20 * MINUTE)
    live(larm, 15 * MINUTE, step=5 * MINUTE)
    larm.ping("two")
    live(larm, 31 * MINUTE, step=MINUTE)  # both deadlines are 90 min after the start
    assert phone.titles() == ["DOWN: 2 monitors"]
    one, two = sorted(phone.bodies()[0].split("\n\n"))
    assert "Larm itself was not running" in one
    assert "not running" not in two


LATE = "This alert is late"


def test_what_was_tried_before_says_that_it_is_late(refused, phone):
    live(refused, 20 * MINUTE, step=MINUTE)
    phone.answer = True
    live(refused, 20 * MINUTE, step=MINUTE)
    assert LATE in phone.bodies()[0]
    assert "2027-01-15 08:00:00" in phone.bodies()[0]


def test_what_waited_while_larm_was_off_says_that_it_is_late(larm, phone):
    larm.ping("job", "fail")
    larm.restart(50 * MINUTE)
    live(larm)
    assert LATE in phone.bodies()[0]


def test_what_is_in_time_or_of_a_shortened_interval_does_not_say_that_it_is_late(larm, phone):
    larm.ping("job")
    live(larm, 5 * HOUR, step=MINUTE)
    larm.save(larm.text.replace('"1d"', '"1h"').replace('grace = "1h"', 'grace = "10m"'))
    live(larm)
    assert phone.titles() == ["DOWN: job"]
    assert LATE not in phone.bodies()[0]
    assert larm.changes() == [("down", "missed", larm.events()[0]["at"] - START)]
