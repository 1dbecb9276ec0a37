"""What a store holds: its arrays, how they are cut into shards, and the name of every shard's files.

A map is an array of the Zarr group, and a file a shard. All scores are one array of the group, `scores`, whose columns
the coordinate `score` names: a file a shard as well.
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

Positive = Annotated[int, Field(gt=0)]
DType = Literal["float16", "float32", "float64", "int32", "int64", "uint8", "bool"]

IMAGE = "image"
"""The leading dimension of every array, and the coordinate array of the images' indices."""
SCORES = "scores"
"""The array [image, score] of all that is no map."""
SCORE = "score"
"""Its second dimension, and the coordinate array of the columns' names."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class ArrayLayout:
    """One array, seen from a single image.

    Attributes:
        dims: names of the dimensions after "image"; a name has one size in the whole store.
        shape: their sizes.
        dtype: type of an element. Of a map, what no shard has written reads as NaN, -1, 0 (uint8) or False.
    """

    dims: tuple[str, ...]
    shape: tuple[Positive, ...]
    dtype: DType

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.dims) != len(self.shape):
            raise ValueError(f"{len(self.dims)} dimension names for {len(self.shape)} sizes")
        if IMAGE in self.dims or len(set(self.dims)) != len(self.dims):
            raise ValueError(f"dimensions {self.dims} repeat a name, or the leading '{IMAGE}'")
        return self

    @property
    def bytes(self) -> int:
        """Of one image's values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def is_map(self) -> bool:
        """Whether one image's part is worth reading alone: maps and pixels are; all else is a score."""
        return len(self.shape) > 1


@dataclass(frozen=True, config=_STRICT)
class StoreLayout:
    """All arrays of a store, one image coordinate, one cut into shards.

    Attributes:
        images: images in the store.
        shard_images: images computed, written and recorded as one unit; the last shard may hold fewer.
        arrays: by name.
        attributes: JSON for the group: what was explained, and how.
    """

    images: Positive
    shard_images: Positive
    arrays: dict[str, ArrayLayout]
    attributes: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sizes = {IMAGE: self.images}
        for name, array in self.arrays.items():
            if not _NAME.fullmatch(name) or name in (IMAGE, SCORE, SCORES, "zarr.json"):
                raise ValueError(f"'{name}' cannot name an array")
            if SCORE in array.dims:
                raise ValueError(f"dimension '{SCORE}' of '{name}' is that of the scores")
            for dim, size in zip(array.dims, array.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(f"dimension '{dim}' is {sizes[dim]} elsewhere and {size} in '{name}'")
        return self

    @property
    def shards(self) -> int:
        """How many shards the store is cut into."""
        return -(-self.images // self.shard_images)

    def span(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and the one after its last."""
        assert 0 <= shard < self.shards, shard
        start = shard * self.shard_images
        return start, min(start + self.shard_images, self.images)

    def values_bytes(self, shard: int) -> int:
        """Bytes of a shard's values, as they are stored."""
        start, stop = self.span(shard)
        return sum((stop - start) * array.bytes for array in self.stored.values())

    @cached_property
    def columns(self) -> dict[str, slice]:
        """The columns of each score in the table of scores, in order of the names."""
        found, stop = {}, 0
        for name in sorted(name for name, array in self.arrays.items() if not array.is_map):
            start, stop = stop, stop + math.prod(self.arrays[name].shape)
            found[name] = slice(start, stop)
        return found

    @property
    def column_names(self) -> list[str]:
        """A score's name, or for one with a dimension of its own the name and a place: `logits[2]`."""
        return [
            f"{name}[{place}]" if self.arrays[name].shape else name
            for name, columns in self.columns.items()
            for place in range(columns.stop - columns.start)
        ]

    @cached_property
    def table(self) -> ArrayLayout | None:
        """The table of scores; None where there are none."""
        if not self.columns:
            return None
        wide = any(self.arrays[name].dtype == "float64" for name in self.columns)
        return ArrayLayout((SCORE,), (len(self.column_names),), "float64" if wide else "float32")

    @cached_property
    def stored(self) -> dict[str, ArrayLayout]:
        """The arrays that are on the disk, by name: maps, and the table of scores."""
        maps = {name: array for name, array in self.arrays.items() if array.is_map}
        return maps if self.table is None else {**maps, SCORES: self.table}

    @property
    def fixed_files(self) -> set[str]:
        """Paths of all files that are no shard's, relative to the store: metadata, and the values of coordinates."""
        coordinates = [IMAGE] if self.table is None else [IMAGE, SCORE]
        arrays = {f"{name}/zarr.json" for name in (*self.stored, *coordinates)}
        return {"zarr.json", *arrays, *(f"{name}/c.0" for name in coordinates)}

    def shard_file(self, name: str, shard: int) -> str:
        """Path of the file with an array's part of a shard, relative to the store."""
        start, end = self._file_names[SCORES if name in self.columns else name]
        return f"{start}{shard}{end}"

    def shard_files(self, shard: int) -> list[str]:
        """Paths of all files of a shard, relative to the store, sorted."""
        return [f"{start}{shard}{end}" for start, end in self._file_names.values()]

    @cached_property
    def _file_names(self) -> dict[str, tuple[str, str]]:
        """What stands before and after a shard's number in the path of its part of each stored array, sorted."""
        return {name: (f"{name}/c.", ".0" * len(array.shape)) for name, array in sorted(self.stored.items())}
