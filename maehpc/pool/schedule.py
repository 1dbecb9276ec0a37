"""Which worker computes which shard next: a state machine without clock, network or processes.

Shards that are expected to take longest are dealt first, so that all workers end together: Graham's bound on such
lists (1969) is 4/3 of the best possible, and the error is at most the last shard where shards are many. A worker is
given a second shard while it computes its first, so that it never waits for the driver; near the end nobody hoards.

Whatever a worker held when it died is suspect: the shard before the one that it computed may still have been on its
way to the disk, so nobody knows whose fault it was. Suspects are dealt alone, to a worker that holds nothing and gets
nothing besides, and the next death is then theirs. After `deaths` ends a shard is quarantined, for it would end one
worker after the other.

Where a shard fails and its worker lives on, either may be to blame: a worker that lacks memory fails at once, and would
soon have failed all that waits. So such a shard goes elsewhere next, and a worker that only fails gets nothing while
others do better, or are about to come.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from maehpc.pool.durations import Durations

AHEAD = 2
"""Shards that a worker holds at most: one that it computes, and what it takes up next or has yet to write."""
DEATHS = 3
"""Ends of workers, or failures, after which a shard is not dealt again."""

HOPELESS = 3
"""Shards given up, with none done, after which it is not the shards' fault: nothing more is dealt."""
NONE_CAN_BE = "no shard at all could be computed"
FAR_FROM_THE_END = 4
"""Shards a worker that wait, above which a worker stays with its store."""
SICK = 3
"""Shards in a row that a worker may fail before all others are preferred to it."""


@dataclass(frozen=True, order=True)
class Shard:
    """A unit of work.

    Attributes:
        store: label of the store that it belongs to, unique in the pool.
        number: in that store.
        images: how many it holds.
    """

    store: str
    number: int
    images: int


@dataclass(frozen=True)
class Work:
    """What is to be computed of one store.

    Attributes:
        shards: those that are missing.
        cost: of one image, in a unit that all stores of the pool share.
    """

    shards: tuple[Shard, ...]
    cost: float = 1.0


class Schedule:
    """The state of a pool: what waits, who holds what, what is done.

    Args:
        work: by the store's label.
        ahead: shards that a worker holds at most.
        deaths: ends of workers after which a shard is quarantined.
    """

    def __init__(self, work: Mapping[str, Work], ahead: int = AHEAD, deaths: int = DEATHS) -> None:
        self._waiting: dict[str, list[tuple[int, int, Shard]]] = {}
        for label, part in work.items():
            assert all(shard.store == label for shard in part.shards), label
            self._waiting[label] = [_queued(shard) for shard in part.shards]
            heapq.heapify(self._waiting[label])
        self.durations = Durations({label: part.cost for label, part in work.items()})
        self._ahead = ahead
        self._deaths = deaths
        self._hands: dict[str, deque[Shard]] = {}
        self._left = sum(len(part.shards) for part in work.values())
        self._queued = self._left
        self._done = 0
        self._ends: dict[Shard, list[str]] = {}
        self._suspects: set[Shard] = set()
        self._again: list[Shard] = []  # suspects and those that have failed; others wait in their store's heap
        self._failed_in: dict[Shard, set[str]] = {}
        self._row: dict[str, int] = {}
        self._last: dict[str, str] = {}  # the store that a worker was given a shard of last
        self.quarantined: dict[Shard, str] = {}
        self.blamed: dict[str, int] = {}  # times that a shard failed or ended its worker, by store
        self.closed: str | None = None
        self.expected = 0
        """Workers that are not there yet and are about to come; told by whoever knows."""

    @property
    def left(self) -> int:
        """Shards that are neither done nor quarantined."""
        return self._left

    @property
    def waiting(self) -> int:
        """Shards that nobody holds."""
        return self._queued

    @property
    def workers(self) -> list[str]:
        """Those that are there."""
        return list(self._hands)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do, or nothing more may be dealt and nobody holds a shard."""
        return self._left == 0 or (self.closed is not None and not any(self._hands.values()))

    def held(self, worker: str) -> tuple[Shard, ...]:
        """The shards in a worker's hand, the one that it computes first."""
        return tuple(self._hands.get(worker, ()))

    def join(self, worker: str) -> None:
        """A worker is there."""
        assert worker not in self._hands, worker
        self._hands[worker] = deque()
        self._row[worker] = 0

    def deal(self, worker: str, seconds_left: float | None = None) -> Shard | None:
        """The next shard for a worker, to be handed over at once; None where it shall get none now.

        Args:
            worker: one that has joined.
            seconds_left: until this worker has to end; None where nobody knows of an end. A shard that would likely
                not be done by then is not dealt.
        """
        hand = self._hands.get(worker)
        if hand is None or self.closed is not None or not self._queued:
            return None
        if len(hand) >= self._ahead or (hand and self._queued <= len(self._hands)):
            return None
        if (hand and hand[-1] in self._suspects) or (self._sick(worker) and self._better_than(worker)):
            return None
        left = None if seconds_left is None else seconds_left - sum(self._slow_s(other) for other in hand)
        again = (shard for shard in self._again if self._suits(worker, shard) and self._fits(shard, left))
        shard = next((shard for shard in again if not (hand and shard in self._suspects)), None)
        if shard is not None:
            self._again.remove(shard)
        else:
            first = (queue[0][2] for queue in self._waiting.values() if queue)
            shard = self._longest([shard for shard in first if self._fits(shard, left)], self._last.get(worker))
            if shard is None:
                return None
            heapq.heappop(self._waiting[shard.store])
        self._queued -= 1
        self._last[worker] = shard.store
        hand.append(shard)
        return shard

    def _longest(self, shards: list[Shard], store: str | None) -> Shard | None:
        """The one that takes longest; but a worker stays with its store, whose model it has, while much waits and no
        other's shards take much longer."""
        if not shards:
            return None
        expected = {shard: self.durations.expected_s(shard.store, shard.images) for shard in shards}
        longest = max(shards, key=expected.__getitem__)
        if self._queued > FAR_FROM_THE_END * len(self._hands):
            same = (shard for shard in shards if shard.store == store)
            return next((shard for shard in same if expected[shard] >= expected[longest] / 2), longest)
        return longest

    def _better_than(self, worker: str) -> bool:
        """Whether a worker is there, or about to come, that does not fail again and again."""
        return self.expected > 0 or not all(map(self._sick, self._hands))

    def _fits(self, shard: Shard, left: float | None) -> bool:
        return left is None or self._slow_s(shard) <= left

    def done(self, worker: str, shard: Shard, seconds: float) -> None:
        """A worker has finished and recorded a shard, after so many seconds of work on it."""
        self._hands[worker].remove(shard)
        self._done += 1
        self._left -= 1
        self._row[worker] = 0
        self._ends.pop(shard, None)
        self._suspects.discard(shard)
        self._failed_in.pop(shard, None)
        self.durations.measured(shard.store, shard.images, seconds)

    def returned(self, worker: str, shard: Shard) -> None:
        """A worker gives a shard back that it did not finish, through no fault of the shard's."""
        self._hands[worker].remove(shard)
        self._queue(shard)

    def failed(self, worker: str, shard: Shard, reason: str) -> None:
        """A shard could not be computed; its worker lives on."""
        self._hands[worker].remove(shard)
        self._row[worker] += 1
        self._failed_in.setdefault(shard, set()).add(worker)
        self._blame(shard, reason)

    def leave(self, worker: str, reason: str) -> None:
        """A worker is gone: what it held alone is blamed; of several, all are suspect and the first is blamed."""
        hand = self._hands.pop(worker, None)
        self._row.pop(worker, None)
        self._last.pop(worker, None)
        if not hand:
            return
        self._suspects.update(hand)
        self._blame(hand.popleft(), reason)
        for shard in hand:
            self._queue(shard)

    def close(self, reason: str) -> None:
        """Nothing more is dealt to anybody; the first reason stands."""
        self.closed = self.closed or reason

    def unfinished(self) -> Iterable[Shard]:
        """Shards that are neither done nor quarantined, sorted."""
        waiting = [*self._again, *(entry[2] for queue in self._waiting.values() for entry in queue)]
        return sorted([*waiting, *(shard for hand in self._hands.values() for shard in hand)])

    def _slow_s(self, shard: Shard) -> float:
        return self.durations.slow_s(shard.store, shard.images)

    def _sick(self, worker: str) -> bool:
        return self._row[worker] >= SICK

    def _suits(self, worker: str, shard: Shard) -> bool:
        """Whether a shard that failed may be tried by a worker: by all where there is none better to try it."""
        tried = self._failed_in.get(shard, set())
        if worker not in tried:
            return True
        return not self.expected and all(other in tried or self._sick(other) for other in self._hands)

    def _queue(self, shard: Shard) -> None:
        if shard in self._suspects or shard in self._failed_in:
            self._again.append(shard)
        else:
            heapq.heappush(self._waiting[shard.store], _queued(shard))
        self._queued += 1

    def _blame(self, shard: Shard, reason: str) -> None:
        ends = self._ends.setdefault(shard, [])
        ends.append(reason)
        self.blamed[shard.store] = self.blamed.get(shard.store, 0) + 1
        if len(ends) < self._deaths:
            self._queue(shard)
            return
        del self._ends[shard]
        self._suspects.discard(shard)
        self._failed_in.pop(shard, None)
        self._left -= 1
        self.quarantined[shard] = reason
        if not self._done and len(self.quarantined) >= HOPELESS:
            self.close(NONE_CAN_BE)


def _queued(shard: Shard) -> tuple[int, int, Shard]:
    """Large shards first: what is left for the end is small."""
    return (-shard.images, shard.number, shard)
