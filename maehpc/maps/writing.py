"""A shard's files on their way to the disk: while one array is compressed, those before it are hashed and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

from maehpc import files
from maehpc.maps.ledger import FileRecord, file_record
from maehpc.maps.sharding import Bytes
from maehpc.maps.threads import cores, in_order, pool

AHEAD = 8
"""Files that are hashed and written at a time, at most: the system flushes small ones together."""

Encoder = Callable[[Executor], list[Bytes]]
"""Makes a file's bytes, in parts, in threads that it is given."""


def write_files(encoders: Sequence[Encoder], paths: Sequence[Path]) -> list[FileRecord]:
    """Writes files and flushes them to the disk.

    Args:
        encoders: of the files.
        paths: of the files.

    Returns:
        The record of each.

    Raises:
        RunError: the disk refused.
    """

    def tasks(compressing: Executor) -> Iterator[Callable[[], Any]]:
        for encode, path in zip(encoders, paths, strict=True):
            parts = encode(compressing)
            yield partial(files.write_synced, path, parts)
            yield partial(file_record, *parts)

    with pool(cores()) as compressing, pool(2 * AHEAD) as busy:
        return list(in_order(busy, lambda task: task(), tasks(compressing), 2 * AHEAD))[1::2]
