"""Shard files made and read without zarr's pipeline, held to that pipeline byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import maps_writer
import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from maehpc.maps import ArrayLayout, MapStore, StoreLayout, metadata, verify
from maehpc.maps.metadata import COMPRESSIONS, Compression, fixed_files
from maehpc.maps.sharding import PIECE, sharding
from maehpc.maps.threads import pool
from maehpc.ownership import own


def by_zarr(layout: StoreLayout, made: dict[str, bytes], shard: int, values: np.ndarray[Any, Any]) -> bytes:
    """The file that zarr itself writes for array `a`."""
    from_bytes = default_buffer_prototype().buffer.from_bytes
    buffers = {path: from_bytes(data) for path, data in made.items()}
    array = zarr.open_array(MemoryStore(buffers), path="a", zarr_format=3).with_config({"write_empty_chunks": True})
    start, stop = layout.span(shard)
    array[start:stop] = values
    return buffers[layout.shard_file("a", shard)].to_bytes()


def by_us(made: dict[str, bytes], values: np.ndarray[Any, Any], threads: int = 2) -> bytes:
    with pool(threads) as compressing:
        return b"".join(sharding(made["a/zarr.json"]).encode(values, compressing))


def layout_of(images: int, shard_images: int, shape: tuple[int, ...], dtype: Any) -> StoreLayout:
    dims = tuple(f"d{axis}" for axis in range(len(shape)))
    layout = StoreLayout(images, shard_images, {"a": ArrayLayout(dims, shape, dtype)}, {})
    vars(layout).update(stored=layout.arrays, columns={})  # each as an array of its own, whatever a store makes of it
    return layout


@st.composite
def shards(draw: st.DrawFn) -> tuple[StoreLayout, int, np.ndarray[Any, Any]]:
    dtype = draw(st.sampled_from(["float16", "float32", "float64", "int32", "int64", "uint8", "bool"]))
    shape = draw(st.lists(st.integers(1, 5), max_size=3).map(tuple))
    layout = layout_of(draw(st.integers(1, 9)), draw(st.integers(1, 12)), shape, dtype)
    shard = draw(st.integers(0, layout.shards - 1))
    start, stop = layout.span(shard)
    return layout, shard, draw(hnp.arrays(dtype, (stop - start, *shape)))


@settings(deadline=None, max_examples=60)
@given(case=shards(), compression=st.sampled_from(COMPRESSIONS))
def test_any_shard_has_the_bytes_that_zarr_writes(
    case: tuple[StoreLayout, int, np.ndarray[Any, Any]], compression: Compression
) -> None:
    layout, shard, values = case
    made = fixed_files(layout, compression)
    assert made.keys() == layout.fixed_files
    data = by_us(made, values)
    assert data == by_zarr(layout, made, shard, values)
    back = sharding(made["a/zarr.json"]).decode(data, len(values))
    assert (back.dtype, back.shape, back.tobytes()) == (values.dtype, values.shape, values.tobytes())


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_neither_threads_nor_memory_layout_change_a_byte(compression: Compression) -> None:
    layout = layout_of(20, 20, (300, 200), "float32")
    smooth = np.random.default_rng(0).normal(size=(20, 300, 200)).cumsum(2).astype("float32")
    assert smooth.nbytes > 2 * PIECE
    made = fixed_files(layout, compression)
    data = by_us(made, smooth, threads=1)
    assert data == by_us(made, smooth, threads=8) == by_us(made, np.asfortranarray(smooth), threads=3)
    assert data == by_zarr(layout, made, 0, smooth)


@settings(deadline=None, max_examples=40)
@given(bit=st.integers(min_value=0), compression=st.sampled_from(COMPRESSIONS))
def test_no_flipped_bit_is_decoded(bit: int, compression: Compression) -> None:
    """Unless the checksum of what nobody reads is hit, which a shard has none of when it is full."""
    made = fixed_files(layout_of(3, 3, (4, 5), "float16"), compression)
    data = bytearray(by_us(made, np.arange(60, dtype="float16").reshape(3, 4, 5)))
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="checksum"):
        sharding(made["a/zarr.json"]).decode(bytes(data), 3)


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A store that was begun with zstd."""
    root = tmp_path / "older"
    with own(root / "ledger") as owner:
        MapStore.create(root / "maps", root / "ledger", maps_writer.LAYOUT, maps_writer.INPUTS, owner, "zstd")
    assert maps_writer.explain(root) == [0, 1, 2]
    assert b'"zstd"' in (root / "maps/saliency/zarr.json").read_bytes()
    return root


def test_an_older_store_goes_on_as_it_was_begun(older: Path, tmp_path: Path) -> None:
    expected = maps_writer.contents(older / "maps")
    assert MapStore.open(older / "maps", older / "ledger").read("label", 2).tolist() == (
        maps_writer.values(maps_writer.LAYOUT, 2)["label"].tolist()
    )
    (older / "maps/saliency/c.1.0.0").unlink()
    assert maps_writer.explain(older) == [1]
    for lost in ("maps/saliency/zarr.json", "ledger/store.json"):
        (older / lost).write_bytes(b"")
        assert maps_writer.explain(older) == []
        assert maps_writer.contents(older / "maps") == expected and verify(older / "maps", older / "ledger") == []
    for folder in (older / "maps").iterdir():
        if folder.is_dir():
            (folder / "zarr.json").unlink()  # its record alone still tells
    assert maps_writer.explain(older) == []
    assert maps_writer.contents(older / "maps") == expected
    with xarray.open_zarr(older / "maps", consolidated=False) as data:
        assert data.scores.sel(score="label").values.tolist() == [
            label for shard in range(3) for label in maps_writer.values(maps_writer.LAYOUT, shard)["label"].tolist()
        ]


def test_a_store_that_is_gone_is_begun_with_the_newest(older: Path, tmp_path: Path) -> None:
    shutil.rmtree(older)
    maps_writer.explain(older)
    maps_writer.explain(tmp_path / "new")
    assert maps_writer.contents(older / "maps") == maps_writer.contents(tmp_path / "new/maps")
    assert metadata.COMPRESSIONS[0] == "none" and b"zstd" not in (older / "maps/saliency/zarr.json").read_bytes()
