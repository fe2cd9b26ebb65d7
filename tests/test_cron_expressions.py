"""Schedules: cron expressions in timezones whose clocks jump, watched for years."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import zoneinfo
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import ROOT, TOKEN, write_config

import larm as program
from larm import DAY, MINUTE, SECOND

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
    assert monitor.schedule is not None
    found = monitor.schedule.next_after(at("2027-01-15 08:00"), 2)
    assert [program.iso_local(moment, UTC)[:16] for moment in found] == upcoming
    assert words in (None, monitor.schedule.in_words)


@pytest.mark.parametrize(("expression", "says"), [
    ("", "minute hour day month weekday"),
    ("0 0 3 * * *", "minute hour day month weekday"),
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


# What may not be installed


def load_without(package: str, folder: Path, text: str, **environ: str) -> str:
    """What larm.load says where a package can't be imported."""
    path = write_config(folder, text)
    code = (
        f"import sys; sys.modules[{package!r}] = None; import larm, pathlib\n"
        f"try: print(len(larm.load(pathlib.Path({str(path)!r}), {{}}).monitors), 'loaded')\n"
        "except larm.ConfigError as error: print(error)"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True, env=environ).stdout  # fmt: skip


def test_without_cronsim_an_interval_works(tmp_path):
    said = load_without("cronsim", tmp_path, '[monitors.job]\ninterval = "1d"\n')
    assert said == "1 loaded\n"


def test_without_tzdata_a_timezone_is_a_mistake_that_says_to_install_it(tmp_path):
    text = 'timezone = "Europe/Stockholm"\n' + job("@daily", "Asia/Tokyo")
    lines = load_without("tzdata", tmp_path, text, PYTHONTZPATH="").splitlines()
    assert len(lines) == 2
    for line, setting in zip(lines, ("timezone", "monitors.job.timezone"), strict=True):
        assert f"larm.toml: {setting}: " in line
        assert "install tzdata" in line


def test_without_tzdata_a_schedule_in_local_time_works(tmp_path):
    text = '[monitors.job]\nschedule = "@daily"\n'
    assert load_without("tzdata", tmp_path, text, PYTHONTZPATH="") == "1 loaded\n"
