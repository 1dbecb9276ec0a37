"""Workers that hang: a process that neither answers nor dies would hold its shard, and its GPU, until the wall time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from maehpc.pool.schedule import Schedule

FACTOR = 20.0
"""Times a slow shard (of the same store, 95th percentile) that a worker may take without a word."""
LEAST_S = 600.0
"""Seconds that a worker may take in any case: a file system may be away for minutes, and a hang is rare."""
LOOK_S = 2.0
"""Seconds between two looks at all workers."""
ASLEEP_S = 30.0
"""Seconds without a look that only a driver which was stopped itself lets pass; then nobody is blamed for silence."""


class Watchdog:
    """Tells which workers have said nothing for far too long while they held a shard.

    A worker is judged by what shards of the same store take; before any has ended nobody is.

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
        for worker, since in list(self._since.items()):
            hand = schedule.held(worker)
            slow = max((schedule.durations.slow_s(shard.store, shard.images) for shard in hand), default=0.0)
            silent = now - since
            if slow and silent > max(self._least_s, self._factor * slow):
                del self._since[worker]
                yield worker, f"it said nothing for {silent:.0f} s, and such shards take {slow:.3g} s"
