"""Reads shards one after the other where a file system answers at once, and in threads where one waits for it."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

Result = TypeVar("Result")

THREADS = 16
"""That read at a time from a file system that lets one wait."""
RUN = 16
"""Shards that tell whether it does."""
FETCHED = 64
"""Shards that the system is asked for ahead."""
WAITING_S = 1e-3
"""Seconds that one waits for a shard, from which on threads gain more than they cost.

Python runs one thread at a time: where files are read in a tenth of that, handing over takes longer than reading.
"""


class Readers:
    """Use as a context: no thread outlives its block.

    Args:
        slow: whether one waits for the files; False: what some shards take tells, again and again.
    """

    def __init__(self, slow: bool) -> None:
        self._slow = slow
        self._timed, self._waited_s = 0, 0.0
        self._pool = ThreadPoolExecutor(THREADS, "reading")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(
        self, look: Callable[[int], Result], shards: Sequence[int], files: Callable[[int], Iterable[str]]
    ) -> list[Result]:
        """What `look` finds of each shard, in their order.

        Args:
            look: at a shard.
            shards: to look at.
            files: paths of what a shard will be read from: the system is asked to fetch them ahead.
        """
        found: list[Result] = []
        runs = deque(shards[start : start + RUN] for start in range(0, len(shards), RUN))
        ahead = iter(shards if not self._slow else ())
        _fetch(islice(ahead, FETCHED), files)
        while runs and not self._slow:
            run = runs.popleft()
            _fetch(islice(ahead, RUN), files)
            begun, busy = time.perf_counter(), _busy_s()
            found += [look(shard) for shard in run]
            self._timed += len(run)
            self._waited_s += time.perf_counter() - begun - (_busy_s() - busy)
            if self._timed >= RUN:
                self._slow = self._waited_s > self._timed * WAITING_S
                self._timed, self._waited_s = 0, 0.0
        return found + list(self._pool.map(look, chain.from_iterable(runs)))


def _busy_s() -> float:
    """Seconds that this thread has computed, or could have if others had left it a core (which Linux alone tells)."""
    with suppress(OSError, ValueError, IndexError):
        return time.thread_time() + int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9
    return time.thread_time()


def _fetch(shards: Iterable[int], files: Callable[[int], Iterable[str]]) -> None:
    for shard in shards:
        for path in files(shard):
            _fetch_file(path)


def _fetch_file(path: str) -> None:
    """Asks the system to have a file in memory soon, where it knows such a question."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
