"""Files of tensors: the format against its library, and everything a wrong file can be."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from maehpc.errors import InputError, RunError
from maehpc.models import read_metadata, read_weights, save_weights
from maehpc.models.weights import DTYPES

STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "empty": torch.zeros(0, 4)}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=1),
)
def test_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str],
) -> None:
    """With at most one text of metadata, whose order the library cannot shuffle."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    stream = torch.Generator().manual_seed(0)
    state = {name: torch.randint(0, 2, shape, generator=stream).to(dtype) for name, (dtype, shape) in shapes.items()}
    save_weights(path, state, metadata)
    assert path.read_bytes() == safetensors.torch.save(state, metadata or None)
    back = read_weights(path)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)


def test_metadata_has_one_order(tmp_path: Path) -> None:
    texts = {f"key {index}": f"text {index} ä\n" for index in range(20)}
    save_weights(tmp_path / "a.safetensors", STATE, texts)
    save_weights(tmp_path / "b.safetensors", STATE, dict(reversed(texts.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert read_metadata(tmp_path / "a.safetensors") == texts
    assert read_metadata(tmp_path / "a.safetensors") == read_metadata(tmp_path / "b.safetensors")


def test_views_are_saved_as_seen(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    save_weights(tmp_path / "w.safetensors", {"transposed": whole.T, "row": whole[1], "same": whole[1]})
    back = read_weights(tmp_path / "w.safetensors")
    assert torch.equal(back["transposed"], whole.T)
    assert torch.equal(back["row"], whole[1])
    assert torch.equal(back["same"], whole[1])


def test_files_without_metadata_have_none(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", STATE)
    assert read_metadata(tmp_path / "w.safetensors") == {}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        path = disk / "w.safetensors"
        save_weights(path, STATE)
        before = path.read_bytes()
        with pytest.raises(RunError, match=r"w\.safetensors: the disk is full"):
            save_weights(path, {"large": torch.zeros(100_000)})
        assert path.read_bytes() == before
        assert [entry.name for entry in disk.iterdir()] == [path.name]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("key", ["model", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_checkpoints(tmp_path: Path, key: str | None, zipped: bool) -> None:
    path = tmp_path / "w.pth"
    checkpoint = dict(STATE) if key is None else {key: dict(STATE), "epoch": 3, "optimizer": {"step": torch.ones(1)}}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    back = read_weights(path)
    assert back.keys() == STATE.keys()
    assert all(torch.equal(back[name], STATE[name]) for name in STATE)


def test_a_namespace_inside_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1e-3, output_dir="./out", nested=[1, (2,)])}, path)
    assert read_weights(path).keys() == STATE.keys()


class Malicious:
    """Pickled as a call that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def write_zip(path: Path, evil: Malicious) -> None:
    torch.save({"model": STATE, "extra": evil}, path)


def write_legacy(path: Path, evil: Malicious) -> None:
    torch.save({"model": STATE, "extra": evil}, path, _use_new_zipfile_serialization=False)


def write_bare_pickle(path: Path, evil: Malicious) -> None:
    path.write_bytes(pickle.dumps(evil, protocol=2))


def write_inside_namespace(path: Path, evil: Malicious) -> None:
    torch.save({"model": STATE, "args": argparse.Namespace(hook=evil)}, path)


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_bare_pickle, write_inside_namespace])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, write: Callable[[Path, Malicious], None], suffix: str
) -> None:
    mark, path = tmp_path / "mark", tmp_path / f"w{suffix}"
    write(path, Malicious(mark))
    with pytest.raises(InputError) as caught:
        read_weights(path)
    assert not mark.exists()
    assert str(path) in str(caught.value)
    assert "system to be called" in str(caught.value)
    assert "\n" not in str(caught.value)
    with contextlib.suppress(Exception):  # a bare pickle is no checkpoint, which torch finds out too late
        torch.load(path, weights_only=False)
    assert mark.exists(), "the file would not have been malicious"


def valid(suffix: str) -> bytes:
    if suffix == ".safetensors":
        return safetensors.torch.save({"a": torch.zeros(300)})
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(300)}}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "text", "html", "half", "cut"])
def test_damaged_files_are_one_sentence(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"w{suffix}"
    whole = valid(suffix)
    path.write_bytes(
        {
            "empty": b"",
            "text": b"hello world",
            "html": b"<!DOCTYPE html><html>404</html>",
            "half": whole[: len(whole) // 2],
            "cut": whole[:-10],
        }[damage]
    )
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    for read in (read_weights, read_metadata):
        with pytest.raises(InputError, match=r"absent\.safetensors do not exist"):
            read(tmp_path / "absent.safetensors")
        with pytest.raises(InputError, match="do not exist"):
            read(tmp_path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"epoch": 3}}, [torch.zeros(2)], torch.zeros(2)])
def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth hold no tensors"):
        read_weights(tmp_path / "w.pth")


def test_header_is_readable_json(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", STATE, {"kind": "encoder"})
    data = (tmp_path / "w.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    assert json.loads(data[8 : 8 + size])["__metadata__"] == {"kind": "encoder"}
