"""How long shards take: what was measured, and until then what their cost lets one expect."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

REMEMBERED = 256
"""Newest shards of a store from which its slow ones are judged."""
MARGIN = 0.95
"""The part of shards that ends within what `slow_s` says."""


class Durations:
    """Seconds an image, store by store.

    Args:
        costs: of one image of each store, in any unit that all share (FLOPs, say): it orders stores of which nothing
            is measured yet.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        self._costs = dict(costs)
        self._seconds = dict.fromkeys(costs, 0.0)
        self._images = dict.fromkeys(costs, 0)
        self._newest: dict[str, deque[float]] = {store: deque(maxlen=REMEMBERED) for store in costs}
        self._slow: dict[str, float] = {}
        self._all_seconds = 0.0
        self._all_cost = 0.0

    def measured(self, store: str, images: int, seconds: float) -> None:
        """A shard of so many images has taken so long."""
        self._seconds[store] += seconds
        self._images[store] += images
        self._all_seconds += seconds
        self._all_cost += images * self._costs[store]
        self._newest[store].append(seconds / images)
        self._slow.pop(store, None)

    def known(self, store: str) -> bool:
        """Whether a shard of the store has ended."""
        return self._images[store] > 0

    def expected_s(self, store: str, images: int) -> float:
        """Seconds to expect of a shard. Before any shard has ended anywhere, its cost."""
        if self._images[store]:
            return images * self._seconds[store] / self._images[store]
        return images * self._costs[store] * (self._all_seconds / self._all_cost if self._all_cost else 1.0)

    def slow_s(self, store: str, images: int) -> float:
        """Seconds within which 95 % of such shards end (nearest rank); 0 where nothing is measured anywhere."""
        if not self._all_cost:
            return 0.0
        if not self._newest[store]:
            return self.expected_s(store, images)
        if store not in self._slow:
            ordered = sorted(self._newest[store])
            self._slow[store] = ordered[math.ceil(MARGIN * len(ordered)) - 1]
        return images * self._slow[store]
