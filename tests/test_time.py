"""Time: durations as people write them, the clock, and when a schedule is due."""

import os
import re
import subprocess
import sys
import time
import zoneinfo
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, START, FakeClock, write_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

import larm
from larm import DAY, HOUR, MINUTE, SECOND

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=50)
STOCKHOLM = zoneinfo.ZoneInfo("Europe/Stockholm")
UNITS = {"w": 7 * DAY, "d": DAY, "h": HOUR, "m": MINUTE, "s": SECOND}
moments = st.integers(0, 6_000_000_000_000)  # 1970 to 2160


def at(text: str) -> int:
    """The milliseconds of "2027-03-28 02:30", in UTC where it names no offset."""
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()) * SECOND


def due(expression: str, moment: str, count: int, zone=UTC) -> list[str]:
    occurrences = larm.Schedule(expression, zone).next_after(at(moment), count)
    return [larm.iso_local(occurrence, zone)[:16] for occurrence in occurrences]


# Durations


@PROPERTY
@given(st.dictionaries(st.sampled_from(list(UNITS)), st.integers(0, 10_000), min_size=1),
       st.sampled_from(["", " "]), st.sampled_from(["", " "]))
def test_a_duration_is_the_sum_of_its_parts(amounts, before_unit, between):
    parts = [f"{amounts[unit]}{before_unit}{unit}" for unit in UNITS if unit in amounts]
    expected = sum(amount * UNITS[unit] for unit, amount in amounts.items())
    assert larm.parse_duration(between.join(parts)) == expected


@PROPERTY
@given(st.integers(0, 100_000), st.sampled_from(list(UNITS)))
def test_a_part_of_a_duration_may_have_decimals(tenths, unit):
    assert larm.parse_duration(f"{tenths / 10}{unit}") == tenths * UNITS[unit] // 10


@PROPERTY
@given(st.integers(-1_000_000, 1_000_000))
def test_a_number_is_a_duration_in_seconds(amount):
    assert larm.parse_duration(amount) == amount * 1000
    assert larm.parse_duration(amount / 4) == amount * 250


@PROPERTY
@given(st.permutations(list(UNITS)), st.integers(2, 5))
def test_the_units_of_a_duration_stand_in_order(units, count):
    text = "".join(f"1{unit}" for unit in units[:count])
    if units[:count] == sorted(units[:count], key=list(UNITS).index):
        assert larm.parse_duration(text) > 0
    else:
        with pytest.raises(ValueError, match="is not a duration"):
            larm.parse_duration(text)


@PROPERTY
@given(st.text("0123456789.,:+-PTeyYMn ", max_size=20))
def test_a_text_without_a_unit_is_no_duration(text):
    with pytest.raises(ValueError, match="is not a duration: write seconds"):
        larm.parse_duration(text)


@pytest.mark.parametrize("value", [
    "1h1h", "-5s", "1 h 30", "s", "1.s", ".5s", "1x", "5 minutes", "1d!", "1d\n1h.", True, False,
    None, [], ["1d"], {}, float("nan"), float("inf"), float("-inf"), datetime(2027, 1, 1),
], ids=repr)
def test_what_is_no_duration_is_refused(value):
    with pytest.raises(ValueError, match="is not a duration"):
        larm.parse_duration(value)


@pytest.mark.parametrize(("ms", "text"), [
    (0, "0 s"), (300, "0.3 s"), (SECOND, "1 s"), (1_999, "1 s"), (90 * SECOND, "1 min 30 s"),
    (HOUR, "1 h"), (28 * HOUR, "1 d 4 h"), (DAY + 59 * MINUTE, "1 d"), (400 * DAY, "400 d"),
])
def test_a_duration_is_shown_in_its_two_largest_units(ms, text):
    assert larm.format_duration(ms) == text


@PROPERTY
@given(st.integers(SECOND, 1000 * DAY))
def test_a_shown_duration_lacks_less_than_its_second_unit(ms):
    shown = larm.parse_duration(larm.format_duration(ms).replace("min", "m"))
    lost_below = HOUR if ms >= DAY else MINUTE if ms >= HOUR else SECOND
    assert 0 <= ms - shown < lost_below


@pytest.mark.parametrize(("by", "text"), [
    (0, "now"), (999, "now"), (-999, "now"), (3 * DAY, "in 3 d"), (-5 * MINUTE, "5 min ago"),
])
def test_a_moment_is_shown_by_how_far_it_is(by, text):
    assert larm.far_from(START + by, START) == text


# Moments


def test_a_moment_for_programs_is_utc_with_milliseconds():
    assert larm.iso_utc(at("2026-11-22 02:00:12") + 345) == "2026-11-22T02:00:12.345Z"


@PROPERTY
@given(moments)
def test_a_moment_for_programs_is_exact(ms):
    moment = datetime.fromisoformat(larm.iso_utc(ms))
    assert round(moment.timestamp() * SECOND) == ms


@PROPERTY
@given(moments)
def test_a_moment_for_people_says_its_offset(ms):
    moment = datetime.fromisoformat(larm.iso_local(ms, STOCKHOLM))
    assert moment.timestamp() == ms // SECOND


def test_a_moment_for_people_is_in_their_timezone():
    assert larm.iso_local(at("2026-11-22 02:00:12"), STOCKHOLM) == "2026-11-22 03:00:12+01:00"
    assert larm.iso_local(at("2026-07-22 02:00:12"), STOCKHOLM) == "2026-07-22 04:00:12+02:00"


# The system's timezone


@pytest.fixture
def libc(monkeypatch):
    """libc(TZ): libc goes by that TZ, until the end of the test."""

    def libc(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()
        larm.system_zone.cache_clear()

    yield libc
    monkeypatch.undo()
    time.tzset()
    larm.system_zone.cache_clear()


@pytest.mark.parametrize("name", [
    "Europe/Stockholm", ":Europe/Stockholm", "America/New_York", "Australia/Lord_Howe", "",
    ":", "UTC", "Etc/UTC", "UTC0", "EST5EDT", "GMT+5", "<+03>-3", "<-0330>3:30",
    "cst-8", "CET-1CEST,M3.5.0,M10.5.0/3", "CET-1CEST-2,M3.5.0/02:00:00,M10.5.0/03:00:00",
    "PST8PDT,M3.2.0,M11.1.0", "AEST-10AEDT,M10.1.0,M4.1.0/3", "NZST-12NZDT,M9.5.0,M4.1.0/3",
    "IST-1GMT0,M10.5.0,M3.5.0/1", "LHST-10:30LHDT-11,M10.1.0,M4.1.0", "XXX3YYY,J60/2,J300/2",
    "<-02>2<-01>,M3.5.0/-1,M10.5.0/0", "IST-5:30",
])
def test_the_systems_timezone_is_libcs_for_a_year(name, libc):
    libc(name)
    zone, trouble = larm.system_zone()
    assert trouble is None
    for second in range(START // SECOND, (START + larm.LONGEST) // SECOND, 3_600):
        offset = datetime.fromtimestamp(second, zone).utcoffset()
        assert offset.total_seconds() == time.localtime(second).tm_gmtoff, second


def test_TZ_may_be_the_path_of_a_timezone_file(libc, tmp_path):
    found = [path for root in zoneinfo.TZPATH if (path := Path(root, "Europe/Stockholm")).exists()]
    if not found:
        pytest.skip("this machine has no timezone files to point TZ at")
    (tmp_path / "localtime").symlink_to(found[0])
    for name in (f"{tmp_path / 'localtime'}", f":{tmp_path / 'localtime'}"):
        libc(name)
        zone, trouble = larm.system_zone()
        assert (larm.iso_local(START, zone), trouble) == ("2027-01-15 09:00:00+01:00", None)


@pytest.mark.parametrize("name", [
    "Mars/Olympus", "garbage", "ABC", "CET-1CEST,M3.5.0", "CET-1CEST,M13.5.0,M10.5.0",
    "../etc/passwd", "/no/such/file",
    "/etc/passwd", "a\nb", "json://x",
])
def test_a_TZ_that_is_no_timezone_is_UTC_and_says_what_to_do(name, libc):
    libc(name)
    zone, trouble = larm.system_zone()
    assert zone is UTC
    assert trouble.startswith("times are in UTC and not by TZ or /etc/localtime: ")
    assert re.search('is not a time zone(; did you mean .*|, such as "Europe/Stockholm")', trouble)
    assert trouble.isprintable()


def test_the_systems_timezone_equals_itself(libc):
    """A reload sees no change where there is none."""
    libc("CET-1CEST,M3.5.0,M10.5.0/3")
    assert larm.system_zone() == larm.system_zone()


def system_zone_without(folder: Path, code: str, **environ: str) -> str:
    """What system_zone() is in a Python that is told otherwise by `code`; PYTHONTZPATH="": a
    machine without time zones.
    """
    code = f"import sys, os\n{code}\nimport larm\nprint(larm.system_zone())"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True, cwd=folder, env=environ).stdout  # fmt: skip


NO_TZDATA = "sys.modules['tzdata'] = None"


def test_without_tzdata_a_name_is_UTC_and_says_to_install_it(tmp_path):
    said = system_zone_without(tmp_path, NO_TZDATA, TZ="Europe/Stockholm", PYTHONTZPATH="")
    assert "datetime.timezone.utc" in said
    assert "install tzdata" in said


def test_without_tzdata_a_rule_and_UTC_work(tmp_path):
    for name, zone in (("CET-1CEST,M3.5.0,M10.5.0/3", "CET-1CEST"), ("UTC", "utc"), ("", "utc")):
        said = system_zone_without(tmp_path, NO_TZDATA, TZ=name, PYTHONTZPATH="")
        assert zone in said
        assert said.endswith(", None)\n")


@pytest.mark.parametrize(("local", "target", "zone", "fine"), [
    (False, "", "datetime.timezone.utc", True),
    (True, "/no/zoneinfo/Etc/UTC", "datetime.timezone.utc", True),
    (True, "/no/zoneinfo/Europe/Stockholm", "Europe/Stockholm", True),  # from the package tzdata
    (True, "/no/zoneinfo/Mars/Olympus", "datetime.timezone.utc", False),
    (True, "/no/file", "datetime.timezone.utc", False),
])
def test_without_TZ_it_is_that_of_etc_localtime(local, target, zone, fine, tmp_path):
    code = f"""
os.environ.pop("TZ", None)
import builtins, pathlib
exists, realpath, read = os.path.exists, os.path.realpath, pathlib.Path.read_bytes
def missing(path): raise FileNotFoundError(2, "No such file", str(path))
os.path.exists = lambda path: {local} if path == "/etc/localtime" else exists(path)
os.path.realpath = lambda path, **_: {target!r} if path == "/etc/localtime" else realpath(path)
pathlib.Path.read_bytes = lambda path: missing(path) if "localtime" in str(path) else read(path)
"""
    said = system_zone_without(tmp_path, code)
    assert zone in said
    assert said.endswith(", None)\n") == fine
    assert fine or "not by TZ or /etc/localtime: " in said


# The clock


def test_the_clock_goes_on_with_time():
    clock = FakeClock()
    clock.advance(90_000)
    assert (clock.now(), clock.drift()) == (START + 90_000, 0)


@PROPERTY
@given(st.integers(-DAY, DAY), st.integers(0, DAY))
def test_the_clock_does_not_follow_the_wall_clock_but_says_how_far_it_left(by, passed):
    clock = FakeClock()
    clock.set_wall(by)
    clock.advance(passed)
    assert (clock.now(), clock.drift()) == (START + passed, by)


def test_the_clock_takes_over_the_wall_clock_at_a_resync():
    clock = FakeClock()
    clock.set_wall(-HOUR)
    clock.resync()
    assert (clock.now(), clock.drift()) == (START - HOUR, 0)


@PROPERTY
@given(st.integers(-DAY, DAY), st.integers(0, DAY), st.integers(-DAY, DAY), st.booleans())
def test_a_moment_of_monotonic_time_is_on_the_timeline_of_the_last_resync(by, passed, ago, resync):
    clock = FakeClock()
    clock.set_wall(by)
    if resync:
        clock.resync()
    clock.advance(passed)
    assert clock.at(clock.monotonic()) == clock.now()
    assert clock.at(clock.monotonic() - ago) == clock.now() - ago


def test_monotonic_time_is_never_set():
    clock = FakeClock()
    before = clock.monotonic()
    clock.set_wall(HOUR)
    clock.resync()
    assert clock.monotonic() == before


def test_the_real_clock_is_the_machines():
    assert abs(larm.Clock().now() - datetime.now(UTC).timestamp() * SECOND) < MINUTE


# Schedules


def test_a_schedule_is_due_after_a_moment_never_at_it():
    assert due("0 3 * * *", "2027-01-15 03:00", 1) == ["2027-01-16 03:00"]
    assert due("0 3 * * *", "2027-01-15 02:59", 1) == ["2027-01-15 03:00"]


@PROPERTY
@given(moments, st.integers(0, 23), st.integers(0, 59))
def test_a_daily_schedule_is_due_once_a_day_at_its_time(moment, hour, minute):
    first, second = larm.Schedule(f"{minute} {hour} * * *", UTC).next_after(moment, 2)
    assert moment < first <= moment + DAY
    assert first % DAY == hour * HOUR + minute * MINUTE
    assert second == first + DAY


def test_a_schedule_is_in_its_timezone():
    schedule = larm.Schedule("0 3 * * *", STOCKHOLM)
    assert schedule.next_after(at("2027-01-15 00:00")) == [at("2027-01-15 02:00")]
    assert schedule.next_after(at("2027-07-15 00:00")) == [at("2027-07-15 01:00")]


@pytest.mark.parametrize(("expression", "gap"), [
    ("* * * * *", MINUTE),
    ("*/7 * * * *", 4 * MINUTE),  # from :56 to :00
    ("0 * * * *", HOUR),
    ("0 9,17 * * *", 8 * HOUR),
    ("0 1,23 * * *", 2 * HOUR),  # the night between them
    ("0 1,23 * * 0", 22 * HOUR),  # no night between them
    ("0 1,23 * * 0,1", 2 * HOUR),
    ("30 23 1 * *", 28 * DAY),
    ("0,59 * * * *", MINUTE),
    ("0,59 0,23 * * *", MINUTE),
    ("0 0,12 29 2 *", 12 * HOUR),
    ("0 3 * * 1-5", DAY),
    ("0 3 * * 0", 7 * DAY),
    ("0 0 1 * *", 28 * DAY),
    ("0 0 29 2 *", 1461 * DAY),
])
def test_a_schedules_interval_is_the_shortest_gap_between_its_occurrences(expression, gap):
    assert larm.Schedule(expression, UTC).shortest_gap == gap


@settings(PROPERTY, max_examples=30)
@given(st.sets(st.integers(0, 59), min_size=1, max_size=3),
       st.sets(st.integers(0, 23), min_size=1, max_size=3),
       st.sampled_from(["* * *", "* * 1-5", "* * 0", "1,15 * *", "L * *", "* 2 *"]))
def test_no_two_occurrences_are_closer_than_the_shortest_gap_and_some_are_that_close(
    minutes, hours, days
):
    times = ",".join(map(str, sorted(minutes))), ",".join(map(str, sorted(hours)))
    schedule = larm.Schedule(f"{times[0]} {times[1]} {days}", UTC)
    occurrences = schedule.next_after(larm.Clock().now(), 32 * len(minutes) * len(hours))
    gaps = [later - earlier for earlier, later in pairwise(occurrences)]
    assert schedule.shortest_gap == min(gaps)


@PROPERTY
@given(st.integers(at("2027-01-01"), at("2028-01-01")),
       st.sampled_from(["30 2 * * *", "0 3 * * *", "0 */2 * * *", "15 1,2 * * 0", "*/30 * * * *"]),
       st.sampled_from(["Europe/Stockholm", "America/New_York", "Australia/Lord_Howe", "UTC"]))
@example(at("2027-10-31T02:10+01:00"), "30 2 * * *", "Europe/Stockholm")  # 02:30 was an hour ago
@example(at("2027-03-28T03:10+02:00"), "30 2 * * *", "Europe/Stockholm")
def test_no_occurrence_is_in_the_past(moment, expression, zone):
    schedule = larm.Schedule(expression, zoneinfo.ZoneInfo(zone))
    occurrences = schedule.next_after(moment, 3)
    assert [moment, *occurrences] == sorted({moment, *occurrences})


# What is expected of a monitor


@pytest.fixture
def monitor(tmp_path):
    def monitor(settings: str) -> larm.Monitor:
        text = f'timezone = "UTC"\n[monitors.job]\n{settings}'
        return larm.load(write_config(tmp_path, text), {}).monitors["job"]

    return monitor


@pytest.mark.parametrize(("name", "first"), [
    ("@midnight", "2027-01-16 00:00"),
    ("@annually", "2028-01-01 00:00"),
    ("@Daily", "2027-01-16 00:00"),
])
def test_a_schedule_may_be_a_name(name, first, monitor):
    schedule = monitor(f'schedule = "{name}"').schedule
    assert schedule.next_after(at("2027-01-15 08:00")) == [at(first)]


def test_an_interval_runs_from_the_last_ping(monitor):
    job = monitor('interval = "1d"\ngrace = "30m"')
    assert job.expectation(START) == START + DAY


@pytest.mark.parametrize(("ping", "expected"), [
    ("2027-01-15 02:29", "2027-01-15 03:00"),  # too early: it counts for yesterday's
    ("2027-01-15 02:30", "2027-01-16 03:00"),
    ("2027-01-15 03:00", "2027-01-16 03:00"),
    ("2027-01-15 14:00", "2027-01-16 03:00"),
])
def test_a_ping_may_come_early_by_the_grace(ping, expected, monitor):
    job = monitor('schedule = "0 3 * * *"\ngrace = "30m"')
    assert job.expectation(at(ping)) == at(expected)


@pytest.mark.parametrize(("ping", "expected"), [
    ("2027-01-15 02:53", "2027-01-15 03:00"),
    ("2027-01-15 02:54", "2027-01-15 04:00"),
])
def test_a_ping_may_come_early_by_no_more_than_a_tenth_of_the_gap(ping, expected, monitor):
    job = monitor('schedule = "@hourly"\ngrace = "30m"')
    assert job.expectation(at(ping)) == at(expected)


def test_without_grace_no_ping_counts_early(monitor):
    job = monitor('schedule = "@hourly"\ngrace = 0')
    assert job.expectation(at("2027-01-15 02:59")) == at("2027-01-15 03:00")


def test_a_ping_in_the_hour_that_comes_twice_expects_the_next_day(monitor):
    job = monitor('timezone = "Europe/Stockholm"\nschedule = "30 2 * * *"\ngrace = "5m"')
    expected_at = job.expectation(at("2027-10-31T02:10+01:00"))  # 40 minutes after it started
    assert expected_at == at("2027-11-01T02:30+01:00")


@PROPERTY
@given(st.integers(0, 4_000_000_000_000), st.integers(SECOND, larm.LONGEST), st.integers(0, HOUR),
       st.sampled_from([None, "30 2 * * *", "0 */2 * * *", "*/30 * * * *", "15 1,2 * * 0"]),
       st.sampled_from(["Europe/Stockholm", "America/New_York", "Australia/Lord_Howe", "UTC"]))
def test_an_expectation_is_never_before_the_ping(ping, interval, grace, expression, zone):
    schedule = expression and larm.Schedule(expression, zoneinfo.ZoneInfo(zone), zone)
    interval = schedule.shortest_gap if schedule else interval
    monitor = larm.Monitor(
        "job", "job", interval, schedule, grace, None, (), None, None, (), True, "", ()
    )
    assert monitor.expectation(ping) > ping


@PROPERTY
@given(st.integers(SECOND, larm.LONGEST))
def test_the_window_is_a_tenth_of_the_interval_rounded_up(interval):
    monitor = larm.Monitor("job", "job", interval, None, 0, None, (), None, None, (), True, "", ())
    assert 0 <= monitor.window * 10 - interval < 10
