"""A store against its ledger, byte by byte: every file that is absent, cut off, altered or not ours, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from maehpc import files
from maehpc.errors import InputError
from maehpc.maps.ledger import Damage, FileRecord, Ledger, StoreRecord, damage, way_out
from maehpc.maps.threads import in_order, pool

Kind = Damage | Literal["unrecorded", "foreign"]
"""What befell a recorded file; or unrecorded: the ledger does not vouch for the shard; or foreign: a file the ledger
does not know, a record of another store."""

_SAID: dict[Damage, str] = {
    "missing": "is missing",
    "truncated": "is cut off: shorter than recorded",
    "flipped": "does not hold the bytes that were recorded",
    "unreadable": "cannot be read",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be.

    Attributes:
        kind: what is wrong.
        shard: the shard that must be computed again; None where it is no shard's file.
        path: the file.
        sentence: what is wrong and the way out, for the user.
    """

    kind: Kind
    shard: int | None
    path: Path
    sentence: str


def verify(path: Path, ledger: Path) -> list[Problem]:
    """Reads every byte of a store and holds it to its ledger. Writes nothing.

    Args:
        path: the Zarr group's folder.
        ledger: the ledger's folder.

    Returns:
        The problems: metadata first, then shard by shard, then what is foreign. None: the store is whole.

    Raises:
        InputError: the ledger has no readable record of a store.
    """
    book = Ledger(ledger)
    store = book.store()
    if store is None:
        raise InputError(f"{book.store_path} is absent or unreadable; run explain to make the store")
    return [
        *_metadata(path, store),
        *_shards(path, book, store),
        *_foreign_files(path, store),
        *_foreign_records(book, store),
    ]


def discard(ledger: Path, problems: Iterable[Problem]) -> list[int]:
    """Removes the records of the shards that have problems, so that they count as missing. The caller owns the store.

    Returns:
        Those shards, sorted.
    """
    shards = sorted({problem.shard for problem in problems if problem.shard is not None})
    for shard in shards:
        Ledger(ledger).forget(shard)
    return shards


def _metadata(path: Path, store: StoreRecord) -> Iterator[Problem]:
    for name, found in _damages(path, store.files):
        sentence = f"{path / name} {_SAID[found]}; run explain again to write it anew"
        yield Problem(found, None, path / name, sentence)


def _shards(path: Path, book: Ledger, store: StoreRecord) -> Iterator[Problem]:
    with pool() as reading:
        found = in_order(reading, lambda shard: list(_shard(path, book, store, shard)), range(store.layout.shards))
        yield from chain.from_iterable(found)


def _shard(path: Path, book: Ledger, store: StoreRecord, shard: int) -> Iterator[Problem]:
    record = book.shard(shard)
    where = book.shard_path(shard)
    start, stop = store.layout.span(shard)
    which = f"shard {shard} (images {start} to {stop - 1}) of {path}"
    if record is None:
        reason = "its record is unreadable" if where.exists() else "it has no record"
        yield Problem("unrecorded", shard, where, f"{which} is not explained: {reason}; run explain to compute it")
    elif not store.accepts(shard, record):
        sentence = f"{where} is no record of {which}; run explain to compute the shard"
        yield Problem("foreign", shard, where, sentence)
    else:
        for name, found in _damages(path, record.files):
            sentence = f"{path / name} {_SAID[found]}; {way_out(path, shard, found)}"
            yield Problem(found, shard, path / name, sentence)


def _damages(root: Path, records: dict[str, FileRecord]) -> Iterator[tuple[str, Damage]]:
    for name, record in sorted(records.items()):
        found = damage(root / name, record)
        if found:
            yield name, found


def _foreign_files(root: Path, store: StoreRecord) -> Iterator[Problem]:
    shard_files = {name for shard in range(store.layout.shards) for name in store.layout.shard_files(shard)}
    known = {root / name for name in shard_files | set(store.files)}
    for path in sorted(root.rglob("*")):
        if not path.is_dir() and not files.is_partial(path) and path not in known:
            yield Problem("foreign", None, path, f"{path} is no file of this store; move it away")


def _foreign_records(book: Ledger, store: StoreRecord) -> Iterator[Problem]:
    known = {book.shard_path(shard) for shard in range(store.layout.shards)}
    for path in sorted(book.folder.glob("shard-*")):
        if path not in known:
            yield Problem("foreign", None, path, f"{path} is no record of this store; move it away")
