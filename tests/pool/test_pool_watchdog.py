"""Who is given up for hanging, on a clock that a test moves."""

from __future__ import annotations

import itertools

from maehpc.pool import Done, Event, Joined, Left, Schedule, Shard, Work, drive
from maehpc.pool.watchdog import ASLEEP_S, LOOK_S, Watchdog

SHARDS = tuple(Shard("store", number, 4) for number in range(40))


class Watched:
    """A schedule whose workers each hold two shards."""

    def __init__(self, *workers: str) -> None:
        self.now = 0.0
        self.schedule = Schedule({"store": Work(SHARDS)})
        self.watchdog = Watchdog(factor=10, least_s=60, clock=lambda: self.now)
        for worker in workers:
            self.schedule.join(worker)
            self.watchdog.heard(worker)
            self.deal(worker)

    def deal(self, worker: str) -> None:
        while self.schedule.deal(worker) is not None:
            pass

    def done(self, worker: str, seconds: float) -> None:
        self.schedule.done(worker, self.schedule.held(worker)[0], seconds)
        self.watchdog.heard(worker)
        self.deal(worker)

    def wait(self, seconds: float) -> list[str]:
        """Who hangs, in looks at the interval of the driver's loop."""
        found: list[str] = []
        until = self.now + seconds
        while self.now < until:
            self.now += min(LOOK_S, until - self.now)
            found += [worker for worker, _ in self.watchdog.hung(self.schedule)]
        return found


def test_nobody_is_judged_by_what_shards_of_another_store_take() -> None:
    seconds = itertools.count(0, 2)
    watchdog = Watchdog(factor=10, least_s=60, clock=lambda: next(seconds))
    slow = tuple(Shard("slow", number, 4) for number in range(2))
    schedule = Schedule({"store": Work(SHARDS), "slow": Work(slow, cost=1e-3)})
    for worker in ("a", "b"):
        schedule.join(worker)
        while schedule.deal(worker) is not None:
            watchdog.heard(worker)
    for shard in schedule.held("a"):
        schedule.done("a", shard, 1.0)
    while (shard := schedule.deal("a")) is not None and shard.store != "slow":
        schedule.done("a", shard, 1.0)
    assert schedule.held("a")[0].store == "slow"
    watchdog.heard("a")
    killed = []
    for _ in range(2000):
        watchdog.heard("b")
        killed += list(watchdog.hung(schedule))
    assert not killed


def test_a_file_system_that_is_away_costs_nobody() -> None:
    watched = Watched("a", "b", "c")
    watched.done("a", 3.0)
    watched.wait(5)
    watched.done("b", 3.0)
    watched.done("c", 3.0)
    assert watched.wait(300) == []
    watched.done("b", 3.0)
    assert sorted(watched.wait(60)) == ["a", "c"]  # it is back, and they are not


def test_all_are_given_up_when_nobody_has_said_anything_for_very_long() -> None:
    watched = Watched("a", "b")
    watched.done("a", 3.0)
    watched.done("b", 3.0)
    assert watched.wait(355) == [] and sorted(watched.wait(10)) == ["a", "b"]


def test_nobody_is_judged_before_it_is_known_what_a_shard_takes() -> None:
    assert Watched("a", "b").wait(10_000) == []


def test_who_takes_far_longer_than_others_hangs_once() -> None:
    watched = Watched("a", "b")
    watched.done("a", 3.0)
    assert watched.wait(59) == []
    watched.done("a", 4.0)
    assert watched.wait(10) == ["b"] and watched.wait(40) == []
    watched.schedule.leave("b", "killed")
    assert watched.wait(20) == ["a"], "nobody else holds anything"


def test_slow_shards_are_given_their_time() -> None:
    watched = Watched("a", "b")
    watched.done("a", 30.0)
    assert watched.wait(290) == []
    watched.done("a", 30.0)
    assert watched.wait(20) == ["b"]


def test_who_holds_nothing_or_is_gone_does_not_hang() -> None:
    watched = Watched("a", "b", "c")
    watched.done("a", 1.0)
    for shard in watched.schedule.held("b"):
        watched.schedule.returned("b", shard)
    watched.schedule.leave("c", "killed")
    watched.watchdog.gone("c")
    assert watched.wait(500) == ["a"]


def test_a_driver_that_was_stopped_blames_nobody() -> None:
    watched = Watched("a", "b")
    watched.done("a", 1.0)
    watched.now += ASLEEP_S + 1000
    assert list(watched.watchdog.hung(watched.schedule)) == []
    assert watched.wait(59) == []
    watched.done("a", 1.0)
    assert watched.wait(10) == ["b"]


class Hanging:
    """Two workers that take a second a shard on a clock of their own; one of them says nothing from a shard on."""

    def __init__(self, silent: Shard) -> None:
        self.now, self.silent = 0.0, silent
        self.coming: list[Event] = [Joined("a"), Joined("b")]
        self.hands: dict[str, list[Shard]] = {"a": [], "b": []}
        self.ended: list[tuple[str, str]] = []
        self.expected = 0

    def hand(self, worker: str, shard: Shard) -> None:
        self.hands[worker].append(shard)

    def events(self) -> list[Event]:
        self.now += 1.0
        coming, self.coming = self.coming, []
        for worker, hand in self.hands.items():
            if hand and hand[0] != self.silent:
                coming.append(Done(worker, hand.pop(0), 1.0))
        return coming

    def seconds_left(self, worker: str) -> float | None:
        return None

    def stop(self, reason: str) -> None:
        raise AssertionError(reason)

    def end(self, worker: str, reason: str) -> None:
        self.ended.append((worker, reason))
        del self.hands[worker]
        self.hands["c"], self.silent = [], Shard("other", 0, 1)
        self.coming = [Left(worker, reason), Joined("c")]


def test_the_driver_kills_who_hangs_and_everything_is_done() -> None:
    crew = Hanging(SHARDS[7])
    schedule = Schedule({"store": Work(SHARDS)})
    ended = drive(schedule, crew, watchdog=Watchdog(factor=10, least_s=25, clock=lambda: crew.now))
    assert not ended.quarantined and not ended.unfinished
    ((_, reason),) = crew.ended
    assert reason.startswith("it said nothing for 2") and reason.endswith("such shards take 1 s")
