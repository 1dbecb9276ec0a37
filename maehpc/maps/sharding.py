"""A shard's file, as Zarr's `sharding_indexed` codec lays it out: made and read without zarr's pipeline.

    inner chunk 0 | inner chunk 1 | … | index

An inner chunk is little-endian values in C order, compressed or not, and the crc32c of that. The index holds offset and
length of each chunk, both 2^64 - 1 where there is none, and ends in its own crc32c. zarr's pipeline spends several
times as long on the same bytes, most of it between the chunks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from maehpc.maps.threads import in_order

Bytes = bytes | memoryview

PIECE = 1 << 21
"""Bytes of values that a thread compresses at a time: enough to make up for handing them over."""

CHECKSUM = 4
"""Bytes of a crc32c."""

_ABSENT = np.uint64(2**64 - 1)
_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


@dataclass(frozen=True)
class Sharding:
    """How an array's shards are cut and compressed.

    Attributes:
        shape: of a shard, all but the last of which are full.
        chunk: images in an inner chunk.
        dtype: of the values, little-endian.
        fill: what stands in a chunk beyond the last image.
        compressor: of a chunk's bytes; None: they stand as they are.
    """

    shape: tuple[int, ...]
    chunk: int
    dtype: np.dtype[Any]
    fill: Any
    compressor: Any

    def encode(self, values: NDArray[Any], pool: Executor) -> Iterator[Bytes]:
        """The file's bytes, in parts that may be views of the values, made a little before they are taken.

        Args:
            values: [n, *shape[1:]], n at most the shard's images.
            pool: threads to compress in. Equal values give equal bytes however many there are.
        """
        values = np.ascontiguousarray(values, self.dtype)
        step = self.chunk * max(1, PIECE // (self.dtype.itemsize * math.prod((self.chunk, *self.shape[1:]))))
        pieces = (values[start : start + step] for start in range(0, len(values), step))
        index = np.full((self.shape[0] // self.chunk, 2), _ABSENT, "<u8")
        offset = 0
        for place, chunk in enumerate(chain.from_iterable(self._made(pieces, pool))):
            length = sum(map(len, chunk))
            index[place] = offset, length
            offset += length
            yield from chunk
        yield index.tobytes()
        yield _checksum(index.tobytes())

    def _made(self, pieces: Iterator[NDArray[Any]], pool: Executor) -> Iterator[list[tuple[Bytes, bytes]]]:
        """A chunk's bytes and checksum, piece by piece; where nothing is compressed, threads have nothing to do."""
        return map(self._chunks, pieces) if self.compressor is None else in_order(pool, self._chunks, pieces)

    def decode(self, data: bytes, images: int, whole: bool = False) -> NDArray[Any]:
        """The values [images, *shape[1:]] of a shard's file; a view of it where they are one chunk as it stands.

        Args:
            data: of the file.
            images: in the shard.
            whole: the bytes are known to be those that were written: checksums are not computed again.

        Raises:
            ValueError: a checksum is wrong.
        """
        raw = np.frombuffer(data, np.uint8)
        index = _content(raw[-16 * (self.shape[0] // self.chunk) - CHECKSUM :], whole).view("<u8").reshape(-1, 2)
        if len(index) == 1 and self.compressor is None:
            offset, length = index[0].tolist()
            return _content(raw[offset : offset + length], whole).view(self.dtype).reshape(self.shape)[:images]
        values = np.empty((-(-images // self.chunk) * self.chunk, *self.shape[1:]), self.dtype)
        places = values.reshape(len(values) // self.chunk, -1).view(np.uint8)
        for place, (offset, length) in zip(places, index.tolist(), strict=False):
            chunk = _content(raw[offset : offset + length], whole)
            place[:] = chunk if self.compressor is None else np.frombuffer(self.compressor.decode(chunk), np.uint8)
        return values[:images]

    def _chunks(self, values: NDArray[Any]) -> list[tuple[Bytes, bytes]]:
        raw = (chunk.reshape(-1).view(np.uint8) for chunk in self._cut(values))
        chunks = (chunk.data if self.compressor is None else self.compressor.encode(chunk) for chunk in raw)
        return [(chunk, _checksum(chunk)) for chunk in chunks]

    def _cut(self, values: NDArray[Any]) -> Iterator[NDArray[Any]]:
        for start in range(0, len(values), self.chunk):
            part = values[start : start + self.chunk]
            if len(part) < self.chunk:
                whole = np.full((self.chunk, *self.shape[1:]), self.fill, self.dtype)
                whole[: len(part)] = part
                part = whole
            yield part


@lru_cache(maxsize=1024)
def sharding(metadata: bytes) -> Sharding:
    """What an array's zarr.json, of those that `metadata.fixed_files` makes, says of its shards."""
    described = json.loads(metadata)
    [outer] = described["codecs"]
    _, *compressors, _ = outer["configuration"]["codecs"]  # bytes, one or none, crc32c
    dtype = np.dtype(described["data_type"]).newbyteorder("<")
    return Sharding(
        shape=tuple(described["chunk_grid"]["configuration"]["chunk_shape"]),
        chunk=outer["configuration"]["chunk_shape"][0],
        dtype=dtype,
        fill=np.array(described["fill_value"], dtype)[()],
        compressor=next((_COMPRESSORS[one["name"]](**one["configuration"]) for one in compressors), None),
    )


def _blosc(shuffle: str, **settings: Any) -> Any:
    return Blosc(shuffle=_SHUFFLES[shuffle], **settings)


_COMPRESSORS = {"blosc": _blosc, "zstd": Zstd}


def _checksum(data: Bytes) -> bytes:
    checksum: int = crc32c(np.frombuffer(data, np.uint8))
    return checksum.to_bytes(CHECKSUM, "little")


def _content(data: NDArray[np.uint8], whole: bool) -> NDArray[np.uint8]:
    content, checksum = data[:-CHECKSUM], data[-CHECKSUM:]
    if not whole and crc32c(content) != int.from_bytes(checksum, "little"):
        raise ValueError("a shard's checksum is wrong")
    return content
