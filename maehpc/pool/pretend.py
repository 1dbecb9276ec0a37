"""A computer that only waits: what a pool costs by itself is measured with it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from maehpc.interruption import Stop
from maehpc.pool.schedule import Shard
from maehpc.pool.worker import Computed


@dataclass(frozen=True)
class Pretended:
    """Takes so many seconds a shard."""

    seconds: float

    def compute(self, shard: Shard, stop: Stop, again: bool) -> Computed:
        """Waits; there is nothing to write."""
        time.sleep(self.seconds)
        return Computed(lambda: None)


def computer(seconds: float) -> Pretended:
    """One that takes so many seconds a shard."""
    return Pretended(seconds)
