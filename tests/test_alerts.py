"""What is told of a monitor and when: dependencies, reminders, merging, quiet hours, at most 6 an
hour, pauses.
"""

from __future__ import annotations

import re
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import START, House
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from receivers import Phone, channels, deliveries, live, monitor, ping_all, service, states

from larm import DAY, HOUR, MINUTE, SECOND


@pytest.fixture
def phone() -> Phone:
    return Phone()


def flip(larm: House, times: int, each_ms: int = 5 * SECOND, key: str = "job") -> None:
    """Down, up, down ..., told as far as Larm tells it."""
    for number in range(times):
        larm.ping(key, "" if number % 2 else "fail")
        live(larm, each_ms, step=max(5 * SECOND, each_ms // 2))


# depends_on


@pytest.fixture
def network(house, phone) -> House:
    """A router, and two jobs behind it that are due before and after it."""
    return house(
        channels(phone) + monitor("router")
        + monitor("early", "30s", depends_on=["router"])
        + monitor("late", "2m", depends_on=["router"])
    )


def start_all(larm: House) -> None:
    ping_all(larm)
    larm.clock.advance(7)  # no tick falls on a deadline: that has a test of its own


@pytest.fixture
def cut_off(network, phone) -> House:
    """All of them are down for some minutes."""
    start_all(network)
    live(network, 10 * MINUTE)
    assert phone.titles() == ["DOWN: router"]
    return network


def test_a_router_s_alert_is_the_only_one_and_names_what_depends_on_it(cut_off, phone):
    assert "2 monitors depend on it: early, late." in phone.bodies()[0]
    assert {event["monitor"] for event in cut_off.events()} == {"router", "early", "late"}
    assert states(cut_off, key="early") == ["pending"]


def test_a_child_that_came_back_in_time_is_never_spoken_of(cut_off, phone):
    cut_off.ping("router")
    live(cut_off, 20 * SECOND, pings=["router"])
    live(cut_off, 10 * MINUTE, pings=["router", "early", "late"])
    assert phone.titles() == ["DOWN: router", "UP: router"]
    for key in ("early", "late"):
        told = deliveries(cut_off, key=key)
        assert {one["state"] for one in told} == {"failed"}
        assert all(one["error"].startswith("withdrawn") for one in told)


def test_a_child_that_came_up_while_its_parent_was_down_is_never_spoken_of(cut_off, phone):
    live(cut_off, 20 * SECOND, pings=["early", "late"])
    assert phone.titles() == ["DOWN: router"]
    live(cut_off, 5 * MINUTE, pings=["router", "early", "late"])
    assert phone.titles() == ["DOWN: router", "UP: router"]


def test_a_child_that_is_dead_has_its_alert_once_an_interval_after_the_return(cut_off, phone):
    cut_off.ping("router")
    live(cut_off, 25 * SECOND, pings=["router"])
    assert phone.titles() == ["DOWN: router", "UP: router"]
    live(cut_off, 10 * SECOND, pings=["router"])
    assert phone.titles()[2:] == ["DOWN: early"]
    live(cut_off, 80 * SECOND, pings=["router"])
    assert phone.titles()[3:] == []
    live(cut_off, 10 * SECOND, pings=["router"])
    assert phone.titles()[3:] == ["DOWN: late"]
    live(cut_off, HOUR, step=30 * SECOND, pings=["router"])
    assert phone.titles()[4:] == []
    assert not any("This alert is late" in body for body in phone.bodies())


def test_a_child_of_a_long_interval_that_is_dead_has_its_alert_an_hour_after_the_return(
    house, phone
):
    larm = house(channels(phone) + monitor("router")
                 + monitor("daily", "1d", "0s", depends_on=["router"]))
    start_all(larm)
    live(larm, DAY + MINUTE, step=10 * MINUTE)
    live(larm, 59 * MINUTE, step=30 * SECOND, pings=["router"])
    assert phone.titles() == ["DOWN: router", "UP: router"]
    live(larm, 2 * MINUTE, pings=["router"])
    assert phone.titles()[2:] == ["DOWN: daily"]


@pytest.mark.parametrize("how", ["fail", "overran"])
def test_a_child_that_failed_meanwhile_is_told_at_once_when_no_parent_is_down(house, phone, how):
    larm = house(channels(phone) + monitor("router")
                 + monitor("job", "1h", depends_on=["router"], max_runtime="2m"))
    start_all(larm)
    larm.ping("job", "start")
    live(larm, 80 * SECOND)
    if how == "fail":
        larm.ping("job", "fail")
    live(larm, 5 * MINUTE)
    assert phone.titles() == ["DOWN: router"]
    live(larm, 35 * SECOND, pings=["router"])
    assert phone.titles() in (["DOWN: router", "UP: router", "DOWN: job"],
                              ["DOWN: router", "DOWN: job, UP: router"])


def test_a_child_of_a_parent_that_is_up_and_was_heard_of_since_alerts_at_once(network, phone):
    start_all(network)
    live(network, 45 * SECOND, pings=["router"])
    assert phone.titles() == ["DOWN: early"]


def test_a_failure_does_not_wait_for_a_parent_that_is_up(network, phone):
    start_all(network)
    live(network, 20 * SECOND)
    network.ping("late", "fail")
    live(network)
    assert phone.titles() == ["DOWN: late"]


def test_a_missed_deadline_waits_until_the_parent_s_own_deadline_has_passed(network, phone):
    start_all(network)
    live(network, 65 * SECOND)
    assert network.state("early") == "down"
    assert phone.messages == []
    live(network, 10 * MINUTE)
    assert phone.titles() == ["DOWN: router"]


def test_a_missed_deadline_waits_until_the_parent_is_heard_of(network, phone):
    start_all(network)
    live(network, 50 * SECOND)
    assert phone.messages == []
    network.ping("router")
    live(network, 5 * SECOND, step=SECOND)
    assert phone.titles() == ["DOWN: early"]


@pytest.mark.parametrize("above", [[], ["top"]])
def test_a_missed_deadline_waits_for_a_parent_s_verdict_5_min_at_most(house, phone, above):
    larm = house(channels(phone) + monitor("top", "1d") + monitor("nas", "1d", depends_on=above)
                 + monitor("job", depends_on=["nas"]))
    start_all(larm)
    live(larm, 70 * SECOND + 290 * SECOND)
    assert phone.messages == []
    live(larm, 15 * SECOND)
    assert phone.titles() == ["DOWN: job"]
    assert "late:" not in phone.bodies()[0]
    larm.ping("job")
    live(larm)
    assert phone.titles()[1:] == ["UP: job"]


@pytest.mark.parametrize("order", [("router", "child"), ("child", "router")])
@pytest.mark.parametrize("step", [5_000, 7_000, 70_000, 70_001])
def test_a_child_with_the_same_deadline_as_its_parent_sends_no_alert(house, phone, order, step):
    tables = {"router": monitor("router"), "child": monitor("child", depends_on=["router"])}
    larm = house(channels(phone) + "".join(tables[key] for key in order))
    for key in order:
        larm.ping(key)  # in the same millisecond
    live(larm, 5 * MINUTE, step=step)
    assert phone.titles() == ["DOWN: router"]


@pytest.mark.parametrize("how", ["never pinged", "paused", "disabled", "removed"])
def test_a_parent_that_nobody_watches_silences_nobody(network, phone, how):
    if how != "never pinged":
        network.ping("router")
        live(network, 80 * SECOND)
    network.ping("early")
    if how == "paused":
        network.pause("router")
    if how == "disabled":
        network.save(network.text.replace("[monitors.router]", "[monitors.router]\nenabled=false"))
    if how == "removed":
        text = channels(phone) + monitor("early", "30s")
        network.save(text)
    phone.messages.clear()
    live(network, 40 * SECOND)
    assert phone.messages == []
    live(network, 10 * SECOND)
    assert phone.titles() == ["DOWN: early"]


@pytest.mark.parametrize("how", ["paused", "no longer its parent"])
def test_what_was_held_for_a_parent_that_is_let_go_is_told_in_one_message(cut_off, phone, how):
    if how == "paused":
        cut_off.pause("router")
    else:
        cut_off.save(cut_off.text.replace('depends_on = ["router"]', ""))
    live(cut_off, 40 * SECOND)
    if phone.titles()[1:] == []:  # nobody said that a missed one is told before its interval
        live(cut_off, 90 * SECOND)
    assert sorted(", ".join(phone.titles()[1:]).split(", ")) in (
        ["DOWN: 2 monitors"], ["DOWN: early", "DOWN: late"])


def test_a_child_that_was_told_to_be_down_before_its_parent_went_is_told_to_be_up(network, phone):
    start_all(network)
    live(network, 45 * SECOND, pings=["router"])
    live(network, 2 * MINUTE)
    network.ping("early")
    live(network)
    assert phone.titles() == ["DOWN: early", "DOWN: router", "UP: early"]


def test_a_parent_that_goes_down_again_holds_its_children_again(cut_off, phone):
    cut_off.ping("router")
    live(cut_off, 15 * SECOND)
    cut_off.ping("router", "fail")
    live(cut_off, 10 * MINUTE)
    assert phone.titles() == ["DOWN: router", "UP: router", "DOWN: router"]


def test_a_restart_while_a_child_is_held_changes_nothing_and_takes_no_time_from_it(cut_off, phone):
    cut_off.restart(5 * MINUTE, crash=True)
    live(cut_off, 2 * MINUTE)
    assert phone.titles() == ["DOWN: router"]
    cut_off.ping("router")
    cut_off.ping("late")
    live(cut_off, 10 * SECOND)
    cut_off.restart(HOUR // 2)
    live(cut_off, 15 * SECOND, pings=["router", "late"])
    assert phone.titles() == ["DOWN: router", "UP: router"]
    live(cut_off, 20 * SECOND, pings=["router", "late"])
    assert phone.titles()[2:] == ["DOWN: early"]


def test_grandchildren_are_held_and_named_too(house, phone):
    larm = house(channels(phone) + monitor("router") + monitor("nas", depends_on=["router"])
                 + monitor("backup", "2m", depends_on=["nas"]))
    start_all(larm)
    live(larm, 69 * SECOND)
    live(larm, 10 * MINUTE, pings=["nas"])
    assert phone.titles() == ["DOWN: router"]
    assert "2 monitors depend on it: nas, backup." in phone.bodies()[0]


def test_a_child_of_two_parents_waits_for_both(house, phone):
    larm = house(channels(phone) + monitor("one") + monitor("two", "50s")
                 + monitor("child", "90s", depends_on=["one", "two"]))
    start_all(larm)
    live(larm, 10 * MINUTE)
    live(larm, 5 * MINUTE, pings=["one"])
    assert phone.titles() == ["DOWN: two", "DOWN: one", "UP: one"]
    live(larm, 2 * MINUTE, pings=["one", "two"])
    assert phone.titles()[3:] == ["UP: two", "DOWN: child"]


def test_a_router_with_30_children_is_one_alert_each_way_and_a_dead_child_its_own_once(
    house, phone
):
    children = [f"child-{number:02}" for number in range(30)]
    larm = house(channels(phone) + monitor("router")
                 + "".join(monitor(key, depends_on=["router"]) for key in children))
    for key in [*children[:15], "router", *children[15:]]:
        larm.ping(key)
        larm.clock.advance(20)
    live(larm, 3 * MINUTE, step=500)
    for _ in range(10):
        live(larm, 25 * SECOND, step=25 * SECOND, pings=["router", *children[1:]])
    assert phone.titles() == ["DOWN: router", "UP: router", "DOWN: child-00"]
    assert "30 monitors depend on it: " in phone.bodies()[0]
    assert "and 10 more." in phone.bodies()[0]


# remind


@pytest.fixture
def reminded(house, phone) -> House:
    """A job that is down since now, and reminded of each hour."""
    larm = house(channels(phone) + monitor("job", "1d", remind="1h"))
    larm.ping("job", "fail")
    return larm


def test_a_monitor_that_stays_down_is_reminded_of_with_how_long_it_lasts(reminded, phone):
    live(reminded, 3 * HOUR + MINUTE, step=10 * SECOND)
    assert phone.titles() == ["DOWN: job"] + ["STILL DOWN: job"] * 3
    assert {message.type for message in phone.messages[1:]} == {"warning"}
    for hours, body in enumerate(phone.bodies()[1:], 1):
        assert f"job is still down, for {hours} h" in body
        assert "http://127.0.0.1:5276/monitor/job" in body
        assert "late" not in body


def test_reminders_add_no_delivery_and_end_with_the_recovery(reminded, phone):
    live(reminded, 2 * DAY, step=10 * MINUTE)
    assert len(phone.messages) >= 40
    assert len(deliveries(reminded)) == 1
    phone.messages.clear()
    reminded.ping("job")
    live(reminded, 5 * HOUR, step=MINUTE)
    assert phone.titles() == ["UP: job"]
    assert states(reminded) == ["sent", "sent"]


def test_reminders_go_to_every_channel_and_those_of_several_monitors_are_one_message(
    house, phone
):
    mail = Phone("mail")
    larm = house(channels(phone, mail) + '[defaults]\nremind = "1h"\n'
                 + monitor("one") + monitor("two") + monitor("never", remind="366d"))
    for key in ("one", "two", "never"):
        larm.ping(key, "fail")
    live(larm, HOUR + MINUTE, step=10 * SECOND)
    assert phone.titles() == mail.titles() == ["DOWN: 3 monitors", "STILL DOWN: 2 monitors"]


def test_a_reminder_and_another_alert_within_3_s_are_one_message(house, phone):
    larm = house(channels(phone) + monitor("one", remind="1h") + monitor("two"))
    larm.ping("one", "fail")
    live(larm, 4 * SECOND)
    live(larm, HOUR - SECOND, step=SECOND)
    larm.ping("two", "fail")
    live(larm, MINUTE, step=SECOND)
    assert phone.titles() == ["DOWN: one", "DOWN: two, STILL DOWN: one"]


@pytest.mark.parametrize("what", ["stop", "crash", "set back", "set forward"])
def test_a_reminder_waits_for_the_time_that_larm_was_off_and_no_set_clock_moves_it(
    reminded, phone, what
):
    live(reminded, HOUR // 2, step=10 * SECOND)
    if what.startswith("set"):
        reminded.clock.set_wall(10 * HOUR if what == "set forward" else -10 * HOUR)
    else:
        reminded.restart(50 * MINUTE, crash=what == "crash")
    live(reminded, HOUR // 2 - MINUTE, step=10 * SECOND)
    assert phone.titles()[0] == "DOWN: job"
    assert not any("STILL" in title for title in phone.titles())
    live(reminded, 3 * MINUTE, step=10 * SECOND)
    assert [title for title in phone.titles() if "STILL" in title] == ["STILL DOWN: job"]


def test_a_pause_silences_the_reminders_and_what_stays_silent_afterwards_is_told_anew(
    reminded, phone
):
    live(reminded, 10 * SECOND)
    reminded.pause("job", "4h")
    live(reminded, 4 * HOUR + DAY, step=10 * MINUTE)
    assert phone.titles() == ["DOWN: job"]
    live(reminded, 30 * MINUTE, step=5 * MINUTE)
    assert phone.titles() == ["DOWN: job", "DOWN: job"]


def test_remind_that_is_set_counts_from_now_and_ends_when_it_is_taken_out(house, phone):
    text = channels(phone) + monitor("job", "1d")
    larm = house(text)
    larm.ping("job", "fail")
    live(larm, 2 * HOUR, step=MINUTE)
    larm.save(text + 'remind = "1h"\n')
    live(larm, 58 * MINUTE, step=MINUTE)
    assert phone.titles() == ["DOWN: job"]
    live(larm, 5 * MINUTE, step=MINUTE)
    assert phone.titles() == ["DOWN: job", "STILL DOWN: job"]
    larm.save(text)
    live(larm, 5 * HOUR, step=MINUTE)
    assert phone.titles()[2:] == []


def test_a_monitor_that_is_put_back_while_down_was_told_of_once_and_is_not_reminded_of_at_once(
    reminded, phone
):
    live(reminded)
    text = reminded.text
    reminded.save(text.partition("[monitors")[0] + monitor("another"))
    live(reminded, 3 * HOUR, step=MINUTE)
    reminded.save(text)
    live(reminded, 50 * MINUTE, step=MINUTE)
    assert phone.titles() == ["DOWN: job"]
    reminded.ping("job")
    live(reminded)
    assert phone.titles() == ["DOWN: job", "UP: job"]


def test_reminders_that_could_not_be_sent_are_one_and_none_comes_beside_pending_news(
    reminded, phone
):
    phone.answer = False
    live(reminded, 5 * HOUR, step=MINUTE)
    phone.answer = True
    live(reminded, 65 * MINUTE, step=MINUTE)
    assert phone.titles() in (["DOWN: job"], ["DOWN: job", "STILL DOWN: job"])
    assert "This alert is late" in phone.bodies()[0]
    phone.answer = False
    live(reminded, 5 * HOUR, step=MINUTE)
    phone.messages.clear()
    reminded.ping("job")
    phone.answer = True
    live(reminded, 65 * MINUTE, step=MINUTE)
    assert phone.titles() == ["UP: job"]


def test_a_reminder_that_was_refused_is_a_reminder_when_it_is_tried_again(reminded, phone):
    live(reminded, 50 * MINUTE, step=MINUTE)
    phone.answer = False
    live(reminded, 15 * MINUTE, step=10 * SECOND)
    phone.answer = True
    live(reminded, 15 * MINUTE, step=MINUTE)
    assert phone.titles() == ["DOWN: job", "STILL DOWN: job"]
    phone.answer = False
    live(reminded, HOUR, step=MINUTE)
    reminded.ping("job")
    phone.answer = True
    live(reminded, HOUR, step=MINUTE)
    assert phone.titles()[2:] == ["UP: job"]
    assert "is up again, after 2 h" in phone.bodies()[-1]


def test_a_monitor_is_not_reminded_of_while_one_that_it_depends_on_is_down(house, phone):
    larm = house(channels(phone) + monitor("router")
                 + monitor("job", depends_on=["router"], remind="10m"))
    larm.ping("router")
    larm.ping("job", "fail")
    live(larm, HOUR, step=10 * SECOND)
    assert phone.titles() == ["DOWN: job", "DOWN: router"]
    [told] = deliveries(larm, key="job")
    assert (told["state"], told["error"]) == ("sent", None)


# At most 6 messages an hour about one monitor


def counts(message: str) -> tuple[int, str]:
    """What a message that counts says: how often it went down, and how it is now."""
    found = re.search(r"went down (\d+) times from .* to .*, (up|down) now", message)
    assert found, message
    return int(found[1]), found[2]


@pytest.fixture
def flapping(house, phone) -> House:
    """A job that changes 26 times in 13 min: down and up 13 times. 6 messages were sent."""
    larm = house(channels(phone) + monitor("job", "1d") + monitor("other", "1d"))
    flip(larm, 26, each_ms=30 * SECOND)
    return larm


def test_what_happens_beyond_6_messages_an_hour_is_one_message_that_counts(flapping, phone):
    assert phone.titles() == ["DOWN: job", "UP: job"] * 3
    live(flapping, 40 * MINUTE, step=MINUTE)
    assert phone.titles()[6:] == []
    live(flapping, 25 * MINUTE, step=MINUTE)
    [message] = phone.messages[6:]
    assert message.title.endswith(": job")
    assert counts(message.body) == (10, "up")
    assert "late" not in message.body
    assert set(states(flapping)) == {"sent"}
    live(flapping, 5 * HOUR, step=MINUTE)
    assert len(phone.messages) == 7


def test_as_long_as_it_flaps_there_is_one_message_an_hour_and_the_last_says_how_it_is(
    flapping, phone
):
    phone.messages.clear()
    hours = 12
    flip(flapping, hours * 30 + 1, each_ms=2 * MINUTE)
    assert hours - 2 <= len(phone.messages) <= hours + 1
    live(flapping, 61 * MINUTE, step=MINUTE)
    assert counts(phone.bodies()[-1])[1] == "down"
    assert set(states(flapping)) == {"sent"}
    told = sum(counts(body)[0] for body in phone.bodies())
    assert told == 10 + (hours * 30 + 2) // 2
    phone.messages.clear()
    live(flapping, 2 * HOUR, step=MINUTE)
    flapping.ping("job")
    live(flapping)
    assert phone.titles() == ["UP: job"]  # calm again: told at once


def test_another_monitor_is_told_at_once_meanwhile(flapping, phone):
    flapping.ping("other", "fail")
    live(flapping)
    assert phone.titles()[6:] == ["DOWN: other"]


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_changes_nothing_in_that(flapping, phone, crash):
    flapping.restart(20 * SECOND, crash=crash)
    flip(flapping, 4)
    assert phone.titles()[6:] == []
    live(flapping, HOUR, step=MINUTE)
    assert [counts(body) for body in phone.bodies()[6:]] == [(12, "up")]


def test_tests_of_a_channel_make_nothing_silent(house, phone):
    larm = house(channels(phone) + monitor("job", "1d"))
    for _ in range(10):
        assert larm.post("channels/phone/test") == {"sent": True, "error": None}
    phone.messages.clear()
    flip(larm, 6)
    assert phone.titles() == ["DOWN: job", "UP: job"] * 3


def test_reminders_keep_no_news_waiting(house, phone):
    larm = house(channels(phone) + monitor("job", "1d", remind="5m"))
    larm.ping("job", "fail")
    live(larm, 50 * MINUTE, step=10 * SECOND)
    assert len(phone.messages) in (5, 6)
    phone.messages.clear()
    larm.ping("job")
    live(larm)
    assert phone.titles() == ["UP: job"]


@pytest.mark.parametrize("by", [-30 * DAY, -2 * HOUR, 30 * DAY])
def test_a_clock_that_is_set_makes_it_silent_for_no_longer_than_an_hour(flapping, phone, by):
    flapping.clock.set_wall(by)
    live(flapping, HOUR + 5 * MINUTE, step=MINUTE)
    assert len(phone.messages) == 7
    live(flapping, HOUR, step=MINUTE)
    flapping.ping("job", "fail")
    live(flapping)
    assert phone.titles()[7:] == ["DOWN: job"]


def test_what_was_merged_for_another_reason_makes_nothing_silent(house, phone):
    """Down, up and down while the channel took nothing are one message of the six."""
    phone.answer = False
    larm = house(channels(phone) + monitor("job", "1d"))
    flip(larm, 3, each_ms=MINUTE)
    phone.answer = True
    live(larm, 20 * MINUTE, step=MINUTE)
    assert phone.take_all() == ["DOWN: job"]
    larm.ping("job")
    live(larm, 5 * SECOND)
    assert phone.titles() == ["UP: job"]


def test_six_changes_of_a_user_who_tries_it_out_make_it_silent_for_no_longer_than_an_hour(
    house, phone
):
    larm = house(channels(phone) + monitor("job", "1d", "1h"))
    flip(larm, 6)
    phone.messages.clear()
    larm.ping("job", "fail")
    live(larm, HOUR + MINUTE, step=MINUTE)
    [message] = phone.messages
    assert "down" in message.body
    assert message.title == "DOWN: job"


# quiet

QUIET = {"quiet": ["22:00-07:00"]}
TO_22, TO_7 = 14 * HOUR, 23 * HOUR  # from START, which is 08:00


@pytest.fixture
def asleep(house, phone) -> House:
    """22:30: a job of which nothing may be told at night, and one of which all may."""
    larm = house('timezone = "UTC"\n' + channels(phone) + monitor("job", "7d", **QUIET)
                 + monitor("vital", "7d") + monitor("also", "7d", **QUIET))
    start_all(larm)
    larm.clock.advance(TO_22 + 30 * MINUTE)
    larm.deliver()
    return larm


def at_7(larm: House) -> None:
    """Go to where the quiet hours have just ended."""
    live(larm, START + TO_7 - larm.clock.now(), step=10 * MINUTE)
    live(larm, 10 * SECOND, step=SECOND)


def test_in_quiet_hours_nothing_comes_and_at_their_end_one_message(asleep, phone):
    asleep.ping("job", "fail")
    asleep.ping("also", "fail")
    live(asleep, 4 * HOUR, step=10 * MINUTE)
    asleep.ping("also")
    assert phone.messages == []
    at_7(asleep)
    [message] = phone.messages
    assert message.title == "DOWN: job, UP: also"
    assert "job is down" in message.body
    assert re.search(r"also was down from 2027-01-15 22:30:00\+00:00 to 2027-01-16 0\d:.* and is "
                     "up again", message.body)
    assert "This alert is late" not in message.body
    assert set(states(asleep)) == {"sent"}


def test_another_monitor_is_told_of_in_those_hours(asleep, phone):
    asleep.ping("vital", "fail")
    live(asleep)
    assert phone.titles() == ["DOWN: vital"]


@pytest.mark.parametrize(("spans", "told"), [
    (["22:00-22:25"], True), (["22:00-22:40"], False), (["07:00-22:00"], True),
    (["12:00-13:00", "22:00-23:00"], False), ([], True), (["23:00-22:00"], True),
])  # fmt: skip
def test_quiet_hours_are_what_the_file_says(asleep, phone, spans, told):
    asleep.save(asleep.text.replace('["22:00-07:00"]', str(spans).replace("'", '"')))
    asleep.ping("job", "fail")
    live(asleep)
    assert bool(phone.messages) is told


def test_quiet_hours_are_those_of_the_configuration_s_timezone(house, phone):
    larm = house('timezone = "Asia/Tokyo"\n' + channels(phone)  # 17:00 at the start
                 + monitor("job", "7d", quiet=["16:30-17:30"]))
    larm.ping("job", "fail")
    live(larm, 29 * MINUTE, step=MINUTE)
    assert phone.messages == []
    live(larm, 2 * MINUTE)
    assert phone.titles() == ["DOWN: job"]


def test_what_was_queued_just_before_the_quiet_hours_is_not_sent_in_them(asleep, phone):
    asleep.restart(0, text=asleep.text.replace("22:00-", "22:31-"))
    phone.answer = False
    asleep.ping("job", "fail")
    live(asleep, 50 * SECOND)
    phone.answer = True
    live(asleep, 2 * HOUR, step=MINUTE)
    assert phone.messages == []
    at_7(asleep)
    assert phone.titles() == ["DOWN: job"]


def test_a_reminder_waits_for_the_end_of_the_quiet_hours_and_is_one(house, phone):
    larm = house('timezone = "UTC"\n' + channels(phone)
                 + monitor("job", "7d", remind="2h", **QUIET))
    larm.clock.advance(TO_22 - HOUR)
    larm.deliver()
    larm.ping("job", "fail")
    live(larm, HOUR, step=MINUTE)
    assert phone.take_all() == ["DOWN: job"]
    at_7(larm)
    assert phone.titles() == ["STILL DOWN: job"]
    assert "for 10 h" in phone.bodies()[0]


@pytest.mark.parametrize("how", ["taken out", "the clock is set forward to the morning"])
def test_quiet_hours_that_are_over_before_their_time_hold_nothing(asleep, phone, how):
    asleep.ping("job", "fail")
    live(asleep, MINUTE)
    if how == "taken out":
        asleep.save(asleep.text.replace('["22:00-07:00"]', "[]"))
    else:
        asleep.clock.set_wall(10 * HOUR)
    live(asleep, 90 * SECOND)
    assert phone.titles() == ["DOWN: job"]


def test_the_same_night_over_a_restart(asleep, phone):
    asleep.ping("job", "fail")
    live(asleep)
    asleep.restart(20 * SECOND, crash=True)
    live(asleep, HOUR, step=MINUTE)
    assert phone.messages == []
    at_7(asleep)
    assert phone.titles() == ["DOWN: job"]


# Digests and merging


def test_a_digest_counts_what_it_lists_by_kind(house, phone):
    larm = house(channels(phone) + "".join(monitor(key) for key in "abcde"))
    larm.ping("d", "fail")
    larm.ping("e", "fail")
    live(larm)
    phone.messages.clear()
    for key in "abc":
        larm.ping(key, "fail")
    for key in "de":
        larm.ping(key)
    live(larm)
    [message] = phone.messages
    assert (message.title, message.type) == ("DOWN: 3 monitors, UP: 2 monitors", "failure")
    assert [key for key in "abcde" if f"/monitor/{key}" in message.body] == list("abcde")


@pytest.mark.parametrize("room", [150, 400, 3_000, 32_000])
def test_a_digest_keeps_to_the_channel_s_room_and_says_how_many_more_there_are(
    house, phone, monkeypatch, room
):
    monkeypatch.setattr(service(phone.url), "body_maxlen", room)
    keys = [f"job-{number:03}" for number in range(200)]
    larm = house(channels(phone) + "".join(monitor(key) for key in keys))
    ping_all(larm, "fail")
    live(larm)
    [message] = phone.messages
    assert message.title == "DOWN: 200 monitors"
    assert len(message.body) <= room
    named = list(dict.fromkeys(re.findall(r"job-\d{3}", message.body)))
    more = re.search(r"And (\d+) more: http://127.0.0.1:5276/$", message.body)
    assert len(named) + (int(more[1]) if more else 0) == 200
    assert named == keys[: len(named)]


def test_1203_monitors_are_all_told(house, phone):
    keys = [f"job-{number:04}" for number in range(1_203)]
    larm = house(channels(phone) + "".join(monitor(key) for key in keys))
    ping_all(larm)
    live(larm, 100 * SECOND)
    assert all(key in "".join(phone.bodies()) for key in keys)
    assert len(phone.messages) <= 3


@pytest.fixture
def offline(house, phone) -> House:
    """A job whose alerts no channel takes till the phone accepts."""
    phone.answer = False
    return house(channels(phone) + monitor("job", "1d", "1d") + monitor("two", "1d", "1d"))


def outage(larm: House, phone: Phone, *spans: int) -> Phone:
    """Down, up, down, ... for so long each, while nothing can be sent; then it can."""
    for number, ms in enumerate(spans):
        larm.ping("job", "" if number % 2 else "fail")
        live(larm, ms, step=MINUTE)
    phone.answer = True
    live(larm, 2 * HOUR, step=MINUTE)
    return phone


def test_a_down_and_its_up_that_are_both_unsent_are_one_message(offline, phone):
    [message] = outage(offline, phone, 10 * MINUTE, SECOND).messages
    assert (message.title, message.type) == ("UP: job", "success")
    assert ("job was down from 2027-01-15 08:00:00+00:00 to 2027-01-15 08:10:00+00:00"
            in message.body)
    assert "and is up again" in message.body
    assert states(offline) == ["sent", "sent"]


def test_a_down_and_its_up_within_3_s_are_one_message_that_is_not_late(offline, phone):
    phone.answer = True
    offline.ping("job", "fail")
    live(offline, SECOND, step=SECOND)
    offline.ping("job")
    live(offline, MINUTE)
    [message] = phone.messages
    assert message.title == "UP: job"
    assert "was down from" in message.body
    assert "late" not in message.body


@pytest.mark.parametrize("now", ["up", "down"])
def test_several_unsent_flips_are_one_message_with_what_it_came_to(offline, phone, now):
    spans = [10 * MINUTE, 5 * MINUTE, 20 * MINUTE, 5 * MINUTE][: 4 if now == "up" else 3]
    [message] = outage(offline, phone, *spans).messages
    assert message.title == f"{now.upper()}: job"
    assert "2027-01-15 08:35" in message.body or "2027-01-15 08:15" in message.body
    assert "This alert is late" in message.body
    assert set(states(offline)) == {"sent"}


def test_a_down_that_was_told_counts_for_none_of_the_unsent_ones(offline, phone):
    phone.answer = True
    offline.ping("job", "fail")
    live(offline)
    phone.answer = False
    live(offline, 2 * HOUR - 4 * SECOND, step=MINUTE)
    offline.ping("job")
    live(offline, 10 * MINUTE, step=MINUTE)
    told, merged = outage(offline, phone, MINUTE, MINUTE).messages
    assert (told.title, merged.title) == ("DOWN: job", "UP: job")
    assert "08:00:00" not in merged.body


def test_an_up_after_a_down_that_was_told_says_how_long_it_lasted(offline, phone):
    phone.answer = True
    offline.ping("job", "fail")
    live(offline, 2 * HOUR, step=MINUTE)
    offline.ping("job")
    live(offline)
    assert "job is up again, after 2 h down" in phone.bodies()[-1]


def test_merging_outlives_crashes_and_leaves_other_monitors_their_place(offline, phone):
    offline.ping("job", "fail")
    live(offline)
    offline.restart(SECOND, crash=True)
    offline.ping("two", "fail")
    live(offline)
    offline.restart(SECOND, crash=True)
    offline.ping("job")
    offline.restart(SECOND, crash=True)
    phone.answer = True
    live(offline, 2 * MINUTE)
    told = "\n".join(phone.bodies())
    assert re.search("job was down from .* and is up again", told)
    assert "two is down" in told
    assert told.count("job was down") == told.count("two is down") == 1


def test_each_channel_merges_what_it_has_not_sent_itself(house, phone):
    bad = Phone("bad", answer=False)
    larm = house(channels(phone, bad) + monitor("job", "1d"))
    larm.ping("job", "fail")
    live(larm)
    larm.ping("job")
    live(larm)
    bad.answer = True
    live(larm, MINUTE)
    assert phone.titles() == ["DOWN: job", "UP: job"]
    assert bad.titles() == ["UP: job"]
    assert "was down from" in bad.bodies()[0]


# Pauses and changes of the file


@pytest.mark.parametrize("wait", [1, 20])
@pytest.mark.parametrize("how", ["paused", "paused for a time", "disabled", "removed"])
def test_what_happened_before_a_monitor_was_paused_or_removed_is_told(offline, phone, how, wait):
    phone.answer = wait == 1
    offline.ping("job", "fail")
    live(offline, wait * SECOND)
    if how.startswith("paused"):
        offline.pause("job", "1m" if how == "paused for a time" else None)
    elif how == "disabled":
        offline.save(offline.text.replace("[monitors.job]", "[monitors.job]\nenabled = false"))
    else:
        offline.save(channels(phone) + monitor("two", "1d"))
    phone.answer = True
    live(offline, 5 * MINUTE)
    assert phone.titles() == ["DOWN: job"]
    assert states(offline) == ["sent"]


@pytest.mark.parametrize("how", ["paused", "disabled", "removed"])
def test_what_is_not_watched_begins_no_new_alert(offline, phone, how):
    phone.answer = True
    offline.ping("job")
    if how == "paused":
        offline.pause("job")
    elif how == "disabled":
        offline.save(offline.text.replace("[monitors.job]", "[monitors.job]\nenabled = false"))
    else:
        offline.save(channels(phone) + monitor("two", "1d"))
    live(offline, MINUTE)
    if how == "removed":
        offline.ask(f"/api/heartbeat/{offline.tokens['job']}/fail")
    else:
        offline.ping("job", "fail")
    live(offline, 3 * DAY, step=10 * MINUTE)
    assert phone.messages == []


# Whatever happens


@settings(
    max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate], derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    history=st.lists(
        st.tuples(
            st.sampled_from(["", "fail", "wait", "restart", "crash", "refuse"]),
            st.integers(min_value=4, max_value=900),
        ),
        min_size=1, max_size=20,
    )
)  # fmt: skip
def test_no_two_alerts_in_a_row_say_the_same_of_a_monitor_and_the_last_is_right(phone, history):
    phone.messages.clear()
    with tempfile.TemporaryDirectory() as folder:
        larm = House(Path(folder), channels(phone) + monitor("job"))
        try:
            for what, seconds in history:
                phone.answer = what != "refuse"
                if what in ("restart", "crash"):
                    larm.restart(seconds * SECOND, crash=what == "crash")
                elif what in ("", "fail"):
                    larm.ping("job", what)
                live(larm, 4 * SECOND, step=4 * SECOND)
                if what not in ("restart", "crash"):
                    live(larm, seconds * SECOND, step=20 * SECOND)
            phone.answer = True
            live(larm, HOUR + 5 * MINUTE, step=MINUTE)
            said = [message.title.partition(":")[0] for message in phone.messages]
            bodies = ["", *phone.bodies()]
            for (was, now), (told, body) in zip(pairwise(["UP", *said]), pairwise(bodies),
                                                strict=True):
                merged = "was down" in body or "went down" in body
                assert was != now or merged or told.split(".")[0] != body.split(".")[0], said
            told = {"pending": "UP"}.get(larm.state("job"), larm.state("job").upper())
            assert [*(said or ["UP"])][-1] == told, said
            assert set(states(larm)) <= {"sent"}
        finally:
            larm.larm.store.close()
