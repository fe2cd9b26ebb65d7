#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "bottle>=0.12.23",
#     "waitress>=2.1.2",
#     "apprise>=1.2",
#     "cronsim>=2.5",
# ]
# ///
"""Larm tells you when a job did not run.

Jobs ping /api/heartbeat/{token} when they are done; when the pings stop, Larm alerts through
Apprise, and says so when they come back. One file, one SQLite database, one TOML file.

  job ──HTTP──▶ Web ──▶ Intake ──▶ Store ◀── Watcher ──▶ Notifier ──▶ Apprise ──▶ people

The rooms below stand in the order in which a heartbeat travels; each knows only those above it.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import hmac
import http.client
import io
import itertools
import json
import logging
import os
import queue
import random
import re
import secrets
import select
import signal
import socket
import sqlite3
import sys
import termios
import threading
import time
import tomllib
import unicodedata
import urllib.request
import zoneinfo
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

__version__ = "0.1.0"

log = logging.getLogger("larm")
T = TypeVar("T")
D = TypeVar("D")
Item = TypeVar("Item")


# ======================================================================================
# Time: durations, the clock and schedules. Only this room asks what time it is.
# ======================================================================================

SECOND = 1_000  # every duration and every moment in Larm is a whole number of milliseconds
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
WEEK = 7 * DAY

LONGEST = 366 * DAY  # of an interval
NEVER = 1000 * LONGEST
SANE = 1_577_836_800_000  # 2020-01-01: a clock before it has not been set since the machine started

_UNITS = {"w": WEEK, "d": DAY, "h": HOUR, "m": MINUTE, "s": SECOND}
_DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?)\s*{unit}\s*)?" for unit in _UNITS))
DURATION_FORMS = 'seconds as a number, or "90s" "15m" "1h30m" "2d" "1w"'


def parse_duration(value: object) -> int:
    """Milliseconds of a duration as people write it: 90, 1.5, "90s", "1h30m", "2d", "1w".

    Raises ValueError with a message that says what is allowed.
    """
    with contextlib.suppress(OverflowError):  # beyond what a float holds, or not finite
        if isinstance(value, (int, float)) and value == value and not isinstance(value, bool):
            return round(float(value) * SECOND)
        if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())) and match[0]:
            amounts = zip(match.groups(), _UNITS.values(), strict=True)
            return round(sum(float(amount) * unit for amount, unit in amounts if amount))
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*", value):
        raise ValueError(f'{show(value)} has no unit: leave out the quotes, or write "{value}s"')
    raise ValueError(f"{show(value)} is not a duration: write {DURATION_FORMS}")


def format_duration(ms: int) -> str:
    """A duration for people, in its two largest units: "1 d 4 h", "4 min 10 s", "0.3 s"."""
    if 0 < ms < SECOND:
        return f"{ms / SECOND:.1f} s"
    words = []
    for name, unit in (("d", DAY), ("h", HOUR), ("min", MINUTE), ("s", SECOND)):
        amount, ms = divmod(ms, unit)
        if amount:
            words.append(f"{amount} {name}")
        elif words:
            break
    return " ".join(words[:2]) or "0 s"


def counted(number: int, noun: str) -> str:
    """ "1 monitor", "2 monitors" """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def far_from(at: int, now: int) -> str:
    """How far a moment is from now, for people: "5 min ago", "in 3 d", "now"."""
    if abs(at - now) < SECOND:
        return "now"
    return f"in {format_duration(at - now)}" if at > now else f"{format_duration(now - at)} ago"


def midnights(zone: tzinfo, count: int, now: int) -> list[int]:
    """When each of the last `count` days began, today's the last, and when today ends."""
    today = datetime.fromtimestamp(now // SECOND, zone).date()
    dates = [today - timedelta(days) for days in range(count - 1, -2, -1)]
    starts = [datetime(date.year, date.month, date.day, tzinfo=zone) for date in dates]
    return [round(start.timestamp()) * SECOND for start in starts]


def iso_utc(ms: int) -> str:
    """A moment for programs: "2026-11-22T02:00:12.345Z"."""
    moment = datetime.fromtimestamp(ms // SECOND, UTC).replace(microsecond=ms % SECOND * 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def iso_local(ms: int, zone: tzinfo) -> str:
    """A moment for people: "2026-11-22 03:00:12+01:00"."""
    return datetime.fromtimestamp(ms // SECOND, zone).isoformat(" ", "seconds")


def system_zone() -> tzinfo:
    """The machine's timezone, with its rules for summer time; UTC where none is set."""
    return _read_zone(os.environ.get("TZ", "").lstrip(":") or "/etc/localtime")


@functools.cache
def _read_zone(name: str) -> tzinfo:
    with contextlib.suppress(OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        if not name.startswith("/"):
            return zoneinfo.ZoneInfo(name)
        with open(name, "rb") as rules:
            return zoneinfo.ZoneInfo.from_file(rules, "local time")
    return UTC


class Clock:
    """Wall time for Larm: the wall clock as it stood at the last resync(), carried on by the
    monotonic clock.

    So a wall clock that is set forward or back can't mix two timelines in one computation: the
    change stays invisible until the watcher finds it with drift(), shifts what is running, and
    calls resync() (design.md, "Time").
    """

    def __init__(
        self,
        wall: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Both sources count nanoseconds; tests hand in their own."""
        self._wall = wall
        self._monotonic = monotonic
        self.resync()

    def now(self) -> int:
        """Milliseconds since the epoch."""
        return self._offset + self.monotonic()

    def monotonic(self) -> int:
        """Milliseconds since some start; never set, and standing still while suspended."""
        return self._monotonic() // 1_000_000

    def drift(self) -> int:
        """By how many milliseconds the wall clock has left now() since the last resync()."""
        return self._wall() // 1_000_000 - self.now()

    def resync(self) -> None:
        """Take over the wall clock as it stands."""
        self._offset = self._wall() // 1_000_000 - self.monotonic()


_SCHEDULE_NAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


@dataclass(frozen=True)
class Schedule:
    """When a job is due, as a cron expression in a timezone (computed by cronsim)."""

    expression: str
    zone: tzinfo
    zone_name: str | None = None

    def next_after(self, moment: int, count: int = 1) -> list[int]:
        """The next `count` occurrences after a moment; fewer where it stops occurring.

        Raises ImportError without cronsim, and cronsim's own error for a bad expression.
        """
        from cronsim import CronSim

        start = datetime.fromtimestamp(moment / SECOND, self.zone)
        times = (round(found.timestamp() * SECOND) for found in CronSim(self._fields, start))
        # in the hour that comes twice, cronsim may name its first pass, which is over
        return list(itertools.islice((time for time in times if time > moment), count))

    @property
    def shortest_gap(self) -> int:
        """Milliseconds of the shortest gap between occurrences, but for what summer time takes
        or gives; 0 if it never occurs.
        """
        return _shortest_gap(self._fields)

    @property
    def in_words(self) -> str:
        """ "At 03:00 every day" """
        from cronsim import CronSim

        return CronSim(self._fields, datetime(2020, 1, 1, tzinfo=UTC)).explain()

    @property
    def _fields(self) -> str:
        return _SCHEDULE_NAMES.get(self.expression.lower(), self.expression)


@functools.lru_cache(maxsize=16_384)  # a reload computes nothing again
def _shortest_gap(fields: str) -> int:
    """The shortest gap, from the times of day and the days on which a schedule occurs."""
    from cronsim import CronSim

    parsed = CronSim(fields, datetime(2020, 1, 1, tzinfo=UTC))
    times = sorted(
        HOUR * hour + MINUTE * minute for hour in parsed.hours for minute in parsed.minutes
    )
    days = _shortest_day_gap(*fields.split()[2:])
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return min([*gaps, days + times[0] - times[-1]]) if days else 0


@functools.lru_cache(maxsize=1_024)
def _shortest_day_gap(day: str, month: str, weekday: str) -> int:
    """The shortest time between two days on which a schedule occurs; 0: it never does.

    Most schedules of a household share their days, so that the search is done once for all.
    """
    schedule = Schedule(f"0 0 {day} {month} {weekday}", UTC)
    upcoming = schedule.next_after(Clock().now(), 32)
    gaps = [later - earlier for earlier, later in itertools.pairwise(upcoming)]
    return min(gaps, default=LONGEST if upcoming else 0)


# ======================================================================================
# Config: larm.toml as frozen dataclasses. A Config that exists is valid.
# ======================================================================================

TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")
_KEY = re.compile(r"[a-z0-9_-]{1,64}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class Monitor:
    """What is expected of one job. Durations are milliseconds."""

    key: str
    name: str
    interval: int  # of a schedule: the shortest gap between its occurrences
    schedule: Schedule | None
    grace: int
    token: str | None
    notify: tuple[str, ...]
    remind: int | None
    max_runtime: int | None
    depends_on: tuple[str, ...]
    enabled: bool
    note: str

    @property
    def window(self) -> int:
        """At most one success is stored within so many milliseconds (law 2)."""
        return -(-self.interval // 10)

    @property
    def rhythm(self) -> str:
        """What its deadlines are computed from: they are computed anew when this changes."""
        schedule = self.schedule
        pattern = f"{schedule.expression} {schedule.zone}" if schedule else str(self.interval)
        return f"{pattern} + {self.grace}"

    def expectation(self, received_at: int) -> tuple[int, int]:
        """(expected_at, deadline_at) of the next ping after one received at that moment.

        A scheduled job's ping may come early by the smaller of the grace and a tenth of the gap; it
        then counts for the occurrence that it precedes (design.md, "Time").
        """
        if self.schedule is None:
            expected_at = received_at + self.interval
        else:
            early = min(self.grace, self.interval // 10)
            expected_at = (self.schedule.next_after(received_at + early) or [NEVER])[0]
        return expected_at, expected_at + self.grace


@dataclass(frozen=True)
class Watchdog:
    """Another watcher that Larm itself pings."""

    ping: str
    interval: int


@dataclass(frozen=True)
class Config:
    """A valid larm.toml."""

    path: Path
    host: str  # "" = all addresses
    port: int
    url: str  # without a slash at the end
    database: Path
    timezone: tzinfo
    keep: int
    password: str | None
    public: bool
    channels: Mapping[str, tuple[str, ...]]  # Apprise URLs by channel name
    monitors: Mapping[str, Monitor]
    watchdog: Watchdog | None

    @property
    def prefix(self) -> str:
        """The path under which a reverse proxy shows Larm, "" or "/larm"."""
        return urlsplit(self.url).path

    def ping_url(self, token: str) -> str:
        return heartbeat_url(self.url, token)


def heartbeat_url(url: str, token: str) -> str:
    return f"{url}/api/heartbeat/{token}"


@dataclass(frozen=True)
class Address:
    """What a job needs to know of a larm.toml in order to ping."""

    url: str
    database: Path
    token: str | None  # None: it is in the database


class ConfigError(Exception):
    """A larm.toml that can't be used; `mistakes` are all of them, a line each."""

    def __init__(self, path: Path, mistakes: Iterable[str], missing: bool = False) -> None:
        self.mistakes = [f"{path}: {mistake}" for mistake in mistakes]
        self.missing = missing
        super().__init__("\n".join(self.mistakes))


def show(value: object) -> str:
    """A value as a message may show it: short, on one line, and never a URL (law 9)."""
    if isinstance(value, str):
        if "://" in value:
            return "a URL"
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:56] + '..."'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a very large number"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a table"
    return "a date or time"


def is_plain(name: str) -> bool:
    """Whether a message may show a name as it is: it is no URL, and keeps to its line."""
    return "://" not in name and name.isprintable()


def nearest(name: str, names: Iterable[str]) -> str:
    """"; did you mean ...?", or what there is to choose from."""
    names = sorted(name for name in names if is_plain(name))
    if len(names) > 1_000:  # the search takes its time, and there may be as many mistakes
        return ""
    if near := difflib.get_close_matches(name, names, 1, 0.6):
        return f"; did you mean {near[0]}?"
    if not names:
        return "; there is none yet"
    return f"; there is {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


TOP_SETTINGS = ("listen", "url", "database", "keep", "password", "public")


class Table:
    """A TOML table while it is read: every mistake in it is noted, none stops the reading."""

    def __init__(self, path: str, values: object, mistakes: list[str]) -> None:
        self._path = path
        self._mistakes = mistakes
        self._known: list[str] = []
        self.values: dict[str, object] = {}
        if isinstance(values, dict):
            self.values = values
        else:
            mistakes.append(f"{path}: found {show(values)}; it must be a table, [{path}]")

    def mistake(self, name: str, message: object) -> None:
        name = name if is_plain(name) else show(name)
        self._mistakes.append(f"{self._path}.{name}: {message}".lstrip("."))

    def take(self, name: str, convert: Callable[[object], T], default: D) -> T | D:
        """The setting's converted value, or the default where it is not set or is a mistake."""
        self._known.append(name)
        if name not in self.values:
            return default
        try:
            return convert(self.values[name])
        except ValueError as error:  # one mistake an argument
            for message in error.args:
                self.mistake(name, message)
            return default

    def refuse_others(self, reserved: Mapping[str, str]) -> None:
        """Note every setting that was not taken; `reserved` says why for some."""
        for name in self.values:
            if name in reserved:
                self.mistake(name, reserved[name])
            elif self._path and name in TOP_SETTINGS and name not in self._known:
                self.mistake(name, "belongs at the top of the file, above the first [table]")
            elif name not in self._known:
                self.mistake(name, f"no such setting{nearest(name, self._known)}")


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"found {show(value)}; it is true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"found {show(value)}; it must be text in quotes")
    return value


def _name(value: object) -> str:
    if not _text(value).strip() or not _text(value).isprintable():
        raise ValueError(f"found {show(value)}; it must be text on one line, or left out")
    return _text(value)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        hint = f"[{show(value)}]" if isinstance(value, str) and "://" not in value else '["a", "b"]'
        raise ValueError(f"found {show(value)}; it must be a list of names, such as {hint}")
    return tuple(dict.fromkeys(value))


def _duration(shortest: int, longest: int = LONGEST) -> Callable[[object], int]:
    def convert(value: object) -> int:
        ms = parse_duration(value)
        if not shortest <= ms <= longest:
            span = f"{format_duration(shortest) if shortest else 0} to {format_duration(longest)}"
            raise ValueError(f"{show(value)} is out of range: {span} is allowed")
        return ms

    return convert


def _zone(value: object) -> zoneinfo.ZoneInfo:
    name = _text(value)
    try:
        return zoneinfo.ZoneInfo(name)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        zones = zoneinfo.available_timezones()
        if not zones:
            message = "no time zones are installed here: install tzdata (apt-get or pip install)"
            raise ValueError(message) from None
        near = difflib.get_close_matches(name, zones, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else ', such as "Europe/Stockholm" or "UTC"'
        raise ValueError(f"{show(name)} is not a time zone{hint}") from None


def _address(value: object) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:\s/]*)):(\d{1,5})", _text(value))
    if not match or not 1 <= int(match[3]) <= 65535:
        raise ValueError(
            f'{show(value)} is not an address: write "127.0.0.1:5276", "[::1]:5276", '
            'or ":5276" for all addresses; the port is 1 to 65535'
        )
    return match[1] or match[2] or "", int(match[3])


def _public_url(value: object) -> str:
    text = _text(value)
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        valid = False
    plain = valid and re.fullmatch(r"[A-Za-z0-9._~/-]*", parts.path)
    if not plain or parts.query or parts.fragment or parts.username:
        example = '"http://nas.lan:5276" or "https://home.example/larm"'
        raise ValueError(f"found {show(value)}; it must look like {example}")
    return text.rstrip("/")


def default_url(host: str, port: int) -> str:
    """The url of a Larm that listens there."""
    name = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def _substitute(text: str, environ: Mapping[str, str]) -> str:
    """`text` with each ${NAME} replaced from the environment."""
    mistakes = []
    for name in dict.fromkeys(_VARIABLE.findall(text)):
        try:
            environ[name]
        except KeyError:
            mistakes.append(f"${{{name}}} is not set in the environment of this process")
    if mistakes:
        raise ValueError(*mistakes)
    return _VARIABLE.sub(lambda match: environ[match[1]], text)


def _named_zone(value: object) -> tuple[tzinfo, str | None]:
    return _zone(value), _text(value)


def _schedule(zone: tzinfo, zone_name: str | None) -> Callable[[object], Schedule]:
    def convert(value: object) -> Schedule:
        expression = _text(value).strip()
        fields = "minute hour day month weekday"
        if expression.lower() not in _SCHEDULE_NAMES and len(expression.split()) != 5:
            raise ValueError(f'{show(value)} is not a schedule: write five fields, "{fields}"')
        try:
            schedule = Schedule(expression, zone, zone_name)
            occurs = schedule.shortest_gap > 0
        except ImportError:
            raise ValueError("needs the package cronsim: pip install cronsim") from None
        except Exception as error:  # cronsim's own error class is not importable without it
            raise ValueError(f"{show(value)} is not a schedule: {error} ({fields})") from None
        if not occurs:
            raise ValueError(f"{show(value)} never occurs; correct its day or month")
        return schedule

    return convert


Accepts = Callable[[str], str | None]
"""What is wrong with an Apprise URL, in words that don't show it; None where it is fine."""


class _Loader:
    """Turns one parsed larm.toml into a Config, collecting its mistakes."""

    def __init__(self, path: Path, environ: Mapping[str, str], accepts: Accepts) -> None:
        self._path = path
        self._environ = environ
        self._accepts = accepts
        self.mistakes: list[str] = []

    def config(self, values: dict[str, object]) -> Config:
        top = Table("", values, self.mistakes)
        zone = top.take("timezone", _named_zone, None)
        host, port, url, database = self._place(top)
        channels = self._channels(top.take("channels", self._table("channels"), None))
        defaults = top.take("defaults", self._table("defaults"), None)
        monitors = top.take("monitors", self._table("monitors"), None)
        watchdog = top.take("watchdog", self._table("watchdog"), None)
        config = Config(
            path=self._path,
            host=host,
            port=port,
            url=url,
            database=database,
            timezone=zone[0] if zone else system_zone(),
            keep=top.take("keep", _duration(SECOND, 3660 * DAY), 90 * DAY),
            password=top.take("password", self._secret, None),
            public=top.take("public", _boolean, False),
            channels=channels,
            monitors=self._monitors(monitors, defaults, channels, zone),
            watchdog=self._watchdog(watchdog) if watchdog else None,
        )
        top.refuse_others({})
        return config

    def address(self, values: dict[str, object], key: str) -> Address:
        top = Table("", values, self.mistakes)
        _, _, url, database = self._place(top)
        monitors = top.take("monitors", self._table("monitors"), None)
        found = monitors.values if monitors else {}
        if key not in found:
            self.mistakes.append(f"no monitor {show(key)}{nearest(key, found)}")
        own = Table(f"monitors.{key}", found.get(key, {}), self.mistakes)
        return Address(url, database, own.take("token", self._token, None))

    def _place(self, top: Table) -> tuple[str, int, str, Path]:
        """host, port, url and database"""
        host, port = top.take("listen", _address, ("127.0.0.1", 5276))
        url = top.take("url", _public_url, default_url(host, port))
        return host, port, url, self._path.parent / top.take("database", _name, "larm.db")

    def _table(self, path: str) -> Callable[[object], Table]:
        return lambda value: Table(path, value, self.mistakes)

    def _secret(self, value: object) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError("it must be text in quotes, and not empty")
        return _substitute(value, self._environ)

    def _token(self, value: object) -> str:
        token = self._secret(value)
        if not TOKEN.fullmatch(token):
            found = f"found {len(token)} characters"
            raise ValueError(f"a token is 16 to 128 of A-Z a-z 0-9 _ - ({found}; try a UUID)")
        return token

    def _channels(self, table: Table | None) -> dict[str, tuple[str, ...]]:
        def urls(value: object) -> tuple[str, ...]:
            texts = value if isinstance(value, list) else [value]
            if not texts:
                raise ValueError("is an empty list; give it an Apprise URL or remove it")
            resolved, mistakes = [], []
            for number, text in enumerate(texts, 1):
                which = f"URL {number}: " if len(texts) > 1 else ""
                try:
                    resolved.append(self._secret(text))
                except ValueError as error:
                    mistakes += [f"{which}{message}" for message in error.args]
                else:
                    if problem := self._accepts(resolved[-1]):
                        wiki = "https://github.com/caronc/apprise/wiki"
                        mistakes.append(f"{which}{problem} ({wiki})")
            if mistakes:
                raise ValueError(*mistakes)
            return tuple(resolved)

        return {name: table.take(name, urls, ()) for name in table.values} if table else {}

    def _monitors(
        self,
        table: Table | None,
        defaults: Table | None,
        channels: Mapping[str, object],
        zone: tuple[tzinfo, str | None] | None,
    ) -> dict[str, Monitor]:
        found = table.values if table else {}
        inherited: dict[str, object] = {} if zone is None else {"timezone": zone}
        if defaults is not None:
            self._monitor("", defaults, inherited, channels, found)
        if not found:
            self.mistakes.append('no monitors: add one, such as [monitors.backup] interval = "1d"')
        monitors: dict[str, Monitor] = {}
        for key, values in found.items():
            if not _KEY.fullmatch(key):
                near = re.sub(r"[^a-z0-9_-]+", "-", key.lower()).strip("-")[:64]
                hint = f"; try {near}" if near and is_plain(key) else ""
                self.mistakes.append(f"monitors.{show(key)}: a key is 1 to 64 of a-z 0-9 - _{hint}")
                continue
            own = Table(f"monitors.{key}", values, self.mistakes)
            monitors[key] = self._monitor(key, own, inherited, channels, found)
        self._refuse_shared_tokens(monitors.values())
        self._refuse_cycles(monitors)
        return monitors

    def _monitor(
        self,
        key: str,
        own: Table,
        inherited: dict[str, object],
        channels: Mapping[str, object],
        keys: Mapping[str, object],
    ) -> Monitor:
        """One [monitors.key] table, or, where key is "", the [defaults], which then inherited gets.

        `inherited`: the converted values of what [defaults] sets.
        """

        def take(name: str, convert: Callable[[object], T], default: D) -> T | D:
            value = own.take(name, convert, cast(D, inherited.get(name, default)))
            if not key and name in own.values:
                inherited[name] = value
            return value

        def known(names: Iterable[str], what: str) -> Callable[[object], tuple[str, ...]]:
            def convert(value: object) -> tuple[str, ...]:
                unknown = [name for name in _names(value) if name not in names]
                if unknown:
                    raise ValueError(
                        *(f"{show(name)} is not a {what}{nearest(name, names)}" for name in unknown)
                    )
                return _names(value)

            return convert

        zone = take("timezone", _named_zone, (system_zone(), None))
        interval = schedule = None
        if key:
            interval = own.take("interval", _duration(SECOND), None)
            schedule = own.take("schedule", _schedule(*zone), None)
            given = [name for name in ("interval", "schedule") if name in own.values]
            if len(given) == 2:
                own.mistake("interval", "set either interval or schedule (both were found)")
            elif not given and not difflib.get_close_matches("interval", own.values, 1, 0.7):
                own.mistake("interval", "set either interval or schedule (neither was found)")
        gap = schedule.shortest_gap if schedule else interval or DAY
        depends_on = take("depends_on", known(keys, "monitor"), ())
        if "depends_on" not in own.values:  # everything may depend on the router but itself
            depends_on = tuple(parent for parent in depends_on if parent != key)
        monitor = Monitor(
            key=key,
            name=own.take("name", _name, key) if key else key,
            interval=gap,
            schedule=schedule,
            grace=take("grace", _duration(0), min(gap // 10, HOUR)),
            token=own.take("token", self._token, None) if key else None,
            notify=take("notify", known(channels, "channel"), tuple(channels)),
            remind=take("remind", _duration(SECOND), None),
            max_runtime=take("max_runtime", _duration(SECOND), None),
            depends_on=depends_on,
            enabled=take("enabled", _boolean, True),
            note=take("note", _text, ""),
        )
        single = "can't be a default: set it in each monitor"
        only_own = dict.fromkeys(("name", "token", "interval", "schedule"), single)
        own.refuse_others({} if key else only_own)
        return monitor

    def _watchdog(self, table: Table) -> Watchdog:
        def address(value: object) -> str:
            url = self._secret(value)
            if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
                raise ValueError("it must be an http:// or https:// URL")
            return url

        ping = table.take("ping", address, "")
        if "ping" not in table.values:
            table.mistake("ping", "is missing: the URL to ping")
        interval = table.take("interval", _duration(SECOND), MINUTE)
        table.refuse_others({})
        return Watchdog(ping, interval)

    def _refuse_shared_tokens(self, monitors: Iterable[Monitor]) -> None:
        owners: dict[str, str] = {}
        for monitor in monitors:
            if monitor.token in owners:
                self.mistakes.append(
                    f"monitors.{monitor.key}.token: is monitors.{owners[monitor.token]}.token, "
                    "too; each monitor needs its own"
                )
            elif monitor.token:
                owners[monitor.token] = monitor.key

    def _refuse_cycles(self, monitors: Mapping[str, Monitor]) -> None:
        finished: set[str] = set()
        for start in monitors:
            trail = [start]
            branches = [iter(monitors[start].depends_on if start not in finished else ())]
            while branches:
                parent = next(branches[-1], None)
                if parent is None:
                    finished.add(trail.pop())
                    branches.pop()
                elif parent in trail:
                    cycle = " -> ".join([*trail[trail.index(parent) :], parent])
                    self.mistakes.append(f"monitors.{trail[-1]}.depends_on: a cycle: {cycle}")
                elif parent in monitors and parent not in finished:
                    trail.append(parent)
                    branches.append(iter(monitors[parent].depends_on))


TOML_HINTS = {
    "Invalid value": "; text needs quotes",
    "Illegal character '\\n'": "; a quote is not closed",
    "Expected newline or end": "; text needs quotes",
    "Cannot overwrite a value": "; a setting stands twice",
    "Cannot declare": "; a table stands twice",
    "end of a table declaration": "; an id has no spaces",
}


def load(path: Path, environ: Mapping[str, str], accepts: Accepts | None = None) -> Config:
    """The Config in a TOML file, or ConfigError with every mistake in it (interface.md).

    `accepts` judges channel URLs: Notifier's accepts(), which costs an import of apprise.
    """
    loader = _Loader(path, environ, accepts or (lambda _: None))
    config = loader.config(read_toml(path))
    if loader.mistakes:
        raise ConfigError(path, loader.mistakes)
    return config


def load_address(path: Path, key: str, environ: Mapping[str, str]) -> Address:
    """Where the job of that monitor pings; raises ConfigError.

    Mistakes elsewhere in the file are no matter: Larm itself goes on with the last good one
    (law 7), and so must its jobs. Nor is cronsim needed, which another Python may not have.
    """
    loader = _Loader(path, environ, lambda _: None)
    address = loader.address(read_toml(path), key)
    if loader.mistakes:
        raise ConfigError(path, loader.mistakes)
    return address


def read_toml(path: Path) -> dict[str, object]:
    """The values in a TOML file; raises ConfigError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text.replace("\r\n", "\n"))
    except FileNotFoundError:
        hint = "no such file; name one with -c, or run Larm without -c for a starter"
        raise ConfigError(path, [hint], missing=True) from None
    except OSError as error:
        raise ConfigError(path, [f"can't be read: {error.strerror}"], missing=True) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(path, [f"line {line}: is not UTF-8; save it as UTF-8"]) from None
    except (ValueError, RecursionError) as error:  # tomllib raises more than its own error
        last = f"at line {text.count(chr(10)) + 1}, the last one"
        reason = str(error).replace("at end of document", last)
        hint = next((hint for sign, hint in TOML_HINTS.items() if sign in reason), "")
        raise ConfigError(path, [f"is not valid TOML: {reason}{hint}"]) from None


def warn_of(config: Config) -> None:
    """Log what a valid configuration may not do as its author expects."""
    if not config.channels:
        log.warning("no channels are configured: nobody will be alerted")


def ancestors(monitors: Mapping[str, Monitor], key: str) -> set[str]:
    """The keys of all that a monitor depends on, directly or not."""
    found: set[str] = set()
    waiting = list(monitors[key].depends_on)
    while waiting:
        if (parent := waiting.pop()) not in found:
            found.add(parent)
            waiting += monitors[parent].depends_on
    return found


# ======================================================================================
# Store: the SQLite database. All SQL stands here; one thread writes, in group commits.
# ======================================================================================

APPLICATION_ID = 0x4C41524D  # "LARM", so that another program's database is recognised
NEWEST_KEPT = 1_000  # heartbeats of one monitor
BODIES_KEPT = 100  # of these
OPEN_RUNS = 100  # of one monitor
BATCH = 500  # writes in one commit, rows in one round of pruning or of deadlines
_ANSWER_WITHIN = 30.0  # seconds that a caller waits for its commit

MIGRATIONS = [
    """
    CREATE TABLE clock (
        alive_at INTEGER NOT NULL,
        ballast BLOB                      -- what the writer tries to write while the disk is full
    );

    CREATE TABLE monitors (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        made_token TEXT NOT NULL UNIQUE,  -- in force where larm.toml gives none
        created_at INTEGER NOT NULL,
        watching TEXT NOT NULL DEFAULT 'yes'
            CHECK (watching IN ('yes', 'paused', 'disabled', 'removed')),
        unwatched_at INTEGER,             -- since when it is not watched
        resumes_at INTEGER,               -- the end of a timed pause
        state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'up', 'down')),
        since INTEGER NOT NULL,           -- of the state
        received_at INTEGER,              -- the last success, stored or throttled
        counts_from INTEGER,              -- received_at, later by the gaps since: what expected_at
        rhythm TEXT NOT NULL,             -- and deadline_at were computed from, and how
        expected_at INTEGER,
        deadline_at INTEGER,              -- runs while the state is up
        told TEXT NOT NULL DEFAULT 'up'   -- what people know of it
            CHECK (told IN ('up', 'down', 'flapping')),
        alert_at INTEGER,                 -- the next alert: a held one, a reminder, ...
        last_duration_ms INTEGER          -- of a run that said when it started
    );
    CREATE INDEX monitors_by_deadline ON monitors (deadline_at)
        WHERE deadline_at IS NOT NULL AND watching = 'yes';
    CREATE INDEX monitors_by_resumption ON monitors (resumes_at) WHERE resumes_at IS NOT NULL;
    CREATE INDEX monitors_by_alert ON monitors (alert_at)
        WHERE alert_at IS NOT NULL AND watching = 'yes';

    CREATE TABLE heartbeats (
        id INTEGER PRIMARY KEY,
        monitor_id INTEGER NOT NULL REFERENCES monitors,
        at INTEGER NOT NULL,
        signal TEXT NOT NULL CHECK (signal IN ('success', 'fail', 'start', 'log')),
        exit_status INTEGER,
        duration_ms INTEGER,
        method TEXT NOT NULL,
        sender TEXT,
        user_agent TEXT,
        rid TEXT,
        body TEXT
    );
    CREATE INDEX heartbeats_by_monitor ON heartbeats (monitor_id, id);

    CREATE TABLE runs (                   -- of jobs that said that they start, and not yet the end
        id INTEGER PRIMARY KEY,
        monitor_id INTEGER NOT NULL REFERENCES monitors,
        rid TEXT,
        started_at INTEGER NOT NULL,
        max_runtime INTEGER,
        ends_by INTEGER                   -- by max_runtime; NULL once it has overrun
    );
    CREATE INDEX runs_by_monitor ON runs (monitor_id);
    CREATE INDEX runs_by_deadline ON runs (ends_by) WHERE ends_by IS NOT NULL;

    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        monitor_id INTEGER REFERENCES monitors, -- NULL: about Larm itself
        type TEXT NOT NULL CHECK (type IN ('down', 'up')),
        at INTEGER NOT NULL,
        reason TEXT CHECK (reason IN ('missed', 'failed', 'overran')),
        last_heartbeat_at INTEGER,
        expected_at INTEGER,
        down_ms INTEGER,
        heartbeat_id INTEGER REFERENCES heartbeats,
        topic TEXT,                       -- what of Larm itself is in trouble
        text TEXT,
        CHECK ((monitor_id IS NULL) = (topic IS NOT NULL))
    );
    CREATE INDEX events_by_monitor ON events (monitor_id, at);
    CREATE INDEX events_by_time ON events (at);
    CREATE INDEX events_by_heartbeat ON events (heartbeat_id) WHERE heartbeat_id IS NOT NULL;
    CREATE INDEX events_by_topic ON events (topic) WHERE topic IS NOT NULL;

    CREATE TABLE deliveries (
        id INTEGER PRIMARY KEY,
        event_id INTEGER NOT NULL REFERENCES events ON DELETE CASCADE,
        kind TEXT NOT NULL DEFAULT 'change'
            CHECK (kind IN ('change', 'reminder', 'flapping', 'settled')),
        channel TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'sent', 'failed')),
        attempts INTEGER NOT NULL DEFAULT 0,
        due_at INTEGER NOT NULL,
        first_tried_at INTEGER,
        at INTEGER,                       -- of the last attempt
        error TEXT
    );
    CREATE INDEX deliveries_pending ON deliveries (channel, due_at) WHERE state = 'pending';
    CREATE INDEX deliveries_by_event ON deliveries (event_id);

    CREATE TABLE channels (
        name TEXT PRIMARY KEY,
        sent_at INTEGER,                  -- when it accepted an alert last
        failed_at INTEGER,                -- when it last did not, and why
        error TEXT,
        failing_since INTEGER             -- the first failure since it accepted one
    );

    CREATE TABLE gaps (
        id INTEGER PRIMARY KEY,
        monitor_id INTEGER REFERENCES monitors, -- which was paused; NULL: Larm was not watching
        from_at INTEGER NOT NULL,
        to_at INTEGER NOT NULL,           -- before from_at where the clock was set back
        told INTEGER NOT NULL DEFAULT 0   -- whether there was an alert of it, or need not be
    );
    CREATE INDEX gaps_by_time ON gaps (to_at);
    """,
]


class StoreError(Exception):
    """The database can't be opened; the message says why and what to do."""


class Unrecordable(Exception):
    """Nothing can be written now: the disk is full, the file is read-only, ..."""


class Unanswered(Unrecordable):
    """The database takes too long; what was to be written may be written yet."""


class Write(Generic[T]):
    """One operation, with an item for it, on its way to the disk."""

    __slots__ = ("_done", "_error", "item", "operation", "value")

    def __init__(
        self, operation: Callable[[sqlite3.Connection, list[Any]], T], item: object
    ) -> None:
        self.operation = operation
        self.item = item
        self.value: T
        self._done = threading.Lock()
        self._done.acquire()
        self._error: Exception | None = None

    def finish(self, error: Exception | None = None) -> None:
        del self.operation, self.item  # and with them whatever they hold, such as a body
        self._error = error
        self._done.release()

    def result(self) -> T:
        """What the operation returned, once it is committed; raises Unrecordable if it can't be."""
        if not self._done.acquire(timeout=_ANSWER_WITHIN):
            raise Unanswered("the database does not answer")
        self._done.release()
        if self._error is not None:
            raise self._error
        return self.value


def connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """A connection in autocommit mode; raises sqlite3.Error."""
    uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rw'}"
    db = sqlite3.connect(
        uri, uri=True, isolation_level=None, timeout=10, check_same_thread=False
    )
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA foreign_keys = ON")
    db.execute(f"PRAGMA cache_size = {-256 if readonly else -4096}")  # kibibytes
    return db


class Store:
    """Opens the database for this process alone, and writes to it from one thread.

    A write is an operation: a function of the connection, which runs inside a transaction that it
    shares with whatever else has queued up. It may be run again where another one failed.
    """

    def __init__(self, path: Path) -> None:
        """Raises StoreError."""
        self.path = path
        self.failure: str | None = None  # why nothing can be written, while that is so
        self.stored = 0  # commits since the start, for those who watch the writer
        self.commit_seconds = 0.0  # that they took together
        self._queue: queue.SimpleQueue[Write[Any] | None] = queue.SimpleQueue()
        self._idle: list[sqlite3.Connection] = []
        self._closing = False
        self._lock_file = self._lock()
        try:
            self._db = self._open()
        except StoreError:
            os.close(self._lock_file)
            raise
        self._thread = threading.Thread(target=self._write_forever, name="writer", daemon=True)
        self._thread.start()

    def _lock(self) -> int:
        """A lock that the kernel drops when this process dies. Its file says which process that is
        and when it ticked last.
        """
        path = f"{self.path}.lock"
        lock_file = None
        try:
            lock_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.pread(lock_file, 100, 0).split()
            self._last_tick = int(held[1]) if len(held) == 2 and held[1].isdigit() else 0
            self._write_lock(lock_file, self._last_tick)
            return lock_file
        except OSError as error:
            reason = f"{path}: {error.strerror}; correct the folder, its permissions or its space"
            if lock_file is not None:
                if isinstance(error, BlockingIOError):
                    process = os.pread(lock_file, 100, 0).decode("ascii", "replace").split(" ")[0]
                    reason = (f"another Larm (process {process}) is running on it; stop that one, "
                              "or give this one another database")
                os.close(lock_file)
            raise StoreError(f"{self.path}: {reason}") from None

    @staticmethod
    def _write_lock(lock_file: int, tick: int) -> None:
        os.pwrite(lock_file, f"{os.getpid()} {tick}".ljust(40).encode() + b"\n", 0)

    def _open(self) -> sqlite3.Connection:
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            if self.path.stat().st_mode & 0o077:
                self.path.chmod(0o600)
            db = connect(self.path, readonly=False)
            migrate(db)
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise ValueError("this file system can't hold SQLite's WAL; use a local disk")
            db.execute("PRAGMA synchronous = FULL")
            db.executescript(TAKE_PINGS)
            db.execute("SELECT * FROM clock").fetchone()  # who has the WAL open removes it at close
            return db
        except (OSError, sqlite3.Error, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise StoreError(f"{self.path}: can't be used as the database: {reason}") from None

    # Writing

    def submit(self, operation: Callable[[sqlite3.Connection], T]) -> Write[T]:
        """Queue an operation; raises Unrecordable at once while nothing can be written."""
        return self.gather(lambda db, _: operation(db), None)

    def gather(
        self, operation: Callable[[sqlite3.Connection, list[Item]], T], item: Item
    ) -> Write[T]:
        """Queue an item for an operation that takes all the items that wait for it in a row."""
        if self._closing or self.failure:
            raise Unrecordable(self.failure or "Larm is stopping")
        write = Write(operation, item)
        self._queue.put(write)
        return write

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run an operation and return its result once it is on disk; may raise Unrecordable."""
        return self.submit(operation).result()

    def _write_forever(self) -> None:
        while True:
            try:
                batch = [self._queue.get(timeout=1.0 if self.failure else None)]
                with contextlib.suppress(queue.Empty):
                    while len(batch) < BATCH and batch[-1] is not None:
                        batch.append(self._queue.get_nowait())
            except queue.Empty:
                batch = []
            writes = [write for write in batch if write is not None]
            if self.failure:
                self._probe()
            if writes:
                self._commit(writes)
            if None in batch:
                return

    def _probe(self) -> None:
        """Find out whether the database takes writes again."""
        try:
            self._transact([Write(write_ballast, None)])
        except Exception:  # still failing, for whatever reason: asked again in a second
            return
        log.warning("%s can be written again", self.path)
        self.failure = None

    def _commit(self, writes: list[Write[Any]]) -> None:
        """Commit all of them as one transaction, and answer each."""
        try:
            self._transact(writes)
        except Exception as error:
            if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
                if self.failure is None:
                    log.error("%s can't be written: %s; pings get 503 till then", self.path, error)
                self.failure = str(error)
                for write in writes:
                    write.finish(Unrecordable(str(error)))
            elif len(writes) == 1:
                writes[0].finish(error)
            else:  # one of them is at fault: the others must not suffer for it
                for write in writes:
                    self._commit([write])
        else:
            for write in writes:
                write.finish()

    def _transact(self, writes: list[Write[Any]]) -> None:
        began = time.perf_counter()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for operation, group in itertools.groupby(writes, lambda write: write.operation):
                same = list(group)
                value = operation(self._db, [write.item for write in same])
                for write in same:
                    write.value = value
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.rollback()
            raise
        self.stored += 1
        self.commit_seconds += time.perf_counter() - began

    # Reading

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A read-only connection that is this thread's own for the time being."""
        db = self._idle.pop() if self._idle else connect(self.path, readonly=True)
        try:
            yield db
        except BaseException:
            db.close()
            raise
        self._idle.append(db)

    # Being alive

    def last_alive_at(self) -> int | None:
        """When the Larm that last used this database was last seen alive, in its clock's time.

        The lock file's tick is finer, but counts only where it belongs to this very database and
        not to one that was put in its place: alive_at can't be older than half a minute then.
        """
        with self.reading() as db:
            row = db.execute("SELECT alive_at FROM clock").fetchone()
        if row is None:
            return None
        alive_at: int = row["alive_at"]
        return self._last_tick if 0 <= self._last_tick - alive_at <= 2 * ALIVE_EVERY else alive_at

    def mark_tick(self, now: int) -> None:
        """Note in the lock file that Larm is alive: costs no commit, and survives a kill -9."""
        with contextlib.suppress(OSError):  # a full disk; alive_at is not written then, either
            self._write_lock(self._lock_file, now)

    def writer_is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Commit what is queued, and close the WAL and every connection."""
        self._closing = True
        self._queue.put(None)
        self._thread.join(timeout=4)
        for reader in self._idle:
            reader.close()
        if not self._thread.is_alive():
            self._db.close()
        os.close(self._lock_file)


ALIVE_EVERY = 30 * SECOND  # how often alive_at is written


def schema_version(db: sqlite3.Connection) -> int:
    """Raises ValueError for another program's database, and for that of a newer Larm."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise ValueError(
            f"it was written by a newer Larm (schema {version}; this one knows "
            f"{len(MIGRATIONS)}): update larm.py"
        )
    owner = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    if tables and owner != APPLICATION_ID:
        raise ValueError("it belongs to another program")
    return version


def migrate(db: sqlite3.Connection) -> None:
    """Bring the schema up to date, a transaction a step; raises as schema_version() does."""
    version = schema_version(db)
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(
            f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; {script};"
            f"PRAGMA user_version = {number}; COMMIT"
        )


# Named queries. Each takes a connection; those that write run inside an operation of the Store.


@dataclass(frozen=True)
class Watched:
    """A monitor of the configuration, as the database knows it."""

    id: int
    token: str
    monitor: Monitor
    above: tuple[int, ...] = ()  # the ids of all monitors that it depends on, directly or not


def adopt(db: sqlite3.Connection, monitors: Iterable[Monitor], now: int) -> list[Watched]:
    """Make the database's monitors those of the configuration; no timer starts anew (law 7).

    What is new gets a token and waits for its first ping. What is gone or disabled is not watched
    from now on, and keeps its history. What is back goes on with the time that it had left; what
    was disabled is resumed.
    """
    configured = {monitor.key: monitor for monitor in monitors}
    rows = read_monitors(db)
    for key, row in rows.items():
        if key not in configured and row["watching"] == "yes":
            unwatch(db, row["id"], "removed", now)
    for key, monitor in configured.items():
        if key not in rows:
            rows[key] = _insert_monitor(db, monitor, now)
        _rewatch(db, monitor, rows[key], now)
    return [
        Watched(
            rows[key]["id"],
            monitor.token or rows[key]["made_token"],
            monitor,
            tuple(rows[parent]["id"] for parent in ancestors(configured, key)),
        )
        for key, monitor in configured.items()
    ]


def _insert_monitor(db: sqlite3.Connection, monitor: Monitor, now: int) -> sqlite3.Row:
    row: sqlite3.Row = db.execute(
        """
        INSERT INTO monitors (key, name, made_token, created_at, since, rhythm)
        VALUES (:key, :name, :token, :now, :now, :rhythm)
        RETURNING *, 0 AS running
        """,
        {"key": monitor.key, "name": monitor.name, "token": secrets.token_hex(16), "now": now,
         "rhythm": monitor.rhythm},
    ).fetchone()
    return row


def unwatch(
    db: sqlite3.Connection, monitor_id: int, why: str, now: int, resumes_at: int | None = None
) -> None:
    """Stop watching a monitor because it is paused, disabled or removed. A pause withdraws what
    could not yet be sent about it.
    """
    db.execute(
        """
        UPDATE monitors
        SET watching = :why, unwatched_at = COALESCE(unwatched_at, :now), resumes_at = :resumes_at
        WHERE id = :id
        """,
        {"id": monitor_id, "why": why, "now": now, "resumes_at": resumes_at},
    )
    db.execute(
        """
        UPDATE deliveries
        SET state = 'failed', error = :error
        WHERE state = 'pending' AND :why <> 'removed'
        AND event_id IN (SELECT id FROM events WHERE monitor_id = :id)
        """,
        {"id": monitor_id, "why": why, "error": f"withdrawn: the monitor was {why}"},
    )


def watch_again(db: sqlite3.Connection, monitor: Monitor, row: sqlite3.Row, now: int) -> None:
    """Watch a paused or disabled monitor again: it has one interval and its grace from now."""
    expected_at, deadline_at = monitor.expectation(now)
    limit_no_more(db, "monitor_id", row["id"])
    db.execute(
        "INSERT INTO gaps (monitor_id, from_at, to_at) VALUES (:id, :unwatched_at, :now)",
        {"id": row["id"], "unwatched_at": row["unwatched_at"], "now": now},
    )
    db.execute(
        """
        UPDATE monitors
        SET watching = 'yes', unwatched_at = NULL, resumes_at = NULL
        WHERE id = :id
        """,
        {"id": row["id"]},
    )
    db.execute(
        """
        UPDATE monitors
        SET state = 'up', since = IIF(state = 'up', since, :now), counts_from = :now,
            expected_at = :expected, deadline_at = :deadline, told = 'up', alert_at = NULL
        WHERE id = :id AND state <> 'pending'
        """,
        {"id": row["id"], "now": now, "expected": expected_at, "deadline": deadline_at},
    )


def pause_or_resume(
    db: sqlite3.Connection, monitor: Monitor, verb: str, span: int | None, now: int
) -> None:
    """Pause a monitor, for `span` milliseconds or until resumed, or resume it.

    Raises ValueError for one that larm.toml disables, or that the database does not know yet.
    """
    row = read_monitors(db).get(monitor.key)
    if row is None or row["watching"] == "removed":
        raise ValueError(f"{monitor.key} is not watched yet: start Larm once")
    if not monitor.enabled:
        raise ValueError(f"{monitor.key} is disabled in the file: set enabled = true there")
    if verb == "pause":
        unwatch(db, row["id"], "paused", now, None if span is None else now + span)
    elif row["watching"] == "paused":
        watch_again(db, monitor, row, now)


def pause_length(value: object) -> int:
    """Milliseconds of a pause; raises ValueError."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):  # from the command line
        value = int(value)
    return _duration(SECOND)(value)


def _rewatch(db: sqlite3.Connection, monitor: Monitor, row: sqlite3.Row, now: int) -> None:
    """Bring one known monitor's name, rhythm and deadline in line with its configuration."""
    counts_from, expected_at = row["counts_from"], row["expected_at"]
    deadline_at, alert_at = row["deadline_at"], row["alert_at"]
    if monitor.rhythm != row["rhythm"] and deadline_at is not None:
        expected_at, deadline_at = monitor.expectation(counts_from)
    watching, unwatched_at = row["watching"], row["unwatched_at"]
    if watching == "removed" and monitor.enabled:
        watching, unwatched_at = "yes", None
        away = now - row["unwatched_at"]
        alert_at = alert_at and alert_at + away
        move_runs(db, row["id"], away, monitor.max_runtime)
        if deadline_at is not None:
            counts_from, expected_at = counts_from + away, expected_at + away
            deadline_at += away
    values = {
        "name": monitor.name, "rhythm": monitor.rhythm, "watching": watching,
        "unwatched_at": unwatched_at, "counts_from": counts_from, "expected_at": expected_at,
        "deadline_at": deadline_at, "alert_at": alert_at,
    }
    if any(row[column] != value for column, value in values.items()):
        db.execute(
            f"UPDATE monitors SET {', '.join(f'{name} = :{name}' for name in values)} "
            "WHERE id = :id",
            values | {"id": row["id"]},
        )
    if row["running"]:
        move_runs(db, row["id"], 0, monitor.max_runtime)
    if not monitor.enabled and row["watching"] != "disabled":
        unwatch(db, row["id"], "disabled", now)
    elif monitor.enabled and row["watching"] == "disabled":
        watch_again(db, monitor, row, now)


@dataclass(frozen=True)
class Ping:
    """One call to the heartbeat endpoint, as it is kept."""

    signal: str  # success, fail, start or log
    exit_status: int | None = None
    method: str = "GET"
    sender: str | None = None
    user_agent: str | None = None
    rid: str | None = None
    body: str | None = None


@dataclass(frozen=True)
class Received:
    """A ping with its monitor and the moment it came."""

    watched: Watched
    ping: Ping
    at: int


TAKE_PINGS = """
    CREATE TEMP VIEW ping AS
    SELECT 0 AS monitor_id, 0 AS at, 0 AS window, 0 AS interval, 0 AS expected_at, 0 AS deadline_at,
        '' AS signal, 0 AS exit_status, '' AS method, '' AS sender, '' AS user_agent, '' AS rid,
        '' AS body;

    CREATE TEMP TRIGGER take_ping INSTEAD OF INSERT ON ping BEGIN
        INSERT INTO heartbeats
            (monitor_id, at, signal, exit_status, method, sender, user_agent, rid, body)
        SELECT new.monitor_id, new.at, new.signal, new.exit_status, new.method, new.sender,
            new.user_agent, new.rid, new.body
        WHERE NOT EXISTS (
            SELECT 1
            FROM (
                SELECT at
                FROM heartbeats
                WHERE monitor_id = new.monitor_id AND signal = new.signal
                ORDER BY id DESC
                LIMIT 1
            ) newest
            WHERE newest.at > new.at - new.window AND newest.at <= new.at
        )
        OR EXISTS (
            SELECT 1
            FROM monitors
            WHERE id = new.monitor_id AND watching = 'yes'
            AND IIF(new.signal = 'success', state <> 'up', new.signal = 'fail' AND state <> 'down')
            AND (
                SELECT COUNT(*)
                FROM events
                WHERE monitor_id = new.monitor_id AND at > new.at - new.interval AND at <= new.at
            ) < 10
        )
        OR (
            new.signal = 'start'
            AND NOT EXISTS (SELECT 1 FROM runs WHERE monitor_id = new.monitor_id)
            AND (
                SELECT COUNT(*)
                FROM heartbeats
                WHERE monitor_id = new.monitor_id AND signal = 'start'
                AND at > new.at - new.interval AND at <= new.at
            ) < 10
        );
        UPDATE monitors
        SET received_at = new.at, counts_from = new.at,
            expected_at = new.expected_at, deadline_at = new.deadline_at
        WHERE id = new.monitor_id AND state = 'up' AND new.signal = 'success'
        AND NOT EXISTS (SELECT 1 FROM runs WHERE monitor_id = new.monitor_id);
    END;
"""
"""Store a ping unless the throttle drops it, and move its monitor's deadline where one runs.

The window counts from the newest stored heartbeat of the same signal, unless that one is dated in
the future, since the clock was wrong then. What changes the state, or starts the only run, is
stored whatever the window, ten times an interval. It is a trigger, so that a batch of pings is one
call of SQLite: each call lets go of the interpreter lock, and must win it back from the threads
that serve requests.
"""


def _rows(count: int, columns: int) -> str:
    """The placeholders of so many rows of VALUES."""
    return ", ".join([f"({', '.join('?' * columns)})"] * count)


def take_pings(db: sqlite3.Connection, received: Sequence[Received]) -> bool:
    """Run TAKE_PINGS; True if each was stored, was a success of a monitor that is up, and ended no
    run.
    """
    before = db.total_changes
    values: list[object] = []
    for one in received:
        monitor, ping = one.watched.monitor, one.ping
        values += (
            one.watched.id, one.at, monitor.window, monitor.interval, *monitor.expectation(one.at),
            ping.signal, ping.exit_status, ping.method, ping.sender, ping.user_agent, ping.rid,
            ping.body,
        )
    db.execute(f"INSERT INTO ping VALUES {_rows(len(received), 13)}", values)
    return db.total_changes - before == 2 * len(received)


def open_run(db: sqlite3.Connection, started: Received) -> None:
    """A run that has started; it must end within max_runtime where that is set."""
    monitor_id, limit = started.watched.id, started.watched.monitor.max_runtime
    db.execute(
        """
        INSERT INTO runs (monitor_id, rid, started_at, max_runtime, ends_by)
        VALUES (:monitor, :rid, :at, :limit, :at + :limit)
        """,
        {"monitor": monitor_id, "rid": started.ping.rid, "at": started.at, "limit": limit},
    )
    db.execute(
        """
        DELETE FROM runs
        WHERE monitor_id = :monitor AND id <= (
            SELECT id
            FROM runs
            WHERE monitor_id = :monitor
            ORDER BY id DESC
            LIMIT 1 OFFSET :kept
        )
        """,
        {"monitor": monitor_id, "kept": OPEN_RUNS},
    )


def end_run(db: sqlite3.Connection, ended: Received, heartbeat_id: int | None) -> bool:
    """Close the run that a ping ends: the last one with its rid, else the last one without any.

    Those that began before it with the same rid, or with none, are closed with it, and so is what
    has been open for so long that its end will not come. True if other runs are open.
    """
    monitor = ended.watched.monitor
    whose = {"monitor": ended.watched.id, "rid": ended.ping.rid}
    run = db.execute(
        """
        SELECT *
        FROM runs
        WHERE monitor_id = :monitor AND (rid IS NULL OR rid = :rid OR :rid IS NULL)
        ORDER BY rid IS :rid DESC, rid IS NULL DESC, id DESC
        LIMIT 1
        """,
        whose,
    ).fetchone()
    lost = ended.at - monitor.interval - monitor.grace - (monitor.max_runtime or 0)
    db.execute(
        """
        DELETE FROM runs
        WHERE monitor_id = :monitor
        AND (
            (id <= :id AND (rid IS NULL OR rid = :closed))
            OR (started_at < :lost AND ends_by IS NULL)
        )
        """,
        whose | {"id": run and run["id"], "closed": run and run["rid"], "lost": lost},
    )
    if run is not None:
        lasted = {"ms": max(0, ended.at - run["started_at"])} | whose | {"heartbeat": heartbeat_id}
        db.execute("UPDATE heartbeats SET duration_ms = :ms WHERE id = :heartbeat", lasted)
        db.execute("UPDATE monitors SET last_duration_ms = :ms WHERE id = :monitor", lasted)
    others = db.execute("SELECT 1 FROM runs WHERE monitor_id = :monitor LIMIT 1", whose)
    return others.fetchone() is not None


def overrun(db: sqlite3.Connection, now: int) -> list[sqlite3.Row]:
    """The runs that have not ended in time, longest ago first."""
    return db.execute(
        """
        SELECT r.*
        FROM runs r
        JOIN monitors m ON m.id = r.monitor_id
        WHERE ends_by < :now AND watching = 'yes'
        ORDER BY ends_by
        LIMIT :limit
        """,
        {"now": now, "limit": BATCH},
    ).fetchall()


def move_runs(db: sqlite3.Connection, monitor_id: int, ms: int, max_runtime: int | None) -> None:
    """Give a monitor's open runs so much more time, and another max_runtime where it changed."""
    db.execute(
        """
        UPDATE runs
        SET ends_by = ends_by + :ms + :limit - max_runtime, max_runtime = :limit
        WHERE monitor_id = :monitor
        """,
        {"monitor": monitor_id, "ms": ms, "limit": max_runtime},
    )


def find_run(db: sqlite3.Connection, id: int) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute("SELECT * FROM runs WHERE id = :id", {"id": id}).fetchone()
    return row


def limit_no_more(db: sqlite3.Connection, column: str, id: int) -> None:
    """A run that has overrun, or the runs of a monitor, need not end in time any more."""
    db.execute(f"UPDATE runs SET ends_by = NULL WHERE {column} = :id", {"id": id})


def heartbeat_of(db: sqlite3.Connection, received: Received) -> int | None:
    """The id of a ping's heartbeat, if it was stored and is still the monitor's newest."""
    row = db.execute(
        """
        SELECT id, at, signal
        FROM heartbeats
        WHERE monitor_id = :monitor
        ORDER BY id DESC
        LIMIT 1
        """,
        {"monitor": received.watched.id},
    ).fetchone()
    stored = row and (row["at"], row["signal"]) == (received.at, received.ping.signal)
    return row["id"] if stored else None


def hear(db: sqlite3.Connection, successes: Iterable[tuple[Watched, int]]) -> None:
    """Count the deadlines from successes received at those moments, where the state is up."""
    db.executemany(
        """
        UPDATE monitors
        SET received_at = :at, counts_from = :at, expected_at = :expected, deadline_at = :deadline
        WHERE id = :id AND state = 'up'
        """,
        [
            dict(zip(("expected", "deadline"), watched.monitor.expectation(at), strict=True))
            | {"id": watched.id, "at": at}
            for watched, at in successes
        ],
    )


def note_received(db: sqlite3.Connection, one: Received) -> None:
    """A success that changes nothing else, since its monitor is not watched."""
    db.execute(
        "UPDATE monitors SET received_at = :at WHERE id = :id",
        {"at": one.at, "id": one.watched.id},
    )


def change_state(
    db: sqlite3.Connection, watched: Watched, state: str, since: int, held: sqlite3.Row
) -> bool:
    """Compare and set: False where the monitor is not as `held` says any more."""
    return db.execute(
        """
        UPDATE monitors
        SET state = :state, since = :since, expected_at = NULL, deadline_at = NULL, alert_at = NULL
        WHERE id = :id AND state = :held AND deadline_at IS :deadline AND watching = 'yes'
        """,
        {"id": watched.id, "state": state, "since": since, "held": held["state"],
         "deadline": held["deadline_at"]},
    ).rowcount == 1


def read_monitor(db: sqlite3.Connection, monitor_id: int) -> sqlite3.Row:
    row: sqlite3.Row = db.execute(
        "SELECT * FROM monitors WHERE id = :id", {"id": monitor_id}
    ).fetchone()
    return row


def read_monitors(db: sqlite3.Connection) -> dict[str, sqlite3.Row]:
    """Every monitor that the database knows, by key, and whether its job is running."""
    rows = db.execute("SELECT *, id IN (SELECT monitor_id FROM runs) AS running FROM monitors")
    return {row["key"]: row for row in rows}


def due_monitors(db: sqlite3.Connection, column: str, now: int) -> list[sqlite3.Row]:
    """The watched monitors of which a moment, deadline_at or alert_at, has passed, longest ago
    first.
    """
    return db.execute(
        f"""
        SELECT *
        FROM monitors
        WHERE {column} < :now AND watching = 'yes'
        ORDER BY {column}
        LIMIT :limit
        """,
        {"now": now, "limit": BATCH},
    ).fetchall()


def next_due_at(db: sqlite3.Connection, now: int) -> int | None:
    """When something is due next, after `now`: a deadline, an alert, the end of a run or pause."""
    due: int | None = db.execute(
        """
        SELECT MIN(at) FROM (
            SELECT MIN(deadline_at) AS at FROM monitors
            WHERE deadline_at > :now AND watching = 'yes'
            UNION ALL
            SELECT MIN(resumes_at) FROM monitors WHERE resumes_at > :now
            UNION ALL
            SELECT MIN(alert_at) FROM monitors WHERE alert_at > :now AND watching = 'yes'
            UNION ALL
            SELECT MIN(ends_by) FROM runs WHERE ends_by > :now
            UNION ALL
            SELECT MIN(due_at) FROM deliveries WHERE state = 'pending' AND due_at > :now
        )
        """,
        {"now": now},
    ).fetchone()[0]
    return due


def add_event(
    db: sqlite3.Connection,
    monitor_id: int,
    type: str,
    at: int,
    held: sqlite3.Row,
    reason: str | None = None,
    heartbeat_id: int | None = None,
) -> None:
    """What happened to a monitor; `held`: its row before that."""
    db.execute(
        """
        INSERT INTO events (
            monitor_id, type, at, reason, last_heartbeat_at, expected_at, down_ms, heartbeat_id
        )
        VALUES (:monitor, :type, :at, :reason, :last, :expected, :down_ms, :heartbeat)
        """,
        {"monitor": monitor_id, "type": type, "at": at, "reason": reason,
         "last": held["received_at"], "expected": held["expected_at"],
         "down_ms": max(0, at - held["since"]) if type == "up" else None,
         "heartbeat": heartbeat_id},
    )


def newest_event(
    db: sqlite3.Connection, monitor_id: int, type: str | None = None
) -> sqlite3.Row | None:
    """The newest event of a monitor, or its newest one of that type."""
    row: sqlite3.Row | None = db.execute(
        """
        SELECT *
        FROM events
        WHERE monitor_id = :monitor AND (:type IS NULL OR type = :type)
        ORDER BY id DESC
        LIMIT 1
        """,
        {"monitor": monitor_id, "type": type},
    ).fetchone()
    return row


def fail_again(db: sqlite3.Connection, event_id: int, heartbeat_id: int) -> None:
    """A monitor that is down has failed once more: what is said of it is the newest."""
    db.execute(
        "UPDATE events SET reason = 'failed', heartbeat_id = :heartbeat WHERE id = :event",
        {"event": event_id, "heartbeat": heartbeat_id},
    )


def count_changes(db: sqlite3.Connection, monitor_id: int, after: int) -> int:
    """How often a monitor has gone down or come up since."""
    count: int = db.execute(
        "SELECT COUNT(*) FROM events WHERE monitor_id = :monitor AND at > :after",
        {"monitor": monitor_id, "after": after},
    ).fetchone()[0]
    return count


def plan_alert(
    db: sqlite3.Connection, monitor_id: int, alert_at: int | None, told: str | None = None
) -> None:
    """When the next alert about a monitor is due, and what people know of it from now on."""
    db.execute(
        "UPDATE monitors SET alert_at = :at, told = COALESCE(:told, told) WHERE id = :id",
        {"id": monitor_id, "at": alert_at, "told": told},
    )


def down_monitors(db: sqlite3.Connection) -> list[sqlite3.Row]:
    return db.execute(
        "SELECT * FROM monitors WHERE state = 'down' AND watching = 'yes'"
    ).fetchall()


def held_alerts(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """The monitors that are down, but whose alert waits for news of those that they depend on."""
    return db.execute(
        """
        SELECT *
        FROM monitors
        WHERE alert_at IS NOT NULL AND watching = 'yes' AND state = 'down' AND told = 'up'
        """
    ).fetchall()


def queue_alert(
    db: sqlite3.Connection, event_id: int, kind: str, channels: Iterable[str], at: int
) -> None:
    """A delivery for each of these channels; no reminder for one that waits with the news."""
    db.executemany(
        """
        INSERT INTO deliveries (event_id, kind, channel, due_at)
        SELECT :event, :kind, :channel, :due
        WHERE :kind <> 'reminder' OR NOT EXISTS (
            SELECT 1
            FROM deliveries
            WHERE event_id = :event AND channel = :channel AND state = 'pending'
        )
        """,
        [
            {"event": event_id, "kind": kind, "channel": channel, "due": at + DIGEST_WITHIN}
            for channel in channels
        ],
    )


def take_untold_gaps(db: sqlite3.Connection, shortest: int) -> list[sqlite3.Row]:
    """The gaps in Larm's attention of which there was no alert yet, and is one now."""
    return db.execute(
        """
        UPDATE gaps
        SET told = 1
        WHERE told = 0 AND monitor_id IS NULL AND to_at - from_at > :shortest
        RETURNING *
        """,
        {"shortest": shortest},
    ).fetchall()


def open_troubles(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """The events of what is wrong with Larm itself, for those that have not ended."""
    return db.execute(
        """
        SELECT *
        FROM events
        WHERE type = 'down'
        AND id IN (SELECT MAX(id) FROM events WHERE topic IS NOT NULL GROUP BY topic)
        ORDER BY id
        """
    ).fetchall()


def report(
    db: sqlite3.Connection,
    topic: str,
    type: str,
    text: str,
    channels: Iterable[str],
    at: int,
) -> None:
    """An alert that something of Larm itself is in trouble ("down"), or is no longer ("up").

    A trouble is reported once: again only after its end, or with another text.
    """
    known = db.execute(
        """
        SELECT type, text, at
        FROM events
        WHERE topic = :topic AND id > COALESCE(
            (SELECT MAX(id) FROM events WHERE topic = :topic AND type = 'up'), 0
        )
        ORDER BY id
        """,
        {"topic": topic},
    ).fetchall()
    if (type == "up" and not known) or any(row["text"] == text for row in known):
        return
    event = db.execute(
        """
        INSERT INTO events (type, at, topic, text, down_ms)
        VALUES (:type, :at, :topic, :text, :down_ms)
        """,
        {"type": type, "at": at, "topic": topic, "text": text,
         "down_ms": max(0, at - known[0]["at"]) if type == "up" else None},
    )
    queue_alert(db, event.lastrowid or 0, "change", channels, at)


GIVE_UP_AFTER = 3 * DAY  # of trying to send an alert
DIGEST_WITHIN = 3 * SECOND  # alerts to one channel that come so close together are one message


def write_ballast(db: sqlite3.Connection, _: object) -> None:
    """As much as the largest ping takes, to find out whether there is room for one again."""
    db.execute("UPDATE clock SET ballast = randomblob(16384)")


def write_alive(db: sqlite3.Connection, now: int) -> None:
    if not db.execute("UPDATE clock SET alive_at = :now", {"now": now}).rowcount:
        db.execute("INSERT INTO clock (alive_at) VALUES (:now)", {"now": now})


def shift_deadlines(db: sqlite3.Connection, from_at: int, to_at: int, set_by: int) -> None:
    """Give everything that runs back the time that Larm was away or that the clock was set by.

    Larm was not watching between from_at and to_at; what was heard after from_at lost only the
    rest of that. Then the clock was set by `set_by`, backwards where it is negative.
    """
    span = {"from": from_at, "to": to_at, "set_by": set_by, "sane": SANE}
    heard = ":set_by + IIF(watching = 'yes', MAX(0, :to - MAX(:from, counts_from)), 0)"
    paused = ":set_by + MAX(0, :to - MAX(:from, unwatched_at))"
    db.execute(
        f"""
        UPDATE monitors
        SET counts_from = counts_from + {heard}, expected_at = expected_at + {heard},
            deadline_at = deadline_at + {heard}
        WHERE deadline_at IS NOT NULL
        """,
        span,
    )
    db.execute(
        f"""
        UPDATE monitors
        SET resumes_at = resumes_at + {paused}, unwatched_at = unwatched_at + :set_by
        WHERE unwatched_at IS NOT NULL
        """,
        span,
    )
    db.execute(
        """
        UPDATE runs
        SET started_at = started_at + :set_by,
            ends_by = ends_by + :set_by + IIF(
                monitor_id IN (SELECT id FROM monitors WHERE watching = 'yes'),
                MAX(0, :to - MAX(:from, started_at)), 0
            )
        """,
        span,
    )
    db.execute(
        """
        UPDATE monitors
        SET alert_at = alert_at + :set_by + :to - :from
        WHERE alert_at IS NOT NULL AND watching = 'yes'
        """,
        span,
    )
    db.execute(
        """
        UPDATE deliveries
        SET due_at = due_at + :set_by, first_tried_at = first_tried_at + :set_by
        WHERE state = 'pending'
        """,
        span,
    )
    db.execute("UPDATE channels SET failing_since = failing_since + :set_by", span)
    if to_at < SANE <= to_at + set_by:  # what a clock that was not set had dated is dated anew
        for table, column in (("heartbeats", "at"), ("events", "at"), ("monitors", "created_at"),
                              ("monitors", "since"), ("monitors", "received_at")):
            db.execute(
                f"UPDATE {table} SET {column} = {column} + :set_by WHERE {column} < :sane", span
            )
    else:
        db.execute("INSERT INTO gaps (from_at, to_at) VALUES (:from, :to + :set_by)", span)


def due_resumptions(db: sqlite3.Connection, now: int) -> list[sqlite3.Row]:
    """The monitors whose timed pause is over."""
    return db.execute(
        """
        SELECT *
        FROM monitors
        WHERE resumes_at <= :now AND watching = 'paused'
        """,
        {"now": now},
    ).fetchall()


Gap = sqlite3.Row | dict[str, Any]  # monitor_id, from_at, to_at


def gaps_since(db: sqlite3.Connection, start: int) -> list[sqlite3.Row]:
    """The gaps in Larm's attention and the monitors' pauses that end after a moment."""
    return db.execute(
        "SELECT * FROM gaps WHERE to_at > :start ORDER BY id", {"start": start}
    ).fetchall()


def channels_due(db: sqlite3.Connection, now: int) -> list[str]:
    """The channels that have something to send by now."""
    rows = db.execute(
        """
        SELECT DISTINCT channel
        FROM deliveries
        WHERE state = 'pending' AND due_at <= :now
        """,
        {"now": now},
    )
    return [row["channel"] for row in rows]


def pending_alerts(db: sqlite3.Connection, channel: str) -> list[sqlite3.Row]:
    """What a channel has to be told: for each monitor, and each trouble of Larm's, its newest
    unsent alert, with its event and monitor.

    `ids` are its unsent deliveries, `down_from` is when it went down first, of what is unsent, and
    `downs` how often; `ready_at` is when the first of them was tried, or is to be.
    """
    return db.execute(
        """
        SELECT g.*, d.kind, e.type, e.at, e.reason, e.last_heartbeat_at, e.expected_at, e.down_ms,
            e.topic, e.text, m.key, m.name, h.body, h.exit_status, h.duration_ms,
            (
                SELECT MAX(started_at)
                FROM runs
                WHERE monitor_id = m.id AND started_at > COALESCE(e.last_heartbeat_at, 0)
            ) AS running_since,
            EXISTS (
                SELECT 1 FROM heartbeats WHERE monitor_id = m.id AND signal = 'start'
            ) AS says_start
        FROM (
            SELECT MAX(d.id) AS id, GROUP_CONCAT(d.id) AS ids, MAX(d.attempts) AS attempts,
                MIN(d.due_at) AS due_at, MIN(IIF(type = 'down', e.at, NULL)) AS down_from,
                SUM(kind = 'change' AND type = 'down') AS downs,
                MIN(COALESCE(first_tried_at, due_at)) AS ready_at
            FROM deliveries d
            JOIN events e ON e.id = d.event_id
            WHERE d.channel = :channel AND d.state = 'pending'
            GROUP BY COALESCE(e.topic, e.monitor_id)
            ORDER BY MAX(d.id)
            LIMIT :limit
        ) g
        JOIN deliveries d ON d.id = g.id
        JOIN events e ON e.id = d.event_id
        LEFT JOIN monitors m ON m.id = e.monitor_id
        LEFT JOIN heartbeats h ON h.id = e.heartbeat_id
        ORDER BY g.id
        """,
        {"channel": channel, "limit": BATCH},
    ).fetchall()


def note_attempt(
    db: sqlite3.Connection,
    channel: str,
    deliveries: Iterable[int],
    state: str,
    now: int,
    due_at: int,
    error: str | None,
) -> None:
    """What became of an attempt to send these deliveries. pending: try again at due_at, unless it
    has been tried for too long.
    """
    db.executemany(
        """
        UPDATE deliveries
        SET state = IIF(:state = 'pending' AND first_tried_at < :too_long_ago, 'failed', :state),
            attempts = attempts + 1, at = :now, due_at = :due, error = :error,
            first_tried_at = COALESCE(first_tried_at, :now)
        WHERE id = :id AND state = 'pending'
        """,
        [
            {"id": id, "state": state, "now": now, "due": due_at, "error": error,
             "too_long_ago": now - GIVE_UP_AFTER}
            for id in deliveries
        ],
    )
    db.execute("INSERT OR IGNORE INTO channels (name) VALUES (:name)", {"name": channel})
    db.execute(
        """
        UPDATE channels
        SET sent_at = IIF(:error IS NULL, :now, sent_at), error = COALESCE(:error, error),
            failed_at = IIF(:error IS NULL, failed_at, :now),
            failing_since = IIF(:error IS NULL, NULL, COALESCE(failing_since, :now))
        WHERE name = :name
        """,
        {"name": channel, "error": error, "now": now},
    )


def read_channels(db: sqlite3.Connection) -> dict[str, sqlite3.Row]:
    """What became of the last attempts to send to each channel, and how many alerts it waits for,
    by name.
    """
    rows = db.execute(
        """
        SELECT c.*, COUNT(d.id) AS pending
        FROM (
            SELECT * FROM channels
            UNION
            SELECT DISTINCT channel, NULL, NULL, NULL, NULL
            FROM deliveries
            WHERE state = 'pending' AND channel NOT IN (SELECT name FROM channels)
        ) c
        LEFT JOIN deliveries d ON d.channel = c.name AND d.state = 'pending'
        GROUP BY c.name
        """
    )
    return {row["name"]: row for row in rows}


def is_delivery_stuck(db: sqlite3.Connection, now: int) -> bool:
    """Whether an alert has been due for long, or has been tried for very long, without success."""
    stuck = db.execute(
        """
        SELECT 1
        FROM deliveries
        WHERE state = 'pending' AND (due_at < :due OR first_tried_at < :tried)
        LIMIT 1
        """,
        {"due": now - 5 * MINUTE, "tried": now - HOUR},
    )
    return stuck.fetchone() is not None


def recent_heartbeats(
    db: sqlite3.Connection, monitor_id: int, limit: int, before: int | None = None
) -> list[sqlite3.Row]:
    """The newest heartbeats of a monitor, newest first; `before`: those older than that id."""
    return db.execute(
        """
        SELECT *
        FROM heartbeats
        WHERE monitor_id = :monitor AND (:before IS NULL OR id < :before)
        ORDER BY id DESC
        LIMIT :limit
        """,
        {"monitor": monitor_id, "limit": limit, "before": before},
    ).fetchall()


def state_changes(db: sqlite3.Connection, start: int) -> dict[int, list[sqlite3.Row]]:
    """The events since a moment, and the last one before it, by monitor id, oldest first."""
    changes: dict[int, list[sqlite3.Row]] = defaultdict(list)
    rows = db.execute(
        """
        SELECT monitor_id, type, at
        FROM events
        WHERE monitor_id IS NOT NULL
        AND at >= :start
        OR id IN (SELECT MAX(id) FROM events WHERE at < :start GROUP BY monitor_id)
        ORDER BY id
        """,
        {"start": start},
    )
    for row in rows:
        changes[row["monitor_id"]].append(row)
    return changes


def newest_id(db: sqlite3.Connection, table: str) -> int:
    """0 where it is empty."""
    newest: int = db.execute(f"SELECT COALESCE(MAX(id), 0) FROM {table}").fetchone()[0]
    return newest


def list_heartbeats(
    db: sqlite3.Connection, key: str, before: int, limit: int
) -> list[sqlite3.Row]:
    """A monitor's heartbeats whose ids are below `before`, newest first."""
    return db.execute(
        """
        SELECT *
        FROM heartbeats
        WHERE monitor_id = (SELECT id FROM monitors WHERE key = :key) AND id < :before
        ORDER BY id DESC
        LIMIT :limit
        """,
        {"key": key, "before": before, "limit": limit},
    ).fetchall()


def list_events(
    db: sqlite3.Connection, before: int, limit: int, after: int = 0
) -> list[sqlite3.Row]:
    """The monitors' events with ids between the two, with their keys, newest first."""
    return db.execute(
        """
        SELECT e.*, m.key
        FROM events e
        JOIN monitors m ON m.id = e.monitor_id
        WHERE e.id > :after AND e.id < :before
        ORDER BY e.id DESC
        LIMIT :limit
        """,
        {"after": after, "before": before, "limit": limit},
    ).fetchall()


def deliveries_between(
    db: sqlite3.Connection, first: int, last: int
) -> dict[int, list[sqlite3.Row]]:
    """The deliveries of the events with such ids, by event id."""
    deliveries: dict[int, list[sqlite3.Row]] = defaultdict(list)
    rows = db.execute(
        "SELECT * FROM deliveries WHERE event_id BETWEEN :first AND :last ORDER BY id",
        {"first": first, "last": last},
    )
    for row in rows:
        deliveries[row["event_id"]].append(row)
    return deliveries


def count_pending(db: sqlite3.Connection) -> dict[str, int]:
    """How many alerts each channel has yet to send."""
    rows = db.execute(
        "SELECT channel, COUNT(*) FROM deliveries WHERE state = 'pending' GROUP BY channel"
    )
    return dict(rows.fetchall())


_NEWEST = 2**63 - 1  # greater than any id


def recent_events(
    db: sqlite3.Connection, monitor_id: int | None, limit: int, before: int | None = None
) -> list[dict[str, Any]]:
    """The events of a monitor, or of all, newest first, each with its list of deliveries."""
    rows = db.execute(
        f"""
        SELECT e.*, m.key, h.exit_status
        FROM events e
        JOIN monitors m ON m.id = e.monitor_id
        LEFT JOIN heartbeats h ON h.id = e.heartbeat_id
        WHERE e.id < :before {"" if monitor_id is None else "AND e.monitor_id = :monitor"}
        ORDER BY e.id DESC
        LIMIT :limit
        """,
        {"monitor": monitor_id, "before": before or _NEWEST, "limit": limit},
    )
    events = {row["id"]: dict(row) | {"deliveries": []} for row in rows}
    for delivery in db.execute(
        """
        SELECT event_id, channel, state, attempts, at, error
        FROM deliveries
        WHERE event_id IN (SELECT value FROM json_each(:events))
        ORDER BY id
        """,
        {"events": json.dumps(list(events))},
    ):
        events[delivery["event_id"]]["deliveries"].append(delivery)
    return list(events.values())


def causes(db: sqlite3.Connection) -> dict[str, sqlite3.Row]:
    """Why the monitors that are down went down, by key, with the end of the job's output."""
    rows = db.execute(
        """
        SELECT m.key, e.reason, h.exit_status, SUBSTR(h.body, -1000) AS output
        FROM monitors m
        JOIN events e ON e.monitor_id = m.id AND e.at = m.since AND e.type = 'down'
        LEFT JOIN heartbeats h ON h.id = e.heartbeat_id
        WHERE m.state = 'down'
        ORDER BY e.id
        """
    )
    return {row["key"]: row for row in rows}


def prune_heartbeats(db: sqlite3.Connection, after: int, count: int, before: int) -> int:
    """Delete, of the `count` monitors whose ids follow `after`, the removed ones too, heartbeats
    that are older than `before` or not among the newest, and the bodies of those that are not among
    the very newest; but for those of an event. Returns the last of these ids, 0 after them all.
    """
    monitors = db.execute(
        "SELECT id FROM monitors WHERE id > :after ORDER BY id LIMIT :count",
        {"after": after, "count": count},
    ).fetchall()
    old = """
        SELECT id
        FROM heartbeats h
        WHERE monitor_id = :monitor
        AND (
            at < :before
            OR id <= (
                SELECT id
                FROM heartbeats
                WHERE monitor_id = :monitor
                ORDER BY id DESC
                LIMIT 1 OFFSET :kept
            )
        )
        AND NOT EXISTS (SELECT 1 FROM events WHERE heartbeat_id = h.id)
        ORDER BY id
        LIMIT :limit
        """
    for row in monitors:
        db.execute(
            f"DELETE FROM heartbeats WHERE id IN ({old})",
            {"monitor": row["id"], "before": before, "kept": NEWEST_KEPT, "limit": BATCH},
        )
        db.execute(
            f"UPDATE heartbeats SET body = NULL WHERE body IS NOT NULL AND id IN ({old})",
            {"monitor": row["id"], "before": 0, "kept": BODIES_KEPT, "limit": NEWEST_KEPT},
        )
    return monitors[-1]["id"] if monitors else 0


def prune_events(db: sqlite3.Connection, before: int) -> None:
    """Delete some of the gaps and events that are older, but for what still matters."""
    db.execute(
        """
        DELETE FROM events
        WHERE id IN (
            SELECT id
            FROM events e
            WHERE at < :before
            AND NOT EXISTS (
                SELECT 1 FROM monitors WHERE id = e.monitor_id AND state = 'down' AND since = e.at
            )
            AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event_id = e.id AND state = 'pending')
            LIMIT :limit
        )
        """,
        {"before": before, "limit": BATCH},
    )
    db.execute("DELETE FROM gaps WHERE to_at < :before", {"before": before})


# ======================================================================================
# States: what leads from one state to another, and who is told of it when.
# ======================================================================================

TRANSITIONS = {  # (state, what happened): (the state then, the event)
    ("pending", "success"): ("up", None),
    ("pending", "fail"): ("down", "down"),
    ("pending", "start"): ("pending", None),
    ("pending", "log"): ("pending", None),
    ("pending", "overran"): ("down", "down"),
    ("up", "success"): ("up", None),
    ("up", "fail"): ("down", "down"),
    ("up", "start"): ("up", None),
    ("up", "log"): ("up", None),
    ("up", "missed"): ("down", "down"),
    ("up", "overran"): ("down", "down"),
    ("down", "success"): ("up", "up"),
    ("down", "fail"): ("down", None),  # the reason and the output are the newest
    ("down", "start"): ("down", None),
    ("down", "log"): ("down", None),
    ("down", "overran"): ("down", None),
}
REASONS = {"fail": "failed", "missed": "missed", "overran": "overran"}

FLAPS, FLAPS_WITHIN = 6, 10  # more changes than that in so many intervals are flapping,
SETTLED_AFTER = 3  # until the monitor has held one state for so many


def enter(
    db: sqlite3.Connection,
    family: Mapping[int, Watched],
    watched: Watched,
    held: sqlite3.Row,
    signal: str,
    at: int,
    heartbeat_id: int | None = None,
) -> None:
    """Take a monitor through TRANSITIONS, if it still is as `held` says (law 4).

    State, event and deliveries are the caller's one transaction. `family`: all that is watched.
    """
    state, event = TRANSITIONS[held["state"], signal]
    if state == held["state"]:
        newest = newest_event(db, watched.id, "down") if signal == "fail" else None
        if newest is not None and heartbeat_id is not None:
            fail_again(db, newest["id"], heartbeat_id)
        return
    if not change_state(db, watched, state, at, held):
        return
    if state == "up":
        hear(db, [(watched, at)])
    if event:
        add_event(db, watched.id, event, at, held, REASONS.get(signal), heartbeat_id)
        consider_alert(db, watched, at)
        dependents = {id for id, one in family.items() if watched.id in one.above}
        for row in down_monitors(db) if dependents else ():
            if row["id"] in dependents:
                consider_alert(db, family[row["id"]], at)


def held_until(db: sqlite3.Connection, watched: Watched, row: sqlite3.Row) -> int | None:
    """Until when the alert about a monitor that is down waits for news of those that it depends
    on; None: for as long as one of them is down.

    One that was not heard of since may be down, too: its deadline will tell. After its return, a
    job whose ping was due while it was away has the time that it had left, and one interval.
    """
    since: int = row["since"]
    until, event = since, newest_event(db, watched.id)
    expected_at = event["expected_at"] if event is not None else None
    for parent_id in watched.above:
        parent = read_monitor(db, parent_id)
        if parent["watching"] != "yes":
            continue
        if parent["state"] == "down":
            return None
        if (parent["received_at"] or 0) < since:
            until = max(until, (parent["deadline_at"] or 0) + 1)
        back = newest_event(db, parent_id, "up")
        if back and (row["received_at"] or 0) < back["at"] and (expected_at or since) <= back["at"]:
            had_left = max(0, since - (back["at"] - back["down_ms"]))
            until = max(until, back["at"] + had_left + watched.monitor.interval)
    return until


def next_alert_at(
    db: sqlite3.Connection, watched: Watched, row: sqlite3.Row, now: int
) -> int | None:
    """When the next alert about a monitor is due, as things stand; None: there is none."""
    monitor, is_down, since = watched.monitor, row["state"] == "down", int(row["since"])
    until = held_until(db, watched, row) if is_down else now
    if until is None:
        return None
    if row["told"] == "flapping":
        return max(until, since + SETTLED_AFTER * monitor.interval)
    if row["told"] != row["state"]:
        return max(until, now)
    if is_down and monitor.remind:
        return min(row["alert_at"] or NEVER, now + monitor.remind)
    return None


def consider_alert(db: sqlite3.Connection, watched: Watched, now: int) -> None:
    """Plan the next alert about a monitor, and queue it where it is due by now.

    To be called when its state has changed, or that of one that it depends on, or its settings.
    """
    row = read_monitor(db, watched.id)
    due = next_alert_at(db, watched, row, now)
    if due != row["alert_at"]:
        plan_alert(db, watched.id, due)
    if due is not None and due <= now:
        send_alert(db, watched, now)


def send_alert(db: sqlite3.Connection, watched: Watched, now: int) -> None:
    """Queue the alert that is due about a monitor: what people do not know yet, or a reminder."""
    row, event = read_monitor(db, watched.id), newest_event(db, watched.id)
    monitor, state, told = watched.monitor, row["state"], row["told"]
    calm_from = row["since"] - FLAPS_WITHIN * monitor.interval
    waits = state == "down" and held_until(db, watched, row) is None
    if event is None or waits or (state == told and not monitor.remind):
        plan_alert(db, watched.id, None)
        return
    if told == "flapping":
        kind, told = "settled", state
    elif state == told:
        kind = "reminder"
    elif count_changes(db, watched.id, calm_from) > FLAPS:
        kind, told = "flapping", "flapping"
    else:
        kind, told = "change", state
    queue_alert(db, event["id"], kind, monitor.notify, row["alert_at"])
    if told == "flapping":
        following = row["since"] + SETTLED_AFTER * monitor.interval
    else:
        following = now + monitor.remind if monitor.remind and state == "down" else None
    plan_alert(db, watched.id, following, told)


# ======================================================================================
# Intake: decides what a ping means. Knows nothing of HTTP.
# ======================================================================================

BODY_KEPT = 10_000  # bytes of a ping's body, its last ones
_CHANGES_AFTER = {  # the signals that change something next, and are not to be throttled here
    "success": ("start",), "fail": ("success", "start"), "start": ("success",), "log": (),
}
STRANGERS_KEPT = 20  # of the unknown tokens that were pinged and their senders
_EXIT_STATUS = re.compile(r"0|[1-9][0-9]{0,2}")


def read_signal(action: str) -> tuple[str, int | None] | None:
    """(signal, exit status) of what stands behind the token in a ping's URL; None: no meaning."""
    if action == "":
        return "success", None
    if action in ("start", "fail", "log"):
        return action, None
    if _EXIT_STATUS.fullmatch(action) and int(action) <= 255:
        return ("fail" if int(action) else "success"), int(action)
    return None


@dataclass(frozen=True)
class Stranger:
    """Pings from one sender with a token that is no monitor's: a typo, or a monitor that is gone.

    Of the token only its first 4 characters: enough to find the typo, too little to be a secret.
    """

    start: str
    sender: str
    count: int
    at: int  # of the last one


class Intake:
    """Takes pings: drops what is throttled, has the rest recorded, and knows what it heard last.

    A throttled ping is dropped without touching the database; that it came is remembered here, and
    written with the watcher's next tick. `lock` makes one step of reading the clock, deciding on
    the throttle and queueing the write, so that pings are recorded in the order of their times.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.lock = threading.Lock()
        self._store = store
        self._clock = clock
        self._by_token: Mapping[str, Watched] = {}
        self._by_id: Mapping[int, Watched] = {}
        self._recent: dict[tuple[int, str], tuple[int, Write[None]]] = {}
        self._heard: dict[int, int] = {}  # monitor id -> when the last success was received
        self._unwritten: set[int] = set()  # the monitors whose last success was throttled
        self.throttled = 0  # pings, since the start
        self._strangers: dict[tuple[str, str], Stranger] = {}  # the newest stands last

    def use(self, watched: Iterable[Watched]) -> None:
        """Take over a configuration's monitors; part of the operation that adopts them."""
        self._by_id = {one.id: one for one in watched}
        made_last = sorted(self._by_id.values(), key=lambda one: one.monitor.token is None)
        self._by_token = {one.token: one for one in made_last}  # nobody takes a token Larm made

    def receive(
        self, token: str, action: str, ping: Callable[[str, int | None], Ping], sender: str = ""
    ) -> None:
        """Return once the ping is on disk, or at once where there is nothing to record.

        `ping` makes a Ping of (signal, exit status). Raises Unrecordable, whatever the token.
        """
        if self._store.failure:
            raise Unrecordable(self._store.failure)
        watched = self._by_token.get(token)
        meaning = read_signal(action)
        if watched is None:
            self._remember(token[:4], sender)
        if watched is None or meaning is None:
            return
        write = self._accept(watched, ping(*meaning))
        try:
            write.result()
        except Exception:
            self._recent.pop((watched.id, meaning[0]), None)
            raise

    def _remember(self, start: str, sender: str) -> None:
        with self.lock:
            before = self._strangers.pop((start, sender), None)
            count = before.count + 1 if before else 1
            self._strangers[start, sender] = Stranger(start, sender, count, self._clock.now())
            if len(self._strangers) > STRANGERS_KEPT:
                del self._strangers[next(iter(self._strangers))]

    def strangers(self) -> list[Stranger]:
        """The pings with unknown tokens since the start, the newest first."""
        with self.lock:
            return list(self._strangers.values())[::-1]

    def _accept(self, watched: Watched, ping: Ping) -> Write[None]:
        """The write that this ping's answer waits for: its own, or what it was throttled by."""
        key = watched.id, ping.signal
        with self.lock:
            at = self._clock.now()
            if ping.signal == "success":
                self._heard[watched.id] = at
            if key in self._recent and ping.signal != "fail":  # it may be one after a pause
                stored_at, write = self._recent[key]
                if 0 <= at - stored_at < watched.monitor.window:
                    self.throttled += 1
                    if ping.signal == "success":
                        self._unwritten.add(watched.id)
                    return write
            write = self._store.gather(self._record, Received(watched, ping, at))
            self._recent[key] = at, write
            for following in _CHANGES_AFTER[ping.signal]:
                self._recent.pop((watched.id, following), None)
            return write

    def _record(self, db: sqlite3.Connection, received: list[Received]) -> None:
        """The operation: the heartbeats, and what they do to their monitors' states."""
        for successes, run in itertools.groupby(received, lambda one: one.ping.signal == "success"):
            batch = [self._current(one) for one in run]
            if successes and take_pings(db, batch):
                continue
            for one in batch:
                if not successes:
                    take_pings(db, [one])
                self._change_state(db, one)

    def _change_state(self, db: sqlite3.Connection, one: Received) -> None:
        """What a ping that was stored a moment ago, if it was, does to a monitor's state."""
        held = read_monitor(db, one.watched.id)
        heartbeat_id = heartbeat_of(db, one)
        if one.ping.signal == "start" and heartbeat_id is not None:
            open_run(db, one)
        elif one.ping.signal in ("success", "fail") and end_run(db, one, heartbeat_id):
            self.forget(one.watched.id, "success")  # the next one may end another run
        if held["watching"] != "yes":
            self.forget(one.watched.id, one.ping.signal)  # the first one after the pause counts
            if one.ping.signal == "success":
                note_received(db, one)
        elif (held["state"], one.ping.signal) == ("up", "success"):
            hear(db, [(one.watched, one.at)])
        elif heartbeat_id is not None:
            enter(db, self._by_id, one.watched, held, one.ping.signal, one.at, heartbeat_id)

    def forget(self, monitor_id: int, signal: str) -> None:
        """The next ping with this signal changes something: let it through to the database."""
        with self.lock:
            self._recent.pop((monitor_id, signal), None)

    def _current(self, one: Received) -> Received:
        """The same with its monitor as it is configured by now."""
        watched = self._by_id.get(one.watched.id, one.watched)
        return one if watched is one.watched else dataclasses.replace(one, watched=watched)

    def heard_since(self, monitor_id: int, counts_from: int) -> int | None:
        """When a success was received that moves the deadline on; None: silence.

        After silence the next ping goes to the database, since it changes the state.
        """
        with self.lock:
            heard_at = self._heard.get(monitor_id)
            if heard_at is not None and heard_at > counts_from:
                return heard_at
            self._recent.pop((monitor_id, "success"), None)
            return None

    def take_unwritten(self) -> list[tuple[Watched, int]]:
        """The throttled successes that the database does not know of yet. Needs the lock."""
        unwritten = [
            (self._by_id[id], self._heard[id]) for id in self._unwritten if id in self._by_id
        ]
        self._unwritten.clear()
        return unwritten

    def heard(self) -> list[tuple[Watched, int]]:
        """The last success of each monitor since the clock was set."""
        with self.lock:
            return [(self._by_id[id], at) for id, at in self._heard.items() if id in self._by_id]

    def forget_times(self) -> None:
        """What was heard before the clock was set says nothing after it. Needs the lock."""
        self._heard.clear()


# ======================================================================================
# Watcher: decides what silence means.
# ======================================================================================

TICK = 1 * SECOND  # the longest sleep between two ticks
STALL = 2 * SECOND  # a tick so late judges nothing: pings may be waiting to be taken
GAP = 10 * SECOND  # a tick so late means that Larm was stopped
CLOCK_SET = 5 * SECOND  # a wall clock that moved so far against the monotonic one was set
PRUNED_A_TICK = 10  # monitors
CHECK_EVERY = 1 * MINUTE  # of Larm's own health
LITTLE_SPACE = 50_000_000  # bytes of free disk
LONG_GAP = FAILING_FOR = 1 * HOUR  # of a gap, of a channel that takes nothing
UNRECORDED_FOR = 10 * SECOND
_UNRECORDABLE = "heartbeats can't be recorded"
SEEN_FOR_ADVICE = 5  # heartbeats
HALF_HOUR = 30 * MINUTE
TRUST_AFTER = 1 * HOUR  # from the start, or after the clock was set, until its date prunes history


class Watcher:
    """One thread that finds missed deadlines and the gaps in its own attention."""

    def __init__(self, store: Store, clock: Clock, intake: Intake) -> None:
        self.ticked = clock.monotonic()  # the last tick
        self._store = store
        self._clock = clock
        self._intake = intake
        self._by_id: Mapping[int, Watched] = {}
        self._keep = 0
        self._owed: list[Callable[[sqlite3.Connection], None]] = []  # what is not on disk yet
        self._paying: tuple[Write[None], int] | None = None  # how many of these are being written
        self._unable = 0  # for how long nothing could be written, while that is so
        self.is_backlogged: Callable[[], bool] = lambda: False  # whether pings wait to be taken
        self._hesitated = 0  # times in a row that nothing was judged for being late
        self._alive_written = clock.monotonic()
        self._pruned = 0  # the id of the monitor that was pruned last
        self._trusted_from = clock.monotonic() + TRUST_AFTER

    def use(self, watched: Iterable[Watched], keep: int) -> None:
        """Take over a configuration's monitors, and how long history is kept."""
        self._by_id = {monitor.id: monitor for monitor in watched}
        self._keep = keep

    def begin(self) -> None:
        """Account for the time since Larm was last alive; raises Unrecordable.

        Every running deadline keeps the time that it had left (law 5).
        """
        now = self._clock.now()
        last = self._store.last_alive_at()

        def account(db: sqlite3.Connection) -> None:
            if last is not None and last != now:
                to_at = max(last, now)  # a clock that is behind was set back, after who knows what
                shift_deadlines(db, last, to_at, now - to_at)
            write_alive(db, now)

        self._store.write(account)
        self._store.mark_tick(now)
        self.ticked = self._clock.monotonic()

    def tick(self, planned: int) -> int:
        """One round; returns the milliseconds to sleep until the next. May raise Unrecordable.

        `planned`: the milliseconds that were meant to pass since the last one.

        1. Where Larm did not watch or the clock was set, shift what is running.
        2. Write what only memory knows: throttled pings, and that Larm is alive.
        3. Unless the clock was never set, resume what was paused until now, and, unless this tick
           is late, call down what has missed its deadline.
        4. With no deadline to judge, queue the alerts that are due, and prune a little.
        5. Sleep until the next deadline or delivery is due, one second at most.
        """
        monotonic = self._clock.monotonic()
        late = monotonic - self.ticked - planned + self._unable
        self._unable = late + planned if self._store.failure else 0
        self.ticked = monotonic
        if self._store.failure:  # no ping can be taken either: as good as not watching
            raise Unrecordable(self._store.failure)
        self._account_for_gap(late)
        self._write_alive()
        now = self._clock.now()
        if now >= SANE:
            with self._store.reading() as db:
                due, runs = due_monitors(db, "deadline_at", now), overrun(db, now)
                untold = due_monitors(db, "alert_at", now) + self._released(db)
                ended = due_resumptions(db, now)
            if any(row["id"] in self._by_id for row in ended):
                self._store.write(lambda db: self._resume(db, now))
            if not due and not runs:
                self._hesitated = 0
                if untold:
                    self._store.write(lambda db: self._send_alerts(db, untold, now))
                self._prune(now)
            elif self._is_punctual(late):
                self._store.write(lambda db: self._call_down(db, due, runs))
            if BATCH in (len(due), len(runs)):  # there are more
                return 10
        return self._until_next(now)

    def _is_punctual(self, late: int = 0) -> bool:
        """Whether a judgement is fair: where this tick or the disk was slow, or the server has not
        got round to all requests, pings may be waiting to be taken. On a machine that is always
        slow it is put off twice and no more.
        """
        slow = late >= STALL or self._clock.monotonic() - self.ticked >= STALL
        if not slow and not self.is_backlogged():
            self._hesitated = 0
        elif self._hesitated < 2:
            self._hesitated += 1
            return False
        return True

    def _account_for_gap(self, late: int) -> None:
        drift = self._clock.drift()
        away = late if late > GAP else 0
        set_by = drift if abs(drift) > CLOCK_SET else 0
        with self._intake.lock:  # no ping may be dated on one side and queued on the other
            to_at = self._clock.now()
            self._clock.resync()
            if away or set_by:
                heard = self._intake.take_unwritten()
                if set_by:
                    self._intake.forget_times()
                    self._trusted_from = self.ticked + TRUST_AFTER
                if set_by < 0:  # a tick of the old time must not look newer than alive_at
                    self._store.mark_tick(to_at + set_by)

                def shift(db: sqlite3.Connection) -> None:
                    hear(db, heard)
                    shift_deadlines(db, to_at - away, to_at, set_by)
                    if set_by:  # where this is written late, pings of the new time came before it
                        hear(db, self._intake.heard())
                    write_alive(db, to_at + set_by)  # a crash now must not count it again

                self._owed.append(shift)
                self._pay(wait=False)
        if away:
            log.warning("Larm was stopped for %s; deadlines moved", format_duration(away))
        if set_by:
            way = f"{'forward' if set_by > 0 else 'back'} by {format_duration(abs(set_by))}"
            log.warning("the clock was set %s; deadlines moved with it", way)
        self._pay()

    def _write_alive(self) -> None:
        now = self._clock.now()
        with self._intake.lock:
            heard = self._intake.take_unwritten()
        if heard or self.ticked - self._alive_written >= ALIVE_EVERY:

            def write(db: sqlite3.Connection) -> None:
                hear(db, heard)
                write_alive(db, now)

            self._owed.append(write)
            self._pay()
            self._alive_written = self.ticked
        self._store.mark_tick(now)

    def _pay(self, wait: bool = True) -> None:
        """Write what is owed, each once, however often the disk fails; may raise Unrecordable."""
        while self._owed:
            if self._paying is None:
                owed = tuple(self._owed)

                def write_all(db: sqlite3.Connection, owed: Any = owed) -> None:
                    for operation in owed:
                        operation(db)

                try:
                    self._paying = self._store.submit(write_all), len(owed)
                except Unrecordable:
                    if wait:
                        raise
            if not wait or self._paying is None:
                return
            write, count = self._paying
            try:
                write.result()
            except Unanswered:
                raise
            except Exception:
                self._paying = None
                raise
            self._paying = None
            del self._owed[:count]

    def _call_down(
        self, db: sqlite3.Connection, due: Iterable[sqlite3.Row], runs: Iterable[sqlite3.Row]
    ) -> None:
        """The operation: one down event for each deadline that was missed, dated at it, and for
        each run that has not ended in time.
        """
        if not self._is_punctual():
            return
        passed: list[tuple[int, sqlite3.Row, sqlite3.Row | None]] = [
            *((row["deadline_at"], row, None) for row in due),
            *((run["ends_by"], read_monitor(db, run["monitor_id"]), run) for run in runs),
        ]
        for at, held, run in sorted(passed, key=lambda found: found[0]):
            if watched := self._by_id.get(held["id"]):
                self._judge(db, watched, held, at, run)

    def _judge(
        self,
        db: sqlite3.Connection,
        watched: Watched,
        held: sqlite3.Row,
        at: int,
        run: sqlite3.Row | None,
    ) -> None:
        """What a deadline, or the end of the time for a run, that has passed says of a monitor."""
        if run is not None:
            if find_run(db, run["id"]) is not None:  # it has not ended since
                self._intake.forget(watched.id, "success")
                held = read_monitor(db, watched.id)
                enter(db, self._by_id, watched, held, "overran", at)
                limit_no_more(db, "id", run["id"])
        elif (heard_at := self._intake.heard_since(watched.id, held["counts_from"])) is None:
            enter(db, self._by_id, watched, held, "missed", at)
        else:
            hear(db, [(watched, heard_at)])

    def _released(self, db: sqlite3.Connection) -> list[sqlite3.Row]:
        """The monitors whose alerts wait no longer: all that they depend on was heard of since."""
        return [
            row
            for row in held_alerts(db)
            if (watched := self._by_id.get(row["id"]))
            and held_until(db, watched, row) == row["since"]
        ]

    def _send_alerts(
        self, db: sqlite3.Connection, untold: Iterable[sqlite3.Row], now: int
    ) -> None:
        """The operation: the alerts that were held until now, and the reminders."""
        for row in untold:
            if watched := self._by_id.get(row["id"]):
                if row["alert_at"] > now:
                    consider_alert(db, watched, now)
                else:
                    send_alert(db, watched, now)

    def reconsider_alerts(self, db: sqlite3.Connection) -> None:
        """The operation: plan alerts anew where that may have changed: a monitor that another one
        depends on was paused or removed, or a reminder was set in larm.toml.
        """
        for row in down_monitors(db):
            watched = self._by_id.get(row["id"])
            if watched and (row["alert_at"] is None or row["told"] == "down"):
                consider_alert(db, watched, self._clock.now())

    def _resume(self, db: sqlite3.Connection, now: int) -> None:
        """The operation: the end of timed pauses."""
        for row in due_resumptions(db, now):
            if watched := self._by_id.get(row["id"]):
                watch_again(db, watched.monitor, row, max(row["resumes_at"], now - TICK))

    def _prune(self, now: int) -> None:
        before = now - self._keep if self.ticked >= self._trusted_from else 0

        def prune(db: sqlite3.Connection) -> int:
            prune_events(db, before)
            return prune_heartbeats(db, self._pruned, PRUNED_A_TICK, before)

        self._pruned = self._store.write(prune)

    def _until_next(self, now: int) -> int:
        with self._store.reading() as db:
            due_at = next_due_at(db, now)
        return TICK if due_at is None else min(TICK, max(due_at + 1 - now, 10))

    def end(self) -> None:
        """Write what only memory knows, at a clean stop."""
        self._alive_written -= ALIVE_EVERY
        with contextlib.suppress(Unrecordable):
            self._pay()
            self._write_alive()

    def is_stalled(self) -> bool:
        return self._clock.monotonic() - self.ticked > GAP


@dataclass(frozen=True)
class Spread:
    """How long something took, in milliseconds."""

    shortest: int
    typical: int
    longest: int

    def __str__(self) -> str:
        """ "1 d typically, 23 h 58 min to 1 d 2 min" """
        typical, shortest, longest = (
            format_duration(ms) for ms in (self.typical, self.shortest, self.longest)
        )
        return f"{typical} typically, {shortest} to {longest}"


def spread(lengths: Iterable[int]) -> Spread | None:
    ordered = sorted(lengths)
    return Spread(ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None


@dataclass(frozen=True)
class Rhythm:
    """How a monitor's last heartbeats came, and a line of advice where the settings do not fit."""

    apart: Spread | None
    lasted: Spread | None
    advice: str | None

    def lines(self) -> list[str]:
        """It in words, a line each."""
        found = {"heartbeats come every": self.apart, "runs take": self.lasted,
                 "advice:": self.advice}
        return [f"{what} {it}" for what, it in found.items() if it is not None]


def rhythm(monitor: Monitor, heartbeats: Sequence[sqlite3.Row]) -> Rhythm:
    """`heartbeats`: the newest ones, as recent_heartbeats() gives them."""
    times = sorted(row["at"] for row in heartbeats if row["signal"] == "success")
    apart = spread(later - earlier for earlier, later in itertools.pairwise(times))
    lasted = spread(row["duration_ms"] for row in heartbeats if row["duration_ms"] is not None)
    if apart is None or len(times) < SEEN_FOR_ADVICE:
        return Rhythm(apart, lasted, None)
    if monitor.schedule is None and not 0.5 < apart.typical / monitor.interval < 1.1:
        every = format_duration(monitor.interval)
        advice = f'{every} is not how often they come: try interval = "{_setting(apart.typical)}"'
        return Rhythm(apart, lasted, advice)
    late = _lateness(monitor, times)
    if shift := monitor.schedule and _shift(monitor, late):
        return Rhythm(apart, lasted, f"they come exactly {shift} the schedule: timezone?")
    usual = [ms for ms in late if ms < monitor.interval // 2]  # more than that was an outage
    if usual and max(usual) > monitor.grace:
        grace = format_duration(monitor.grace) if monitor.grace else "0"
        found = f"they come up to {format_duration(max(usual))} late; a grace of {grace} will alert"
        return Rhythm(apart, lasted, f'{found}: try grace = "{_setting(max(usual) * 1.1)}"')
    return Rhythm(apart, lasted, None)


def _lateness(monitor: Monitor, times: Sequence[int]) -> list[int]:
    """By how many milliseconds each heartbeat came after it was due, in the order of size."""
    if monitor.schedule is None:
        apart = (later - earlier for earlier, later in itertools.pairwise(times))
        return sorted(gap - monitor.interval for gap in apart)
    longest = max(later - earlier for earlier, later in itertools.pairwise(times))
    start = times[0] - max(longest, monitor.interval)
    due = monitor.schedule.next_after(start, (times[-1] - start) // monitor.interval + 2)
    early = min(monitor.grace, monitor.interval // 10)
    return sorted(at - due[bisect.bisect(due, at + early) - 1] for at in times if due[0] <= at)


def _shift(monitor: Monitor, late: Sequence[int]) -> str | None:
    """ "1 h after", where a job is always off by the same hours, as in another timezone."""
    shift = round(late[len(late) // 2] / HALF_HOUR) * HALF_HOUR if late else 0
    if not shift or late[-1] - late[0] > 10 * MINUTE or abs(late[0] - shift) > 5 * MINUTE:
        return None
    if shift > monitor.interval // 2:
        shift -= monitor.interval
    return f"{format_duration(abs(shift))} {'after' if shift > 0 else 'before'}"


def _setting(ms: float) -> str:
    """The next round duration, as larm.toml has it."""
    rounds = ("10s", "30s", "1m", "2m", "5m", "10m", "15m", "30m", "1h", "2h", "3h", "6h", "12h",
              "1d", "2d", "3d", "1w", "2w", "31d")
    return next((text for text in rounds if parse_duration(text) >= ms * 0.98), "366d")


class Health:
    """Larm's eye on itself: whatever is wrong with it is alerted once, and so is its end."""

    def __init__(self, store: Store, clock: Clock, watcher: Watcher) -> None:
        self._store = store
        self._clock = clock
        self._watcher = watcher
        self._checked = clock.monotonic() - CHECK_EVERY
        self._failing_since: int | None = None
        self._warned = False

    def use(self, config: Config) -> None:
        self._config = config

    def check(self) -> None:
        """Once a minute, find what is wrong or is not any more; may raise Unrecordable."""
        if self._clock.monotonic() - self._checked >= CHECK_EVERY and self._clock.now() >= SANE:
            self._checked = self._clock.monotonic()
            free = free_space(self._config.database.parent)
            self._store.write(lambda db: self._report(db, free))

    def _report(self, db: sqlite3.Connection, free: int) -> None:
        self._watcher.reconsider_alerts(db)
        names, now = set(self._config.channels), self._clock.now()
        for gap in take_untold_gaps(db, LONG_GAP):
            topic, text = f"gap {gap['id']}", describe_gap(gap, self._config.timezone)
            report(db, topic, "down", text, names, gap["from_at"])
            report(db, topic, "up", f"{text}; every deadline was moved by that", names, now)
        if free < LITTLE_SPACE:
            text = f"the disk is nearly full\nMake room where {self._config.database} is."
            report(db, "disk", "down", text, names, now)
        elif free > LITTLE_SPACE * 1.2:
            report(db, "disk", "up", "the disk has room again", names, now)
        for name, channel in read_channels(db).items():
            since, others = channel["failing_since"], names - {name}
            if name not in names or since is None:
                text = f"channel {name} works again" if name in names else f"channel {name} is gone"
                report(db, f"channel {name}", "up", text, others, now)
            elif channel["failed_at"] - since >= FAILING_FOR:
                text = f"channel {name} has taken no alert for an hour"
                report(db, f"channel {name}", "down", text, others, now)

    def note_file(self, mistakes: Sequence[str]) -> None:
        """Report the mistakes in a saved larm.toml, or their end; may raise Unrecordable."""
        path, now = self._config.path, self._clock.now()
        text = f"{path} has mistakes; the last good one stays in force"
        text = "\n".join([text, *mistakes[:20]]) if mistakes else f"{path} is in force again"
        type, names = "down" if mistakes else "up", list(self._config.channels)
        self._store.write(lambda db: report(db, "file", type, text, names, now))

    def note_recording(self, failure: str | None) -> str | None:
        """Take note, at each tick, of why the database can't be written. Returns what to tell
        people at once, since no outbox can hold it; its end is an alert like others.
        """
        now, since = self._clock.now(), self._failing_since
        if failure is not None:
            self._failing_since = since = since or now
            if self._warned or now - since < UNRECORDED_FOR:
                return None
            self._warned = True
            return f"{_UNRECORDABLE}: {failure}; pings get 503 till then"
        if since is not None and now - since >= UNRECORDED_FOR:
            names = list(self._config.channels)

            def tell(db: sqlite3.Connection) -> None:
                report(db, "database", "down", _UNRECORDABLE, names, since)
                report(db, "database", "up", "heartbeats are recorded again", names, now)

            self._store.write(tell)
        self._failing_since, self._warned = None, False
        return None


def free_space(folder: Path) -> int:
    """Bytes that are free for this user on a folder's disk."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def describe_gap(gap: Gap, zone: tzinfo) -> str:
    from_at, to_at = (iso_local(gap[column], zone) for column in ("from_at", "to_at"))
    return f"Larm itself was not running from {from_at} to {to_at}"


STATES = ("down", "late", "up", "pending", "paused")  # the most urgent first


def shown_state(row: sqlite3.Row | None, monitor: Monitor, now: int) -> str:
    """The state as users see it; `row`: the monitor's in the database, if it is known there."""
    if not monitor.enabled or (row is not None and row["watching"] == "paused"):
        return "paused"
    if row is None:
        return "pending"
    if row["state"] == "up" and row["expected_at"] < now:
        return "late"
    return str(row["state"])


def uptime(
    changes: Sequence[sqlite3.Row],
    gaps: Sequence[Gap],
    created_at: int,
    span: int,
    now: int,
) -> float | None:
    """Percent of the last `span` milliseconds, but for gaps and pauses, not spent down.

    None: the monitor is younger, or was not watched at all. `changes`: its events, oldest first,
    as state_changes() gives them; `gaps`: Larm's and its own.
    """
    start = now - span
    if created_at > start:
        return None
    away = [(gap["from_at"], gap["to_at"]) for gap in gaps]
    gone = coverage(away)(start, now)
    if gone >= span:
        return None
    lost = coverage(away + down_spans(changes, gaps, now))(start, now) - gone
    return round(100 * (1 - lost / (span - gone)), 2)


Span = tuple[int, int]  # from, to


def down_spans(changes: Sequence[sqlite3.Row], gaps: Sequence[Gap], now: int) -> list[Span]:
    """When a monitor was down; the end of a pause ends that."""
    ends = [(gap["to_at"], "up") for gap in gaps if gap["monitor_id"] is not None]
    down: list[Span] = []
    went_down: int | None = None
    for at, type in sorted([*ends, *((change["at"], change["type"]) for change in changes)]):
        if type == "down":
            went_down = at if went_down is None else went_down
        elif went_down is not None:
            down.append((went_down, at))
            went_down = None
    if went_down is not None:
        down.append((went_down, now))
    return down


def coverage(spans: Iterable[Span]) -> Callable[[int, int], int]:
    """A function of two moments: how much of the time between them the spans cover together."""
    starts: list[int] = []
    ends: list[int] = []
    before: list[int] = []  # what the earlier ones cover
    for start, end in sorted(spans):
        start = max(start, ends[-1]) if ends else start
        if end > start:
            before.append(before[-1] + ends[-1] - starts[-1] if ends else 0)
            starts.append(start)
            ends.append(end)

    def until(moment: int) -> int:
        last = bisect.bisect_right(starts, moment) - 1
        return before[last] + min(moment, ends[last]) - starts[last] if last >= 0 else 0

    return lambda start, end: until(end) - until(start)


Day = tuple[str, int]  # up, down, partly, unwatched or none; for how long it was down


def days_of(
    changes: Sequence[sqlite3.Row],
    gaps: Sequence[Gap],
    created_at: int,
    days: Sequence[int],
    now: int,
) -> list[Day]:
    """What became of each day between two of the moments `days`, counted as in uptime().

    unwatched: for the most part; none: the monitor is younger.
    """
    away = [(gap["from_at"], gap["to_at"]) for gap in gaps]
    gone = coverage(away)
    lost = coverage(away + down_spans(changes, gaps, now))
    found = []
    for start, end in itertools.pairwise(days):
        start, end = max(start, created_at), min(end, now)
        watched = end - start - gone(start, end)
        down = lost(start, end) - gone(start, end)
        if start >= end:
            found.append(("none", 0))
        elif down > 0:
            found.append(("partly" if down < watched else "down", down))
        else:
            found.append(("unwatched" if 2 * watched < end - start else "up", 0))
    return found


# ======================================================================================
# Notifier: turns events into deliveries. The only room that imports apprise.
# ======================================================================================

PAUSES = (10 * SECOND, 30 * SECOND, MINUTE, 5 * MINUTE, 15 * MINUTE, HOUR)
LATE = 10 * MINUTE  # a message delivered so long after its event says so
LISTED = 20  # alerts that one message describes; of the others it gives the names
NTFY_ROOM = 3_900  # bytes; Apprise thinks it takes more, but a server refuses over 4,096
NAMED = 20  # of the monitors that depend on one that is down
OUTPUT_LINES, OUTPUT_WIDTH = 10, 300  # of the job's output, its last lines
NAME_SHOWN, NOTE_SHOWN = 200, 1_000  # characters


class _Captured(logging.Handler):
    """Holds what Apprise logs while a thread of ours sends, for the error that we report."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: dict[int, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        lines = self.lines.get(record.thread or 0)
        if lines is not None:
            lines.append(record.getMessage())


_captured = _Captured()


def _apprise() -> Any:
    """The module, its log turned away from ours: it may hold secrets (law 9)."""
    import apprise

    logger = logging.getLogger("apprise")
    if _captured not in logger.handlers:
        logger.addHandler(_captured)
        logger.propagate = False
    return apprise


def accepts(url: str) -> str | None:
    """What is wrong with a channel's URL, in words that don't show it; None: nothing."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if not scheme:
        return "is not an Apprise URL: it must begin with a service, such as ntfy://"
    apprise = _apprise()
    try:
        accepted = apprise.Apprise().add(url)
    except Exception:  # its text may hold the URL
        accepted = False
    if not accepted:
        known = any(
            scheme[1].lower() in service.get(names, ())
            for service in apprise.Apprise().details()["schemas"]
            for names in ("protocols", "secure_protocols")
            if service.get(names)
        )
        if known:
            return f"Apprise does not accept this {scheme[1]}:// URL; check its parts"
        return f"Apprise knows no service {scheme[1]}://"
    return None


def mask(text: str, urls: Iterable[str]) -> str:
    """`text` on one line and without what is secret in the URLs."""
    for url in urls:
        rest = url.partition("://")[2]
        host = re.split(r"[/?#]", rest)[0].rpartition("@")[2].partition(":")[0]
        parts = set(re.split(r"[/@:?&=#,;+]+", rest))
        parts |= {unquote(part) for part in parts}
        if "." in host or host == "localhost":
            parts.discard(host)
        for part in sorted((part for part in parts if len(part) >= 4), key=len, reverse=True):
            text = text.replace(part, "***")
    text = re.sub(r"\b([a-z][a-z0-9+.-]*)://\S+", r"\1://***", text, flags=re.IGNORECASE)
    return " ".join(text.split())[:300]


def send(urls: Sequence[str], title: str, body: str, kind: str) -> str | None:
    """Send one message through a channel; None once Apprise says it was accepted, else why not.

    `kind` is one of Apprise's types: failure, success, warning, info.
    """
    lines = _captured.lines[threading.get_ident()] = []
    try:
        apprise = _apprise()
        asset = apprise.AppriseAsset(async_mode=False, app_id="Larm", app_desc="Larm")
        sender = apprise.Apprise(asset=asset)
        services = [apprise.Apprise.instantiate(url, asset=asset) for url in urls]
        if not all(services):
            lines.append("Apprise does not accept the channel's URL")
        else:
            for url, service in zip(urls, services, strict=True):
                if "overflow=" not in url:  # what is too long for a service comes in parts
                    service.overflow_mode = apprise.OverflowMode.SPLIT
                sender.add(service)
            result = sender.notify(body=body, title=title, notify_type=kind, body_format="text")
            if result:  # a bool, or None for nothing sent; since Apprise 2 an object like a bool
                return None
            lines += [entry.message for entry in result.logs()] if hasattr(result, "logs") else []
    except (Exception, SystemExit) as error:  # a plugin of Apprise's may raise anything
        lines.append(f"{type(error).__name__}: {error}")
    finally:
        del _captured.lines[threading.get_ident()]
    return mask("; ".join(dict.fromkeys(lines)) or "the service did not accept it", urls)


def room(url: str) -> int:
    """How many bytes one message by an Apprise URL may have."""
    try:
        service = _apprise().Apprise.instantiate(url)
        longest = NTFY_ROOM if url.startswith("ntfy") else int(service.body_maxlen)
        return longest - (NAME_SHOWN if service.title_maxlen <= 0 else 0)
    except Exception:  # send() tells what is wrong with it
        return 1_000


def send_test(config: Config, channel: str) -> str | None:
    """Send a test alert through a channel; None once it was accepted, else why not."""
    text = f"If you can read this, alerts reach you here.\n{config.url}/"
    return send(config.channels[channel], "Test alert from Larm", text, "info")


def ripe(alerts: Sequence[sqlite3.Row], now: int) -> Sequence[sqlite3.Row]:
    """Those of a channel's unsent alerts that are one message now; none before one is due.

    That is every one of them where some could not be sent before, so that their order is kept;
    else the first and what came within 3 s of it.
    """
    first_due_at = min((alert["due_at"] for alert in alerts), default=now + 1)
    if first_due_at > now:
        return []
    if any(alert["attempts"] for alert in alerts):
        return alerts
    return [alert for alert in alerts if alert["due_at"] < first_due_at + DIGEST_WITHIN]


Alert = sqlite3.Row  # as pending_alerts() gives it

_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, and moving the cursor
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links and the like
    r"|\x1b[ -/]*[0-~]"
    r"|(?m:^[^\n]*\r(?=[^\r\n]))"  # what a progress bar overwrote
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def plain(text: str) -> str:
    """Text as a terminal would leave it there, without what steers it or turns its direction."""
    return _CONTROLS.sub("", text.replace("\r\n", "\n"))


@dataclass(frozen=True)
class Message:
    title: str
    body: str
    kind: str


LABELS = {("change", "down"): "DOWN", ("settled", "down"): "DOWN", ("flapping", "down"): "FLAPPING",
          ("flapping", "up"): "FLAPPING", ("reminder", "down"): "STILL DOWN",
          ("change", "up"): "UP", ("settled", "up"): "UP"}


def label(alert: Alert) -> str:
    """DOWN, FLAPPING, STILL DOWN, UP; LARM for what is about Larm itself."""
    return "LARM" if alert["key"] is None else LABELS[alert["kind"], alert["type"]]


def subject(alert: Alert) -> str:
    """The name of the alert's monitor, or what it says of Larm."""
    return plain(alert["name"] or alert["text"].partition("\n")[0])[:NAME_SHOWN]


def compose(
    alerts: Sequence[Alert], gaps: Sequence[sqlite3.Row], config: Config, now: int, room: int
) -> Message:
    """One message of a channel's unsent alerts (as pending_alerts() gives them), at least one.

    It keeps to `room` bytes where it can: the first are described, if need be without the output,
    the others named, and of what is left the message says how many there are and where.
    """
    names: dict[str, list[str]] = {found: [] for found in dict.fromkeys([*LABELS.values(), "LARM"])}
    for alert in alerts:
        names[label(alert)].append(subject(alert))
    title = ", ".join(
        f"{word}: {found[0] if len(found) == 1 else counted(len(found), noun)}"
        for word, found in names.items()
        for noun in ("notice" if word == "LARM" else "monitor",)
        if found
    )
    text = ""
    for number, alert in enumerate(alerts):
        rest = f"\n\nAnd {len(alerts) - number} more: {config.url}/"
        short = f"{label(alert)}: {subject(alert)}"
        full = brief = short
        if number < LISTED:
            full, brief = (_describe(alert, gaps, config, now, output) for output in (True, False))
        left = room - len(text.encode()) - (len(rest) if len(alerts) > 1 else 0)
        forms = (full, brief, short)
        chosen = next((one for one in forms if len(one.encode()) + 2 <= left), None)
        if len(alerts) > 1 and chosen is None:
            text += rest
            break
        between = "\n" if number > LISTED else "\n\n" if text else ""
        text += between + (chosen or brief)
    kinds = {"failure": names["DOWN"], "warning": names["FLAPPING"] + names["STILL DOWN"]}
    troubles = [alert["type"] == "down" for alert in alerts if alert["key"] is None]
    kinds["warning"] += ["LARM"] if any(troubles) else []
    return Message(title, text, next((kind for kind, found in kinds.items() if found), "success"))


def _describe(
    alert: Alert, gaps: Sequence[sqlite3.Row], config: Config, now: int, with_output: bool
) -> str:
    """What happened and when, what was expected, what the job said, and where to look."""
    monitor = config.monitors.get(alert["key"])
    at, last = alert["at"], alert["last_heartbeat_at"]
    lines = [_headline(alert, config, now)]
    if alert["type"] == "down" and last is not None and at - last >= SECOND:
        since = iso_local(last, config.timezone)
        lines.append(f"Last heartbeat: {since}, {format_duration(at - last)} before.")
    if alert["reason"] == "missed" and monitor:
        lines.append(f"Expected: {describe_rhythm(monitor)}.")
    if alert["reason"] == "missed" and alert["running_since"] is not None:
        lines.append(f"It started {iso_local(alert['running_since'], config.timezone)} and has not "
                     "ended yet.")
    elif alert["reason"] == "missed" and alert["says_start"]:
        lines.append("It did not start.")
    if alert["reason"] == "missed" and last is not None:
        lines += [
            f"{describe_gap(gap, config.timezone)}, when this heartbeat may have come."
            for gap in gaps
            if last < gap["to_at"] and gap["from_at"] < at and is_long(gap)
        ]
    if alert["type"] == "down" and monitor:
        names = [plain(one.name)[:NAME_SHOWN] for one in config.monitors.values()
                 if monitor.key in ancestors(config.monitors, one.key)]
        if names:
            verb = "depends" if len(names) == 1 else "depend"
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"{counted(len(names), 'monitor')} {verb} on it: "
                         f"{', '.join(names[:NAMED])}{more}.")
    if now - alert["ready_at"] > LATE:
        lines.append("This alert is late: it could not be delivered before.")
    output = plain(alert["body"] or "").strip() if with_output else ""
    if output:
        lines += ["Output:", *(line[:OUTPUT_WIDTH] for line in output.splitlines()[-OUTPUT_LINES:])]
    if monitor and monitor.note:
        lines.append(plain(monitor.note)[:NOTE_SHOWN])
    lines.append(f"{config.url}/monitor/{alert['key']}" if alert["key"] else f"{config.url}/")
    return "\n".join(lines)


def _headline(alert: Alert, config: Config, now: int) -> str:
    """What has happened to a monitor, or to Larm, and when."""
    name, at = subject(alert), alert["at"]
    when = f"{iso_local(at, config.timezone)}, {far_from(at, now)}"
    if alert["key"] is None:
        return f"Larm: {plain(alert['text'])} ({when})."
    if alert["kind"] == "flapping":
        monitor = config.monitors.get(alert["key"])
        held = format_duration(SETTLED_AFTER * monitor.interval) if monitor else "a while"
        return (f"{name} is flapping: it went down and came up again and again, and is "
                f"{alert['type']} now ({when}). The next alert comes when it has been up or down "
                f"for {held}.")
    if alert["kind"] == "settled":
        return f"{name} has stopped flapping: it has been {alert['type']} since {when}."
    if alert["type"] == "up" and alert["downs"]:
        from_at = iso_local(alert["down_from"], config.timezone)
        often, last = "", ""
        if alert["downs"] > 1:
            often, last = f" {alert['downs']} times", "the last time "
        return (f"{name} was down{often} from {from_at} to {iso_local(at, config.timezone)}, "
                f"{last}for {format_duration(alert['down_ms'])}, and is up again.")
    if alert["type"] == "up":
        return f"{name} is up again, after {format_duration(alert['down_ms'])} down ({when})."
    reminds = alert["kind"] == "reminder"
    still = f"still down, for {format_duration(now - at)}" if reminds else "down"
    if alert["reason"] == "failed":
        status, lasted = alert["exit_status"], alert["duration_ms"]
        said = "the job reported a failure" if status is None else f"exit status {status}"
        after = "" if lasted is None else f" after {format_duration(lasted)}"
        return f"{name} is {still}: {said}{after} ({when})."
    if alert["reason"] == "overran":
        monitor = config.monitors.get(alert["key"])
        limit = format_duration(monitor.max_runtime) if monitor and monitor.max_runtime else "time"
        return f"{name} is {still}: a run has not ended within {limit} ({when})."
    return f"{name} is {still}: no heartbeat by {when}."


def is_long(gap: sqlite3.Row) -> bool:
    """Whether a gap in Larm's attention is worth a word: a restart within seconds is not."""
    return gap["monitor_id"] is None and bool(gap["to_at"] - gap["from_at"] > GAP)


def upcoming(monitor: Monitor, zone: tzinfo, now: int) -> list[str]:
    """A schedule's next three occurrences, for people."""
    moments = monitor.schedule.next_after(now, 3) if monitor.schedule else []
    return [iso_local(moment, zone) for moment in moments]


def describe_channel(row: sqlite3.Row | None, zone: tzinfo, now: int) -> str:
    """What became of the last alerts to a channel, as read_channels() gives it."""
    if row is None:
        return "nothing sent yet"
    found = []
    for column, what in (("sent_at", "last sent"), ("failed_at", "last failed")):
        if (at := row[column]) is not None:
            found.append(f"{what} {iso_local(at, zone)[:19]} ({far_from(at, now)})")
    if row["failing_since"] is not None:
        found.append(str(row["error"]))
    found += [f"{counted(row['pending'], 'alert')} waiting"] if row["pending"] else []
    return "; ".join(found)


def describe_rhythm(monitor: Monitor) -> str:
    """When a job is due, for people: "every 1 d, with 30 min grace"."""
    if monitor.schedule:
        due = f"{monitor.schedule.in_words} ({monitor.schedule.zone_name or 'local time'})"
    else:
        due = f"every {format_duration(monitor.interval)}"
    return f"{due}, with {format_duration(monitor.grace) if monitor.grace else 'no'} grace"


class Notifier:
    """The outbox: sends what is pending, in a thread for each channel that has something to send.

    A delivery is sent at least once: it stays pending until its channel has accepted it and that
    is on disk (law 6). Its pauses grow for 3 days, then it has failed.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._config: Config | None = None
        self._senders: dict[str, threading.Thread] = {}
        self._accepted: dict[tuple[str, str], set[int]] = {}  # of a channel's URLs some may fail
        self._warning: dict[str, threading.Thread] = {}
        self.tries: Counter[tuple[str, str]] = Counter()  # since the start, by channel and result
        self._stopping = threading.Event()

    def use(self, config: Config) -> None:
        self._config = config

    def deliver_due(self) -> None:
        """Start a sender for each channel that has something due and none yet."""
        now = self._clock.now()
        if now < SANE:
            return
        with self._store.reading() as db:
            due = channels_due(db, now)
        self._senders = {name: thread for name, thread in self._senders.items()
                         if thread.is_alive()}
        for channel in due:
            if channel not in self._senders and not self._stopping.is_set():
                thread = threading.Thread(
                    target=self._send_pending, args=(channel,), name=f"to {channel}", daemon=True
                )
                self._senders[channel] = thread
                thread.start()

    def _send_pending(self, channel: str) -> None:
        try:
            while not self._stopping.is_set() and self.attempt(channel):
                pass
        except Exception as error:  # deliveries stay pending, and are tried again with a tick
            log.error("%s: %s: %s", channel, type(error).__name__, mask(str(error), ()))
            self._stopping.wait(10)

    def attempt(self, channel: str) -> bool:
        """Send what the channel has pending as one message; True if there may be more by now."""
        config = self._config
        now = self._clock.now()
        with self._store.reading() as db:
            alerts = ripe(pending_alerts(db, channel), now)
            if config is None or not alerts:
                return False
            heard = [alert["last_heartbeat_at"] or alert["at"] for alert in alerts]
            gaps = gaps_since(db, min(heard))
        urls = config.channels.get(channel)
        if urls is None:
            gone = "the channel is not in the configuration any more"
            self._note(channel, alerts, "failed", gone, 0)
            return True
        errors = [
            error for url in urls if (error := self._send_to(channel, url, alerts, gaps, config))
        ]
        self.tries[channel, "failed" if errors else "sent"] += 1
        if not errors:
            self._note(channel, alerts, "sent", None, 0)
            log.info("%s: sent %s", channel, "; ".join(f"{label(one)}: {subject(one)}"
                                                       for one in alerts[:5]))
            return True
        self._retry(channel, alerts, "; ".join(dict.fromkeys(errors)))
        return False

    def _send_to(
        self,
        channel: str,
        url: str,
        alerts: Sequence[Alert],
        gaps: Sequence[sqlite3.Row],
        config: Config,
    ) -> str | None:
        """Send by one of a channel's URLs what it has not accepted before; None, or the error."""
        accepted = self._accepted.setdefault((channel, url), set())
        accepted &= {alert["id"] for alert in alerts}
        missing = [alert for alert in alerts if alert["id"] not in accepted]
        if not missing:
            return None
        message = compose(missing, gaps, config, self._clock.now(), room(url))
        error = send([url], message.title, message.body, message.kind)
        if error is None:
            accepted.update(alert["id"] for alert in missing)
        return error

    def warn(self, text: str, is_over: Callable[[], bool]) -> None:
        """Tell every channel at once what no outbox can hold; tries again until it is over."""
        for channel, urls in self._config.channels.items() if self._config else ():
            if channel not in self._warning or not self._warning[channel].is_alive():
                self._warning[channel] = threading.Thread(
                    target=self._warn, args=(urls, text, is_over), daemon=True
                )
                self._warning[channel].start()

    def _warn(self, urls: Sequence[str], text: str, is_over: Callable[[], bool]) -> None:
        for pause in itertools.chain([0], PAUSES, itertools.repeat(PAUSES[-1])):
            if self._stopping.wait(pause / SECOND) or is_over():
                return
            if send(urls, f"LARM: {text.partition(':')[0]}", f"Larm: {text}.", "failure") is None:
                return

    def _retry(self, channel: str, alerts: Sequence[sqlite3.Row], error: str) -> None:
        attempts = max(alert["attempts"] for alert in alerts)
        pause = round(PAUSES[min(attempts, len(PAUSES) - 1)] * random.uniform(1, 1.1))
        self._note(channel, alerts, "pending", error, pause)
        log.warning("%s: not sent: %s; next try in %s", channel, error, format_duration(pause))

    def _note(
        self, channel: str, alerts: Iterable[Alert], state: str, error: str | None, pause: int
    ) -> None:
        """Keep at it until it is on disk: what was sent must not be sent again for a full disk."""
        ids = [int(id) for alert in alerts for id in alert["ids"].split(",")]

        def note(db: sqlite3.Connection) -> None:
            now = self._clock.now()
            note_attempt(db, channel, ids, state, now, now + pause, error)

        while True:
            with contextlib.suppress(Unrecordable):
                return self._store.write(note)
            if self._stopping.wait(1):
                return None

    def stop(self, seconds: float) -> None:
        """Let what is under way end within so many seconds; the rest is tried at the next start."""
        self._stopping.set()
        end = time.monotonic() + seconds
        for thread in self._senders.values():
            thread.join(max(0.0, end - time.monotonic()))


# ======================================================================================
# Web: translates HTTP to calls. Holds no state but who guessed a wrong password.
# ======================================================================================

HEARTBEATS = "/api/heartbeat/"
THREADS = 32  # Waitress's; as many as there are clients makes the commits large
CONNECTIONS = 500  # well below the 1,024 files that select() can watch
BODY_LIMIT = 10_000_000  # bytes of a request, its chunks' frames too; more gets 413 from Waitress
RETRY_AFTER = 5  # seconds
GUESSES = 10  # wrong passwords a minute from one address
PAGE, LONGEST_PAGE = 100, 1_000  # heartbeats or events in one answer of the API
_OK = b'{"status": "ok"}'
_UNAVAILABLE = b'{"status": "unavailable"}'
_FORWARDED = re.compile("HTTP_(.*FORWARDED.*|VIA|X_REAL_IP|.*CLIENT_IP|CF_CONNECTING_IP)")
CHALLENGE = 'Basic realm="Larm", charset="UTF-8"'
ERROR_TYPES = {401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
               429: "rate_limited", 500: "unavailable", 503: "unavailable"}
ERROR_HEADERS = {401: {"WWW-Authenticate": CHALLENGE}, 429: {"Retry-After": "60"},
                 503: {"Retry-After": str(RETRY_AFTER)}}

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], object]


def describe_monitor(
    row: sqlite3.Row | None,
    monitor: Monitor,
    config: Config,
    changes: Sequence[sqlite3.Row],
    gaps: Sequence[Gap],
    now: int,
) -> dict[str, Any]:
    """A monitor as interface.md's JSON has it; `row`: None where the database knows none yet."""

    def moment(column: str) -> str | None:
        return iso_utc(row[column]) if row is not None and row[column] is not None else None

    spans = {"24h": DAY, "7d": 7 * DAY, "30d": 30 * DAY, "90d": 90 * DAY}
    token = monitor.token or (row["made_token"] if row is not None else None)
    created_at = row["created_at"] if row is not None else now
    if row is not None and row["unwatched_at"] is not None:
        gaps = [*gaps, {"monitor_id": row["id"], "from_at": row["unwatched_at"], "to_at": now}]
    state = shown_state(row, monitor, now)
    since = {"paused": "unwatched_at", "late": "expected_at"}.get(state, "since")
    return {
        "id": monitor.key,
        "name": monitor.name,
        "check_type": "heartbeat",
        "enabled": monitor.enabled,
        "state": state,
        "since": moment(since),
        "running": bool(row is not None and row["running"]),
        "interval_seconds": _seconds(monitor.interval),
        "schedule": monitor.schedule.expression if monitor.schedule else None,
        "timezone": monitor.schedule.zone_name if monitor.schedule else None,
        "grace_seconds": _seconds(monitor.grace),
        "last_heartbeat_at": moment("received_at"),
        "last_duration_ms": row["last_duration_ms"] if row is not None else None,
        "expected_at": None if state == "paused" else moment("expected_at"),
        "deadline_at": None if state == "paused" else moment("deadline_at"),
        "uptime": {
            name: uptime(changes, gaps, created_at, span, now) for name, span in spans.items()
        },
        "channels": list(monitor.notify),
        "note": monitor.note,
        "ping_url": config.ping_url(token) if token else None,
    }


def _seconds(ms: int) -> int | float:
    return ms // SECOND if ms % SECOND == 0 else ms / SECOND


def describe_monitors(
    db: sqlite3.Connection | None, config: Config, now: int, keys: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """The configuration's monitors, in its order, or the named ones; `db`: None before the first
    start.
    """
    rows = read_monitors(db) if db else {}
    changes = state_changes(db, now - 90 * DAY) if db else {}
    gaps: dict[int | None, list[sqlite3.Row]] = defaultdict(list)
    for gap in gaps_since(db, now - 90 * DAY) if db else ():
        gaps[gap["monitor_id"]].append(gap)
    described = []
    for key in config.monitors if keys is None else keys:
        row = rows.get(key)
        id = row["id"] if row is not None else 0
        own = changes.get(id, [])
        described.append(
            describe_monitor(row, config.monitors[key], config, own, gaps[None] + gaps[id], now)
        )
    return described


def describe_heartbeat(row: sqlite3.Row, viewer: bool) -> dict[str, Any]:
    """A heartbeat as interface.md's JSON has it; to others than viewers, without what was sent."""
    kept = ("signal", "exit_status", "duration_ms", "method")
    sent = {"from": "sender", "user_agent": "user_agent", "rid": "rid", "body": "body"}
    return {
        "id": row["id"],
        "at": iso_utc(row["at"]),
        **{name: row[name] for name in kept},
        **{name: row[column] if viewer else None for name, column in sent.items()},
    }


def describe_event(row: sqlite3.Row, deliveries: Iterable[sqlite3.Row]) -> dict[str, Any]:
    """An event, as list_events() gives it, as interface.md's JSON has it."""
    last = row["last_heartbeat_at"]
    return {
        "id": row["id"],
        "monitor": row["key"],
        "type": row["type"],
        "at": iso_utc(row["at"]),
        "reason": row["reason"],
        "last_heartbeat_at": None if last is None else iso_utc(last),
        "down_seconds": None if row["down_ms"] is None else _seconds(row["down_ms"]),
        "deliveries": [
            {name: one[name] for name in ("channel", "state", "attempts", "at", "error")}
            | {"at": None if one["at"] is None else iso_utc(one["at"])}
            for one in deliveries
        ],
    }


def labels(**values: str) -> str:
    """What stands behind a metric's name: {monitor="backup"}."""
    escapes = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
    pairs = [f'{name}="{text.translate(escapes)}"' for name, text in values.items()]
    return f"{{{','.join(pairs)}}}"


class Metrics:
    """What Prometheus scrapes: https://prometheus.io/docs/instrumenting/exposition_formats/

    Counters begin at 0 with Larm's start. Events and gaps are added up from one scrape to the next,
    so that pruning takes nothing from them.
    """

    def __init__(self, store: Store, clock: Clock, intake: Intake, notifier: Notifier) -> None:
        self._store, self._clock, self._intake, self._notifier = store, clock, intake, notifier
        self._started_at = clock.now()
        self._lock = threading.Lock()
        self._events: Counter[tuple[str, str]] = Counter()  # by key and type
        self._gaps = self._gap_ms = 0
        with store.reading() as db:
            self._event, self._gap = newest_id(db, "events"), newest_id(db, "gaps")

    def _add_up(self, db: sqlite3.Connection) -> None:
        """Count what has come since the last scrape."""
        newest = newest_id(db, "events")
        for event in list_events(db, newest + 1, -1, after=self._event):
            self._events[event["key"], event["type"]] += 1
        self._event = newest
        gaps = gaps_since(db, 0)
        for gap in gaps:
            if gap["id"] > self._gap and gap["monitor_id"] is None:
                self._gaps += 1
                self._gap_ms += max(0, gap["to_at"] - gap["from_at"])  # < 0: the clock was set back
        self._gap = gaps[-1]["id"] if gaps else 0

    def text(self, config: Config) -> str:
        """All of them in the text format, for the configuration's monitors and channels."""
        with self._lock, self._store.reading() as db:
            self._add_up(db)
            rows, pending = read_monitors(db), count_pending(db)
        durations = {key: row["last_duration_ms"] for key, row in rows.items()
                     if row["last_duration_ms"] is not None}
        now, tries, channels = self._clock.now(), self._notifier.tries, config.channels
        states = {key: shown_state(rows.get(key), monitor, now)
                  for key, monitor in config.monitors.items()}

        def seconds(of: Callable[[str], int | None]) -> dict[str, float]:
            found = [(key, of(key)) for key in states if key in rows]
            return {labels(monitor=key): ms / SECOND for key, ms in found if ms is not None}

        families: dict[str, Mapping[str, float]] = {  # name, type, help: values by labels
            "larm_build_info gauge The version that runs.": {labels(version=__version__): 1},
            "process_start_time_seconds gauge When Larm started and every counter was 0.":
                {"": self._started_at / SECOND},
            "larm_pings_throttled_total counter Pings that were answered, but not stored.":
                {"": self._intake.throttled},
            "larm_commit_seconds summary How long the writer's commits took.":
                {"_sum": self._store.commit_seconds, "_count": self._store.stored},
            "larm_gaps_total counter Times that Larm had not been watching.": {"": self._gaps},
            "larm_gap_seconds_total counter How long Larm was not watching.":
                {"": self._gap_ms / SECOND},
            "larm_deliveries_total counter Messages given to a channel; failed is tried again.":
                {labels(channel=channel, result=result): tries[channel, result]
                 for channel in channels for result in ("sent", "failed")},
            "larm_deliveries_pending gauge Alerts that are yet to be sent.":
                {labels(channel=channel): pending.get(channel, 0) for channel in channels},
            "larm_monitor_state gauge 1 for the state that the monitor is in.":
                {labels(monitor=key, state=state): int(state == found)
                 for key, found in states.items() for state in STATES},
            "larm_monitor_last_heartbeat_timestamp_seconds gauge When the last success came.":
                seconds(lambda key: rows[key]["received_at"]),
            "larm_monitor_deadline_timestamp_seconds gauge When it goes down without a heartbeat.":
                seconds(lambda key: rows[key]["deadline_at"] if states[key] != "paused" else None),
            "larm_monitor_last_duration_seconds gauge How long the last run took.":
                seconds(durations.get),
            "larm_events_total counter Times that a monitor went down or came up.":
                {labels(monitor=key, type=type): self._events[key, type]
                 for key in states for type in ("down", "up")},
        }
        lines = []
        for family, samples in families.items():
            name, kind, meaning = family.split(" ", 2)
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{rest} {value}" for rest, value in samples.items()]
        return "\n".join([*lines, ""])


def describe_days(
    db: sqlite3.Connection, keys: Iterable[str], days: Sequence[int], now: int
) -> dict[str, list[Day]]:
    """days_of() these monitors, by key."""
    rows, changes = read_monitors(db), state_changes(db, days[0])
    gaps: dict[int | None, list[Gap]] = defaultdict(list)
    for gap in gaps_since(db, days[0]):
        gaps[gap["monitor_id"]].append(gap)
    found = {}
    for key in keys:
        row = rows.get(key)
        if row is None or row["state"] == "pending":
            found[key] = days_of([], [], now, days, now)
            continue
        own = gaps[row["id"]]
        if row["unwatched_at"] is not None:
            own.append({"monitor_id": row["id"], "from_at": row["unwatched_at"], "to_at": now})
        since = row["created_at"]
        found[key] = days_of(changes.get(row["id"], []), gaps[None] + own, since, days, now)
    return found


class Access:
    """Who is a viewer (interface.md, "The rest of HTTP")."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._password = config.password
        self._own_host = urlsplit(config.url).hostname
        self._own_netloc = urlsplit(config.url).netloc.lower()
        self._clock = clock
        self._guesses: dict[str, deque[int]] = {}
        self._lock = threading.Lock()

    def refusal(self, environ: Environ) -> int | None:
        """None for a viewer; for everyone else the HTTP status: 401, 403 or 429."""
        if self._password is None:
            return None if self._is_local(environ) else 403
        given = self._given_password(environ)
        if given is None:
            return 401
        address = environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2].strip()
        if not address or not _is_loopback(environ["REMOTE_ADDR"]):
            address = environ["REMOTE_ADDR"]
        right = hmac.compare_digest(given, self._password.encode())
        return self._judge_guess(address[:100], right)

    def _judge_guess(self, address: str, right: bool) -> int | None:
        now = self._clock.monotonic()
        with self._lock:
            wrong = self._guesses.get(address, deque())
            while wrong and now - wrong[0] > MINUTE:
                wrong.popleft()
            if len(wrong) >= GUESSES:
                return 429
            if right:
                return None
            wrong.append(now)
            self._guesses.pop(address, None)
            self._guesses[address] = wrong  # the newest address stands last
            if len(self._guesses) > 1_000:
                del self._guesses[next(iter(self._guesses))]
            return 401

    def is_cross_site(self, environ: Environ) -> bool:
        """Whether a page of another site sent this, in the name of a viewer's browser.

        Sec-Fetch-Site is the browser's own word, which it gives to https and localhost only. It
        goes first: a form on a page with no-referrer, such as ours, has the origin "null".
        """
        if (fetched_from := environ.get("HTTP_SEC_FETCH_SITE")) is not None:
            return fetched_from not in ("same-origin", "none")
        origin = environ.get("HTTP_ORIGIN")
        if origin is None:
            return False
        site = origin.partition("://")[2].lower()  # of the origin "null" nothing
        return not site or site not in (environ.get("HTTP_HOST", "").lower(), self._own_netloc)

    @staticmethod
    def _given_password(environ: Environ) -> bytes | None:
        # A bare strip() would take the last byte of an "à" for a space.
        scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").strip(" \t").partition(" ")
        if scheme.lower() == "bearer":
            return str(credentials).strip(" \t").encode("latin-1", "replace")
        if scheme.lower() == "basic":
            try:
                return base64.b64decode(credentials.strip()).partition(b":")[2]
            except ValueError:
                return b""
        return None

    def _is_local(self, environ: Environ) -> bool:
        """Straight from this machine: not through a proxy, nor by another site's name for it."""
        if not _is_loopback(environ["REMOTE_ADDR"]) or any(
            _FORWARDED.fullmatch(name) for name in environ
        ):
            return False
        try:
            host = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname or ""
        except ValueError:
            return False
        return host == self._own_host or host == "localhost" or _is_loopback(host)


def _is_loopback(address: str) -> bool:
    return address == "::1" or bool(re.fullmatch(r"(::ffff:)?127(\.\d{1,3}){3}", address))


def tail(stream: Any, length: int) -> bytes:
    """The last `length` bytes of a stream."""
    kept = b""
    while chunk := stream.read(65_536):
        kept = (kept + chunk)[-length:]
    return kept


class Web:
    """The WSGI application. The heartbeat endpoint stands before Bottle, which would answer odd
    paths and methods in its own way; everything else is Bottle's.
    """

    def __init__(
        self, store: Store, clock: Clock, intake: Intake, watcher: Watcher, notifier: Notifier
    ) -> None:
        import bottle

        self._bottle = bottle
        self._store = store
        self._clock = clock
        self._intake = intake
        self._watcher = watcher
        self._counts = Metrics(store, clock, intake, notifier)
        self._config: Config
        self._access: Access
        self.mistakes: Sequence[str] = ()  # in the file as it was saved last
        self._app = bottle.Bottle()
        self._site = Site(store, clock, intake, lambda: self.mistakes)
        self._site.add_routes(self._route)
        self._app.default_error_handler = self._error_page
        for path, handler in (
            ("/badge/<key>.svg", self._badge),
            ("/metrics", self._metrics),
            ("/health", self._health),
        ):
            self._route("GET", path, handler)
        for method, path, answer in (
            ("GET", "monitors", self._monitors_json),
            ("GET", "monitors/<key>", self._monitors_json),
            ("GET", "monitors/<key>/heartbeats", self._heartbeats_json),
            ("GET", "events", self._events_json),
            ("POST", "monitors/<key>/<verb:re:pause|resume>", self._pause_or_resume),
            ("POST", "channels/<channel:path>/test", self._test_channel),
        ):
            self._route(method, f"/api/v1/{path}", self._api(method, answer))
        self._badge_image = bottle.SimpleTemplate(BADGE)

    def _route(self, method: str, path: str, handler: Callable[..., Any]) -> None:
        """Answer a path by one method, GET with HEAD or POST, and by no other."""
        allowed = "GET, HEAD" if method == "GET" else method

        def refuse_method(**_: str) -> NoReturn:
            raise self._refuse(405, f"this path takes {allowed} only", Allow=allowed)

        self._app.route(path, method, handler)
        self._app.route(path, "ANY", refuse_method)

    def _api(self, method: str, answer: Callable[..., object]) -> Callable[..., str]:
        """A handler of the API: who may ask, of which monitor, and the shape of what is answered.

        `answer` takes the configuration, whether a viewer asks, and what the path names. A GET is
        for everyone in public, a POST for viewers.
        """

        def handle(**names: str) -> str:
            viewer = self._let_in(public=method == "GET")
            if method == "POST" and self._access.is_cross_site(self._bottle.request.environ):
                raise self._refuse(403, "a page of another site asked for this")
            config = self._config
            if "key" in names and names["key"] not in config.monitors:
                raise self._refuse(404, f"no monitor {show(names['key'])}")
            try:
                return self._json({"data": answer(config, viewer, **names)})
            except Unrecordable as error:
                raise self._refuse(503, str(error)) from None

        return handle

    def _let_in(self, public: bool) -> bool:
        """Whether a viewer asks; raises the refusal of others, but for what is `public`."""
        refusal = self._access.refusal(self._bottle.request.environ)
        if refusal and not (public and self._config.public):
            raise self._refuse(refusal)
        return refusal is None

    def use(self, config: Config) -> None:
        self._config = config
        self._access = Access(config, self._clock)
        self._site.use(config, self._access)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        prefix = self._config.prefix
        if prefix and (path == prefix or path.startswith(prefix + "/")) and not (
            path.startswith(HEARTBEATS)
        ):
            path = environ["PATH_INFO"] = path[len(prefix) :] or "/"
        if path.startswith(HEARTBEATS):
            return self._heartbeat(environ, start_response, path[len(HEARTBEATS) :])
        try:
            path.encode("latin-1").decode()
        except UnicodeError:  # Bottle would leave out what is not UTF-8, and find another page
            environ["PATH_INFO"] = "/api/not-utf-8" if path.startswith("/api/") else "/not-utf-8"
        environ["wsgi.errors"] = io.StringIO()  # Bottle's tracebacks; _error_page logs a line
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer

    def _heartbeat(
        self, environ: Environ, start_response: StartResponse, rest: str
    ) -> Iterable[bytes]:
        """One answer whatever the token and whatever follows it (law 1)."""
        token, _, action = rest.partition("/")
        status, body, more = "200 OK", _OK, []
        try:
            self._intake.receive(
                token, action, lambda *meaning: _ping(environ, *meaning), environ["REMOTE_ADDR"]
            )
        except Exception as error:
            if not isinstance(error, Unrecordable):
                log.error("a heartbeat was not recorded: %s: %s", type(error).__name__, error)
            status, body = "503 Service Unavailable", _UNAVAILABLE
            more = [("Retry-After", str(RETRY_AFTER))]
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Access-Control-Allow-Origin", "*"),
            ("Ping-Body-Limit", str(BODY_KEPT)),
            *more,
        ]
        start_response(status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _monitors_json(self, config: Config, viewer: bool, key: str | None = None) -> object:
        with self._store.reading() as db:
            monitors = describe_monitors(db, config, self._clock.now(), [key] if key else None)
        if not viewer:
            for monitor in monitors:
                monitor.update(channels=[], note=None, ping_url=None)
        return monitors[0] if key else monitors

    def _heartbeats_json(self, _config: Config, viewer: bool, key: str) -> object:
        with self._store.reading() as db:
            rows = list_heartbeats(db, key, **self._page(newest_id(db, "heartbeats")))
        return [describe_heartbeat(row, viewer) for row in rows]

    def _events_json(self, _config: Config, viewer: bool) -> object:
        with self._store.reading() as db:
            rows = list_events(db, **self._page(newest_id(db, "events")))
            shown = rows if viewer else []
            deliveries = deliveries_between(db, shown[-1]["id"], shown[0]["id"]) if shown else {}
        return [describe_event(row, deliveries.get(row["id"], ())) for row in rows]

    def _page(self, newest: int) -> dict[str, int]:
        """`before` and `limit` of a list's query; `newest`: the newest id that there is.

        An id that is pruned by now is still one to go on from.
        """
        page = {"before": newest + 1, "limit": PAGE}
        for name, most, what in (("before", newest, "an id from this list"),
                                 ("limit", LONGEST_PAGE, f"a number from 1 to {LONGEST_PAGE}")):
            given = self._bottle.request.query.get(name)
            if given is None:
                continue
            if not re.fullmatch("[0-9]{1,18}", given) or not 1 <= int(given) <= most:
                raise self._refuse(400, f"{name} must be {what}; found {show(given)}")
            page[name] = int(given)
        return page

    def _pause_or_resume(self, config: Config, viewer: bool, key: str, verb: str) -> object:
        try:
            asked = read_json(tail(self._bottle.request.environ["wsgi.input"], BODY_KEPT))
            if not isinstance(asked, dict) or asked.keys() - {"for"}:
                raise ValueError('the body must be JSON, such as {"for": "2h"}, or empty')
            span = pause_length(asked["for"]) if "for" in asked and verb == "pause" else None
            now = self._clock.now()
            monitor = config.monitors[key]
            self._store.write(lambda db: pause_or_resume(db, monitor, verb, span, now))
        except ValueError as error:
            raise self._refuse(400, str(error)) from None
        return self._monitors_json(config, viewer, key)

    def _test_channel(self, config: Config, _viewer: bool, channel: str) -> object:
        if channel not in config.channels:
            raise self._refuse(404, f"no channel {show(channel)}")
        error = send_test(config, channel)
        return {"sent": error is None, "error": error}

    def _metrics(self) -> str:
        self._let_in(public=False)
        self._secure_headers("text/plain; version=0.0.4; charset=utf-8")
        return self._counts.text(self._config)

    def _badge(self, key: str) -> Any:
        """A monitor's state, or the most urgent state of all, as an image."""
        self._let_in(public=True)
        config, now = self._config, self._clock.now()
        if key != "all" and key not in config.monitors:
            raise self._refuse(404, f"no monitor {show(key)}")
        with self._store.reading() as db:
            rows = read_monitors(db)
        states = [shown_state(rows.get(one.key), one, now) for one in config.monitors.values()
                  if key in ("all", one.key)]
        state = next((state for state in STATES if state in states), "pending")
        name, text = "monitors", f"{states.count(state)} {state}"
        if key != "all":
            name, text = config.monitors[key].name, state
            name = name if len(name) <= BADGE_NAME else name[: BADGE_NAME - 1] + "…"
        self._secure_headers("image/svg+xml; charset=UTF-8")
        return self._badge_image.render(
            name=name, text=text, left=text_width(name), right=text_width(text),
            colour=BADGE_COLOURS.get(state, "#5f5f5f"),
        )

    def _json(self, value: object) -> str:
        self._secure_headers("application/json")
        return json.dumps(value, ensure_ascii=False)

    def _health(self) -> str:
        reason = self._store.failure and f"the database can't be written: {self._store.failure}"
        if self._watcher.is_stalled():
            reason = "the watcher is stalled"
        self._bottle.response.status = 503 if reason else 200
        return self._json({"status": "unavailable", "reason": reason} if reason
                          else {"status": "ok"})

    def _refuse(self, status: int, message: str = "", **headers: str) -> Any:
        """An error to raise, or to return, from a handler."""
        headers |= ERROR_HEADERS.get(status, {})
        return self._bottle.HTTPError(status, message or REFUSALS[status], **headers)

    def _error_page(self, error: Any) -> str:
        """Any error, as the API has it or as a page."""
        if error.exception:
            log.error("%s: %s: %s", self._bottle.request.path[:200],
                      type(error.exception).__name__, error.exception)
        if self._bottle.request.path.startswith("/api/"):
            kind = ERROR_TYPES.get(error.status_code, "invalid_request")
            return self._json({"error": {"type": kind, "message": str(error.body)[:200]}})
        return self._site.refuse(error.status_code)

    def _secure_headers(self, content_type: str = "text/html; charset=UTF-8") -> None:
        """Nothing but our own style is loaded, nothing is kept, and no token leaves in a referrer.
        """
        response = self._bottle.response
        response.set_header("Content-Type", content_type)
        response.set_header("Cache-Control", "no-store")
        response.set_header("Referrer-Policy", "no-referrer")
        response.set_header("X-Content-Type-Options", "nosniff")
        response.set_header(
            "Content-Security-Policy",
            POLICY,
        )


def read_json(body: bytes) -> object:
    """What a request's body says: {} where it is empty, None where it is not JSON."""
    try:
        return json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return None


def _ping(environ: Environ, signal: str, exit_status: int | None) -> Ping:
    """What is kept of a request: nothing in it can grow beyond a bound."""
    query = environ.get("QUERY_STRING", "")
    rid = parse_qs(query[:1_000], errors="replace").get("rid", [""])[0]
    body = tail(environ["wsgi.input"], BODY_KEPT)
    return Ping(
        signal=signal,
        exit_status=exit_status,
        method=environ["REQUEST_METHOD"][:16],
        sender=environ.get("REMOTE_ADDR"),
        user_agent=environ.get("HTTP_USER_AGENT", "")[:200] or None,
        rid=rid if 1 <= len(rid) <= 64 else None,
        body=body.decode("utf-8", "replace") or None,
    )


def text_width(text: str) -> int:
    """About how many pixels a text takes in an 11 px sans-serif."""
    wide = sum(one in "mwMW@%—" or unicodedata.east_asian_width(one) in "WF" for one in text)
    narrow = sum(one in "iljtfrI.,:;'|! ()[]" for one in text)
    return 7 * len(text) + 4 * wide - 3 * narrow


def _moment(text: str | None, zone: tzinfo, now: int) -> str:
    """A JSON moment for people, with how far from now it is."""
    if text is None:
        return "–"
    at = round(datetime.fromisoformat(text).timestamp() * SECOND)
    return f"{iso_local(at, zone)[:19]} ({far_from(at, now)})"


Mistakes = Callable[[], Sequence[str]]


class Site:
    """The pages for people: the dashboard, and each monitor's with its buttons."""

    def __init__(self, store: Store, clock: Clock, intake: Intake, mistakes: Mistakes) -> None:
        import bottle

        self._bottle = bottle
        self._store = store
        self._clock = clock
        self._intake = intake
        self._mistakes = mistakes
        self._config: Config
        self._access: Access
        self._bars: tuple[object, dict[str, str]] = None, {}  # what they hold for, and they
        self._tested: dict[str, tuple[int, str | None]] = {}  # channel -> when, and what failed
        self._templates = {
            name: bottle.SimpleTemplate(HEAD + body + FOOT)
            for name, body in (("dashboard", DASHBOARD), ("monitor", MONITOR), ("word", ""))
        }

    def add_routes(self, route: Callable[[str, str, Callable[..., Any]], None]) -> None:
        route("GET", "/", self._dashboard)
        route("GET", "/monitor/<key>", self._monitor)
        route("POST", "/monitor/<key>/<verb:re:pause|resume|test>", self._act)

    def use(self, config: Config, access: Access) -> None:
        self._config, self._access = config, access
        self._bars = None, {}

    def _dashboard(self) -> str:
        config, now = self._config, self._clock.now()
        refusal = self._refusal()
        if refusal and not config.public:
            return self.refuse(refusal)
        viewer = refusal is None
        with self._store.reading() as db:
            monitors = describe_monitors(db, config, now)
            why = causes(db)
            bars = self._draw_bars(db, now)
            gaps = [gap for gap in gaps_since(db, now - DAY) if is_long(gap)]
            troubles = describe_troubles(db, config, now)
        asked = " ".join(self._bottle.request.query.getunicode("q", "").split())[:100]
        return self._render(
            "dashboard",
            answer(monitors, why, config, now),
            notices=attention(
                monitors, why, gaps, self._mistakes(), troubles, self._intake.strangers(), viewer,
                config, now,
            ),
            rows=[
                (one, lasting(one, now), bars[one["id"]], longest_uptime(one))
                for one in monitors
                if is_asked_for(asked, one)
            ],
            asked=asked,
            count=len(monitors),
            filter_from=FILTER_FROM,
            viewer=viewer,
            example=ping_command(monitors[0]["ping_url"]),
        )

    def _draw_bars(self, db: sqlite3.Connection, now: int) -> dict[str, str]:
        """Each monitor's 90 days, by key. Drawn once a minute, and for each new event."""
        zone = self._config.timezone
        held_for = now // MINUTE, newest_id(db, "events")
        if self._bars[0] != held_for:
            days = midnights(zone, DAYS_SHOWN, now)
            found = describe_days(db, self._config.monitors, days, now)
            dates = [f"{datetime.fromtimestamp(day // SECOND, zone):%-d %b}" for day in days]
            self._bars = held_for, {key: draw_days(one, dates) for key, one in found.items()}
        return self._bars[1]

    def _monitor(self, key: str) -> Any:
        config, now = self._config, self._clock.now()
        refusal = self._refusal()
        if refusal and not config.public:
            return self.refuse(refusal)
        if key not in config.monitors:
            return self._bottle.HTTPError(404)
        before = self._bottle.request.query.get("before", "")
        with self._store.reading() as db:
            [monitor] = describe_monitors(db, config, now, [key])
            id = read_monitors(db)[key]["id"]
            beats = recent_heartbeats(db, id, BEATS_SHOWN)
            older_than = int(before) if re.fullmatch("[0-9]{1,18}", before) else None
            runs = recent_heartbeats(db, id, RUNS_SHOWN, older_than)
            events = recent_events(db, id, EVENTS_SHOWN)
            cause = causes(db).get(key)
            bar = self._draw_bars(db, now)[key]
        viewer = refusal is None
        return self._render(
            "monitor",
            (monitor["state"], monitor["name"], sentence(monitor, cause, config, now)),
            here=f"{config.prefix}/monitor/{key}",
            monitor=monitor,
            rhythm=describe_rhythm(config.monitors[key]),
            found=rhythm(config.monitors[key], beats).lines(),
            upcoming=upcoming(config.monitors[key], config.timezone, now),
            bar=bar,
            timeline=draw_beats(beats, config.timezone, now),
            beats=beats,
            runs=runs,
            older=runs[-1]["id"] if len(runs) == RUNS_SHOWN else None,
            events=events,
            viewer=viewer,
            snippets=snippets(config.monitors[key], monitor["ping_url"]) if viewer else [],
            tested=[(name, self._tested.get(name)) for name in monitor["channels"] if viewer],
        )

    def _act(self, key: str, verb: str) -> Any:
        """A button of a monitor's page: do what it says, and show the page again."""
        environ, config = self._bottle.request.environ, self._config
        if refusal := self._refusal():
            return self.refuse(refusal)
        if self._access.is_cross_site(environ):
            return self.refuse(403, "A page of another site asked for this: it was not done.")
        monitor = config.monitors.get(key)
        if monitor is None:
            return self._bottle.HTTPError(404)
        form = parse_qs(tail(environ["wsgi.input"], BODY_KEPT).decode("latin-1"))
        try:
            if verb == "test":
                for name in monitor.notify:
                    self._tested[name] = self._clock.now(), send_test(config, name)
            else:
                span = pause_length(form["for"][0]) if "for" in form else None
                now = self._clock.now()
                self._store.write(lambda db: pause_or_resume(db, monitor, verb, span, now))
        except Unrecordable as error:
            return self.refuse(503, f"Nothing can be written now: {error}")
        except ValueError as error:
            return self.refuse(400, str(error))
        self._bottle.response.status = 303
        self._bottle.response.set_header("Location", f"{config.prefix}/monitor/{key}")
        return ""

    def _refusal(self) -> int | None:
        return self._access.refusal(self._bottle.request.environ)

    def refuse(self, status: int, text: str = "") -> str:
        """The page that says why there is no other one."""
        response = self._bottle.response
        response.status = status
        if status == 401:
            response.set_header("WWW-Authenticate", CHALLENGE)
        if status == 429:
            response.set_header("Retry-After", "60")
        text = text or REFUSALS.get(status, "Larm's page is at / on this address.")
        return self._render("word", ("paused", response.status_line, text))

    def _render(self, template: str, answer: tuple[str, str, str], **values: Any) -> str:
        """A page, which loads nothing but its own style and script, and tells no other site.

        `answer`: the state, headline and sentence at its top.
        """
        response = self._bottle.response
        response.set_header("Content-Type", "text/html; charset=UTF-8")
        response.set_header("Cache-Control", "no-store")
        response.set_header("Referrer-Policy", "same-origin")  # none at all makes Origin null
        response.set_header("X-Content-Type-Options", "nosniff")
        response.set_header("Content-Security-Policy", POLICY)
        config, now = self._config, self._clock.now()

        def moment(at: int) -> str:
            return iso_local(at, config.timezone)[:19]

        page: str = self._templates[template].render(
            values,
            **dict(zip(("state", "title", "text"), answer, strict=True)),
            **PAGE_WORDS,
            config=config,
            prefix=config.prefix,
            script=None if template == "word" else SCRIPT,  # a refusal does not ask again
            icon=ICONS[answer[0]],
            moment=moment,
            far=lambda at: far_from(at, now),
            ago=lambda text: ago(text, now),
            describe_delivery=lambda one: describe_delivery(one, config.timezone),
        )
        return page


# ======================================================================================
# Pages: what people read, as words, drawings and templates. Knows nothing of HTTP.
# ======================================================================================

DAYS_SHOWN = 90
BEATS_SHOWN, RUNS_SHOWN, EVENTS_SHOWN = 100, 20, 20
FILTER_FROM = 15  # monitors: with fewer, eyes are faster
PENDING_LISTED = 3  # monitors whose ping command the dashboard shows

REFUSALS = {
    401: "Give the password that is set in larm.toml; the user name may be anything.",
    403: "Larm shows itself only to this machine until a password is set: add "
    'password = "..." to larm.toml, or open it through an SSH tunnel.',
    429: "Too many wrong passwords. Wait a minute, then try again.",
}

Described = Mapping[str, Any]  # a monitor, as describe_monitor() gives it


@dataclass(frozen=True)
class Notice:
    """Something that needs attention. `kind` chooses its shape and colour: a state, or "note"."""

    kind: str
    title: str
    text: str
    link: str = ""  # below the prefix
    code: str = ""  # to be copied, or what the job said


def describe_troubles(db: sqlite3.Connection, config: Config, now: int) -> list[str]:
    """What is wrong with Larm itself, but for its file, with its channels, and what flaps."""
    found = [row["text"] for row in open_troubles(db) if row["topic"] in ("disk", "database")]
    rows = read_monitors(db)
    found += [
        f"{monitor.name} is flapping: no alert of it until it has held one state"
        for key, monitor in config.monitors.items()
        if key in rows and rows[key]["told"] == "flapping" and rows[key]["watching"] == "yes"
    ]
    return found + [
        f"channel {name}: {describe_channel(row, config.timezone, now)}"
        for name, row in read_channels(db).items()
        if name in config.channels and row["failing_since"] is not None
    ]


def attention(
    monitors: Sequence[Described],
    causes: Mapping[str, sqlite3.Row],
    gaps: Sequence[sqlite3.Row],
    mistakes: Sequence[str],
    troubles: Sequence[str],
    strangers: Sequence[Stranger],
    viewer: bool,
    config: Config,
    now: int,
) -> list[Notice]:
    """All that needs it, the worst first; but for viewers only the monitors and the gaps."""
    found = []
    for state in ("down", "late"):
        ones = [monitor for monitor in monitors if monitor["state"] == state]
        for one in ones[:LISTED]:
            cause = causes.get(one["id"])
            output = (cause["output"] or "") if viewer and cause else ""
            said = "\n".join(plain(output).strip().splitlines()[-3:])
            text = sentence(one, cause, config, now)
            found.append(Notice(state, one["name"], text, f"/monitor/{one['id']}", said))
        if len(ones) > LISTED:
            more = len(ones) - LISTED
            found.append(Notice(state, f"{more} more are {state}", "", f"/?q={state}"))
    if viewer:
        found += [Notice("late", "Larm", trouble) for trouble in troubles]
        found += [Notice("late", "Not applied", mistake) for mistake in mistakes]
    if viewer and not config.channels:
        found.append(Notice("late", "Nobody is alerted", "larm.toml has no channels yet."))
    found += [Notice("note", "Not watched", f"{describe_gap(gap, config.timezone)}.")
              for gap in gaps]
    found += [
        Notice("note", "Unknown token",
               f"{show(one.start)}… was pinged {counted(one.count, 'time')} from {one.sender}, "
               f"last {far_from(one.at, now)}: a typo, or a monitor that was removed?")
        for one in (strangers if viewer else ())
    ]
    waiting = [monitor for monitor in monitors if monitor["state"] == "pending"]
    for one in waiting[:PENDING_LISTED]:
        text, code = sentence(one, None, config, now), ""
        if viewer and one["ping_url"]:
            text, code = "Never pinged. Let its job run:", ping_command(one["ping_url"])
        found.append(Notice("pending", one["name"], text, f"/monitor/{one['id']}", code))
    if more := max(0, len(waiting) - PENDING_LISTED):
        found.append(Notice("pending", f"{more} more were never pinged", "", "/?q=pending"))
    return found


def answer(
    monitors: Sequence[Described], causes: Mapping[str, sqlite3.Row], config: Config, now: int
) -> tuple[str, str, str]:
    """Why somebody opened the page: (state, headline, one sentence more)."""
    by_state: dict[str, list[Described]] = defaultdict(list)
    for monitor in monitors:
        by_state[monitor["state"]].append(monitor)
    total, up = len(monitors), by_state["up"]

    def others(*but: str) -> str:
        words = {"down": "down", "late": "late", "pending": "never pinged", "paused": "paused"}
        counts = [f"{len(by_state[state])} {word}" for state, word in words.items()
                  if by_state[state] and state not in but]
        return f" Also {', '.join(counts)}." if counts else ""

    for state in ("down", "late"):
        ones = by_state[state]
        if len(ones) == 1:
            text = sentence(ones[0], causes.get(ones[0]["id"]), config, now)
            return state, f"{ones[0]['name']} is {state}", text + others(state)
        if ones:
            names = [f"{one['name'][:NAME_SHOWN]} for {lasting(one, now)}" for one in ones[:3]]
            more = f" and {len(ones) - 3} more" if len(ones) > 3 else ""
            text = f"{', '.join(names)}{more}.{others(state)}"
            return state, f"{len(ones)} of {total} monitors are {state}", text
    if up:
        headline = f"{len(up)} of {total} monitors are up"
        if len(up) == total:
            headline = f"All {total} monitors are up" if total > 1 else f"{up[0]['name']} is up"
        last = ago(max(monitor["last_heartbeat_at"] for monitor in up), now)
        due = ago(min(monitor["expected_at"] for monitor in up), now)
        return "up", headline, f"Last heartbeat {last}, next one due {due}.{others()}"
    if by_state["pending"]:
        return "pending", "Waiting for the first ping", f"None has come yet.{others('pending')}"
    return "paused", "Nothing is watched", f"{counted(total, 'monitor')} paused."


def moment_of(text: str) -> int:
    """A JSON moment in milliseconds."""
    return round(datetime.fromisoformat(text).timestamp() * SECOND)


def ago(text: str | None, now: int) -> str:
    """How far a JSON moment is from now, in its largest unit."""
    if text is None:
        return "never"
    return re.sub(r"(\d \w+) \d+ \w+", r"\1", far_from(moment_of(text), now))


def lasting(monitor: Described, now: int) -> str:
    """For how long a monitor has had its state."""
    return ago(monitor["since"], now).removesuffix(" ago")


def sentence(
    monitor: Described, cause: sqlite3.Row | None, config: Config, now: int
) -> str:
    """A monitor's state since when, why, and what comes next; `cause`: as causes() gives it."""
    state, since = monitor["state"], moment_of(monitor["since"])
    last, due, deadline = (
        ago(monitor[name], now) for name in ("last_heartbeat_at", "expected_at", "deadline_at")
    )
    grace = format_duration(round(monitor["grace_seconds"] * SECOND))
    is_today = now - since < DAY and midnights(config.timezone, 1, now)[0] <= since
    moment = datetime.fromtimestamp(since // SECOND, config.timezone)
    when = f"since {moment:{'%H:%M' if is_today else '%-d %b %H:%M'}} ({lasting(monitor, now)})"
    if state == "up":
        return f"Up. Last heartbeat {last}, next due {due}, {grace} grace."
    if state == "late":
        return f"Late: due {due}, down {deadline} unless it pings. Last heartbeat {last}."
    if state == "down":
        why = describe_cause(cause["reason"], cause["exit_status"]) if cause else "unknown why"
        return f"Down {when}: {why}. Last heartbeat {last}."
    if state == "pending":
        return "Never pinged. It is watched from its first heartbeat on."
    off = "" if monitor["enabled"] else "by enabled = false in larm.toml, "
    return f"Paused {off}{when}. Last heartbeat {last}."


def describe_cause(reason: str, exit_status: int | None) -> str:
    if reason == "failed" and exit_status is not None:
        return f"exit status {exit_status}"
    return {"missed": "no heartbeat came in time", "failed": "the job reported a failure",
            "overran": "its run did not end in time"}[reason]


def longest_uptime(monitor: Described) -> str:
    """The figure of the longest time that there is one for, with that time unless it is 90 d."""
    for span, figure in reversed(monitor["uptime"].items()):
        if figure is not None and monitor["state"] != "pending":
            return f"{figure:g} %" if span == "90d" else f"{figure:g} % in {span[:-1]} {span[-1]}"
    return "–"


def is_asked_for(asked: str, monitor: Described) -> bool:
    """Whether each word of the filter is in a monitor's name, key or state."""
    text = f"{monitor['name']} {monitor['id']} {monitor['state']}".casefold()
    return all(word in text for word in asked.casefold().split())


def ping_command(ping_url: str) -> str:
    return f"curl -fsS -m 10 --retry 5 {ping_url}"


def snippets(monitor: Monitor, url: str) -> list[tuple[str, str]]:
    """How a job pings, ready to be copied: (where, what)."""
    minutes = monitor.interval // MINUTE
    times = "0 3 * * *" if minutes >= 1440 else f"0 */{minutes // 60} * * *"
    if minutes < 60:
        times = f"*/{max(1, minutes)} * * * *"
    if monitor.schedule:
        times = monitor.schedule.expression
    job, curl = "/path/to/job.sh", ping_command(url)
    return [
        ("crontab", f"{times} {job} && {curl}"),
        ("Shell, with its failures", f"{job}; {curl}/$?"),
        ("Larm's own wrapper, with output and duration",
         f"python3 larm.py run --url {url} -- {job}"),
        ("systemd service", f"[Service]\nType=oneshot\nExecStart={job}\nExecStartPost={curl}"),
        ("Python", f'import urllib.request\nurllib.request.urlopen("{url}", timeout=10)'),
        ("Node.js", f'await fetch("{url}", {{ signal: AbortSignal.timeout(10_000) }});'),
        ("Ruby", f'require "net/http"\nNet::HTTP.get(URI("{url}"))'),
    ]


SIGNAL_CLASSES = {"success": "up", "fail": "down", "start": "paused", "log": "paused"}
DAY_WORDS = {"up": "up", "down": "down all day", "partly": "down", "unwatched": "not watched",
             "none": "no data"}
DAY_PATHS = {"up": "M{x} 13h{w}", "down": "M{x} 10h{w}", "partly": "M{x} 4h{w}m-{w} 11h{w}",
             "unwatched": "M{x} 17h{w}", "none": "M{x} 19h{w}"}


def draw_days(days: Sequence[Day], dates: Sequence[str]) -> str:
    """A bar of one cell a day, 3 wide and 1 apart; equal days in a row are one dashed line.

    What is not up stands out of the line, and each kind has a height of its own.
    """
    parts, counts, at = [], [], 0
    for (kind, down), run in itertools.groupby(days):
        count = len(list(run))
        first, last = dates[at], dates[at + count - 1]
        path = DAY_PATHS[kind].format(x=4 * at, w=4 * count - 1)
        words = DAY_WORDS[kind] + (f" {format_duration(down)}" if kind == "partly" else "")
        month = last[last.index(" ") :]
        when = first if first == last else f"{first.removesuffix(month)}–{last}"
        kind = "" if kind == "up" else f'class="{kind}" '  # most are: not to be said so often
        parts.append(f'<path {kind}d="{path}"><title>{when}: {words}</title></path>')
        at += count
    for kind, word in (("up", "up"), ("partly", "partly down"), ("down", "down")):
        if number := sum(day[0] == kind for day in days):
            counts.append(f"{number} {word}")
    label = f"Days: {', '.join(counts) or 'no data'}"
    return (f'<svg class="days" viewBox="0 0 {4 * len(days) - 1} 20" role="img" '
            f'aria-label="{label}">{"".join(parts)}</svg>')


def draw_beats(beats: Sequence[sqlite3.Row], zone: tzinfo, now: int) -> str:
    """Heartbeats (newest first) on a line of time that ends now, as high as they took long."""
    first = beats[-1]["at"] if beats else now
    longest = max((beat["duration_ms"] or 0 for beat in beats), default=0)
    parts = []
    for beat in reversed(beats):
        height = 30 + (48 * (beat["duration_ms"] or 0) // longest if longest else 0)
        kind = SIGNAL_CLASSES[beat["signal"]]
        x = 4 + 992 * (beat["at"] - first) // max(1, now - first)
        parts.append(f'<path class="{kind}" d="M{x} 80v-{height if kind != "paused" else 14}">'
                     f"<title>{iso_local(beat['at'], zone)[:19]}: {describe_beat(beat)}</title>"
                     "</path>")
    return (f'<svg class="beats" viewBox="0 0 1000 80" preserveAspectRatio="none" role="img" '
            f'aria-label="{counted(len(beats), "heartbeat")}">{"".join(parts)}</svg>')


def describe_beat(beat: sqlite3.Row) -> str:
    """What a heartbeat said: "success, took 12 s"; "failed, exit status 3"."""
    text = {"success": "success", "fail": "failed", "start": "started", "log": "output"}
    words = [text[beat["signal"]]]
    if beat["exit_status"]:
        words.append(f"exit status {beat['exit_status']}")
    if beat["duration_ms"] is not None:
        words.append(f"took {format_duration(beat['duration_ms'])}")
    return ", ".join(words)


def event_in_words(event: Mapping[str, Any]) -> str:
    if event["type"] == "up":
        return f"up again after {format_duration(event['down_ms'])}"
    return f"down: {describe_cause(event['reason'], event['exit_status'])}"


def describe_delivery(delivery: sqlite3.Row, zone: tzinfo) -> str:
    """What became of an alert on its way to a channel."""
    words = [delivery["state"]]
    if delivery["at"] is not None:
        words[0] += f" {iso_local(delivery['at'], zone)[:19]}"
    if delivery["state"] != "sent" or delivery["attempts"] > 1:
        words.append(counted(delivery["attempts"], "attempt"))
    return ", ".join([*words, delivery["error"] or ""]).rstrip(", ")


SHAPES = {  # of the states, each with a form of its own, for those who see no difference in colour
    "up": "M12 1a11 11 0 1 0 0 22a11 11 0 0 0 0-22zM10.2 17.4l-5.1-5.1 2-2 3.1 3.1 6.7-6.7 2 2z",
    "down": "M7.4 1h9.2L23 7.4v9.2L16.6 23H7.4L1 16.6V7.4zM8.2 6.2l-2 2L10 12l-3.8 3.8 2 2L12 14l"
    "3.8 3.8 2-2L14 12l3.8-3.8-2-2L12 10z",
    "late": "M12 1.5 23.8 22.5H.2zM10.8 9v6.5h2.4V9zM10.8 17.4v2.4h2.4v-2.4z",
    "pending": "M12 1a11 11 0 1 0 0 22a11 11 0 0 0 0-22zM12 4a8 8 0 1 1 0 16a8 8 0 0 1 0-16zM12 9"
    "a3 3 0 1 0 0 6a3 3 0 0 0 0-6z",
    "paused": "M5 1h14a4 4 0 0 1 4 4v14a4 4 0 0 1-4 4H5a4 4 0 0 1-4-4V5a4 4 0 0 1 4-4zM7.5 7v10h3V7"
    "zM13.5 7v10h3V7z",
    "note": "M12 1a11 11 0 1 0 0 22a11 11 0 0 0 0-22zM10.7 10.5v7h2.6v-7zM10.7 6v2.6h2.6V6z",
}
_ICON_COLOURS = {"up": "#14803f", "down": "#c81e27", "late": "#b97a00"}
ICONS = {
    state: "data:image/svg+xml," + quote(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path fill-rule="evenodd" '
        f'fill="{_ICON_COLOURS.get(state, "#667")}" d="{shape}"/></svg>'
    )
    for state, shape in SHAPES.items()
}

STYLE = """
:root { color-scheme: light dark; --paper: #f6f6f3; --card: #fff; --ink: #191b1d;
  --muted: #5b6066; --line: #e4e4df; --up: #12703c; --down: #b8151e; --late: #855600;
  --bar: #35a067; --partly: #c98500;
  --is-up: #115c34; --is-down: #ad121b; --is-late: #7d5200; --is-else: #46525f; }
@media (prefers-color-scheme: dark) { :root { --paper: #111315; --card: #1a1d20; --ink: #e8eaec;
  --muted: #a2a9b0; --line: #2d3236; --up: #63d396; --down: #ff857f; --late: #f0b94f;
  --bar: #3a9c67; --partly: #e0a030;
  --is-up: #0e4b2b; --is-down: #8f0f17; --is-late: #644200; --is-else: #353f4a; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; margin: auto; max-width: 74rem; overflow-wrap: anywhere;
  padding: 0 max(1rem, 2vw) 2rem; }
header, nav { align-items: center; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
header { justify-content: space-between; min-height: 3.5rem; }
nav a { color: var(--muted); text-decoration: none; }
nav a:first-child { color: inherit; font-weight: 700; }
a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: .2em; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 3px solid #2a78d6; outline-offset: 2px; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.5rem); font-weight: 680; letter-spacing: -.02em;
  line-height: 1.15; text-wrap: balance; }
h2 { font-size: 1.06rem; font-weight: 650; margin: 2.25rem 0 .7rem; }
h1, b, tbody th, pre, dd { unicode-bidi: isolate; }
small, .ends { color: var(--muted); font-size: .84rem; font-weight: 400; }
svg { fill: currentColor; flex: none; height: 1.05em; vertical-align: -.15em; width: 1.05em; }
.up { color: var(--up); } .down { color: var(--down); } .late { color: var(--late); }
.pending, .paused, .note { color: var(--muted); }
.answer { align-items: center; background: var(--is-else); border-radius: 1rem; color: #fff;
  display: flex; gap: clamp(1rem, 3vw, 1.75rem); padding: clamp(1.25rem, 3vw, 2.25rem); }
.answer.up { background: var(--is-up); } .answer.down { background: var(--is-down); }
.answer.late { background: var(--is-late); }
.answer svg { color: #fff; font-size: clamp(2.5rem, 7vw, 4rem); }
.answer p { font-size: 1.06rem; margin-top: .4rem; }
#stale { background: var(--late); border-radius: .5rem; color: var(--paper); font-weight: 600;
  padding: .2rem .7rem; }
.card, .notices { background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: 1rem; }
.card + table, .card p + p, pre + p, .figures + dl { margin-top: 1rem; }
.notices { list-style: none; padding: 0 1rem; }
.notices li { display: grid; gap: 0 .75rem; grid-template-columns: auto 12rem minmax(0, 1fr);
  padding: .75rem 0; }
li + li { border-top: 1px solid var(--line); }
.notices svg { font-size: 1.2rem; margin-top: .2rem; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: .5rem;
  font: .8125rem/1.5 ui-monospace, monospace; margin-top: .5rem; max-height: 24rem; overflow: auto;
  padding: .6rem .8rem; user-select: all; white-space: pre-wrap; }
.bar, .ends { display: flex; gap: 0 1rem; justify-content: space-between; }
.bar { align-items: end; flex-wrap: wrap; }
form { align-items: center; display: inline-flex; gap: .5rem; margin: 1rem 1rem 0 0; }
.bar form { margin: 0 0 .7rem; }
input, select, button { background: var(--card); border: 1px solid var(--muted);
  border-radius: .5rem; color: inherit; font: inherit; min-height: 2.5rem; padding: .3rem .8rem; }
button { cursor: pointer; font-weight: 600; }
button:hover { background: var(--line); }
table { background: var(--card); border-radius: .75rem; border-spacing: 0;
  box-shadow: 0 0 0 1px var(--line); font-size: .9375rem; overflow: hidden; width: 100%; }
th, td { border-top: 1px solid var(--line); padding: .6rem .75rem; text-align: left; }
th:first-child { padding-left: 1rem; }
thead th { border: 0; color: var(--muted); font-size: .8125rem; font-weight: 500; }
tbody a { text-decoration: none; }
.rows th svg { margin-right: .6rem; }
.rows td { white-space: nowrap; }
.rows td.up, .rows td.down, .rows td.late { font-weight: 600; }
.past th { font-weight: 400; }
.past th, .past td { vertical-align: top; }
.days { display: block; height: auto; width: 359px; }
.days path { pointer-events: all; stroke: var(--bar); stroke-dasharray: 3 1; stroke-width: 14; }
.days .down { stroke: var(--down); stroke-width: 20; }
.days .partly { stroke: var(--partly); stroke-width: 8; }
.days .unwatched { stroke: var(--muted); stroke-width: 6; }
.days .none { stroke: var(--muted); stroke-width: 2; }
.card .days { width: 100%; }
.beats { border-bottom: 2px solid var(--line); display: block; height: 5rem; width: 100%; }
.beats path { stroke: currentColor; stroke-width: 4; vector-effect: non-scaling-stroke; }
.beats .up { color: var(--bar); } .beats .down { stroke-dasharray: 9 4; }
.ends { margin: .3rem 0 0; }
dl { display: grid; gap: .3rem 1.25rem; grid-template-columns: auto 1fr; }
dt { color: var(--muted); }
dd { grid-column: 2; }
.figures { gap: .5rem 2.5rem; grid-template-columns: repeat(4, max-content); margin-top: 1rem; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dd { font-size: 1.4rem; font-weight: 600; }
summary { cursor: pointer; font-weight: 600; }
td summary { font-weight: 400; }
details + details { margin-top: .6rem; }
footer { color: var(--muted); font-size: .8125rem; margin-top: 2.5rem; }
.sr, svg.sr { clip-path: inset(50%); height: 1px; overflow: hidden;
  position: absolute; width: 1px; }
@media (max-width: 62rem) {
  thead { clip-path: inset(50%); position: absolute; }
  table, tbody { display: block; }
  tr { border-top: 1px solid var(--line); display: grid; gap: .15rem .75rem; padding: .7rem 1rem;
    grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) auto; }
  tr:first-child { border: 0; }
  th, td, th:first-child { border: 0; padding: 0; }
  .rows th { grid-column: 1 / 3; }
  .rows td:nth-child(2), .rows td:last-child { text-align: right; }
  .rows td:nth-child(5) { grid-column: 1 / 4; }
  .past tr { display: flex; flex-wrap: wrap; }
  .rows td:nth-child(3), .rows td:nth-child(4), .rows td:last-child { color: var(--muted);
    font-size: .8125rem; grid-row: 3; white-space: normal; }
  .rows td:nth-child(3)::before { content: "Last "; }
  .rows td:nth-child(4)::before { content: "Due "; }
  .rows .days { width: 100%; }
}
@media (max-width: 40rem) {
  .answer { align-items: start; }
  .figures { grid-template-columns: 1fr 1fr; }
  .beats path { stroke-width: 2; }
  .notices li { grid-template-columns: auto minmax(0, 1fr); }
  .notices div { grid-column: 2; }
}
@media (prefers-reduced-motion: no-preference) { .answer { transition: background .3s; } }
@media print {
  .answer[class] { background: none; border: 2px solid; }
  .answer, .answer svg { color: inherit; }
  form, header, footer, #add, #how { display: none; }
}
"""

SCRIPT = """
(() => {
const every = 15000, $ = (selector, root = document) => root.querySelector(selector);
let asked = 0, timer, seen = new Date();

function update(old, now) {  // change only what differs: scroll, focus and open details stay
  if (old.isEqualNode(now)) return;
  for (const {name} of [...old.attributes])
    if (name !== "open" && !now.hasAttribute(name)) old.removeAttribute(name);
  for (const {name, value} of now.attributes)
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  let next = old.firstChild;
  for (const child of [...now.childNodes]) {
    const twin = child.id ? document.getElementById(child.id) : next;
    if (twin?.parentNode === old && twin.nodeName === child.nodeName && twin.id === child.id) {
      if (twin !== next) old.insertBefore(twin, next);
      if (child.nodeType === 1) update(twin, child);
      else if (twin.data !== child.data) twin.data = child.data;
      next = twin.nextSibling;
    } else old.insertBefore(child, next);
  }
  while (next) { const gone = next; next = next.nextSibling; gone.remove(); }
}

async function refresh() {
  clearTimeout(timer);
  const turn = ++asked, stale = $("#stale");
  try {
    const answer = await fetch(location.pathname + location.search,
      {cache: "no-store", signal: AbortSignal.timeout(10000)});
    if (!answer.ok) throw answer.status;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (turn !== asked) return;
    update($("main"), $("main", page));
    document.title = page.title;
    $("link[rel=icon]").href = $("link[rel=icon]", page).href;
    seen = new Date();
    stale.hidden = true;
  } catch {
    if (turn !== asked) return;
    stale.textContent = `Stale since ${seen.toLocaleTimeString()}: Larm does not answer`;
    stale.hidden = false;
  }
  timer = setTimeout(refresh, every);
}

document.addEventListener("input", ({target}) => {
  if (target.id !== "q") return;
  history.replaceState(null, "", target.value ? "?q=" + encodeURIComponent(target.value) : "?");
  clearTimeout(timer);
  timer = setTimeout(refresh, 150);
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
timer = setTimeout(refresh, every);
})();
"""

BADGE_NAME = 40  # characters of a monitor's name
BADGE_COLOURS = {"up": "#14703a", "late": "#8a5a00", "down": "#b3161f"}
BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{{left + right + 24}}" height="20"
 role="img" aria-label="{{name}}: {{text}}">
<title>{{name}}: {{text}}</title>
<clipPath id="rounded"><rect width="{{left + right + 24}}" height="20" rx="3"/></clipPath>
<g clip-path="url(#rounded)">
<rect width="{{left + 12}}" height="20" fill="#444"/>
<rect x="{{left + 12}}" width="{{right + 12}}" height="20" fill="{{colour}}"/>
</g>
<g fill="#fff" font-family="Verdana, 'DejaVu Sans', sans-serif" font-size="11">
<text x="6" y="14" textLength="{{left}}">{{name}}</text>
<text x="{{left + 18}}" y="14" textLength="{{right}}">{{text}}</text>
</g>
</svg>
"""

def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


POLICY = (
    f"default-src 'none'; style-src 'sha256-{_hash(STYLE)}'; script-src 'sha256-{_hash(SCRIPT)}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

HEAD = r"""<!doctype html>
% def shape(kind):
<svg class="{{kind}}"><use href="#{{kind}}"/></svg>\\
% end
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}} · Larm</title>
<link rel="icon" href="{{icon}}">
<style>{{!style}}</style>
</head>
<body>
<svg class="sr" aria-hidden="true">
% for kind, path in shapes.items():
<symbol id="{{kind}}" viewBox="0 0 24 24"><path fill-rule="evenodd" d="{{path}}"/></symbol>
% end
</svg>
<header><nav><a href="{{prefix}}/">Larm</a>
% if get("viewer"):
<a href="{{prefix}}/#monitors">Monitors</a> <a href="{{prefix}}/#add">Add a monitor</a>
% end
</nav><p id="stale" role="status" hidden></p></header>
<main>
<div class="answer {{state}}">
% shape(state)
<div><h1 aria-live="polite">{{title}}</h1><p>{{text}}</p></div>
</div>
"""

FOOT = """</main>
<footer><p>Larm {{version}} · times in {{config.timezone}}</p></footer>
% if script:
<script>{{!script}}</script>
% end
</body>
</html>
"""

DASHBOARD = r"""
% if notices:
<section id="attention" aria-labelledby="attention-title">
<h2 id="attention-title">Needs attention</h2>
<ul class="notices">
% for one in notices:
<li>
% shape(one.kind)
<b>\\
% if one.link:
<a href="{{prefix}}{{one.link}}">{{one.title}}</a>\\
% else:
{{one.title}}\\
% end
</b><div>{{one.text}}\\
% if one.code:
<pre dir="auto">{{one.code}}</pre>\\
% end
</div></li>
% end
</ul>
</section>
% end
<section id="monitors" aria-labelledby="monitors-title">
<div class="bar"><h2 id="monitors-title">Monitors</h2>
% if count >= filter_from:
<form role="search" action="{{prefix}}/"><label for="q">Filter</label>
<input id="q" name="q" type="search" value="{{asked}}" autocomplete="off"></form>
% end
</div>
% if rows:
<table class="rows">
<thead><tr><th scope="col">Monitor</th><th scope="col">State</th>
<th scope="col">Last heartbeat</th><th scope="col">Next due</th>
<th scope="col">90 days, to today</th><th scope="col">Uptime</th></tr></thead>
<tbody>
% for one, lasting, bar, uptime in rows:
% due = ago(one["expected_at"]) if one["expected_at"] else "–"
<tr id="m-{{one["id"]}}"><th scope="row">\\
% shape(one["state"])
<a href="{{prefix}}/monitor/{{one["id"]}}">{{one["name"]}}</a></th>
<td class="{{one["state"]}}">{{one["state"]}} <small>{{lasting}}</small></td>
<td>{{ago(one["last_heartbeat_at"])}}</td><td>{{due}}</td><td>{{!bar}}</td>
<td>{{uptime}}</td></tr>
% end
</tbody>
</table>
% else:
<p class="card">No monitor has that in its name, id or state.</p>
% end
</section>
% if viewer:
<section id="add" aria-labelledby="add-title"><h2 id="add-title">Add a monitor</h2>
<div class="card">
<p>Write what you expect into <b>{{config.path}}</b> and save it; Larm applies it within 2 s.</p>
<pre>[monitors.nightly-backup]
interval = "1d"
grace = "30m"</pre>
<p>Then let the job fetch its monitor's own URL when it is done. Each monitor's page has that URL
and lines ready to copy for cron, systemd, Python and more.</p>
<pre>0 3 * * * /usr/local/bin/backup.sh &amp;&amp; {{example}}</pre>
</div></section>
% end
"""

MONITOR = r"""
% if viewer and monitor["enabled"]:
% if monitor["state"] == "paused":
<form method="post" action="{{here}}/resume"><button>Resume</button></form>
% else:
<form method="post" action="{{here}}/pause"><button>Pause</button><label class="sr" for="for">for
</label><select id="for" name="for"><option value="">until resumed</option>
<option value="1h">for 1 hour</option><option value="1d">for 1 day</option>
<option value="7d">for 7 days</option></select></form>
% end
% end
% if tested:
<form method="post" action="{{here}}/test"><button>Send a test alert</button></form>
% end
% def how_to_ping():
<section id="how" aria-labelledby="how-title"><h2 id="how-title">How to ping</h2>
<div class="card">
% for number, (where, code) in enumerate(snippets):
<details id="how-{{number}}"{{" open" if number == 0 else ""}}><summary>{{where}}</summary>
<pre>{{code}}</pre></details>
% end
</div></section>
% end
% if viewer and not beats:
% how_to_ping()
% end
<section aria-labelledby="days-title"><h2 id="days-title">The last 90 days</h2>
<div class="card">{{!bar}}
<p class="ends"><span>90 days ago</span><span>today</span></p>
<dl class="figures">
% for span, figure in monitor["uptime"].items():
% known = figure is not None and beats
<div><dt>up of {{span[:-1]}} {{span[-1]}}</dt><dd>{{f"{figure:g} %" if known else "–"}}</dd></div>
% end
</dl>
<dl>
<dt>Expected</dt><dd>{{rhythm}}</dd>
% for line in found:
<dt>Found</dt><dd>{{line}}</dd>
% end
% if upcoming:
<dt>Next</dt><dd>{{", ".join(upcoming)}}</dd>
% end
% if viewer and monitor["note"]:
<dt>Note</dt><dd dir="auto">{{monitor["note"]}}</dd>
% end
% if tested:
<dt>Alerts to</dt>
% end
% for channel, test in tested:
% result = f": test {'sent' if test[1] is None else 'not sent: ' + test[1]}" if test else ""
<dd>{{channel}}{{result}}</dd>
% end
</dl></div></section>
<section aria-labelledby="runs-title"><h2 id="runs-title">Heartbeats</h2>
% if not beats:
<p class="card">None yet.</p>
% else:
<div class="card">{{!timeline}}
<p class="ends"><span>{{far(beats[-1]["at"])}}</span><span>now</span></p></div>
<table class="past">
<thead><tr><th scope="col">When</th><th scope="col">What</th>
% if viewer:
<th scope="col">From</th><th scope="col">Output</th>
% end
</tr></thead>
<tbody>
% for run in runs:
<tr id="h-{{run["id"]}}"><th scope="row">{{moment(run["at"])}}
<small>{{far(run["at"])}}</small></th>
<td class="{{signals[run["signal"]]}}">{{describe_beat(run)}}</td>
% if viewer:
<td>{{run["sender"] or "–"}} <small>{{run["user_agent"] or ""}}</small></td><td>\\
% if run["body"]:
<details><summary>{{counted(len(run["body"].splitlines()), "line")}}</summary>
<pre dir="auto">{{plain(run["body"])}}</pre></details>\\
% end
</td>
% end
</tr>
% end
</tbody></table>
% if older:
<p class="ends"><a href="{{here}}?before={{older}}">Older heartbeats</a></p>
% end
% end
</section>
<section aria-labelledby="events-title"><h2 id="events-title">Events</h2>
% if not events:
<p class="card">It has never been down.</p>
% else:
<table class="past">
<thead><tr><th scope="col">When</th><th scope="col">What</th>
% if viewer:
<th scope="col">Who was told</th>
% end
</tr></thead>
<tbody>
% for event in events:
<tr id="e-{{event["id"]}}"><th scope="row">{{moment(event["at"])}}
<small>{{far(event["at"])}}</small></th>
<td class="{{event["type"]}}">{{event_in_words(event)}}</td>
% if viewer:
<td>
% for one in event["deliveries"]:
<div>{{one["channel"]}}: {{describe_delivery(one)}}</div>
% end
</td>
% end
</tr>
% end
</tbody></table>
% end
</section>
% if viewer and beats:
% how_to_ping()
% end
"""


PAGE_WORDS = {  # what every template may use
    "style": STYLE, "shapes": SHAPES, "version": __version__, "plain": plain,
    "describe_beat": describe_beat, "event_in_words": event_in_words, "signals": SIGNAL_CLASSES,
    "counted": counted,
}


# ======================================================================================
# Larm: wires the rooms, starts and stops them. The only place that knows them all.
# ======================================================================================

STOP_WITHIN = 5.0  # seconds, for what is being sent
LOOK = 0.5  # seconds between two looks at larm.toml; it is read when two of them agree


def signature(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is saved, in place, by a rename or by a new target of a link."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def describe_changes(old: Config, new: Config) -> str:
    """What a new configuration changes, on one line, without a value (law 9)."""
    found = []
    tables: list[tuple[str, Mapping[str, object], Mapping[str, object]]] = [
        ("monitors", old.monitors, new.monitors),
        ("channels", old.channels, new.channels),
    ]
    for what, before, after in tables:
        for change, names in (
            ("added", [name for name in after if name not in before]),
            ("removed", [name for name in before if name not in after]),
            ("changed", [name for name in after if before.get(name, after[name]) != after[name]]),
        ):
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                found.append(f"{what} {change}: {', '.join(names[:10])}{more}")
    found += [
        f"{setting} changed"
        for setting in ("url", "timezone", "keep", "password", "public", "watchdog")
        if getattr(old, setting) != getattr(new, setting)
    ]
    return "; ".join(found) or "no setting changed"


def fetch(url: str) -> str | None:
    """GET a URL; None if the answer was a success, else why not, without the URL."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            answer.read(1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return mask(str(error) or type(error).__name__, [url])
    return None


class Larm:
    """A running Larm: one configuration, one database, one listening address."""

    def __init__(self, config: Config, clock: Clock) -> None:
        """Opens the database; raises StoreError."""
        self.config = config
        self.clock = clock
        self.store = Store(config.database)
        self.intake = Intake(self.store, clock)
        self.watcher = Watcher(self.store, clock, self.intake)
        self.health = Health(self.store, clock, self.watcher)
        self.notifier = Notifier(self.store, clock)
        self.web = Web(self.store, clock, self.intake, self.watcher, self.notifier)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._read = self._seen = signature(config.path)
        self.stop_asked = self.reload_asked = False  # signal handlers may set no more than a flag
        self._watched: list[Watched] = []

    def begin(self) -> None:
        """Account for the time since the last run, and put the configuration in force; raises
        Unrecordable. Pings that come from now on are taken, so that nothing else may take long.
        """
        self.watcher.begin()
        self.use(self.config)
        self.health.note_file(())

    def use(self, config: Config) -> None:
        """Put a configuration in force; raises Unrecordable."""
        now = self.clock.now()

        def put(db: sqlite3.Connection) -> list[Watched]:
            watched = adopt(db, config.monitors.values(), now)
            self.intake.use(watched)
            self.watcher.use(watched, config.keep)
            return watched

        try:
            self._watched = self.store.write(put)
        except BaseException:  # not on disk, not in force
            self.intake.use(self._watched)
            self.watcher.use(self._watched, self.config.keep)
            raise
        self.config = config
        self.health.use(config)
        self.notifier.use(config)
        self.web.use(config)

    def reload_if_saved(self) -> None:
        """Apply larm.toml if it was saved or if a reload was asked for: whole, or not at all."""
        found = signature(self.config.path)
        settled, self._seen = found == self._seen, found
        if not self.reload_asked and (found == self._read or not settled):
            return
        self.reload_asked = False
        self._read = found
        try:
            config = load(self.config.path, os.environ, accepts)
        except ConfigError as error:
            if error.mistakes != self.web.mistakes:
                for mistake in error.mistakes[:20]:
                    log.error("%s; the last good configuration stays in force", mistake)
            self.web.mistakes = error.mistakes
            self.health.note_file(error.mistakes)
            return
        self.web.mistakes = ()
        old = self.config
        fixed = {name: getattr(old, name) for name in ("host", "port", "database")}
        if config.url == default_url(config.host, config.port):
            fixed["url"] = old.url
        if any(getattr(config, name) != value for name, value in fixed.items()):
            log.warning("%s: listen and database take effect with a restart of Larm", config.path)
            config = dataclasses.replace(config, **fixed)
        try:
            self.use(config)
        except Unrecordable:
            self._read = None  # again, once the database can be written
            return
        log.info("%s applied: %s", config.path, describe_changes(old, config))
        warn_of(config)
        self.health.note_file(())

    def listen(self) -> None:
        """Bind the address; raises OSError."""
        import waitress

        logging.getLogger("waitress").setLevel(logging.CRITICAL)  # it logs what clients do wrong
        self._sockets: dict[int, Any] = {}
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host or "*"
        self._server = waitress.create_server(
            self.web,
            map=self._sockets,
            listen=f"{host}:{self.config.port}",
            threads=THREADS,
            ident="Larm",
            max_request_body_size=BODY_LIMIT + 1,  # Waitress refuses from this size on
            max_request_header_size=65_536,
            connection_limit=CONNECTIONS,
            channel_timeout=20,
            cleanup_interval=5,
            clear_untrusted_proxy_headers=False,  # they tell who does not come from this machine
        )
        waiting = self._server.task_dispatcher.queue
        self.watcher.is_backlogged = lambda: (
            bool(waiting) or len(self._sockets) >= CONNECTIONS
        )

    def run(self) -> str | None:
        """Serve until a stop is asked for; returns why it ended otherwise."""
        rooms = {"watcher": self._watch, "server": self._server.run, "watchdog": self._feed}
        for name, target in rooms.items():
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        while not self.stop_asked:
            self._stopping.wait(LOOK)
            try:
                self.reload_if_saved()
            except Exception as error:
                log.error("%s was not applied: %s: %s", self.config.path,
                          type(error).__name__, error)
            for thread in self._threads:
                if not thread.is_alive():
                    return f"the {thread.name} thread ended"
            if not self.store.writer_is_alive():
                return "the writer thread ended"
        return None

    def _watch(self) -> None:
        planned, failed = 0, ""
        while not self._stopping.wait(planned / SECOND):
            try:
                planned = self.watcher.tick(planned)
                self.health.note_recording(None)
                self.health.check()
                self.notifier.deliver_due()
                failed = ""
            except Unrecordable as error:  # the writer says so in the log, once
                planned = TICK
                if urgent := self.health.note_recording(str(error)):
                    self.notifier.warn(urgent, lambda: self.store.failure is None)
            except Exception as error:
                planned, before = TICK, failed
                failed = f"{type(error).__name__}: {error}"
                if failed != before:
                    log.error("the watcher failed: %s", failed)

    def _feed(self) -> None:
        """Ping the watchdog while Larm is well: then, and only then, it stays calm."""
        waited, failed = 0.0, False
        while not self._stopping.wait(1):
            watchdog = self.config.watchdog
            waited += SECOND
            if watchdog is None or waited < watchdog.interval or not self._is_well():
                continue
            waited = 0.0
            error = fetch(watchdog.ping)
            if bool(error) != failed:
                failed = bool(error)
                log.warning("the watchdog %s", f"was not reached: {error}" if error
                            else "is reached again")

    def _is_well(self) -> bool:
        """Whether the watcher ticks, the writer commits and alerts get out."""
        if self.watcher.is_stalled() or self.store.failure:
            return False
        try:
            with self.store.reading() as db:
                return not is_delivery_stuck(db, self.clock.now())
        except sqlite3.Error:
            return False

    def close(self) -> None:
        """Answer what is being asked, send what is being sent, and close the database.

        That Larm was alive is written once it takes no more pings: from then on time stands still.
        """
        self._stopping.set()
        end = time.monotonic() + STOP_WITHIN
        self._server.task_dispatcher.shutdown(cancel_pending=False, timeout=STOP_WITHIN / 2)
        for thread in self._threads:
            if thread.name == "watcher":
                thread.join(1)
        self.watcher.end()
        self.notifier.stop(max(0.0, end - time.monotonic()))
        self.store.close()


# ======================================================================================
# Job wrapper: runs a command as if it stood alone, and reports on it. Needs no package.
# ======================================================================================

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
TRY_WITHIN = 10  # seconds that Larm has to answer a ping
TRY_AGAIN_AFTER = (1, 5)  # seconds; a Retry-After counts instead, up to LONGEST_PAUSE
LONGEST_PAUSE = 10
REPORT_WITHIN = 75  # seconds after the job's end; three tries of two pings that all hang take 72
HURRY = 2  # seconds left for reporting once a signal says that run shall end, too
SILENCE = 1  # second without output, after the job's end, in which its children are given up
CHATTER = 5  # seconds after the job's end in which they are given up even if they print on
CHUNK = 65_536  # bytes read at a time: what a pipe holds


class Unreported(Exception):
    """Why Larm could not be told; shows neither URL nor token (law 9)."""


def say(text: str) -> None:
    """A line on stderr, which may be closed or on a full disk."""
    with contextlib.suppress(OSError):
        os.write(2, f"larm.py run: {text}\n".encode(errors="replace"))


def ping(url: str, body: bytes) -> str | None:
    """Post to a ping URL, three times if need be; why it failed, or None if it arrived."""
    import http.client
    import urllib.error
    import urllib.request

    opener = urllib.request.OpenerDirector()  # without redirects, which would lose the body
    opener.add_handler(urllib.request.ProxyHandler())
    if url.lower().startswith("https:"):  # otherwise not, for it loads all the certificates
        opener.add_handler(urllib.request.HTTPSHandler())
    opener.add_handler(urllib.request.HTTPHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    headers = {"User-Agent": f"larm.py run/{__version__}", "Content-Type": "text/plain"}
    reason = ""
    for pause in (*TRY_AGAIN_AFTER, 0):
        try:
            opener.open(urllib.request.Request(url, body, headers), timeout=TRY_WITHIN).close()
            return None
        except urllib.error.HTTPError as error:
            reason = f"HTTP status {error.code}"
            retry_after = error.headers.get("Retry-After", "")
            if pause and retry_after.isdecimal():
                pause = min(int(retry_after), LONGEST_PAUSE)
            error.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                reason = f"no answer within {TRY_WITHIN} s"
            else:  # only strerror is sure not to show the URL
                reason = getattr(cause, "strerror", None) or type(error).__name__
        time.sleep(pause)
    return reason


class Reporter:
    """Tells Larm of a job's start and end, in this order, from a thread of its own, so that the job
    waits for nothing: `find_url` (which may raise Unreported) is called there, too.
    """

    def __init__(self, find_url: Callable[[], str]) -> None:
        self.finished = threading.Event()
        self.complaint: str | None = "not reported: Larm has not answered in time"
        self._find_url = find_url
        self._ended: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._report, name="reporter", daemon=True).start()

    def end(self, status: int, output: bytes) -> None:
        """Report the job's end, and return when that is done or REPORT_WITHIN is over."""
        self._ended.put((status, output))
        self.finished.wait(REPORT_WITHIN)

    def _report(self) -> None:
        try:
            url, rid = self._find_url(), secrets.token_hex(8)
            reasons = {"start": ping(f"{url}/start?rid={rid}", b"")}
            status, output = self._ended.get()
            reasons["end"] = ping(f"{url}/{status}?rid={rid}", output)
            missed = [name for name, reason in reasons.items() if reason]
            last = reasons["end"] or reasons["start"]
            self.complaint = f"{' and '.join(missed)} not reported: {last}" if missed else None
        except Unreported as error:
            self.complaint = f"not reported: {error}"
        except Exception as error:  # whatever it is, the job's result is the job's
            self.complaint = f"not reported: {type(error).__name__}"
        self.finished.set()


@dataclass
class Tap:
    """An output stream on its way through: the job writes to `theirs`, we read from `ours`."""

    sinks: list[int]  # 1, 2 or both
    ours: int
    theirs: int
    terminal: bool


def open_taps() -> list[Tap]:
    """One for stdout and one for stderr; one for both where they are the same file, so that what
    is written to it keeps its order.

    A terminal is replaced by another one, of the same size and settings, so that a job shows its
    progress as ever. The bytes pass the new one unchanged; the old one does what terminals do.
    """
    taps: dict[tuple[int, int], Tap] = {}
    for sink in (1, 2):
        info = os.fstat(sink)
        file = (info.st_dev, info.st_ino or -sink)  # macOS numbers no pipe: 0 tells nothing
        if file in taps:
            taps[file].sinks.append(sink)
            continue
        if os.isatty(sink):
            with contextlib.suppress(OSError, termios.error):  # no pty left: it gets a pipe
                ours, theirs = os.openpty()
                attributes = termios.tcgetattr(sink)
                attributes[1] &= ~termios.OPOST  # "\n" becomes "\r\n" once, not twice
                termios.tcsetattr(theirs, termios.TCSANOW, attributes)
                termios.tcsetwinsize(theirs, termios.tcgetwinsize(sink))
                taps[file] = Tap([sink], ours, theirs, True)
                continue
        taps[file] = Tap([sink], *os.pipe(), False)
    return list(taps.values())


def spawn(command: list[str], taps: Sequence[Tap], mask: Iterable[int]) -> int:
    """Start a command with its output going to the taps; its process id. Raises OSError.

    Everything else is as if it were started without us: stdin, other open files, process group
    and terminal, signals. LARM_URL is ours, and a secret: the job's environment does not have it.
    """
    environ = {name: value for name, value in os.environ.items() if name != "LARM_URL"}
    streams = [(os.POSIX_SPAWN_DUP2, tap.theirs, sink) for tap in taps for sink in tap.sinks]
    try:
        return os.posix_spawnp(
            command[0], command, environ, file_actions=streams, setsigmask=mask,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
        )
    except OSError as error:
        import shutil

        path = shutil.which(command[0])
        if error.errno != errno.ENOEXEC or path is None:
            raise
        return spawn(["/bin/sh", path, *command[1:]], taps, mask)  # no #!: as a shell does it


class Job:
    """A command that runs, or could not be started."""

    def __init__(self, command: list[str], mask: Iterable[int]) -> None:
        self.status = 0
        self.output = bytearray()  # the last of it; at least BODY_KEPT bytes if there are
        self._lost: OSError | None = None  # why output could not be passed on
        self._taps = open_taps()
        self._sources = {tap.ours: tap for tap in self._taps}
        self._pid: int | None = None
        try:
            self._pid = spawn(command, self._taps, mask)
        except OSError as error:
            self.status = 127 if error.errno == errno.ENOENT else 126
            self._say(f"{command[0]}: {error.strerror}")

    def _say(self, text: str) -> None:
        say(text)
        self.output += f"larm.py run: {text}\n".encode(errors="replace")

    def follow(self) -> None:
        """Pass on what the job prints, to its end."""
        if self._pid is None:
            return
        ended, ending = os.pipe()
        copying = threading.Thread(target=self._copy, args=(ended,), name="copying", daemon=True)
        copying.start()
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._pid = None
        self.status = code if code >= 0 else 128 - code
        os.close(ending)
        # A reader may take its time, but where the job was killed, its exit must not wait for it.
        copying.join(CHATTER + HURRY if code < 0 else None)
        if self._lost:
            self._say(f"the job's output could not be written: {self._lost.strerror}")
            self.status = self.status or 1

    def _copy(self, ended: int) -> None:
        while True:
            ready = select.select([*self._sources, ended], [], [])[0]
            if ended in ready:
                break
            self._pass_on(ready)
        for tap in self._taps:  # not before: macOS forgets what a closed terminal has not read
            os.close(tap.theirs)
        self._drain()

    def _drain(self) -> None:
        """Pass on what was under way when the job ended, and for a short time what its children
        print, which may run on for as long as they like.
        """
        owed = 0
        for source in self._sources:
            with contextlib.suppress(OSError):
                readable = fcntl.ioctl(source, termios.FIONREAD, bytes(4))
                owed += int.from_bytes(readable, sys.byteorder)
        end = time.monotonic() + CHATTER
        while self._sources and (owed > 0 or time.monotonic() < end):
            ready = select.select([*self._sources], [], [], SILENCE)[0]
            if not ready:
                break
            owed -= self._pass_on(ready)

    def _pass_on(self, ready: Iterable[int]) -> int:
        """The number of bytes passed on."""
        count = 0
        for source in ready:
            tap = self._sources[source]
            try:
                data = os.read(source, CHUNK)
            except OSError:  # Linux's way to say that nobody has the other end any more
                data = b""
            count += len(data)
            self.output += data
            if len(self.output) > BODY_KEPT + CHUNK:
                del self.output[:-BODY_KEPT]
            try:
                write_all(tap.sinks[0], data)
            except OSError as error:
                data = b""  # the job's next write must fail as it would without us
                # A reader that has had enough and a terminal that was closed are no failures;
                # output that is not in its file although the job believes it to be is one.
                if error.errno != errno.EPIPE and not tap.terminal:
                    self._lost = error
            if not data:
                os.close(source)
                del self._sources[source]
        return count

    def send_signal(self, number: int) -> bool:
        """Whether the job was still there."""
        if (pid := self._pid) is None:
            return False
        with contextlib.suppress(OSError):  # it ended a moment ago, or has become another user's
            os.kill(pid, number)
        return True

    def resize(self) -> None:
        """Give the job's terminal our terminal's new size."""
        with contextlib.suppress(OSError, termios.error):
            for tap in self._taps:
                size = termios.tcgetwinsize(tap.sinks[0]) if tap.terminal else None
                if size and size != termios.tcgetwinsize(tap.ours):
                    termios.tcsetwinsize(tap.ours, size)
                    os.kill(0, signal.SIGWINCH)  # the job had its own before the size was there


def write_all(sink: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(sink, rest) :]
        except BlockingIOError:  # whoever started us shares a stream that does not block
            select.select([], [sink], [])


def next_signal(waited: Iterable[int]) -> tuple[int, bool]:
    """The next signal, and whether it is a key's, such as Ctrl-C: the job has had those, too."""
    if hasattr(signal, "sigwaitinfo"):
        info = signal.sigwaitinfo(waited)
        number, typed = info.si_signo, info.si_code > 0  # sent by the kernel, not by a process
    else:  # macOS does not say who sent it
        number = signal.sigwait(waited)
        typed = os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    return number, typed and number in (signal.SIGINT, signal.SIGQUIT)


def pass_signals(job: Job, reporter: Reporter, waited: Iterable[int]) -> NoReturn:
    """Pass signals on to the job; after its end one means that run shall end soon, too."""
    while True:
        number, typed = next_signal(waited)
        if number == signal.SIGWINCH:
            job.resize()
        elif not job.send_signal(0 if typed else number) and not reporter.finished.wait(HURRY):
            say(f"{reporter.complaint}")
            os._exit(job.status)  # whatever it is that takes so long


def run_job(command: list[str], find_url: Callable[[], str]) -> int:
    """Run a command as if it stood alone, tell Larm of its start and end; its exit status.

    A command that can't be started is a failure with status 127 (not found) or 126. Where output
    could not be passed on (a full disk), a status of 0 becomes 1: the job does not know. Larm
    delays the exit by at most REPORT_WITHIN, a signal meanwhile shortens that to HURRY.
    A child that outlives the job delays it by SILENCE or CHATTER; it loses its output's reader.
    """
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:  # it is closed, and what is opened next would take its place
            os.open(os.devnull, os.O_RDWR)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how the job ended
    signal.signal(signal.SIGWINCH, lambda *_: None)  # macOS drops it otherwise
    heeded = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    waited = {*heeded, signal.SIGWINCH}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited)  # a thread waits for them
    job = Job(command, mask)
    reporter = Reporter(find_url)
    threading.Thread(
        target=pass_signals, args=(job, reporter, waited), name="signals", daemon=True
    ).start()
    job.follow()
    reporter.end(job.status, bytes(job.output[-BODY_KEPT:]))
    if reporter.complaint:
        say(reporter.complaint)
    return job.status


# ======================================================================================
# Command line: thin verbs.
# ======================================================================================

STARTER = """\
# Larm's settings. larm.toml.example names every one of them.

[monitors.my-first-job]
interval = "1d"      # how often the job runs: "90s", "15m", "1h30m", "1d", "1w"
grace    = "1h"      # how late it may be

# [channels]         # who is alerted: https://github.com/caronc/apprise/wiki
# phone = "ntfys://ntfy.sh/choose-a-secret-topic"
"""

DONE, BAD_NEWS, UNUSABLE = 0, 1, 2  # exit codes


class UserError(Exception):
    """What to tell the user on stderr, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"larm.py: {message}; see larm.py --help", UNUSABLE)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    config = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    config.add_argument("-c", "--config", metavar="FILE", type=Path,
                        help="the configuration (default: ./larm.toml)")
    parser: argparse.ArgumentParser = Arguments(
        prog="larm.py",
        parents=[config],
        description="Larm tells you when a job did not run.",
        epilog="Without -c and without a ./larm.toml, Larm writes a starter and runs it.",
    )
    parser.add_argument("--version", action="version", version=f"Larm {__version__}")
    parser.set_defaults(verb=serve)
    verbs = parser.add_subparsers(metavar="VERB")

    def verb(run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(run.__name__, help=text, description=text, parents=[config])
        added.set_defaults(verb=run)
        return added

    verb(serve, "run Larm (the default)")
    verb(check, "read the configuration; print each mistake, or a summary")
    added = verb(status, "show the monitors and their states")
    added.add_argument("keys", metavar="KEY", nargs="*", help="only these monitors")
    added.add_argument("--json", action="store_true", help="print JSON")
    added = verb(pause, "stop watching a monitor, for a time or until resumed")
    added.add_argument("key", metavar="KEY")
    added.add_argument("duration", metavar="DURATION", nargs="?", help='such as "2h"')
    added = verb(resume, "watch a paused monitor again")
    added.add_argument("key", metavar="KEY")
    added = verb(run, "run a job and report on it: its start, its exit status, its last output")
    added.usage = "larm.py run [-c FILE] [--url URL | KEY] [--] COMMAND [ARG...]"
    added.epilog = split_words.__doc__
    added.add_argument("--url", help="the ping URL; or set LARM_URL, which ps does not show")
    added.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    added = verb(test, "send a test alert")
    added.add_argument("channels", metavar="CHANNEL", nargs="*", help="only these channels")
    return parser.parse_args(argv)


class Unset(dict[str, str]):
    """An environment in which no variable is missing, for verbs that need none of the secrets."""

    def __missing__(self, name: str) -> str:
        return f"{name}-is-not-set-here"


def read_config(arguments: argparse.Namespace, accepts: Accepts | None = None) -> Config:
    """The configuration; `accepts`: only where the channels are used. Raises UserError."""
    path: Path = getattr(arguments, "config", Path("larm.toml"))
    try:
        return load(path.absolute(), os.environ if accepts else Unset(os.environ), accepts)
    except ConfigError as error:
        raise UserError(str(error), UNUSABLE if error.missing else BAD_NEWS) from None


def serve(arguments: argparse.Namespace) -> int:
    """Run Larm until it is told to stop."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    if not hasattr(arguments, "config") and not Path("larm.toml").exists():
        try:
            Path("larm.toml").write_text(STARTER)
        except OSError as error:
            raise UserError(f"larm.toml: can't be written: {error.strerror}", BAD_NEWS) from None
        log.info("wrote larm.toml with a first monitor: edit it; what you save is applied")
    config = read_config(arguments, accepts)
    try:
        larm = Larm(config, Clock())
    except StoreError as error:
        raise UserError(str(error), BAD_NEWS) from None
    try:
        larm.listen()
        larm.begin()
    except Unrecordable as error:
        raise UserError(f"{config.database}: can't be written: {error}", BAD_NEWS) from None
    except (OSError, ValueError) as error:  # Waitress raises ValueError for an unknown name
        larm.store.close()
        reason = error.strerror if isinstance(error, OSError) else "no such address here"
        raise UserError(
            f"{config.path}: listen: {config.host or '*'}:{config.port} can't be used: {reason}; "
            "stop what uses it, or set another address or port",
            BAD_NEWS,
        ) from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(larm, "stop_asked", True))
    signal.signal(signal.SIGHUP, lambda *_: setattr(larm, "reload_asked", True))
    announce(larm)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), (
        contextlib.redirect_stderr(nowhere)  # a plugin of Apprise's may print; the log has its own
    ):
        reason = larm.run()
        larm.close()
    if reason:
        log.error("Larm ends: %s", reason)
    else:
        log.info("Larm has stopped")
    logging.shutdown()
    os._exit(BAD_NEWS if reason else DONE)  # a sender that hangs must not hold the exit


def announce(larm: Larm) -> None:
    """Say what runs; on a terminal also how to ping what was never pinged (law 9)."""
    config = larm.config
    log.info("Larm %s, configuration %s, database %s", __version__, config.path, config.database)
    log.info("dashboard %s/ (%s, %s)", config.url,
             counted(len(config.monitors), "monitor"), counted(len(config.channels), "channel"))
    if larm.clock.now() < SANE:
        log.warning("the clock says %s: nobody is alerted until it is set",
                    iso_local(larm.clock.now(), config.timezone))
    warn_of(config)
    if sys.stderr.isatty():
        with larm.store.reading() as db:
            monitors = describe_monitors(db, config, larm.clock.now())
        for monitor in monitors:
            if monitor["state"] == "pending":
                print(f"{monitor['name']} has never been pinged. Add to its job:\n"
                      f"  {ping_command(monitor['ping_url'])}", file=sys.stderr)


def check(arguments: argparse.Namespace) -> int:
    """Read the configuration and say what is in it."""
    config = read_config(arguments, accepts)
    print(f"{config.path}: fine: {counted(len(config.monitors), 'monitor')}, "
          f"{counted(len(config.channels), 'channel')}, dashboard {config.url}/")
    warn_of(config)
    return DONE


def status(arguments: argparse.Namespace) -> int:
    """Show the monitors, from the database, whether or not Larm runs."""
    config = read_config(arguments)
    keys = [require_monitor(config, key).key for key in arguments.keys] or None
    clock = Clock()
    try:
        with contextlib.ExitStack() as stack:
            db = None
            if config.database.exists():
                db = stack.enter_context(contextlib.closing(connect(config.database, True)))
                schema_version(db)
            chosen = describe_monitors(db, config, clock.now(), keys)
            rows = read_monitors(db) if db else {}
            channels = read_channels(db) if db else {}
            seen = {
                key: recent_heartbeats(db, rows[key]["id"], BODIES_KEPT)
                for key in keys or () if db and key in rows
            }
    except (sqlite3.Error, ValueError) as error:
        raise UserError(f"{config.database}: can't be read: {error}", BAD_NEWS) from None
    if arguments.json:
        print(json.dumps({"data": chosen}, indent=2))
        return DONE
    moment = functools.partial(_moment, zone=config.timezone, now=clock.now())
    lines = [("MONITOR", "STATE", "SINCE", "LAST HEARTBEAT", "NEXT DUE", "PING URL")]
    for one in chosen:
        times = [moment(one[name]) for name in ("since", "last_heartbeat_at", "expected_at")]
        url = one["ping_url"] or "(made when Larm first runs)"
        lines.append((one["id"], one["state"], times[0], times[1], times[2], url))
    print_table(lines)
    for monitor in (config.monitors[one["id"]] for one in chosen):
        if moments := upcoming(monitor, config.timezone, clock.now()):
            print(f"{monitor.key}: {describe_rhythm(monitor)}; next {', '.join(moments)}")
        for line in rhythm(monitor, seen.get(monitor.key, ())).lines():
            print(f"{monitor.key}: {line}")
    for name in config.channels if not keys else ():
        said = describe_channel(channels.get(name), config.timezone, clock.now())
        print(f"channel {name}: {said}")
    return DONE


def pause(arguments: argparse.Namespace) -> int:
    """Stop watching a monitor, whether or not Larm runs."""
    try:
        span = None if arguments.duration is None else pause_length(arguments.duration)
    except ValueError as error:
        raise UserError(f"larm.py: {error}", UNUSABLE) from None
    return change_watching(arguments, "pause", span)


def resume(arguments: argparse.Namespace) -> int:
    """Watch a paused monitor again, whether or not Larm runs."""
    return change_watching(arguments, "resume", None)


def change_watching(arguments: argparse.Namespace, verb: str, span: int | None) -> int:
    config = read_config(arguments)
    monitor = require_monitor(config, arguments.key)
    try:
        if not config.database.exists():
            raise ValueError("Larm has not run with it yet: start Larm once")
        with contextlib.closing(connect(config.database, readonly=False)) as db:
            schema_version(db)
            db.execute("BEGIN IMMEDIATE")
            pause_or_resume(db, monitor, verb, span, Clock().now())
            db.execute("COMMIT")
    except (sqlite3.Error, ValueError) as error:
        what = config.path if isinstance(error, ValueError) else config.database
        raise UserError(f"{what}: {error}", BAD_NEWS) from None
    until = f" for {format_duration(span)}" if span else ""
    print(f"{monitor.key}: paused{until}" if verb == "pause" else f"{monitor.key}: watched")
    return DONE


def run(arguments: argparse.Namespace) -> int:
    """Run a job and report on it; the exit code is the job's own.

    A mistake in what to report to is said, and does not keep the job from running.
    """
    key, command = split_words(arguments.words, arguments.url is not None)
    if not command:
        raise UserError("larm.py run: no COMMAND to run; see larm.py run --help", UNUSABLE)
    return run_job(command, lambda: find_ping_url(arguments, key))


def split_words(words: list[str], has_url: bool) -> tuple[str | None, list[str]]:
    """With --url, all that follows is the command. Otherwise "KEY -- COMMAND" and "-- COMMAND" say
    what is what. Without the "--", all is the command where LARM_URL is set; where it is not, the
    first word is KEY, a monitor of larm.toml (the one here, or else the one beside larm.py).
    """
    if words[:1] == ["--"]:
        return None, words[1:]
    if has_url:
        return None, words
    if words[1:2] == ["--"]:
        return words[0], words[2:]
    # What can't be a key is a command whose LARM_URL got lost: it must run all the same.
    if os.environ.get("LARM_URL") or not (words and _KEY.fullmatch(words[0])):
        return None, words
    return words[0], words[1:]


def find_ping_url(arguments: argparse.Namespace, key: str | None) -> str:
    """Raises Unreported."""
    if key is None:
        name, url = "--url", arguments.url
        if url is None:
            name, url = "LARM_URL", os.environ.get("LARM_URL")
        if not url and name == "LARM_URL":
            raise Unreported("name a monitor, larm.py run KEY -- COMMAND, or set LARM_URL")
        shape = r"(https?://[^\s/?#@]+(?:/[!-~]*?)?)/*([?#].*)?"
        if not (found := re.fullmatch(shape, url.strip(), re.IGNORECASE)):
            raise Unreported(f"{name}: must look like http://nas.lan:5276/api/heartbeat/TOKEN")
        return found[1]
    here = Path("larm.toml")
    beside = Path(__file__).with_name("larm.toml")  # cron starts at home
    path: Path = getattr(arguments, "config", here if here.exists() else beside)
    try:
        address = load_address(path.absolute(), key, os.environ)
        if address.token:
            return heartbeat_url(address.url, address.token)
        if not address.database.exists():
            raise Unreported(f"{address.database}: no such file; start Larm once")
        with contextlib.closing(connect(address.database, readonly=True)) as db:
            schema_version(db)
            row = read_monitors(db).get(key)
    except ConfigError as error:
        raise Unreported("; ".join(error.mistakes)) from None
    except (OSError, sqlite3.Error, ValueError) as error:
        raise Unreported(f"{path}: its database can't be read: {error}") from None
    if row is None:
        raise Unreported(f"{path}: monitors.{key} has no token yet; start Larm once")
    return heartbeat_url(address.url, row["made_token"])


def require_monitor(config: Config, key: str) -> Monitor:
    if key not in config.monitors:
        hint = nearest(key, config.monitors)
        raise UserError(f"{config.path}: no monitor {show(key)}{hint}", UNUSABLE)
    return config.monitors[key]


def print_table(lines: Sequence[tuple[str, ...]]) -> None:
    """Columns in line; on a terminal the second one, the state, in colour."""
    colours = {"up": 32, "down": 31, "late": 33, "pending": 36, "paused": 36}
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        if coloured and line[1] in colours:
            cells[1] = f"\033[{colours[line[1]]}m{cells[1]}\033[0m"
        print("  ".join(cells).rstrip())


def test(arguments: argparse.Namespace) -> int:
    """Send a test alert to each channel."""
    config = read_config(arguments, accepts)
    for name in arguments.channels:
        if name not in config.channels:
            hint = nearest(name, config.channels)
            raise UserError(f"{config.path}: no channel {show(name)}{hint}", UNUSABLE)
    chosen = arguments.channels or list(config.channels)
    if not chosen:
        raise UserError(f"{config.path}: no channels: add one under [channels]", UNUSABLE)
    failed = 0
    for name in dict.fromkeys(chosen):
        with contextlib.redirect_stdout(io.StringIO()):  # a plugin may print, secrets too
            error = send_test(config, name)
        failed += error is not None
        print(f"{name}: {'sent' if error is None else f'not sent: {error}'}")
    return BAD_NEWS if failed else DONE


class OneLine(logging.Formatter):
    """A record is a line, and an exception its name and message: no traceback in the log."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage() + (f": {type(error).__name__}: {error}" if error else "")
        return f"{self.formatTime(record)} {record.levelname} {' '.join(text.split())}"


def main(argv: Sequence[str]) -> int:
    """Run a verb; every error is a line on stderr and an exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.getLogger().addHandler(logging.NullHandler())  # libraries may log secrets (law 9)
    threading.excepthook = lambda failed: log.error(
        "a thread failed", exc_info=failed.exc_value or failed.exc_type()
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no dash still gets its table
    try:
        arguments = parse_arguments(argv)
        code: int = arguments.verb(arguments)
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"larm.py needs the package {error.name}: pip install bottle waitress apprise, or "
              "run it with the Python that has them, such as .venv/bin/python", file=sys.stderr)
        return BAD_NEWS
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has had enough
            return DONE
        print(f"larm.py: {error.strerror}", file=sys.stderr)
        return BAD_NEWS
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        print(f"larm.py failed: {type(error).__name__}: {error}; please report it", file=sys.stderr)
        return BAD_NEWS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
