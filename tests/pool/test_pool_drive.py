"""The driver's loop, with a crew of a test's own: what it hands over, when it stops, what it tells."""

from __future__ import annotations

import sys
from collections import deque

import pytest

from maehpc.errors import RunError
from maehpc.interruption import Stop
from maehpc.pool import Done, Event, Failed, Joined, Left, Returned, Schedule, Shard, Work, drive
from maehpc.pool.drive import TIME_IS_SHORT


class Crew:
    """Workers that take one second a shard, in turn; `script` says what else befalls which event."""

    def __init__(self, *workers: str) -> None:
        self.coming: deque[list[Event]] = deque([[Joined(worker) for worker in workers]])
        self.hands: dict[str, list[Shard]] = {worker: [] for worker in workers}
        self.handed: list[tuple[str, Shard]] = []
        self.left_s: float | None = None
        self.expected = 0
        self.stopped: list[str] = []
        self.deadly: set[Shard] = set()
        self.broken: set[Shard] = set()

    def hand(self, worker: str, shard: Shard) -> None:
        self.handed.append((worker, shard))
        self.hands[worker].append(shard)

    def seconds_left(self, worker: str) -> float | None:
        return self.left_s

    def stop(self, reason: str) -> None:
        self.stopped.append(reason)
        self.coming.append([Returned(worker, shard) for worker, hand in self.hands.items() for shard in hand])
        self.hands = {worker: [] for worker in self.hands}

    def end(self, worker: str, reason: str) -> None:
        raise AssertionError(reason)

    def events(self) -> list[Event]:
        if self.coming:
            return self.coming.popleft()
        for worker, hand in list(self.hands.items()):
            if not hand:
                continue
            shard = hand.pop(0)
            if shard in self.deadly:
                del self.hands[worker]
                self.hands[f"{worker}+"] = []
                return [Left(worker, "killed"), Joined(f"{worker}+")]
            if shard in self.broken:
                return [Failed(worker, shard, "no memory")]
            return [Done(worker, shard, 1.0)]
        if not self.hands:
            raise RunError("no worker is left and none will come")
        return []


def work(count: int) -> dict[str, Work]:
    return {"store": Work(tuple(Shard("store", number, 4) for number in range(count)))}


def test_everything_is_done_once() -> None:
    crew, seen = Crew("a", "b", "c"), list[Event]()
    ended = drive(Schedule(work(20)), crew, watch=seen.append)
    assert not ended.quarantined and not ended.unfinished and ended.reason is None
    assert sorted(shard.number for _, shard in crew.handed) == list(range(20))
    assert sum(isinstance(event, Done) for event in seen) == 20
    assert {worker for worker, _ in crew.handed} == {"a", "b", "c"}


def test_what_kills_its_workers_is_given_up_and_the_rest_done() -> None:
    crew = Crew("a", "b")
    crew.deadly, crew.broken = {Shard("store", 3, 4)}, {Shard("store", 5, 4)}
    ended = drive(Schedule(work(12)), crew)
    assert ended.quarantined == {Shard("store", 3, 4): "killed", Shard("store", 5, 4): "no memory"}
    assert not ended.unfinished
    handed = [shard.number for _, shard in crew.handed]
    assert handed.count(3) == handed.count(5) == 3
    assert set(handed) == set(range(12))


def test_a_wish_to_stop_is_passed_on_and_what_comes_back_is_left() -> None:
    crew, stop = Crew("a", "b"), Stop()

    done = []

    def watch(event: Event) -> None:
        if isinstance(event, Done):
            done.append(event.shard)
        if len(done) == 5:
            stop.request("SIGTERM")

    ended = drive(Schedule(work(20)), crew, stop, watch)
    assert crew.stopped == ["SIGTERM"] and ended.reason == "SIGTERM"
    assert len(done) == 5 and {*done, *ended.unfinished} == set(work(20)["store"].shards)


def test_the_end_of_the_wall_time_leaves_the_rest() -> None:
    crew = Crew("a", "b")

    def watch(event: Event) -> None:
        if isinstance(event, Done) and event.shard.number == 6:
            crew.left_s = 0.9

    ended = drive(Schedule(work(20)), crew, watch=watch)
    assert ended.reason == TIME_IS_SHORT and 0 < len(ended.unfinished) < 14
    assert not any(crew.hands.values()), "what was dealt was finished"


def test_no_worker_is_an_error() -> None:
    with pytest.raises(RunError, match="no worker is left"):
        drive(Schedule(work(1)), Crew())


def test_no_work_needs_no_worker() -> None:
    assert drive(Schedule({}), Crew()).unfinished == ()


def test_workers_that_hang_are_left_when_the_end_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Crew):
        def stop(self, reason: str) -> None:
            self.stopped.append(reason)

        def events(self) -> list[Event]:
            return self.coming.popleft() if self.coming else []

    monkeypatch.setattr(sys.modules[drive.__module__], "PATIENCE_S", 0.2)
    crew, stop = Hanging("a"), Stop()
    stop.request("SIGTERM")
    ended = drive(Schedule(work(3)), crew, stop)
    assert ended.reason == "SIGTERM" and len(ended.unfinished) == 3
    assert crew.stopped == ["SIGTERM"]


def test_a_shard_in_a_hanging_hand_is_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Crew):
        def stop(self, reason: str) -> None:
            self.stopped.append(reason)

        def events(self) -> list[Event]:
            if self.coming:
                return self.coming.popleft()
            stop.request("SIGTERM")
            return []

    monkeypatch.setattr(sys.modules[drive.__module__], "PATIENCE_S", 0.2)
    crew, stop = Hanging("a"), Stop()
    ended = drive(Schedule(work(3)), crew, stop)
    assert len(crew.handed) == 2 and len(ended.unfinished) == 3 and ended.reason == "SIGTERM"
