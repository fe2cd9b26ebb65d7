"""Schedules: cron expressions in timezones whose clocks jump, watched by a whole Larm."""

from __future__ import annotations

import itertools
import re
import tempfile
import zoneinfo
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from conftest import QUICK, TOKEN, FakeClock, House, run_larm, write_config
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import larm as program
from larm import DAY, HOUR, MINUTE, SECOND


def at(text: str, zone: str = "UTC") -> int:
    """The milliseconds of "2027-03-28 02:30" in a zone, or in the offset that it names."""
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    return int(moment.timestamp()) * SECOND


def job(expression: str, zone: str = "UTC", grace: str = '"30m"') -> str:
    return (f'[monitors.job]\ntoken = "{TOKEN}"\nschedule = "{expression}"\ntimezone = "{zone}"\n'
            f"grace = {grace}\n")  # fmt: skip


def wait_for(here: House, moment: int) -> None:
    """Time passes; the watcher ticks when its deadline is over, as it does, and at the end."""
    while (now := here.clock.now()) < moment:
        deadline_at = here.monitor("job")["deadline_at"]
        due = moment if deadline_at is None else max(deadline_at + 1, now + 1)
        here.clock.advance(min(moment, due) - now)
        here.tick()


def events(here: House) -> list[tuple[str, int]]:
    return [(event["type"], event["at"]) for event in here.events()]


# A ping counts for the occurrence that it precedes


@pytest.fixture
def nightly(house) -> Callable[[str], House]:
    """nightly("2027-01-15 02:45"): a job for 03:00, pinged then for the first time."""

    def build(first: str) -> House:
        here: House = house(job("0 3 * * *"), FakeClock(at(first)))
        here.ping("job")
        return here

    return build


def test_an_early_ping_counts_for_the_occurrence_that_it_precedes(nightly):
    here = nightly("2027-01-15 02:45")
    wait_for(here, at("2027-01-16 03:29"))
    assert events(here) == []
    assert here.state("job") == "late"
    wait_for(here, at("2027-01-16 03:31"))
    assert events(here) == [("down", at("2027-01-16 03:30"))]


def test_a_ping_that_is_too_early_counts_for_the_occurrence_before(nightly):
    here = nightly("2027-01-15 02:00")
    wait_for(here, at("2027-01-15 03:31"))
    assert events(here) == [("down", at("2027-01-15 03:30"))]


def test_a_late_ping_leaves_the_next_occurrence_where_it_is(nightly):
    here = nightly("2027-01-15 03:25")
    assert here.monitor("job")["expected_at"] == at("2027-01-16 03:00")


def test_a_job_that_comes_back_is_expected_at_the_next_occurrence(nightly):
    here = nightly("2027-01-15 03:00")
    wait_for(here, at("2027-01-16 12:00"))
    here.ping("job")
    wait_for(here, at("2027-01-17 12:00"))
    assert events(here) == [
        ("down", at("2027-01-16 03:30")), ("up", at("2027-01-16 12:00")),
        ("down", at("2027-01-17 03:30")),
    ]  # fmt: skip


def test_a_gap_moves_the_deadline_of_a_schedule_too(nightly):
    here = nightly("2027-01-15 03:00")
    wait_for(here, at("2027-01-16 02:55"))
    here.restart(HOUR)
    assert here.monitor("job")["deadline_at"] == at("2027-01-16 04:30")
    here.ping("job")  # at 03:55, for the occurrence at 03:00
    assert here.monitor("job")["deadline_at"] == at("2027-01-17 03:30")


@pytest.mark.parametrize(("before", "after"), [
    ("2027-03-27 03:00", "2027-03-28 03:00"), ("2027-10-30 03:00", "2027-10-31 03:00"),
])  # fmt: skip
def test_the_deadline_of_a_nightly_job_follows_the_clock_on_the_wall(before, after, house):
    zone = "Europe/Stockholm"
    here = house(job("0 3 * * *", zone), FakeClock(at(before, zone)))
    here.ping("job")
    assert here.monitor("job")["deadline_at"] == at(after, zone) + 30 * MINUTE


def test_the_throttles_window_is_a_tenth_of_the_shortest_gap(house):
    here = house(job("0 9,17 * * *"), FakeClock(at("2027-01-15 09:00")))
    for moment, stored in (("09:00", 1), ("09:47", 1), ("09:48", 2)):
        wait_for(here, at(f"2027-01-15 {moment}"))
        here.ping("job")
        assert len(here.heartbeats("job")) == stored


# Through the hours that summer time takes and gives

TURNS = {  # zone: nights in which its clocks jump, by an hour or half of one
    "Europe/Stockholm": ["2027-03-28", "2027-10-31"],
    "America/New_York": ["2027-03-14", "2027-11-07"],
    "Australia/Lord_Howe": ["2027-10-03", "2027-04-04"],
    "America/Santiago": ["2027-09-05", "2027-04-04"],
    "UTC": ["2028-02-29"],
}
EXPRESSIONS = ["30 2 * * *", "0 3 * * *", "@daily", "@hourly", "15 1,2,3 * * *", "*/20 0-4 * * *",
               "30 2 * * 0", "0 3 * * mon-fri", "30 1 L * *"]  # fmt: skip
histories = given(
    st.sampled_from([(zone, turn) for zone, turns in TURNS.items() for turn in turns]),
    st.sampled_from(EXPRESSIONS), st.sampled_from([0, MINUTE, 30 * MINUTE]),
    st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip


@settings(max_examples=40, deadline=None, database=None, derandomize=True,
          phases=[Phase.generate, Phase.shrink])  # fmt: skip
@histories
def test_a_job_on_schedule_never_alerts_and_one_that_skips_alerts_once(
    turn, expression, grace, skips, chance
):
    """As early or late as it may be; the alert is dated at the skipped occurrence and the grace."""
    zone, night = turn
    grace = min(grace, 10 * MINUTE) if skips else grace  # or a ping might stand for two
    start = at(f"{night} 00:00", zone) - chance.randint(0, 3 * DAY)
    text = 'keep = "3660d"\n' + job(expression, zone, str(grace / SECOND))
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        path = write_config(Path(folder), text)
        monitor = program.load(path, {}).monitors["job"]
        assert monitor.schedule is not None
        start -= 4 * monitor.interval
        occurrences = monitor.schedule.next_after(start, 25)
        here = House(Path(folder), text, FakeClock(start))
        skipped = chance.randint(2, 20) if skips else None
        early = min(monitor.grace, monitor.interval // 10)
        for number, occurrence in enumerate(occurrences):
            off = chance.choice([-early, 0, monitor.grace, chance.randint(-early, monitor.grace)])
            if number != skipped:
                wait_for(here, max(here.clock.now(), occurrence + off))
                here.ping("job")
                here.tick()
        found = events(here)
        here.stop()
    if skipped is None:
        assert found == []
    else:
        assert [type for type, _ in found] == ["down", "up"]
        assert found[0][1] == occurrences[skipped] + grace


def test_a_nightly_job_is_watched_for_two_years_without_a_false_alert():
    zone = "Australia/Lord_Howe"
    start = at("2027-01-01 12:00", zone)
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        text = job("30 2 * * *", zone, "300")
        here = House(Path(folder), text, FakeClock(start))
        schedule = program.load(Path(folder) / "larm.toml", {}).monitors["job"].schedule
        assert schedule is not None
        for occurrence in schedule.next_after(start, 2 * 365):
            here.clock.advance(occurrence + 5 * MINUTE - here.clock.now())
            here.tick()
            here.ping("job")
        assert events(here) == []
        here.clock.advance(2 * DAY)
        here.tick()
        assert len(events(here)) == 1, "that it has stopped"
        here.stop()


# What the user sees


def test_page_status_and_api_show_the_schedule_in_words_and_its_next_times(tmp_path):
    """`status` reads the real clock."""
    now = program.Clock().now()
    here = House(tmp_path, 'timezone = "UTC"\n' + job("0 3 * * *", "Asia/Kolkata"), FakeClock(now))
    here.ping("job")
    data = here.monitor("job")
    assert (data["schedule"], data["timezone"]) == ("0 3 * * *", "Asia/Kolkata")
    assert data["interval_seconds"] == 86400
    assert now < data["expected_at"] <= now + 2 * DAY
    page = here.ask("/monitor/job").body.decode()
    here.stop()
    status = run_larm(tmp_path, "status", "job").stdout
    for text in (page, status):
        assert "At 03:00 every day (Asia/Kolkata), with 30 min grace" in text
    times = re.findall(r"\b(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d)", status)[-3:]
    found = [at(moment) for moment in times]
    assert [later - earlier for earlier, later in itertools.pairwise(found)] == [DAY, DAY]
    assert "21:30" in page, "the next times in the configuration's timezone"


# What may not be installed


def check_without(package: str, folder: Path, text: str, **environ: str) -> str:
    """What `larm.py check` says where a package can't be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    write_config(folder, text)
    done = run_larm(folder, "check", PYTHONPATH=str(folder), **environ)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_without_cronsim_a_schedule_is_a_mistake_that_says_how_to_install_it(tmp_path):
    text = job("@daily") + '[monitors.other]\ninterval = "1d"\n'
    [line] = check_without("cronsim", tmp_path, text).splitlines()
    assert "monitors.job.schedule: " in line
    assert "install" in line
    assert "cronsim" in line
    assert "fine" in check_without("cronsim", tmp_path, '[monitors.job]\ninterval = "1d"\n')


def test_without_tzdata_a_timezone_is_a_mistake_that_says_to_install_it(tmp_path):
    text = 'timezone = "Europe/Stockholm"\n' + job("@daily", "Asia/Tokyo")
    lines = check_without("tzdata", tmp_path, text, PYTHONTZPATH="").splitlines()
    assert len(lines) == 2
    for line, setting in zip(lines, ("timezone", "monitors.job.timezone"), strict=True):
        assert f"larm.toml: {setting}: " in line
        assert "install tzdata" in line
