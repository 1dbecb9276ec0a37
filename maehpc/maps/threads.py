"""Work that compiled code or the disk does while Python waits, in a few threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8
"""Threads of a pool at most."""

AHEAD = 4 * MOST
"""Results that wait to be taken, or are under way, at most, where nothing else is said."""


def pool(threads: int = MOST) -> ThreadPoolExecutor:
    """Threads for the length of a block; none outlive it, so that a process can be forked outside of blocks."""
    return ThreadPoolExecutor(threads, "maps")


def cores() -> int:
    """Threads to compute in: as many as this process has cores, but not more than `MOST`."""
    return min(len(os.sched_getaffinity(0)), MOST)


def in_order(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD
) -> Iterator[Result]:
    """Results of `work` on each item, in the items' order.

    Args:
        pool: that works.
        work: on one item.
        items: taken as they are needed.
        ahead: results that wait to be taken, or are under way, at most; they bound the memory.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
