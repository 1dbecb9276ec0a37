"""The scores of a store, gathered from its shards into a few files, so that a report reads each shard once.

A block holds the rows of some thousand images and the stamps of the shards they come from. A shard whose stamp a block
has is not read again; one that is new or was computed anew is. Blocks are safetensors files with a checksum an array:
one that is damaged counts as absent. All of it may be deleted at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maehpc.errors import MaehpcError, RunError
from maehpc.maps import MapStore, unpacked
from maehpc.places import is_remote
from maehpc.report.blocks import Arrays, read_block, write_block
from maehpc.report.columns import Column
from maehpc.report.readers import Readers

BLOCK_IMAGES = 1 << 14
"""Images of a block, about: what is in memory at once."""
IMAGE = "image"
_STAMPS = ".stamps"  # no array of a store begins with a dot
_STAMP_BYTES = 32


class Reader:
    """Reads blocks; the arrays of the one read last stay in memory, and no others."""

    def __init__(self) -> None:
        self._held: tuple[Path | None, Arrays] = None, {}

    def forget(self) -> None:
        """Blocks may have changed."""
        self._held = None, {}

    def read(self, path: Path, name: str) -> NDArray[Any]:
        """One array of a block.

        Raises:
            RunError: the file has changed since it was gathered.
        """
        if self._held[0] != path:
            self._held = path, {}
        arrays = self._held[1]
        if name not in arrays:
            try:
                arrays |= read_block(path, [name])
            except ValueError as error:
                raise RunError(f"{path} was changed while it was read; delete it and aggregate again") from error
        return arrays[name]


@dataclass(frozen=True)
class Gathered:
    """Scores of the images of a store that are explained, in order of the images.

    Attributes:
        blocks: files, each with the number of its images, which is never 0.
        reader: of the blocks.
    """

    blocks: tuple[tuple[Path, int], ...]
    reader: Reader

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(count for _, count in self.blocks)

    def column(self, name: str) -> Column:
        """An array of the store: [n, *shape] a block; `image` is the images' indices."""
        return _Stored(self, name)

    def row(self, name: str, place: int) -> Any:
        """An array's part of the image at a place, counted over all blocks."""
        for path, count in self.blocks:
            if place < count:
                return self.reader.read(path, name)[place]
            place -= count
        raise IndexError(place)


class UnwritableError(Exception):
    """The disk does not take a block. No kind of MaehpcError: what is wrong with results is told and passed over."""


@dataclass(frozen=True)
class _Stored:
    gathered: Gathered
    name: str

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self.gathered.reader.read(path, self.name) for path, _ in self.gathered.blocks)


def gather(
    store: MapStore,
    names: list[str],
    folder: Path,
    reader: Reader,
    missing: Callable[[str], None],
    read: Callable[[int], object] = lambda shards: None,
) -> Gathered:
    """Brings the blocks of a store up to date.

    Args:
        store: to read.
        names: arrays with scores; maps are too large.
        folder: of the blocks, this store's alone; nobody else writes in it meanwhile.
        reader: of the blocks.
        missing: told, in words, which shards are left out.
        read: told how many shards have been dealt with, all in all each once.

    Raises:
        UnwritableError: `folder` cannot be written.
    """
    reader.forget()
    layout = store.layout
    each = max(1, BLOCK_IMAGES // layout.shard_images)
    blocks = []
    absent = Listed()
    with Readers(slow=is_remote(store.path)) as readers:
        for number, first in enumerate(range(0, layout.shards, each)):
            shards = range(first, min(first + each, layout.shards))
            path = folder / f"block-{number:05d}.safetensors"
            old = _read_block(path, names)
            known = _stamps(old, shards) if old else {}
            looked = readers.map(partial(_look, store, known), shards, partial(_files, store, known))
            found = dict(zip(shards, looked, strict=True))
            for part in found.values():
                if isinstance(part, MaehpcError):
                    missing(str(part))
            parts = {shard: part for shard, part in found.items() if isinstance(part, _Part)}
            count = _brought_up_to_date(store, names, path, shards, old, known, parts)
            if count:
                blocks.append((path, count))
            absent.add(shard for shard, part in found.items() if part is None)
            read(len(shards))
    if absent.count:
        missing(f"{absent.count} of {layout.shards} shards not explained: {absent}")
    return Gathered(tuple(blocks), reader)


class Listed:
    """Numbers, of which the first few are named."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[int] = []

    def add(self, numbers: Iterable[int]) -> None:
        """More of them."""
        for number in numbers:
            self.count += 1
            if len(self._first) < _NAMED:
                self._first.append(number)

    def __str__(self) -> str:
        rest = self.count - len(self._first)
        return ", ".join(map(str, self._first)) + (f" and {rest} more" if rest else "")


_NAMED = 12


@dataclass(frozen=True)
class _Part:
    """A shard that is explained: its stamp, and its table of scores unless the block has them."""

    stamp: bytes
    table: NDArray[Any] | None


def _look(store: MapStore, known: Mapping[int, bytes], shard: int) -> _Part | MaehpcError | None:
    """A shard's scores, unless it still has the stamp that is known; None where it is not explained."""
    try:
        recorded = store.look(shard)
        if recorded is None:
            return None
        stamp = bytes.fromhex(recorded.stamp)
        return _Part(stamp, None if stamp == known.get(shard) else recorded.scores())
    except MaehpcError as error:
        return error


def _files(store: MapStore, known: Mapping[int, bytes], shard: int) -> list[str]:
    """Paths of what looking at a shard most likely reads: of one that is known its record alone."""
    return store.files_of_scores(shard)[: 1 if shard in known else None]


def _brought_up_to_date(
    store: MapStore,
    names: list[str],
    path: Path,
    shards: range,
    old: Arrays,
    known: Mapping[int, bytes],
    parts: Mapping[int, _Part],
) -> int:
    """Writes a block anew where it is not what is wanted; returns how many images it has."""
    wanted = {shard: part.stamp for shard, part in parts.items()}
    if old and known == wanted:
        return len(old[IMAGE])
    if not parts:
        path.unlink(missing_ok=True)
        return 0
    runs = []
    for kept, group in groupby(parts.items(), lambda item: item[1].table is None):
        run = dict(group)
        images = [store.images(shard) for shard in run]
        if kept:
            runs += [_rows(old, one) for one in images]
        else:
            tables = [part.table for part in run.values() if part.table is not None]
            indices = np.concatenate(
                [np.arange(one.start, one.stop) for one in images]
            )  # of a range NumPy asks each number
            runs.append({IMAGE: indices, **unpacked(store.layout, tables, names)})
    arrays = runs[0]
    if len(runs) > 1:
        arrays = {name: np.concatenate([run[name] for run in runs]) for name in [IMAGE, *names]}
    stamps = np.zeros((len(shards), _STAMP_BYTES), np.uint8)
    for shard, stamp in wanted.items():
        stamps[shard - shards.start] = np.frombuffer(stamp, np.uint8)
    try:
        write_block(path, {_STAMPS: stamps, **arrays})
    except RunError as error:
        raise UnwritableError(str(error)) from error
    return len(arrays[IMAGE])


def _rows(block: Arrays, images: range) -> Arrays:
    first, last = np.searchsorted(block[IMAGE], (images.start, images.stop))
    return {name: values[first:last] for name, values in block.items() if name != _STAMPS}


def _read_block(path: Path, names: list[str]) -> Arrays:
    """All of a block; nothing where it is absent, damaged, or of other arrays."""
    try:
        arrays = read_block(path)
    except ValueError:
        return {}
    return arrays if set(arrays) == {_STAMPS, IMAGE, *names} else {}


def _stamps(block: Arrays, shards: range) -> dict[int, bytes]:
    """The stamps of the shards that a block holds."""
    rows = [stamp.tobytes() for stamp in block[_STAMPS]]
    return {shard: stamp for shard, stamp in zip(shards, rows, strict=False) if any(stamp)}


def remove_others(folder: Path, kept: Iterable[Path]) -> None:
    """Deletes blocks of stores that are no more.

    Args:
        folder: of the blocks of all stores.
        kept: blocks that are in use.
    """
    wanted = set(kept)
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder stands behind it
        if path.is_dir():
            with suppress(OSError):  # it holds something
                path.rmdir()
        elif path not in wanted:
            path.unlink()
