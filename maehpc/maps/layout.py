"""What a store holds: its arrays, how they are cut into shards, and the name of every shard's files."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

Positive = Annotated[int, Field(gt=0)]
DType = Literal["float16", "float32", "float64", "int32", "int64", "uint8", "bool"]

IMAGE = "image"
"""The leading dimension of every array, and the coordinate array of the images' indices."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class ArrayLayout:
    """One array, seen from a single image.

    Attributes:
        dims: names of the dimensions after "image"; a name has one size in the whole store.
        shape: their sizes.
        dtype: type of an element. What no shard has written reads as NaN, -1, 0 (uint8) or False.
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
        """Whether one image's part is worth reading alone: maps and pixels are, scores are not."""
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
            if not _NAME.fullmatch(name) or name in (IMAGE, "zarr.json"):
                raise ValueError(f"'{name}' cannot name an array")
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
        """Bytes of a shard's values, as they are in memory."""
        start, stop = self.span(shard)
        return sum((stop - start) * array.bytes for array in self.arrays.values())

    def shard_file(self, name: str, shard: int) -> str:
        """Path of one array's shard, relative to the store."""
        return f"{name}/c.{shard}" + ".0" * len(self.arrays[name].shape)

    def shard_files(self, shard: int) -> list[str]:
        """Paths of all files of a shard, relative to the store, sorted."""
        return sorted(self.shard_file(name, shard) for name in self.arrays)
