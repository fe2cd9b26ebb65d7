"""What is told of a monitor and when: dependencies, reminders, flapping, digests, merging and
withdrawal.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import START, TOKEN, House, Webhook, wait_until
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import larm as program

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000


def channels(**urls: str) -> str:
    return "[channels]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())


def monitor(key: str, more: str = "", interval: str = "1m", grace: str = "10s") -> str:
    return f'[monitors.{key}]\ninterval = "{interval}"\ngrace = "{grace}"\n{more}\n'


def needs(*keys: str) -> str:
    return f"depends_on = {list(keys)}"


def deliver(larm: House, after_ms: int = 3 * SECOND, channel: str = "phone") -> None:
    """Let time pass, then send all that the channel has due."""
    larm.clock.advance(after_ms)
    while larm.notifier.attempt(channel):
        pass


def watch(
    larm: House, ms: int, step: int = 5_000, keep_up: str = "", channel: str = "phone"
) -> None:
    """Let time pass with a tick each step, sending what is due; the job `keep_up` pings at each."""
    end = larm.clock.monotonic() + ms
    while larm.clock.monotonic() < end:
        larm.clock.advance(min(step, end - larm.clock.monotonic()))
        if keep_up:
            larm.ping(keep_up)
        larm.tick()
        while larm.notifier.attempt(channel):
            pass


def flip(larm: House, key: str, times: int, each_ms: int = 5 * SECOND) -> None:
    """Down, up, down ..., told as far as Larm tells it."""
    for number in range(times):
        larm.ping(key, "" if number % 2 else "fail")
        watch(larm, each_ms)


def deliveries(larm: House, key: str) -> list[tuple[str, str, str | None]]:
    rows = larm.rows(
        "SELECT d.kind, d.state, d.error FROM deliveries d JOIN events e ON e.id = d.event_id "
        "JOIN monitors m ON m.id = e.monitor_id WHERE m.key = ? ORDER BY d.id", key
    )
    return [(row["kind"], row["state"], row["error"]) for row in rows]


def change_watching(larm: House, key: str, verb: str, span: int | None = None) -> None:
    larm.store.write(
        lambda db: program.pause_or_resume(
            db, larm.config.monitors[key], verb, span, larm.clock.now()
        )
    )


def sent_at(larm: House, key: str) -> int:
    [row] = larm.rows(
        "SELECT d.at FROM deliveries d JOIN events e ON e.id = d.event_id "
        "JOIN monitors m ON m.id = e.monitor_id WHERE m.key = ? AND d.state = 'sent'", key
    )
    return int(row["at"])


# depends_on


@pytest.fixture
def network(house, webhook) -> House:
    """A router, and a job behind it whose ping is due before and after the router's."""
    return house(
        channels(phone=webhook.url)
        + monitor("router")
        + monitor("early", needs("router"), interval="30s")
        + monitor("late", needs("router"), interval="2m")
    )


def start_all(larm: House) -> None:
    for key in larm.watched:
        larm.ping(key)
    larm.clock.advance(7)  # no tick falls on a deadline: that has a test of its own


def test_a_router_s_alert_is_the_only_one_and_names_what_depends_on_it(network, webhook):
    start_all(network)
    watch(network, 10 * MINUTE)
    [alert] = webhook.alerts
    assert alert["title"] == "DOWN: router"
    assert "2 monitors depend on it: early, late." in alert["message"]
    assert {event["key"] for event in network.events()} == {"router", "early", "late"}


def test_the_router_s_return_is_one_alert_where_all_are_back_in_time(network, webhook):
    start_all(network)
    watch(network, 10 * MINUTE)
    network.ping("router")
    watch(network, 20 * SECOND, keep_up="router")
    start_all(network)
    for _ in range(10):
        watch(network, 20 * SECOND)
        start_all(network)
    assert webhook.titles() == ["DOWN: router", "UP: router"]


def test_a_child_that_is_really_dead_has_its_own_alert_once_one_interval_after_the_return(
    network, webhook
):
    start_all(network)
    watch(network, 10 * MINUTE)
    back = network.clock.now()
    for _ in range(60):
        network.ping("router")
        network.ping("late")
        watch(network, 10 * SECOND)
    assert webhook.titles() == ["DOWN: router", "UP: router", "DOWN: early"]
    had_left = 0
    due_at = back + had_left + 30 * SECOND
    assert due_at + 3 * SECOND <= sent_at(network, "early") <= due_at + 8 * SECOND


def test_a_child_that_had_time_left_when_its_parent_went_has_that_too(network, webhook):
    start_all(network)
    watch(network, 10 * MINUTE)  # "late" was due 60 s after the router
    back = network.clock.now()
    for _ in range(60):
        network.ping("router")
        network.ping("early")
        watch(network, 10 * SECOND)
    assert webhook.titles() == ["DOWN: router", "UP: router", "DOWN: late"]
    had_left = 60 * SECOND
    due_at = back + had_left + 2 * MINUTE
    assert due_at + 3 * SECOND <= sent_at(network, "late") <= due_at + 8 * SECOND


def test_a_child_whose_ping_was_not_due_while_its_parent_was_away_alerts_as_ever(network, webhook):
    start_all(network)
    watch(network, 71 * SECOND)
    assert network.state("router") == "down"
    watch(network, 10 * SECOND)
    for _ in range(12):  # back before "late" is due
        network.ping("router")
        network.ping("early")
        watch(network, 10 * SECOND)
    assert network.events("late")[0]["at"] == START + 130 * SECOND
    assert webhook.titles()[-1] == "DOWN: late"
    detection = 70 * SECOND  # of the router
    assert sent_at(network, "late") <= START + 130 * SECOND + detection


def test_a_child_that_waits_for_news_of_its_parent_is_told_once_the_parent_is_heard_of(
    house, webhook
):
    larm = house(
        channels(phone=webhook.url) + monitor("nas", interval="1d", grace="1h")
        + monitor("job", needs("nas"))
    )
    larm.ping("nas")
    watch(larm, MINUTE)
    larm.ping("job", "fail")
    watch(larm, MINUTE)
    assert webhook.alerts == []
    larm.ping("nas")  # it is up: there is nothing left to wait for
    watch(larm, 2 * MINUTE)
    assert webhook.titles() == ["DOWN: job"]


def test_a_child_of_a_parent_that_is_up_and_was_heard_of_since_alerts_at_once(network, webhook):
    start_all(network)
    watch(network, 45 * SECOND, keep_up="router")
    assert webhook.titles() == ["DOWN: early"]


def test_a_child_of_a_parent_that_was_never_pinged_alerts_as_ever(network, webhook):
    network.ping("early")
    watch(network, 45 * SECOND)
    assert webhook.titles() == ["DOWN: early"]


def test_a_child_of_a_paused_parent_alerts_as_ever(network, webhook):
    start_all(network)
    change_watching(network, "router", "pause")
    watch(network, 45 * SECOND)
    assert webhook.titles() == ["DOWN: early"]


def test_a_child_whose_parent_is_paused_while_both_are_down_is_told_within_a_minute(
    network, webhook
):
    start_all(network)
    watch(network, 10 * MINUTE)
    change_watching(network, "router", "pause")
    watch(network, 70 * SECOND)
    assert webhook.titles() in (
        ["DOWN: router", "DOWN: early", "DOWN: late"], ["DOWN: router", "DOWN: 2 monitors"]
    )


def test_children_that_are_told_at_once_since_their_parent_is_paused_are_one_message(
    network, webhook
):
    start_all(network)
    watch(network, 10 * MINUTE)
    change_watching(network, "router", "pause")
    watch(network, 70 * SECOND)
    assert webhook.titles() == ["DOWN: router", "DOWN: 2 monitors"]


def test_a_child_that_no_longer_depends_on_a_parent_that_is_down_is_told_within_a_minute(
    network, webhook
):
    start_all(network)
    watch(network, 10 * MINUTE)
    network.reload(network.text.replace("depends_on = ['router']", "", 1))
    watch(network, 65 * SECOND)
    assert webhook.titles() == ["DOWN: router", "DOWN: early"]


def test_a_child_that_went_down_just_before_its_parent_sends_no_alert(network, webhook):
    start_all(network)
    watch(network, 65 * SECOND)
    assert network.state("early") == "down"
    assert webhook.alerts == []
    watch(network, 30 * SECOND)
    assert webhook.titles() == ["DOWN: router"]


def test_a_child_that_failed_just_before_its_parent_sends_no_alert(network, webhook):
    start_all(network)
    watch(network, 20 * SECOND)
    network.ping("late", "fail")
    watch(network, 3 * MINUTE)
    assert webhook.titles() == ["DOWN: router"]


@pytest.mark.parametrize("first", ["router", "child"])
def test_a_child_with_the_same_deadline_as_its_parent_sends_no_alert(house, webhook, first):
    tables = {"router": monitor("router"), "child": monitor("child", needs("router"))}
    second = "child" if first == "router" else "router"
    larm = house(channels(phone=webhook.url) + tables[first] + tables[second])
    larm.ping(first)
    larm.ping(second)  # in the same millisecond
    watch(larm, 5 * MINUTE)
    assert webhook.titles() == ["DOWN: router"]


def test_a_tick_at_the_very_deadline_of_the_parent_tells_nothing_of_the_child(network, webhook):
    """The parent is down only 1 ms later: whoever waits for it waits that long, too."""
    for key in network.watched:
        network.ping(key)
    watch(network, 69 * SECOND)
    network.clock.advance(1 * SECOND)
    assert network.monitor("router")["deadline_at"] == network.clock.now()
    network.tick()
    watch(network, 5 * MINUTE)
    assert webhook.titles() == ["DOWN: router"]


def test_a_child_that_is_told_before_its_parent_goes_down_is_told_to_be_up_as_ever(
    network, webhook
):
    start_all(network)
    watch(network, 45 * SECOND, keep_up="router")
    watch(network, 2 * MINUTE)
    network.ping("early")
    watch(network, 5 * SECOND)
    assert webhook.titles() == ["DOWN: early", "DOWN: router", "UP: early"]


def test_a_child_that_was_never_told_to_be_down_is_not_told_to_be_up(network, webhook):
    start_all(network)
    watch(network, 10 * MINUTE)
    network.ping("early")
    network.ping("late")
    watch(network, 20 * SECOND)
    assert webhook.titles() == ["DOWN: router"]


def test_a_parent_that_goes_down_again_holds_its_children_again(network, webhook):
    start_all(network)
    watch(network, 10 * MINUTE)
    network.ping("router")
    watch(network, 15 * SECOND)
    network.ping("router", "fail")
    watch(network, 10 * MINUTE)
    assert webhook.titles() == ["DOWN: router", "UP: router", "DOWN: router"]


def test_a_restart_while_a_child_is_held_changes_nothing(network, webhook):
    start_all(network)
    watch(network, 10 * MINUTE)
    network.restart(5 * MINUTE, crash=True)
    watch(network, 2 * MINUTE)
    assert webhook.titles() == ["DOWN: router"]
    for _ in range(20):
        network.ping("router")
        network.ping("late")
        watch(network, 10 * SECOND)
    assert webhook.titles() == ["DOWN: router", "UP: router", "DOWN: early"]


def test_a_gap_while_a_child_is_held_after_the_return_gives_it_that_time_back(network, webhook):
    start_all(network)
    watch(network, 10 * MINUTE)
    network.ping("router")
    network.ping("late")
    watch(network, 10 * SECOND)
    network.restart(HOUR // 2)
    watch(network, 19 * SECOND, keep_up="router")
    assert "DOWN: early" not in webhook.titles()
    watch(network, 5 * SECOND, keep_up="router")
    assert "DOWN: early" in webhook.titles()


def test_grandchildren_are_held_and_named_too(house, webhook):
    larm = house(
        channels(phone=webhook.url) + monitor("router") + monitor("nas", needs("router"))
        + monitor("backup", needs("nas"), interval="2m")
    )
    start_all(larm)
    watch(larm, 69 * SECOND)
    watch(larm, 10 * MINUTE, keep_up="nas")
    assert "2 monitors depend on it: nas, backup." in webhook.alerts[0]["message"]
    assert webhook.titles() == ["DOWN: router"]


def test_a_child_of_two_parents_waits_for_both(house, webhook):
    larm = house(
        channels(phone=webhook.url) + monitor("one") + monitor("two", interval="50s")
        + monitor("child", needs("one", "two"), interval="90s")
    )
    start_all(larm)
    watch(larm, 10 * MINUTE)
    for _ in range(30):
        larm.ping("one")
        watch(larm, 10 * SECOND)
    assert webhook.titles() == ["DOWN: two", "DOWN: one", "UP: one"]
    for _ in range(30):
        larm.ping("one")
        larm.ping("two")
        watch(larm, 10 * SECOND)
    assert webhook.titles()[3:] == ["UP: two", "DOWN: child"]


def test_a_router_with_30_children_is_one_alert_each_way_and_a_dead_child_its_own_once(
    house, webhook
):
    children = [f"child-{number:02}" for number in range(30)]
    larm = house(
        channels(phone=webhook.url) + monitor("router")
        + "".join(monitor(key, needs("router")) for key in children)
    )
    for key in [*children[:15], "router", *children[15:]]:
        larm.ping(key)
        larm.clock.advance(20)
    watch(larm, 10 * MINUTE, step=500)
    for _ in range(20):
        larm.ping("router")
        for key in children[1:]:
            larm.ping(key)
        watch(larm, 15 * SECOND, step=500)
    assert webhook.titles() == ["DOWN: router", "UP: router", "DOWN: child-00"]
    message = webhook.alerts[0]["message"]
    assert "30 monitors depend on it: " in message
    assert "and 10 more." in message


def test_what_was_held_for_a_parent_does_not_claim_that_it_could_not_be_delivered(
    network, webhook
):
    start_all(network)
    watch(network, 30 * MINUTE)
    for _ in range(12):
        network.ping("router")
        network.ping("late")
        watch(network, 10 * SECOND)
    assert webhook.titles()[-1] == "DOWN: early"
    assert "could not be delivered" not in webhook.alerts[-1]["message"]


# remind


@pytest.fixture
def reminded(house, webhook) -> House:
    return house(channels(phone=webhook.url) + monitor("job", 'remind = "1h"'))


def test_a_monitor_that_stays_down_is_reminded_of_each_time_with_how_long_it_lasts(
    reminded, webhook
):
    reminded.ping("job", "fail")
    watch(reminded, 3 * HOUR + MINUTE, step=SECOND * 10)
    assert webhook.titles() == ["DOWN: job"] + ["STILL DOWN: job"] * 3
    assert {alert["type"] for alert in webhook.alerts[1:]} == {"warning"}
    for hours, alert in enumerate(webhook.alerts[1:], 1):
        assert f"job is still down, for {hours} h" in alert["message"]
        assert "http://127.0.0.1:5276/monitor/job" in alert["message"]


def test_there_is_no_reminder_after_the_recovery(reminded, webhook):
    reminded.ping("job", "fail")
    watch(reminded, MINUTE)
    for _ in range(200):
        reminded.ping("job")
        watch(reminded, MINUTE, step=MINUTE)
    assert webhook.titles() == ["DOWN: job", "UP: job"]


def test_there_is_no_reminder_without_remind(house, webhook):
    larm = house(channels(phone=webhook.url) + monitor("job"))
    larm.ping("job", "fail")
    watch(larm, 2 * DAY, step=10 * MINUTE)
    assert webhook.titles() == ["DOWN: job"]


def test_reminders_go_to_every_channel_of_the_monitor(house, webhooks):
    one, two = webhooks(), webhooks()
    larm = house(channels(phone=one.url, mail=two.url) + monitor("job", 'remind = "1h"'))
    larm.ping("job", "fail")
    for _ in range(70):
        watch(larm, MINUTE, step=10 * SECOND)
        while larm.notifier.attempt("mail"):
            pass
    assert one.titles() == two.titles() == ["DOWN: job", "STILL DOWN: job"]


def test_reminders_of_several_monitors_are_one_message(house, webhook):
    larm = house(
        channels(phone=webhook.url) + '[defaults]\nremind = "1h"\n'
        + monitor("one") + monitor("two")
    )
    larm.ping("one", "fail")
    larm.ping("two", "fail")
    watch(larm, HOUR + MINUTE, step=10 * SECOND)
    assert webhook.titles() == ["DOWN: 2 monitors", "STILL DOWN: 2 monitors"]


def test_a_reminder_and_another_alert_within_3_s_are_one_message(house, webhook):
    larm = house(
        channels(phone=webhook.url) + monitor("one", 'remind = "1h"') + monitor("two")
    )
    larm.ping("one", "fail")
    watch(larm, HOUR)
    larm.ping("two", "fail")
    watch(larm, MINUTE)
    assert webhook.titles() == ["DOWN: one", "DOWN: two, STILL DOWN: one"]


@pytest.mark.parametrize("crash", [False, True])
def test_a_reminder_waits_for_the_time_that_larm_was_off(reminded, webhook, crash):
    reminded.ping("job", "fail")
    watch(reminded, HOUR // 2, step=10 * SECOND)
    reminded.restart(10 * HOUR, crash=crash)
    watch(reminded, HOUR // 2 - MINUTE, step=10 * SECOND)
    told = [title for title in webhook.titles() if not title.startswith("LARM")]
    assert told == ["DOWN: job"]
    watch(reminded, 3 * MINUTE, step=10 * SECOND)
    told = [title for title in webhook.titles() if not title.startswith("LARM")]
    assert told == ["DOWN: job", "STILL DOWN: job"]


@pytest.mark.parametrize("by", [-10 * HOUR, 10 * HOUR])
def test_a_clock_that_is_set_neither_hurries_nor_delays_a_reminder(reminded, webhook, by):
    reminded.ping("job", "fail")
    watch(reminded, HOUR // 2, step=10 * SECOND)
    reminded.clock.set_wall(by)
    watch(reminded, HOUR // 2 - MINUTE, step=10 * SECOND)
    assert "STILL DOWN: job" not in webhook.titles()
    watch(reminded, 2 * MINUTE, step=10 * SECOND)
    assert webhook.titles().count("STILL DOWN: job") == 1


def test_a_pause_silences_the_reminders(reminded, webhook):
    reminded.ping("job", "fail")
    watch(reminded, 10 * SECOND)
    change_watching(reminded, "job", "pause")
    watch(reminded, DAY, step=MINUTE)
    assert webhook.titles() == ["DOWN: job"]


def test_a_monitor_that_is_resumed_while_down_is_told_anew_if_it_stays_silent(reminded, webhook):
    reminded.ping("job", "fail")
    watch(reminded, 10 * SECOND)
    change_watching(reminded, "job", "pause", 2 * HOUR)
    watch(reminded, 2 * HOUR + 65 * SECOND)
    assert webhook.titles() == ["DOWN: job"]
    watch(reminded, 20 * SECOND)
    assert webhook.titles() == ["DOWN: job", "DOWN: job"]


def test_a_reminder_that_is_added_to_the_file_counts_for_what_is_down(house, webhook):
    text = channels(phone=webhook.url) + monitor("job")
    larm = house(text)
    larm.ping("job", "fail")
    watch(larm, 2 * HOUR, step=10 * SECOND)
    larm.reload(text + 'remind = "1h"\n')
    watch(larm, HOUR + 2 * MINUTE, step=10 * SECOND)
    assert webhook.titles() == ["DOWN: job", "STILL DOWN: job"]


def test_a_reminder_that_is_removed_from_the_file_ends(reminded, webhook):
    reminded.ping("job", "fail")
    watch(reminded, HOUR + MINUTE, step=10 * SECOND)
    reminded.reload(reminded.text.replace('remind = "1h"', ""))
    watch(reminded, 5 * HOUR, step=10 * SECOND)
    assert webhook.titles() == ["DOWN: job", "STILL DOWN: job"]


def test_reminders_that_could_not_be_sent_are_one(reminded, webhook):
    reminded.ping("job", "fail")
    watch(reminded, MINUTE)
    webhook.answer = 500
    watch(reminded, 5 * HOUR, step=10 * SECOND)
    webhook.answer = 200
    watch(reminded, 65 * MINUTE, step=10 * SECOND)
    assert webhook.titles()[0:2] == ["DOWN: job", "STILL DOWN: job"]
    assert len(webhook.alerts) <= 4  # the late one and those of the hour in which it came
    assert re.search(r"still down, for [56] h", webhook.alerts[1]["message"])


def test_a_monitor_is_not_reminded_of_while_one_that_it_depends_on_is_down(house, webhook):
    larm = house(
        channels(phone=webhook.url) + monitor("router")
        + monitor("job", needs("router") + '\nremind = "10m"')
    )
    larm.ping("router")
    watch(larm, SECOND)
    larm.ping("job", "fail")
    watch(larm, 30 * SECOND, keep_up="router")
    watch(larm, HOUR, step=10 * SECOND)
    assert webhook.titles() == ["DOWN: job", "DOWN: router"] or webhook.titles() == ["DOWN: router"]


# Flapping


@pytest.fixture
def flapping(house, webhook) -> House:
    """A job that has just been told to be flapping: its 7th change within 10 minutes."""
    larm = house(channels(phone=webhook.url) + monitor("job"))
    flip(larm, "job", 7)
    assert webhook.titles()[-1] == "FLAPPING: job"
    return larm


@pytest.mark.usefixtures("flapping")
def test_more_than_6_changes_within_10_intervals_are_one_alert_that_it_is_flapping(webhook):
    assert webhook.titles() == ["DOWN: job", "UP: job"] * 3 + ["FLAPPING: job"]
    assert webhook.alerts[-1]["type"] == "warning"
    assert "job is flapping" in webhook.alerts[-1]["message"]
    assert "for 3 min" in webhook.alerts[-1]["message"]


def test_6_changes_within_10_intervals_are_no_flapping(house, webhook):
    larm = house(channels(phone=webhook.url) + monitor("job"))
    flip(larm, "job", 6)
    assert webhook.titles() == ["DOWN: job", "UP: job"] * 3


def test_7_changes_in_more_than_10_intervals_are_no_flapping(house, webhook):
    larm = house(channels(phone=webhook.url) + monitor("job", interval="1m", grace="1h"))
    flip(larm, "job", 10, each_ms=101 * SECOND)
    assert webhook.titles() == ["DOWN: job", "UP: job"] * 5


def test_a_flapping_monitor_is_not_told_of_until_it_has_settled(flapping, webhook):
    flip(flapping, "job", 31, each_ms=20 * SECOND)
    assert webhook.titles()[7:] == []
    assert len(flapping.events("job")) > 30


@pytest.mark.parametrize("state", ["UP", "DOWN"])
def test_a_monitor_that_has_held_one_state_for_3_intervals_has_settled_in_it(
    flapping, webhook, state
):
    if state == "UP":
        flapping.ping("job")
    for _ in range(17):
        watch(flapping, 10 * SECOND)
        if state == "UP":
            flapping.ping("job")
    assert webhook.titles()[7:] == []
    for _ in range(30):
        watch(flapping, 10 * SECOND)
        if state == "UP":
            flapping.ping("job")
    assert webhook.titles()[7:] == [f"{state}: job"]
    assert f"has stopped flapping: it has been {state.lower()} since" in (
        webhook.alerts[-1]["message"]
    )


def test_a_restart_does_not_end_the_silence_about_a_flapping_monitor(flapping, webhook):
    flip(flapping, "job", 4)
    flapping.restart(HOUR // 2, crash=True)
    flip(flapping, "job", 5, each_ms=20 * SECOND)
    assert webhook.titles()[7:] == []


def test_a_pause_ends_the_flapping(flapping, webhook):
    change_watching(flapping, "job", "pause")
    watch(flapping, HOUR, step=10 * SECOND)
    change_watching(flapping, "job", "resume")
    watch(flapping, 75 * SECOND)
    assert webhook.titles()[7:] == ["DOWN: job"]


def test_a_settled_monitor_s_alert_does_not_claim_that_it_could_not_be_delivered(house, webhook):
    larm = house(channels(phone=webhook.url) + monitor("job", interval="10m"))
    flip(larm, "job", 7)
    watch(larm, HOUR, step=10 * SECOND)
    assert webhook.titles()[6:] == ["FLAPPING: job", "DOWN: job"]
    assert "could not be delivered" not in webhook.alerts[-1]["message"]


def test_a_channel_that_missed_the_flapping_hears_in_which_state_it_settled(house, webhook):
    larm = house(channels(phone=webhook.url) + monitor("job"))
    flip(larm, "job", 6)
    webhook.answer = 500
    larm.ping("job", "fail")  # the 7th: its alert stays unsent till after it has settled
    watch(larm, 10 * MINUTE)
    assert webhook.titles()[6:] == []
    webhook.answer = 200
    watch(larm, HOUR, step=10 * SECOND)
    assert "DOWN: job" in webhook.titles()[6:]
    assert len(webhook.titles()[6:]) <= 2


# Digests


def test_a_digest_counts_what_it_lists_by_kind(house, webhook):
    larm = house(channels(phone=webhook.url) + "".join(monitor(key) for key in "abcde"))
    larm.ping("d", "fail")
    larm.ping("e", "fail")
    deliver(larm)
    webhook.alerts.clear()
    for key in "abc":
        larm.ping(key, "fail")
    larm.ping("d")
    larm.ping("e")
    deliver(larm)
    assert webhook.titles() == ["DOWN: 3 monitors, UP: 2 monitors"]
    assert webhook.alerts[0]["type"] == "failure"
    text = webhook.alerts[0]["message"]
    assert [key for key in "abcde" if f"/monitor/{key}" in text] == list("abcde")


@pytest.mark.parametrize("room", [150, 300, 500, 1_000, 3_000, 10_000, 32_000])
def test_a_digest_keeps_to_the_channel_s_room_and_says_how_many_more_there_are(
    house, webhook, monkeypatch, room
):
    monkeypatch.setattr(program, "room", lambda _: room)
    keys = [f"job-{number:03}" for number in range(200)]
    larm = house(channels(phone=webhook.url) + "".join(monitor(key) for key in keys))
    for key in keys:
        larm.ping(key, "fail")
    deliver(larm)
    [alert] = webhook.alerts
    assert alert["title"] == "DOWN: 200 monitors"
    assert len(alert["message"]) <= room
    named = list(dict.fromkeys(re.findall(r"job-\d{3}", alert["message"])))
    more = re.search(r"And (\d+) more: http://127.0.0.1:5276/$", alert["message"])
    assert len(named) + (int(more[1]) if more else 0) == 200
    assert named == keys[: len(named)]


def test_501_monitors_and_more_are_all_told(house, webhook):
    keys = [f"job-{number:04}" for number in range(1_203)]
    larm = house(channels(phone=webhook.url) + "".join(monitor(key) for key in keys))
    for key in keys:
        larm.ping(key)
    watch(larm, 100 * SECOND)
    text = "".join(alert["message"] for alert in webhook.alerts)
    assert all(key in text for key in keys)
    assert len(webhook.alerts) <= 3


# Merging


@pytest.fixture
def cut_off(house, webhook) -> House:
    """A job whose alerts no channel takes till the webhook answers 200."""
    webhook.answer = 500
    return house(channels(phone=webhook.url) + monitor("job", grace="1d"))


def outage(larm: House, webhook: Webhook, *spans: int) -> None:
    """Down, up, down, ... for so long each, while nothing can be sent; then it can."""
    for number, ms in enumerate(spans):
        larm.ping("job", "" if number % 2 else "fail")
        deliver(larm, 3 * SECOND)
        larm.clock.advance(ms - 3 * SECOND)
    webhook.answer = 200
    deliver(larm, 2 * HOUR)


def test_several_unsent_flips_are_one_message_with_how_often_and_since_when(cut_off, webhook):
    outage(cut_off, webhook, 10 * MINUTE, 5 * MINUTE, 20 * MINUTE, 5 * MINUTE)
    [alert] = webhook.alerts
    assert alert["title"] == "UP: job"
    assert ("job was down 2 times from 2027-01-15 08:00:00+00:00 to 2027-01-15 08:35:00+00:00, "
            "the last time for 20 min, and is up again.") in alert["message"]
    assert "This alert is late" in alert["message"]


def test_unsent_flips_that_end_down_are_one_message_that_it_is_down(cut_off, webhook):
    outage(cut_off, webhook, 10 * MINUTE, 5 * MINUTE, 20 * MINUTE)
    [alert] = webhook.alerts
    assert alert["title"] == "DOWN: job"
    assert "2027-01-15 08:15:00+00:00" in alert["message"]


def test_a_down_that_was_told_counts_for_none_of_the_unsent_ones(house, webhook):
    larm = house(channels(phone=webhook.url) + monitor("job", grace="1d"))
    larm.ping("job", "fail")
    deliver(larm)
    webhook.answer = 500
    larm.clock.advance(2 * HOUR - 3 * SECOND)
    larm.ping("job")
    deliver(larm)
    larm.clock.advance(10 * MINUTE - 3 * SECOND)
    outage(larm, webhook, MINUTE, MINUTE)
    told, merged = webhook.alerts
    assert (told["title"], merged["title"]) == ("DOWN: job", "UP: job")
    assert ("was down from 2027-01-15 10:10:00+00:00 to 2027-01-15 10:11:00+00:00, for 1 min, "
            "and is up again.") in merged["message"]


def test_an_up_after_a_down_that_was_told_says_how_long_it_lasted(house, webhook):
    larm = house(channels(phone=webhook.url) + monitor("job"))
    larm.ping("job", "fail")
    deliver(larm)
    larm.clock.advance(2 * HOUR - 3 * SECOND)
    larm.ping("job")
    deliver(larm)
    assert "job is up again, after 2 h down" in webhook.alerts[-1]["message"]


def test_other_monitors_keep_their_place_among_merged_ones(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitor("one") + monitor("two"))
    larm.ping("one", "fail")
    deliver(larm)
    larm.ping("two", "fail")
    larm.ping("one")
    webhook.answer = 200
    deliver(larm, MINUTE)
    [alert] = webhook.alerts
    assert alert["title"] == "DOWN: two, UP: one"
    assert alert["message"].index("two is down") < alert["message"].index("one was down")


def test_a_down_and_its_up_are_merged_after_a_crash_too(cut_off, webhook):
    cut_off.ping("job", "fail")
    deliver(cut_off)
    cut_off.restart(MINUTE, crash=True)
    cut_off.ping("job")
    cut_off.restart(MINUTE, crash=True)
    webhook.answer = 200
    deliver(cut_off, MINUTE)
    assert webhook.titles() == ["UP: job"]


def test_each_channel_merges_what_it_has_not_sent_itself(house, webhooks):
    good, bad = webhooks(), webhooks()
    bad.answer = 500
    larm = house(channels(phone=good.url, bad=bad.url) + monitor("job"))
    larm.ping("job", "fail")
    deliver(larm)
    deliver(larm, 0, "bad")
    larm.ping("job")
    deliver(larm)
    bad.answer = 200
    deliver(larm, MINUTE, "bad")
    assert good.titles() == ["DOWN: job", "UP: job"]
    assert bad.titles() == ["UP: job"]
    assert "was down from" in bad.alerts[0]["message"]


# Withdrawal


def test_pausing_a_monitor_withdraws_what_could_not_yet_be_sent(cut_off, webhook):
    cut_off.ping("job", "fail")
    deliver(cut_off)
    change_watching(cut_off, "job", "pause")
    webhook.answer = 200
    deliver(cut_off, DAY)
    assert webhook.alerts == []
    assert deliveries(cut_off, "job") == [
        ("change", "failed", "withdrawn: the monitor was paused")
    ]


def test_disabling_a_monitor_withdraws_what_could_not_yet_be_sent(cut_off, webhook):
    cut_off.ping("job", "fail")
    deliver(cut_off)
    cut_off.reload(cut_off.text + "enabled = false\n")
    webhook.answer = 200
    deliver(cut_off, DAY)
    assert webhook.alerts == []
    assert deliveries(cut_off, "job") == [
        ("change", "failed", "withdrawn: the monitor was disabled")
    ]


def test_what_could_not_yet_be_sent_of_a_monitor_that_is_removed_is_sent(cut_off, webhook):
    cut_off.ping("job", "fail")
    deliver(cut_off)
    cut_off.reload(cut_off.text.partition("[monitors")[0] + monitor("another"))
    webhook.answer = 200
    deliver(cut_off, HOUR)
    assert webhook.titles() == ["DOWN: job"]


def test_what_is_withdrawn_of_one_monitor_leaves_the_others_be(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitor("one") + monitor("two"))
    larm.ping("one", "fail")
    larm.ping("two", "fail")
    deliver(larm)
    change_watching(larm, "one", "pause")
    webhook.answer = 200
    deliver(larm, MINUTE)
    assert webhook.titles() == ["DOWN: two"]


def test_a_monitor_that_is_put_back_while_down_was_told_of_once(cut_off, webhook):
    cut_off.ping("job", "fail")
    deliver(cut_off)
    text = cut_off.text
    cut_off.reload(text.partition("[monitors")[0] + monitor("another"))
    webhook.answer = 200
    deliver(cut_off, HOUR)
    cut_off.reload(text)
    watch(cut_off, 2 * MINUTE)
    cut_off.ping("job")
    watch(cut_off, MINUTE)
    assert webhook.titles() == ["DOWN: job", "UP: job"]


# Whatever happens


@settings(
    max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    history=st.lists(
        st.tuples(
            st.sampled_from(["", "fail", "wait", "restart", "crash"]),
            st.integers(min_value=4, max_value=400),
        ),
        min_size=1, max_size=25,
    )
)
def test_no_two_alerts_in_a_row_say_the_same_of_a_monitor_and_the_last_is_right(
    webhook, history
):
    """Of a monitor without parents, reminders or lost messages; flapping is told once a time."""
    webhook.alerts.clear()
    with tempfile.TemporaryDirectory() as folder:
        larm = House(Path(folder), channels(phone=webhook.url) + monitor("job"))
        try:
            for what, seconds in history:
                if what in ("restart", "crash"):
                    larm.restart(seconds * SECOND, crash=what == "crash")
                elif what != "wait":
                    larm.ping("job", what)
                watch(larm, 4 * SECOND, step=4 * SECOND)
                if what in ("wait", "fail", ""):
                    watch(larm, seconds * SECOND, step=5 * SECOND)
            told = [title.partition(":")[0] for title in webhook.titles()]
            known = "UP"
            for now in told:
                assert now != known or "FLAPPING" in told, told
                known = now
            for before, now in pairwise(told):
                assert before != now or {before, now} <= {"UP", "DOWN"}, told
            events = [event["type"].upper() for event in larm.events("job")]
            if "FLAPPING" not in told:
                assert told == events
            watch(larm, 10 * MINUTE, step=5 * SECOND)
            told = [title.partition(":")[0] for title in webhook.titles()]
            state = {"pending": "UP"}.get(larm.state("job"), larm.state("job").upper())
            assert (told or ["UP"])[-1] == state, told
        finally:
            larm.store.close()


def test_500_monitors_that_fall_silent_together_are_one_message_a_channel_within_5_s(
    start, webhooks
):
    one, two = webhooks(), webhooks()
    keys = [f"job-{number:03}" for number in range(500)]
    larm = start(
        channels(one=one.url, two=two.url)
        + "".join(monitor(key, f'token = "{TOKEN}-{key}"', "1d") for key in keys)
    )
    for key in keys:
        larm.ping(f"{TOKEN}-{key}")
    deadline = int((time.time() + 1.5) * 1_000)  # theirs were spread over the pings
    with contextlib.closing(sqlite3.connect(larm.folder / "larm.db", timeout=10)) as db, db:
        db.execute("UPDATE monitors SET expected_at = :at, deadline_at = :at", {"at": deadline})
    wait_until(lambda: one.alerts and two.alerts)
    for webhook in (one, two):
        assert webhook.titles() == ["DOWN: 500 monitors"]
        assert all(key in webhook.alerts[0]["message"] for key in keys)
        assert webhook.arrived[0] - deadline / 1_000 <= 5
