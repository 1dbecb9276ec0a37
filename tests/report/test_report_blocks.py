"""Blocks of gathered scores: safetensors reads them as we do, and no damage is taken for a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.numpy import load_file

from maehpc.report.blocks import read_block, write_block

ANY = hnp.arrays(
    st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
)


def same(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> bool:
    def known(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
        return {name: (values.dtype, values.shape, values.tobytes()) for name, values in arrays.items()}

    return known(ours) == known(theirs)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays=st.dictionaries(st.text("abc._", min_size=1, max_size=5), ANY, min_size=1, max_size=4), data=st.data())
def test_what_is_written_is_read(tmp_path: Path, arrays: dict[str, NDArray[Any]], data: st.DataObject) -> None:
    path = tmp_path / "block"
    turned = {name: np.asfortranarray(values) for name, values in arrays.items()}
    write_block(path, turned)
    assert same(read_block(path), arrays) and same(load_file(path), arrays)
    names = data.draw(st.lists(st.sampled_from(sorted(arrays)), unique=True))
    assert same(read_block(path, names), {name: arrays[name] for name in names})
    assert [one.name for one in tmp_path.iterdir()] == ["block"]


@pytest.fixture
def block(tmp_path: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
    arrays: dict[str, NDArray[Any]] = {
        "label": np.arange(6), "flipped": np.eye(6, 4, dtype=bool), "sensitivity": np.linspace(0, 1, 12, dtype="f4")
    }  # fmt: skip
    write_block(tmp_path / "block", arrays)
    return tmp_path / "block", arrays


def test_no_flipped_bit_changes_a_value(block: tuple[Path, dict[str, NDArray[Any]]]) -> None:
    path, arrays = block
    whole, seen = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert same(read_block(path), arrays), bit
        except ValueError:
            seen += 1
    assert seen > 0.95 * 8 * len(whole)


def test_no_cut_changes_a_value(block: tuple[Path, dict[str, NDArray[Any]]]) -> None:
    path, _ = block
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            read_block(path)


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"__metadata__": 3}', b'{"a": {}}', b"\xff", b"9" * 5000])
def test_a_header_of_something_else_is_damage(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "block").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError):
        read_block(tmp_path / "block", ["a"])


def test_an_array_that_is_not_there(block: tuple[Path, dict[str, NDArray[Any]]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent or damaged"):
        read_block(block[0], ["other"])
    with pytest.raises(ValueError, match="absent or damaged"):
        read_block(tmp_path / "no such block")


def test_ranges_that_no_file_has_are_damage(block: tuple[Path, dict[str, NDArray[Any]]]) -> None:
    path, _ = block
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for offsets in ([0, 1 << 62], [-5, 3], [8, 0], ["0", "48"], [0], None):
        header["label"]["data_offsets"] = offsets
        changed = json.dumps(header).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
        with pytest.raises(ValueError):
            read_block(path)
