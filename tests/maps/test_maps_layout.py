from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maehpc.maps import ArrayLayout, StoreLayout


@given(st.integers(1, 300), st.integers(1, 300))
def test_shards_cover_every_image_once(images: int, shard_images: int) -> None:
    layout = StoreLayout(images, shard_images, {}, {})
    spans = [layout.span(shard) for shard in range(layout.shards)]
    assert [image for start, stop in spans for image in range(start, stop)] == list(range(images))
    assert all(stop - start == shard_images for start, stop in spans[:-1])


MAP, NUMBER, CURVE = (
    ArrayLayout(("y", "x"), (2, 2), "float32"),
    ArrayLayout((), (), "int64"),
    ArrayLayout(("step",), (3,), "bool"),
)


def test_shard_files_are_zarr_chunk_keys() -> None:
    layout = StoreLayout(10, 3, {"m": MAP, "label": NUMBER, "curve": CURVE}, {})
    assert layout.shard_files(3) == ["m/c.3.0.0", "scores/c.3.0"]
    assert layout.shard_file("label", 1) == layout.shard_file("curve", 1) == "scores/c.1.0"
    assert StoreLayout(10, 3, {"m": MAP}, {}).shard_files(0) == ["m/c.0.0.0"]
    assert StoreLayout(10, 3, {"label": NUMBER}, {}).shard_files(0) == ["scores/c.0.0"]


def test_a_score_has_a_column_a_number_in_the_order_of_names() -> None:
    layout = StoreLayout(10, 3, {"m": MAP, "label": NUMBER, "curve": CURVE}, {})
    assert layout.column_names == ["curve[0]", "curve[1]", "curve[2]", "label"]
    assert layout.columns == {"curve": slice(0, 3), "label": slice(3, 4)}
    assert layout.table == ArrayLayout(("score",), (4,), "float32")
    precise = StoreLayout(10, 3, {"label": NUMBER, "exact": ArrayLayout((), (), "float64")}, {})
    assert precise.table == ArrayLayout(("score",), (2,), "float64")


@pytest.mark.parametrize(
    ("dims", "shape", "dtype"),
    [
        (("y",), (2, 2), "float32"),
        (("image",), (2,), "float32"),
        (("y", "y"), (2, 2), "float32"),
        (("y",), (0,), "float32"),
        (("y",), (2,), "object"),
    ],
)
def test_impossible_arrays_are_refused(dims: tuple[str, ...], shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError):
        ArrayLayout(dims, shape, dtype)


@pytest.mark.parametrize("name", ["image", "score", "scores", "zarr.json", "../m", "a/b", "", ".m"])
def test_names_that_leave_the_store_or_hide_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        StoreLayout(4, 2, {name: ArrayLayout((), (), "int64")}, {})


def test_the_dimension_of_the_table_is_its_own() -> None:
    with pytest.raises(ValueError, match="dimension 'score' of 'm'"):
        StoreLayout(4, 2, {"m": ArrayLayout(("score", "x"), (2, 2), "float32")}, {})


def test_a_dimension_has_one_size() -> None:
    arrays = {"a": ArrayLayout(("y",), (2,), "uint8"), "b": ArrayLayout(("y",), (3,), "uint8")}
    with pytest.raises(ValueError, match="'y' is 2 elsewhere and 3 in 'b'"):
        StoreLayout(4, 2, arrays, {})
