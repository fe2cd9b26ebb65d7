"""Time: durations as people write them, the clock, and when a schedule is due."""

import zoneinfo
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import START, FakeClock, write_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

import larm
from larm import DAY, HOUR, MINUTE, SECOND, WEEK

PROPERTY = settings(derandomize=True, deadline=None, database=None)
STOCKHOLM = zoneinfo.ZoneInfo("Europe/Stockholm")
UNITS = {"w": WEEK, "d": DAY, "h": HOUR, "m": MINUTE, "s": SECOND}
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
    with pytest.raises(ValueError, match=r"is not a duration: write seconds|has no unit"):
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


@pytest.mark.parametrize("name", ["Europe/Stockholm", ":Europe/Stockholm"])
def test_the_systems_timezone_is_the_one_in_TZ(name, monkeypatch):
    monkeypatch.setenv("TZ", name)
    assert larm.iso_local(START, larm.system_zone()) == "2027-01-15 09:00:00+01:00"


def test_TZ_may_be_the_path_of_a_timezone_file(monkeypatch, tmp_path):
    files = [path for root in zoneinfo.TZPATH if (path := Path(root, "Europe/Stockholm")).exists()]
    if not files:
        pytest.skip("this machine has no timezone files to point TZ at")
    (tmp_path / "localtime").symlink_to(files[0])
    monkeypatch.setenv("TZ", f":{tmp_path / 'localtime'}")
    assert larm.iso_local(START, larm.system_zone()) == "2027-01-15 09:00:00+01:00"


def test_a_TZ_that_names_no_timezone_is_UTC(monkeypatch):
    monkeypatch.setenv("TZ", "Mars/Olympus")
    assert larm.iso_local(START, larm.system_zone()) == "2027-01-15 08:00:00+00:00"


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


@pytest.mark.parametrize(("name", "first"), [
    ("@hourly", "2027-01-15 09:00"),
    ("@daily", "2027-01-16 00:00"),
    ("@midnight", "2027-01-16 00:00"),
    ("@weekly", "2027-01-17 00:00"),
    ("@monthly", "2027-02-01 00:00"),
    ("@yearly", "2028-01-01 00:00"),
    ("@annually", "2028-01-01 00:00"),
    ("@Daily", "2027-01-16 00:00"),
])
def test_a_schedule_may_be_a_name(name, first):
    assert due(name, "2027-01-15 08:00", 1) == [first]


def test_a_schedule_is_in_its_timezone():
    schedule = larm.Schedule("0 3 * * *", STOCKHOLM)
    assert schedule.next_after(at("2027-01-15 00:00")) == [at("2027-01-15 02:00")]
    assert schedule.next_after(at("2027-07-15 00:00")) == [at("2027-07-15 01:00")]


@pytest.mark.parametrize(("expression", "gap"), [
    ("* * * * *", MINUTE),
    ("*/7 * * * *", 4 * MINUTE),  # from :56 to :00
    ("@hourly", HOUR),
    ("0 9,17 * * *", 8 * HOUR),
    ("0 3 * * 1-5", DAY),
    ("0 3 * * 0", WEEK),
    ("0 0 1 * *", 28 * DAY),
    ("0 0 29 2 *", 1461 * DAY),
])
def test_a_schedules_interval_is_the_shortest_gap_between_its_occurrences(expression, gap):
    assert larm.Schedule(expression, UTC).shortest_gap == gap


def test_a_job_in_the_hour_that_summer_time_skips_is_due_after_it():
    assert due("30 2 * * *", "2027-03-27 12:00", 2, STOCKHOLM) == [
        "2027-03-28 03:00", "2027-03-29 02:30",
    ]


def test_a_job_in_the_hour_that_comes_twice_is_due_once():
    assert due("30 2 * * *", "2027-10-30 12:00", 2, STOCKHOLM) == [
        "2027-10-31 02:30", "2027-11-01 02:30",
    ]


def test_a_job_every_half_hour_is_due_in_both_hours():
    occurrences = larm.Schedule("*/30 * * * *", STOCKHOLM).next_after(at("2027-10-30 23:00"), 8)
    assert occurrences == [at("2027-10-30 23:30") + n * 30 * MINUTE for n in range(8)]


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


def test_an_interval_runs_from_the_last_ping(monitor):
    job = monitor('interval = "1d"\ngrace = "30m"')
    assert job.expectation(START) == (START + DAY, START + DAY + 30 * MINUTE)


@pytest.mark.parametrize(("ping", "expected"), [
    ("2027-01-15 02:29", "2027-01-15 03:00"),  # too early: it counts for yesterday's
    ("2027-01-15 02:30", "2027-01-16 03:00"),
    ("2027-01-15 03:00", "2027-01-16 03:00"),
    ("2027-01-15 14:00", "2027-01-16 03:00"),
])
def test_a_ping_may_come_early_by_the_grace(ping, expected, monitor):
    job = monitor('schedule = "0 3 * * *"\ngrace = "30m"')
    assert job.expectation(at(ping)) == (at(expected), at(expected) + 30 * MINUTE)


@pytest.mark.parametrize(("ping", "expected"), [
    ("2027-01-15 02:53", "2027-01-15 03:00"),
    ("2027-01-15 02:54", "2027-01-15 04:00"),
])
def test_a_ping_may_come_early_by_no_more_than_a_tenth_of_the_gap(ping, expected, monitor):
    job = monitor('schedule = "@hourly"\ngrace = "30m"')
    assert job.expectation(at(ping))[0] == at(expected)


def test_without_grace_no_ping_counts_early(monitor):
    job = monitor('schedule = "@hourly"\ngrace = 0')
    assert job.expectation(at("2027-01-15 02:59")) == (at("2027-01-15 03:00"),) * 2


def test_a_ping_in_the_hour_that_comes_twice_expects_the_next_day(monitor):
    job = monitor('timezone = "Europe/Stockholm"\nschedule = "30 2 * * *"\ngrace = "5m"')
    expected_at, _ = job.expectation(at("2027-10-31T02:10+01:00"))  # 40 minutes after it started
    assert expected_at == at("2027-11-01T02:30+01:00")


@PROPERTY
@given(st.integers(SECOND, larm.LONGEST))
def test_the_window_is_a_tenth_of_the_interval_rounded_up(interval):
    monitor = larm.Monitor("job", "job", interval, None, 0, None, (), None, None, (), True, "")
    assert 0 <= monitor.window * 10 - interval < 10
