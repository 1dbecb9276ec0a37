"""A shard's files on their way to the disk: side by side, each compressed, written and hashed piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from maehpc import files
from maehpc.maps.ledger import FileRecord
from maehpc.maps.sharding import Bytes
from maehpc.maps.threads import cores, in_order, pool

AHEAD = 8
"""Files that are written at a time, at most: the system flushes small ones together."""

Encoder = Callable[[Executor], Iterable[Bytes]]
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
    with pool(cores()) as compressing, pool(AHEAD) as busy:

        def write(one: tuple[Encoder, Path]) -> FileRecord:
            encode, path = one
            sha256, size = files.write_synced(path, encode(compressing))
            return FileRecord(sha256=sha256, bytes=size)

        return list(in_order(busy, write, zip(encoders, paths, strict=True), AHEAD))
