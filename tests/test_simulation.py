"""Random histories of pings, failures, restarts, gaps, clock changes, reloads and pauses, run
through the real Store, Intake and Watcher; a model of a few lines says which events must come.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from conftest import START, FakeClock, House
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import larm

KEYS = ("a", "b", "c", "d")
HISTORIES = 2_000  # of single monitors: each example has four of them in one Larm
SECOND, HOUR, DAY = larm.SECOND, larm.HOUR, larm.DAY


class Model:
    """The oracle for one monitor. `left` is the time until its deadline, and passes only while Larm
    watches; all else follows from that.
    """

    def __init__(self, interval: int, grace: int) -> None:
        self.interval, self.grace = interval, grace
        self.now = START
        self.state = "pending"
        self.left: int | None = None
        self.paused = False
        self.pause_left: int | None = None
        self.events: list[tuple[str, int, int | None]] = []
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
        elif self.left is not None:
            if self.left < ms:
                self.go_down(self.now + self.left)
            else:
                self.left -= ms
        self.now += ms

    def go_down(self, at: int) -> None:
        self.state, self.left, self.down_at = "down", None, at
        self.events.append(("down", at, None))

    def ping(self) -> None:
        if self.paused:
            return
        if self.state == "down":
            self.events.append(("up", self.now, max(0, self.now - self.down_at)))
        self.state, self.left = "up", self.interval + self.grace

    def fail(self) -> None:
        if not self.paused and self.state != "down":
            self.go_down(self.now)

    def pause(self, ms: int | None) -> None:
        self.paused, self.pause_left = True, ms

    def resume(self) -> None:
        if self.paused and self.state != "pending":
            self.state, self.left = "up", self.interval + self.grace
        self.paused, self.pause_left = False, None

    def reload(self, interval: int, grace: int) -> None:
        if self.left is not None:
            self.left += interval + grace - self.interval - self.grace
        self.interval, self.grace = interval, grace
        self.watch(0)


spans = st.one_of(
    st.integers(1, 60 * SECOND), st.integers(1, 5 * HOUR), st.integers(1, 100 * DAY)
)
rhythms = st.tuples(
    st.sampled_from([SECOND, 90 * SECOND, HOUR, DAY, 7 * DAY]),
    st.sampled_from([0, SECOND, 10 * SECOND, HOUR, DAY]),
)
keys = st.sampled_from(KEYS)
steps = st.one_of(
    st.tuples(st.just("watch"), spans),
    st.tuples(st.just("ping"), keys),
    st.tuples(st.just("watch then ping"), keys, st.integers(0, 3), st.integers(-2, 2)),
    st.tuples(st.just("fail"), keys),
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

    def __init__(self, folder: Path, rhythms: list[tuple[int, int]]) -> None:
        self.rhythms = dict(zip(KEYS, rhythms, strict=True))
        self.models = {key: Model(*rhythm) for key, rhythm in self.rhythms.items()}
        self.clock = FakeClock()
        self.house = House(folder, self.toml(), self.clock)
        self.hurry()

    def toml(self) -> str:
        return 'keep = "3660d"\n' + "\n".join(
            f"[monitors.{key}]\ninterval = {interval / SECOND}\ngrace = {grace / SECOND}"
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

    def ping(self, key: str) -> None:
        self.house.ping(key)
        self.models[key].ping()

    def watch_then_ping(self, key: str, intervals: int, off: int) -> None:
        """A ping near where it matters: around the deadline, or one of its multiples."""
        interval, grace = self.rhythms[key]
        self.watch(max(0, intervals * interval + grace + off))
        self.ping(key)

    def fail(self, key: str) -> None:
        self.house.ping(key, "fail")
        self.models[key].fail()

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
        self.passed_unwatched(ms)

    def passed_unwatched(self, ms: int) -> None:
        for model in self.models.values():
            model.now += ms
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
            row = self.house.monitor(key)
            assert row["state"] == model.state, key
            if model.left is not None and not model.paused:
                assert row["deadline_at"] - self.clock.now() == model.left, key


@settings(
    max_examples=HISTORIES // len(KEYS), deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
)
@given(st.lists(rhythms, min_size=4, max_size=4), st.lists(steps, min_size=5, max_size=18))
def test_random_histories_bring_exactly_the_events_that_the_model_says(rhythms, steps):
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    run = Run(folder, rhythms)
    try:
        for name, *values in steps:
            run.step("clock_" if name == "clock" else name, *values)
        run.check()
    finally:
        run.house.store.close()
        shutil.rmtree(folder)
