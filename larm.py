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

import contextlib
import os
import re
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this must parse on 3.8, and be above the imports

    def job_in(words: list[str]) -> list[str]:
        """The COMMAND of `[-c FILE] run [--url URL | KEY] [--] COMMAND`; [] of any other verb."""
        beside, verb = os.path.join(os.path.dirname(os.path.abspath(__file__)), "larm.toml"), ""
        file, url = "larm.toml" if os.path.exists("larm.toml") else beside, ""
        while words and words[0] != "--" and (not verb or words[0].startswith("-")):
            name, joined, value = words.pop(0).partition("=")
            if name in ("-c", "--config", "--url") and (joined or words):
                value = value if joined else words.pop(0)
                url, file = (value, file) if name == "--url" else (url, value)
            elif not name.startswith("-"):
                verb = name
        if verb != "run":
            return []
        if "--" in words[: 1 if url else 2]:
            return words[words.index("--") + 1 :]
        text = ""
        with contextlib.suppress(OSError), open(file, encoding="utf-8", errors="replace") as opened:
            text = re.sub("[ \t\"']", "", opened.read())  # no tomllib here: a heading must do
        is_key = words and f"[monitors.{words[0]}]" in text
        return words[1:] if is_key and not (url or os.environ.get("LARM_URL")) else words

    job = job_in(sys.argv[1:])
    found = "larm.py needs Python 3.11 or newer, and this is {}.{}.{}".format(*sys.version_info)
    unwatched = "; the job runs, but Larm hears nothing of it" if job else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{found}{unwatched}\n".encode())
    if not job:
        sys.exit(2)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a job must not
        signal.signal(number, signal.SIG_DFL)
    os.execv("/bin/sh", ["/bin/sh", "-c", 'exec "$0" "$@"', *job])  # says why it can't, too

import argparse
import base64
import bisect
import codecs
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import hmac
import http.client
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import queue
import random
import resource
import secrets
import select
import socket
import sqlite3
import struct
import tempfile
import termios
import threading
import time
import tomllib
import urllib.error
import urllib.request
import zoneinfo
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import parse_qs, quote, quote_plus, unquote, urlsplit

__version__ = "0.1.0"

log = logging.getLogger("larm")
T = TypeVar("T")


def show(value: object) -> str:
    """A value as a message may show it: short, on one line, and never a URL (law 9)."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a table"
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        text = json.dumps(value)
    return "a URL" if "://" in text else text if len(text) <= 70 else text[:66] + " ..."


# ======================================================================================
# Time: durations, the clock and schedules. Only this room asks what time it is.
# ======================================================================================

SECOND = 1_000  # every duration and every moment in Larm is a whole number of milliseconds
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

LONGEST = 366 * DAY  # of an interval
SANE = 1_577_836_800_000  # 2020-01-01: a clock before it has not been set since the machine started

_DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?)\s*{unit}\s*)?" for unit in "wdhms"))


def parse_duration(value: object) -> int:
    """Milliseconds of a duration as people write it: 90, 1.5, "90s", "1h30m", "2d", "1w".

    Raises ValueError with a message that says what is allowed.
    """
    parts: list[float] = []
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        units = zip(match.groups(), (7 * DAY, DAY, HOUR, MINUTE, SECOND), strict=True)
        parts = [float(amount) * unit for amount, unit in units if amount]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        parts = [value * SECOND]
    with contextlib.suppress(OverflowError, ValueError):  # infinite, or not a number
        if parts:
            return round(sum(parts))
    forms = 'seconds as a number, or "90s" "15m" "1h30m" "2d" "1w"'
    raise ValueError(f"{show(value)} is not a duration: write {forms}")


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
    return f"{datetime.fromtimestamp(ms // SECOND, UTC):%Y-%m-%dT%H:%M:%S}.{ms % SECOND:03}Z"


def iso_local(ms: int, zone: tzinfo) -> str:
    """A moment for people: "2026-11-22 03:00:12+01:00"."""
    return datetime.fromtimestamp(ms // SECOND, zone).isoformat(" ", "seconds")


def parse_zone(name: object) -> tzinfo:
    """The timezone of a name such as "Europe/Stockholm"; raises ValueError with what to do."""
    if name in ("UTC", "Etc/UTC"):  # needs no tzdata
        return UTC
    if isinstance(name, str):
        with contextlib.suppress(OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
            return zoneinfo.ZoneInfo(name)
    zones = zoneinfo.available_timezones()
    if not zones:
        raise ValueError("no time zones are installed here: install tzdata (apt-get or pip)")
    near = difflib.get_close_matches(str(name)[:64], zones, 1, 0.6)
    hint = f"; did you mean {near[0]}?" if near else ', such as "Europe/Stockholm" or "UTC"'
    raise ValueError(f"{show(name)} is not a time zone{hint}")


@functools.cache  # so that a schedule that is read again equals itself
def system_zone() -> tuple[tzinfo, str | None]:
    """The timezone that libc uses (tzset(3)): a name, a file, or a rule such as
    "CET-1CEST,M3.5.0,M10.5.0/3". Where it can't be had, UTC, and a clause that says so.
    """
    path = "/etc/localtime"
    linked = os.path.realpath(path).partition("/zoneinfo/")[2]  # the link leads on without tzdata
    name = os.environ.get("TZ", linked or (path if os.path.exists(path) else ""))
    name = name.removeprefix(":") or "UTC"
    try:
        return parse_zone(name), None
    except ValueError as error:
        trouble = f"times are in UTC and not by TZ or {path}: {error}"
    # A timezone file (RFC 8536) without a transition, whose footer is the rule.
    half = b"TZif2" + bytes(15) + struct.pack(">6LlBB4s", 0, 0, 0, 0, 1, 4, 0, 0, 0, b"UTC")
    with contextlib.suppress(OSError, ValueError):
        file = Path(name).read_bytes() if name[0] == "/" else half + half + f"\n{name}\n".encode()
        return zoneinfo.ZoneInfo.from_file(io.BytesIO(file), name), None
    return UTC, trouble


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
        return self.at(self.monotonic())

    def at(self, monotonic: int) -> int:
        """What now() is, by the last resync(), when monotonic() is that."""
        return self.offset + monotonic

    def monotonic(self) -> int:
        """Milliseconds since some start; never set, and standing still while suspended."""
        return self._monotonic() // 1_000_000

    def drift(self) -> int:
        """By how many milliseconds the wall clock has left now() since the last resync()."""
        return self._wall() // 1_000_000 - self.now()

    def resync(self) -> None:
        """Take over the wall clock as it stands."""
        self.offset = self._wall() // 1_000_000 - self.monotonic()


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a job is due: a cron expression of five fields in a timezone, computed by cronsim.

    Without cronsim ImportError is raised, and for a bad expression cronsim's own error.
    """

    expression: str
    zone: tzinfo
    zone_name: str | None = None

    def next_after(self, moment: int, count: int = 1) -> list[int]:
        """The next `count` occurrences after a moment."""
        from cronsim import CronSim

        start = datetime.fromtimestamp(moment / SECOND, self.zone)
        times = (round(found.timestamp() * SECOND) for found in CronSim(self.expression, start))
        # in the hour that comes twice, cronsim may name its first pass, which is over
        return list(itertools.islice((time for time in times if time > moment), count))

    @property
    def in_words(self) -> str:
        """ "At 03:00 every day" """
        from cronsim import CronSim

        return CronSim(self.expression, datetime(2020, 1, 1, tzinfo=UTC)).explain()

    @property
    def shortest_gap(self) -> int:
        """Milliseconds between its closest occurrences, but for what summer time takes or gives."""
        return self._shortest_gap(self.expression)

    @staticmethod
    @functools.lru_cache(maxsize=16_384)  # a reload computes nothing again
    def _shortest_gap(expression: str) -> int:
        from cronsim import CronSim

        parsed = CronSim(expression, datetime(2020, 1, 1, tzinfo=UTC))
        hours = [HOUR * hour for hour in sorted(parsed.hours)]
        times = [hour + MINUTE * minute for hour in hours for minute in sorted(parsed.minutes)]
        midnight = Schedule(" ".join(["0 0", *expression.split()[2:]]), UTC)
        days = itertools.pairwise(midnight.next_after(SANE, 32))
        times.append(times[0] + min(later - earlier for earlier, later in days))  # the next day's
        return min(later - earlier for earlier, later in itertools.pairwise(times))


# ======================================================================================
# Config: larm.toml as frozen dataclasses. A Config that exists is valid.
# ======================================================================================


@dataclass(frozen=True, slots=True)
class Monitor:
    """What is expected of one job. Durations are milliseconds."""

    key: str
    name: str
    interval: int  # of a schedule: the shortest gap between its occurrences
    schedule: Schedule | None
    grace: int
    token: str | None = field(repr=False)
    notify: tuple[str, ...]
    remind: int | None
    max_runtime: int | None
    depends_on: tuple[str, ...]
    enabled: bool
    note: str
    # (from, to) after midnight in the configuration's timezone; from > to: over midnight
    quiet: tuple[tuple[int, int], ...]

    @property
    def window(self) -> int:
        """At most one success is stored within so many milliseconds (law 2)."""
        return -(-self.interval // 10)

    def expectation(self, received_at: int) -> int:
        """When the next ping is expected after one received at that moment; its deadline is a
        grace later.

        A scheduled job's ping may come early by the smaller of the grace and a tenth of the gap; it
        then counts for the occurrence that it precedes (design.md, "Time").
        """
        if self.schedule is None:
            return received_at + self.interval
        early = min(self.grace, self.interval // 10)
        return self.schedule.next_after(received_at + early)[0]


def ancestors(monitors: Mapping[str, Monitor], key: str) -> set[str]:
    """The keys of all that a monitor depends on, directly or not."""
    found: set[str] = set()
    waiting = list(monitors[key].depends_on)
    while waiting:
        if (parent := waiting.pop()) not in found:
            found.add(parent)
            waiting += monitors[parent].depends_on
    return found


@dataclass(frozen=True, slots=True)
class Watchdog:
    """Another watcher that Larm itself pings."""

    ping: str = field(repr=False)
    interval: int


@dataclass(frozen=True, slots=True)
class Config:
    """A valid larm.toml."""

    path: Path
    listen: tuple[str, int]  # host and port; "" = all addresses
    url: str  # without a slash at the end
    database: Path
    timezone: tzinfo
    keep: int
    password: str | None = field(repr=False)
    public: bool
    embed: tuple[str, ...]
    proxies: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
    channels: Mapping[str, tuple[str, ...]] = field(repr=False)  # Apprise URLs by channel name
    monitors: Mapping[str, Monitor]
    watchdog: Watchdog | None
    zone_trouble: str | None  # why the timezone is UTC where it should be another

    @property
    def prefix(self) -> str:
        """The path under which a reverse proxy shows Larm, "" or "/larm"."""
        return urlsplit(self.url).path

    def ping_url(self, token: str) -> str:
        return f"{self.url}/api/heartbeat/{token}"


@dataclass(frozen=True, slots=True)
class Address:
    """What a job needs to know of a larm.toml in order to ping."""

    url: str
    database: Path
    token: str | None = field(repr=False)  # None: it is in the database


class ConfigError(Exception):
    """A larm.toml that can't be used; `mistakes` are all of them, a line each."""

    def __init__(self, path: Path, mistakes: Iterable[str], missing: bool = False) -> None:
        self.mistakes = [f"{path}: {mistake}" for mistake in mistakes]
        self.missing = missing
        super().__init__("\n".join(self.mistakes))


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?", or what there is to choose from."""
    shown = sorted(show(one).strip('"') for one in names)
    if near := difflib.get_close_matches(name, shown, 1, 0.6):
        return f"; did you mean {near[0]}?"
    listed = ", ".join(shown[:12]) or "none yet"
    return f"; there is {listed}{', ...' if len(shown) > 12 else ''}"


# A converter takes what stands in the file and returns what Larm goes by; it raises ValueError
# with a mistake an argument, none of which may show a secret.


def _typed(kind: type, value: object) -> Any:
    if not isinstance(value, kind):
        named = {str: "text in quotes", bool: "true or false", list: "a [list]", dict: "a table"}
        raise ValueError(f"found {show(value)}; it must be {named[kind]}")
    return value


def _parsed(parse: Callable[[str], Any], example: str, value: object) -> Any:
    """What a text means; `parse` raises ValueError where it means nothing."""
    try:
        return parse(_typed(str, value))
    except ValueError:
        raise ValueError(f"found {show(value)}; write {example}") from None


def _list(convert: Callable[[Any], Any], value: object) -> tuple[Any, ...]:
    """What each entry is converted to, each once; raises ValueError with all mistakes."""
    found, mistakes = [], []
    for number, entry in enumerate(_typed(list, value), 1):
        try:
            found.append(convert(entry))
        except ValueError as error:
            mistakes += [f"entry {number}: {message}" for message in error.args]
    if mistakes:
        raise ValueError(*mistakes)
    return tuple(dict.fromkeys(found))


def _one_of(names: Collection[str], what: str, name: object) -> str:
    if _typed(str, name) not in names:
        raise ValueError(f"{show(name)} is not a {what}{nearest(str(name), names)}")
    return str(name)


def _duration(value: object, shortest: int = SECOND, longest: int = LONGEST) -> int:
    ms = parse_duration(value)
    if not shortest <= ms <= longest:
        span = f"{format_duration(shortest) if shortest else 0} to {format_duration(longest)}"
        raise ValueError(f"{show(value)} is out of range: {span} is allowed")
    return ms


def _schedule(value: object) -> Schedule:
    """In UTC as yet: the timezone may stand below it."""
    text: str = _typed(str, value).strip()
    names = {
        "@hourly": "0 * * * *",
        "@daily": "0 0 * * *",
        "@midnight": "0 0 * * *",
        "@weekly": "0 0 * * 0",
        "@monthly": "0 0 1 * *",
        "@yearly": "0 0 1 1 *",
        "@annually": "0 0 1 1 *",
    }
    expression, fields = names.get(text.lower(), text), "minute hour day month weekday"
    if len(expression.split()) != 5:
        hint = nearest(text, names) if text.startswith("@") else ""
        raise ValueError(f'{show(value)} is not a schedule: write five fields, "{fields}"{hint}')
    schedule = Schedule(expression, UTC)
    try:
        _ = schedule.shortest_gap  # which looks at all of it
    except ImportError:
        venv = "python3 -m venv --system-site-packages .venv && .venv/bin/pip install cronsim"
        how = f"pip install cronsim; or, where pip may not, {venv} and .venv/bin/python larm.py"
        raise ValueError(f"needs the package cronsim: {how}") from None
    except Exception as error:  # cronsim's own error class is not importable without it
        raise ValueError(f"{show(value)} is not a schedule: {error} ({fields})") from None
    return schedule


def _hours(text: str) -> tuple[int, int]:
    """Of "22:00-07:00", in milliseconds after midnight; raises ValueError."""
    begin, end = (
        at.tm_hour * HOUR + at.tm_min * MINUTE
        for at in [time.strptime(part.strip(), "%H:%M") for part in text.split("-")]
    )
    if begin == end:
        raise ValueError
    return begin, end


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.port or "/" in text or "@" in text:
        raise ValueError
    host = parts.hostname or ""
    return "" if host in ("*", "0.0.0.0", "::") else host, parts.port


def _url(path: str, text: str) -> str:
    """Without a slash at the end; `path`: the expression that its path must match."""
    host = r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?"
    if not re.fullmatch(rf"https?://{host}{path}", text, re.ASCII):
        raise ValueError
    return text.rstrip("/")


def default_url(host: str, port: int) -> str:
    """The url of a Larm that listens there."""
    name = host or socket.gethostname()
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


Settings = dict[str, tuple[Callable[[Any], Any], Any]]  # name -> (converter, default)


class _Reader:
    """Turns the values of a larm.toml into a Config, collecting its mistakes."""

    def __init__(
        self, path: Path, environ: Mapping[str, str], accepts: Callable[[str], str | None]
    ) -> None:
        self._path = path
        self._environ = environ
        self._accepts = accepts
        self.mistakes: list[str] = []
        table: tuple[Callable[[Any], Any], Any] = (partial(_typed, dict), {})
        listen = '"127.0.0.1:5276", "[::1]:5276", or ":5276" for all addresses'
        url = '"http://nas.lan:5276" or "https://home.example/larm"'
        origin = partial(_parsed, partial(_url, "/?"), '"https://home.lan", without a path')
        network = partial(_parsed, ipaddress.ip_network, '"10.0.0.2" or "10.0.0.0/8"')
        loopback = (ipaddress.ip_network("127.0.0.1"), ipaddress.ip_network("::1"))
        self._top: Settings = {
            "listen": (partial(_parsed, _address, listen), ("127.0.0.1", 5276)),
            "url": (partial(_parsed, partial(_url, r"(/[\w.~/-]*)?"), url), None),
            "database": (partial(_typed, str), "larm.db"),
            "timezone": (parse_zone, None),
            "keep": (partial(_duration, longest=3660 * DAY), 90 * DAY),
            "password": (self._secret, None),
            "public": (partial(_typed, bool), False),
            "embed": (partial(_list, origin), ()),
            "proxies": (partial(_list, network), loopback),
            "channels": table,
            "defaults": table,
            "monitors": table,
            "watchdog": table,
        }

    def config(self, values: dict[str, Any]) -> Config:
        """Raises ConfigError with every mistake."""
        top = self._read("", values, self._top)
        zone, trouble = (top["timezone"], None) if top["timezone"] else system_zone()
        urls: Settings = dict.fromkeys(top["channels"], (self._urls, ()))
        channels = self._read("channels", top["channels"], urls)
        ping = partial(self._fitting, r"https?://[^\s/]+(/\S*)?", "an http:// or https:// URL")
        pinged: Settings = {"ping": (ping, None), "interval": (_duration, MINUTE)}
        watchdog = self._read("watchdog", top["watchdog"], pinged)
        if "watchdog" in values and "ping" not in top["watchdog"]:
            self.mistakes.append("watchdog.ping: is missing: the URL to ping")
        if not top["monitors"]:
            self.mistakes.append('no monitors: add one, such as [monitors.backup] interval = "1d"')
        found = {
            "path": self._path,
            "url": top["url"] or default_url(*top["listen"]),
            "database": self._path.parent / top["database"],
            "timezone": zone,
            "channels": channels,
            "monitors": self._monitors(top, channels, zone),
            "watchdog": Watchdog(**watchdog) if top["watchdog"] else None,
            "zone_trouble": trouble,
        }
        if self.mistakes:
            raise ConfigError(self._path, self.mistakes)
        del top["defaults"]
        return Config(**top | found)

    def _read(self, path: str, table: dict[str, Any], settings: Settings) -> dict[str, Any]:
        """Each setting's converted value; its default where it is not set, or is a mistake."""
        values = {name: default for name, (_, default) in settings.items()}
        for name, value in table.items():
            try:
                if name not in settings:
                    raise ValueError(self._unknown(path, name, value, settings))
                values[name] = settings[name][0](value)
            except ValueError as error:
                setting = f"{path}.{show(name)}".lstrip(".").replace('"', "")
                self.mistakes += [f"{setting}: {message}" for message in error.args]
        return values

    def _unknown(self, path: str, name: str, value: object, settings: Settings) -> str:
        """What is wrong with a setting that there is not."""
        if path and name in self._top:
            return "belongs at the top of the file, above the first [table]"
        hint = nearest(name, settings)
        if isinstance(value, dict) and "did you mean" not in hint:  # [backup], [monitors.a.b]
            key = "-".join([*path.split(".")[1:], show(name).strip('"')])
            hint = f"; a monitor is a table such as [monitors.{key}]"
        return f"no such setting{hint}"

    def _secret(self, value: object, in_url: bool = False) -> str:
        """Text that no message may show, with each ${NAME} from the environment and each
        ${file:PATH} from that file. In a URL what stands for a part of it is percent-encoded, so
        that a password may hold any character.
        """
        if not isinstance(value, str) or not value:
            raise ValueError("it must be text in quotes, and not empty")
        reference = re.compile(r"\$\{(?:file:([^{}\n]+)\}|([A-Za-z_][A-Za-z0-9_]*)\})?")
        encode = in_url and not reference.fullmatch(value)
        mistakes: list[str] = []

        def resolve(match: re.Match[str]) -> str:
            file, name = match.groups()
            found, encoded, wrong = "", "", "is empty"
            try:
                if file:
                    found = (self._path.parent / file).read_text("utf-8").removesuffix("\n")
                elif name:
                    found = self._environ[name]
                else:
                    wrong = "begins neither ${NAME} nor ${file:/run/secrets/name}"
                encoded = quote(found, safe="")
            except KeyError:
                wrong = "is not set in the environment of this process"
            except OSError as error:
                wrong = f"can't be read: {error.strerror}"
            except ValueError:
                wrong = "is not UTF-8 text"
            if not encoded:
                mistakes.append(f"{match[0]} {wrong}")
            return encoded if encode else found

        filled = reference.sub(resolve, value)
        if mistakes:
            raise ValueError(*dict.fromkeys(mistakes))
        return filled

    def _fitting(self, pattern: str, allowed: str, value: object) -> str:
        secret = self._secret(value)
        if not re.fullmatch(pattern, secret):
            raise ValueError(f"found {counted(len(secret), 'character')}; it must be {allowed}")
        return secret

    def _urls(self, value: object) -> tuple[str, ...]:
        """A channel's: one, or a list of them."""

        def url(text: object) -> str:
            filled = self._secret(text, in_url=True)
            if problem := self._accepts(filled):
                raise ValueError(f"{problem} (https://github.com/caronc/apprise/wiki)")
            return filled

        return _list(url, value) if isinstance(value, list) and value else (url(value),)

    def _monitors(
        self, top: dict[str, Any], channels: Collection[str], zone: tzinfo
    ) -> dict[str, Monitor]:
        found = top["monitors"]
        token = partial(self._fitting, "[A-Za-z0-9_-]{10,128}", "10 to 128 of A-Z a-z 0-9 _ -")
        single: Settings = {  # of a monitor, and not of [defaults]
            "name": (partial(_typed, str), ""),
            "interval": (_duration, DAY),  # only to go on: one must be set
            "schedule": (_schedule, None),
            "token": (token, None),
        }
        quiet = partial(_parsed, _hours, '"22:00-07:00"')
        shared: Settings = {
            "timezone": (parse_zone, top["timezone"]),
            "grace": (partial(_duration, shortest=0), None),
            "notify": (partial(_list, partial(_one_of, channels, "channel")), tuple(channels)),
            "remind": (_duration, None),
            "max_runtime": (_duration, None),
            "depends_on": (partial(_list, partial(_one_of, found, "monitor")), ()),
            "enabled": (partial(_typed, bool), True),
            "note": (partial(_typed, str), ""),
            "quiet": (partial(_list, quiet), ()),
        }
        inherited = self._read("defaults", top["defaults"], shared)
        single |= {name: (shared[name][0], value) for name, value in inherited.items()}
        monitors: dict[str, Monitor] = {}
        owners: dict[str, str] = {}  # by token
        for key, own in found.items():
            path = "monitors." + show(key).strip('"')
            if not re.fullmatch("[a-z0-9_-]{1,64}", key):
                self.mistakes.append(f"{path}: a key is 1 to 64 of a-z 0-9 - _")
            elif not isinstance(own, dict):
                self.mistakes.append(f"{path}: found {show(own)}; it must be a table, [{path}]")
            else:
                one = monitors[key] = self._monitor(key, own, self._read(path, own, single), zone)
                if one.token and (owner := owners.setdefault(one.token, key)) != key:
                    mistake = f"is monitors.{owner}.token, too; each monitor needs its own"
                    self.mistakes.append(f"{path}.token: {mistake}")
        for key in monitors if len(monitors) == len(found) else ():  # else a parent may be missing
            if key in ancestors(monitors, key):
                self.mistakes.append(f"monitors.{key}.depends_on: a cycle: it leads back to {key}")
        return monitors

    def _monitor(
        self, key: str, own: dict[str, Any], values: dict[str, Any], zone: tzinfo
    ) -> Monitor:
        """A monitor of its converted settings; `own`: those that stand in its own table."""
        if ("interval" in own) == ("schedule" in own):
            found = "both were found" if "interval" in own else "neither was found"
            mistake = f"set either interval or schedule; {found}"
            self.mistakes.append(f"monitors.{key}.interval: {mistake}")
        schedule, timezone = values["schedule"], values.pop("timezone")
        if schedule:
            values["interval"] = schedule.shortest_gap
            values["schedule"] = Schedule(
                schedule.expression, timezone or zone, timezone and str(timezone)
            )
        if values["grace"] is None:
            values["grace"] = min(values["interval"] // 10, HOUR)
        values["name"] = values["name"] or key
        if "depends_on" not in own:  # everything may depend on the router but itself
            values["depends_on"] = tuple(name for name in values["depends_on"] if name != key)
        return Monitor(key=key, **values)


def _read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file; raises ConfigError."""
    try:
        text = path.read_text("utf-8-sig")
        return tomllib.loads(text)
    except OSError as error:
        reason = f"can't be read: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            reason = "no such file; name one with -c, or run Larm without -c for a starter"
        raise ConfigError(path, [reason], missing=True) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(path, [f"line {line}: is not UTF-8; save it as UTF-8"]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, [_syntax_mistake(str(error), text)]) from None


def _syntax_mistake(reason: str, text: str) -> str:
    """Where a file is no TOML, and what to write instead; without what stands there."""
    place = re.search(r"\(at line (\d+)", reason)
    end = text.rindex("'") if 'Expected "\'"' in reason else len(text.rstrip())
    number = int(place[1]) if place else text[:end].count("\n") + 1
    line = text.split("\n")[number - 1]
    found = re.sub(r" \(.*?\)", "", re.sub("'.{5,}'", "", reason))
    for sign, in_line, advice in (
        ("Invalid value", r"=\s*(true|false|yes|no|on|off)\b", "write true or false"),
        ("Expected newline", r",\s*(#.*)?$", "take away the comma at the end of the line"),
        ("Expected newline", r"=.*?\s[a-z_]+\s*=", "write each setting on a line of its own"),
        ("Expected newline|Invalid value", "", 'text needs quotes, as in name = "..."'),
        (r"'\\n'|Expected \"'|Unterminated", "", 'a quote is not closed: write name = "..."'),
        ("Cannot|Duplicate", "", "it stands twice: take one away"),
    ):
        if re.search(sign, reason) and re.search(in_line, line, re.IGNORECASE):
            found = advice
            break
    return f"line {number}: is not valid TOML: {found}"


def load(
    path: Path, environ: Mapping[str, str], accepts: Callable[[str], str | None] | None = None
) -> Config:
    """The Config in a TOML file, or ConfigError with every mistake in it (interface.md).

    `accepts` judges channel URLs: Notifier's accepts(), which costs an import of apprise. It says
    what is wrong with one, in words that don't show it; None where it is fine.
    """
    return _Reader(path, environ, accepts or (lambda _: None)).config(_read_toml(path))


def load_address(path: Path, key: str, environ: Mapping[str, str]) -> Address:
    """Where the job of that monitor pings; raises ConfigError.

    Mistakes elsewhere in the file are no matter: Larm itself goes on with the last good one
    (law 7), and so must its jobs. Nor is cronsim needed, which another Python may not have.
    """
    whole = _read_toml(path)
    known = whole.get("monitors")
    known = known if isinstance(known, dict) else {}
    if not isinstance(own := known.get(key), dict):
        raise ConfigError(path, [f"no monitor {show(key)}{nearest(key, known)}"])
    monitor = {"interval": 1} | {name: own[name] for name in ("token",) if name in own}
    needed = {"timezone": "UTC", "monitors": {key: monitor}}
    needed |= {name: whole[name] for name in ("listen", "url", "database") if name in whole}
    config = _Reader(path, environ, lambda _: None).config(needed)
    return Address(config.url, config.database, config.monitors[key].token)


def warn_of(config: Config) -> None:
    """Log what a valid configuration may not do as its author expects."""
    if not config.channels:
        log.warning("no channels are configured: nobody will be alerted")
    if config.zone_trouble:
        log.warning("%s", config.zone_trouble)


# ======================================================================================
# Job wrapper: runs a command as if it stood alone, and reports on it. Needs no package.
# ======================================================================================

BODY_KEPT = 10_000  # bytes of a ping's body, its last ones
TRY_WITHIN = 10  # seconds that Larm has to answer a ping; the longest Retry-After that is heeded
TRY_AGAIN_AFTER = (1, 5)  # seconds
REPORT_WITHIN = 75  # seconds after the job's end; three tries of two pings that all hang take 72
HURRY = 2  # seconds left once a signal says, after the job's end, that run shall end, too
SILENCE = 1  # second without output, after the job's end, in which its children are given up
CHATTER = 5  # seconds after the job's end in which they are given up even if they print on
BY_SHELL = ["/bin/sh", "-c", 'exec "$0" "$@"']  # runs what follows; a script without #!, too


class Unreported(Exception):
    """Why Larm could not be told; shows neither URL nor token (law 9)."""


def say(text: str) -> bytes:
    """Write a line on stderr, which may be closed or on a full disk; returns that line."""
    line = f"larm.py run: {text}\n".encode(errors="replace")
    with contextlib.suppress(OSError):
        os.write(2, line)
    return line


def send_ping(url: str, body: bytes) -> str | None:
    """Post to a ping URL, three times if need be; why it failed, or None if it arrived."""
    opener = urllib.request.OpenerDirector()  # follows no redirect, which would lose the body
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(urllib.request.HTTPHandler())
    if url.lower().startswith("https:"):  # otherwise not, for it loads all the certificates
        opener.add_handler(urllib.request.HTTPSHandler())
    headers = {"User-Agent": f"larm.py run/{__version__}", "Content-Type": "text/plain"}
    for pause in (*TRY_AGAIN_AFTER, 0):
        try:
            request = urllib.request.Request(url, body, headers)
            with opener.open(request, timeout=TRY_WITHIN) as answer:
                if 200 <= answer.status < 300:
                    return None
                reason = f"HTTP status {answer.status}"
                asked = answer.headers.get("Retry-After", "")
                pause = min(int(asked), TRY_WITHIN) if pause and asked.isdecimal() else pause
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = getattr(cause, "strerror", None) or type(error).__name__  # never shows the URL
            if isinstance(cause, TimeoutError):
                reason = f"no answer within {TRY_WITHIN} s"
        time.sleep(pause)
    return reason


class Output:
    """What a job prints, on its way through to our own streams 1 and 2.

    A terminal is replaced by another one, of the same size and settings, so that a job shows its
    progress as ever. The bytes pass the new one unchanged; the old one does what terminals do.
    """

    def __init__(self) -> None:
        self.kept = b""  # its last BODY_KEPT bytes
        self.lost: OSError | None = None  # why some could not be passed on
        self.job_ended = False
        ours, theirs = self._open(1)
        self.streams = {1: theirs, 2: theirs}  # what the job writes to in place of ours
        self._sinks = {ours: 1}  # what we read from, and which of ours it is for
        # The same file is one pipe, which keeps the order. On macOS all pipes have number 0.
        if not (os.path.sameopenfile(1, 2) and os.fstat(1).st_ino):
            ours, self.streams[2] = self._open(2)
            self._sinks[ours] = 2

    def _open(self, sink: int) -> tuple[int, int]:
        with contextlib.suppress(OSError, termios.error):  # no terminal left: it gets a pipe
            if os.isatty(sink):
                ours, theirs = os.openpty()
                attributes = termios.tcgetattr(sink)
                attributes[1] &= ~termios.OPOST  # "\n" becomes "\r\n" once, not twice
                termios.tcsetattr(theirs, termios.TCSANOW, attributes)
                termios.tcsetwinsize(theirs, termios.tcgetwinsize(sink))
                return ours, theirs
        return os.pipe()

    def resize(self) -> None:
        """Give the job's terminal our terminal's new size."""
        for ours, sink in [*self._sinks.items()]:
            with contextlib.suppress(OSError, termios.error):  # it is none
                if (size := termios.tcgetwinsize(sink)) != termios.tcgetwinsize(ours):
                    termios.tcsetwinsize(ours, size)
                    os.kill(0, signal.SIGWINCH)  # the job had its own before the size was there

    def copy(self) -> None:
        """Pass on what the job prints, and for a short time after its end what its children do."""
        passed, waited, end = 0, 0.0, math.inf  # bytes and seconds since its end
        while self._sinks and waited < CHATTER and (passed < 65_536 or time.monotonic() < end):
            began = time.monotonic()
            ready = select.select([*self._sinks], [], [], SILENCE)[0]
            if self.job_ended and end == math.inf:  # as much as a pipe holds may be its own still
                end, passed = began + CHATTER, 0
            elif self.job_ended:
                waited += time.monotonic() - began if ready else CHATTER
            for source in ready:
                passed += self._pass_on(source)

    def _pass_on(self, source: int) -> int:
        """The number of bytes passed on."""
        try:
            data = rest = os.read(source, 65_536)
        except OSError:  # Linux's way to say that nobody has a terminal's other end any more
            data = rest = b""
        self.kept = (self.kept + data)[-BODY_KEPT:]
        while rest:
            try:
                rest = rest[os.write(self._sinks[source], rest) :]
            except BlockingIOError:  # whoever started us shares a stream that does not block
                select.select([], [self._sinks[source]], [])
            except OSError as error:
                # A reader that has had enough and a terminal that was closed are no failures;
                # output that is not in its file although the job believes it to be is one.
                if error.errno != errno.EPIPE and not os.isatty(source):
                    self.lost = error
                break
        if rest or not data:  # the job's next write must fail as it would without us
            os.close(source)
            del self._sinks[source]
        return len(data)


class Job:
    """A command that runs as if it stood alone, and what Larm is told of it.

    Whatever happens comes as a signal, for which the main thread waits: SIGCHLD where the job or
    a thread of ours has ended, SIGALRM where time is up. All others are for the job.
    """

    def __init__(self, command: list[str], find_url: Callable[[], str]) -> None:
        self._command, self._find_url = command, find_url
        # LARM_URL is ours, and a secret: the job does not have it.
        self._environ = {name: text for name, text in os.environ.items() if name != "LARM_URL"}
        own = {signal.SIGCHLD, signal.SIGALRM, signal.SIGWINCH}
        for number in own:  # ignored, or on macOS without a function, they would not come
            signal.signal(number, lambda *_: None)
        others = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        self._passed_on = {one for one in others if signal.getsignal(one) != signal.SIG_IGN}
        self._waited = own | self._passed_on
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._waited)
        self._pid: int | None = None  # while it runs
        self._code = 0  # its exit status, or minus the signal that killed it
        self._hurried = False
        self._result: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._complaint = "not reported: Larm has not answered in time"

    def run(self) -> int:
        """Its exit status. Larm delays it by at most REPORT_WITHIN, or HURRY after a signal; a
        child that outlives the job by SILENCE or CHATTER, and then loses its output's reader.
        """
        try:
            while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
                pass  # a stream of ours was closed: what is opened next would take its place
            os.close(spare)
            self._start()
        except Exception as error:  # whatever it is, the job comes first: it takes our place
            say(f"not reported: {getattr(error, 'strerror', None) or error}")
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            with contextlib.suppress(OSError):  # the shell knows what to say, and its exit status
                os.execvpe(self._command[0], self._command, self._environ)
            os.execve(BY_SHELL[0], [*BY_SHELL, *self._command], self._environ)
        return self._follow()

    def _start(self) -> None:
        """Raises OSError or RuntimeError where no file, thread or process is left to watch it."""
        self._output = Output()
        self._copied = self._begin(self._output.copy)
        self._reported = self._begin(self._report)
        streams = [(os.POSIX_SPAWN_DUP2, *pair[::-1]) for pair in self._output.streams.items()]
        for words in (self._command, [*BY_SHELL, *self._command]):
            try:
                self._pid = os.posix_spawnp(
                    words[0], words, self._environ, file_actions=streams, setsigmask=self._mask,
                    setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
                )
                return
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                    raise
                if error.errno != errno.ENOEXEC:  # it is no script without #!
                    self._code = 127 if error.errno == errno.ENOENT else 126
                    self._output.kept = say(f"{self._command[0]}: {error.strerror}")
                    return

    def _follow(self) -> int:
        self._attend(self._has_ended)
        self._output.job_ended = True
        for stream in {*self._output.streams.values()}:  # macOS forgets what was not read before
            os.close(stream)
        # A reader may take its time, but where the job was killed, its exit must not wait for it.
        self._attend(self._copied, math.inf if self._code >= 0 else CHATTER + HURRY)
        status = self._code if self._code >= 0 else 128 - self._code
        if error := self._output.lost:
            self._output.kept += say(f"the job's output could not be written: {error.strerror}")
            status = status or 1  # the job does not know
        self._result.put((status, self._output.kept[-BODY_KEPT:]))
        self._attend(self._reported, REPORT_WITHIN)
        if self._complaint:
            say(self._complaint)
        return status

    def _begin(self, work: Callable[[], None]) -> Callable[[], bool]:
        """Do it in a thread; the answer tells whether that has ended. Raises RuntimeError."""
        ended = threading.Event()

        def do() -> None:
            try:
                work()
            finally:
                ended.set()
                os.kill(os.getpid(), signal.SIGCHLD)

        threading.Thread(target=do, daemon=True).start()
        return ended.is_set

    def _report(self) -> None:
        try:
            url, rid = self._find_url(), secrets.token_hex(8)
            start = send_ping(f"{url}/start?rid={rid}", b"")
            status, output = self._result.get()
            end = send_ping(f"{url}/{status}?rid={rid}", output)
            missed = " and ".join(name for name, why in (("start", start), ("end", end)) if why)
            self._complaint = f"{missed} not reported: {end or start}" if missed else ""
        except Exception as error:  # whatever it is, the job's result is the job's
            what = error if isinstance(error, Unreported) else type(error).__name__
            self._complaint = f"not reported: {what}"

    def _has_ended(self) -> bool:
        if self._pid and (ended := os.waitpid(self._pid, os.WNOHANG))[0]:
            self._pid, self._code = None, os.waitstatus_to_exitcode(ended[1])
        return self._pid is None

    def _attend(self, is_over: Callable[[], bool], within: float = math.inf) -> None:
        """Heed signals until that is over, or so many seconds are."""
        end = time.monotonic() + (HURRY if self._hurried else within)
        while not is_over() and (left := end - time.monotonic()) > 0:
            signal.setitimer(signal.ITIMER_REAL, min(left, 3600))
            if hasattr(signal, "sigwaitinfo"):
                info = signal.sigwaitinfo(self._waited)
                number, typed = info.si_signo, info.si_code > 0  # by the kernel, not by a process
            else:  # macOS does not say who sent it
                number = signal.sigwait(self._waited)
                typed = os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
            typed = typed and number in (signal.SIGINT, signal.SIGQUIT)  # the job has had it, too
            if number == signal.SIGWINCH:
                self._output.resize()
            elif number in self._passed_on and self._pid is None:
                self._hurried, end = True, min(end, time.monotonic() + HURRY)
            elif self._pid and number in self._passed_on and not typed:
                with contextlib.suppress(OSError):  # it has become another user's
                    os.kill(self._pid, number)


# ======================================================================================
# Store: the file, its lock, one thread that writes, and readers. Knows no table but `clock`.
# ======================================================================================

APPLICATION_ID = 0x4C41524D  # "LARM", so that another program's database is recognised
BATCH = 500  # writes in one commit, rows in one round of pruning, of deadlines or of alerts
ANSWER_WITHIN = 8 * SECOND  # that a caller waits for its commit: less than `curl -m 10` does
SLOW_COMMIT = 2 * SECOND  # from which on it counts as time in which nothing could be written
ALIVE_EVERY = 30 * SECOND  # how often alive_at is written


class StoreError(Exception):
    """The database can't be opened; the message says why and what to do."""


class Unrecordable(Exception):
    """Nothing can be written now: the disk is full, the file is read-only, it takes too long."""


Operation = Callable[[sqlite3.Connection, list[Any]], Any]


class Write(Generic[T]):
    """One operation, with an item for it, on its way to the disk."""

    __slots__ = ("_done", "_error", "is_done", "item", "operation", "value")

    def __init__(self, operation: Operation, item: object) -> None:
        self.operation = operation
        self.item = item
        self.value: T
        self._done = threading.Lock()
        self._done.acquire()
        self._error: Exception | None = None
        self.is_done = False

    def finish(self, error: Exception | None = None) -> None:
        del self.operation, self.item  # and with them whatever they hold, such as a body
        self._error, self.is_done = error, True
        self._done.release()

    def result(self, within: float = ANSWER_WITHIN / SECOND) -> T:
        """What the operation returned, once it is committed; raises Unrecordable if it can't be, or
        is not within so many seconds (-1: it may take its time).
        """
        if not self._done.acquire(timeout=within):
            raise Unrecordable("the database does not answer")
        self._done.release()
        if self._error is not None:
            raise self._error
        return self.value


def nothing(_db: sqlite3.Connection, _items: list[Any]) -> None:
    """An operation that waits its turn and writes nothing."""


def connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """A connection in autocommit mode; raises sqlite3.Error."""
    uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rw'}"
    db = sqlite3.connect(
        uri, uri=True, isolation_level=None, timeout=10, check_same_thread=False
    )
    db.row_factory = sqlite3.Row
    db.execute(f"PRAGMA cache_size = {-256 if readonly else -4096}")  # kibibytes
    return db


class Store:
    """Opens the database for this process alone, and writes to it from one thread.

    A write is an operation: a function of the connection, which runs inside a transaction that it
    shares with whatever else has queued up. It may be run again where another one failed.
    """

    def __init__(self, path: Path, clock: Clock, prepare: Callable[[sqlite3.Connection], None]
                 ) -> None:
        """`prepare` makes or migrates the schema. Raises StoreError."""
        self.path = path
        self.failure: str | None = None  # why nothing can be written, while that is so
        self.is_busy = False  # writing, or about to
        # Not accounted for yet: monotonic from, to, whether writes failed or took too long.
        self.outages: list[tuple[int, int, bool]] = []
        self.commits, self.commit_seconds = 0, 0.0  # since the start
        self.after_commit: list[Callable[[], None]] = []  # what an operation leaves to be done then
        self.after_rollback: list[Callable[[], None]] = []
        self.wake: Callable[[], None] = lambda: None  # called when writes are done
        self._clock = clock
        self._failing_since = 0  # monotonic
        self._queue: queue.SimpleQueue[Write[Any] | None] = queue.SimpleQueue()
        self._idle: list[sqlite3.Connection] = []
        self._closing = False
        self._lock_file = self._lock()
        try:
            self._db = self._open(prepare)
        except StoreError:
            os.close(self._lock_file)
            raise
        self.thread = threading.Thread(target=self._write_forever, name="writer", daemon=True)
        self.thread.start()

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

    def _open(self, prepare: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            if self.path.stat().st_mode & 0o077:
                self.path.chmod(0o600)
            db = connect(self.path, readonly=False)
            prepare(db)
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise ValueError("this file system can't hold SQLite's WAL; use a local disk")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("SELECT * FROM clock").fetchone()  # who has the WAL open removes it at close
            return db
        except (OSError, sqlite3.Error, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise StoreError(f"{self.path}: can't be used as the database: {reason}") from None

    # Writing

    def submit(self, operation: Callable[[sqlite3.Connection], T]) -> Write[T]:
        """Queue an operation; raises Unrecordable at once while nothing can be written."""
        return self.gather(lambda db, _: operation(db), None)

    def gather(self, operation: Operation, item: object) -> Write[Any]:
        """Queue an item for an operation that takes all the items that wait for it in a row."""
        if self._closing or self.failure or not self.thread.is_alive():
            raise Unrecordable(self.failure or "Larm is stopping")
        write: Write[Any] = Write(operation, item)
        self._queue.put(write)
        return write

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run an operation and return its result once it is on disk; may raise Unrecordable."""
        return self.submit(operation).result()

    def _write_forever(self) -> None:
        while True:
            batch: list[Write[Any] | None] = []
            with contextlib.suppress(queue.Empty):
                batch.append(self._queue.get(timeout=1.0 if self.failure else None))
                while len(batch) < BATCH and batch[-1] is not None:
                    batch.append(self._queue.get_nowait())
            writes = [write for write in batch if write is not None]
            self.is_busy = True
            if self.failure:
                self._probe()
            if writes:
                self._commit(writes)
            self.is_busy = False
            self.wake()
            if None in batch:
                return

    def _probe(self) -> None:
        """Find out whether the database takes writes again."""
        try:
            self._transact([Write(write_ballast, None)])
        except Exception:  # still failing, for whatever reason: asked again in a second
            return
        log.warning("%s can be written again", self.path)
        self.outages.append((self._failing_since, self._clock.monotonic(), True))
        self.failure = None

    def _commit(self, writes: list[Write[Any]]) -> None:
        """Commit all of them as one transaction, and answer each."""
        began = self._clock.monotonic()
        error: Exception | None = Unrecordable(self.failure) if self.failure else None
        if error is None:
            try:
                self._transact(writes)
            except Exception as found:
                error = found
        if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
            if self.failure is None:
                log.error("%s can't be written: %s; pings get 503 till then", self.path, error)
                self._failing_since = began
            self.failure = str(error)
            error = Unrecordable(self.failure)
        elif error is not None and not self.failure and len(writes) > 1:
            for write in writes:  # one of them is at fault: the others must not suffer for it
                self._commit([write])
            return
        elif error is None and (ended := self._clock.monotonic()) - began > SLOW_COMMIT:
            self.outages.append((began, ended, False))
        for write in writes:
            write.finish(error)

    def _transact(self, writes: list[Write[Any]]) -> None:
        if all(write.operation is nothing for write in writes):
            for write in writes:
                write.value = None
            return
        began = time.perf_counter()
        self.after_commit, self.after_rollback = [], []
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
            for follow_up in self.after_rollback:
                follow_up()
            raise
        self.commits += 1
        self.commit_seconds += time.perf_counter() - began
        for follow_up in self.after_commit:
            follow_up()

    # Reading

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A read-only connection that is this thread's own for the time being."""
        try:
            db = self._idle.pop()
        except IndexError:
            db = connect(self.path, readonly=True)
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

    def close(self) -> None:
        """Commit what is queued, and close the WAL and every connection."""
        self._closing = True
        self._queue.put(None)
        self.thread.join(timeout=4)
        for reader in self._idle:
            reader.close()
        if not self.thread.is_alive():
            self._db.close()
        os.close(self._lock_file)


def write_ballast(db: sqlite3.Connection, _items: list[Any]) -> None:
    """As much as the largest ping takes, to find out whether there is room for one again."""
    db.execute("UPDATE clock SET ballast = randomblob(16384)")


def running_process(database: Path) -> tuple[bool, int]:
    """Whether a Larm runs on a database, and when one ticked last (0: unknown)."""
    try:
        with open(f"{database}.lock", "rb") as lock_file:
            held = lock_file.read(100).split()
            tick = int(held[1]) if len(held) == 2 and held[1].isdigit() else 0
            try:
                fcntl.flock(lock_file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True, tick
            return False, tick
    except OSError:
        return False, 0


# ======================================================================================
# Records: the schema, and every query as a name for what it answers. No policy.
# ======================================================================================

NEWEST_KEPT = 1_000  # heartbeats of one monitor
BODIES_KEPT = 100  # of these
EVENTS_KEPT = 10_000  # of one monitor
HELD = "held: "  # how the reason begins why an alert waits for another monitor's return
DIGEST_WITHIN = 3 * SECOND  # alerts to one channel that come so close together are one message

SCHEMA = """
    CREATE TABLE clock (
        alive_at INTEGER NOT NULL,
        ballast BLOB                      -- what the writer tries to write while the disk is full
    );

    CREATE TABLE monitors (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        made_token TEXT NOT NULL UNIQUE,  -- in force where larm.toml gives none
        state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'up', 'down')),
        since INTEGER NOT NULL,           -- of the state
        heard_from INTEGER,               -- its first success or failure
        received_at INTEGER,              -- the last success, stored or throttled
        base_at INTEGER,                  -- what the deadline counts from: that, or a pause's end
        moved INTEGER NOT NULL DEFAULT 0, -- by how much time that nobody watched moved it since
        deadline_at INTEGER,              -- while the state is up and somebody watches
        last_duration_ms INTEGER          -- of a run that said when it started
    );
    CREATE INDEX monitors_by_deadline ON monitors (deadline_at) WHERE deadline_at IS NOT NULL;

    CREATE TABLE gaps (                   -- when a monitor, or all of them, were not watched
        id INTEGER PRIMARY KEY,
        monitor_id INTEGER REFERENCES monitors ON DELETE CASCADE, -- NULL: all
        why TEXT NOT NULL CHECK (why IN ('paused', 'disabled', 'removed', 'away', 'clock')),
        from_at INTEGER NOT NULL,
        to_at INTEGER,                    -- NULL while it lasts; ahead: a timed pause
        open INTEGER NOT NULL,
        told INTEGER NOT NULL DEFAULT 0   -- whether there was an alert of it
    );
    CREATE INDEX gaps_open ON gaps (monitor_id) WHERE open;
    CREATE INDEX gaps_by_end ON gaps (to_at);

    CREATE TABLE heartbeats (
        id INTEGER PRIMARY KEY,
        monitor_id INTEGER NOT NULL REFERENCES monitors,
        at INTEGER NOT NULL,
        signal TEXT NOT NULL CHECK (signal IN ('success', 'fail', 'start', 'log')),
        exit_status INTEGER,
        duration_ms INTEGER,              -- of the run that it ended
        method TEXT NOT NULL,
        sender TEXT,
        user_agent TEXT,
        rid TEXT,
        body TEXT,
        run TEXT CHECK (run IN ('open', 'overdue')),  -- of a start whose end has not come
        moved INTEGER NOT NULL DEFAULT 0, -- by how much time that nobody watched it may be longer
        ends_by INTEGER                   -- by max_runtime
    );
    CREATE INDEX heartbeats_by_signal ON heartbeats (monitor_id, signal);
    CREATE INDEX heartbeats_running ON heartbeats (monitor_id) WHERE run IS NOT NULL;
    CREATE INDEX heartbeats_by_limit ON heartbeats (ends_by) WHERE ends_by IS NOT NULL;

    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        monitor_id INTEGER REFERENCES monitors,   -- NULL: about Larm itself
        type TEXT NOT NULL CHECK (type IN ('down', 'up')),
        at INTEGER NOT NULL,
        reason TEXT CHECK (reason IN ('missed', 'failed', 'overran')),
        last_heartbeat_at INTEGER,
        down_ms INTEGER,
        heartbeat_id INTEGER REFERENCES heartbeats,
        topic TEXT,                       -- what of Larm itself is in trouble
        text TEXT,
        CHECK ((monitor_id IS NULL) = (topic IS NOT NULL))
    );
    CREATE INDEX events_by_monitor ON events (monitor_id);
    CREATE INDEX events_by_time ON events (at);
    CREATE INDEX events_by_heartbeat ON events (heartbeat_id) WHERE heartbeat_id IS NOT NULL;
    CREATE INDEX events_by_topic ON events (topic) WHERE topic IS NOT NULL;

    CREATE TABLE deliveries (             -- the outbox: an event on its way to a channel
        id INTEGER PRIMARY KEY,
        event_id INTEGER NOT NULL REFERENCES events ON DELETE CASCADE,
        channel TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'sent', 'failed')),
        due_at INTEGER,                   -- the next attempt or reminder; NULL: there is none
        attempts INTEGER NOT NULL DEFAULT 0,
        tried_from INTEGER,               -- the first attempt of what is not accepted yet
        at INTEGER,                       -- the last attempt
        error TEXT                        -- why it failed or waits
    );
    CREATE INDEX deliveries_due ON deliveries (due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX deliveries_tried ON deliveries (channel) WHERE tried_from IS NOT NULL;
    CREATE INDEX deliveries_by_event ON deliveries (event_id);

    CREATE TABLE messages (               -- of the last hour, to keep to so many an hour
        monitor_id INTEGER NOT NULL REFERENCES monitors ON DELETE CASCADE,
        channel TEXT NOT NULL,
        at INTEGER NOT NULL,
        limited INTEGER NOT NULL          -- whether it had waited, since there were too many
    );
    CREATE INDEX messages_by_monitor ON messages (monitor_id, channel, at);

    CREATE TABLE channels (
        name TEXT PRIMARY KEY,
        sent_at INTEGER,                  -- when it accepted an alert last
        failed_at INTEGER,                -- when it last did not, and why
        error TEXT,
        failing_since INTEGER             -- the first failure since it accepted one
    );
"""

FROM_SCHEMA_1 = f"""                      -- whose tables are called old_... by then
    {SCHEMA}
    INSERT INTO clock SELECT alive_at, NULL FROM old_clock;
    INSERT INTO monitors
    SELECT id, key, name, made_token, state, since, IIF(state = 'pending', NULL, created_at),
        received_at, base, COALESCE(counts_from - base, 0),
        IIF(watching = 'yes' AND state = 'up', deadline_at, NULL), last_duration_ms
    FROM (
        SELECT *, NULLIF(MAX(COALESCE(received_at, 0), COALESCE((
            SELECT MAX(to_at) FROM old_gaps WHERE monitor_id = m.id AND to_at <= counts_from
        ), 0)), 0) AS base
        FROM old_monitors m
    );
    INSERT INTO gaps
    SELECT id, monitor_id, IIF(monitor_id IS NULL, 'away', 'paused'), from_at, to_at, 0, told
    FROM old_gaps;
    INSERT INTO gaps (monitor_id, why, from_at, to_at, open)
    SELECT id, watching, unwatched_at, resumes_at, 1 FROM old_monitors WHERE watching <> 'yes';
    INSERT INTO heartbeats
    SELECT id, monitor_id, at, signal, exit_status, duration_ms, method, sender, user_agent, rid,
        body, NULL, 0, NULL
    FROM old_heartbeats;
    INSERT INTO heartbeats (monitor_id, at, signal, method, rid)
    SELECT monitor_id, started_at, 'start', '', rid
    FROM old_runs r
    WHERE NOT EXISTS (
        SELECT 1 FROM old_heartbeats
        WHERE monitor_id = r.monitor_id AND signal = 'start' AND at = r.started_at AND rid IS r.rid
    );
    UPDATE heartbeats
    SET run = IIF(r.max_runtime IS NOT NULL AND r.ends_by IS NULL, 'overdue', 'open'),
        ends_by = r.ends_by, moved = COALESCE(r.ends_by - r.max_runtime - r.started_at, 0)
    FROM old_runs r
    WHERE heartbeats.monitor_id = r.monitor_id AND signal = 'start' AND at = r.started_at
    AND heartbeats.rid IS r.rid;
    INSERT INTO events
    SELECT id, monitor_id, type, at, reason, last_heartbeat_at, down_ms, heartbeat_id, topic, text
    FROM old_events;
    INSERT INTO deliveries
    SELECT id, event_id, channel, state, IIF(state = 'pending', due_at, NULL), attempts,
        IIF(state = 'pending', first_tried_at, NULL), at, error
    FROM old_deliveries;
    UPDATE deliveries                     -- reminders
    SET due_at = m.alert_at
    FROM old_monitors m
    WHERE m.state = 'down' AND m.told = 'down' AND deliveries.state = 'sent'
    AND event_id = (SELECT MAX(id) FROM events WHERE monitor_id = m.id);
    INSERT INTO deliveries (event_id, channel, due_at)  -- what was held, or untold for flapping;
    SELECT (SELECT MAX(id) FROM old_events WHERE monitor_id = m.id) AS event, '', m.since
    FROM old_monitors m                   -- adopt() knows to whom
    WHERE m.watching = 'yes' AND m.told <> m.state AND m.state <> 'pending' AND event IS NOT NULL;
    INSERT INTO channels SELECT * FROM old_channels;
    DROP TABLE old_clock; DROP TABLE old_deliveries; DROP TABLE old_channels; DROP TABLE old_runs;
    DROP TABLE old_gaps; DROP TABLE old_events; DROP TABLE old_heartbeats; DROP TABLE old_monitors;
"""
MIGRATIONS = {0: SCHEMA, 1: FROM_SCHEMA_1}  # by the version that each leads on from
SCHEMA_VERSION = 2


def schema_version(db: sqlite3.Connection) -> int:
    """Raises ValueError for another program's database, and for that of a newer Larm."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"it was written by a newer Larm (schema {version}; this one knows "
            f"{SCHEMA_VERSION}): update larm.py"
        )
    owner = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    if tables and owner != APPLICATION_ID:
        raise ValueError("it belongs to another program")
    return version


def migrate(db: sqlite3.Connection) -> None:
    """Bring the schema up to date, a transaction a step; raises as schema_version() does."""
    while (version := schema_version(db)) in MIGRATIONS:
        old = db.execute("SELECT type, name FROM sqlite_master WHERE sql NOTNULL ORDER BY type")
        away = [f"DROP INDEX {name};" if type == "index"
                else f"ALTER TABLE {name} RENAME TO old_{name};" for type, name in old.fetchall()]
        try:
            db.executescript(
                f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; {''.join(away)}"
                f"{MIGRATIONS[version]}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
            )
        except sqlite3.Error:
            if db.in_transaction:
                db.rollback()
            raise


def rows(db: sqlite3.Connection, query: str, **values: Any) -> list[sqlite3.Row]:
    return db.execute(query, values).fetchall()


def first(db: sqlite3.Connection, query: str, **values: Any) -> Any:
    """The first column of the first row; None where there is none."""
    row = db.execute(query, values).fetchone()
    return None if row is None else row[0]


# Monitors and when they are not watched


def read_monitors(db: sqlite3.Connection) -> dict[str, sqlite3.Row]:
    """Every monitor that the database knows, by key."""
    return {row["key"]: row for row in db.execute("SELECT * FROM monitors")}


def open_gaps(db: sqlite3.Connection) -> dict[int, dict[str, sqlite3.Row]]:
    """Why monitors are not watched now: {monitor id: {why: gap}}."""
    found: dict[int, dict[str, sqlite3.Row]] = defaultdict(dict)
    for row in db.execute("SELECT * FROM gaps WHERE open"):
        found[row["monitor_id"]][row["why"]] = row
    return found


def gaps_since(db: sqlite3.Connection, start: int) -> dict[int | None, list[sqlite3.Row]]:
    """When a monitor (by id), or Larm (None), was not watching, as far as it ends after a moment.
    What lasts has no end, or one ahead.
    """
    found: dict[int | None, list[sqlite3.Row]] = defaultdict(list)
    query = "SELECT * FROM gaps WHERE to_at > :start OR open ORDER BY id"
    for row in rows(db, query, start=start):
        found[row["monitor_id"]].append(row)
    return found


def pauses_over(db: sqlite3.Connection, now: int) -> list[sqlite3.Row]:
    """The timed pauses that have come to their end."""
    return rows(db, "SELECT * FROM gaps WHERE open AND to_at <= :now", now=now)


def write_alive(db: sqlite3.Connection, now: int) -> None:
    if not db.execute("UPDATE clock SET alive_at = ?", (now,)).rowcount:
        db.execute("INSERT INTO clock (alive_at) VALUES (?)", (now,))


def next_due_at(db: sqlite3.Connection, now: int) -> int | None:
    """When something is due next, after `now`: a deadline, an alert, the end of a run or pause."""
    due: int | None = first(db, """
        SELECT MIN(at) FROM (
            SELECT MIN(deadline_at) AS at FROM monitors WHERE deadline_at >= :now
            UNION ALL SELECT MIN(ends_by) FROM heartbeats WHERE ends_by >= :now
            UNION ALL SELECT MIN(due_at) FROM deliveries WHERE due_at > :now
            UNION ALL SELECT MIN(to_at) FROM gaps WHERE open AND to_at > :now
        )
        """, now=now)
    return due


# Heartbeats and events


def list_heartbeats(
    db: sqlite3.Connection, monitor_id: int, limit: int, before: int | None = None
) -> list[sqlite3.Row]:
    """A monitor's heartbeats, newest first; `before`: those older than that id."""
    return rows(db, """
        SELECT *
        FROM heartbeats
        WHERE monitor_id = :monitor AND (:before IS NULL OR id < :before)
        ORDER BY id DESC
        LIMIT :limit
        """, monitor=monitor_id, limit=limit, before=before)


def list_events(
    db: sqlite3.Connection, limit: int, before: int | None = None, monitor_id: int | None = None
) -> list[sqlite3.Row]:
    """The events of a monitor, or of all, with their keys and exit statuses, newest first."""
    own = "" if monitor_id is None else "AND e.monitor_id = :monitor"
    return rows(db, f"""
        SELECT e.*, m.key, m.name, h.exit_status
        FROM events e
        JOIN monitors m ON m.id = e.monitor_id
        LEFT JOIN heartbeats h ON h.id = e.heartbeat_id
        WHERE (:before IS NULL OR e.id < :before) {own}
        ORDER BY e.id DESC
        LIMIT :limit
        """, monitor=monitor_id, limit=limit, before=before)


def deliveries_of(
    db: sqlite3.Connection, event_ids: Iterable[int]
) -> dict[int, list[sqlite3.Row]]:
    """The deliveries of these events, by event id."""
    found: dict[int, list[sqlite3.Row]] = defaultdict(list)
    for row in rows(db, """
        SELECT *
        FROM deliveries
        WHERE event_id IN (SELECT value FROM json_each(:events))
        ORDER BY id
        """, events=json.dumps(list(event_ids))):
        found[row["event_id"]].append(row)
    return found


def state_changes(db: sqlite3.Connection, start: int) -> dict[int, list[sqlite3.Row]]:
    """The events since a moment, and the last one before it, by monitor id, oldest first."""
    changes: dict[int, list[sqlite3.Row]] = defaultdict(list)
    for row in rows(db, """
        SELECT monitor_id, type, at
        FROM events
        WHERE monitor_id IS NOT NULL AND at >= :start
        OR id IN (SELECT MAX(id) FROM events WHERE at < :start GROUP BY monitor_id)
        ORDER BY id
        """, start=start):
        changes[row["monitor_id"]].append(row)
    return changes


def causes(db: sqlite3.Connection) -> dict[int, sqlite3.Row]:
    """Why the monitors that are down went down, by id, with the job's output, and why the alert of
    it waits.
    """
    found = rows(db, """
        SELECT e.monitor_id, e.reason, h.exit_status, h.body,
            (
                SELECT error FROM deliveries
                WHERE event_id = e.id AND state = 'pending' AND tried_from IS NULL
                AND error IS NOT NULL
                LIMIT 1
            ) AS waits
        FROM monitors m
        JOIN events e ON e.id = (
            SELECT id FROM events WHERE monitor_id = m.id AND type = 'down'
            ORDER BY id DESC LIMIT 1
        )
        LEFT JOIN heartbeats h ON h.id = e.heartbeat_id
        WHERE m.state = 'down'
        """)
    return {row["monitor_id"]: row for row in found}


# Larm's own troubles and channels


def open_troubles(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """The events of what is wrong with Larm itself, for those that have not ended."""
    return rows(db, """
        SELECT *
        FROM events
        WHERE type = 'down'
        AND id IN (SELECT MAX(id) FROM events WHERE topic IS NOT NULL GROUP BY topic)
        ORDER BY id
        """)


def report(
    db: sqlite3.Connection, topic: str, type: str, text: str, channels: Iterable[str], at: int
) -> None:
    """An alert that something of Larm itself is in trouble ("down"), or is no longer ("up").

    A trouble is reported once: again only after its end, or with another text.
    """
    known = rows(db, """
        SELECT text, at
        FROM events
        WHERE topic = :topic AND id > COALESCE(
            (SELECT MAX(id) FROM events WHERE topic = :topic AND type = 'up'), 0
        )
        ORDER BY id
        """, topic=topic)
    if (type == "up" and not known) or any(row["text"] == text for row in known):
        return
    down_ms = max(0, at - known[0]["at"]) if type == "up" else None
    event = db.execute(
        "INSERT INTO events (type, at, topic, text, down_ms) VALUES (?, ?, ?, ?, ?)",
        (type, at, topic, text, down_ms),
    )
    db.executemany(
        "INSERT INTO deliveries (event_id, channel, due_at) VALUES (?, ?, ?)",
        [(event.lastrowid, channel, at + DIGEST_WITHIN) for channel in channels],
    )


def take_untold_gaps(db: sqlite3.Connection, shortest: int) -> list[sqlite3.Row]:
    """The gaps in Larm's attention of which there was no alert yet, and is one now."""
    return rows(db, """
        UPDATE gaps
        SET told = 1
        WHERE told = 0 AND why = 'away' AND to_at - from_at > :shortest
        RETURNING *
        """, shortest=shortest)


def read_channels(db: sqlite3.Connection) -> dict[str, sqlite3.Row]:
    """What became of the last attempts to send to each channel, and how many alerts it waits for,
    by name.
    """
    found = rows(db, """
        SELECT n.name, c.sent_at, c.failed_at, c.error, c.failing_since, COALESCE(pending, 0)
            AS pending
        FROM (SELECT name FROM channels UNION SELECT channel FROM deliveries
            WHERE state = 'pending') n
        LEFT JOIN channels c ON c.name = n.name
        LEFT JOIN (
            SELECT channel, COUNT(*) AS pending
            FROM deliveries
            WHERE state = 'pending'
            GROUP BY channel
        ) d ON d.channel = n.name
        """)
    return {row["name"]: row for row in found}


def retry_channels(db: sqlite3.Connection, names: Iterable[str], now: int) -> None:
    """Try at once what waits for channels whose URLs have changed; their failures are history."""
    for name in names:
        db.execute("UPDATE deliveries SET due_at = ? WHERE channel = ? AND tried_from NOTNULL",
                   (now, name))
        db.execute("UPDATE channels SET failing_since = NULL, failed_at = NULL WHERE name = ?",
                   (name,))


def is_delivery_stuck(db: sqlite3.Connection, now: int) -> bool:
    """Whether an alert has been due for long, or has been tried for very long, without success."""
    return first(db, """
        SELECT 1
        FROM deliveries
        WHERE due_at < :due OR tried_from < :tried
        LIMIT 1
        """, due=now - 5 * MINUTE, tried=now - HOUR) is not None


# Pruning


def prune_monitor(db: sqlite3.Connection, monitor_id: int) -> None:
    """Delete a monitor's heartbeats that are not among its newest, the bodies of those that are not
    among the very newest, but for those of an event, and its events that are too many.
    """
    nth = """
        SELECT id FROM {} WHERE monitor_id = :monitor ORDER BY id DESC LIMIT 1 OFFSET :kept
        """
    old = f"""
        SELECT id
        FROM heartbeats h
        WHERE monitor_id = :monitor AND id <= ({nth.format("heartbeats")})
        AND NOT EXISTS (SELECT 1 FROM events WHERE heartbeat_id = h.id)
        """
    own = {"monitor": monitor_id}
    db.execute(
        f"DELETE FROM events WHERE monitor_id = :monitor AND id <= ({nth.format('events')})",
        own | {"kept": EVENTS_KEPT},
    )
    db.execute(f"DELETE FROM heartbeats WHERE id IN ({old})", own | {"kept": NEWEST_KEPT})
    db.execute(
        f"UPDATE heartbeats SET body = NULL WHERE body IS NOT NULL AND id IN ({old})",
        own | {"kept": BODIES_KEPT},
    )


def prune_old(db: sqlite3.Connection, before: int, now: int) -> None:
    """Delete some of what is older, the oldest first, but for what still matters."""
    old = {"before": before, "limit": BATCH, "now": now}
    for statement in (
        """
        DELETE FROM events
        WHERE id IN (
            SELECT id
            FROM events e
            WHERE at < :before
            AND NOT EXISTS (
                SELECT 1 FROM monitors m
                WHERE m.id = e.monitor_id AND state = 'down' AND since = e.at AND NOT EXISTS (
                    SELECT 1 FROM gaps WHERE monitor_id = m.id AND open AND why = 'removed'
                )
            )
            AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event_id = e.id AND state = 'pending')
            ORDER BY at
            LIMIT :limit
        )
        """,
        """
        DELETE FROM heartbeats
        WHERE id IN (
            SELECT id
            FROM (SELECT id, at FROM heartbeats ORDER BY id LIMIT 4 * :limit) h
            WHERE at < :before
            AND NOT EXISTS (SELECT 1 FROM events WHERE heartbeat_id = h.id)
            LIMIT :limit
        )
        """,
        "DELETE FROM gaps WHERE to_at < :before AND NOT open",
        "DELETE FROM messages WHERE at < :now - 3600000 OR at > :now + 3600000",
        """
        DELETE FROM monitors
        WHERE id IN (
            SELECT monitor_id FROM gaps WHERE open AND why = 'removed' AND from_at < :before
        )
        AND NOT EXISTS (SELECT 1 FROM events WHERE monitor_id = monitors.id)
        AND NOT EXISTS (SELECT 1 FROM heartbeats WHERE monitor_id = monitors.id)
        """,
    ):
        db.execute(statement, {name: old[name] for name in old if f":{name}" in statement})


# ======================================================================================
# States: what a ping, a silence and an absence do to a monitor. One table, one transaction.
# ======================================================================================

TRANSITIONS = [  # state, what happens, the state then, the event, its reason; all else is nothing
    ("pending", "success", "up", None, None),
    ("pending", "fail", "down", "down", "failed"),
    ("pending", "overran", "down", "down", "overran"),
    ("up", "success", "up", None, None),
    ("up", "fail", "down", "down", "failed"),
    ("up", "missed", "down", "down", "missed"),
    ("up", "overran", "down", "down", "overran"),
    ("down", "success", "up", "up", None),
]
_MOST_CHANGES = 10  # pings that change the state, and starts, are stored so often an interval

# Parts of the trigger below. NEW is what happens; each of these reads an index.
_WATCHED = "NOT EXISTS (SELECT 1 FROM gaps WHERE open AND monitor_id = new.monitor_id)"
_NEWEST = """(
    SELECT id FROM heartbeats WHERE monitor_id = new.monitor_id AND signal = new.what
    ORDER BY id DESC LIMIT 1
)"""
_CHANGES = f"""EXISTS (
    SELECT 1 FROM monitors m JOIN transitions t ON t.state = m.state AND t.what = new.what
    WHERE m.id = new.monitor_id AND t.becomes <> m.state AND {_WATCHED}
)"""
_RUNNING = """
    SELECT id FROM heartbeats INDEXED BY heartbeats_running
    WHERE monitor_id = new.monitor_id AND run IS NOT NULL"""
_ENDED = f"""(
    {_RUNNING} AND (rid IS NULL OR rid = new.rid OR new.rid IS NULL)
    ORDER BY rid IS new.rid DESC, rid IS NULL DESC, id DESC LIMIT 1
)"""  # the last run with its rid, else the last one without any


def _few(table: str, own: str) -> str:
    """Whether a monitor had fewer than _MOST_CHANGES of these within its interval."""
    return f"""(
        SELECT COUNT(*) FROM (
            SELECT at FROM {table} WHERE monitor_id = new.monitor_id {own}
            ORDER BY id DESC LIMIT {_MOST_CHANGES}
        ) WHERE at > new.at - new.interval AND at <= new.at
    ) < {_MOST_CHANGES}"""


PREPARE = f"""
    PRAGMA temp_store = MEMORY;
    CREATE TEMP TABLE transitions (state, what, becomes, event, reason, PRIMARY KEY (state, what));
    CREATE TEMP TABLE audience (          -- who is told of a monitor
        monitor_id INTEGER, channel TEXT, PRIMARY KEY (monitor_id, channel)
    ) WITHOUT ROWID;
    CREATE TEMP TABLE throttled (         -- until when the next success changes nothing
        monitor_id INTEGER PRIMARY KEY, until INTEGER
    );
    CREATE TEMP VIEW happening AS
    SELECT 0 AS monitor_id, 0 AS at, '' AS what, 0 AS window, 0 AS interval, 0 AS deadline_at,
        0 AS max_runtime, 0 AS lost_before, 0 AS exit_status, '' AS method, '' AS sender,
        '' AS user_agent, '' AS rid, '' AS body;

    CREATE TEMP TRIGGER happen INSTEAD OF INSERT ON happening WHEN new.monitor_id IS NOT NULL BEGIN
        -- A ping is kept, unless the throttle drops it (law 2): its window counts from the newest
        -- of its kind, but for one that a wrong clock dated in the future.
        INSERT INTO heartbeats
            (monitor_id, at, signal, exit_status, method, sender, user_agent, rid, body)
        SELECT new.monitor_id, new.at, new.what, new.exit_status, new.method, new.sender,
            new.user_agent, new.rid, new.body
        WHERE new.method IS NOT NULL AND (
            NOT EXISTS (
                SELECT 1 FROM heartbeats
                WHERE id = {_NEWEST} AND at > new.at - new.window AND at <= new.at
            )
            OR ({_CHANGES} AND {_few("events", "")})
            OR (new.what = 'start' AND {_few("heartbeats", "AND signal = 'start'")})
        );
        -- What must count all the same takes the place of the newest of its kind.
        UPDATE heartbeats
        SET at = new.at, exit_status = new.exit_status, duration_ms = NULL, method = new.method,
            sender = new.sender, user_agent = new.user_agent, rid = new.rid, body = new.body
        WHERE changes() = 0 AND new.method IS NOT NULL
        AND (new.what IN ('start', 'fail') OR {_CHANGES})
        AND id = IIF(new.what = 'start', ({_RUNNING} AND rid IS new.rid), {_NEWEST});

        -- A start begins the run of its rid anew.
        UPDATE heartbeats SET run = NULL, ends_by = NULL
        WHERE new.what = 'start' AND id IN ({_RUNNING} AND rid IS new.rid);
        UPDATE heartbeats SET run = 'open', ends_by = IIF({_WATCHED}, at + new.max_runtime, NULL)
        WHERE new.what = 'start' AND at = new.at AND id = (
            SELECT id FROM heartbeats
            WHERE monitor_id = new.monitor_id AND signal = 'start' AND rid IS new.rid
            ORDER BY id DESC LIMIT 1
        );
        -- An end closes its run, those that began before it with the same rid or with none, and
        -- what has been open for so long that its end will not come.
        UPDATE monitors
        SET last_duration_ms = MAX(0, new.at - (SELECT at FROM heartbeats WHERE id = {_ENDED}))
        WHERE new.what IN ('success', 'fail') AND id = new.monitor_id AND {_ENDED} IS NOT NULL;
        UPDATE heartbeats
        SET duration_ms = MAX(0, new.at - (SELECT at FROM heartbeats WHERE id = {_ENDED}))
        WHERE new.what IN ('success', 'fail') AND {_ENDED} IS NOT NULL
        AND id = {_NEWEST} AND at = new.at AND duration_ms IS NULL;
        UPDATE heartbeats SET run = NULL, ends_by = NULL
        WHERE new.what IN ('success', 'fail') AND EXISTS ({_RUNNING}) AND id IN (
            {_RUNNING} AND (
                (id <= {_ENDED} AND (
                    rid IS NULL OR rid = (SELECT rid FROM heartbeats WHERE id = {_ENDED})
                ))
                OR (at < new.lost_before AND ends_by IS NULL)
            )
        );
        UPDATE heartbeats SET run = 'overdue', ends_by = NULL
        WHERE new.what = 'overran' AND id IN ({_RUNNING} AND ends_by <= new.at);

        -- The state, and what there is to tell of it.
        UPDATE events SET reason = 'failed', heartbeat_id = {_NEWEST}
        WHERE new.what = 'fail' AND {_WATCHED}
        AND (SELECT state FROM monitors WHERE id = new.monitor_id) = 'down'
        AND id = (
            SELECT id FROM events WHERE monitor_id = new.monitor_id AND type = 'down'
            ORDER BY id DESC LIMIT 1
        );
        INSERT INTO events
            (monitor_id, type, at, reason, last_heartbeat_at, down_ms, heartbeat_id)
        SELECT new.monitor_id, t.event, new.at, t.reason, m.received_at,
            IIF(t.event = 'up', MAX(0, new.at - m.since), NULL), {_NEWEST}
        FROM monitors m JOIN transitions t ON t.state = m.state AND t.what = new.what
        WHERE m.id = new.monitor_id AND t.event IS NOT NULL AND {_WATCHED};
        UPDATE monitors
        SET state = t.becomes, since = IIF(monitors.state = t.becomes, since, new.at),
            heard_from = COALESCE(heard_from, new.at),
            received_at = IIF(new.what = 'success', new.at, received_at),
            base_at = IIF(new.what = 'success', new.at, base_at),
            moved = IIF(new.what = 'success', 0, moved), deadline_at = new.deadline_at
        FROM transitions t
        WHERE monitors.id = new.monitor_id AND t.state = monitors.state AND t.what = new.what
        AND {_WATCHED};
        UPDATE monitors SET received_at = new.at
        WHERE new.what = 'success' AND id = new.monitor_id AND NOT {_WATCHED};

        INSERT OR REPLACE INTO throttled
        SELECT new.monitor_id, h.at + new.window
        FROM heartbeats h JOIN monitors m ON m.id = new.monitor_id
        WHERE new.what = 'success' AND h.id = {_NEWEST} AND h.at < new.at
        AND h.at > new.at - new.window AND m.state = 'up' AND m.deadline_at IS NOT NULL
        AND NOT EXISTS ({_RUNNING});
    END;

    CREATE TEMP TRIGGER tell AFTER INSERT ON events BEGIN
        INSERT INTO deliveries (event_id, channel, due_at)
        SELECT new.id, channel, new.at + {DIGEST_WITHIN}
        FROM audience
        WHERE monitor_id = new.monitor_id;
    END;
"""
"""What happens is inserted into the view `happening`: state, event and deliveries follow in the
same transaction (law 4). It is a trigger, so that a batch of pings, or all that is overdue, is
one call of SQLite: each lets go of the interpreter lock, and must win it back from other threads.
"""


def prepare(db: sqlite3.Connection) -> None:
    """Bring the schema up to date, and make what the writer's connection needs of its own."""
    migrate(db)
    db.executescript(PREPARE)
    db.executemany("INSERT INTO transitions VALUES (?, ?, ?, ?, ?)", TRANSITIONS)


@dataclass(frozen=True, slots=True)
class Watched:
    """A monitor of the configuration, as the database knows it."""

    id: int
    token: str
    monitor: Monitor
    above: tuple[int, ...] = ()  # the ids of all monitors that it depends on, directly or not

    def deadline(self, base_at: int) -> int:
        return self.monitor.expectation(base_at) + self.monitor.grace


@dataclass(frozen=True, slots=True)
class Ping:
    """One call to the heartbeat endpoint, as it is kept."""

    signal: str  # success, fail, start or log
    exit_status: int | None = None
    method: str = "GET"
    sender: str | None = None
    user_agent: str | None = None
    rid: str | None = None
    body: str | None = None


_SIZES = (1, 8, 64, BATCH)  # of what is inserted at once: few, so that SQLite knows the statements


def take_pings(db: sqlite3.Connection, pings: Sequence[tuple[Watched, Ping, int]]) -> None:
    """Let them happen, each at its moment, in this order; at most BATCH."""
    values: list[object] = []
    for watched, ping, at in pings:
        monitor = watched.monitor
        lost_before = at - monitor.interval - monitor.grace - (monitor.max_runtime or 0)
        deadline_at = watched.deadline(at) if ping.signal == "success" else None
        values += (
            watched.id, at, ping.signal, monitor.window, monitor.interval, deadline_at,
            monitor.max_runtime, lost_before, ping.exit_status, ping.method, ping.sender,
            ping.user_agent, ping.rid, ping.body,
        )
    size = next(size for size in _SIZES if size >= len(pings))
    values += [None] * (14 * size - len(values))
    row = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    db.execute(f"INSERT INTO happening VALUES {', '.join([row] * size)}", values)


def take_throttled(db: sqlite3.Connection) -> dict[int, int]:
    """Of which monitors, by id, the throttle dropped a success that did nothing else, and until
    when it will.
    """
    found = json.loads(first(db, "SELECT json_group_array(json_array(monitor_id, until)) "
                                 "FROM throttled"))
    if found:
        db.execute("DELETE FROM throttled")
    return dict(found)


def hear(db: sqlite3.Connection, successes: Iterable[tuple[Watched, int]]) -> None:
    """Count the deadlines from successes received at those moments, where one runs."""
    db.executemany("""
        UPDATE monitors
        SET received_at = :at, base_at = :at, moved = 0, deadline_at = :deadline
        WHERE id = :id AND deadline_at IS NOT NULL AND base_at + moved <= :at
        """, [{"id": one.id, "at": at, "deadline": one.deadline(at)} for one, at in successes])


def call_down(db: sqlite3.Connection, until: int) -> int:
    """One down event for each deadline that was missed before a moment, dated at it, and for each
    run that has not ended in time, longest ago first; at most BATCH. Returns how many there were.
    """
    before = db.total_changes
    db.execute("""
        INSERT INTO happening (monitor_id, at, what)
        SELECT * FROM (
            SELECT id, deadline_at AS at, 'missed' FROM monitors WHERE deadline_at < :until
            UNION ALL
            SELECT monitor_id, ends_by, 'overran' FROM heartbeats WHERE ends_by < :until
        )
        ORDER BY at
        LIMIT :limit
        """, {"until": until, "limit": BATCH})
    return db.total_changes - before


# Absences


def leave(
    db: sqlite3.Connection, monitor_id: int, why: str, now: int, until: int | None = None
) -> None:
    """Stop watching a monitor because it is paused, disabled or removed."""
    db.execute(
        "INSERT INTO gaps (monitor_id, why, from_at, to_at, open) VALUES (?, ?, ?, ?, 1)",
        (monitor_id, why, now, until),
    )
    db.execute("UPDATE monitors SET deadline_at = NULL WHERE id = ?", (monitor_id,))
    db.execute("UPDATE heartbeats SET ends_by = NULL WHERE monitor_id = ? AND run IS NOT NULL",
               (monitor_id,))


def come_back(db: sqlite3.Connection, gap: sqlite3.Row, now: int) -> None:
    """End an absence. After a removal the monitor goes on with the time that it had left; after
    any other it has one interval and its grace from now, and counts as up.
    """
    own = {"id": gap["monitor_id"], "gap": gap["id"], "now": now}
    db.execute("UPDATE gaps SET open = 0, to_at = :now WHERE id = :gap", own)
    if gap["why"] == "removed":
        own["away"] = now - gap["from_at"]
        db.execute("UPDATE monitors SET moved = moved + :away WHERE id = :id", own)
        db.execute("UPDATE heartbeats SET moved = moved + :away WHERE monitor_id = :id "
                   "AND run IS NOT NULL", own)
    else:
        db.execute("""
            UPDATE monitors
            SET since = IIF(state = 'up', since, :now), state = 'up', base_at = :now, moved = 0
            WHERE id = :id AND state <> 'pending'
            """, own)
        db.execute("UPDATE heartbeats SET run = 'overdue', ends_by = NULL "
                   "WHERE monitor_id = :id AND run = 'open'", own)


def adopt(db: sqlite3.Connection, config: Config, now: int) -> list[Watched]:
    """Make the database's monitors those of the configuration; no timer starts anew (law 7).

    What is new gets a token and waits for its first ping. What is gone or disabled is not watched
    from now on, and keeps its history. What is back goes on with the time that it had left.
    """
    monitors, known, absent = config.monitors, read_monitors(db), open_gaps(db)
    new = [key for key in monitors if key not in known]
    db.executemany("INSERT INTO monitors (key, name, made_token, since) VALUES (?, ?, ?, ?)",
                   [(key, monitors[key].name, secrets.token_hex(16), now) for key in new])
    known |= read_monitors(db) if new else {}
    for key, row in known.items():
        gaps, monitor = absent.get(row["id"], {}), monitors.get(key)
        if monitor is None:
            if "removed" not in gaps:
                leave(db, row["id"], "removed", now)
            continue
        for why in ("removed", "disabled"):
            if why in gaps and (why == "removed" or monitor.enabled):
                come_back(db, gaps[why], now)
        if not monitor.enabled and "disabled" not in gaps:
            leave(db, row["id"], "disabled", now)
    watched = [
        Watched(known[key]["id"], one.token or known[key]["made_token"], one,
                tuple(known[parent]["id"] for parent in ancestors(monitors, key)))
        for key, one in monitors.items()
    ]
    set_deadlines(db, watched, now)
    db.execute("DELETE FROM audience")
    db.executemany("INSERT INTO audience VALUES (?, ?)",
                   [(one.id, channel) for one in watched for channel in one.monitor.notify])
    db.execute("""
        INSERT INTO deliveries (event_id, channel, due_at)
        SELECT d.event_id, a.channel, d.due_at
        FROM deliveries d JOIN events e ON e.id = d.event_id
        JOIN audience a ON a.monitor_id = e.monitor_id
        WHERE d.channel = '' AND d.state = 'pending'
        """)  # of a database of version 0.1, what had not been told
    db.execute("DELETE FROM deliveries WHERE channel = ''")
    db.execute("DELETE FROM channels WHERE name NOT IN (SELECT value FROM json_each(?))",
               (json.dumps(list(config.channels)),))
    return watched


def set_deadlines(db: sqlite3.Connection, watched: Iterable[Watched], now: int) -> None:
    """Bring names, deadlines, limits and reminders in line with the monitors' settings."""
    known, absent = read_monitors(db), open_gaps(db)
    running = {row[0] for row in db.execute(
        "SELECT DISTINCT monitor_id FROM heartbeats WHERE run IS NOT NULL")}
    changed = []
    for one in watched:
        row, deadline_at = known[one.monitor.key], None
        if one.id not in absent:
            if row["state"] == "up":
                deadline_at = one.deadline(row["base_at"]) + row["moved"]
            if one.id in running:
                db.execute("UPDATE heartbeats SET ends_by = at + moved + ? WHERE monitor_id = ? "
                           "AND run = 'open'", (one.monitor.max_runtime, one.id))
            if row["state"] == "down" and one.monitor.remind:
                plan_reminder(db, one.id, now + one.monitor.remind)
        if (deadline_at, one.monitor.name) != (row["deadline_at"], row["name"]):
            changed.append((deadline_at, one.monitor.name, one.id))
    db.executemany("UPDATE monitors SET deadline_at = ?, name = ? WHERE id = ?", changed)


def plan_reminder(db: sqlite3.Connection, monitor_id: int, at: int) -> None:
    """Where the channels were told that a monitor went down, and nothing is planned."""
    db.execute("""
        UPDATE deliveries
        SET due_at = :at
        WHERE state = 'sent' AND due_at IS NULL AND event_id = (
            SELECT id FROM events WHERE monitor_id = :monitor ORDER BY id DESC LIMIT 1
        )
        """, {"monitor": monitor_id, "at": at})


def pause_or_resume(
    db: sqlite3.Connection, monitor: Monitor, verb: str, span: int | None, now: int
) -> None:
    """Pause a monitor, for `span` milliseconds or until resumed, or resume it; a pause that lasts
    keeps its beginning.

    Raises ValueError for one that larm.toml disables, or that the database does not know yet.
    """
    row = read_monitors(db).get(monitor.key)
    gaps = open_gaps(db).get(row["id"], {}) if row is not None else {}
    if row is None or "removed" in gaps:
        raise ValueError(f"{monitor.key} is not watched yet: start Larm once")
    if not monitor.enabled:
        raise ValueError(f"{monitor.key} is disabled in the file: set enabled = true there")
    until, gap = None if span is None else now + span, gaps.get("paused")
    if gap is None and verb == "pause":
        leave(db, row["id"], "paused", now, until)
    elif gap is not None and verb == "pause":
        db.execute("UPDATE gaps SET to_at = ? WHERE id = ?", (until, gap["id"]))
    elif gap is not None:
        come_back(db, gap, now)
        set_deadlines(db, [Watched(row["id"], "", monitor)], now)


def shift(db: sqlite3.Connection, from_at: int, to_at: int, set_by: int) -> None:
    """Give everything that runs back the time that Larm was away or that the clock was set by.

    Larm was not watching between from_at and to_at; what was heard after from_at lost only the
    rest of that. Then the clock was set by `set_by`, backwards where it is negative.
    """
    span = {"from": from_at, "to": to_at, "set_by": set_by, "sane": SANE}
    for statement in (
        """
        UPDATE monitors
        SET moved = moved + :set_by + IIF(
                deadline_at IS NULL, 0, MAX(0, :to - MAX(:from, base_at + moved))
            ),
            deadline_at = deadline_at + :set_by + MAX(0, :to - MAX(:from, base_at + moved))
        WHERE state = 'up'
        """,
        """
        UPDATE heartbeats
        SET at = at + :set_by, ends_by = ends_by + :set_by + MAX(0, :to - MAX(:from, at)),
            moved = moved + IIF(
                EXISTS (SELECT 1 FROM gaps g WHERE open AND g.monitor_id = heartbeats.monitor_id),
                0, MAX(0, :to - MAX(:from, at))
            )
        WHERE run IS NOT NULL
        """,
        """
        UPDATE gaps
        SET from_at = from_at + :set_by,
            to_at = to_at + :set_by + MAX(0, :to - MAX(:from, from_at))
        WHERE open
        """,
        """
        UPDATE deliveries
        SET due_at = due_at + :set_by + IIF(state = 'sent', :to - :from, 0),
            tried_from = tried_from + :set_by
        WHERE due_at IS NOT NULL
        """,
        """
        UPDATE channels
        SET failing_since = failing_since + :set_by, failed_at = failed_at + :set_by,
            sent_at = sent_at + :set_by
        """,
        "UPDATE messages SET at = at + :set_by",
    ):
        db.execute(statement, {name: span[name] for name in span if f":{name}" in statement})
    if to_at < SANE <= to_at + set_by:  # what a clock that was not set had dated is dated anew
        for table, columns in {"heartbeats": ["at"], "events": ["at"], "gaps": ["from_at", "to_at"],
                               "monitors": ["since", "heard_from", "received_at"]}.items():
            for column in columns:
                db.execute(f"UPDATE {table} SET {column} = {column} + ? WHERE {column} < ?",
                           (set_by, SANE))
    else:
        gaps = {"away": (from_at + set_by, to_at + set_by), "clock": (from_at, from_at + set_by)}
        db.executemany(
            "INSERT INTO gaps (why, from_at, to_at, open) VALUES (?, ?, ?, 0)",
            [(why, start, end) for why, (start, end) in gaps.items() if start != end],
        )


# ======================================================================================
# Intake: token → monitor, the throttle's memory, recording. Knows nothing of HTTP.
# ======================================================================================

ODD_KEPT = 20  # of the odd pings and their senders
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


@dataclass(frozen=True, slots=True)
class OddPing:
    """Pings from one sender that change nothing: with a token that is no monitor's (a typo, or a
    monitor that is gone), or a monitor's with an action that has no meaning.

    Of a token only its first 4 characters: enough to find the typo, too little to be a secret.
    """

    key: str | None  # of the monitor; None: the token is unknown
    text: str  # the token's beginning, or the action
    sender: str
    count: int
    at: int  # of the last one


class Intake:
    """Takes pings: what the throttle would drop is answered from memory, the rest is recorded.

    The memory learns from the writer, after the commit, that a success was dropped and until when
    the next will be; it is silent about a monitor of which something is under way. That a ping came
    is remembered, too, and written by the watcher. `lock` makes one step of dating a ping and
    queueing it, so that the order is that of their times.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.lock = threading.Lock()
        self._store = store
        self._clock = clock
        self._by_token: Mapping[str, Watched] = {}
        self._by_id: Mapping[int, Watched] = {}
        self._until: dict[int, int] = {}  # monitor id -> the throttle's end; monotonic, as below
        self._heard: dict[int, int] = {}  # monitor id -> its last success that is in no database
        self._under_way: dict[int, Write[None]] = {}  # by monitor id, the last write
        self._recorded: Counter[int] = Counter()  # pings by monitor id, since it was pruned
        self._odd: dict[tuple[str | None, str, str], OddPing] = {}  # the newest stands last
        self._answered: Write[None] = Write(nothing, None)
        self._answered.value = None
        self._answered.finish()

    def use(self, watched: Iterable[Watched]) -> None:
        """Take over a configuration's monitors; part of the operation that adopts them."""
        by_id = {one.id: one for one in watched}
        made_last = sorted(by_id.values(), key=lambda one: one.monitor.token is None)
        with self.lock:
            self._by_id = by_id
            self._by_token = {one.token: one for one in made_last}  # nobody takes one Larm made
            self._until.clear()

    def take(self, token: str, action: str, read: Callable[[str, int | None], Ping],
             sender: str) -> Write[None]:
        """The write that the answer to a ping waits for. Raises Unrecordable, whatever the token.

        `read` makes a Ping of (signal, exit status).
        """
        if self._store.failure:
            raise Unrecordable(self._store.failure)
        watched, meaning = self._by_token.get(token), read_signal(action)
        if watched is None or meaning is None:
            self._note_odd(watched.monitor.key if watched else None,
                           action[:20] if watched else token[:4], sender)
            return self.take_nothing()
        ping, id = read(*meaning), watched.id
        with self.lock:
            at, under_way = self._clock.monotonic(), self._under_way.get(id)
            if ping.signal != "success" or at >= self._until.get(id, at) or (
                under_way is not None and not under_way.is_done
            ):
                write = self._store.gather(self._record, (watched, ping, at))
                self._under_way[id] = write
                return write
            self._heard[id] = at
        return self.take_nothing()

    def take_nothing(self) -> Write[None]:
        """While the writer is busy, what need not be recorded waits for it like what must (law 1).
        Raises Unrecordable.
        """
        if self._store.failure:
            raise Unrecordable(self._store.failure)
        return self._store.gather(nothing, None) if self._store.is_busy else self._answered

    def _record(self, db: sqlite3.Connection, received: list[tuple[Watched, Ping, int]]) -> None:
        """The operation."""
        pings = [(self._by_id.get(watched.id, watched), ping, self._clock.at(at))
                 for watched, ping, at in received]
        take_pings(db, pings)
        throttled, zero = take_throttled(db), self._clock.at(0)

        def learn() -> None:
            with self.lock:
                for watched, _, _ in received:
                    self._until.pop(watched.id, None)
                    self._recorded[watched.id] += 1
                self._until |= {id: until - zero for id, until in throttled.items()}

        self._store.after_commit.append(learn)

    def take_heard(self) -> list[tuple[Watched, int]]:
        """The successes that only memory knows, to be written by the operation that asks: the
        memory answers nothing meanwhile, and forgets them after the commit.
        """
        with self.lock:
            self._until.clear()
            self._under_way = {id: write for id, write in self._under_way.items()
                               if not write.is_done}
            heard = dict(self._heard)

        def forget() -> None:
            with self.lock:
                for id, at in heard.items():
                    if self._heard.get(id) == at:
                        del self._heard[id]

        self._store.after_commit.append(forget)
        return [(self._by_id[id], self._clock.at(at)) for id, at in heard.items()
                if id in self._by_id]

    def take_recorded(self, least: int, most: int) -> list[int]:
        """Some monitors of which at least so many pings were recorded since they were named last.
        """
        with self.lock:
            found = [id for id, count in self._recorded.items() if count >= least][:most]
            for id in found:
                del self._recorded[id]
        return found

    def _note_odd(self, key: str | None, text: str, sender: str) -> None:
        with self.lock:
            before = self._odd.pop((key, text, sender), None)
            count = before.count + 1 if before else 1
            self._odd[key, text, sender] = OddPing(key, text, sender, count, self._clock.now())
            if len(self._odd) > ODD_KEPT:
                del self._odd[next(iter(self._odd))]

    def odd_pings(self) -> list[OddPing]:
        """The pings that changed nothing since the start, the newest first."""
        with self.lock:
            return list(self._odd.values())[::-1]


# ======================================================================================
# Watcher: what silence means. One operation a tick, one sleep until the next due moment.
# ======================================================================================

TICK = 1 * SECOND  # the longest sleep between two ticks
GAP = 10 * SECOND  # a tick so late means that Larm was stopped
CLOCK_SET = 5 * SECOND  # a wall clock that moved so far against the monotonic one was set
TRUST_AFTER = 1 * HOUR  # from the start, or after the clock was set, until its date prunes history
PRUNED_A_TICK = 200  # monitors
PRUNED_EVERY = 50  # pings recorded of one monitor
CHECK_EVERY = 1 * MINUTE  # of Larm's own health
LITTLE_SPACE = 50_000_000  # bytes of free disk
LONG_GAP = FAILING_FOR = 1 * HOUR  # of a gap, of a channel that takes nothing
UNRECORDED_FOR = 10 * SECOND

Step = Callable[[sqlite3.Connection, int], None]  # of a tick: the writer's connection, now


class Watcher:
    """Finds missed deadlines and the gaps in its own attention."""

    def __init__(self, store: Store, clock: Clock, intake: Intake, steps: Sequence[Step]) -> None:
        """`steps`: what else is part of each tick."""
        self.caught_up: Callable[[], int] = clock.monotonic  # until when all pings were taken
        self._store = store
        self._clock = clock
        self._intake = intake
        self._steps = steps
        self._watched: Sequence[Watched] = ()
        self._keep = 0
        self._asked = self._ticked = self._alive_written = clock.monotonic()
        self._trusted_from = clock.monotonic() + TRUST_AFTER
        self._unpruned: deque[int] = deque()

    def use(self, watched: Sequence[Watched], keep: int) -> None:
        """Take over a configuration's monitors, and how long history is kept."""
        self._unpruned.extend(one.id for one in watched[: 0 if self._watched else None])
        self._watched, self._keep = watched, keep

    def begin(self) -> None:
        """Account for the time since Larm was last alive; raises Unrecordable.

        Every running deadline keeps the time that it had left (law 5).
        """
        now = self._clock.now()
        last = self._store.last_alive_at()

        def account(db: sqlite3.Connection) -> None:
            if last is not None and now < SANE <= last:  # dated anew once the clock is set
                shift(db, last, last, now - last)
                db.execute("UPDATE gaps SET why = 'away' WHERE to_at = ?", (now,))
            elif last is not None and last != now:
                to_at = max(last, now)  # a clock that is behind was set back, after who knows what
                shift(db, last, to_at, now - to_at)
            write_alive(db, now)

        self._store.submit(account).result(-1)
        self._store.mark_tick(now)
        self._ticked = self._asked = self._clock.monotonic()

    def tick(self, planned: int) -> int:
        """One round; returns the milliseconds to sleep until the next. May raise Unrecordable.

        `planned`: the milliseconds that were meant to pass since the last one.

        1. Where Larm did not watch or the clock was set, write what memory knows of the time
           before, then shift what is running.
        2. Write it, too, when a deadline is due, and every 30 s with the time.
        3. Unless the clock was never set, resume what was paused until now, and call down what has
           missed its deadline: of those before which every ping that had come has been taken.
        4. Take the other steps: alerts, Larm's own health; and prune a little.
        """
        self._asked = self._clock.monotonic()
        if self._store.failure:  # no ping can be taken either: as good as not watching
            raise Unrecordable(self._store.failure)
        with self._intake.lock:  # what was dated before is in the queue before
            until = min(self._clock.monotonic(), self.caught_up())
            write = self._store.submit(lambda db: self._round(db, planned, until))
        return write.result()

    def _round(self, db: sqlite3.Connection, planned: int, until: int) -> int:
        """The operation."""
        monotonic = self._clock.monotonic()
        moved = self._account_for_gaps(db, monotonic, monotonic - self._ticked - planned)
        now, due = self._clock.now(), self._clock.at(until)
        overdue = first(db, "SELECT 1 FROM monitors WHERE deadline_at < :due LIMIT 1", due=due)
        if not moved and (overdue or monotonic - self._alive_written >= ALIVE_EVERY):
            hear(db, self._intake.take_heard())
        if moved or monotonic - self._alive_written >= ALIVE_EVERY:
            write_alive(db, now)  # a crash now must not count the gap again
            self._store.after_commit.append(lambda: setattr(self, "_alive_written", monotonic))
        more = 0
        if now >= SANE:
            self._end_pauses(db, now)
            more = call_down(db, due)
            for step in self._steps:
                step(db, now)
        self._prune(db, now)
        next_at = next_due_at(db, now)

        def note() -> None:
            self._ticked = monotonic
            self._store.mark_tick(now)

        self._store.after_commit.append(note)
        if more >= BATCH:
            return 10
        return TICK if next_at is None else min(TICK, max(next_at + 1 - now, 10))

    def _account_for_gaps(self, db: sqlite3.Connection, monotonic: int, late: int) -> bool:
        """Shift what is running by the time in which nobody watched, or nothing could be written,
        and by what the clock was set by; whether there was any.
        """
        spans = [(start, end) for start, end, _ in self._store.outages]
        gaps = [(monotonic - late, monotonic)] if late > GAP else spans
        drift = self._clock.drift()
        set_by = drift if abs(drift) > CLOCK_SET else 0
        if gaps or set_by:
            hear(db, self._intake.take_heard())
        for start, end in gaps:
            shift(db, self._clock.at(start), self._clock.at(end), 0)
        if set_by:
            now, self._trusted_from = self._clock.now(), monotonic + TRUST_AFTER
            shift(db, now, now, set_by)
            if set_by < 0:  # after a kill behind the commit, a tick of the old time must not be
                self._store.mark_tick(now + set_by)  # what looks newer than alive_at
        offset = self._clock.offset
        self._clock.resync()  # with the shift, so that no ping is dated on the other side of it
        self._store.after_rollback.append(lambda: setattr(self._clock, "offset", offset))

        def tell() -> None:
            del self._store.outages[: len(spans)]
            if gaps:
                away = sum(end - start for start, end in gaps)
                log.warning("Larm did not watch for %s; deadlines moved", format_duration(away))
            if set_by:
                way = f"{'forward' if set_by > 0 else 'back'} by {format_duration(abs(set_by))}"
                log.warning("the clock was set %s; deadlines moved with it", way)

        self._store.after_commit.append(tell)
        return bool(gaps or set_by)

    def _end_pauses(self, db: sqlite3.Connection, now: int) -> None:
        ended = {gap["monitor_id"]: gap for gap in pauses_over(db, now)}
        back = [one for one in self._watched if one.id in ended] if ended else []
        for one in back:
            gap = ended[one.id]
            come_back(db, gap, max(gap["to_at"], now - TICK))
        if back:
            set_deadlines(db, back, now)

    def _prune(self, db: sqlite3.Connection, now: int) -> None:
        due = self._intake.take_recorded(PRUNED_EVERY, PRUNED_A_TICK)
        while self._unpruned and len(due) < 10:  # after a start, all in turn
            due.append(self._unpruned.popleft())
        for monitor_id in due:
            prune_monitor(db, monitor_id)
        if self._clock.monotonic() >= self._trusted_from:
            prune_old(db, now - self._keep, now)

    def end(self) -> None:
        """Write what only memory knows, at a clean stop."""
        now = self._clock.now()

        def write(db: sqlite3.Connection) -> None:
            hear(db, self._intake.take_heard())
            write_alive(db, now)

        with contextlib.suppress(Unrecordable):
            self._store.write(write)
        self._store.mark_tick(now)

    def is_stalled(self) -> bool:
        return self._clock.monotonic() - self._asked > GAP


class Health:
    """Larm's eye on itself: whatever is wrong with it is alerted once, and so is its end."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._checked = clock.monotonic() - CHECK_EVERY
        self._config: Config
        self.mistakes: Sequence[str] = ()  # in the file as it was saved last
        self._mistaken_from = 0  # monotonic

    def use(self, config: Config) -> None:
        self._config = config

    def note_file(self, mistakes: Sequence[str]) -> None:
        """What is wrong with the saved larm.toml: alerted once it has stood for a minute."""
        if bool(mistakes) != bool(self.mistakes):  # the next look is in a minute, or at once
            self._mistaken_from = self._clock.monotonic()
            self._checked = self._mistaken_from - (0 if mistakes else CHECK_EVERY)
        self.mistakes = mistakes

    def check(self, db: sqlite3.Connection, now: int) -> None:
        """A step of the tick: once a minute, and after an outage, report what is wrong or is not
        any more.
        """
        names, monotonic = list(self._config.channels), self._clock.monotonic()
        for start, end, has_failed in self._store.outages:
            if has_failed and end - start >= UNRECORDED_FOR:
                at = now - (monotonic - start)
                report(db, "database", "down", "heartbeats can't be recorded", names, at)
                report(db, "database", "up", "heartbeats are recorded again", names, now)
        if monotonic - self._checked < CHECK_EVERY:
            return
        self._store.after_commit.append(lambda: setattr(self, "_checked", monotonic))
        self._check_file(db, now, names)
        for gap in take_untold_gaps(db, LONG_GAP):
            topic, text = f"gap {gap['id']}", describe_gap(gap, self._config.timezone)
            report(db, topic, "down", text, names, gap["from_at"])
            report(db, topic, "up", f"{text}; every deadline was moved by that", names, now)
        found = os.statvfs(self._config.database.parent)
        free = found.f_bavail * found.f_frsize
        if free < LITTLE_SPACE:
            text = f"the disk is nearly full\nMake room where {self._config.database} is."
            report(db, "disk", "down", text, names, now)
        elif free > LITTLE_SPACE * 1.2:
            report(db, "disk", "up", "the disk has room again", names, now)
        for name, channel in read_channels(db).items():
            since, others = channel["failing_since"], [other for other in names if other != name]
            if since is None:
                report(db, f"channel {name}", "up", f"channel {name} works again", others, now)
            elif channel["failed_at"] - since >= FAILING_FOR:
                text = f"channel {name} has taken no alert for an hour"
                report(db, f"channel {name}", "down", text, others, now)
        for trouble in open_troubles(db):
            name = trouble["topic"].partition("channel ")[2]
            if name and name not in names:
                report(db, trouble["topic"], "up", f"channel {name} is gone", names, now)

    def _check_file(self, db: sqlite3.Connection, now: int, names: Sequence[str]) -> None:
        path = self._config.path
        if not self.mistakes:
            report(db, "file", "up", f"{path} is in force again", names, now)
        elif self._clock.monotonic() - self._mistaken_from >= CHECK_EVERY:
            text = f"{path} has mistakes; the last good one stays in force"
            report(db, "file", "down", "\n".join([text, *self.mistakes[:20]]), names, now)


def describe_gap(gap: sqlite3.Row, zone: tzinfo) -> str:
    from_at, to_at = (iso_local(gap[column], zone) for column in ("from_at", "to_at"))
    return f"Larm itself was not running from {from_at} to {to_at}"


# ======================================================================================
# View: all that is known of a monitor, once, in milliseconds: for people and programs.
# ======================================================================================

STATES = ("down", "late", "up", "pending", "paused")  # the most urgent first
SPANS = {"24h": DAY, "7d": 7 * DAY, "30d": 30 * DAY, "90d": 90 * DAY}
DAYS_SHOWN = 90
OUTPUT_SHOWN = 2_000  # characters of what a job said of its failure
BEATS_READ = 100  # of a monitor, for its rhythm
# Of a monitor that the database does not know yet, as a row of it.
_UNKNOWN: dict[str, Any] = {"id": 0, "state": "pending"} | dict.fromkeys(
    ("made_token", "since", "heard_from", "received_at", "deadline_at", "last_duration_ms"))


class Day(NamedTuple):
    """What became of one day."""

    start: int
    kind: str  # up, down, partly, unwatched (for the most part), none (not heard of yet)
    down: int  # for how long
    watched: int


@dataclass(frozen=True, slots=True)
class View:
    """A monitor as users see it. Moments and durations are milliseconds."""

    monitor: Monitor
    token: str | None  # None: the database does not know it yet
    state: str  # one of STATES
    since: int | None  # of the state
    received_at: int | None  # the last success
    expected_at: int | None  # the next one; this and the deadline only where one runs
    deadline_at: int | None
    running_since: int | None
    last_duration: int | None
    heard_from: int | None  # when its first ping came
    resumes_at: int | None  # the end of a timed pause
    reason: str | None  # why it is down: missed, failed, overran
    exit_status: int | None
    output: str  # the end of what the job said of it
    waits_for: str | None  # what its alert waits for
    uptime: Mapping[str, float | None]  # percent in the last 24h, 7d, 30d, 90d
    first_day: float | None  # percent since heard_from, before there is a figure of 24h
    days: tuple[Day, ...]  # the last ones, today the last

    def to_json(self, config: Config, viewer: bool) -> dict[str, Any]:
        """As interface.md has it; to others than viewers without what is theirs alone."""
        monitor = self.monitor
        return {
            "id": monitor.key,
            "name": monitor.name,
            "check_type": "heartbeat",
            "enabled": monitor.enabled,
            "state": self.state,
            "since": iso_or_none(self.since),
            "running": self.running_since is not None,
            "interval_seconds": seconds(monitor.interval),
            "schedule": monitor.schedule.expression if monitor.schedule else None,
            "timezone": monitor.schedule.zone_name if monitor.schedule else None,
            "grace_seconds": seconds(monitor.grace),
            "last_heartbeat_at": iso_or_none(self.received_at),
            "last_duration_ms": self.last_duration,
            "expected_at": iso_or_none(self.expected_at),
            "deadline_at": iso_or_none(self.deadline_at),
            "uptime": self.uptime,
            "channels": list(monitor.notify) if viewer else [],
            "note": monitor.note if viewer else None,
            "ping_url": config.ping_url(self.token) if viewer and self.token else None,
        }


def iso_or_none(at: int | None) -> str | None:
    return None if at is None else iso_utc(at)


def seconds(ms: int | None) -> int | float | None:
    if ms is None:
        return None
    return ms // SECOND if ms % SECOND == 0 else ms / SECOND


def read_views(
    db: sqlite3.Connection | None,
    config: Config,
    now: int,
    keys: Iterable[str] | None = None,
    history: bool = True,
) -> list[View]:
    """The configuration's monitors, in its order, or the named ones; `db`: None before the first
    start; `history`: with figures of uptime and days.
    """
    start = now - 90 * DAY
    known = read_monitors(db) if db else {}
    changes = state_changes(db, start) if db and history else {}
    gaps = gaps_since(db, start) if db else {}
    why = causes(db) if db else {}
    running = dict(db.execute(
        "SELECT monitor_id, MIN(at) FROM heartbeats WHERE run IS NOT NULL GROUP BY monitor_id"
    ).fetchall()) if db else {}
    days = midnights(config.timezone, DAYS_SHOWN, now) if history else []
    found = []
    for key in config.monitors if keys is None else keys:
        row = known.get(key, _UNKNOWN)
        own = gaps.get(row["id"], [])
        past = _look_back(
            row["heard_from"], now - config.keep, now, days, gaps.get(None, []) + own,
            _down_spans(changes.get(row["id"], ()), own, now),
        )
        found.append(_view(config.monitors[key], row, [gap for gap in own if gap["open"]],
                           why.get(row["id"]), running.get(row["id"]), now, past))
    return found


def _view(
    monitor: Monitor, row: Any, absences: Sequence[sqlite3.Row], cause: sqlite3.Row | None,
    running_since: int | None, now: int,
    past: tuple[Mapping[str, float | None], float | None, tuple[Day, ...]],
) -> View:
    state, since, deadline_at = row["state"], row["since"], row["deadline_at"]
    expected_at = None if deadline_at is None else deadline_at - monitor.grace
    if absences:
        state, since = "paused", min(gap["from_at"] for gap in absences)
    elif not monitor.enabled:
        state = "paused"
    elif expected_at is not None and expected_at < now:
        state, since = "late", expected_at
    down = cause if state == "down" else None
    return View(
        monitor=monitor,
        token=monitor.token or row["made_token"],
        state=state,
        since=since,
        received_at=row["received_at"],
        expected_at=expected_at,
        deadline_at=deadline_at,
        running_since=running_since,
        last_duration=row["last_duration_ms"],
        heard_from=row["heard_from"],
        resumes_at=next((gap["to_at"] for gap in absences if gap["why"] == "paused"), None),
        reason=down["reason"] if down else None,
        exit_status=down["exit_status"] if down else None,
        output=(down["body"] or "")[-OUTPUT_SHOWN:] if down else "",
        waits_for=(down["waits"] or "").removeprefix(HELD) or None if down else None,
        uptime=past[0],
        first_day=past[1],
        days=past[2],
    )


def _down_spans(
    changes: Iterable[sqlite3.Row], gaps: Iterable[sqlite3.Row], now: int
) -> list[tuple[int, int]]:
    """When (from, to) a monitor was down; the end of a pause ends that."""
    ends = [(gap["to_at"], "up") for gap in gaps
            if gap["why"] in ("paused", "disabled") and not gap["open"]]
    down: list[tuple[int, int]] = []
    went_down: int | None = None
    for at, type in [*sorted([*ends, *((one["at"], one["type"]) for one in changes)]), (now, "up")]:
        if type == "up" and went_down is not None:
            down.append((went_down, at))
        went_down = None if type == "up" else at if went_down is None else went_down
    return down


def _look_back(
    heard_from: int | None, kept_from: int, now: int, midnights: Sequence[int],
    gaps: Iterable[sqlite3.Row], down_spans: list[tuple[int, int]],
) -> tuple[dict[str, float | None], float | None, tuple[Day, ...]]:
    """What a View says of the past: uptime, first_day and days."""
    known_from = now if heard_from is None else max(heard_from, kept_from)
    away = [(gap["from_at"], now if gap["open"] else gap["to_at"]) for gap in gaps]
    gone = _coverage(away)
    lost = _coverage(away + down_spans) if down_spans else gone

    def watched_and_down(start: int, end: int) -> tuple[int, int]:
        unwatched = gone(start, end)
        return end - start - unwatched, lost(start, end) - unwatched

    def share_up(start: int) -> float | None:
        """Percent of the time since; None where it is not known, or it was never watched."""
        watched, down = watched_and_down(start, now)
        return round(100 * (1 - down / watched), 2) if start >= known_from and watched > 0 else None

    def day(start: int, end: int) -> Day:
        begin, end = max(start, known_from), min(end, now)
        if begin >= end:
            return Day(start, "none", 0, 0)
        watched, down = watched_and_down(begin, end)
        kind = "unwatched" if 2 * watched < end - begin else "up"
        if down > 0:
            kind = "partly" if down < watched else "down"
        return Day(start, kind, down, watched)

    first_day = None if heard_from is None or now - heard_from >= DAY else share_up(known_from)
    return ({name: share_up(now - span) for name, span in SPANS.items()}, first_day,
            tuple(itertools.starmap(day, itertools.pairwise(midnights))))


def _coverage(spans: Iterable[tuple[int, int]]) -> Callable[[int, int], int]:
    """A function of two moments: how much of the time between them the spans cover together."""
    apart: list[tuple[int, int]] = []  # the same, without what an earlier one covers
    for start, end in sorted(spans):
        start = max(start, apart[-1][1]) if apart else start
        if end > start:
            apart.append((start, end))
    if not apart:
        return lambda _start, _end: 0

    def covered(start: int, end: int) -> int:
        from_place = max(0, bisect.bisect(apart, (start,)) - 1)
        return sum(max(0, min(end, to_at) - max(start, from_at))
                   for from_at, to_at in apart[from_place : bisect.bisect(apart, (end,))])

    return covered


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way to a channel."""

    channel: str
    state: str  # pending, sent, failed
    attempts: int
    at: int | None  # of the last attempt
    error: str | None  # why it failed, or waits


@dataclass(frozen=True, slots=True)
class Event:
    """A monitor went down or came up."""

    id: int
    key: str
    name: str
    type: str  # down, up
    at: int
    reason: str | None
    exit_status: int | None
    last_heartbeat_at: int | None
    down: int | None  # for how long it was
    deliveries: tuple[Delivery, ...]

    def to_json(self, viewer: bool) -> dict[str, Any]:
        return {
            "id": self.id,
            "monitor": self.key,
            "type": self.type,
            "at": iso_utc(self.at),
            "reason": self.reason,
            "last_heartbeat_at": iso_or_none(self.last_heartbeat_at),
            "down_seconds": seconds(self.down),
            "deliveries": [dataclasses.asdict(one) | {"at": iso_or_none(one.at)}
                           for one in self.deliveries if viewer],
        }


def read_events(
    db: sqlite3.Connection, limit: int, before: int | None = None, monitor_id: int | None = None
) -> list[Event]:
    """The events of a monitor, or of all, newest first."""
    found = list_events(db, limit, before, monitor_id)
    deliveries = deliveries_of(db, [row["id"] for row in found])
    return [
        Event(
            row["id"], row["key"], row["name"], row["type"], row["at"], row["reason"],
            row["exit_status"], row["last_heartbeat_at"], row["down_ms"],
            tuple(Delivery(*(one[name] for name in Delivery.__slots__))
                  for one in deliveries.get(row["id"], ())),
        )
        for row in found
    ]


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a job as its heartbeats tell it: a start and its end are one."""

    id: int
    at: int  # of the end; of the start while it runs
    signal: str  # success, fail, log; start: it runs, or its end never came
    exit_status: int | None
    duration: int | None
    sender: str | None
    user_agent: str | None
    rid: str | None
    body: str | None


def read_runs(beats: Iterable[sqlite3.Row]) -> list[Run]:
    """`beats`: heartbeats of one monitor, newest first. The start of a run that has ended, or began
    anew, is no run of its own.
    """
    return [
        Run(row["id"], row["at"], row["signal"], row["exit_status"], row["duration_ms"],
            row["sender"], row["user_agent"], row["rid"], row["body"])
        for row in beats if row["signal"] != "start" or row["run"]
    ]


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How a monitor's last heartbeats came, and a line of advice where the settings do not fit."""

    apart: str | None  # "1 d typically, 23 h 58 min to 1 d 2 min"
    lasted: str | None
    advice: str | None


def read_rhythm(monitor: Monitor, beats: Sequence[sqlite3.Row]) -> Rhythm:
    """`beats`: the newest heartbeats, newest first."""
    times = sorted(row["at"] for row in beats if row["signal"] == "success")
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    lasted = sorted(row["duration_ms"] for row in beats if row["duration_ms"] is not None)
    advice = _advise(monitor, times, gaps) if len(gaps) >= 3 else None
    return Rhythm(_spread(gaps), _spread(lasted), advice)


def _spread(durations: Sequence[int]) -> str | None:
    """`durations`: the shortest first."""
    if not durations:
        return None
    shortest, typical, longest = (format_duration(durations[place])
                                  for place in (0, len(durations) // 2, -1))
    return f"{typical} typically, {shortest} to {longest}"


def _advise(monitor: Monitor, times: Sequence[int], gaps: Sequence[int]) -> str | None:
    typical = gaps[len(gaps) // 2]
    late = [gap - monitor.interval for gap in gaps]
    if monitor.schedule is None and not 0.5 < typical / monitor.interval < 1.1:
        return (f"{format_duration(monitor.interval)} is not how often they come: "
                f'try interval = "{_setting(typical)}"')
    if monitor.schedule is not None:
        start = times[0] - max(gaps[-1], monitor.interval)
        due = monitor.schedule.next_after(start, (times[-1] - start) // monitor.interval + 2)
        early = min(monitor.grace, monitor.interval // 10)
        late = sorted(at - due[bisect.bisect(due, at + early) - 1] for at in times if due[0] <= at)
        off = round(late[len(late) // 2] / (30 * MINUTE)) * 30 * MINUTE if late else 0
        if off and late[-1] - late[0] <= 10 * MINUTE and abs(late[0] - off) <= 5 * MINUTE:
            off -= monitor.interval if off > monitor.interval // 2 else 0
            way = "after" if off > 0 else "before"
            return f"they come exactly {format_duration(abs(off))} {way} the schedule: timezone?"
    usual = [ms for ms in late if ms < monitor.interval // 2]  # more than that was an outage
    if usual and max(usual) > monitor.grace:
        grace = format_duration(monitor.grace) if monitor.grace else "0"
        return (f"they come up to {format_duration(max(usual))} late; a grace of {grace} will "
                f'alert: try grace = "{_setting(max(usual) * 1.1)}"')
    return None


def _setting(ms: float) -> str:
    """The next round duration, as larm.toml has it."""
    rounds = ("10s", "30s", "1m", "2m", "5m", "10m", "15m", "30m", "1h", "2h", "3h", "6h", "12h",
              "1d", "2d", "3d", "1w", "2w", "31d")
    return next((text for text in rounds if parse_duration(text) >= ms * 0.98), "366d")


def describe_rhythm(monitor: Monitor) -> str:
    """When a job is due, for people: "every 1 d, with 30 min grace"."""
    if monitor.schedule:
        due = f"{monitor.schedule.in_words} ({monitor.schedule.zone_name or 'local time'})"
    else:
        due = f"every {format_duration(monitor.interval)}"
    return f"{due}, with {format_duration(monitor.grace) if monitor.grace else 'no'} grace"


def describe_cause(reason: str | None, exit_status: int | None, limit: int | None = None) -> str:
    """Why a monitor went down."""
    if reason == "failed" and exit_status is not None:
        return f"exit status {exit_status}"
    return {"missed": "no heartbeat came in time", "failed": "the job reported a failure",
            "overran": f"a run has not ended within {format_duration(limit) if limit else 'time'}",
            }.get(reason or "", "unknown why")


# ======================================================================================
# Notifier: the outbox. What is due is judged, told and tried again. Only it imports apprise.
# ======================================================================================

PAUSES = (10 * SECOND, 30 * SECOND, MINUTE, 5 * MINUTE, 15 * MINUTE, HOUR)
GIVE_UP_AFTER = 3 * DAY  # of trying to send an alert
ATTEMPT_WITHIN = 1 * MINUTE  # what takes longer has failed, whatever its thread still does
HANGING = 3  # threads of a channel that may be left behind so, before it is tried no more
MESSAGES_AN_HOUR = 6  # about one monitor; beyond that one that counts
VERDICT_WITHIN = 5 * MINUTE  # a missed deadline waits for that of a monitor it depends on
LOOK_AGAIN = 10 * SECOND  # at a monitor that another one's alert waits for
LIMITED = "too many messages: the next one comes an hour after the last"
LISTED = 20  # alerts that one message describes, dependents that it names; the others it counts
NAME_SHOWN = 200  # characters
# Services that format text: between fences nothing is formatted, and nobody called.
FENCED = {"discord", "slack", "mmost", "mmosts", "rocket", "rockets", "zulip", "wxteams", "webex",
          "msteams", "guilded", "revolt", "matrix", "matrixs"}


def accepts(url: str) -> str | None:
    """What is wrong with a channel's URL, in words that don't show it; None: nothing."""
    import apprise

    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if not scheme:
        return "is not an Apprise URL: it must begin with a service, such as ntfy://"
    try:
        if apprise.Apprise().add(url):
            return None
    except Exception:  # its text may hold the URL
        log.debug("Apprise failed on a URL")
    return (f"Apprise does not accept this {scheme[1]}:// URL: a part of it is wrong, or Apprise "
            f"knows no service {scheme[1]}://")


def mask(text: str, urls: Iterable[str]) -> str:
    """`text` on one line and without what is secret in the URLs, percent-encoded or not."""
    for url in urls:
        rest = url.partition("://")[2]
        host = re.split(r"[/?#]", rest)[0].rpartition("@")[2].partition(":")[0]
        parts = set(re.split(r"[/@:?&=#,;+]+", rest))
        if "." in host or host == "localhost":
            parts.discard(host)
        parts |= {
            encode(unquote(part))
            for part in parts for encode in (str, quote, partial(quote, safe=""), quote_plus)
        }
        for part in sorted(parts, key=len, reverse=True):
            if len(part) >= 4:
                text = re.sub(re.escape(part), "***", text, flags=re.IGNORECASE)
    text = re.sub(r"\b([a-z][a-z0-9+.-]*)://\S+", r"\1://***", text, flags=re.IGNORECASE)
    return " ".join(text.split())[:300]


def send(urls: Sequence[str], title: str, body: str, kind: str) -> str | None:
    """Send one message through a channel; None once Apprise says it was accepted, else why not.

    `kind` is one of Apprise's types: failure, success, warning, info.
    """
    import apprise

    own, logged, errors = threading.get_ident(), io.StringIO(), []
    handler = logging.StreamHandler(logged)  # of why it fails Apprise says no more than its log
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: record.thread == own)
    logging.getLogger("apprise").addHandler(handler)
    try:
        asset = apprise.AppriseAsset(async_mode=False, app_id="Larm", app_desc="Larm")
        sender = apprise.Apprise(asset=asset)
        for url in urls:
            if (service := apprise.Apprise.instantiate(url, asset=asset)) is None:
                raise ValueError("Apprise does not accept the channel's URL")
            if "overflow=" not in url:  # what is too long for a service comes in parts
                service.overflow_mode = apprise.OverflowMode.SPLIT
            sender.add(service)
        result = sender.notify(body=body, title=title, notify_type=kind, body_format="text")
        if result:  # a bool, or None for nothing sent; since Apprise 2 an object like a bool
            return None
        errors += [entry.message for entry in result.logs()] if hasattr(result, "logs") else []
    except (Exception, SystemExit) as error:  # a plugin of Apprise's may raise anything
        errors.append(f"{type(error).__name__}: {error}")
    finally:
        logging.getLogger("apprise").removeHandler(handler)
    errors = [*logged.getvalue().splitlines(), *errors]
    return mask("; ".join(dict.fromkeys(errors)) or "the service did not accept it", urls)


def send_test(config: Config, channel: str) -> str | None:
    """Send a test alert through a channel; None once it was accepted, else why not."""
    text = f"If you can read this, alerts reach you here.\n{config.url}/"
    return send(config.channels[channel], "Test alert from Larm", text, "info")


_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, and moving the cursor
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links and the like
    r"|\x1b[ -/]*[0-~]"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def plain(text: str) -> str:
    """Text as a terminal would leave it there, without what steers it or turns its direction."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            first, *others = (_CONTROLS.sub("", one) for one in re.split(r"\x1b\[[02]?K", part))
            shown = "".join([first, *others]) if others else first + shown[len(first) :]
        lines.append(shown)
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Alert:
    """What one channel is told about one monitor, or one trouble of Larm's: of its events the
    untold ones, or again the newest.
    """

    rows: Sequence[sqlite3.Row]  # deliveries, oldest first, with their events and monitor

    @property
    def newest(self) -> sqlite3.Row:
        return self.rows[-1]

    @property
    def downs(self) -> list[sqlite3.Row]:
        return [row for row in self.rows if row["type"] == "down"]

    @property
    def label(self) -> str:
        if self.newest["key"] is None:
            return "LARM"
        return "STILL DOWN" if self.newest["state"] == "sent" else str(self.newest["type"]).upper()

    @property
    def subject(self) -> str:
        """The name of the monitor, or what it says of Larm."""
        return plain(self.newest["name"] or self.newest["text"].partition("\n")[0])[:NAME_SHOWN]


class Composer:
    """Writes the messages of one moment for one Apprise URL."""

    def __init__(self, config: Config, gaps: Iterable[sqlite3.Row], now: int, url: str) -> None:
        """`gaps`: Larm's, since before the alerts' heartbeats."""
        self._config, self._now = config, now
        self._gaps = [gap for gap in gaps if gap["why"] == "away"
                      and gap["to_at"] - gap["from_at"] > GAP]
        self._scheme = url.partition("://")[0].lower()
        self._room = 1_000  # bytes
        self._convert: Callable[[str], str] = str
        self._fences: list[str] = []
        with contextlib.suppress(Exception):  # of a URL that send() complains of, or a new Apprise
            service: Any = importlib.import_module("apprise").Apprise.instantiate(url)
            # A server of ntfy's refuses over 4,096 bytes, though Apprise thinks that it takes more.
            self._room = 3_900 if self._scheme in ("ntfy", "ntfys") else service.body_maxlen
            self._room -= NAME_SHOWN if service.title_maxlen <= 0 else 0
            format = service.notify_format
            if hasattr(service, "resolve_format"):  # since Apprise 2 a service takes several
                format = service.resolve_format("text")
            format = str(getattr(format, "value", format))
            self._fences = ["```"] if self._scheme in FENCED and format == "text" else []
            convert = importlib.import_module("apprise.conversion").convert_between
            self._convert = partial(convert, "text", format)

    def _size(self, text: str) -> int:
        """Bytes that a text takes in what is sent."""
        if self._scheme in ("ntfy", "ntfys"):  # it reads 2 x 4,096 bytes of JSON, much escaped
            return max(len(text.encode()), len(json.dumps(text)) // 2)
        return len(self._convert(text).encode())

    def compose(self, alerts: Sequence[Alert]) -> tuple[str, str, str]:
        """One message of a channel's alerts: its title, text and kind.

        It keeps to the room that there is: the first are described, the others named, and of what
        is left the message says how many there are and where.
        """
        names: dict[str, list[str]] = defaultdict(list)
        for alert in alerts:
            names[alert.label].append(alert.subject)
        title = ", ".join(
            f"{label}: {found[0] if len(found) == 1 else counted(len(found), noun)}"
            for label, found in sorted(names.items())
            for noun in ("notice" if label == "LARM" else "monitor",)
        )
        is_bad = any(one.label == "STILL DOWN" or (one.label == "LARM" and one.downs)
                     for one in alerts)
        kind = "failure" if "DOWN" in names else "warning" if is_bad else "success"
        if len(alerts) == 1:
            return title, self._describe(alerts[0], self._room), kind
        text = ""
        for number, alert in enumerate(alerts):
            rest = f"\n\nAnd {len(alerts) - number} more: {self._config.url}/"
            left = self._room - self._size(text + rest) - 12  # for line ends
            forms = [self._describe(alert, left)] if number < LISTED else []
            forms.append(f"{alert.label}: {alert.subject}")
            told = next((form for form in forms if self._size(form) <= left), None)
            if told is None:
                text += rest
                break
            text += ("\n" if number > LISTED else "\n\n" if text else "") + told
        return title, text, kind

    def _describe(self, alert: Alert, room: int) -> str:
        """What happened and when, what was expected, what the job said, and where to look."""
        row = alert.newest
        monitor = self._config.monitors.get(row["key"])
        lines = [self._headline(alert, monitor)]
        if row["key"] and row["type"] == "down":
            lines += self._circumstances(row, monitor)
        is_tried = any((one["tried_from"] or self._now) < self._now - 10 * MINUTE
                       for one in alert.rows)
        was_off = any(gap["from_at"] >= row["event_at"] for gap in self._gaps)
        if is_tried or (was_off and alert.label in ("DOWN", "UP")):
            lines.append("This alert is late: it could not be delivered before.")
        more = [plain(monitor.note)[:1_000]] if monitor and monitor.note else []
        more.append(f"{self._config.url}/" + (f"monitor/{row['key']}" if row["key"] else ""))
        output = plain(row["body"] or "").strip().splitlines() if row["type"] == "down" else []
        # A space of no width stands behind whatever would call people or begin a link.
        said = [re.sub(r"(?<![\w.])@(?=\w)|<(?=[@!#])|\](?=\()|`(?=``)", "\\g<0>\u200b", line[:300])
                for line in output[-10:]]
        while said:
            full = "\n".join([*lines, "Output:", *self._fences, *said, *self._fences, *more])
            if self._size(full) <= room:
                return full
            del said[0]
        return "\n".join([*lines, *more])

    def _circumstances(self, row: sqlite3.Row, monitor: Monitor | None) -> list[str]:
        """What was heard last, what was expected, and what else is known of a job that is down."""
        zone, at, last = self._config.timezone, row["event_at"], row["last_heartbeat_at"]
        lines = []
        if last is not None and at - last >= SECOND:
            lines.append(f"Last heartbeat: {iso_local(last, zone)}, {format_duration(at - last)} "
                         "before.")
        if row["reason"] == "missed":
            lines += [f"Expected: {describe_rhythm(monitor)}."] if monitor else []
            if (row["running_since"] or 0) > (last or 0):
                since = iso_local(row["running_since"], zone)
                lines.append(f"It started {since} and has not ended yet.")
            elif row["running_since"] is not None:
                lines.append("It did not start.")
            lines += [
                f"{describe_gap(gap, zone)}, when this heartbeat may have come."
                for gap in self._gaps
                if last is not None and last < gap["to_at"] and gap["from_at"] < at
            ]
        names = [plain(one.name)[:NAME_SHOWN] for one in self._config.monitors.values()
                 if row["key"] in ancestors(self._config.monitors, one.key)]
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            verb = "depends" if len(names) == 1 else "depend"
            lines.append(f"{counted(len(names), 'monitor')} {verb} on it: "
                         f"{', '.join(names[:LISTED])}{more}.")
        return lines

    def _headline(self, alert: Alert, monitor: Monitor | None) -> str:
        """What has happened to a monitor, or to Larm, and when."""
        row, name, zone = alert.newest, alert.subject, self._config.timezone
        at = iso_local(row["event_at"], zone)
        when = f"{at}, {far_from(row['event_at'], self._now)}"
        if row["key"] is None:
            return f"Larm: {plain(row['text'])} ({when})."
        start = iso_local(alert.downs[0]["event_at"], zone) if alert.downs else ""
        lasted = format_duration(row["down_ms"] or 0)
        limit = monitor.max_runtime if monitor else None
        why = describe_cause(row["reason"], row["exit_status"], limit)
        if len(alert.rows) > 2:
            now = f"down now: {why}" if row["type"] == "down" else "up now"
            return (f"{name} went down {counted(len(alert.downs), 'time')} from {start} to {at}, "
                    f"{now}.")
        if row["type"] == "up":
            if start:
                return f"{name} was down from {start} to {at}, for {lasted}, and is up again."
            return f"{name} is up again, after {lasted} down ({when})."
        why = f"no heartbeat by {when}" if row["reason"] == "missed" else f"{why} ({when})"
        if alert.label == "STILL DOWN":
            lasted = format_duration(self._now - row["event_at"])
            return f"{name} is still down, for {lasted}: {why}."
        return f"{name} is down: {why}."


def describe_channel(row: sqlite3.Row | None, zone: tzinfo, now: int) -> str:
    """What became of the last alerts to a channel, as read_channels() gives it."""
    if row is None:
        return "nothing sent yet"
    found = [
        f"{what} {iso_local(row[column], zone)[:19]} ({far_from(row[column], now)})"
        for column, what in (("sent_at", "last sent"), ("failed_at", "last failed"))
        if row[column] is not None
    ]
    found += [str(row["error"])] if row["failing_since"] is not None else []
    found += [f"{counted(row['pending'], 'alert')} waiting"] if row["pending"] else []
    return "; ".join(found)


@dataclass
class Attempt:
    """A message on its way to a channel, in a thread of its own."""

    channel: str
    urls: tuple[str, ...]
    alerts: Sequence[Alert]
    started: int  # monotonic
    thread: threading.Thread = field(default_factory=threading.Thread)
    state: str = "under way"  # sent: that is being noted; given up: it hangs


class Notifier:
    """Sends what is due, one message at a time to each channel.

    A delivery is sent at least once: it stays pending until its channel has accepted it and that
    is on disk (law 6). Its pauses grow for 3 days, then it has failed.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._config: Config
        self._by_id: Mapping[int, Watched] = {}
        self._planned: list[Attempt] = []
        self._attempts: list[Attempt] = []
        # What some of a channel's URLs have accepted and others not: URL, delivery.
        self._accepted: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self._warning: dict[str, threading.Thread] = {}
        self.tries: Counter[tuple[str, str]] = Counter()  # since the start, by channel and result
        self._stopping = threading.Event()

    def use(self, config: Config, watched: Iterable[Watched]) -> None:
        """Take over a configuration; part of the operation that adopts it."""
        self._config, self._by_id = config, {one.id: one for one in watched}

    # Judging: a step of the tick

    def plan(self, db: sqlite3.Connection, now: int) -> None:
        """Give up on what takes too long, and judge what is due by now: it is sent, or due later,
        or not to be told any more.
        """
        monotonic, urls = self._clock.monotonic(), self._config.channels
        self._attempts = [one for one in self._attempts if one.thread.is_alive()]
        for one in self._attempts:
            is_slow = monotonic - one.started > ATTEMPT_WITHIN
            if one.state == "under way" and (is_slow or one.urls != urls.get(one.channel)):
                one.state = "given up"
                self._note(db, one, f"no answer within {format_duration(ATTEMPT_WITHIN)}")
        under_way = {one.channel for one in self._attempts if one.state != "given up"}
        planned = []
        for [channel] in rows(db, "SELECT DISTINCT channel FROM deliveries WHERE due_at <= :now",
                              now=now):
            is_gone = channel not in urls
            put_off(db, rows(db, """
                SELECT id
                FROM deliveries
                WHERE channel = :channel AND due_at NOTNULL
                AND (:is_gone OR (state = 'pending' AND tried_from < :long_ago))
                """, channel=channel, is_gone=is_gone, long_ago=now - GIVE_UP_AFTER),
                None, "the channel is not in larm.toml any more" if is_gone else None)
            if is_gone or channel in under_way:
                continue
            alerts = self._judge_channel(db, channel, now)
            attempt = Attempt(channel, urls[channel], alerts, monotonic)
            if alerts and [one.urls for one in self._attempts].count(attempt.urls) >= HANGING:
                self._note(db, attempt, f"{HANGING} attempts before this one still hang")
            elif alerts:
                planned.append(attempt)
        self._store.after_commit.append(lambda: setattr(self, "_planned", planned))

    def _judge_channel(self, db: sqlite3.Connection, channel: str, now: int) -> list[Alert]:
        """The channel's alerts that make one message now: all that came within 3 s, and all that
        could not be sent before, so that their order is kept.
        """
        groups: dict[object, list[sqlite3.Row]] = defaultdict(list)
        for row in rows(db, """
            SELECT d.*, e.monitor_id, e.type, e.at AS event_at, e.reason, e.last_heartbeat_at,
                e.down_ms, e.topic, e.text, m.key, m.name, m.received_at, h.body, h.exit_status,
                (SELECT IIF(run NOTNULL, at, 0) FROM heartbeats WHERE monitor_id = m.id
                    AND signal = 'start' ORDER BY id DESC LIMIT 1) AS running_since,  -- 0: ended
                m.state = 'down' AND e.id = (SELECT MAX(id) FROM events WHERE monitor_id = m.id)
                    AND NOT EXISTS (SELECT 1 FROM gaps WHERE open AND monitor_id = m.id)
                    AS is_still_down
            FROM deliveries d
            JOIN events e ON e.id = d.event_id
            LEFT JOIN monitors m ON m.id = e.monitor_id
            LEFT JOIN heartbeats h ON h.id = e.heartbeat_id
            WHERE d.channel = :channel AND (
                d.due_at <= :soon OR d.tried_from NOTNULL
                OR (d.state = 'pending' AND e.monitor_id IN (
                    SELECT monitor_id
                    FROM deliveries due JOIN events ON events.id = due.event_id
                    WHERE due.channel = :channel AND due.due_at <= :soon
                ))
            )
            ORDER BY d.id
            LIMIT :limit
            """, channel=channel, soon=now + DIGEST_WITHIN, limit=BATCH):
            groups[row["topic"] or row["monitor_id"]].append(row)
        alerts = []
        for group in groups.values():
            watched, newest = self._by_id.get(group[-1]["monitor_id"]), group[-1]
            told = [row for row in group if row["state"] == "pending"]
            if not told and watched and watched.monitor.remind and newest["is_still_down"]:
                told = [newest]
            # No reminder comes beside news, nor of what is over.
            put_off(db, [row for row in group if row not in told], None, None)
            waits = self._waits(db, watched, told, channel, now) if told and watched else None
            if waits is not None:
                put_off(db, told, *waits)
            elif told:
                alerts.append(Alert(told))
        is_due = any(row["due_at"] <= now for alert in alerts for row in alert.rows)
        return sorted(alerts, key=lambda alert: alert.newest["id"]) if is_due else []

    def _waits(
        self, db: sqlite3.Connection, watched: Watched, told: Sequence[sqlite3.Row], channel: str,
        now: int,
    ) -> tuple[int | None, str] | None:
        """(until when, why) news about a monitor is not told yet; None, why: it never will be."""
        oldest, newest = told[0], told[-1]
        if newest["type"] == "down":
            if held := self._held(db, watched, newest, now):
                return held
        elif oldest["type"] == "down" and oldest["tried_from"] is None:
            _, why = self._held(db, watched, oldest, now) or (0, "")
            if why.startswith(HELD) or (oldest["error"] or "").startswith(HELD):
                return None, "withdrawn: it came up again with what it depends on"
        local = datetime.fromtimestamp(now // SECOND, self._config.timezone)
        clock = local.hour * HOUR + local.minute * MINUTE + local.second * SECOND + now % SECOND
        for start, end in watched.monitor.quiet:
            if (clock - start) % DAY < ((end - start) % DAY or DAY):
                left = min((end - clock) % DAY or DAY, MINUTE)  # the hours may be changed
                return now + left, f"quiet until {end // HOUR:02}:{end % HOUR // MINUTE:02}"
        [sent] = rows(db, """
            SELECT COUNT(*) AS messages, MAX(at) AS at, limited  -- that of the last one
            FROM messages
            WHERE monitor_id = :id AND channel = :channel AND at > :since
            """, id=watched.id, channel=channel, since=now - HOUR)
        most = MESSAGES_AN_HOUR - (newest["state"] == "sent")  # a reminder keeps no news waiting
        if sent["messages"] >= most or sent["limited"]:
            return sent["at"] + HOUR, LIMITED
        return None

    def _held(
        self, db: sqlite3.Connection, watched: Watched, event: sqlite3.Row, now: int
    ) -> tuple[int, str] | None:
        """(until when, why) the alert that a monitor is down waits for one that it depends on."""
        verdict = None
        for parent in rows(db, """
            SELECT m.key, m.state, m.deadline_at, e.at AS back_at,
                COALESCE(m.base_at, 0) + m.moved AS heard_at,  -- in today's time
                (SELECT COALESCE(SUM(to_at - MAX(from_at, e.at)), 0)
                 FROM gaps WHERE why = 'away' AND to_at > e.at) AS off
            FROM monitors m
            LEFT JOIN events e ON e.type = 'up'
                AND e.id = (SELECT MAX(id) FROM events WHERE monitor_id = m.id)
            WHERE m.id IN (SELECT value FROM json_each(:above))
            AND NOT EXISTS (SELECT 1 FROM gaps WHERE open AND monitor_id = m.id)
            """, above=json.dumps(watched.above)):
            if parent["state"] == "down":
                return now + LOOK_AGAIN, f"{HELD}{parent['key']} is down"
            if event["reason"] != "missed" or event["event_at"] > now:  # the clock was set back
                continue
            if (event["received_at"] or 0) < (parent["back_at"] or 0) <= now:
                until = parent["back_at"] + parent["off"] + min(watched.monitor.interval, HOUR)
                if until > now:
                    return until, f"{HELD}{parent['key']} has just come back"
            if parent["deadline_at"] and parent["heard_at"] < event["event_at"]:
                until = min(parent["deadline_at"] + DIGEST_WITHIN,
                            event["event_at"] + VERDICT_WITHIN)
                if until > now:
                    verdict = (min(until, now + LOOK_AGAIN), f"waits for news of {parent['key']}")
        return verdict

    # Sending

    def deliver(self) -> None:
        """Begin to send what was planned."""
        planned, self._planned = self._planned, []
        if self._stopping.is_set():
            return
        for attempt in planned:
            attempt.thread = threading.Thread(
                target=self._try, args=(attempt,), name=f"to {attempt.channel}", daemon=True
            )
            self._attempts.append(attempt)
            attempt.thread.start()

    def _try(self, attempt: Attempt) -> None:
        try:
            errors = [error for url in attempt.urls if (error := self._send_to(url, attempt))]
        except Exception as error:  # whatever it is, it is tried again
            errors = [f"{type(error).__name__}: {mask(str(error), attempt.urls)}"]
        if attempt.state == "given up" and errors:
            return
        if not errors:
            attempt.state = "sent"
            self._accepted.pop(attempt.channel, None)  # a reminder is the same delivery once more
        failed = "; ".join(dict.fromkeys(errors)) or None
        while True:  # what was sent must not be sent again for a full disk
            with contextlib.suppress(Unrecordable):
                self._store.write(lambda db: self._note(db, attempt, failed))
                return
            if self._stopping.wait(1):
                return

    def _send_to(self, url: str, attempt: Attempt) -> str | None:
        """Send by one of a channel's URLs what it has not accepted before; None, or the error."""
        accepted = self._accepted[attempt.channel]
        accepted &= {(one, alert.newest["id"]) for one in attempt.urls for alert in attempt.alerts}
        missing = [alert for alert in attempt.alerts if (url, alert.newest["id"]) not in accepted]
        if not missing:
            return None
        heard = min(one.newest["last_heartbeat_at"] or one.newest["event_at"] for one in missing)
        with self._store.reading() as db:
            gaps = gaps_since(db, heard).get(None, [])
        message = Composer(self._config, gaps, self._clock.now(), url).compose(missing)
        error = send([url], *message)
        if error is None:
            accepted.update((url, alert.newest["id"]) for alert in missing)
        return error

    def _note(self, db: sqlite3.Connection, attempt: Attempt, error: str | None) -> None:
        """Write what became of an attempt. Where it failed, it is made again after a pause."""
        channel, now = attempt.channel, self._clock.now()
        self.tries[channel, "failed" if error else "sent"] += 1
        waited = max((row["due_at"] - row["at"] for alert in attempt.alerts for row in alert.rows
                      if row["tried_from"]), default=0)
        pause = next((pause for pause in PAUSES if pause > waited), PAUSES[-1])
        pause = round(pause * random.uniform(1, 1.1))
        for alert in attempt.alerts:
            watched, newest = self._by_id.get(alert.newest["monitor_id"]), alert.newest
            remind = watched.monitor.remind if watched and newest["type"] == "down" else None
            again = pause if error else remind
            values = {"error": error, "now": now, "again": now + again if again else None}
            db.executemany("""
                UPDATE deliveries
                SET state = IIF(:error IS NULL, 'sent', state), attempts = attempts + 1, at = :now,
                    tried_from = IIF(:error IS NULL, NULL, COALESCE(tried_from, :now)),
                    due_at = :again, error = :error
                WHERE id = :id AND (state <> 'failed' OR :error IS NULL)
                """, [values | {"id": row["id"]} for row in alert.rows])
            if error is None:
                is_limited = any(row["error"] == LIMITED for row in alert.rows)
                db.execute("INSERT INTO messages SELECT id, ?, ?, ? FROM monitors WHERE id = ?",
                           (channel, now, is_limited, newest["monitor_id"]))
        db.execute("INSERT OR IGNORE INTO channels (name) VALUES (?)", (channel,))
        db.execute("""
            UPDATE channels
            SET sent_at = IIF(:error IS NULL, :now, sent_at), error = COALESCE(:error, error),
                failed_at = IIF(:error IS NULL, failed_at, :now),
                failing_since = IIF(:error IS NULL, NULL, COALESCE(failing_since, :now))
            WHERE name = :name
            """, {"name": channel, "error": error, "now": now})
        said = "sent " + "; ".join(f"{one.label}: {one.subject}" for one in attempt.alerts[:5])
        if error:
            said = f"not sent: {error}; next try in {format_duration(pause)}"
        level = logging.WARNING if error else logging.INFO
        self._store.after_commit.append(lambda: log.log(level, "%s: %s", channel, said))

    def warn(self, text: str, is_over: Callable[[], bool]) -> None:
        """Tell every channel at once what no outbox can hold; tries again until it is over."""
        for channel, urls in self._config.channels.items():
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

    def wait(self, seconds: float) -> None:
        """Wait until nothing is under way, or so long."""
        end = time.monotonic() + seconds
        for attempt in self._attempts:
            if attempt.state != "given up":
                attempt.thread.join(max(0.0, end - time.monotonic()))

    def stop(self, seconds: float) -> None:
        """Let what is under way end within so many seconds; the rest is tried at the next start."""
        self._stopping.set()
        self.wait(seconds)


def put_off(
    db: sqlite3.Connection, deliveries: Iterable[sqlite3.Row], until: int | None, why: str | None
) -> None:
    """Have them told, or reminded of, at a later moment; None: not any more."""
    db.executemany("""
        UPDATE deliveries
        SET state = IIF(:until IS NULL AND state = 'pending', 'failed', state), due_at = :until,
            tried_from = IIF(:until IS NULL, NULL, tried_from),
            error = IIF(state = 'sent', NULL, COALESCE(:why, error))
        WHERE id = :id
        """, [{"id": row["id"], "until": until, "why": why} for row in deliveries])


# ======================================================================================
# Pages: what people read, as words, drawings and HTML. Knows nothing of HTTP.
# ======================================================================================


class Html(str):
    """Text that is HTML already. Only tag() and this room's own markup make it."""


def tag(element: str, /, *content: object, **attributes: object) -> Html:
    """An element. What is not Html is escaped, so that nothing but text comes of any text.
    An attribute may end in _ (class_) and have _ for - (aria_label); None leaves it out.
    """
    inner = "".join([one if isinstance(one, Html) else escape(str(one)) for one in content])
    words = "".join([f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
                     for key, value in attributes.items() if value is not None])
    return Html(f"<{element}{words}>{inner}</{element}>")


def table(kind: str, heads: Sequence[str], rows: Sequence[Html], title: str = "") -> Html:
    """A table below its title; nothing at all where it has no rows."""
    head = [tag("thead", tag("tr", *[tag("th", text, scope="col") for text in heads]))]
    whole = tag("table", *head * bool(heads), tag("tbody", *rows), class_=kind)
    if not rows:
        return Html()
    return section(title, whole) if title else tag("section", whole, id="monitors")


def section(title: str, *content: object) -> Html:
    return tag("section", tag("h2", title), *content, aria_label=title, id=title.replace(" ", "-"))


@dataclass(frozen=True, slots=True)
class Notice:
    """A trouble of Larm's own. `kind` is its mark and colour: a state, or "note"."""

    kind: str
    title: str
    text: str

    def draw(self) -> Html:
        return tag("tr", tag("th", self.title), tag("td", self.text), class_=self.kind)


def brief(ms: int) -> str:
    """A duration in its largest unit; none below a minute, so that a page seldom changes."""
    for name, unit in (("d", DAY), ("h", HOUR), ("min", MINUTE)):
        if ms >= unit:
            return f"{ms // unit} {name}"
    return "under 1 min"


@dataclass(frozen=True, slots=True)
class Reader:
    """Whom a page is for, and when; only a viewer sees tokens, output, notes and channels."""

    config: Config
    viewer: bool
    now: int

    def at(self, moment: int | None, form: str = "%H:%M") -> str:
        """A moment (None: now) as people say it: "05:30", "tomorrow 04:30", "12 Nov 03:00"."""
        then, today = (datetime.fromtimestamp(ms // SECOND, self.config.timezone)
                       for ms in (moment or self.now, self.now))
        days = (then.date() - today.date()).days
        date = f"%-d %b{' %Y' if abs(days) > 300 else ''} "
        return then.strftime({0: "", 1: "tomorrow ", -1: "yesterday "}.get(days, date) + form)

    def ago(self, moment: int) -> str:
        return f"{brief(self.now - moment)} ago"

    def link(self, key: str, text: str) -> Html:
        """To a monitor's page."""
        return tag("a", text, href=f"{self.config.prefix}/monitor/{key}")


def sentence(view: View, reader: Reader, *, whole: bool = True) -> str:
    """A monitor's state, why, and what comes next; not `whole`: what its row doesn't say."""
    monitor, state, at = view.monitor, view.state, reader.at
    grace = format_duration(monitor.grace) if monitor.grace else "no"
    resumes = f"until {at(view.resumes_at)}" if view.resumes_at else "until it is resumed"
    words = [{
        "up": f"next due {at(view.expected_at)}, then {grace} grace",
        "late": f"down at {at(view.deadline_at)} unless it pings",
        "down": describe_cause(view.reason, view.exit_status, monitor.max_runtime),
        "pending": "watched from its first heartbeat on",
        "paused": resumes if monitor.enabled else "by enabled = false in its settings",
    }[state]]
    if view.waits_for:
        words.append(f"alert held: {view.waits_for}")
    if whole:
        head = "never pinged" if state == "pending" else state
        if view.since is not None and state != "pending":
            head += f" since {at(view.since)} ({brief(reader.now - view.since)})"
        words[0] = f"{head}: {words[0]}"
        words += [f"running since {at(view.running_since)}"] if view.running_since else []
    return " ".join(f"{word[0].upper()}{word[1:]}." for word in words)


def ping_command(url: str) -> str:
    """What a job runs when it is done: it prints nothing, and tries on while Larm restarts."""
    return f"curl -fsS -m 10 --retry 5 --retry-connrefused -o /dev/null {url}"


def draw_snippets(monitor: Monitor, url: str) -> Html:
    """How a job pings, ready to be copied."""
    days, hours, minutes = (monitor.interval // unit for unit in (DAY, HOUR, MINUTE))
    times = (  # never further apart than the interval
        monitor.schedule.expression if monitor.schedule else "0 3 1 * *" if days >= 31
        else "0 3 * * 0" if days >= 7 else "0 3 * * *" if days
        else f"0 */{hours} * * *" if hours else f"*/{minutes or 1} * * * *")
    job, curl = "/path/to/job.sh", ping_command(url)
    ways = {
        "crontab": f"{times.replace('*/1 ', '* ')} {job} && {curl}".replace("%", r"\%"),
        "Shell, with its failures": f"{job}; {curl}/$?",
        "Wrapper, with its output": f"python3 larm.py run --url {url} -- {job}",
        "systemd service": f"[Service]\nType=oneshot\nExecStart={job}\nExecStartPost={curl}",
        "Python": f'import urllib.request\nurllib.request.urlopen("{url}", timeout=10)',
    }
    rows = [tag("tr", tag("th", way), tag("td", tag("pre", code))) for way, code in ways.items()]
    return table("pairs", (), rows, "How to ping")


def draw_days(days: Sequence[Day], zone: tzinfo) -> Html:
    """A bar of one cell a day, 2 wide and 1 apart; equal days in a row are one dashed line.
    Each kind has a height of its own, for those who see no colour. Above a day stands how long
    it was down, by the root: minutes can be seen, and hours still differ. One that was down
    throughout is red from top to bottom.
    """
    middles = {"up": 20, "unwatched": 22, "none": 23}  # of the lines, in a height of 24
    fell: list[str] = []
    at, drawn, red = 0, "", ""
    for kind, run in itertools.groupby("up" if day.kind == "partly" else day.kind for day in days):
        count = len(list(run))
        if kind != "down":
            drawn += f'<path class={kind} d="M{3 * at} {middles[kind]}h{3 * count - 1}"/>'
        at += count
    for number, day in enumerate(days):
        if day.down:
            whole, height = day.kind == "down", 2 + 13 * min(1, day.down / DAY) ** 0.5
            red += f"M{3 * number + 1} {'24V0' if whole else f'15v-{height:.0f}'}"
            date = datetime.fromtimestamp(day.start // SECOND, zone)
            fell.insert(0, f"{date:%-d %b} {'all day' if whole else brief(day.down)}")
    drawn += f'<path class=down d="{red}"/>' if red else ""
    words = "Down " + ", ".join(fell[:3] + ["…"] * (len(fell) > 3))
    if not fell:
        words = "Not down" if "class=up" in drawn else "No data"
    return Html(f'<svg viewBox="0 0 {3 * len(days) - 1} 24"><title>{words}</title>'
                f"{drawn}</svg>")


def figures(view: View, now: int) -> list[str]:
    """How much of the time it was up, of each period that there is a figure for."""
    found = [f"{span[:-1]} {span[-1]}: {up:g} %" for span, up in view.uptime.items()
             if up is not None]
    if not found and view.first_day is not None and view.heard_from is not None:
        return [f"since {brief(now - view.heard_from)}: {view.first_day:g} %"]
    return found


def draw_row(view: View, reader: Reader, detailed: bool) -> Html:
    """A monitor in the dashboard's table; `detailed`: with what is to be said of it below."""
    monitor, state, now = view.monitor, view.state, reader.now
    lasts = "" if view.since is None or state == "pending" else brief(now - view.since)
    heard = [] if view.received_at is None else [reader.ago(view.received_at)]
    heard += [f"running {brief(now - view.running_since)}"] if view.running_since else []
    due = "" if view.expected_at is None else reader.at(view.expected_at)
    row = tag("tr", tag("th", reader.link(monitor.key, monitor.name)),
              tag("td", state, " ", tag("small", lasts)), tag("td", ", ".join(heard)),
              tag("td", "was due " if state == "late" else "", due),
              tag("td", draw_days(view.days, reader.config.timezone)),
              tag("td", *figures(view, now)[-1:]), class_=state, id=f"m-{monitor.key}")
    if not detailed:
        return row
    code = "\n".join(plain(view.output).strip().splitlines()[-3:])
    if state == "pending" and view.token:
        code = ping_command(reader.config.ping_url(view.token))
    more = [tag("p", sentence(view, reader, whole=False))]
    more += [tag("p", monitor.note, dir="auto")] if reader.viewer and monitor.note else []
    more += [tag("pre", code, dir="auto")] if reader.viewer and code else []
    return Html(row + tag("tr", tag("td", *more, colspan=6), class_="more"))


def draw_events(
    events: Iterable[Event], explained: Mapping[str, int | None], reader: Reader,
    several: bool = False,
) -> Html:
    """What happened, and who was told. `explained`: since when is down what says elsewhere why."""
    rows = []
    for event in events:
        when = reader.at(event.at)
        why = "" if explained.get(event.key) == event.at else (
            f": {describe_cause(event.reason, event.exit_status)}")
        what = f"down{why}" if event.type == "down" else (
            f"up again after {format_duration(event.down or 0)}")
        told = []
        for one in event.deliveries:
            at, error = reader.at(one.at), f" ({plain(one.error)})" if one.error else ""
            words = {"sent": "" if at == when else f" {at}", "pending": ": not yet",
                     "failed": ": given up"}.get(one.state, f": {one.state}")
            told.append(tag("div", one.channel, words, error))
        name = event.name
        if event.key in reader.config.monitors:
            name = reader.link(event.key, name)
        cells = [tag("th", when), *[tag("td", name)] * several, tag("td", what, class_=event.type)]
        cells += [tag("td", *told, "" if told else "nobody")] * reader.viewer
        rows.append(tag("tr", *cells))
    heads = ["When", *["Monitor"] * several, "What", *["Who was told"] * reader.viewer]
    return table("past", heads, rows, "What happened")


def draw_runs(runs: Sequence[Run], reader: Reader) -> Html:
    """Runs (newest first) on a line of time, as high as they took long, and in a table."""
    if not runs:
        return Html()
    kinds = {"success": "up", "fail": "down"}
    words = {"fail": "failed", "start": "still running", "log": "output"}
    newest, oldest, longest = runs[0], runs[-1], max(runs, key=lambda run: run.duration or 0)
    ticks, rows = "", []
    for run in runs:
        x = 4 + 992 * (run.at - oldest.at) // max(1, newest.at - oldest.at)
        height = 20 + 58 * (run.duration or 0) // (longest.duration or 1)
        state, what = kinds.get(run.signal, "paused"), words.get(run.signal, run.signal)
        ticks += f'<path class="{state}" d="M{x} 80v-{height}"/>'
        what += f", exit status {run.exit_status}" if run.exit_status else ""
        sender, body = f"{run.user_agent or ''} {run.rid or ''}".strip(), plain(run.body or "")
        output = tag("details", tag("summary", counted(len(body.splitlines()), "line")),
                     tag("pre", body, dir="auto")) if body else ""
        cells = [tag("th", reader.at(run.at, "%H:%M:%S")), tag("td", what, class_=state),
                 tag("td", "" if run.duration is None else format_duration(run.duration)),
                 tag("td", run.sender or "", " ", tag("small", plain(sender))), tag("td", output)]
        rows.append(tag("tr", *cells[:5 if reader.viewer else 3], id=f"run-{run.id}"))
    legend = f"From {reader.at(oldest.at)} to {reader.at(newest.at)}: red, broken lines failed" + (
        f"; the higher, the longer it took, at most {format_duration(longest.duration)} "
        f"({reader.at(longest.at)})." if longest.duration else ".")
    chart = Html(f'<svg class="chart" viewBox="0 0 1000 80" preserveAspectRatio="none" role="img" '
                 f'aria-label="{counted(len(runs), "run")}">{ticks}</svg>')
    heads = ("When", "What", "Took", *("From", "Output") * reader.viewer)
    return section("Runs", tag("div", chart, tag("small", legend), class_="card"),
                   table("past runs", heads, rows))


def draw_facts(
    view: View, rhythm: Rhythm, tests: Mapping[str, tuple[int, str | None]], reader: Reader
) -> Html:
    """A monitor's last 90 days, and what else there is to know of it."""
    monitor, viewer, at = view.monitor, reader.viewer, reader.at
    upcoming = monitor.schedule.next_after(reader.now, 3) if monitor.schedule else []
    quiet = [" to ".join(f"{ms // HOUR:02}:{ms // MINUTE % 60:02}" for ms in span)
             for span in monitor.quiet]
    facts: list[tuple[str, object]] = [
        ("Up", ", ".join(figures(view, reader.now))),
        ("Last heartbeat", view.received_at is not None and
         f"{at(view.received_at)} ({reader.ago(view.received_at)})"),
        ("Expected", describe_rhythm(monitor)),
        ("Next times", view.state != "paused" and ", ".join(map(at, upcoming))),
        ("Heartbeats", rhythm.apart and f"{rhythm.apart} apart"),
        ("Runs take", rhythm.lasted),
        ("Time limit", monitor.max_runtime and f"{format_duration(monitor.max_runtime)} a run"),
        ("Advice", viewer and rhythm.advice),
        ("Depends on", Html(", ".join(reader.link(key, key) for key in monitor.depends_on))),
        ("Key", monitor.key),
        ("Alerts to", viewer and (", ".join(monitor.notify) or "nobody")),
        ("Reminders", monitor.remind and f"every {format_duration(monitor.remind)} while down"),
        ("Quiet", ", ".join(quiet)),
    ]
    for channel, (when, error) in tests.items() if viewer else ():
        found = f"{'sent' if error is None else f'not sent: {plain(error)}'} ({at(when)})"
        facts.append((f"Test of {channel}", found))
    listed = [tag(kind, text, dir="auto") for name, fact in facts if fact
              for kind, text in (("dt", name), ("dd", fact))]
    legend = "Red is how long it was down that day: the higher, the longer. Today is at the right."
    card = tag("div", draw_days(view.days, reader.config.timezone), tag("small", legend),
               tag("dl", *listed), class_="card")
    return section("The last 90 days", card)


STYLE = """
:root { color-scheme: light dark; --paper: light-dark(#f6f6f3, #111315);
  --card: light-dark(#fff, #1a1d20); --line: light-dark(#e4e4df, #2d3236);
  --muted: light-dark(#5b6066, #a2a9b0); --green: light-dark(#3f9f6a, #2f8a58); }
.up { --mark: "✓"; --tone: light-dark(#12703c, #63d396); --back: #115c34; }
.down { --mark: "✕"; --tone: light-dark(#b8151e, #ff857f); --back: #a3121a; }
.late { --mark: "!"; --tone: light-dark(#855600, #f0b94f); --back: #744c00; }
.pending { --mark: "○"; } .paused { --mark: "||"; } .note { --mark: "i"; }
* { box-sizing: border-box; margin: 0; }
body { background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: auto;
  max-width: 76rem; overflow-wrap: anywhere; padding: 0 max(1rem, 2vw) 2rem; }
header, .bar, form { align-items: center; display: flex; flex-wrap: wrap; gap: .5rem; }
header { min-height: 3.25rem; } header b { flex: 1; }
a { color: inherit; } :is(header, tbody) a:not(:hover) { text-decoration: none; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.06rem; margin: 2rem 0 .6rem; }
small, dt, footer, thead th { color: var(--muted); font-size: .875rem; font-weight: 400; }
.answer, #stale { background: var(--back, #46525f); border-radius: .75rem; color: #fff;
  padding: .8rem 1.1rem; print-color-adjust: exact; }
.answer { column-gap: 1rem; display: grid; grid-template-columns: auto 1fr; margin-bottom: 1rem; }
.answer::before { align-self: center; font-size: 1.6rem; grid-row: span 2; }
.card, table { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; }
.card { padding: .9rem 1.1rem; }
.card + section, p + p, * + pre, dl, .bar { margin-top: .5rem; }
pre, code { background: var(--paper); border: 1px solid var(--line); border-radius: .5rem;
  font: .8125rem/1.5 ui-monospace, monospace; padding: .45rem .75rem; user-select: all;
  white-space: pre-wrap; }
input, select, button { background: var(--card); border: 1px solid var(--muted);
  border-radius: .5rem; font: inherit; min-height: 2.25rem; padding: .2rem .8rem; }
h1, h2, button, .card > summary { font-weight: 650; }
table { border-spacing: 0; font-size: .9375rem; font-variant-numeric: tabular-nums; width: 100%;
  overflow: hidden; position: relative; }
th, td { border-top: 1px solid var(--line); padding: .5rem .75rem; text-align: left;
  vertical-align: top; }
table > :first-child > :first-child > * { border: 0; }
.past th { font-weight: 400; } thead th, .rows td, .past th, .pairs th { white-space: nowrap; }
.rows thead th:first-child { min-width: 14rem; } tr[class] th { padding-left: 2.6rem; }
tr[class] th::before, .answer::before { content: var(--mark) / ""; -webkit-text-stroke: .04em; }
tr[class] th::before { margin-left: -1.6rem; position: absolute; }
tr[class] th::before, .rows td:nth-child(2), .late td:nth-child(4), td[class] {
  color: var(--tone, var(--muted)); }
.rows .down td:nth-child(2), .rows .late td:nth-child(4) { font-weight: 600; }
.rows :is(th, td):nth-child(6), .runs :is(th, td):nth-child(3) { text-align: right; }
.rows .more td { border: 0; padding: 0 1.1rem .8rem 2.6rem; white-space: normal; }
.pairs td { width: 100%; }
svg { display: block; fill: none; stroke: var(--muted); width: 100%; }
.rows svg { margin: -.1rem 0; width: 269px; }
path { stroke-dasharray: 2 1; stroke-width: 2; } .unwatched { stroke-width: 4; }
path.up { stroke: var(--green); stroke-width: 8; }
path.down { stroke: var(--tone); stroke-dasharray: none; }
.chart { border-bottom: 2px solid var(--line); height: 5rem; }
.chart path { stroke-dasharray: none; stroke-width: 3; vector-effect: non-scaling-stroke; }
.chart .down { stroke-dasharray: 9 4; }
dl { align-items: baseline; display: grid; gap: .25rem 1rem; grid-template-columns: 7rem 1fr; }
#add, footer { margin-top: 2rem; }
@media (scripting: none) { .copy { display: none; } }
@media (max-width: 64rem) {
  thead { clip-path: inset(50%); position: absolute; } table, tbody { display: block; }
  tr { border-top: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .1rem .9rem;
    padding: .6rem 1rem; }
  tr:first-child, .more { border: 0; } th, td { border: 0; padding: 0; }
  .rows tr { display: grid; grid-template-columns: 1fr auto; } .rows svg { width: 100%; }
  tr[class] th, .more td, tr[class]:not([id]) td { padding-left: 1.6rem; }
  .rows td { white-space: normal; } .rows td:nth-child(even) { text-align: right; }
  .rows td:nth-child(n+3) { font-size: .875rem; }
  .rows td:nth-child(3):not(:empty)::before { content: "last "; }
  .rows :not(.late) > td:nth-child(4):not(:empty)::before { content: "due "; }
  .rows .more td { grid-column: 1 / 3; padding: 0 0 0 1.6rem; }
}
"""

SCRIPT = """
const $ = (selector, root = document) => root.querySelector(selector);
let tag = "", seen = new Date();

function merge(old, now) {  // what is still there stays itself, with its focus and what is open
  if (old?.nodeName !== now.nodeName || old.id !== now.id) return now;
  if (old.isEqualNode(now)) return old;
  old.nodeValue = now.nodeValue;
  for (const {name, value} of now.attributes ?? [])
    if (name !== "open") old.setAttribute(name, value);
  const nodes = [...now.childNodes].map((one, n) =>
    merge(one.id ? document.getElementById(one.id) : old.childNodes[n], one));
  nodes.forEach((one, n) => one === old.childNodes[n] || old.insertBefore(one, old.childNodes[n]));
  while (old.childNodes.length > nodes.length) old.lastChild.remove();
  return old;
}

async function refresh() {
  let why = "";
  try {
    const answer = await fetch(location, {cache: "no-store", signal: AbortSignal.timeout(10000),
      headers: {"X-Larm-Refresh": "1", "If-None-Match": tag}});
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const at = document.activeElement, signedOut = "you are signed out: reload to sign in";
    why = {200: "", 304: "", 401: signedOut, 403: signedOut, 404: "this page is gone"}[
      answer.status] ?? "Larm answers " + answer.status;
    if (answer.ok) {
      for (const one of ["title", "link", "main"]) merge($(one), $(one, page));
      at.focus({preventScroll: true});
      tag = answer.headers.get("ETag") ?? "";
    }
  } catch { why ||= "Larm does not answer"; }
  if (!why) seen = new Date();
  $("#stale").textContent = `As of ${seen.toLocaleTimeString()}: ${why}`;
  $("#stale").hidden = !why;
}

document.addEventListener("click", ({target}) => {
  if (!target.matches(".copy")) return;
  getSelection().selectAllChildren(target.previousElementSibling);
  document.execCommand("copy");  // navigator.clipboard is not there over plain HTTP
  target.textContent = "Copied";
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
setInterval(refresh, 15000);
"""


@functools.cache
def policy(embed: tuple[str, ...]) -> str:
    """The Content-Security-Policy of each page; `embed`: who may show it in a frame."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                     for text in (STYLE, SCRIPT))
    return (f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; "
            "frame-ancestors " + (" ".join(embed) or "'none'"))


def badge(name: str, text: str, state: str) -> str:
    """A status badge as SVG, whose words keep the width that they were given."""
    name = name if len(name) <= 40 else name[:39] + "…"
    left, right = (  # about how many pixels they take in an 11 px sans-serif
        sum(4 if one in "fijlrtI .,:;'|!()" else 11 if one in "mwMW@%" or one >= "⺀" else 7
            for one in words) for words in (name, text))
    name, text = escape(name), escape(text)
    colour = {"up": "#14703a", "late": "#8a5a00", "down": "#b3161f"}.get(state, "#555")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{left + right + 24}" height="20"
 role="img" aria-label="{name}: {text}"><title>{name}: {text}</title>
<g><rect width="{left + 12}" height="20" fill="#444"/>
<rect x="{left + 12}" width="{right + 12}" height="20" fill="{colour}"/></g>
<g fill="#fff" font-family="Verdana, 'DejaVu Sans', sans-serif" font-size="11">
<text x="6" y="14" textLength="{left}">{name}</text>
<text x="{left + 18}" y="14" textLength="{right}">{text}</text></g></svg>
"""


def whole_page(
    state: str, title: str, text: str, config: Config, *body: Html, viewer: bool = True,
    script: bool = False, asked: str | None = None,
) -> str:
    """A banner of a state's colour, and below it a body; alone, a refusal or an answer in words.
    Not `viewer`: it shows the way to sign in. `asked`: what the filter says, where there is one.
    """
    prefix = escape(config.prefix)
    search = "" if asked is None else f"""<form role="search" action="{prefix}/">
<input name="q" type="search" value="{escape(asked)}" aria-label="Filter" placeholder="Filter">
</form>"""
    answer = tag("div", tag("h1", title, aria_live="polite"), tag("p", text),
                 class_=f"answer {state}")
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Larm</title>
<link rel="icon" href="data:image/svg+xml,{quote(badge("", state[0].upper(), state))}">
<style>{STYLE}</style>
<header><b><a href="{prefix}/">Larm</a></b><p id="stale" class="late" role="status" hidden></p>
{search}{"" if viewer else f'<a href="{prefix}/login">Sign in</a>'}</header>
<main>{answer}{"".join(body)}</main>
<footer>Larm {__version__} · times in {escape(str(config.timezone))}</footer>
{f"<script>{SCRIPT}</script>" if script else ""}
"""


def changed(page: str) -> str:
    """Of a whole page what its script asks for: title, icon and <main>."""
    return "".join(re.findall("<title>.*?</title>|<link .*?>|<main>.*</main>", page, re.DOTALL))


def headline(views: Sequence[View], reader: Reader) -> tuple[str, str, str]:
    """How things stand: (the most urgent state, a headline, what else is so)."""
    found = {state: [view for view in views if view.state == state] for state in STATES}
    state = next((state for state in STATES if found[state]), "pending")
    ones, total = found[state], len(views)
    title = f"{len(ones)} of {total} {'is' if len(ones) == 1 else 'are'} {state}"
    if state in ("down", "late"):
        names = [f"{view.monitor.name[:60]}, since {reader.at(view.since)}" for view in ones[:3]]
        more = f" and {len(ones) - 3} more" if len(ones) > 3 else ""
        title += f": {'; '.join(names)}{more}"
    elif len(ones) == total:
        title = {"pending": "Waiting for the first ping", "paused": "Nothing is watched",
                 "up": f"All {total} are up" if total > 1 else "The only monitor is up"}[state]
    also = ", ".join(f"{len(found[other])} {other}" for other in STATES
                     if found[other] and other != state)
    heard = max((view.received_at or 0 for view in views), default=0)
    last = f"Last heartbeat {reader.ago(heard)}." if heard else ""
    return state, title, f"{also}. {last}" if also else last


def dashboard(
    views: Sequence[View], events: Sequence[Event], notices: Sequence[Notice], *, config: Config,
    viewer: bool, now: int, asked: str = "",
) -> str:
    """The page of all monitors (`views`, in the file's order), what is down first.

    `events`: the newest first; `asked`: words that each has in its name, key or state.
    """
    many = 15  # monitors: from so many on there is a filter, and only so many say more than a row
    reader, words = Reader(config, viewer, now), asked.casefold().split()
    listed = [view for view in sorted(views, key=lambda one: min(2, STATES.index(one.state)))
              if all(word in f"{view.monitor.name} {view.monitor.key} {view.state}".casefold()
                     for word in words)]
    explained = {view.monitor.key: view.since
                 for view in [view for view in listed if view.state != "up"][:many]}
    rows = [draw_row(view, reader, view.monitor.key in explained) for view in listed]
    heads = ("Monitor", "State", "Last heartbeat", "Next due", "90 days, to today", "Uptime")
    nothing = "No monitor has that in its name, key or state." if views else "None yet."
    body = [table("rows", heads, rows) or tag("p", nothing, class_="card")]
    if viewer:
        body.append(table("pairs", (), [one.draw() for one in notices], "Needs attention"))
    body.append(draw_events(events, explained, reader, several=True))
    if viewer:
        body.append(tag(
            "details", tag("summary", "Add a monitor"),
            tag("p", "This writes one into ", tag("b", config.path), ", and prints its token:"),
            tag("pre", "python3 larm.py add nightly-backup 1d"),
            tag("p", "Then let its job tell when it is done, with that token:"),
            tag("pre", f"/path/to/backup.sh && {ping_command(config.ping_url('TOKEN'))}"),
            id="add", class_="card"))
    return whole_page(*headline(views, reader), config, *body, viewer=viewer, script=True,
                      asked=asked if len(views) >= many or asked else None)


def monitor_page(
    view: View, *, runs: Sequence[Run], events: Sequence[Event], notices: Sequence[Notice],
    rhythm: Rhythm, tests: Mapping[str, tuple[int, str | None]], config: Config, viewer: bool,
    now: int, older: int | None = None,
) -> str:
    """A monitor's page. `runs` and `events`: the newest first; `tests`: by channel, when a test
    alert went there and what failed; `older`: the id before which there are older runs.
    """
    reader, monitor = Reader(config, viewer, now), view.monitor
    here = f"{config.prefix}/monitor/{monitor.key}"

    def button(verb: str, label: str, *more: Html) -> Html:
        return tag("form", tag("button", label), *more, method="post", action=f"{here}/{verb}")

    body = [draw_facts(view, rhythm, tests, reader),
            draw_events(events, {monitor.key: view.since}, reader), draw_runs(runs, reader)]
    if older:
        body.append(tag("p", tag("a", "Older runs", href=f"{here}?before={older}")))
    if viewer:
        buttons = []
        if view.token:
            url = config.ping_url(view.token)
            copy = tag("button", "Copy", type="button", class_="copy")
            buttons = [tag("code", url), copy, button("ping", "Ping now")]
            # Where nothing has come yet, how to ping is what to do
            body.insert(len(body) if runs else 0, draw_snippets(monitor, url))
        if view.state == "paused" and monitor.enabled:
            buttons.append(button("resume", "Resume"))
        elif monitor.enabled:
            spans = {"": "until resumed", "1h": "for 1 hour", "1d": "for 1 day", "7d": "for 7 days"}
            choices = [tag("option", text, value=span) for span, text in spans.items()]
            choice = tag("select", *choices, name="for", aria_label="for")
            buttons.append(button("pause", "Pause", choice))
        if monitor.notify:
            buttons.append(button("test", f"Send a test alert to {', '.join(monitor.notify)}"))
        top = [tag("p", monitor.note, dir="auto")] if monitor.note else []
        top += [tag("pre", plain(view.output).strip(), dir="auto")] if view.output else []
        body = [*top, tag("div", *buttons, id="bar", class_="bar"),
                table("pairs", (), [one.draw() for one in notices], "Needs attention"), *body]
    return whole_page(view.state, monitor.name, sentence(view, reader), config, *body,
                      viewer=viewer, script=True)


# ======================================================================================
# Web: the ping loop, one guard, routes, JSON, metrics. It translates HTTP to calls.
# ======================================================================================

BODY_LIMIT = 10_000_000  # bytes of a request, its chunks' frames too; more gets 413 from Waitress
SHOWN = 20  # runs or events on a page
GUESSES = 10  # wrong passwords a minute from one address
PING_HEADERS = [
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "*"),
    ("Access-Control-Allow-Headers", "*"),
    ("Ping-Body-Limit", str(BODY_KEPT)),
]
ERRORS: dict[int, tuple[str, str, dict[str, str]]] = {  # type, sentence, headers
    400: ("invalid_request", "This request has no meaning here.", {}),
    401: ("unauthorized", "Give the password that is set in larm.toml; the user name may be "
          "anything.", {"WWW-Authenticate": 'Basic realm="Larm", charset="UTF-8"'}),
    403: ("forbidden", "Larm shows itself only to this machine until a password is set: add "
          'password = "..." to larm.toml, or open it through an SSH tunnel.', {}),
    404: ("not_found", "There is no such page. Larm's page is {prefix}/", {}),
    405: ("method_not_allowed", "This path does not take that method.", {}),
    429: ("rate_limited", "Too many wrong passwords. Wait a minute, then try again.",
          {"Retry-After": "60"}),
    500: ("unavailable", "Larm could not answer this; its log says why.", {}),
    503: ("unavailable", "The database does not answer. Try again.", {"Retry-After": "5"}),
}

Environ = dict[str, Any]


class Refusal(Exception):
    """A request is not granted: a status of ERRORS, and a sentence of its own where it has one."""

    def __init__(self, status: int, sentence: str = "") -> None:
        super().__init__(sentence)
        self.status = status


# Pings


class PingAnswer:
    """The answer to a ping, once what it waits for is on disk: the same whatever the token (law 1).
    """

    __slots__ = ("_clock", "_until", "_write")

    def __init__(self, clock: Clock, write: Write[None] | None) -> None:
        """`write`: None where nothing can be recorded."""
        self._clock, self._write = clock, write
        self._until = clock.monotonic() + ANSWER_WITHIN

    def ready(self) -> bool:
        write = self._write
        return write is None or write.is_done or self._clock.monotonic() >= self._until

    def answer(self, within: float = 0) -> tuple[str, list[tuple[str, str]], bytes]:
        """Status line, headers, body; waits so many seconds for the write."""
        try:
            if self._write is not None:
                self._write.result(within)
                return "200 OK", PING_HEADERS, b'{"status": "ok"}'
        except Unrecordable:
            pass  # the writer's log says why
        except Exception as error:
            log.error("a heartbeat was not recorded: %s: %s", type(error).__name__, error)
        return ("503 Service Unavailable", [*PING_HEADERS, ("Retry-After", "5")],
                b'{"status": "unavailable"}')


def ping_path(path: str, prefix: str) -> tuple[str, str] | None:
    """(token, action) where a request's path is a ping's. Empty segments and white space around
    one mean nothing.
    """
    segments = [segment for part in path.split("/") if (segment := part.strip())]
    if prefix and segments[: prefix.count("/")] == prefix.split("/")[1:]:
        segments = segments[prefix.count("/") :]
    for start in (["api", "heartbeat"], ["api", "push"], ["ping"]):
        if segments[: len(start)] == start:
            token, *action = segments[len(start) :] or [""]
            return token, "/".join(action)
    return None


class Tail:
    """A body as it comes in: its first 4 bytes, for the byte order mark, and its last 10,000. What
    is left out between is a multiple of 4 bytes, so that no character of UTF-16 or 32 is split.
    So no body needs a temporary file, nor much memory.
    """

    def __init__(self) -> None:
        self._kept = bytearray()

    def append(self, data: bytes) -> None:
        self._kept += data
        if (excess := len(self._kept) - BODY_KEPT - 4) > 0:
            del self._kept[4 : 4 + excess // 4 * 4]

    def __len__(self) -> int:
        return len(self._kept)

    def getfile(self) -> io.BytesIO:
        return io.BytesIO(self._kept)

    def close(self) -> None:
        self._kept.clear()


def read_tail(environ: Environ) -> bytes:
    """The last bytes of a request's body, behind its first 4."""
    tail = Tail()
    while chunk := environ["wsgi.input"].read(65_536):
        tail.append(chunk)
    return tail.getfile().read()


def body_text(body: bytes, content_type: str) -> str:
    """A body as text: by its byte order mark, else the declared charset, else UTF-8."""
    kept = body[-BODY_KEPT:]
    for mark, charset in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"),
                          (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF16_LE, "utf-16-le"),
                          (codecs.BOM_UTF16_BE, "utf-16-be")):
        if body.startswith(mark):
            return kept.decode(charset, "replace").lstrip("\ufeff")
    declared = re.search(r"""charset=["']?([\w.:-]+)""", content_type, re.IGNORECASE)
    try:
        return kept.decode(declared[1] if declared else "utf-8", "replace")
    except (LookupError, ValueError):  # no charset, or none of bytes
        return kept.decode("utf-8", "replace")


def sender_of(environ: Environ, proxies: Sequence[Any]) -> str:
    """The peer's address, or, where that is a proxy, what the last proxy says of whom it serves."""
    sender: str = environ.get("REMOTE_ADDR") or ""
    forwarded: str = environ.get("HTTP_X_FORWARDED_FOR", "")
    for entry in reversed(forwarded.split(",") if forwarded else ()):
        sender = sender.removeprefix("::ffff:")  # IPv4, written as IPv6
        try:
            is_proxy = any(ipaddress.ip_address(sender) in network for network in proxies)
        except ValueError:
            is_proxy = False
        if not is_proxy or not entry.strip():
            break
        sender = entry.strip()[:100]
    return sender.removeprefix("::ffff:")


CONNECTIONS = 4_000  # at most; fewer where the system allows fewer open files
OTHER_FILES = 200  # that may be open besides: the database, alerts, standard streams
LOOK = 0.25  # seconds between two looks of the loop while nothing happens
FRESH = 200  # ms in which what a new connection asks may still be on its way
STOP_WITHIN = 2_500  # ms in which what was asked before a stop is answered


class Server:
    """Serves a WSGI application by Waitress, and its pings without a thread for each.

    The thread that calls run() reads all requests and writes the answers to pings:
    1. `take` is shown the environ of each request. Where that is no ping it returns None, and one
       of a few threads has the application answer it.
    2. Pings wait in the order of their arrival until they are ready(): wake() makes the loop look.
    3. Where connections are scarce, those that have asked nothing whole for longest are closed.

    It stands on Waitress's insides, of 2.1.2 to 3.0.2 (_adapt). A release that lacks them serves
    in the ordinary way: the application must know how to answer pings, too.
    """

    def __init__(self, application: Callable[..., Any],
                 take: Callable[[Environ], PingAnswer | None],
                 unavailable: PingAnswer,
                 listen: tuple[str, int], monotonic: Callable[[], int]) -> None:
        """Bind the address ("": all of them); raises OSError.

        `unavailable` answers what can't be taken, or has not come in whole when its time is over.
        """
        import waitress

        self._take, self._unavailable, self._monotonic = take, unavailable, monotonic
        self._map: dict[int, Any] = {}  # what Waitress polls, by file descriptor
        self._waiting: deque[Any] = deque()  # connections whose first request is a ping
        self._thread = self._stop_at = 0
        self._limit = connections_allowed()
        both = not listen[0] and socket.has_dualstack_ipv6()
        bound = socket.create_server(
            listen, family=socket.AF_INET6 if both or ":" in listen[0] else socket.AF_INET,
            backlog=CONNECTIONS, dualstack_ipv6=both,
        )
        self._listener: Any = waitress.create_server(
            application, map=self._map, sockets=[bound], backlog=CONNECTIONS, ident="Larm",
            threads=4, connection_limit=self._limit, asyncore_use_poll=True,
            recv_bytes=32_768,  # what the job wrapper sends is read at once
            max_request_body_size=BODY_LIMIT + 1,  # Waitress refuses from this size on
            max_request_header_size=65_536,
            outbuf_overflow=1 << 30,  # no temporary file: there may be no room for one
            clear_untrusted_proxy_headers=False,  # they tell who does not come from this machine
        )
        self._to_threads, self._pull_trigger = self._listener.add_task, self._listener.pull_trigger
        # All that had arrived by this moment (of `monotonic`) has been read and handed over.
        self.caught_up, self._is_adapted = monotonic(), True
        try:
            self._adapt(self._listener)
        except (AttributeError, TypeError) as error:
            log.warning("pings take threads, which is slow: Waitress has changed (%s)", error)
            self.caught_up, self._is_adapted = 1 << 62, False
            self._listener.task_dispatcher.set_thread_count(32)

    def _adapt(self, listener: Any) -> None:
        """Put parts of ours in the place of Waitress's; raises AttributeError, TypeError."""
        import waitress

        class Request(waitress.parser.HTTPRequestParser):  # type: ignore[misc] # it has no types
            command, path, waiting = "", "", None

            def parse_header(self, header: bytes) -> None:
                super().parse_header(header)
                if self.body_rcv is not None:
                    self.body_rcv.buf = Tail()

        class Task(waitress.task.WSGITask):  # type: ignore[misc] # nor has this
            def execute(task) -> None:
                request, channel = task.request, task.channel
                # Who does not read what was answered gets no more: to write might mean to wait.
                if channel.total_outbufs_len or (self._stop_at and len(channel.requests) == 1):
                    request.headers["CONNECTION"] = "close"
                if request.waiting is None:
                    super().execute()
                    return
                task.status, headers, body = request.waiting.answer()
                task.response_headers, task.content_length = list(headers), len(body)
                head = task.build_response_header()
                task.wrote_header = True
                channel.write_soon(head if request.command == "HEAD" else head + body)

        def accept_all() -> None:
            with contextlib.suppress(OSError):  # most often: there are no more
                while len(self._map) < self._limit or self._stop_at:
                    connection, address = listener.socket.accept()
                    listener.set_socket_options(connection)
                    channel = listener.channel_class(
                        listener, connection, address, listener.adj, self._map)
                    channel.parser_class, channel.task_class = Request, Task
                    channel.since = self._monotonic()  # or when it last asked something whole

        def fail() -> None:
            raise  # what it can't get over; Waitress would only close it, and nobody would know

        self._loop, self._task = waitress.wasyncore.loop, Task
        channel = listener.channel_class(listener, socket.socket(), None, listener.adj, {})
        channel.handle_close()
        operator.attrgetter(  # what else is stood on
            "request", "requests", "requests_lock", "total_outbufs_len", "will_close",
            "parser_class.body_rcv", "task_class.execute", "server.active_channels",
        )(channel)
        listener.handle_accept, listener.handle_error = accept_all, fail
        listener.add_task, listener.pull_trigger = self._hand_over, self.wake

    def run(self) -> None:
        """Serve until close(), and what was asked before it; raises what ends it otherwise."""
        if not self._is_adapted:
            self._listener.run()  # for ever
        self._thread = threading.get_ident()
        while not self._stop_at:
            self._go_round()
        self._listener.handle_accept()  # whoever has connected is let in before it closes
        self._listener.del_channel()
        self._listener.socket.close()
        channels = self._listener.active_channels
        while self._monotonic() < self._stop_at and any(
            one.requests or one.request or one.total_outbufs_len
            or one.since > self._monotonic() - FRESH for one in channels.values()
        ):
            self._go_round()
        while self._waiting:
            self._waiting.popleft().service()
        for channel in list(channels.values()):
            self._give_up(channel)
        self._loop(0, True, self._map, 1)

    def close(self) -> None:
        """Have run() refuse new connections, answer what has been asked, and return."""
        self._stop_at = self._monotonic() + STOP_WITHIN
        self.wake()

    def wake(self) -> None:
        """Have the loop look for what can be answered now; from any thread, at any time."""
        if threading.get_ident() != self._thread:  # which is about to look
            self._pull_trigger()

    def _go_round(self) -> None:
        """Read what has arrived, answer what is ready, and make room."""
        began, not_ready = self._monotonic(), []
        self._loop(LOOK, True, self._map, 1)
        while self._waiting:
            channel = self._waiting.popleft()
            if channel.requests[0].waiting.ready():
                channel.service()
            else:
                not_ready.append(channel)
        self._waiting.extend(not_ready)
        if len(self._map) >= self._limit:  # a byte now and then makes a slow one no younger
            idle = [one for one in self._listener.active_channels.values()
                    if not one.requests and one.since < began - FRESH]
            for channel in sorted(idle, key=lambda one: one.since)[: self._limit // 10]:
                self._give_up(channel)
        self.caught_up = began

    def _hand_over(self, channel: Any) -> None:
        """A request has come in whole. Whoever calls holds the channel's lock: no answer yet."""
        request, channel.since = channel.requests[0], self._monotonic()
        if not request.error:
            try:
                request.waiting = self._take(self._task(channel, request).get_environment())
            except Exception as error:
                log.error("a request was not taken: %s: %s", type(error).__name__, error)
                request.waiting = self._unavailable
        if request.waiting:
            self._waiting.append(channel)
        else:
            self._to_threads(channel)

    def _give_up(self, channel: Any) -> None:
        """Close a connection; what it has begun to ask is answered before."""
        with channel.requests_lock:
            request, channel.request = channel.request, None
        if channel.requests:  # a page's thread is at it
            return
        if request:
            request.waiting = self._unavailable
            request.headers["CONNECTION"] = "close"
            channel.requests.append(request)
            channel.service()
        channel.will_close = True


def connections_allowed() -> int:
    """How many there may be at once; raises the system's limit on open files where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = CONNECTIONS + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(files - OTHER_FILES, files // 2)


# Who may see what


class Access:
    """Who is a viewer (interface.md, "The rest of HTTP"), and who guesses."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._guesses: dict[str, deque[int]] = {}  # by address, the newest last
        self._lock = threading.Lock()

    def refusal(self, environ: Environ, config: Config) -> int | None:
        """None for a viewer; for everyone else the HTTP status: 401, 403 or 429."""
        if config.password is None:
            return None if self._is_local(environ, config) else 403
        given = self._given_password(environ)
        if given is None:
            return 401
        address = sender_of(environ, config.proxies)
        with contextlib.suppress(ValueError):
            if ":" in address:
                address = str(ipaddress.ip_network((address, 64), strict=False))
        now = self._clock.monotonic()
        with self._lock:
            wrong = self._guesses.pop(address, deque())
            while wrong and now - wrong[0] > MINUTE:
                wrong.popleft()
            is_right = hmac.compare_digest(given, config.password.encode())
            status = 429 if len(wrong) >= GUESSES else None if is_right else 401
            if status == 401:
                wrong.append(now)
            if wrong:
                self._guesses[address] = wrong
            if len(self._guesses) > 1_000:
                del self._guesses[next(iter(self._guesses))]
            return status

    @staticmethod
    def is_cross_site(environ: Environ, config: Config) -> bool:
        """Whether a page of another site sent this, in the name of a viewer's browser.

        Sec-Fetch-Site is the browser's own word, which it gives to https and localhost only.
        """
        if (fetched_from := environ.get("HTTP_SEC_FETCH_SITE")) is not None:
            return fetched_from not in ("same-origin", "none")
        if (origin := environ.get("HTTP_ORIGIN")) is None:
            return False
        site = origin.partition("://")[2].lower()  # of the origin "null" nothing
        own = (environ.get("HTTP_HOST", "").lower(), urlsplit(config.url).netloc.lower())
        return not site or site not in own

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

    @staticmethod
    def _is_local(environ: Environ, config: Config) -> bool:
        """Straight from this machine: not through a proxy, nor by another site's name for it."""

        def is_loopback(address: str) -> bool:
            return bool(re.fullmatch(r"::1|(::ffff:)?127(\.\d{1,3}){3}", address))

        forwarded = "HTTP_(.*FORWARDED.*|VIA|X_REAL_IP|.*CLIENT_IP|CF_CONNECTING_IP)"
        if not is_loopback(environ["REMOTE_ADDR"]) or any(
            re.fullmatch(forwarded, name) for name in environ
        ):
            return False
        try:
            host = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname or ""
        except ValueError:
            return False
        return host in ("localhost", urlsplit(config.url).hostname) or is_loopback(host)


class Web:
    """The WSGI application. The heartbeat endpoint stands before Bottle, which would answer odd
    paths and methods in its own way; everything else is Bottle's.
    """

    api = 2  # of Bottle's plugins, of which this is one: apply() gets the route as such

    def __init__(
        self, store: Store, clock: Clock, intake: Intake, watcher: Watcher, health: Health,
        notifier: Notifier,
    ) -> None:
        import bottle

        self._bottle, self._store, self._clock, self._intake = bottle, store, clock, intake
        self._watcher, self._health, self._notifier = watcher, health, notifier
        self._config: Config
        self._access = Access(clock)
        self._started_at = clock.now()
        self._lock = threading.Lock()  # of what follows
        self._tests: dict[tuple[str, tuple[str, ...]], tuple[int, str | None]] = {}
        self._testing: dict[threading.Thread, int] = {}  # since when; some may hang
        self._counts = Counter[str]()
        with store.reading() as db:
            self._newest = {table: first(db, f"SELECT COALESCE(MAX(id), 0) FROM {table}")
                            for table in ("events", "gaps")}
        self._app = bottle.Bottle()
        self._app.default_error_handler = self._show_error
        self._app.install(self)
        for method, path, access, handler in (
            ("GET", "/", "public", self._dashboard),
            ("GET", "/monitor/<key>", "public", self._monitor),
            ("POST", "/monitor/<key>/<verb:re:pause|resume|test|ping>", "viewers", self._act),
            ("GET", "/login", "viewers", self._login),
            ("GET", "/badge/all.svg", "public", self._badge),
            ("GET", "/badge/<key>.svg", "public", self._badge),
            ("GET", "/metrics", "viewers", self._metrics),
            ("GET", "/health", "anyone", self._report_health),
            ("GET", "/api/v1/summary", "public", self._summary_json),
            ("GET", "/api/v1/monitors", "public", self._monitors_json),
            ("GET", "/api/v1/monitors/<key>", "public", self._monitor_json),
            ("GET", "/api/v1/monitors/<key>/heartbeats", "public", self._heartbeats_json),
            ("GET", "/api/v1/events", "public", self._events_json),
            ("POST", "/api/v1/monitors/<key>/<verb:re:pause|resume>", "viewers", self._pause_json),
            ("POST", "/api/v1/channels/<channel:path>/test", "viewers", self._test_json),
        ):
            self._app.route(path, method, handler, access=access)

    def use(self, config: Config) -> None:
        self._config = config

    def take(self, environ: Environ) -> PingAnswer | None:
        """What answers a request where it is a ping; it is on its way to the disk then."""
        if (found := ping_path(environ.get("PATH_INFO", ""), self._config.prefix)) is None:
            return None
        token, action = found
        query = parse_qs(environ.get("QUERY_STRING", "")[: 4 * BODY_KEPT], errors="replace")
        if not action and query.get("status") == ["down"]:
            action = "fail"
        sender = sender_of(environ, self._config.proxies)

        def read(signal: str, exit_status: int | None) -> Ping:
            """What is kept of a request: nothing in it can grow beyond a bound."""
            text = body_text(read_tail(environ), environ.get("CONTENT_TYPE") or "")
            rid = query.get("rid", [""])[0]
            return Ping(
                signal=signal, exit_status=exit_status, method=environ["REQUEST_METHOD"][:16],
                sender=sender, user_agent=environ.get("HTTP_USER_AGENT", "")[:200] or None,
                rid=rid if 1 <= len(rid) <= 64 else None,
                body=text or query.get("msg", [""])[0][-BODY_KEPT:] or None,
            )

        write = None
        with contextlib.suppress(Unrecordable):
            is_preflight = "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ and (
                environ["REQUEST_METHOD"] == "OPTIONS")
            write = self._intake.take_nothing() if is_preflight else (
                self._intake.take(token, action, read, sender))
        return PingAnswer(self._clock, write)

    def __call__(self, environ: Environ, start_response: Callable[..., object]) -> Iterable[bytes]:
        if (ping := self.take(environ)) is not None:
            status, headers, body = ping.answer(ANSWER_WITHIN / SECOND)
            start_response(status, [*headers, ("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        path, prefix = environ.get("PATH_INFO", ""), self._config.prefix
        if prefix and (path == prefix or path.startswith(prefix + "/")):
            path = path[len(prefix) :] or "/"
        # What is no UTF-8 Bottle would leave out, and find another page.
        environ["PATH_INFO"] = path.encode("latin-1").decode("utf-8", "replace").encode().decode(
            "latin-1")
        environ["wsgi.errors"] = io.StringIO()  # Bottle's tracebacks; _show_error logs a line
        common = [
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "same-origin"),  # none at all makes the origin of our forms null
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Security-Policy", policy(self._config.embed)),
        ]

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> object:
            return start_response(status, headers + common, *more)

        answer: Iterable[bytes] = self._app(environ, start)
        return answer

    def apply(self, handler: Callable[..., Any], route: Any) -> Callable[..., Any]:
        """As a plugin of Bottle: a route's handler behind what every route asks: who may see it,
        whether another site's page sent it, whether there is such a monitor, whether the database
        answers.

        `access` of a route: "viewers"; "public", everyone where larm.toml says so; "anyone". The
        handler gets the configuration, whether a viewer asks, and what the path names.
        """

        def handle(**names: str) -> Any:
            config, environ = self._config, self._bottle.request.environ
            access = route.config["access"]
            refusal = None if access == "anyone" else self._access.refusal(environ, config)
            try:
                if refusal and not (access == "public" and config.public):
                    raise Refusal(refusal)
                if route.method == "POST" and self._access.is_cross_site(environ, config):
                    raise Refusal(403, "A page of another site asked for this: it was not done.")
                if "key" in names and names["key"] not in config.monitors:
                    raise Refusal(404, f"There is no monitor {show(names['key'])}.")
                return handler(config, refusal is None, **names)
            except Refusal as refused:
                return self._error(refused.status, str(refused))
            except (Unrecordable, sqlite3.Error) as error:
                return self._error(503, f"The database does not answer: {error}")
            except ValueError as error:
                return self._error(400, str(error))

        return handle

    def _show_error(self, error: Any) -> str:
        """What Bottle itself refuses, or a handler that failed."""
        if error.exception:
            log.error("%s: %s: %s", self._bottle.request.path[:200],
                      type(error.exception).__name__, error.exception)
        if self._bottle.response.get_header("Allow") == "GET":
            self._bottle.response.set_header("Allow", "GET, HEAD")
        return self._error(error.status_code)

    def _error(self, status: int, own_sentence: str = "") -> str:
        """An error, as the API has it or as a page."""
        response, request, config = self._bottle.response, self._bottle.request, self._config
        response.status = status
        type_, sentence, headers = ERRORS.get(status, ERRORS[400 if status < 500 else 500])
        sentence = own_sentence or sentence.replace("{prefix}", config.prefix)
        for name, value in headers.items():
            # The page's script says itself that a password is asked for: the browser need not.
            if status != 401 or "HTTP_X_LARM_REFRESH" not in request.environ:
                response.set_header(name, value)
        if request.path.startswith("/api/"):
            response.content_type = "application/json"
            return json.dumps({"error": {"type": type_, "message": sentence[:300]}})
        response.content_type = "text/html; charset=UTF-8"
        return whole_page("paused", response.status_line, sentence, config)

    def _views(self, config: Config, keys: Iterable[str] | None = None, history: bool = True
               ) -> list[View]:
        with self._store.reading() as db:
            return read_views(db, config, self._clock.now(), keys, history)

    def _monitor_id(self, db: sqlite3.Connection, key: str) -> int:
        """0 where the database does not know it yet."""
        return first(db, "SELECT id FROM monitors WHERE key = :key", key=key) or 0

    # The API

    def _summary_json(self, config: Config, _viewer: bool) -> Any:
        states = Counter(view.state for view in self._views(config, history=False))
        counts = {state: states[state] for state in ("up", "late", "down", "pending", "paused")}
        return {"data": counts | {"total": len(config.monitors)}}

    def _monitors_json(self, config: Config, viewer: bool) -> Any:
        return {"data": [one.to_json(config, viewer) for one in self._views(config)]}

    def _monitor_json(self, config: Config, viewer: bool, key: str) -> Any:
        [view] = self._views(config, [key])
        return {"data": view.to_json(config, viewer)}

    def _heartbeats_json(self, _config: Config, viewer: bool, key: str) -> Any:
        with self._store.reading() as db:
            found = list_heartbeats(db, self._monitor_id(db, key), **self._page())
        own = ("id", "signal", "exit_status", "duration_ms", "method")
        sent = {"from": "sender", "user_agent": "user_agent", "rid": "rid", "body": "body"}
        return {"data": [
            {name: row[name] for name in own} | {"at": iso_utc(row["at"])}
            | {name: row[column] if viewer else None for name, column in sent.items()}
            for row in found
        ]}

    def _events_json(self, _config: Config, viewer: bool) -> Any:
        with self._store.reading() as db:
            found = read_events(db, **self._page())
        return {"data": [event.to_json(viewer) for event in found]}

    def _page(self) -> dict[str, int]:
        """`before` and `limit` of a list's query."""
        page = {"limit": 100}
        for name, most in (("before", 10**18 - 1), ("limit", 1_000)):
            if (given := self._bottle.request.query.get(name)) is None:
                continue
            if not re.fullmatch("[0-9]{1,18}", given) or not 1 <= int(given) <= most:
                raise ValueError(f"{name} must be a number from 1 to {most}; found {show(given)}")
            page[name] = int(given)
        return page

    def _pause_json(self, config: Config, viewer: bool, key: str, verb: str) -> Any:
        try:
            asked = json.loads(read_tail(self._bottle.request.environ) or b"{}")
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict) or asked.keys() - {"for"}:
            raise ValueError('the body must be JSON, such as {"for": "2h"}, or empty')
        self._pause_or_resume(config, key, verb, asked.get("for"))
        return self._monitor_json(config, viewer, key)

    def _pause_or_resume(self, config: Config, key: str, verb: str, span: object) -> None:
        monitor, now = config.monitors[key], self._clock.now()
        length = None if span in (None, "") else pause_length(span)
        self._store.write(lambda db: pause_or_resume(db, monitor, verb, length, now))

    def _test_json(self, config: Config, _viewer: bool, channel: str) -> Any:
        if channel not in config.channels:
            raise Refusal(404, f"There is no channel {show(channel)}.")
        self._send_tests(config, [channel]).join(ATTEMPT_WITHIN / SECOND)
        no_answer = 0, "no answer within a minute"
        _, error = self._tests.get((channel, config.channels[channel]), no_answer)
        return {"data": {"sent": error is None, "error": error}}

    def _send_tests(self, config: Config, channels: Sequence[str]) -> threading.Thread:
        """Send test alerts, one after the other; one such thread at a time, until it hangs."""

        def send_each() -> None:
            for channel in channels:
                error = send_test(config, channel)
                self._tests[channel, config.channels[channel]] = self._clock.now(), error

        thread = threading.Thread(target=send_each, name="test", daemon=True)
        with self._lock:
            now = self._clock.monotonic()
            self._testing = {one: at for one, at in self._testing.items() if one.is_alive()}
            if len(self._testing) >= HANGING or any(
                now - at < ATTEMPT_WITHIN for at in self._testing.values()
            ):
                raise Refusal(503, "Another test of a channel is under way.")
            self._tests = {(name, urls): found for (name, urls), found in self._tests.items()
                           if name not in channels and config.channels.get(name) == urls}
            thread.start()
            self._testing[thread] = now
        return thread

    # Pages

    def _send_page(self, page: str) -> Any:
        """A page, or, where its script asks, what of it has changed."""
        response, environ = self._bottle.response, self._bottle.request.environ
        response.content_type = "text/html; charset=UTF-8"
        if "HTTP_X_LARM_REFRESH" not in environ:
            return page
        part = changed(page)
        mark = f'"{hashlib.sha256(part.encode()).hexdigest()[:32]}"'
        response.set_header("ETag", mark)
        is_known = environ.get("HTTP_IF_NONE_MATCH") == mark
        response.status = 304 if is_known else 200
        return "" if is_known else part

    def _dashboard(self, config: Config, viewer: bool) -> Any:
        now = self._clock.now()
        with self._store.reading() as db:
            views = read_views(db, config, now)
            events = read_events(db, SHOWN)
            notices = self._notices(db, config, now) if viewer else []
        asked = " ".join(self._bottle.request.query.getunicode("q", "").split())[:100]
        return self._send_page(dashboard(
            views, events, notices, config=config, viewer=viewer, now=now, asked=asked,
        ))

    def _notices(self, db: sqlite3.Connection, config: Config, now: int) -> list[Notice]:
        """All that is wrong with Larm itself."""
        zone, failure = config.timezone, self._store.failure
        found = [Notice("late", "Larm", row["text"]) for row in open_troubles(db)
                 if row["topic"] == "disk"]
        if failure:
            text = f"heartbeats can't be recorded: {failure}; pings get 503"
            found.insert(0, Notice("down", "Larm", text))
        found += [Notice("late", f"Channel {name}", describe_channel(row, zone, now))
                  for name, row in read_channels(db).items()
                  if name in config.channels and row["failing_since"] is not None]
        found += [Notice("late", "Not applied", mistake) for mistake in self._health.mistakes]
        if not config.channels:
            found.append(Notice("late", "Nobody is alerted", "larm.toml has no channels yet."))
        if config.zone_trouble:
            found.append(Notice("late", "Time zone", config.zone_trouble))
        found += [Notice("note", "Not watched", f"{describe_gap(gap, zone)}.")
                  for gap in gaps_since(db, now - DAY).get(None, ())
                  if gap["why"] == "away" and gap["to_at"] - gap["from_at"] > GAP]
        return found + self._odd_pings(now)

    def _odd_pings(self, now: int, key: str | None = None) -> list[Notice]:
        """The pings that changed nothing, or those of one monitor."""
        found = []
        for one in self._intake.odd_pings():
            often = f"{counted(one.count, 'time')} from {one.sender}, last {far_from(one.at, now)}"
            if one.key is None and key is None:
                text = f"{show(one.text)}… was pinged {often}: a typo, or a removed monitor?"
                found.append(Notice("note", "Unknown token", text))
            elif one.key is not None and key in (None, one.key):
                text = f"{one.key} was pinged with /{one.text}, which means nothing, {often}."
                found.append(Notice("note", "Unknown action", text))
        return found

    def _monitor(self, config: Config, viewer: bool, key: str) -> Any:
        now, before = self._clock.now(), self._page().get("before")
        with self._store.reading() as db:
            [view] = read_views(db, config, now, [key])
            monitor_id = self._monitor_id(db, key)
            beats = list_heartbeats(db, monitor_id, BEATS_READ)
            shown = list_heartbeats(db, monitor_id, BEATS_READ, before) if before else beats
            events = read_events(db, SHOWN, None, monitor_id)
        runs, tests = read_runs(shown), list(self._tests.items())
        return self._send_page(monitor_page(
            view, runs=runs[:SHOWN], events=events, notices=self._odd_pings(now, key),
            rhythm=read_rhythm(view.monitor, beats), config=config, viewer=viewer, now=now,
            tests={name: found for (name, urls), found in tests
                   if name in view.monitor.notify and config.channels[name] == urls},
            older=runs[SHOWN - 1].id if len(runs) > SHOWN else None,
        ))

    def _act(self, config: Config, _viewer: bool, key: str, verb: str) -> Any:
        """A button of a monitor's page: do what it says, and show the page again."""
        if verb == "test":
            self._send_tests(config, config.monitors[key].notify)
        elif verb == "ping":
            [view] = self._views(config, [key], history=False)
            sender = sender_of(self._bottle.request.environ, config.proxies)
            self._intake.take(view.token or "", "", lambda signal, _: Ping(
                signal, method="POST", sender=sender, user_agent="Larm's page",
            ), sender).result()
        else:
            form = parse_qs(read_tail(self._bottle.request.environ).decode("latin-1"))
            self._pause_or_resume(config, key, verb, form.get("for", [None])[0])
        return self._bottle.HTTPResponse(status=303, Location=f"{config.prefix}/monitor/{key}")

    def _login(self, config: Config, _viewer: bool) -> Any:
        return self._bottle.HTTPResponse(status=303, Location=f"{config.prefix}/")

    def _badge(self, config: Config, _viewer: bool, key: str = "all") -> str:
        """A monitor's state; of "all", unless a monitor is called so, the most urgent one."""
        keys = [key] if key in config.monitors else None
        views = self._views(config, keys, history=False)
        state = next(state for state in STATES if any(view.state == state for view in views))
        name, text = "monitors", f"{sum(view.state == state for view in views)} {state}"
        if keys:
            name, text = views[0].monitor.name, state
        self._bottle.response.content_type = "image/svg+xml; charset=UTF-8"
        return badge(name, text, state)

    def _report_health(self, _config: Config, _viewer: bool) -> Any:
        reason = self._store.failure and f"the database can't be written: {self._store.failure}"
        if self._watcher.is_stalled():
            reason = "the watcher is stalled"
        self._bottle.response.status = 503 if reason else 200
        return {"status": "unavailable", "reason": reason} if reason else {"status": "ok"}

    def _count(self, db: sqlite3.Connection) -> None:
        """Add up what has come since the last scrape, so that pruning takes nothing from it."""
        with self._lock:
            for row in rows(db, """
                SELECT 'events' AS kind, e.id, key || ' ' || type AS what, 0 AS ms
                FROM events e JOIN monitors m ON m.id = e.monitor_id
                WHERE e.id > :events
                UNION ALL
                SELECT 'gaps', id, 'gaps', to_at - from_at
                FROM gaps
                WHERE why = 'away' AND id > :gaps
                """, **self._newest):
                self._counts[row["what"]] += 1
                self._counts["gap ms"] += row["ms"]
                self._newest[row["kind"]] = max(self._newest[row["kind"]], row["id"])

    def _metrics(self, config: Config, _viewer: bool) -> str:
        """What Prometheus scrapes: https://prometheus.io/docs/instrumenting/exposition_formats/

        Counters begin at 0 with Larm's start.
        """
        self._bottle.response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        with self._store.reading() as db:
            views = read_views(db, config, self._clock.now(), history=False)
            pending = {name: row["pending"] for name, row in read_channels(db).items()}
            self._count(db)
        lines = []
        for family, samples in self._families(config, views, pending).items():
            name, kind, meaning = family.split(" ", 2)
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{rest} {value}" for rest, value in samples.items()]
        return "\n".join([*lines, ""])

    def _families(
        self, config: Config, views: Sequence[View], pending: Mapping[str, int]
    ) -> dict[str, Mapping[str, float]]:
        """The metrics: {name, type and help: {labels: value}}."""
        tries, counts = self._notifier.tries, self._counts

        def moments(of: str) -> dict[str, float]:
            found = [(view.monitor.key, getattr(view, of)) for view in views]
            return {labels(monitor=key): ms / SECOND for key, ms in found if ms is not None}

        return {
            "larm_build_info gauge The version that runs.": {labels(version=__version__): 1},
            "process_start_time_seconds gauge When Larm started and every counter was 0.":
                {"": self._started_at / SECOND},
            "larm_commit_seconds summary How long the writer's commits took.":
                {"_sum": self._store.commit_seconds, "_count": self._store.commits},
            "larm_gaps_total counter Times that Larm had not been watching.": {"": counts["gaps"]},
            "larm_gap_seconds_total counter How long Larm was not watching.":
                {"": counts["gap ms"] / SECOND},
            "larm_deliveries_total counter Messages given to a channel; failed is tried again.":
                {labels(channel=channel, result=result): tries[channel, result]
                 for channel in config.channels for result in ("sent", "failed")},
            "larm_deliveries_pending gauge Alerts that are yet to be sent.":
                {labels(channel=channel): pending.get(channel, 0) for channel in config.channels},
            "larm_monitor_state gauge 1 for the state that the monitor is in.":
                {labels(monitor=view.monitor.key, state=state): int(state == view.state)
                 for view in views for state in STATES},
            "larm_monitor_last_heartbeat_timestamp_seconds gauge When the last success came.":
                moments("received_at"),
            "larm_monitor_deadline_timestamp_seconds gauge When it goes down without a heartbeat.":
                moments("deadline_at"),
            "larm_monitor_last_duration_seconds gauge How long the last run took.":
                moments("last_duration"),
            "larm_events_total counter Times that a monitor went down or came up.":
                {labels(monitor=key, type=type): counts[f"{key} {type}"]
                 for key in config.monitors for type in ("down", "up")},
        }


def labels(**values: str) -> str:
    """What stands behind a metric's name: {monitor="backup"}."""
    escapes = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
    pairs = [f'{name}="{text.translate(escapes)}"' for name, text in values.items()]
    return f"{{{','.join(pairs)}}}"


def pause_length(value: object) -> int:
    """Milliseconds of a pause; raises ValueError."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):  # from the command line
        value = int(value)
    if not SECOND <= (ms := parse_duration(value)) <= LONGEST:
        longest = format_duration(LONGEST)
        raise ValueError(f"{show(value)} is out of range: 1 s to {longest} is allowed")
    return ms


# ======================================================================================
# Larm: wires the rooms, starts and stops them. The only place that knows them all.
# ======================================================================================

SENT_WITHIN = 5.0  # seconds that a stop leaves to what is being sent
LOOK_EVERY = 0.5  # seconds between two looks at larm.toml; it is read when two of them agree


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
        f"{one.name} changed" for one in dataclasses.fields(Config)
        if one.name not in ("path", "monitors", "channels")
        and getattr(old, one.name) != getattr(new, one.name)
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

    def __init__(
        self, config: Config, clock: Clock, read: tuple[int, ...] | None = None
    ) -> None:
        """Opens the database; raises StoreError. `read`: larm.toml's signature before it was read.
        """
        self.config = config
        self.clock = clock
        self.store = Store(config.database, clock, prepare)
        self.intake = Intake(self.store, clock)
        self.health = Health(self.store, clock)
        self.notifier = Notifier(self.store, clock)
        steps = (self.health.check, self.notifier.plan)
        self.watcher = Watcher(self.store, clock, self.intake, steps)
        self.web = Web(self.store, clock, self.intake, self.watcher, self.health, self.notifier)
        self._stopping = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._server: Server | None = None
        self._seen: tuple[int, ...] | None = None  # of larm.toml, at the last look
        self._read = read or signature(config.path)
        self.stop_asked = self.reload_asked = False  # signal handlers may set no more than a flag
        self._watched: list[Watched] = []
        self._failed_from: int | None = None  # monotonic: since when nothing can be written
        self._warned = False  # of that

    def begin(self) -> None:
        """Account for the time since the last run, and put the configuration in force; raises
        Unrecordable. Pings that come from now on are taken, so that nothing else may take long.
        """
        self.watcher.begin()
        self.use(self.config)

    def use(self, config: Config) -> None:
        """Put a configuration in force; raises Unrecordable."""
        now, old = self.clock.now(), self.config

        def put(db: sqlite3.Connection) -> None:
            before = self._watched
            self.store.after_rollback.append(lambda: take_over(before, old))
            hear(db, self.intake.take_heard())  # a monitor that is removed keeps its last ping
            take_over(adopt(db, config, now), config)
            retry_channels(db, [name for name, urls in config.channels.items()
                                if old.channels.get(name, urls) != urls], now)

        def take_over(watched: list[Watched], config: Config) -> None:
            self.config, self._watched = config, watched
            self.intake.use(watched)
            self.watcher.use(watched, config.keep)
            self.health.use(config)
            self.notifier.use(config, watched)
            self.web.use(config)

        self.store.submit(put).result(-1)

    def reload_if_saved(self) -> None:
        """Apply larm.toml if it was saved or if a reload was asked for: whole, or not at all."""
        found = signature(self.config.path)
        settled, self._seen = found == self._seen, found
        if not self.reload_asked and (found == self._read or not settled):
            return
        self.reload_asked = False
        self._read = found
        old = self.config
        try:
            config = load(old.path, os.environ, accepts)
        except ConfigError as error:
            if error.mistakes != self.health.mistakes:
                for mistake in error.mistakes[:20]:
                    log.error("%s; the last good configuration stays in force", mistake)
            self.health.note_file(error.mistakes)
            return
        self.health.note_file(())
        fixed: dict[str, Any] = {name: getattr(old, name) for name in ("listen", "database")}
        if any(getattr(config, name) != value for name, value in fixed.items()):
            log.warning("%s: listen and database take effect with a restart of Larm", config.path)
            if config.url == default_url(*config.listen):
                fixed["url"] = default_url(*old.listen)
            config = dataclasses.replace(config, **fixed)
        try:
            self.use(config)
        except Unrecordable:
            self._read = None  # again, once the database can be written
            return
        log.info("%s applied: %s", config.path, describe_changes(old, config))
        warn_of(config)

    def listen(self) -> None:
        """Bind the address; raises OSError."""
        logging.getLogger("waitress").setLevel(logging.CRITICAL)  # it logs what clients do wrong
        self._server = Server(
            self.web, self.web.take, PingAnswer(self.clock, None), self.config.listen,
            self.clock.monotonic,
        )
        self.store.wake = self._server.wake

    def run(self) -> str | None:
        """Serve until a stop is asked for; returns why it ended otherwise."""
        assert self._server is not None
        server = self._server
        self.watcher.caught_up = lambda: server.caught_up
        for name, target in {"server": server.run, "watcher": self._watch,
                             "watchdog": self._feed}.items():
            self._threads[name] = threading.Thread(target=target, name=name, daemon=True)
            self._threads[name].start()
        self._threads["writer"] = self.store.thread
        while not self.stop_asked:
            self._stopping.wait(LOOK_EVERY)
            try:
                self.reload_if_saved()
            except Exception as error:
                log.error("%s was not applied: %s: %s", self.config.path,
                          type(error).__name__, error)
            for name, thread in self._threads.items():
                if not thread.is_alive():
                    return f"the {name} thread ended"
        return None

    def tick(self, planned: int) -> int:
        """A step of the watcher, as Watcher.tick(); then send what is due."""
        try:
            planned = self.watcher.tick(planned)
            self._failed_from, self._warned = None, False
            return planned
        except Unrecordable as error:
            self._failed_from = self._failed_from or self.clock.monotonic()
            long = self.clock.monotonic() - self._failed_from >= UNRECORDED_FOR
            if long and not self._warned:
                self._warned = True
                text = f"heartbeats can't be recorded: {error}; pings get 503 till then"
                self.notifier.warn(text, lambda: self._failed_from is None)
            raise
        finally:
            self.notifier.deliver()

    def _watch(self) -> None:
        planned, failed = 0, ""
        while not self._stopping.wait(planned / SECOND):
            try:
                planned, failed = self.tick(planned), ""
            except Unrecordable:  # the writer says so in the log, once
                planned = TICK
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
        end = time.monotonic() + SENT_WITHIN
        if self._server is not None:
            self._server.close()
            self._threads["server"].join(3)
        if "watcher" in self._threads:
            self._threads["watcher"].join(1)
        self.watcher.end()
        self.notifier.stop(max(0.0, end - time.monotonic()))
        self.store.close()


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
                        help="default: ./larm.toml, else the one beside larm.py")
    parser: argparse.ArgumentParser = Arguments(
        prog="larm.py",
        parents=[config],
        description="Larm tells you when a job did not run.",
        epilog="Where there is no larm.toml, Larm writes a starter and runs it.",
    )
    parser.add_argument("--version", action="version", version=f"Larm {__version__}")
    parser.set_defaults(verb=serve)
    verbs = parser.add_subparsers(metavar="VERB")

    def verb(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, parents=[config])
        added.set_defaults(verb=run, name=name, duration=None)
        return added

    verb("serve", serve, "run Larm (the default)")
    verb("check", check, "read the configuration; print each mistake, or a summary")
    added = verb("status", status, "show the monitors and their states")
    added.add_argument("keys", metavar="KEY", nargs="*", help="only these monitors")
    added.add_argument("--json", action="store_true", help="print JSON")
    added = verb("pause", change_watching, "stop watching a monitor, for a time or until resumed")
    added.add_argument("key", metavar="KEY")
    added.add_argument("duration", metavar="DURATION", nargs="?", help='such as "2h"')
    added = verb("resume", change_watching, "watch a paused monitor again")
    added.add_argument("key", metavar="KEY")
    added = verb("add", add, "append a monitor to larm.toml")
    added.add_argument("key", metavar="KEY")
    added.add_argument("due", metavar="INTERVAL|SCHEDULE", nargs="+",
                       help='such as 1d, 15m, "0 3 * * *" or @daily')
    added = verb("run", run, "run a job and report its start, exit status and last output")
    added.usage = "larm.py run [-c FILE] [--url URL | KEY] [--] COMMAND [ARG...]"
    added.epilog = split_words.__doc__
    added.add_argument("--url", help="the ping URL; or set LARM_URL, which ps does not show")
    added.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    added = verb("test", test, "send a test alert")
    added.add_argument("channels", metavar="CHANNEL", nargs="*", help="only these channels")
    return parser.parse_args(argv)


class Unset(dict[str, str]):
    """An environment in which no variable is missing, for verbs that need none of the secrets."""

    missing = "variable-is-not-set-here"

    def __missing__(self, name: str) -> str:
        return self.missing + secrets.token_hex(8)  # no two tokens are the same


def find_file(arguments: argparse.Namespace) -> Path:
    """The configuration: that of -c, else ./larm.toml, else the one beside larm.py (cron starts
    at home)."""
    here, beside = Path("larm.toml"), Path(__file__).with_name("larm.toml")
    path: Path = getattr(arguments, "config", here if here.exists() or not beside.exists()
                         else beside)
    return path


def read_config(
    arguments: argparse.Namespace, accepts: Callable[[str], str | None] | None = None
) -> Config:
    """The configuration; `accepts`: only where the channels are used. Raises UserError."""
    try:
        environ = os.environ if accepts else Unset(os.environ)
        return load(find_file(arguments).absolute(), environ, accepts)
    except ConfigError as error:
        raise UserError(str(error), UNUSABLE if error.missing else BAD_NEWS) from None


def serve(arguments: argparse.Namespace) -> int:
    """Run Larm until it is told to stop."""
    flags = {"stop": False, "reload": False}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: flags.update(stop=True))
    signal.signal(signal.SIGHUP, lambda *_: flags.update(reload=True))
    path = find_file(arguments).absolute()
    if not hasattr(arguments, "config") and not path.exists():
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(STARTER)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror}", BAD_NEWS) from None
        log.info("wrote larm.toml with a first monitor: edit it; what you save is applied")
    read = signature(path)
    config = read_config(arguments, accepts)
    try:
        larm = Larm(config, Clock(), read)
    except StoreError as error:
        raise UserError(str(error), BAD_NEWS) from None
    try:
        larm.listen()
        larm.begin()
    except Unrecordable as error:
        raise UserError(f"{config.database}: can't be written: {error}", BAD_NEWS) from None
    except OSError as error:
        larm.store.close()
        raise UserError(
            f"{path}: listen: {config.listen[0] or '*'}:{config.listen[1]} can't be used: "
            f"{error.strerror or error}; stop what uses it, or set another address or port",
            BAD_NEWS,
        ) from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(larm, "stop_asked", True))
    signal.signal(signal.SIGHUP, lambda *_: setattr(larm, "reload_asked", True))
    larm.stop_asked |= flags["stop"]
    larm.reload_asked |= flags["reload"]
    announce(larm)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), (
        contextlib.redirect_stderr(nowhere)  # a plugin of Apprise's may print; the log has its own
    ):
        reason = larm.run()
        if reason:
            log.error("Larm ends: %s", reason)
        larm.close()
    log.info("Larm has stopped")
    logging.shutdown()
    os._exit(BAD_NEWS if reason else DONE)  # a sender that hangs must not hold the exit


def announce(larm: Larm) -> None:
    """Say what runs; on a terminal also how to ping what was never pinged (law 9)."""
    config, now = larm.config, larm.clock.now()
    log.info("Larm %s, configuration %s, database %s", __version__, config.path, config.database)
    log.info("dashboard %s/ (%s, %s)", config.url,
             counted(len(config.monitors), "monitor"), counted(len(config.channels), "channel"))
    if now < SANE:
        log.warning("the clock says %s: nobody is alerted until it is set",
                    iso_local(now, config.timezone))
    warn_of(config)
    if sys.stderr.isatty():
        with larm.store.reading() as db:
            views = read_views(db, config, now, history=False)
        for view in views:
            if view.state == "pending" and view.token:
                print(f"{view.monitor.name} has never been pinged. Add to its job:\n"
                      f"  {ping_command(config.ping_url(view.token))}", file=sys.stderr)


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
    now, zone = Clock().now(), config.timezone
    try:
        with contextlib.ExitStack() as stack:
            db = None
            if config.database.exists():
                db = stack.enter_context(contextlib.closing(connect(config.database, True)))
                if schema_version(db) < SCHEMA_VERSION:
                    raise ValueError("an older Larm wrote it: start Larm once")
            views = read_views(db, config, now, keys)
            known = read_monitors(db) if db else {}
            channels = read_channels(db) if db else {}
            beats = {key: list_heartbeats(db, known[key]["id"], BEATS_READ)
                     for key in keys or () if db and key in known}
    except (sqlite3.Error, ValueError) as error:
        raise UserError(f"{config.database}: can't be read: {error}", BAD_NEWS) from None
    is_running, tick = running_process(config.database)
    if not is_running:
        since = f" since {iso_local(tick, zone)[:19]}" if tick else ""
        print(f"Larm is not running{since}: nobody watches", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"data": [hide_unset(view).to_json(config, True) for view in views]},
                         indent=2))
        return DONE

    def moment(at: int | None) -> str:
        return "–" if at is None else f"{iso_local(at, zone)[:19]} ({far_from(at, now)})"

    lines = [("MONITOR", "STATE", "SINCE", "LAST HEARTBEAT", "NEXT DUE", "PING URL")]
    for view in map(hide_unset, views):
        missing = "(its token is not set here)" if view.monitor.token else \
            "(made when Larm first runs)"
        url = config.ping_url(view.token) if view.token else missing
        lines.append((view.monitor.key, view.state, moment(view.since), moment(view.received_at),
                      moment(view.expected_at), url))
    print_table(lines)
    for view in views:
        key, monitor = view.monitor.key, view.monitor
        if monitor.schedule:
            upcoming = [iso_local(at, zone) for at in monitor.schedule.next_after(now, 3)]
            print(f"{key}: {describe_rhythm(monitor)}; next {', '.join(upcoming)}")
        rhythm = read_rhythm(monitor, beats.get(key, ()))
        for what, found in (("heartbeats come every", rhythm.apart), ("runs take", rhythm.lasted),
                            ("advice:", rhythm.advice)):
            if found is not None:
                print(f"{key}: {what} {found}")
    for name in config.channels if not keys else ():
        print(f"channel {name}: {describe_channel(channels.get(name), zone, now)}")
    return DONE


def hide_unset(view: View) -> View:
    """Without a token that only stands for one whose variable is not set here."""
    made_up = (view.token or "").startswith(Unset.missing)
    return dataclasses.replace(view, token=None) if made_up else view


def change_watching(arguments: argparse.Namespace) -> int:
    """Pause a monitor, or resume it, whether or not Larm runs."""
    try:
        span = None if arguments.duration is None else pause_length(arguments.duration)
    except ValueError as error:
        raise UserError(f"larm.py: {error}", UNUSABLE) from None
    config = read_config(arguments)
    monitor, now = require_monitor(config, arguments.key), Clock().now()
    try:
        if not config.database.exists():
            raise ValueError("Larm has not run with it yet: start Larm once")
        with contextlib.closing(connect(config.database, readonly=False)) as db:
            if schema_version(db) < SCHEMA_VERSION:
                raise ValueError("an older Larm wrote its database: start Larm once")
            db.execute("BEGIN IMMEDIATE")
            pause_or_resume(db, monitor, arguments.name, span, now)
            db.execute("COMMIT")
    except (sqlite3.Error, ValueError) as error:
        what = config.path if isinstance(error, ValueError) else config.database
        raise UserError(f"{what}: {error}", BAD_NEWS) from None
    until = f" for {format_duration(span)}" if span else ""
    print(f"{monitor.key}: paused{until}" if arguments.name == "pause"
          else f"{monitor.key}: watched")
    return DONE


def add(arguments: argparse.Namespace) -> int:
    """Append a monitor to larm.toml, and print the line for its job."""
    path, key = find_file(arguments).absolute(), arguments.key
    value = " ".join(arguments.due)
    kind = "schedule" if value.startswith("@") or len(value.split()) > 2 else "interval"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "r+", encoding="utf-8", newline=""))
            fcntl.flock(file, fcntl.LOCK_EX)  # of two at once each sees what the other has added
            text = file.read()
            end = "\r\n" if "\r\n" in text else "\n"
            table = [f"[monitors.{key}]", f"{kind} = {json.dumps(value, ensure_ascii=False)}"]
            added = ("" if not text or text.endswith("\n") else end) + end.join(["", *table, ""])
            draft = Path(stack.enter_context(tempfile.TemporaryDirectory()), path.name)
            draft.write_text(text + added, encoding="utf-8", newline="")
            config = load(draft, Unset(os.environ), None)
            file.write(added)
        except ConfigError as error:
            own = [one.replace(str(draft), str(path)) for one in error.mistakes]
            raise UserError("\n".join([*own, f"{path}: nothing was added"]), BAD_NEWS) from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; nothing was added", UNUSABLE) from None
    print(f"{path}: added monitors.{key}, {describe_rhythm(config.monitors[key])}. Add to its job:")
    print(f"  {sys.executable} {Path(__file__).absolute()} run {key} -- COMMAND")
    return DONE


def run(arguments: argparse.Namespace) -> int:
    """Run a job and report on it; the exit code is the job's own.

    A mistake in what to report to is said, and does not keep the job from running.
    """
    path = find_file(arguments)
    url, key, command = split_words(arguments.words, arguments.url, path)
    if not command:
        raise UserError("larm.py run: no COMMAND to run; see larm.py run --help", UNUSABLE)
    return Job(command, lambda: find_ping_url(url, key, path)).run()


def split_words(
    words: list[str], url: str | None, path: Path
) -> tuple[str | None, str | None, list[str]]:
    """With --url, all that follows is the command. Otherwise "KEY -- COMMAND" and "-- COMMAND" say
    what is what. Without the "--", all is the command where LARM_URL is set; where it is not, the
    first word is KEY if larm.toml has that monitor.
    """  # what is returned: the ping URL, or else the KEY that leads to it; and the command
    given = url if url is not None else os.environ.get("LARM_URL") or None
    if words[:1] == ["--"]:
        return given, None, words[1:]
    if words[1:2] == ["--"] and url is None:
        return None, words[0], words[2:]
    if given is not None or not words:
        return given, None, words
    text = ""
    try:
        text = path.read_text("utf-8-sig", "replace")
        known = words[0] in dict(tomllib.loads(text)["monitors"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        known = f"[monitors.{words[0]}]" in text  # somebody edits it: the job runs all the same
    return None, words[0], words[1:] if known else words


def find_ping_url(url: str | None, key: str | None, path: Path) -> str:
    """The ping URL that what `split_words` found leads to; raises Unreported."""
    if url is not None:
        shape = r"(https?://[^\s/?#@]+(?:/[!-~]*?)?)/*([?#].*)?"
        if not (found := re.fullmatch(shape, url.strip(), re.IGNORECASE)):
            like = "http://nas.lan:5276/api/heartbeat/TOKEN"
            raise Unreported(f"--url or LARM_URL must look like {like}")
        return found[1]
    if key is None:
        raise Unreported("name a monitor, larm.py run KEY -- COMMAND, or set LARM_URL")
    try:
        address = load_address(path.absolute(), key, os.environ)
        token = address.token
        if not token and not address.database.exists():
            raise Unreported(f"{address.database}: no such file; start Larm once")
        if not token:
            with contextlib.closing(connect(address.database, readonly=True)) as db:
                schema_version(db)
                token = first(db, "SELECT made_token FROM monitors WHERE key = :key", key=key)
    except ConfigError as error:
        lost = "" if os.environ.get("LARM_URL") else "; and LARM_URL is not set"
        raise Unreported("; ".join(error.mistakes) + lost) from None
    except (OSError, sqlite3.Error, ValueError) as error:
        raise Unreported(f"{path}: its database can't be read: {error}") from None
    if not token:
        raise Unreported(f"{path}: monitors.{key} has no token yet; start Larm once")
    return f"{address.url}/api/heartbeat/{token}"


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
    failed = False
    for name in dict.fromkeys(chosen):
        with contextlib.redirect_stdout(io.StringIO()):  # a plugin may print, secrets too
            error = send_test(config, name)
        failed |= error is not None
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
