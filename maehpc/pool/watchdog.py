"""Workers that hang: a process that neither answers nor dies would hold its shard, and its GPU, until the wall time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from maehpc.pool.schedule import Schedule

FACTOR = 20.0
"""Times a slow shard (of the same store, 95th percentile) that a worker may take without a word."""
LEAST_S = 600.0
"""Seconds that a worker may take in any case: a file system may be away for minutes, and a hang is rare."""
ALL_SILENT = 6.0
"""Times that limit where nobody else says anything either: then it is rather the file system that is away."""
LOOK_S = 2.0
"""Seconds between two looks at all workers."""
ASLEEP_S = 30.0
"""Seconds without a look that only a driver which was stopped itself lets pass; then nobody is blamed for silence."""


class Watchdog:
    """Tells which workers have said nothing for far too long while they held a shard.

    A worker is judged by what shards of the same store take; before any of them has ended it is not.

    Args:
        factor: see `FACTOR`.
        least_s: see `LEAST_S`.
        clock: seconds.
    """

    def __init__(
        self, factor: float = FACTOR, least_s: float = LEAST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._factor, self._least_s, self._clock = factor, least_s, clock
        self._since: dict[str, float] = {}
        self._looked = clock()

    def heard(self, worker: str) -> None:
        """A worker has said something, or was given a first shard."""
        self._since[worker] = self._clock()

    def gone(self, worker: str) -> None:
        """A worker is not there any more."""
        self._since.pop(worker, None)

    def hung(self, schedule: Schedule) -> Iterator[tuple[str, str]]:
        """Workers that are given up for hanging, each once, and why in words."""
        now = self._clock()
        asleep, due = now - self._looked > ASLEEP_S, now - self._looked >= LOOK_S
        if not due:
            return
        self._looked = now
        if asleep:
            self._since = dict.fromkeys(self._since, now)
            return
        slow = {worker: _slow_s(schedule, worker) for worker in self._since if schedule.held(worker)}
        limits = {worker: max(self._least_s, self._factor * seconds) for worker, seconds in slow.items()}
        silent = {worker: now - self._since[worker] for worker in limits}
        for worker, limit in limits.items():
            heard = any(silent[other] < limit / 2 for other in limits if other != worker)
            if silent[worker] > (limit if heard or len(limits) == 1 else ALL_SILENT * limit):
                del self._since[worker]
                yield worker, f"it said nothing for {silent[worker]:.0f} s, and such shards take {slow[worker]:.3g} s"


def _slow_s(schedule: Schedule, worker: str) -> float:
    """Seconds that shards like those in a worker's hand may take; no end of them where nobody knows."""
    durations, hand = schedule.durations, schedule.held(worker)
    if not all(durations.known(shard.store) for shard in hand):
        return math.inf
    return max(durations.slow_s(shard.store, shard.images) for shard in hand)
