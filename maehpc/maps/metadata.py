"""The files of a store that are no shards: the group, each array's description, the coordinates of images and scores.

Every shard is one `sharding_indexed` chunk. Its inner chunks hold one image where an array is a map, else the whole
shard; each is compressed and ends in its own crc32c, as the index does, so that any Zarr reader notices a flipped bit.
There is no consolidated metadata, which the v3 specification does not know. Chunk keys are joined by dots
(`c.3.0.0`): one file a shard and no folders between, which parallel file systems thank.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from maehpc.maps.layout import IMAGE, SCORE, StoreLayout

Compression = Literal["none", "lz4", "zstd"]
"""none: as fast as the disk. lz4: blosc's, of shuffled bits. zstd: level 3."""

COMPRESSIONS: tuple[Compression, ...] = ("none", "lz4", "zstd")
"""That a store may have been begun with; new ones are with the first."""

_FILL: dict[str, float | int | bool] = {"f": float("nan"), "i": -1, "u": 0, "b": False}
"""By numpy's kind: a value that no written shard would be mistaken for, where the type has one."""


def compressors(compression: Compression, dtype: str) -> list[BytesBytesCodec]:
    """zarr's codecs of that name, for values of a type."""
    match compression:
        case "none":
            return []
        case "lz4":
            return [BloscCodec(typesize=np.dtype(dtype).itemsize, cname="lz4", clevel=5, shuffle="bitshuffle")]
        case "zstd":
            return [ZstdCodec(level=3)]


def fixed_files(layout: StoreLayout, compression: Compression = COMPRESSIONS[0]) -> dict[str, bytes]:
    """Every file of a store but its shards, by relative path.

    Args:
        layout: of the store.
        compression: of its shards, which are read and written as their metadata says.
    """
    made: dict[str, Buffer] = {}
    store = MemoryStore(made)
    zarr.create_group(store=store, zarr_format=3, attributes=layout.attributes)
    for name, values, fill in (
        (IMAGE, np.arange(layout.images, dtype=np.int64), -1),
        (SCORE, np.array(layout.column_names, "T"), ""),  # numpy's strings of any length
    ):
        if not len(values):
            continue
        zarr.create_array(
            store=store,
            name=name,
            data=values,
            chunks=values.shape,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            fill_value=fill,
            dimension_names=(name,),
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
        )
    for name, array in layout.stored.items():
        zarr.create_array(
            store=store,
            name=name,
            shape=(layout.images, *array.shape),
            dtype=array.dtype,
            shards=(layout.shard_images, *array.shape),
            chunks=(1 if array.is_map else layout.shard_images, *array.shape),
            compressors=[*compressors(compression, array.dtype), Crc32cCodec()],
            fill_value=_FILL[np.dtype(array.dtype).kind],
            dimension_names=(IMAGE, *array.dims),
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
        )
    return {path: made[path].to_bytes() for path in sorted(made)}
