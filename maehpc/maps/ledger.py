"""The ledger: which files are whole, and what their bytes are. Nothing else is believed.

A record that cannot be read, was cut off, or breaks its own rules is no record. Records are written whole (see
`maehpc.files`), after everything they vouch for is on the disk.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from maehpc import files
from maehpc.errors import InputError, RunError
from maehpc.experiment import experiment_of
from maehpc.maps.layout import StoreLayout

_LAYOUT = TypeAdapter(StoreLayout)

FORMAT: Literal[2] = 2
"""Of stores. 1 had a file for each score of each shard."""

Count = Annotated[int, Field(ge=0)]

Damage = Literal["missing", "truncated", "flipped", "unreadable"]
"""missing: a recorded file is absent; truncated: it is shorter than recorded; flipped: it holds other bytes;
unreadable: the disk does not give it back."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """What one file holds."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Count


class ShardRecord(_Record):
    """A finished shard."""

    shard: Count
    images: tuple[Count, Count]
    files: dict[str, FileRecord]
    digest: str
    attempt: Count


class StoreRecord(_Record):
    """What a store is made from (`digest` speaks for inputs and layout), and its files that are no shards."""

    format: Literal[2]
    digest: str
    inputs: dict[str, Any]
    layout: StoreLayout
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _true_to_itself(self) -> Self:
        if self.digest != store_digest(self.inputs, self.layout):
            raise ValueError("digest does not fit inputs and layout")
        if self.files.keys() != self.layout.fixed_files:
            raise ValueError("files are not those of the layout")
        return self

    def accepts(self, shard: int, record: ShardRecord) -> bool:
        """Whether `record` speaks of this shard of this very store."""
        return (
            record.shard == shard
            and record.digest == self.digest
            and record.images == self.layout.span(shard)
            and record.files.keys() == set(self.layout.shard_files(shard))
        )


AnyRecord = TypeVar("AnyRecord", bound=_Record)


def file_record(*parts: bytes | memoryview) -> FileRecord:
    """The record of a file of these bytes, given in one or more parts."""
    return FileRecord(sha256=files.sha256_bytes(*parts), bytes=sum(map(len, parts)))


def damage(path: Path, record: FileRecord, deep: bool = True) -> Damage | None:
    """What is wrong with a file, None where it is as recorded.

    Args:
        path: the file.
        record: what it must hold.
        deep: read it and compare its SHA-256; without it presence and size alone are compared.
    """
    try:
        with files.reading(path):
            size = path.stat().st_size
            if size < record.bytes:
                return "truncated"
            return "flipped" if size > record.bytes or (deep and files.sha256_file(path) != record.sha256) else None
    except FileNotFoundError:
        return "missing"
    except RunError:
        return "unreadable"


def way_out(root: Path, shard: int, found: Damage) -> str:
    """What a user does about a damaged file of a shard of the store at `root`.

    What presence and sizes tell, explain sees by itself; the rest of a finished store it does not read.
    """
    again = f"run explain again to compute shard {shard} anew"
    if found in ("missing", "truncated"):
        return again
    return f"`maehpc verify --repair {experiment_of(root).root}` forgets the shard, then {again}"


def plain_layout(layout: StoreLayout) -> dict[str, Any]:
    """The layout as JSON has it."""
    plain: dict[str, Any] = _LAYOUT.dump_python(layout, mode="json")
    return plain


def store_digest(inputs: dict[str, Any], layout: StoreLayout) -> str:
    """One SHA-256 for everything that a shard's content depends on."""
    return files.digest({"format": FORMAT, "inputs": inputs, "layout": plain_layout(layout)})


@dataclass(frozen=True)
class Ledger:
    """The records of one store."""

    folder: Path

    @property
    def store_path(self) -> Path:
        """Where the store's own record lies."""
        return self.folder / "store.json"

    def shard_path(self, shard: int) -> Path:
        """Where a shard's record lies."""
        return self.folder / self.shard_name(shard)

    @staticmethod
    def shard_name(shard: int) -> str:
        """Name of a shard's record in the folder."""
        return f"shard-{shard:05d}.json"

    def store(self) -> StoreRecord | None:
        """The store's record, if there is a readable one.

        Raises:
            InputError: it is whole, and of another version of maehpc.
        """
        data = files.read_if_there(self.folder, self.store_path.name)
        if data is None:
            return None
        record = _valid(data, StoreRecord)
        if record is None and _format(data) not in (None, FORMAT):
            raise InputError(
                f"{self.store_path} speaks of a store in another format (maehpc writes format {FORMAT}); move the "
                "experiment's maps and ledger away, or explain it under another --name"
            )
        return record

    def shard_bytes(self, shard: int) -> bytes | None:
        """What stands in a shard's record, for `parsed`; None where there is none."""
        return files.read_if_there(self.folder, self.shard_name(shard))

    def shard(self, shard: int) -> ShardRecord | None:
        """A shard's record, if there is a readable one."""
        data = self.shard_bytes(shard)
        return None if data is None else parsed(data)

    def write_store(self, record: StoreRecord) -> None:
        """Records what the store is."""
        files.write_json(self.store_path, record.model_dump(mode="json"))

    def write_shard(self, record: ShardRecord) -> None:
        """Records a shard whose files are on the disk."""
        files.write_json(self.shard_path(record.shard), record.model_dump(mode="json"))

    def forget(self, shard: int) -> None:
        """Removes a shard's record for good: from here on the shard does not exist."""
        path = self.shard_path(shard)
        with files.writing(path):
            if path.exists():
                path.unlink()
                files.fsync_path(self.folder)


def parsed(data: bytes) -> ShardRecord | None:
    """The record in a file's bytes, if it is a readable one."""
    return _valid(data, ShardRecord)


def _valid(data: bytes, kind: type[AnyRecord]) -> AnyRecord | None:
    try:
        return kind.model_validate_json(data)
    except ValidationError:
        return None


def _format(data: bytes) -> Any:
    """The format of a store's record, None where it is no such record. Format 1 did not name itself."""
    with suppress(ValueError):
        record = json.loads(data)
        if isinstance(record, dict) and {"digest", "inputs", "layout", "files"} <= set(record):
            return record.get("format", 1)
    return None
