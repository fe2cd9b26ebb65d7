"""Random histories, run through a whole Larm: pings, failures, overlapping runs, parents, pauses,
reminders, quiet hours, restarts, gaps, clock changes, outages of the database and saved files. A
model of a few lines says which events must come, which time is left, and who may be told what.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from apprise.decorators import notify
from conftest import QUICK, START, FakeClock, House
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from larm import DAY, HOUR, MINUTE, SANE, SECOND, Unrecordable

HISTORIES = 500  # of single monitors: each example has four of them in one Larm
KEYS = ("a", "b", "c", "d")
SOON = 4 * SECOND  # an alert is under way by then: 3 s for what else there is to tell, and a tick
HELD = HOUR + 6 * MINUTE  # what a parent may hold an alert up by, once it is back
received: list[tuple[str, str]] = []  # (channel, title)


@notify(on="simulation")
def receive(_body, title, _type, meta, *_, **__):
    received.append((meta["host"], title))


@dataclass(eq=False)
class Timer:
    """What has so much time left: a deadline, or a run of a job."""

    left: int | None = None
    rid: str | None = None
    started: int = 0


@dataclass
class Model:
    """The oracle for one monitor. The time that is left passes only while Larm watches it; all else
    follows from that.
    """

    interval: int
    grace: int
    max_runtime: int | None = None
    remind: int | None = None
    quiet: bool = False
    parents: str = ""
    now: int = START
    state: str = "pending"
    away: str | None = None  # paused, removed
    deadline: Timer = field(default_factory=Timer)
    pause: Timer = field(default_factory=Timer)
    runs: list[Timer] = field(default_factory=list)
    lasted: int | None = None
    events: list[tuple[str, int, int | None]] = field(default_factory=list)
    reasons: list[set[str | None]] = field(default_factory=list)  # of each event, the possible ones
    down_at: int = 0
    steady: int = 0  # for how long Larm has watched since something changed
    silent: int = 0  # and no success came
    back: int = 10 * DAY  # since when it came up
    told: str = "up"
    downs_told: int = 0
    messages: list[int] = field(default_factory=list)  # when they came, on Larm's time of watching

    @property
    def whole(self) -> int:
        return self.interval + self.grace

    def due(self) -> list[int]:
        """After how much time something of it is due."""
        timers = {None: [self.deadline, *self.runs], "paused": [self.pause]}.get(self.away, [])
        return [timer.left + (self.away is None) for timer in timers if timer.left is not None]

    def watch(self, ms: int) -> None:
        """Time passes while Larm watches."""
        if self.away == "paused" and self.pause.left is not None and self.pause.left <= ms:
            rest, ms = ms - self.pause.left, self.pause.left
            self.now, self.silent, self.back = self.now + ms, self.silent + ms, self.back + ms
            self.resume()
            return self.watch(rest)
        timers = {None: [self.deadline, *self.runs], "paused": [self.pause]}.get(self.away, [])
        over = [timer for timer in timers if timer.left is not None and timer.left < ms]
        for timer in sorted(over, key=lambda timer: timer.left):
            if self.state != "down":
                self.change("down", self.now + timer.left,
                            "missed" if timer is self.deadline else "overran")
            timer.left = None
        for timer in timers:
            timer.left = None if timer.left is None else timer.left - ms
        self.now += ms
        self.steady += ms
        self.silent += ms
        self.back += ms
        return None

    def change(self, state: str, at: int, reason: str | None = None) -> None:
        """An event."""
        self.events.append((state, at, max(0, at - self.down_at) if state == "up" else None))
        self.reasons.append({reason})
        self.state, self.down_at, self.deadline.left = state, at, None
        self.steady = min(0, self.now - at)

    def start(self, rid: str | None) -> None:
        self.runs = [run for run in self.runs if run.rid != rid]
        self.runs.append(Timer(self.max_runtime, rid, self.now))

    def end(self, rid: str | None) -> None:
        """Of that run, and of what will not come to its end any more."""
        for run in [run for run in self.runs if run.rid == rid]:
            self.lasted = self.now - run.started
            self.runs.remove(run)
        lost = self.now - self.whole - (self.max_runtime or 0)
        self.runs = [run for run in self.runs if run.left is not None or run.started >= lost]

    def ping(self, rid: str | None) -> None:
        self.end(rid)
        if self.state == "down" and not self.away:
            self.change("up", self.now)
            self.back = 0
        if not self.away:
            self.state, self.deadline.left, self.silent = "up", self.whole, 0

    def fail(self, rid: str | None) -> None:
        self.end(rid)
        if self.state == "down":
            self.reasons[-1].add("failed")  # unless it was throttled
        elif not self.away:
            self.change("down", self.now, "failed")

    def leave(self, why: str, ms: int | None = None) -> None:
        self.away, self.pause.left, self.steady = why, ms, 0

    def resume(self) -> None:
        if self.state != "pending":
            self.state, self.deadline.left, self.told = "up", self.whole, "up"
        self.away, self.steady, self.silent = None, 0, 0

    def reload(self, interval: int, grace: int) -> None:
        if self.deadline.left is not None:
            self.deadline.left += interval + grace - self.whole
        self.interval, self.grace = interval, grace

    def set_clock(self, ms: int) -> None:
        self.now += ms
        for run in self.runs:
            run.started += ms


class History:
    """One history, in a real Larm and in four models side by side. Each step is a method."""

    def __init__(self, folder: Path, models: dict[str, Model]) -> None:
        received.clear()
        self.models = models
        self.watched = 0  # for how long Larm has watched
        self.looks: list[int] = []  # when, on that time, something may become due
        self.seen = self.started = self.outages = 0
        self.calm_from = -1  # when the last gap, clock change, pause or saved file came
        self.clock = FakeClock()
        self.house = House(folder, self.toml(), self.clock)
        self.house.tokens = {key: f"a-token-for-monitor-{key}" for key in KEYS}

    def toml(self) -> str:
        text = 'keep = "3660d"\ntimezone = "UTC"\n[channels]\n'
        text += "".join(f'{key} = "simulation://{key}"\n' for key in KEYS)
        for key, model in self.models.items():
            above = [parent for parent in model.parents if self.models[parent].away != "removed"]
            settings = {
                "interval": model.interval / SECOND, "grace": model.grace / SECOND,
                "max_runtime": model.max_runtime and model.max_runtime / SECOND,
                "remind": model.remind and model.remind / SECOND,
                "quiet": model.quiet and ["22:00-07:00"], "depends_on": above,
                "notify": [key], "token": f"a-token-for-monitor-{key}",
            }  # fmt: skip
            if model.away != "removed":
                text += f"[monitors.{key}]\n" + "".join(
                    f"{name} = {value!r}\n" for name, value in settings.items() if value
                )
                text += "" if model.grace else "grace = 0\n"
        return text + '[monitors.probe]\ninterval = "1h"\n'

    # Time

    def watch(self, ms: int) -> None:
        """Time passes; the watcher ticks when something is due, as it does, and at the end."""
        end = self.watched + ms
        self.look_after_events()
        self.looks = sorted(look for look in self.looks if look > self.watched)[:20]
        while self.watched < end:
            due = [self.watched + at for model in self.models.values() for at in model.due()]
            step = min([end, *(at for at in due + self.looks if at > self.watched)]) - self.watched
            self.clock.advance(step)
            self.pass_time(step)
        self.pass_time(0)

    def pass_time(self, ms: int) -> None:
        """With a tick at its end."""
        for model in self.models.values():
            model.watch(ms)
        self.watched += ms
        self.look_after_events()
        self.house.tick()
        self.house.larm.notifier.wait(10)
        self.hear()
        self.check_alerts()

    def look_after_events(self) -> None:
        """Something is due a while after each, and something is held by it for a longer while."""
        count = sum(len(model.events) for model in self.models.values())
        if count > self.seen:
            self.looks += [self.watched + after for after in (SOON, 5 * MINUTE + SOON, HELD)]
        self.seen = count

    # What users see

    def hear(self) -> None:
        """Every message must be true, and come when it may."""
        for key, title in received:
            model = self.models[key]
            for word in re.findall(rf"(STILL DOWN|DOWN|UP): {key}\b", title):
                said = word.rpartition(" ")[2].lower()
                seen = f"{key}: {word} at {self.watched}"
                assert model.events, seen
                assert model.events[-1][0] == said, seen  # it may have been resumed since
                assert said == "up" or not self.must_wait(model), seen
                assert not self.is_quiet(model), seen
                if word == "STILL DOWN":
                    assert model.told == "down", seen
                    assert model.remind, seen
                    assert not model.away, seen
                    assert self.watched - model.messages[-1] >= model.remind - SOON, seen
                if word == "DOWN":
                    model.downs_told += 1
                    assert model.downs_told <= [one[0] for one in model.events].count("down"), seen
                model.told = model.state
                model.messages.append(self.watched)
                if model.remind and said == "down":
                    self.looks += [self.watched + model.remind + at for at in (1, SOON)]
        received.clear()

    def above(self, model: Model) -> list[Model]:
        """What a monitor depends on, directly or not, and is watched."""
        parents = [self.models[key] for key in model.parents]
        known = [parent for parent in parents if parent.away != "removed"]
        found = [one for parent in known for one in [parent, *self.above(parent)]]
        return [parent for parent in found if not parent.away]

    def must_wait(self, model: Model) -> bool:
        """Whether one that it depends on is down, or came back an interval ago at most, or may be
        down, too: it was not heard of since.
        """
        calm, above = self.watched - self.calm_from, self.above(model)
        if model.away == "removed":
            return False
        return any(parent.state == "down" for parent in above) or any(
            parent.back < min(model.interval, HOUR, model.steady)
            or (parent.state == "up" and model.steady < min(parent.silent, 5 * MINUTE))
            for parent in above
            if model.reasons[-1] == {"missed"} and max(parent.steady, model.silent) < calm
        )  # fmt: skip

    def is_quiet(self, model: Model) -> bool:
        hour = self.clock.now() % DAY // HOUR
        return model.quiet and model.away != "removed" and not 7 <= hour < 22

    def check_alerts(self) -> None:
        """Nothing is lost: what has held for a while has been told, unless something keeps it."""
        for key, model in self.models.items():
            above = self.above(model)
            lasts = min([model.steady, self.watched - self.calm_from,
                         *(parent.steady for parent in above)])  # fmt: skip
            lasts -= HELD if model.parents else 0
            lasts -= DAY if model.quiet else 0
            recent = [at for at in model.messages if at > self.watched - HOUR]
            if (lasts < SOON or len(recent) >= 6 or model.state == "pending"
                    or model.away == "removed" or self.is_quiet(model)
                    or any(parent.state == "down" for parent in above)):
                continue
            assert model.told == model.state, f"{key} at {self.watched}"

    def check(self) -> None:
        events = self.house.events()
        shown = {one["id"]: one for one in self.house.api("monitors")}
        for key, model in self.models.items():
            own = [one for one in events if one["monitor"] == key]
            assert [(one["type"], one["at"], one["down_ms"]) for one in own] == model.events, key
            for event, reasons in zip(own, model.reasons, strict=True):
                assert event["reason"] in reasons, key
            if model.away == "removed":
                assert key not in shown
                continue
            monitor = shown[key]
            assert monitor["state"].replace("late", "up") == (model.away or model.state), key
            assert monitor["last_duration_ms"] == model.lasted, key
            if any(run.left is not None for run in model.runs) or not model.runs:
                assert monitor["running"] == bool(model.runs), key
            left = None if model.away else model.deadline.left
            assert left == (monitor["deadline_at"] and monitor["deadline_at"] - self.clock.now())
            assert (monitor["state"] == "late") == (left is not None and left < model.grace), key

    # Steps

    def ping(self, key: str, which: int, action: str = "") -> None:
        """It ends one of the open runs, if there are any."""
        model = self.models[key]
        if model.away == "removed" or (model.away and model.state == "pending"):
            return
        runs = model.runs
        rid = runs[which % len(runs)].rid if runs else None
        self.house.ping(key, action, rid=rid)
        model.fail(rid) if action else model.ping(rid)

    def start(self, key: str, _: int = 0) -> None:
        """Of a run with a name of its own; some jobs give none."""
        if not self.models[key].away:
            self.started += 1
            rid = f"run {self.started}" if key in "ab" else None
            self.house.ping(key, "start", rid=rid)
            self.models[key].start(rid)

    def watch_a_run(self, key: str, off: int, action: str) -> None:
        """A run that ends near its limit."""
        self.start(key)
        self.watch(max(0, (self.models[key].max_runtime or 0) + off))
        self.ping(key, -1, action)

    def watch_then_ping(self, key: str, intervals: int, off: int) -> None:
        """A ping near where it matters: around the deadline, or one of its multiples."""
        model = self.models[key]
        self.watch(max(0, intervals * model.interval + model.grace + off))
        self.ping(key, 0)

    def off(self, ms: int, set_by: int, crash: bool) -> None:
        """A restart, the clock having been set meanwhile. Nobody can tell that from time that
        passed, unless it is earlier now than it was.
        """
        self.house.crash() if crash else self.house.stop()
        set_by *= self.is_sane(set_by)
        self.clock.advance(ms)
        self.clock.set_wall(set_by)
        self.clock.resync()
        self.house.open()
        for model in self.models.values():
            model.set_clock(min(0, ms + set_by))
        self.passed_unwatched(max(0, ms + set_by))

    def stopped(self, ms: int) -> None:
        """As by SIGSTOP, or a paused virtual machine: the next tick comes late."""
        self.house.sleep_through(ms)
        self.passed_unwatched(ms)

    def outage(self, ms: int) -> None:
        """Nothing can be written for so long. (Larm looks once a real second: these are few.)"""
        self.outages += 1
        if self.outages > 1 or ms % 250:
            return
        with self.house.full_disk():
            self.house.ping("probe", "log", status=503)
            self.clock.advance(ms)
            with contextlib.suppress(Unrecordable):
                self.house.tick()
        self.house.recover()
        self.passed_unwatched(ms)

    def clock_is_set(self, ms: int) -> None:
        if self.is_sane(ms):
            self.clock.set_wall(ms)
            self.calm_from = self.watched
            for model in self.models.values():
                model.set_clock(ms)
            self.pass_time(0)

    def is_sane(self, set_by: int) -> bool:
        return SANE + 300 * DAY < self.clock.now() + set_by < START + 3000 * DAY

    def passed_unwatched(self, ms: int) -> None:
        self.calm_from = self.watched
        for model in self.models.values():
            model.now += ms
        self.pass_time(0)

    def pause(self, key: str, ms: int | None) -> None:
        model = self.models[key]
        if model.away != "removed" and not model.runs:
            self.calm_from = self.watched
            self.house.pause(key, f"{ms / SECOND}s" if ms else None)
            model.leave("paused", ms)

    def resume(self, key: str) -> None:
        if self.models[key].away == "paused":
            self.house.resume(key)
            self.models[key].resume()

    def save(self, key: str, rhythm: tuple[int, int]) -> None:
        self.models[key].reload(*rhythm)
        self.calm_from = self.watched
        self.house.save(self.toml())
        self.pass_time(0)

    def remove(self, key: str, ms: int) -> None:
        """And put back after a while, with the time that it had left."""
        model = self.models[key]
        if not model.away:
            model.leave("removed")
            self.house.save(self.toml())
            self.calm_from = self.watched
            self.watch(ms)
            model.leave(None)
            self.house.save(self.toml())
            self.calm_from = self.watched
            self.pass_time(0)


spans = st.one_of(st.integers(1, MINUTE), st.integers(1, 5 * HOUR), st.integers(1, 10 * DAY))
absences = st.integers(10_001, MINUTE) | st.integers(MINUTE, 10 * DAY)
clocks = st.one_of(
    st.integers(5_001, 3 * HOUR), st.integers(-3 * HOUR, -5_001),
    st.integers(20 * DAY, 400 * DAY), st.integers(-400 * DAY, -20 * DAY),
)  # fmt: skip
rhythms = st.tuples(
    st.sampled_from([SECOND, 90 * SECOND, HOUR, DAY, 7 * DAY]),
    st.sampled_from([0, SECOND, 10 * SECOND, HOUR, DAY]),
)
limits = st.none() | st.integers(SECOND, MINUTE) | st.integers(SECOND, 5 * HOUR)
key, off = st.sampled_from(KEYS), st.integers(-2, 2)
which = st.integers(0, 3)
steps = st.one_of(
    st.tuples(st.just("watch"), spans),
    st.tuples(st.just("ping"), key, which, st.sampled_from(["", "fail", "1"])),
    st.tuples(st.just("ping"), key, which, st.just("")),
    st.tuples(st.just("ping"), key, which, st.just("")),
    st.tuples(st.just("start"), key, which),
    st.tuples(st.just("watch_then_ping"), key, which, off),
    st.tuples(st.just("watch_a_run"), key, off, st.sampled_from(["", "3"])),
    st.tuples(st.just("off"), st.integers(0, MINUTE) | absences, st.just(0) | clocks,
              st.booleans()),
    st.tuples(st.just("stopped"), absences),
    st.tuples(st.just("clock_is_set"), clocks),
    st.tuples(st.just("pause"), key, st.none() | spans.map(lambda ms: max(ms, SECOND))),
    st.tuples(st.just("resume"), key),
    st.tuples(st.just("save"), key, rhythms),
    st.tuples(st.just("remove"), key, spans),
    st.tuples(st.just("outage"), absences),
)  # fmt: skip
parents = st.sampled_from([("", "", "", ""), ("", "a", "b", ""), ("", "a", "a", "bc")])


@settings(
    max_examples=HISTORIES // len(KEYS), deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
)  # fmt: skip
@given(
    st.lists(rhythms, min_size=4, max_size=4), st.lists(limits, min_size=4, max_size=4),
    st.lists(st.sampled_from([None, None, 6 * HOUR]), min_size=4, max_size=4), parents,
    st.sampled_from(["", "", "ad"]), st.sampled_from(["", "abcd", "abcd"]),
    st.lists(steps, min_size=5, max_size=16),
)  # fmt: skip
def test_random_histories_bring_the_events_and_alerts_that_the_model_says(
    rhythms, limits, reminders, parents, quiet, heard, steps
):
    models = {
        key: Model(*rhythms[n], limits[n], reminders[n], key in quiet, parents[n])
        for n, key in enumerate(KEYS)
    }
    folder = Path(tempfile.mkdtemp(dir=QUICK))
    history = History(folder, models)
    try:
        for key in heard:
            history.ping(key, 0)
        for name, *values in steps:
            getattr(history, name)(*values)
        history.watch(30 * SECOND)  # what only memory knew is written by then
        history.check()
        for _ in range(4):  # and a day and some hours until nothing keeps an alert
            history.watch(7 * HOUR)
        history.check()
    finally:
        history.house.crash()
        shutil.rmtree(folder)
