"""A store of explanations: written one shard at a time by one owner, read only where the ledger vouches for it.

Order of a write: the shard's files under temporary names, each fsynced; the old record removed, if there was one; all
files renamed, then their folders fsynced; and when all of that is on the disk, the new record. At no instant does the
ledger vouch for bytes that might not be there. Whether this process still owns the store is asked before the first
rename and before the record. One array is compressed while those before it are hashed and written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maehpc import files
from maehpc.errors import InputError, RunError
from maehpc.maps.layout import SCORES, StoreLayout
from maehpc.maps.ledger import (
    FORMAT,
    Damage,
    FileRecord,
    Ledger,
    ShardRecord,
    StoreRecord,
    damage,
    file_record,
    parsed,
    plain_layout,
    store_digest,
    way_out,
)
from maehpc.maps.metadata import COMPRESSIONS, Compression, fixed_files
from maehpc.maps.sharding import Sharding, sharding
from maehpc.maps.table import packed, unpacked
from maehpc.maps.threads import in_order, pool
from maehpc.maps.writing import write_files
from maehpc.ownership import Owner
from maehpc.places import is_remote

_NAMED_DIFFERENCES = 3


class MapStore:
    """One data set's explanations. Get one from `create` (to write) or `open` (to read)."""

    def __init__(
        self, path: Path, ledger: Ledger, record: StoreRecord, metadata: dict[str, bytes], owner: Owner | None
    ) -> None:
        self.path = path
        self._ledger = ledger
        self._record = record
        self._metadata = metadata
        self._owner = owner

    @classmethod
    def create(
        cls,
        path: Path,
        ledger: Path,
        layout: StoreLayout,
        inputs: Mapping[str, Any],
        owner: Owner,
        compression: Compression = COMPRESSIONS[0],
    ) -> MapStore:
        """Creates a store, or takes up one that an earlier attempt left, whatever state it was left in.

        Temporary leftovers go, and metadata that is absent or damaged is written anew. Shards are left alone: see
        `missing`.

        Args:
            path: the Zarr group's folder.
            ledger: the ledger's folder.
            layout: what the store holds.
            inputs: JSON of all else that its content depends on (weights, data, seed, settings).
            owner: this process's claim on the ledger's folder.
            compression: of the shards of a new store; one that is taken up keeps that which it was begun with.

        Raises:
            InputError: another store is there. Nothing has been written.
            RunError: a folder cannot be written, or a newer attempt has begun.
        """
        book = Ledger(ledger)
        digest = store_digest(dict(inputs), layout)
        earlier = book.store()
        if earlier is not None and earlier.digest != digest:
            raise InputError(
                f"{path} was made from something else ({_differences(earlier, inputs, layout)}); "
                "give this run another --name, or restore what has changed"
            )
        if earlier is None and not book.store_path.exists() and _holds_anything(path):
            raise InputError(
                f"{path} holds files that the ledger {ledger} knows nothing of; move it away, or give this run "
                "another --name"
            )
        owner.still_owner()
        files.require_writable(ledger)
        files.require_writable(path)
        remove_leftovers(path, ledger)

        if earlier is None or _damaged(path, earlier.files):
            content, records = _fixed(path, layout, earlier, compression)
            book.write_store(
                StoreRecord(format=FORMAT, digest=digest, inputs=dict(inputs), layout=layout, files=records)
            )
            for name in _damaged(path, records):
                files.write_bytes(path / name, content[name])
        return cls.open(path, ledger, owner)

    @classmethod
    def open(cls, path: Path, ledger: Path, owner: Owner | None = None) -> MapStore:
        """Opens a store that `create` has made.

        Args:
            path: the Zarr group's folder.
            ledger: the ledger's folder.
            owner: the claim to write under; None to read alone.

        Raises:
            InputError: there is no store, or its metadata is not what was recorded.
        """
        book = Ledger(ledger)
        record = book.store()
        if record is None:
            raise InputError(f"{book.store_path} is absent or unreadable; run explain to make the store")
        metadata = {}
        for name, recorded in record.files.items():
            data = files.read_if_there(path, name)
            if data is None or file_record(data) != recorded:
                state = "is absent" if data is None else "is not what its ledger recorded"
                raise InputError(f"{path / name} {state}; run explain again to write it anew")
            metadata[name] = data
        return cls(path, book, record, metadata, owner)

    def tidy(self) -> None:
        """Deletes what writers left that were killed; the caller owns the store, and nobody writes it any more.

        Raises:
            RunError: something cannot be deleted, or a newer attempt owns the store.
        """
        if self._owner is None:
            raise ValueError(f"{self.path} was opened without an owner: for reading alone")
        self._owner.still_owner()
        remove_leftovers(self.path, self._ledger.folder)

    @property
    def layout(self) -> StoreLayout:
        """What the store holds."""
        return self._record.layout

    @property
    def owner(self) -> Owner | None:
        """The claim that it is written under; None where it is read alone."""
        return self._owner

    @property
    def attributes(self) -> dict[str, Any]:
        """What was explained, and how (the Zarr group's attributes)."""
        return self.layout.attributes

    @property
    def digest(self) -> str:
        """SHA-256 of the inputs and the layout: what the content depends on."""
        return self._record.digest

    @property
    def complete(self) -> bool:
        """Whether no shard is missing, as far as `missing` sees without reading the files."""
        return not self.missing()

    def images(self, shard: int) -> range:
        """The indices of a shard's images."""
        return range(*self.layout.span(shard))

    def missing(self, deep: bool = False) -> list[int]:
        """The shards that must be computed: not recorded, or not as recorded.

        Args:
            deep: read every file and compare its SHA-256; without it presence and size alone are compared.
        """
        return [shard for shard, whole in self._looked_at(range(self.layout.shards), deep) if not whole]

    def shards(self, deep: bool = False) -> list[int]:
        """The shards that are not `missing`."""
        return [shard for shard, whole in self._looked_at(range(self.layout.shards), deep) if whole]

    def damaged(self, shards: Sequence[int], watch: Callable[[int], object] = lambda shard: None) -> list[int]:
        """Those of some shards that are not as recorded; every byte of them is read.

        Args:
            shards: to read.
            watch: told each that was read; what it raises ends the reading.
        """
        found = []
        for shard, whole in self._looked_at(shards, deep=True):
            watch(shard)
            found += [] if whole else [shard]
        return found

    def look(self, shard: int) -> Recorded | None:
        """A shard as the ledger has it; None where it is `missing`.

        Of a remote store the record alone is looked at: whether its files are there is told when they are read.
        """
        data = self._ledger.shard_bytes(shard)
        record = self._accepted(shard, data)
        if record is None or (not is_remote(self.path) and _damaged(self.path, record.files, deep=False)):
            return None
        assert data is not None
        return Recorded(self, record, files.sha256_bytes(data))

    def files_of_scores(self, shard: int) -> list[str]:
        """Paths of what `look` and then `Recorded.scores` read of a shard."""
        tables = [] if self.layout.table is None else [f"{self.path}/{self.layout.shard_file(SCORES, shard)}"]
        return [f"{self._ledger.folder}/{self._ledger.shard_name(shard)}", *tables]

    def read(self, name: str, shard: int) -> NDArray[Any]:
        """One array's values [n, *shape] for a shard of n images; the bytes are checked before they are decoded.

        Raises:
            KeyError: the store has no such array.
            RunError: the shard is not recorded, or its file is not what was recorded.
        """
        return self.read_arrays([name], shard)[name]

    def read_arrays(self, names: Iterable[str], shard: int) -> dict[str, NDArray[Any]]:
        """Several arrays of a shard, by name; see `read`."""
        record = self._accepted(shard, self._ledger.shard_bytes(shard))
        if record is None:
            raise RunError(f"shard {shard} of {self.path} is not recorded; run explain to compute it")
        names = [*names]
        scores = [name for name in names if name in self.layout.columns]
        found = unpacked(self.layout, [self._read(SCORES, record)], scores) if scores else {}
        return {name: found[name] if name in found else self._read(name, record) for name in names}

    def _read(self, stored: str, record: ShardRecord) -> NDArray[Any]:
        """What a file holds of an array that is on the disk."""
        shard = record.shard
        relative = self.layout.shard_file(stored, shard)
        data = files.read_if_there(self.path, relative)
        recorded = record.files[relative]
        if data is None or len(data) != recorded.bytes or files.sha256_bytes(data) != recorded.sha256:
            state = "is absent" if data is None else "is not what its ledger recorded"
            found: Damage = "missing" if data is None else "truncated" if len(data) < recorded.bytes else "flipped"
            raise RunError(f"{self.path / relative} {state}; {way_out(self.path, shard, found)}")
        return self._sharding(stored).decode(data, len(self.images(shard)), whole=True)  # its SHA-256 says so

    def write_shard(self, shard: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes and records a shard, whole or not at all.

        Args:
            shard: which.
            arrays: by name, every array of the layout: [n, *shape] of its dtype, n the images of the shard.

        Raises:
            ValueError: the arrays are not those of the layout, or a score is an integer beyond 2^24.
            RunError: the disk refused, or a newer attempt owns the store. The shard is then not recorded.
        """
        if self._owner is None:
            raise ValueError(f"{self.path} was opened without an owner: for reading alone")
        self._check(shard, arrays)
        arrays = self._stored(arrays)
        names = sorted(arrays, key=lambda name: (-arrays[name].nbytes, name))  # so that no long one is left at the end
        relative = [self.layout.shard_file(name, shard) for name in names]
        with files.atomic_paths([self.path / one for one in relative]) as partials:
            encoders = [partial(self._sharding(name).encode, arrays[name]) for name in names]
            records = dict(zip(relative, write_files(encoders, partials), strict=True))
            self._owner.still_owner()
            self._ledger.forget(shard)
        self._owner.still_owner()
        self._ledger.write_shard(
            ShardRecord(
                shard=shard,
                images=self.layout.span(shard),
                files=records,
                digest=self.digest,
                attempt=self._owner.attempt,
            )
        )

    def _check(self, shard: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        if not 0 <= shard < self.layout.shards:
            raise ValueError(f"shard {shard} is none of the {self.layout.shards} of {self.path}")
        if sorted(arrays) != sorted(self.layout.arrays):
            raise ValueError(f"arrays {sorted(arrays)} were given for {sorted(self.layout.arrays)}")
        for name, values in arrays.items():
            expected = self.layout.arrays[name]
            shape = (len(self.images(shard)), *expected.shape)
            if values.shape != shape or values.dtype != np.dtype(expected.dtype):
                raise ValueError(
                    f"{name} is {values.dtype}{list(values.shape)} for {expected.dtype}{list(shape)} in shard {shard}"
                )

    def _stored(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The arrays as they are on the disk: maps, and the table of scores."""
        stored = {name: arrays[name] for name in self.layout.stored if name != SCORES}
        return stored if self.layout.table is None else {**stored, SCORES: packed(self.layout, arrays)}

    def _sharding(self, name: str) -> Sharding:
        return sharding(self._metadata[f"{name}/zarr.json"])

    def _accepted(self, shard: int, data: bytes | None) -> ShardRecord | None:
        """The record in these bytes, where it speaks of this shard of this very store."""
        record = None if data is None else parsed(data)
        return record if record is not None and self._record.accepts(shard, record) else None

    def _looked_at(self, shards: Sequence[int], deep: bool) -> Iterator[tuple[int, bool]]:
        """Whether each is as recorded. Threads hide how long a file system takes to answer."""

        def whole(shard: int) -> tuple[int, bool]:
            record = self._accepted(shard, self._ledger.shard_bytes(shard))
            return shard, record is not None and not _damaged(self.path, record.files, deep)

        with pool() as looking:
            yield from in_order(looking, whole, shards)


@dataclass(frozen=True)
class Recorded:
    """A shard that the ledger vouches for.

    Attributes:
        store: that it belongs to.
        record: of its files.
        stamp: tells its content from any other: a digest of the record.
    """

    store: MapStore
    record: ShardRecord
    stamp: str

    def scores(self) -> NDArray[Any]:
        """The table of its scores, [n, columns] for n images: see `StoreLayout.columns`.

        Raises:
            KeyError: the store has no scores.
            RunError: the file is not what was recorded.
        """
        return self.store._read(SCORES, self.record)


def _fixed(
    path: Path, layout: StoreLayout, earlier: StoreRecord | None, wish: Compression
) -> tuple[dict[str, bytes], dict[str, FileRecord]]:
    """The files of a store but its shards, and their records, in the compression that it was begun with.

    Its record tells that, or else what is left of its files; a new store has neither.
    """

    def unlike(content: dict[str, bytes]) -> tuple[bool, int]:
        records = _records(content)
        return earlier is None or records != earlier.files, len(_damaged(path, records))

    candidates = dict.fromkeys((wish, *COMPRESSIONS))
    content = min((fixed_files(layout, compression) for compression in candidates), key=unlike)
    return content, _records(content)


def _records(content: Mapping[str, bytes]) -> dict[str, FileRecord]:
    return {name: file_record(data) for name, data in content.items()}


def remove_leftovers(path: Path, ledger: Path) -> None:
    """Deletes temporary files of a store and its ledger; the caller owns both."""
    files.remove_partials(ledger)
    files.remove_partials(path, below=True)


def _damaged(root: Path, records: Mapping[str, FileRecord], deep: bool = True) -> list[str]:
    """The files that are not as recorded, by relative path."""
    if not deep and not is_remote(root) and _have_sizes(root, records):
        return []
    return [name for name, record in records.items() if damage(root / name, record, deep)]


def _have_sizes(root: Path, records: Mapping[str, FileRecord]) -> bool:
    """What `damage` would find file by file, at a tenth of its cost: a finished store has a hundred thousand."""
    try:
        for name, record in records.items():
            if os.stat(f"{root}/{name}").st_size != record.bytes:  # noqa: PTH116
                return False
    except OSError:
        return False
    return True


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(not files.is_partial(entry) for entry in folder.iterdir())


def _differences(earlier: StoreRecord, inputs: Mapping[str, Any], layout: StoreLayout) -> str:
    """In words, what an earlier store was made from and what is asked for now; the layout follows from the inputs."""
    now = json.loads(files.canonical_json(inputs))
    old, new = dict(_leaves(earlier.inputs)), dict(_leaves(now))
    if old == new:
        old, new = dict(_leaves(plain_layout(earlier.layout))), dict(_leaves(plain_layout(layout)))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    told = [f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}" for key in changed]
    more = [f"and {len(told) - _NAMED_DIFFERENCES} more"] if len(told) > _NAMED_DIFFERENCES else []
    return ", ".join(told[:_NAMED_DIFFERENCES] + more)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested objects, by dotted key. A list is a value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
