"""Schedules: cron expressions in timezones whose clocks jump, watched for years."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import tempfile
import zoneinfo
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import TOKEN, FakeClock, House, run_larm, write_config
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import larm as program
from larm import DAY, HOUR, MINUTE, SECOND

ZONES = ["Europe/Stockholm", "America/New_York", "Australia/Sydney", "Australia/Lord_Howe", "UTC",
         "America/Santiago", "Asia/Kolkata"]  # fmt: skip


def at(text: str, zone: str = "UTC") -> int:
    """The milliseconds of "2027-03-28 02:30" in a zone, or in the offset that it names."""
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    return int(moment.timestamp()) * SECOND


def due(expression: str, moment: str, count: int, zone: str) -> list[str]:
    tz = zoneinfo.ZoneInfo(zone)
    schedule = program.Schedule(expression, tz, zone)
    return [program.iso_local(found, tz) for found in schedule.next_after(at(moment, zone), count)]


def job(expression: str, zone: str = "UTC", grace: str = '"30m"') -> str:
    return (f'[monitors.job]\ntoken = "{TOKEN}"\nschedule = "{expression}"\ntimezone = "{zone}"\n'
            f"grace = {grace}\n")  # fmt: skip


def wait_for(larm: House, moment: int) -> None:
    """Time passes; the watcher ticks when something is due, as it does, and at the end."""
    while (now := larm.clock.now()) < moment:
        with larm.store.reading() as db:
            next_at = program.next_due_at(db, now)
        larm.clock.advance(min(moment, next_at + 1 if next_at else moment) - now)
        larm.tick()


def events(larm: House) -> list[tuple[str, int]]:
    return [(event["type"], event["at"]) for event in larm.events()]


# The hours that summer time takes and gives


@pytest.mark.parametrize(("zone", "eve", "expression", "expected"), [
    ("Europe/Stockholm", "2027-03-27", "30 2 * * *",
     ["2027-03-28 03:00:00+02:00", "2027-03-29 02:30:00+02:00"]),
    ("America/New_York", "2027-03-13", "30 2 * * *",
     ["2027-03-14 03:00:00-04:00", "2027-03-15 02:30:00-04:00"]),
    ("Australia/Sydney", "2027-10-02", "30 2 * * *",
     ["2027-10-03 03:00:00+11:00", "2027-10-04 02:30:00+11:00"]),
    ("Australia/Lord_Howe", "2027-10-02", "15 2 * * *",
     ["2027-10-03 02:30:00+11:00", "2027-10-04 02:15:00+11:00"]),
])  # fmt: skip
def test_a_job_at_a_time_that_is_skipped_is_due_when_the_clock_has_jumped(
    zone, eve, expression, expected
):
    assert due(expression, f"{eve} 12:00", 2, zone) == expected


@pytest.mark.parametrize(("zone", "eve", "expression", "expected"), [
    ("Europe/Stockholm", "2027-10-30", "30 2 * * *",
     ["2027-10-31 02:30:00+02:00", "2027-11-01 02:30:00+01:00"]),
    ("America/New_York", "2027-11-06", "30 1 * * *",
     ["2027-11-07 01:30:00-04:00", "2027-11-08 01:30:00-05:00"]),
    ("Australia/Sydney", "2027-04-03", "30 2 * * *",
     ["2027-04-04 02:30:00+11:00", "2027-04-05 02:30:00+10:00"]),
    ("Australia/Lord_Howe", "2027-04-03", "45 1 * * *",
     ["2027-04-04 01:45:00+11:00", "2027-04-05 01:45:00+10:30"]),
])  # fmt: skip
def test_a_job_at_a_time_that_comes_twice_is_due_once(zone, eve, expression, expected):
    assert due(expression, f"{eve} 12:00", 2, zone) == expected


@pytest.mark.parametrize(("zone", "before"), [
    ("Europe/Stockholm", "2027-03-28 00:00"), ("Europe/Stockholm", "2027-10-31 00:00"),
    ("America/New_York", "2027-03-14 00:00"), ("America/New_York", "2027-11-07 00:00"),
    ("Australia/Sydney", "2027-10-03 00:00"), ("Australia/Sydney", "2027-04-04 00:00"),
    ("Australia/Lord_Howe", "2027-10-03 00:00"), ("Australia/Lord_Howe", "2027-04-04 00:00"),
])
def test_a_job_every_ten_minutes_is_due_every_ten_minutes_whatever_the_clock_does(zone, before):
    schedule = program.Schedule("*/10 * * * *", zoneinfo.ZoneInfo(zone), zone)
    start = at(before, zone)
    assert schedule.next_after(start, 40) == [start + n * 10 * MINUTE for n in range(1, 41)]


def test_the_day_that_samoa_skipped_leaves_no_gap_of_more_than_a_day():
    """There was no 30 December 2011; Larm's clock can't be there, but a zone may do it again."""
    zone = zoneinfo.ZoneInfo("Pacific/Apia")
    schedule = program.Schedule("0 3 * * *", zone, "Pacific/Apia")
    found = schedule.next_after(at("2011-12-27 12:00", "Pacific/Apia"), 5)
    days = [program.iso_local(moment, zone)[:10] for moment in found]
    assert "2011-12-30" not in days
    assert {"2011-12-28", "2011-12-29", "2011-12-31", "2012-01-01"} <= set(days)
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert min(gaps) > 0
    assert max(gaps) == DAY


# A ping counts for the occurrence that it precedes


def test_an_early_ping_counts_for_the_occurrence_that_it_precedes(house):
    larm = house(job("0 3 * * *"), FakeClock(at("2027-01-15 02:45")))
    larm.ping("job")
    wait_for(larm, at("2027-01-16 03:29"))
    assert events(larm) == []
    assert larm.state("job") == "late"
    wait_for(larm, at("2027-01-16 03:31"))
    assert events(larm) == [("down", at("2027-01-16 03:30"))]


def test_a_ping_that_is_too_early_counts_for_the_occurrence_before(house):
    larm = house(job("0 3 * * *"), FakeClock(at("2027-01-15 02:00")))
    larm.ping("job")
    wait_for(larm, at("2027-01-15 03:31"))
    assert events(larm) == [("down", at("2027-01-15 03:30"))]


def test_a_late_ping_leaves_the_next_occurrence_where_it_is(house):
    larm = house(job("0 3 * * *"), FakeClock(at("2027-01-15 03:25")))
    larm.ping("job")
    assert larm.monitor("job")["expected_at"] == at("2027-01-16 03:00")


def test_a_job_that_comes_back_is_expected_at_the_next_occurrence(house):
    larm = house(job("0 3 * * *"), FakeClock(at("2027-01-15 03:00")))
    larm.ping("job")
    wait_for(larm, at("2027-01-16 12:00"))
    larm.ping("job")
    wait_for(larm, at("2027-01-17 12:00"))
    assert events(larm) == [
        ("down", at("2027-01-16 03:30")), ("up", at("2027-01-16 12:00")),
        ("down", at("2027-01-17 03:30")),
    ]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [
    ("2027-03-27 03:00", "2027-03-28 03:00"), ("2027-10-30 03:00", "2027-10-31 03:00"),
])
def test_the_deadline_of_a_nightly_job_follows_the_clock_on_the_wall(before, after, house):
    zone = "Europe/Stockholm"
    larm = house(job("0 3 * * *", zone), FakeClock(at(before, zone)))
    larm.ping("job")
    assert larm.monitor("job")["deadline_at"] == at(after, zone) + 30 * MINUTE


def test_the_throttles_window_is_a_tenth_of_the_shortest_gap(house):
    larm = house(job("0 9,17 * * *"), FakeClock(at("2027-01-15 09:00")))
    for moment, stored in (("09:00", 1), ("09:47", 1), ("09:48", 2)):
        wait_for(larm, at(f"2027-01-15 {moment}"))
        larm.ping("job")
        assert len(larm.heartbeats("job")) == stored


def test_a_gap_moves_the_deadline_of_a_schedule_too(house):
    larm = house(job("0 3 * * *"), FakeClock(at("2027-01-15 03:00")))
    larm.ping("job")
    wait_for(larm, at("2027-01-16 02:55"))
    larm.restart(HOUR)
    assert larm.monitor("job")["deadline_at"] == at("2027-01-16 04:30")
    larm.ping("job")  # at 03:55, for the occurrence at 03:00
    assert larm.monitor("job")["deadline_at"] == at("2027-01-17 03:30")


EXPRESSIONS = [
    "30 2 * * *", "0 3 * * *", "@daily", "@hourly", "15 1,2,3 * * *", "*/20 0-4 * * *",
    "0 */6 * * *", "30 2 * * 0", "0 3 * * mon-fri", "30 1 L * *", "0 0 * * 5L", "30 2 * * 0#1",
]  # fmt: skip


def schedule_and_house(folder: str, expression: str, zone: str, grace: int, start: int) -> House:
    text = 'keep = "3660d"\n' + job(expression, zone, str(grace / SECOND))
    larm = House(Path(folder), text, FakeClock(start))
    larm.store.write(lambda _: None)
    larm.store._db.execute("PRAGMA synchronous = OFF")  # no power is lost here
    return larm


histories = given(
    st.sampled_from(ZONES), st.sampled_from(EXPRESSIONS), st.sampled_from([0, MINUTE, 30 * MINUTE]),
    st.integers(at("2026-01-01"), at("2029-01-01")), st.randoms(use_true_random=False),
)  # fmt: skip
thorough = settings(
    max_examples=30, deadline=None, database=None, derandomize=True,
    phases=[Phase.generate, Phase.shrink],
)


def within_tolerance(monitor: program.Monitor, chance: random.Random) -> int:
    """How far from its occurrence a ping may come."""
    early = min(monitor.grace, monitor.interval // 10)
    return chance.choice([-early, 0, monitor.grace, chance.randint(-early, monitor.grace)])


@thorough
@histories
def test_a_job_that_runs_on_schedule_never_alerts(zone, expression, grace, start, chance):
    """In any zone, for four months or 60 occurrences, as early or late as it may be."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    larm = schedule_and_house(folder, expression, zone, grace, start)
    try:
        monitor = larm.config.monitors["job"]
        assert monitor.schedule is not None
        count = 60 if monitor.interval < DAY or monitor.interval > DAY else 120
        for occurrence in monitor.schedule.next_after(start + monitor.interval, count):
            wait_for(larm, max(larm.clock.now(), occurrence + within_tolerance(monitor, chance)))
            larm.ping("job")
            larm.tick()
        assert events(larm) == []
        assert larm.monitor("job")["state"] == "up"
    finally:
        larm.store.close()
        shutil.rmtree(folder)


@thorough
@histories
def test_a_job_that_skips_one_occurrence_alerts_once_dated_at_it_and_the_grace(
    zone, expression, grace, start, chance
):
    folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    grace = min(grace, 10 * MINUTE)  # less than any gap, or a ping might stand for two
    larm = schedule_and_house(folder, expression, zone, grace, start)
    try:
        monitor = larm.config.monitors["job"]
        assert monitor.schedule is not None
        skipped = chance.randint(1, 28)
        occurrences = monitor.schedule.next_after(start + monitor.interval, 30)
        for number, occurrence in enumerate(occurrences):
            if number != skipped:
                wait_for(larm, occurrence + within_tolerance(monitor, chance))
                larm.ping("job")
                larm.tick()
        assert [type for type, _ in events(larm)] == ["down", "up"]
        assert events(larm)[0][1] == occurrences[skipped] + grace
    finally:
        larm.store.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize("zone", ["Europe/Stockholm", "Australia/Lord_Howe"])
def test_a_nightly_job_is_watched_for_five_years_without_a_false_alert(zone, tmp_path):
    start = at("2027-01-01 12:00", zone)
    larm = schedule_and_house(str(tmp_path), "30 2 * * *", zone, 5 * MINUTE, start)
    schedule = program.Schedule("30 2 * * *", zoneinfo.ZoneInfo(zone), zone)
    for occurrence in schedule.next_after(start, 5 * 365):
        wait_for(larm, occurrence + 5 * MINUTE)
        larm.ping("job")
    wait_for(larm, larm.clock.now() + 2 * DAY)
    assert len(events(larm)) == 1  # that it has stopped
    larm.store.close()


# Expressions


@pytest.mark.parametrize(("expression", "words", "upcoming"), [
    ("@daily", "At 00:00 every day", ["2027-01-16 00:00", "2027-01-17 00:00"]),
    ("@hourly", "At the start of every hour", ["2027-01-15 09:00", "2027-01-15 10:00"]),
    ("@weekly", "At 00:00 on Sunday", ["2027-01-17 00:00", "2027-01-24 00:00"]),
    ("@monthly", "At 00:00 on the first day of every month",
     ["2027-02-01 00:00", "2027-03-01 00:00"]),
    ("@yearly", "At 00:00 on January 1", ["2028-01-01 00:00", "2029-01-01 00:00"]),
    ("0 3 * * mon-fri", "At 03:00 on Monday through Friday",
     ["2027-01-18 03:00", "2027-01-19 03:00"]),
    ("0 0 L * *", "At 00:00 on the last day of every month",
     ["2027-01-31 00:00", "2027-02-28 00:00"]),
    ("0 0 * * 5L", "At 00:00 on the last Friday of the month",
     ["2027-01-29 00:00", "2027-02-26 00:00"]),
    ("0 0 * * 1#1", "At 00:00 on the first Monday of the month",
     ["2027-02-01 00:00", "2027-03-01 00:00"]),
    ("5/20 8-9 * jan *", None, ["2027-01-15 08:05", "2027-01-15 08:25"]),
    ("  0   3 * *\\t* ", "At 03:00 every day", ["2027-01-16 03:00", "2027-01-17 03:00"]),
])  # fmt: skip
def test_a_schedule_is_what_cron_knows_and_is_said_in_words(expression, words, upcoming, tmp_path):
    monitor = program.load(write_config(tmp_path, job(expression)), {}).monitors["job"]
    found = program.upcoming(monitor, UTC, at("2027-01-15 08:00"))
    assert [moment[:16] for moment in found][:2] == upcoming
    assert len(found) == 3
    if words:
        assert words in program.describe_rhythm(monitor)


@pytest.mark.parametrize(("expression", "says"), [
    ("", "minute hour day month weekday"),
    ("   ", "minute hour day month weekday"),
    ("0 0 3 * * *", "minute hour day month weekday"),
    ("0 0 3 * * * 2027", "minute hour day month weekday"),
    ("@every 5m", "minute hour day month weekday"),
    ("60 * * * *", "minute"),
    ("0 3 * * 8", "day-of-week"),
    ("0 3 * 13 *", "month"),
    ("0 3 0 * *", "day-of-month"),
    ("a b c d e", "minute"),
    ("*/0 * * * *", "minute"),
    ("5-1 * * * *", "minute"),
    ("0 0 * * 1#6", "day-of-week"),
    ("0 0 31 2 *", ""),
    ("0 0 31 2,4,6,9,11 *", ""),
])
def test_what_is_no_schedule_or_never_occurs_is_a_mistake(expression, says, tmp_path):
    with pytest.raises(program.ConfigError) as error:
        program.load(write_config(tmp_path, job(expression)), {})
    [mistake] = error.value.mistakes
    assert "monitors.job.schedule: " in mistake
    assert expression in mistake
    assert says in mistake


@pytest.mark.parametrize("zone", ["Europe/Stokholm", "Mars/Olympus", "", "../etc/passwd", "utc+1"])
def test_an_unknown_zone_of_a_schedule_is_a_mistake(zone, tmp_path):
    with pytest.raises(program.ConfigError) as error:
        program.load(write_config(tmp_path, job("@daily", zone)), {})
    [mistake] = error.value.mistakes
    assert f'monitors.job.timezone: "{zone}" is not a time zone' in mistake


# What the user sees


def test_status_and_the_page_show_the_schedule_in_words_and_its_next_three_times(start):
    larm = start(job("0 3 * * *", "Asia/Kolkata"))
    larm.ping()
    now = program.Clock().now()
    upcoming = larm.get("/api/v1/monitors/job").json["data"]["expected_at"]
    words = "At 03:00 every day (Asia/Kolkata), with 30 min grace"

    status = run_larm(larm.folder, "status").stdout
    page = larm.get("/monitor/job").body.decode()
    for text in (status, page):
        assert words in text
        times = re.findall(r"\b(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d)", text)[-3:]
        found = [at(moment) for moment in times]
        assert found[0] in (at(upcoming), at(upcoming) - DAY)  # it may have been early for one
        assert now < found[0] <= now + DAY
        assert [later - earlier for earlier, later in itertools.pairwise(found)] == [DAY, DAY]

    data = larm.get("/api/v1/monitors/job").json["data"]
    assert (data["schedule"], data["timezone"]) == ("0 3 * * *", "Asia/Kolkata")
    assert data["interval_seconds"] == 86400


# What may not be installed


def check_without(package: str, folder: Path, text: str, **environ: str) -> str:
    """What `larm.py check` says where a package can't be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    write_config(folder, text)
    done = run_larm(folder, "check", PYTHONPATH=str(folder), **environ)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_without_cronsim_a_schedule_is_a_mistake_that_names_the_install_command(tmp_path):
    [line] = check_without("cronsim", tmp_path, job("@daily")).splitlines()
    assert "monitors.job.schedule: " in line
    assert "pip install cronsim" in line


def test_without_cronsim_an_interval_works(tmp_path):
    assert "fine" in check_without("cronsim", tmp_path, '[monitors.job]\ninterval = "1d"\n')


def test_without_tzdata_a_timezone_is_a_mistake_that_says_to_install_it(tmp_path):
    text = 'timezone = "Europe/Stockholm"\n' + job("@daily", "Asia/Tokyo")
    lines = check_without("tzdata", tmp_path, text, PYTHONTZPATH="").splitlines()
    assert len(lines) == 2
    for line, setting in zip(lines, ("timezone", "monitors.job.timezone"), strict=True):
        assert f"larm.toml: {setting}: " in line
        assert "install tzdata" in line


def test_without_tzdata_a_schedule_in_local_time_works(tmp_path):
    text = '[monitors.job]\nschedule = "@daily"\n'
    assert "fine" in check_without("tzdata", tmp_path, text, PYTHONTZPATH="")
