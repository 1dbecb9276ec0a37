"""Arrays to the bytes of Zarr v3 files and back, in memory alone: files are someone else's business.

Every shard is one `sharding_indexed` chunk. Its inner chunks hold one image where an array is a map, else the whole
shard; each is zstd-compressed and ends in its own crc32c, as the index does, so that any Zarr reader notices a
flipped bit. There is no consolidated metadata, which the v3 specification does not know. Chunk keys are joined by
dots (`c.3.0.0`): one file a shard and no folders between, which parallel file systems thank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer import default_buffer_prototype
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from maehpc.maps.layout import IMAGE, StoreLayout

_FILL: dict[str, float | int | bool] = {"f": float("nan"), "i": -1, "u": 0, "b": False}
"""By numpy's kind: a value that no written shard would be mistaken for, where the type has one."""


class _Files:
    """A Zarr store of named bytes."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        from_bytes = default_buffer_prototype().buffer.from_bytes
        self._buffers = {path: from_bytes(data) for path, data in (files or {}).items()}
        self.store = MemoryStore(self._buffers)

    def __getitem__(self, path: str) -> bytes:
        return self._buffers[path].to_bytes()

    def items(self) -> Iterator[tuple[str, bytes]]:
        return ((path, self[path]) for path in sorted(self._buffers))


def _create(files: _Files, layout: StoreLayout, name: str) -> zarr.Array[Any]:
    array = layout.arrays[name]
    return zarr.create_array(
        store=files.store,
        name=name,
        shape=(layout.images, *array.shape),
        dtype=array.dtype,
        shards=(layout.shard_images, *array.shape),
        chunks=(1 if array.is_map else layout.shard_images, *array.shape),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=_FILL[np.dtype(array.dtype).kind],
        dimension_names=(IMAGE, *array.dims),
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )


def wake() -> None:
    """Starts zarr's thread, which each later call hands its work to.

    Where it cannot be started, for want of memory say, zarr raises once and then waits for ever for the one that never
    ran; so processes that may get short of memory start it before they compute.
    """
    fixed_files(StoreLayout(1, 1, {}, {}))


def fixed_files(layout: StoreLayout) -> dict[str, bytes]:
    """Every file of a store but its shards: the metadata and the image coordinate, by relative path."""
    files = _Files()
    zarr.create_group(store=files.store, zarr_format=3, attributes=layout.attributes)
    zarr.create_array(
        store=files.store,
        name=IMAGE,
        data=np.arange(layout.images, dtype=np.int64),
        chunks=(layout.images,),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=-1,
        dimension_names=(IMAGE,),
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    for name in layout.arrays:
        _create(files, layout, name)
    return dict(files.items())


def encode(layout: StoreLayout, name: str, shard: int, values: NDArray[Any]) -> bytes:
    """The file of one array's shard. Equal values give equal bytes.

    Args:
        layout: the store's.
        name: the array.
        shard: which shard.
        values: [n, *shape], n the images of the shard.
    """
    files = _Files()
    start, stop = layout.span(shard)
    _create(files, layout, name)[start:stop] = values
    return files[layout.shard_file(name, shard)]


def decode(layout: StoreLayout, name: str, shard: int, metadata: bytes, data: bytes) -> NDArray[Any]:
    """The values [n, *shape] of one array's shard.

    Args:
        layout: the store's.
        name: the array.
        shard: which shard.
        metadata: the array's zarr.json.
        data: the shard's file.
    """
    files = _Files({f"{name}/zarr.json": metadata, layout.shard_file(name, shard): data})
    start, stop = layout.span(shard)
    array = zarr.open_array(files.store, path=name, mode="r", zarr_format=3)
    return np.asarray(array[start:stop])
