"""Reads shards one after the other where a file system answers at once, and in threads where one waits for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

Result = TypeVar("Result")

THREADS = 16
"""That read at a time from a file system that lets one wait."""
FETCHED = 64
"""Shards that the system is asked for ahead of the one that is looked at, at least."""
PROBED = 8
"""Shards that tell whether it does."""
WAITING_S = 1e-3
"""Seconds that one waits for a shard, from which on threads gain more than they cost.

Python runs one thread at a time: where files are read in a tenth of that, handing over takes longer than reading.
"""


class Readers:
    """Use as a context: no thread outlives its block.

    Args:
        slow: whether one waits for the files; None: what the first few take tells.
        files: of a shard that will be read, which the system is asked to fetch ahead.
    """

    def __init__(self, slow: bool | None, files: Callable[[int], Iterable[Path]]) -> None:
        self._slow, self._files = slow, files
        self._pool = ThreadPoolExecutor(THREADS, "reading")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, look: Callable[[int], Result], shards: Sequence[int]) -> list[Result]:
        """What `look` finds of each shard, in their order."""
        if self._slow is None and len(shards) > PROBED:
            begun, computed = time.perf_counter(), time.thread_time()
            found = [look(shard) for shard in shards[:PROBED]]
            waited = time.perf_counter() - begun - (time.thread_time() - computed)
            self._slow = waited > PROBED * WAITING_S
            return found + self.map(look, shards[PROBED:])
        if self._slow:
            return list(self._pool.map(look, shards))
        runs = [shards[start : start + FETCHED] for start in range(0, len(shards), FETCHED)]
        found = []
        self._fetch(runs[0] if runs else ())
        for run, following in zip(runs, [*runs[1:], ()], strict=False):
            self._fetch(following)
            found += [look(shard) for shard in run]
        return found

    def _fetch(self, shards: Sequence[int]) -> None:
        for shard in shards:
            for path in self._files(shard):
                _fetch(path)


def _fetch(path: Path) -> None:
    """Asks the system to have a file in memory soon, where it knows such a question."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
