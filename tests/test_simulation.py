"""Random histories of pings, failures, restarts, gaps, clock changes, reloads and pauses, run
through the real Store, Intake and Watcher; a model of a few lines says which events must come.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from conftest import START, FakeClock, House
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import larm

KEYS = ("a", "b", "c", "d")
HISTORIES = 2_000  # of single monitors: each example has four of them in one Larm
SECOND, HOUR, DAY = larm.SECOND, larm.HOUR, larm.DAY


@dataclass(eq=False)
class Job:
    """A run of a job, as the model knows it; `left` is its time until it has overrun."""

    rid: str | None
    started: int
    left: int | None


class Model:
    """The oracle for one monitor. `left` is the time until its deadline, and passes only while Larm
    watches, as do those of its runs; all else follows from that.
    """

    def __init__(self, interval: int, grace: int, max_runtime: int | None) -> None:
        self.interval, self.grace, self.max_runtime = interval, grace, max_runtime
        self.now = START
        self.state = "pending"
        self.left: int | None = None
        self.paused = False
        self.pause_left: int | None = None
        self.runs: list[Job] = []
        self.last_start: int | None = None
        self.lasted: int | None = None
        self.events: list[tuple[str, int, int | None]] = []
        self.reasons: list[set[str | None]] = []  # for each event, those that may be
        self.down_at = 0

    def watch(self, ms: int) -> None:
        if self.paused and self.pause_left is not None and self.pause_left <= ms:
            rest = ms - self.pause_left
            self.now += self.pause_left
            self.resume()
            self.watch(rest)
            return
        if self.paused:
            self.pause_left = None if self.pause_left is None else self.pause_left - ms
        else:
            self.pass_time(ms)
        self.now += ms

    def pass_time(self, ms: int) -> None:
        """What comes first is first: a deadline, or the end of a run's time."""
        over = [run for run in self.runs if run.left is not None and run.left < ms]
        for run in sorted(over, key=lambda run: run.left):
            self.pass_deadline(min(ms, run.left + 1))
            if self.state != "down":
                self.go_down(self.now + run.left, "overran")
            run.left = None
        self.pass_deadline(ms)
        self.left = None if self.left is None else self.left - ms
        for run in self.runs:
            run.left = None if run.left is None else run.left - ms

    def pass_deadline(self, ms: int) -> None:
        if self.left is not None and self.left < ms:
            self.go_down(self.now + self.left, "missed")

    def go_down(self, at: int, reason: str) -> None:
        self.state, self.left, self.down_at = "down", None, at
        self.events.append(("down", at, None))
        self.reasons.append({reason})

    def start(self, rid: str | None) -> None:
        self.runs.append(Job(rid, self.now, self.max_runtime))
        self.last_start = self.now

    def end(self, rid: str | None) -> None:
        """Of its rid, else without one, else any if it names none: the last; and what is lost."""
        own = [run for run in self.runs if run.rid == rid]
        found = own or [run for run in self.runs if run.rid is None] or (
            self.runs if rid is None else []
        )
        if found:
            run = found[-1]
            self.lasted = self.now - run.started
            before = self.runs[: self.runs.index(run)]
            self.runs = [one for one in self.runs
                         if one is not run and not (one in before and one.rid is None)]
        lost = self.now - self.interval - self.grace - (self.max_runtime or 0)
        self.runs = [one for one in self.runs if one.left is not None or one.started >= lost]

    def ping(self, rid: str | None) -> None:
        self.end(rid)
        if self.paused:
            return
        if self.state == "down":
            self.events.append(("up", self.now, max(0, self.now - self.down_at)))
            self.reasons.append({None})
        self.state, self.left = "up", self.interval + self.grace

    def fail(self, rid: str | None) -> None:
        self.end(rid)
        if self.paused:
            return
        if self.state == "down":
            self.reasons[-1].add("failed")  # if it was not throttled
        else:
            self.go_down(self.now, "failed")

    def pause(self, ms: int | None) -> None:
        self.paused, self.pause_left = True, ms

    def resume(self) -> None:
        if self.paused and self.state != "pending":
            self.state, self.left = "up", self.interval + self.grace
        for run in self.runs if self.paused else ():
            run.left = None
        self.paused, self.pause_left = False, None

    def reload(self, interval: int, grace: int) -> None:
        if self.left is not None:
            self.left += interval + grace - self.interval - self.grace
        self.interval, self.grace = interval, grace
        self.watch(0)

    def away(self, ms: int) -> None:
        """Larm was not watching."""
        self.now += ms

    def set_clock(self, ms: int) -> None:
        self.now += ms
        for run in self.runs:
            run.started += ms


spans = st.one_of(
    st.integers(1, 60 * SECOND), st.integers(1, 5 * HOUR), st.integers(1, 100 * DAY)
)
rhythms = st.tuples(
    st.sampled_from([SECOND, 90 * SECOND, HOUR, DAY, 7 * DAY]),
    st.sampled_from([0, SECOND, 10 * SECOND, HOUR, DAY]),
)
limits = st.one_of(st.none(), st.integers(SECOND, 60 * SECOND), st.integers(SECOND, 5 * HOUR))
keys = st.sampled_from(KEYS)
ends = st.one_of(st.none(), st.just("another"), st.integers(0, 3))  # which run: the last, ...
steps = st.one_of(
    st.tuples(st.just("watch"), spans),
    st.tuples(st.just("ping"), keys, ends),
    st.tuples(st.just("start"), keys, st.booleans()),
    st.tuples(st.just("start"), keys, st.booleans()),
    st.tuples(st.just("watch then ping"), keys, st.integers(0, 3), st.integers(-2, 2)),
    st.tuples(st.just("watch a run"), keys, st.integers(-2, 2), st.sampled_from(["", "3"]), ends),
    st.tuples(st.just("fail"), keys, st.sampled_from(["fail", "1", "255"]), ends),
    st.tuples(st.just("restart"), st.integers(0, 40 * DAY), st.booleans()),
    st.tuples(st.just("stopped"), st.integers(larm.GAP + 1, 40 * DAY)),
    st.tuples(st.just("clock"), st.one_of(
        st.integers(larm.CLOCK_SET + 1, 3 * HOUR),
        st.integers(-3 * HOUR, -larm.CLOCK_SET - 1),
        st.integers(20 * DAY, 9000 * DAY),
        st.integers(-900 * DAY, -20 * DAY),
    )),
    st.tuples(st.just("pause"), keys, st.one_of(st.none(), spans)),
    st.tuples(st.just("resume"), keys),
    st.tuples(st.just("reload"), keys, rhythms),
)


class Run:
    """One history, in a real Larm and in four models side by side."""

    def __init__(
        self, folder: Path, rhythms: list[tuple[int, int]], limits: list[int | None]
    ) -> None:
        self.rhythms = dict(zip(KEYS, rhythms, strict=True))
        self.limits = dict(zip(KEYS, limits, strict=True))
        self.models = {key: Model(*self.rhythms[key], self.limits[key]) for key in KEYS}
        self.started: dict[str, list[str]] = {key: [] for key in KEYS}  # the rids
        self.clock = FakeClock()
        self.house = House(folder, self.toml(), self.clock)
        self.hurry()

    def toml(self) -> str:
        return 'keep = "3660d"\n' + "\n".join(
            f"[monitors.{key}]\ninterval = {interval / SECOND}\ngrace = {grace / SECOND}"
            + (f"\nmax_runtime = {self.limits[key] / SECOND}" if self.limits[key] else "")
            for key, (interval, grace) in self.rhythms.items()
        )

    def hurry(self) -> None:
        """No power is lost here: years pass sooner without fsync."""
        self.house.store.write(lambda _: None)
        self.house.store._db.execute("PRAGMA synchronous = OFF")

    def step(self, name: str, *values: object) -> None:
        getattr(self, name.replace(" ", "_"))(*values)

    def watch(self, ms: int) -> None:
        """Time passes; the watcher ticks when something is due, as it does, and at the end."""
        end = self.clock.now() + ms
        while (now := self.clock.now()) < end:
            with self.house.store.reading() as db:
                due = larm.next_due_at(db, now)
            self.clock.advance(min(end, due + 1 if due else end) - now)
            self.house.tick()
        self.house.tick()
        for model in self.models.values():
            model.watch(ms)

    def ping(self, key: str, which: int | str | None = None) -> None:
        rid = self.rid(key, which)
        self.house.ping(key, rid=rid)
        self.models[key].ping(rid)

    def rid(self, key: str, which: int | str | None) -> str | None:
        """That of one of the runs that started last; or of none that has started."""
        if not isinstance(which, int) or which >= len(self.started[key]):
            return None if which is None else "another"
        return self.started[key][-1 - which]

    def start(self, key: str, named: bool) -> None:
        """A start, once its window is over."""
        model = self.models[key]
        window = -(-model.interval // 10)
        if model.last_start is not None and 0 <= model.now - model.last_start < window:
            self.watch(model.last_start + window - model.now)
        rid = f"run {len(self.started[key])}" if named else None
        self.started[key] += [rid] if rid else []
        self.house.ping(key, "start", rid=rid)
        model.start(rid)

    def watch_a_run(self, key: str, off: int, action: str, which: int | str | None) -> None:
        """A run that ends near its limit."""
        self.start(key, True)
        self.watch(max(0, (self.models[key].max_runtime or 0) + off))
        self.fail(key, action, which) if action else self.ping(key, which)

    def watch_then_ping(self, key: str, intervals: int, off: int) -> None:
        """A ping near where it matters: around the deadline, or one of its multiples."""
        interval, grace = self.rhythms[key]
        self.watch(max(0, intervals * interval + grace + off))
        self.ping(key)

    def fail(self, key: str, action: str, which: int | str | None) -> None:
        rid = self.rid(key, which)
        self.house.ping(key, action, rid=rid)
        self.models[key].fail(rid)

    def restart(self, away: int, crash: bool) -> None:
        self.house.restart(away, crash=crash)
        self.hurry()
        self.passed_unwatched(away)

    def stopped(self, ms: int) -> None:
        """As by SIGSTOP, or a paused virtual machine: the next tick comes late."""
        self.clock.advance(ms)
        self.house.watcher.tick(0)
        self.passed_unwatched(ms)

    def clock_(self, ms: int) -> None:
        self.clock.set_wall(ms)
        self.house.tick()
        for model in self.models.values():
            model.set_clock(ms)
        self.watch(0)

    def passed_unwatched(self, ms: int) -> None:
        for model in self.models.values():
            model.away(ms)
        self.watch(0)

    def pause(self, key: str, ms: int | None) -> None:
        self.change(key, "pause", ms)
        self.models[key].pause(ms)

    def resume(self, key: str) -> None:
        self.change(key, "resume", None)
        self.models[key].resume()

    def change(self, key: str, verb: str, ms: int | None) -> None:
        monitor = self.house.config.monitors[key]
        now = self.clock.now()
        self.house.store.write(lambda db: larm.pause_or_resume(db, monitor, verb, ms, now))

    def reload(self, key: str, rhythm: tuple[int, int]) -> None:
        self.rhythms[key] = rhythm
        self.house.reload(self.toml())
        self.house.tick()
        self.models[key].reload(*rhythm)
        self.watch(0)

    def check(self) -> None:
        self.watch(0)
        for key, model in self.models.items():
            events = self.house.events(key)
            assert [(e["type"], e["at"], e["down_ms"]) for e in events] == model.events, key
            for event, reasons in zip(events, model.reasons, strict=True):
                assert event["reason"] in reasons, key
            row = self.house.monitor(key)
            assert row["state"] == model.state, key
            assert row["last_duration_ms"] == model.lasted, key
            runs = self.house.rows("SELECT * FROM runs WHERE monitor_id = ? ORDER BY id", row["id"])
            assert [run["rid"] for run in runs] == [run.rid for run in model.runs], key
            if model.left is not None and not model.paused:
                assert row["deadline_at"] - self.clock.now() == model.left, key


@settings(
    max_examples=HISTORIES // len(KEYS), deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
)
@given(
    st.lists(rhythms, min_size=4, max_size=4), st.lists(limits, min_size=4, max_size=4),
    st.lists(steps, min_size=5, max_size=18),
)
def test_random_histories_bring_exactly_the_events_that_the_model_says(rhythms, limits, steps):
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    run = Run(folder, rhythms, limits)
    try:
        for name, *values in steps:
            run.step("clock_" if name == "clock" else name, *values)
        run.check()
    finally:
        run.house.store.close()
        shutil.rmtree(folder)
