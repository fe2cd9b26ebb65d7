"""Law 6: an alert arrives at least once, and no channel waits for another."""

from __future__ import annotations

import re
import threading

import apprise
import pytest
from conftest import START, House, Webhook, wait_until

import larm as program

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
ALL_PAUSES = [10 * SECOND, 30 * SECOND, MINUTE, 5 * MINUTE, 15 * MINUTE, HOUR, HOUR, HOUR]


def channels(**urls: str) -> str:
    return "[channels]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())


def monitors(*keys: str) -> str:
    return "".join(f'[monitors.{key}]\ninterval = "1m"\ngrace = "10s"\n' for key in keys)


def deliveries(larm: House, channel: str = "phone") -> list[tuple[str, int]]:
    rows = larm.rows(
        "SELECT state, attempts FROM deliveries WHERE channel = ? ORDER BY id", channel
    )
    return [(row["state"], row["attempts"]) for row in rows]


def states(larm: House, channel: str = "phone") -> list[str]:
    return [state for state, _ in deliveries(larm, channel)]


def attempt_after(larm: House, ms: int) -> None:
    """Let time pass, then send all that the channel has due."""
    larm.clock.advance(ms)
    while larm.notifier.attempt("phone"):
        pass


def next_try(larm: House) -> int:
    """Milliseconds until then."""
    [row] = larm.rows("SELECT MIN(due_at) AS at FROM deliveries WHERE state = 'pending'")
    return int(row["at"]) - larm.clock.now()


# Sent means accepted


def test_an_accepted_alert_is_sent_and_stays_so(house, webhook):
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    attempt_after(larm, HOUR)
    assert deliveries(larm) == [("sent", 1)]
    assert webhook.titles() == ["DOWN: job"]


def test_a_refused_alert_stays_pending_with_the_reason(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    assert deliveries(larm) == [("pending", 1)]
    [row] = larm.rows("SELECT error FROM deliveries")
    assert "500" in row["error"]
    assert "hook" not in row["error"]


def test_a_refused_alert_arrives_once_it_is_accepted(house, webhook):
    webhook.answer = 503
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    webhook.answer = 200
    attempt_after(larm, 11 * SECOND)
    assert deliveries(larm) == [("sent", 2)]
    assert len(webhook.alerts) == 1


def test_the_pauses_grow_to_an_hour_with_up_to_a_tenth_of_jitter(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    for tried, pause in enumerate(ALL_PAUSES, 1):
        assert webhook.refused == tried
        assert pause <= next_try(larm) <= 1.1 * pause
        attempt_after(larm, next_try(larm) - 1)
        assert webhook.refused == tried
        attempt_after(larm, 1)


def test_after_3_days_of_refusals_a_delivery_has_failed(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    while states(larm) == ["pending"]:
        given_up_after = larm.clock.now() - START
        attempt_after(larm, next_try(larm))
    assert given_up_after <= 3 * DAY + 3 * SECOND < larm.clock.now() - START
    assert states(larm) == ["failed"]
    refused = webhook.refused
    attempt_after(larm, DAY)
    assert webhook.refused == refused


def test_what_came_later_is_tried_for_its_own_3_days(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("old", "new"))
    larm.ping("old", "fail")
    attempt_after(larm, 3 * SECOND)
    larm.clock.advance(2 * DAY)
    larm.ping("new", "fail")
    attempt_after(larm, 3 * SECOND)
    attempt_after(larm, DAY)
    assert states(larm) == ["failed", "pending"]
    webhook.answer = 200
    attempt_after(larm, HOUR * 2)
    assert states(larm) == ["failed", "sent"]
    assert webhook.titles() == ["DOWN: new"]


def test_a_clock_that_is_set_neither_delays_nor_hurries_a_retry(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    before = next_try(larm)
    for by in (-HOUR, 30 * DAY):
        larm.clock.set_wall(by)
        larm.tick()
        assert next_try(larm) == before
    attempt_after(larm, before)
    assert states(larm) == ["pending"]


@pytest.mark.parametrize(
    ("answer", "state"),
    [(True, "sent"), (False, "pending"), (None, "pending")],
)
def test_only_apprise_s_true_is_a_success(house, webhook, monkeypatch, answer, state):
    monkeypatch.setattr(apprise.Apprise, "notify", lambda *_, **__: answer)
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    assert states(larm) == [state]


@pytest.mark.parametrize("accepted", [True, False])
def test_an_object_of_apprise_counts_as_the_bool_that_it_is_like(
    house, webhook, monkeypatch, accepted
):
    class Result:
        def __bool__(self) -> bool:
            return accepted

    monkeypatch.setattr(apprise.Apprise, "notify", lambda *_, **__: Result())
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    assert states(larm) == ["sent" if accepted else "pending"]


def test_whatever_apprise_raises_is_a_refusal(house, webhook, monkeypatch):
    def fails(*_: object, **__: object) -> bool:
        raise RuntimeError("a plugin's fault")

    monkeypatch.setattr(apprise.Apprise, "notify", fails)
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    assert deliveries(larm) == [("pending", 1)]
    [row] = larm.rows("SELECT error FROM deliveries")
    assert row["error"] == "RuntimeError: a plugin's fault"


# Channels


def test_every_channel_of_the_monitor_gets_it(house, webhooks):
    one, two = webhooks(), webhooks()
    larm = house(channels(phone=one.url, mail=two.url) + monitors("job"))
    larm.ping("job", "fail")
    larm.clock.advance(3 * SECOND)
    larm.notifier.deliver_due()
    wait_until(lambda: states(larm) + states(larm, "mail") == ["sent", "sent"])
    assert one.titles() == two.titles() == ["DOWN: job"]


def test_a_monitor_s_alerts_go_to_its_own_channels_only(house, webhooks):
    one, two = webhooks(), webhooks()
    larm = house(
        channels(phone=one.url, mail=two.url) + monitors("job") + 'notify = ["phone"]\n'
        + monitors("quiet") + "notify = []\n"
    )
    larm.ping("job", "fail")
    larm.ping("quiet", "fail")
    larm.clock.advance(3 * SECOND)
    larm.notifier.deliver_due()
    wait_until(lambda: one.alerts)
    assert larm.rows("SELECT * FROM deliveries WHERE channel = 'mail'") == []
    assert one.titles() == ["DOWN: job"]


@pytest.mark.parametrize("trouble", ["hang", 500])
def test_a_channel_in_trouble_delays_no_other(house, webhooks, trouble):
    bad, good = webhooks(), webhooks()
    bad.answer = trouble
    larm = house(channels(bad=bad.url, good=good.url) + monitors("job", "other"))
    for number, key in enumerate(("job", "other"), 1):
        larm.ping(key, "fail")
        larm.clock.advance(3 * SECOND)
        larm.notifier.deliver_due()
        wait_until(lambda number=number: len(good.alerts) == number, seconds=3)
    assert bad.alerts == []
    assert "sent" not in states(larm, "bad")
    larm.notifier.stop(0)


def test_a_channel_that_hangs_has_one_sender(house, webhooks):
    bad = webhooks()
    bad.answer = "hang"
    larm = house(channels(bad=bad.url) + monitors("job", "other"))
    for key in ("job", "other"):
        larm.ping(key, "fail")
        larm.clock.advance(3 * SECOND)
        for _ in range(5):
            larm.notifier.deliver_due()
    senders = [thread for thread in threading.enumerate() if thread.name == "to bad"]
    assert len(senders) == 1
    larm.notifier.stop(0)


def test_each_url_of_a_channel_gets_it(house, webhooks):
    one, two = webhooks(), webhooks()
    larm = house(f'[channels]\nphone = ["{one.url}", "{two.url}"]\n' + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    assert states(larm) == ["sent"]
    assert one.titles() == two.titles() == ["DOWN: job"]


def test_a_channel_has_accepted_it_once_each_of_its_urls_has(house, webhooks):
    one, two = webhooks(), webhooks()
    two.answer = 500
    larm = house(f'[channels]\nphone = ["{one.url}", "{two.url}"]\n' + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    assert states(larm) == ["pending"]
    two.answer = 200
    attempt_after(larm, 11 * SECOND)
    assert states(larm) == ["sent"]
    assert two.titles() == ["DOWN: job"]


def test_a_channel_that_was_removed_fails_with_the_reason(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    larm.reload(monitors("job"))
    attempt_after(larm, 11 * SECOND)
    [row] = larm.rows("SELECT state, error FROM deliveries")
    assert row["state"] == "failed"
    assert "not in the configuration" in row["error"]


def test_a_channel_whose_url_was_corrected_gets_what_is_pending(house, webhooks):
    wrong, right = webhooks(), webhooks()
    wrong.answer = 404
    larm = house(channels(phone=wrong.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    larm.reload(channels(phone=right.url) + monitors("job"))
    attempt_after(larm, 11 * SECOND)
    assert right.titles() == ["DOWN: job"]


# Order and digests


def test_alerts_arrive_in_the_order_of_their_events(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("one", "two"))
    larm.ping("one", "fail")
    attempt_after(larm, 3 * SECOND)
    larm.ping("two", "fail")  # due before the first one's next try
    webhook.answer = 200
    attempt_after(larm, 3 * SECOND)
    body = "".join(alert["message"] for alert in webhook.alerts)
    assert body.index("one is down") < body.index("two is down")
    attempt_after(larm, MINUTE)
    assert states(larm) == ["sent", "sent"]


def test_several_alerts_within_3_s_are_one_message(house, webhook):
    larm = house(channels(phone=webhook.url) + monitors("one", "two", "three"))
    for key in ("one", "two", "three"):
        larm.ping(key, "fail")
        larm.clock.advance(1_400)
        assert not larm.notifier.attempt("phone") or key == "three"
    attempt_after(larm, 0)
    [alert] = webhook.alerts
    assert alert["title"] == "DOWN: 3 monitors"
    for key in ("one", "two", "three"):
        assert f"{key} is down" in alert["message"]
        assert f"http://127.0.0.1:5276/monitor/{key}" in alert["message"]


def test_alerts_more_than_3_s_apart_are_several_messages(house, webhook):
    larm = house(channels(phone=webhook.url) + monitors("one", "two", "three"))
    for key in ("one", "two", "three"):
        larm.ping(key, "fail")
        larm.clock.advance(3 * SECOND)
    attempt_after(larm, 3 * SECOND)  # all at once, as after the first attempt was held up
    assert webhook.titles() == ["DOWN: one", "DOWN: two", "DOWN: three"]


def test_the_first_alert_waits_no_longer_than_3_s_for_others(house, webhook):
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job")
    larm.watch_for(70_100)
    larm.clock.advance(3 * SECOND)
    larm.notifier.attempt("phone")
    assert webhook.titles() == ["DOWN: job"]


def test_500_alerts_are_one_message_that_says_how_many_more(house, webhook):
    keys = [f"job-{number:03}" for number in range(500)]
    larm = house(channels(phone=webhook.url) + monitors(*keys))
    for key in keys:
        larm.ping(key)
    larm.watch_for(71_000)
    attempt_after(larm, 3 * SECOND)
    [alert] = webhook.alerts
    assert alert["title"] == "DOWN: 500 monitors"
    assert alert["message"].count(" is down: ") == 20
    assert all(key in alert["message"] for key in keys)
    assert set(states(larm)) == {"sent"}


def test_a_down_and_its_up_that_are_both_unsent_are_one_message(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    larm.ping("job")
    webhook.answer = 200
    attempt_after(larm, MINUTE)
    [alert] = webhook.alerts
    assert alert["title"] == "UP: job"
    assert alert["type"] == "success"
    assert re.search(r"job was down from .* to .*, for 3 s, and is up again", alert["message"])
    assert states(larm) == ["sent", "sent"]


# Crashes and disks


@pytest.mark.parametrize("crash", [False, True])
def test_what_was_pending_at_the_stop_is_sent_after_the_start_once(house, webhook, crash):
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    larm.restart(MINUTE, crash=crash)
    attempt_after(larm, 3 * SECOND)
    larm.restart(MINUTE, crash=crash)
    attempt_after(larm, HOUR)
    assert webhook.titles() == ["DOWN: job"]


@pytest.mark.parametrize("by", [-HOUR, -30 * DAY, 30 * DAY])
def test_a_clock_set_while_larm_was_off_delays_no_delivery(house, webhook, by):
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    larm.stop()
    larm.clock.set_wall(by)
    larm.clock.resync()
    larm.open()
    attempt_after(larm, 3 * SECOND)
    assert webhook.titles() == ["DOWN: job"]


def test_what_was_accepted_but_not_noted_before_a_crash_is_sent_again(house, webhook):
    """At least once: nobody knows of it any more."""
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    larm.clock.advance(3 * SECOND)
    larm.store.failure = "disk full"
    larm.notifier.deliver_due()
    wait_until(lambda: webhook.alerts)
    larm.notifier.stop(5)
    larm.restart(MINUTE, crash=True)
    attempt_after(larm, 0)
    attempt_after(larm, HOUR)
    assert states(larm) == ["sent"]
    assert webhook.titles() == ["DOWN: job", "DOWN: job"]


def test_pauses_go_on_where_they_were_after_a_restart(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    attempt_after(larm, next_try(larm))
    larm.restart(0)
    attempt_after(larm, next_try(larm))
    assert deliveries(larm) == [("pending", 3)]
    assert MINUTE <= next_try(larm) <= 1.1 * MINUTE


def test_what_was_sent_is_not_sent_again_for_a_full_disk(house, webhook):
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    larm.clock.advance(3 * SECOND)
    larm.store.failure = "disk full"
    larm.notifier.deliver_due()
    wait_until(lambda: webhook.alerts)
    larm.clock.advance(HOUR)
    larm.notifier.deliver_due()
    larm.store.failure = None
    wait_until(lambda: states(larm) == ["sent"])
    larm.notifier.deliver_due()
    attempt_after(larm, HOUR)
    assert webhook.titles() == ["DOWN: job"]


def test_what_was_sent_is_not_sent_again_for_a_disk_that_hangs(house, webhook, monkeypatch):
    monkeypatch.setattr(program, "_ANSWER_WITHIN", 0.2)  # seconds, of 30
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    larm.clock.advance(3 * SECOND)
    go = threading.Event()
    larm.store.submit(lambda _: go.wait(10))
    larm.notifier.deliver_due()
    wait_until(lambda: webhook.alerts)
    wait_until(lambda: larm.store._queue.qsize() > 1)  # noted once more
    go.set()
    wait_until(lambda: states(larm) == ["sent"])
    attempt_after(larm, HOUR)
    assert webhook.titles() == ["DOWN: job"]
    larm.notifier.stop(5)


# What they say


def message(larm: House, webhook: Webhook, after_ms: int = 3 * SECOND) -> tuple[str, str, str]:
    attempt_after(larm, after_ms)
    [alert] = webhook.alerts
    return alert["title"], alert["type"], alert["message"]


@pytest.fixture
def backup(house, webhook) -> House:
    return house(
        'timezone = "Europe/Stockholm"\nurl = "https://home.example/larm"\n'
        + channels(phone=webhook.url)
        + '[monitors.backup]\nname = "Nightly backup"\ninterval = "1h"\ngrace = "10m"\n'
        'note = "Runs on nas"\n'
    )


def test_a_missed_deadline_says_when_and_what_was_expected(backup, webhook):
    backup.ping("backup")
    backup.watch_for(70 * MINUTE + SECOND, step=MINUTE)
    title, kind, text = message(backup, webhook)
    assert (title, kind) == ("DOWN: Nightly backup", "failure")
    assert text.splitlines() == [
        "Nightly backup is down: no heartbeat by 2027-01-15 10:10:00+01:00, 4 s ago.",
        "Last heartbeat: 2027-01-15 09:00:00+01:00, 1 h 10 min before.",
        "Expected: every 1 h, with 10 min grace.",
        "Runs on nas",
        "https://home.example/larm/monitor/backup",
    ]


def test_a_failure_says_the_exit_status_and_the_last_lines_of_output(backup, webhook):
    backup.ping("backup", "3", body="".join(f"line {number}\n" for number in range(40)))
    title, _, text = message(backup, webhook)
    assert title == "DOWN: Nightly backup"
    assert "exit status 3" in text
    assert "2027-01-15 09:00:00+01:00" in text
    assert re.findall(r"line (\d+)", text) == [str(number) for number in range(30, 40)]
    assert "Last heartbeat" not in text  # there was none


def test_a_failure_without_a_status_says_that_the_job_reported_it(backup, webhook):
    backup.ping("backup", "fail")
    assert "the job reported a failure" in message(backup, webhook)[2]


def test_a_recovery_says_when_and_how_long_it_lasted(backup, webhook):
    backup.ping("backup", "fail")
    attempt_after(backup, 3 * SECOND)
    webhook.alerts.clear()
    backup.clock.advance(2 * HOUR)
    backup.ping("backup")
    title, kind, text = message(backup, webhook)
    assert (title, kind) == ("UP: Nightly backup", "success")
    assert "2 h" in text
    assert "2027-01-15 11:00:03+01:00" in text
    assert "since 2027-01-15 11:00:03" not in text  # that is when it came up
    assert "https://home.example/larm/monitor/backup" in text


def test_an_alert_says_that_larm_itself_was_not_running_meanwhile(backup, webhook):
    backup.ping("backup")
    backup.watch_for(30 * MINUTE, step=MINUTE)
    backup.restart(20 * MINUTE)
    backup.watch_for(41 * MINUTE, step=MINUTE)
    span = "from 2027-01-15 09:30:00+01:00 to 2027-01-15 09:50:00+01:00"
    assert f"Larm itself was not running {span}" in message(backup, webhook)[2]


def test_an_alert_says_nothing_of_gaps_before_the_last_heartbeat(backup, webhook):
    backup.ping("backup")
    backup.watch_for(MINUTE)
    backup.restart(20 * MINUTE)
    backup.ping("backup")
    backup.watch_for(71 * MINUTE, step=MINUTE)
    assert "not running" not in message(backup, webhook)[2]


def test_an_alert_says_nothing_of_a_gap_of_a_few_seconds(backup, webhook):
    backup.ping("backup")
    backup.restart(5 * SECOND)
    backup.watch_for(71 * MINUTE, step=MINUTE)
    assert "not running" not in message(backup, webhook)[2]


def test_what_is_delivered_late_says_so(backup, webhook):
    backup.ping("backup", "fail")
    assert "This alert is late" in message(backup, webhook, after_ms=11 * MINUTE)[2]


def test_what_is_delivered_in_time_does_not_say_that_it_is_late(backup, webhook):
    backup.ping("backup", "fail")
    assert "late" not in message(backup, webhook)[2]


def test_a_clock_that_is_set_during_an_attempt_gives_nothing_up(house, webhook):
    webhook.answer = 500
    larm = house(channels(phone=webhook.url) + monitors("job"))
    larm.ping("job", "fail")
    attempt_after(larm, 3 * SECOND)
    webhook.answer = "hang"
    larm.clock.advance(11 * SECOND)
    larm.tick()
    attempt = threading.Thread(target=larm.notifier.attempt, args=("phone",))
    attempt.start()
    larm.clock.set_wall(10 * DAY)
    larm.tick()
    attempt.join(30)
    assert deliveries(larm) == [("pending", 2)]


@pytest.mark.parametrize("extra", ["", "?overflow=truncate"])
def test_what_is_too_long_for_a_service_comes_in_parts_unless_its_url_says_otherwise(extra):
    sent = []

    class Service(apprise.NotifyBase):
        service_name, body_maxlen, title_maxlen = "Short", 500, 250

        def send(self, body, **_):
            sent.append(body)
            return True

    service = Service(overflow="truncate" if extra else "upstream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apprise.Apprise, "instantiate", lambda *_, **__: service)
        assert program.send([f"short://x/{extra}"], "title", "word " * 300, "info") is None
    assert len(sent) == (1 if extra else 3)
