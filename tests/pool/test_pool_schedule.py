"""The schedule, alone: whatever happens, every shard is done once, given up with a reason, or known to be left."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maehpc.pool import Schedule, Shard, Work
from maehpc.pool.schedule import NONE_CAN_BE, SICK


def shards(store: str, count: int, images: int = 8, last: int | None = None) -> tuple[Shard, ...]:
    sizes = [images] * (count - 1) + [last or images]
    return tuple(Shard(store, number, size) for number, size in enumerate(sizes))


def two_stores() -> Schedule:
    return Schedule({"small": Work(shards("small", 3), cost=1.0), "large": Work(shards("large", 3), cost=5.0)})


def test_what_takes_longest_is_dealt_first() -> None:
    schedule = two_stores()
    order = []
    schedule.join("a")
    while (shard := schedule.deal("a")) is not None:
        order.append(shard)
        schedule.done("a", shard, 1.0 if shard.store == "large" else 0.1)
    assert [shard.store for shard in order] == ["large"] * 3 + ["small"] * 3
    assert schedule.over and schedule.left == 0


def test_measured_times_count_more_than_costs() -> None:
    schedule = two_stores()
    schedule.join("a")
    first = schedule.deal("a")
    assert first is not None and first.store == "large"
    # An image of "large" was thought to cost five of "small"; the others are still ordered by that.
    schedule.done("a", first, 8.0)
    assert schedule.durations.expected_s("large", 8) == pytest.approx(8.0)
    assert schedule.durations.expected_s("small", 8) == pytest.approx(8.0 / 5)
    schedule.durations.measured("small", 8, 100.0)
    second = schedule.deal("a")
    assert second is not None and second.store == "small"


def test_a_small_shard_comes_last() -> None:
    schedule = Schedule({"store": Work(shards("store", 4, images=8, last=3))})
    schedule.join("a")
    dealt = []
    while (shard := schedule.deal("a")) is not None:
        dealt.append(shard.images)
        schedule.done("a", shard, 1.0)
    assert dealt == [8, 8, 8, 3]


def test_a_second_shard_is_dealt_ahead_but_not_near_the_end() -> None:
    schedule = Schedule({"store": Work(shards("store", 6))})
    for worker in ("a", "b"):
        schedule.join(worker)
    assert [schedule.deal("a"), schedule.deal("a"), schedule.deal("a")][2] is None
    assert len(schedule.held("a")) == 2
    assert schedule.deal("b") is not None
    assert schedule.deal("b") is not None  # three waited for two workers
    assert schedule.waiting == 2
    schedule.done("a", schedule.held("a")[0], 1.0)
    assert schedule.deal("a") is None, "two wait for two workers: one that holds one leaves them to others"


def test_what_a_dead_worker_held_is_dealt_alone_and_the_next_death_is_its_own() -> None:
    schedule = Schedule({"store": Work(shards("store", 9))}, deaths=2)
    schedule.join("a")
    innocent, culprit = schedule.deal("a"), schedule.deal("a")  # the first on its way to the disk, say
    assert innocent is not None and culprit is not None
    schedule.leave("a", "it died")
    for worker in ("b", "c"):
        schedule.join(worker)
    assert [schedule.deal("b"), schedule.deal("b")] == [innocent, None]
    assert [schedule.deal("c"), schedule.deal("c")] == [culprit, None]
    schedule.done("b", innocent, 1.0)
    assert schedule.deal("b") is not None and schedule.deal("b") is not None, "others are dealt ahead as before"
    schedule.leave("c", "it died again")
    schedule.join("d")
    assert schedule.deal("d") == culprit
    schedule.leave("d", "and again")
    assert schedule.quarantined == {culprit: "and again"}
    assert schedule.blamed == {"store": 3}
    assert innocent not in schedule.unfinished() and schedule.left == 7


def test_a_shard_that_ends_well_is_forgiven() -> None:
    schedule = Schedule({"store": Work(shards("store", 1))}, deaths=2)
    schedule.join("a")
    shard = schedule.deal("a")
    assert shard is not None
    schedule.failed("a", shard, "no memory")
    assert schedule.deal("a") == shard
    schedule.done("a", shard, 1.0)
    assert schedule.over and not schedule.quarantined


def test_a_shard_that_failed_goes_elsewhere_next() -> None:
    schedule = Schedule({"store": Work(shards("store", 4))})
    schedule.join("a")
    schedule.join("b")
    first = schedule.deal("a")
    assert first is not None
    schedule.failed("a", first, "no memory")
    assert schedule.deal("a") != first, "there is another to try it"
    assert schedule.deal("b") == first, "before all others"
    schedule.failed("b", first, "no memory")
    assert schedule.deal("b") == first, "both have tried it"


def test_a_worker_that_only_fails_gets_nothing_while_others_do_better() -> None:
    schedule = Schedule({"store": Work(shards("store", 100))})
    schedule.join("sick")
    schedule.join("well")
    failures = 0
    while (shard := schedule.deal("sick")) is not None:
        schedule.failed("sick", shard, "no memory")
        failures += 1
    assert failures == 3
    while (shard := schedule.deal("well")) is not None:
        schedule.done("well", shard, 1.0)
    assert schedule.over and not schedule.quarantined


def test_a_worker_that_only_fails_goes_on_where_it_is_the_last() -> None:
    schedule = Schedule({"store": Work(shards("store", 9))})
    schedule.join("sick")
    schedule.join("well")
    done = schedule.deal("well")
    assert done is not None
    schedule.done("well", done, 1.0)
    for _ in range(3):
        shard = schedule.deal("sick")
        assert shard is not None
        schedule.failed("sick", shard, "no memory")
    assert schedule.deal("sick") is None
    schedule.leave("well", "died")
    while (shard := schedule.deal("sick")) is not None:
        schedule.done("sick", shard, 1.0)
    assert schedule.over and not schedule.quarantined


def test_a_shard_that_would_not_be_done_in_time_is_not_dealt() -> None:
    schedule = Schedule({"store": Work(shards("store", 50))})
    schedule.join("a")
    assert schedule.deal("a", seconds_left=0.5) is not None, "nothing is known yet"
    schedule.done("a", schedule.held("a")[0], 1.0)
    for number in range(19):
        schedule.durations.measured("store", 8, 1.0 if number else 9.0)
    assert schedule.durations.slow_s("store", 8) == pytest.approx(1.0)  # one of twenty was slower
    schedule.durations.measured("store", 8, 9.0)
    assert schedule.durations.slow_s("store", 8) == pytest.approx(9.0)  # and now two of twenty-one
    assert schedule.deal("a", seconds_left=8.9) is None
    assert schedule.deal("a", seconds_left=9.0) is not None
    assert schedule.deal("a", seconds_left=17.9) is None, "it would begin when the first is done"
    assert schedule.deal("a", seconds_left=18.1) is not None


def test_where_the_longest_would_not_be_done_in_time_a_shorter_one_is_dealt() -> None:
    schedule = two_stores()
    schedule.join("a")
    schedule.durations.measured("large", 8, 10.0)
    schedule.durations.measured("small", 8, 1.0)
    assert schedule.deal("a", seconds_left=5.0) == Shard("small", 0, 8)


def test_where_nothing_can_be_computed_not_everything_is_tried() -> None:
    schedule = Schedule({"store": Work(shards("store", 100))}, deaths=1)
    schedule.join("a")
    for _ in range(3):
        shard = schedule.deal("a")
        assert shard is not None
        schedule.failed("a", shard, "there is no such model")
    assert schedule.closed == NONE_CAN_BE and schedule.deal("a") is None and schedule.over
    other = Schedule({"store": Work(shards("store", 100))}, deaths=1)
    other.join("a")
    for place in range(20):
        shard = other.deal("a")
        assert shard is not None
        other.done("a", shard, 1.0) if place == 0 else other.failed("a", shard, "odd")
    assert other.closed is None


def test_nothing_is_dealt_once_closed() -> None:
    schedule = Schedule({"store": Work(shards("store", 3))})
    schedule.join("a")
    shard = schedule.deal("a")
    assert shard is not None
    schedule.close("first")
    schedule.close("second")
    assert schedule.closed == "first" and schedule.deal("a") is None and not schedule.over
    schedule.done("a", shard, 1.0)
    assert schedule.over and [left.number for left in schedule.unfinished()] == [1, 2]


def test_a_worker_that_only_fails_waits_for_those_that_are_about_to_come() -> None:
    schedule = Schedule({"store": Work(shards("store", 50))})
    schedule.expected = 3
    schedule.join("sick")
    for _ in range(SICK):
        shard = schedule.deal("sick")
        assert shard is not None
        schedule.failed("sick", shard, "no memory")
    assert schedule.deal("sick") is None and not schedule.quarantined and schedule.closed is None
    schedule.join("healthy")
    for _ in range(50):
        shard = schedule.deal("healthy")
        assert shard is not None
        schedule.done("healthy", shard, 1.0)
    assert schedule.over and not schedule.quarantined


def test_where_nobody_else_will_come_the_only_worker_tries_on() -> None:
    schedule = Schedule({"store": Work(shards("store", 5))})
    schedule.join("a")
    for _ in range(SICK):
        shard = schedule.deal("a")
        assert shard is not None
        schedule.failed("a", shard, "no memory")
    assert schedule.deal("a") is not None


def test_a_worker_stays_with_its_store_while_much_waits() -> None:
    stores = {f"store{place}": Work(shards(f"store{place}", 30)) for place in range(4)}
    schedule = Schedule(stores)
    for worker in ("a", "b"):
        schedule.join(worker)
    given: dict[str, list[str]] = {"a": [], "b": []}
    for _ in range(60):
        for worker in given:
            shard = schedule.deal(worker)
            if shard is not None:
                given[worker].append(shard.store)
                schedule.done(worker, shard, 1.0)
    assert schedule.over
    changes = sum(one != later for order in given.values() for one, later in pairwise(order))
    assert changes <= 10, given


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=300),
    st.integers(1, 16),
)
@settings(deadline=None)
def test_slow_is_the_nearest_rank(seconds: list[float], images: int) -> None:
    durations = Schedule({"store": Work(())}).durations
    for value in seconds:
        durations.measured("store", 1, value)
    newest = seconds[-256:]
    slow = durations.slow_s("store", 1)
    assert slow in newest and durations.slow_s("store", images) == images * slow
    assert sum(value <= slow for value in newest) >= 0.95 * len(newest)
    assert sum(value < slow for value in newest) < 0.95 * len(newest)


class Disorder(RuleBasedStateMachine):
    """Workers come, work, fail and die in any order."""

    @initialize(
        counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
        ahead=st.integers(1, 3),
        deaths=st.integers(1, 3),
    )
    def begin(self, counts: list[int], ahead: int, deaths: int) -> None:
        work = {f"store{place}": Work(shards(f"store{place}", count)) for place, count in enumerate(counts) if count}
        self.all = {shard for part in work.values() for shard in part.shards}
        self.schedule = Schedule(work, ahead=ahead, deaths=deaths)
        self.ahead, self.deaths = ahead, deaths
        self.hands: dict[str, list[Shard]] = {}
        self.done: Counter[Shard] = Counter()
        self.ends: Counter[Shard] = Counter()
        self.failed_in: dict[Shard, set[str]] = {shard: set() for shard in self.all}
        self.row: Counter[str] = Counter()
        self.names = 0
        self.suspects: set[Shard] = set()

    @rule()
    def join(self) -> None:
        self.names += 1
        self.hands[f"w{self.names}"] = []
        self.schedule.join(f"w{self.names}")

    def worker(self, data: st.DataObject, busy: bool) -> str:
        return data.draw(st.sampled_from([name for name, hand in self.hands.items() if hand or not busy]))

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def deal(self, data: st.DataObject) -> None:
        worker = self.worker(data, busy=False)
        shard = self.schedule.deal(worker)
        if shard is not None:
            assert not any(shard in hand for hand in self.hands.values()), "two workers have one shard"
            assert not self.done[shard], "it was done before"
            assert not self.suspects & {shard, *self.hands[worker]} or not self.hands[worker], "a suspect is alone"
            self.hands[worker].append(shard)
        elif not self.hands[worker] and self.schedule.closed is None:
            assert all(self.better_elsewhere(worker, shard) for shard in self.waiting()), "what waits goes to the idle"

    def waiting(self) -> list[Shard]:
        held = {shard for hand in self.hands.values() for shard in hand}
        return [shard for shard in self.schedule.unfinished() if shard not in held]

    def better_elsewhere(self, worker: str, shard: Shard) -> bool:
        """Whether another worker fails less, or has not failed this very shard."""
        healthy = {other for other in self.hands if self.row[other] < 3}
        if worker not in healthy and healthy:
            return True
        return worker in self.failed_in[shard] and bool((healthy or set(self.hands)) - self.failed_in[shard])

    @precondition(lambda self: any(self.hands.values()))
    @rule(data=st.data(), seconds=st.floats(0.01, 10))
    def finish(self, data: st.DataObject, seconds: float) -> None:
        worker = self.worker(data, busy=True)
        shard = self.hands[worker].pop(0)
        self.done[shard] += 1
        self.ends.pop(shard, None)
        self.suspects.discard(shard)
        self.row[worker] = 0
        self.schedule.done(worker, shard, seconds)

    @precondition(lambda self: any(self.hands.values()))
    @rule(data=st.data(), how=st.sampled_from(["failed", "returned"]))
    def give_back(self, data: st.DataObject, how: str) -> None:
        worker = self.worker(data, busy=True)
        shard = self.hands[worker].pop(0)
        if how == "failed":
            self.ends[shard] += 1
            self.row[worker] += 1
            self.failed_in[shard].add(worker)
            self.schedule.failed(worker, shard, "failed")
        else:
            self.schedule.returned(worker, shard)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = self.worker(data, busy=False)
        hand = self.hands.pop(worker)
        self.ends.update(hand[:1])
        self.suspects.update(hand)
        self.schedule.leave(worker, "died")

    @rule()
    def close(self) -> None:
        self.schedule.close("enough")

    @invariant()
    def every_shard_is_somewhere(self) -> None:
        if not hasattr(self, "schedule"):
            return
        schedule = self.schedule
        done, lost, left = set(self.done), set(schedule.quarantined), list(schedule.unfinished())
        assert len(left) == len(set(left)) == schedule.left
        assert done | lost | set(left) == self.all and not done & lost and not done & set(left) and not lost & set(left)
        assert all(count == 1 for count in self.done.values())
        assert lost == {shard for shard, ends in self.ends.items() if ends >= self.deaths}
        assert schedule.waiting == schedule.left - sum(map(len, self.hands.values()))
        assert all(list(schedule.held(worker)) == hand for worker, hand in self.hands.items())
        assert all(len(hand) <= self.ahead for hand in self.hands.values())
        held = any(self.hands.values())
        assert schedule.over == (not left or (schedule.closed is not None and not held))


TestDisorder = Disorder.TestCase
