from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maehpc.data import prepare
from maehpc.errors import InputError


def test_round_trip(arrays, save_npz, tmp_path: Path):
    with prepare(str(save_npz(arrays)), 28, tmp_path / "packs") as pack:
        assert pack.info.name == "own"
        assert pack.info.task == "multi-class"
        assert pack.info.classes == ("0", "1", "2")
        assert pack.info.shape == (6, 5, 3)
        assert pack.info.counts == {"train": 30, "val": 6, "test": 9}
        for split in ("train", "val", "test"):
            np.testing.assert_array_equal(pack.images(split), arrays[f"{split}_images"])
            np.testing.assert_array_equal(pack.labels(split), arrays[f"{split}_labels"][:, 0])
            assert pack.labels(split).dtype == np.int64


def test_grey_images_get_a_channel_and_two_classes_are_binary(arrays, save_npz, tmp_path: Path):
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = arrays[f"{split}_images"][..., 0]
        arrays[f"{split}_labels"] = arrays[f"{split}_labels"][:, 0] % 2
    with prepare(str(save_npz(arrays)), 28, tmp_path) as pack:
        assert pack.info.shape == (6, 5, 1)
        assert pack.info.task == "binary-class"
        np.testing.assert_array_equal(pack.images("val")[..., 0], arrays["val_images"])


def test_several_columns_are_a_multi_label_task(arrays, save_npz, tmp_path: Path):
    rng = np.random.default_rng(1)
    for split in ("train", "val", "test"):
        arrays[f"{split}_labels"] = rng.integers(0, 2, (len(arrays[f"{split}_labels"]), 4))
    with prepare(str(save_npz(arrays)), 28, tmp_path) as pack:
        assert pack.info.task == "multi-label"
        assert len(pack.info.classes) == 4
        np.testing.assert_array_equal(pack.labels("test"), arrays["test_labels"])


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def objects() -> np.ndarray[Any, Any]:
    return np.array([Bomb()] * 30, dtype=object)


FAULTS = [
    ("val_images", lambda a: None, "has no array val_images"),
    ("test_labels", lambda a: None, "has no array test_labels"),
    ("train_images", lambda a: a.astype(np.float32) / 255, "train_images is float32; save the images as uint8"),
    ("train_images", lambda a: a[..., :2], r"train_images has shape \(30, 6, 5, 2\)"),
    ("train_images", lambda a: a[0, 0], r"train_images has shape \(5, 3\)"),
    ("val_images", lambda a: a[:0], r"val_images has shape \(0, 6, 5, 3\)"),
    ("val_images", lambda a: a[:, :4], "val images are .* those of train"),
    ("val_images", lambda a: a[:5], "val has 5 images but 6 labels"),
    ("train_images", lambda a: objects(), "train_images holds Python objects"),
    ("train_labels", lambda a: objects(), "train_labels holds Python objects"),
    ("train_labels", lambda a: a.astype(np.float64), "train_labels is float64; save the labels as integers"),
    ("val_labels", lambda a: a.astype(np.int8) - 1, "val_labels holds label -1; classes go from 0"),
    (
        "val_labels",
        lambda a: a.astype(np.int64) * 10**9,
        "val_labels holds label 2000000000; classes go from 0 to 9999",
    ),
    ("test_labels", lambda a: np.repeat(a, 2, axis=1), "test_labels holds label 2; multi-label columns hold 0 or 1"),
    ("test_labels", lambda a: np.repeat(a, 2, axis=1) % 2, "test_labels and train_labels differ in columns"),
    ("train_labels", lambda a: a[None], r"train_labels has shape \(1, 30, 1\)"),
]


@pytest.mark.parametrize(("array", "change", "sentence"), FAULTS, ids=[f"{a}-{s[:30]}" for a, _, s in FAULTS])
def test_wrong_arrays_are_told_in_one_sentence(arrays, save_npz, tmp_path: Path, array, change, sentence):
    changed = change(arrays.pop(array))
    if changed is not None:
        arrays[array] = changed
    path = save_npz(arrays)
    with pytest.raises(InputError, match=sentence) as caught:
        prepare(str(path), 28, tmp_path / "packs")
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "packs").glob("**/*")) == []


def test_one_class_is_no_task(arrays, save_npz, tmp_path: Path):
    for split in ("train", "val", "test"):
        arrays[f"{split}_labels"][:] = 0
    with pytest.raises(InputError, match="at least two classes"):
        prepare(str(save_npz(arrays)), 28, tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_file_that_was_cut_off_is_told(arrays, save_npz, tmp_path: Path, part: float):
    path = save_npz(arrays)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(InputError, match=r"own.npz is not a whole .npz file"):
        prepare(str(path), 28, tmp_path / "packs")


def test_flipped_bytes_are_told_or_harmless(arrays, save_npz, tmp_path: Path):
    path = save_npz(arrays)
    data = path.read_bytes()
    digest = prepare(str(path), 28, tmp_path / "whole").info.digest
    told = 0
    for number, offset in enumerate(range(0, len(data), 23)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :])
        try:
            pack = prepare(str(path), 28, tmp_path / f"packs-{number}")
        except InputError as error:
            assert "own.npz" in str(error)
            told += 1
        else:
            assert pack.info.digest == digest
    assert told > len(data) / 23 / 2


@pytest.mark.parametrize("content", [b"", b"PK", b"not an archive at all", b"\x80\x04\x95junk"])
def test_another_kind_of_file_is_told(tmp_path: Path, content: bytes):
    path = tmp_path / "own.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"own.npz is not a whole .npz file"):
        prepare(str(path), 28, tmp_path)


def test_a_bare_array_and_an_absent_file_are_told(tmp_path: Path):
    path = tmp_path / "own.npz"
    with path.open("wb") as handle:
        np.save(handle, np.zeros(3))
    with pytest.raises(InputError, match="holds one bare array"):
        prepare(str(path), 28, tmp_path)
    with pytest.raises(InputError, match=r"gone.npz does not exist"):
        prepare(str(tmp_path / "gone.npz"), 28, tmp_path)


def test_arrays_in_fortran_order(arrays, save_npz, tmp_path: Path):
    with prepare(str(save_npz(arrays)), 28, tmp_path / "c") as pack:
        digest = pack.info.digest
    turned = {name: np.asfortranarray(array) for name, array in arrays.items()}
    assert np.isfortran(turned["train_images"])
    with prepare(str(save_npz(turned)), 28, tmp_path / "fortran") as pack:
        assert pack.info.digest == digest


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy(arrays, tmp_path: Path, version: tuple[int, int]):
    path = tmp_path / "own.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, version=version)
    with prepare(str(path), 28, tmp_path / "packs") as pack:
        np.testing.assert_array_equal(pack.images("train"), arrays["train_images"])


@pytest.mark.parametrize("array", ["train_images", "train_labels"])
def test_a_header_that_claims_more_than_there_is_asks_for_no_memory(arrays, tmp_path: Path, array: str):
    path = tmp_path / "own.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, values)
            data = buffer.getvalue()
            if name == array:
                data = data.replace(b"(30,", b"(30000000000000,").replace(b" " * 12 + b"\n", b"\n")
            archive.writestr(f"{name}.npy", data)
    with pytest.raises(InputError, match=rf"own.npz: {array} cannot be read \(its header does not fit its size\)"):
        prepare(str(path), 28, tmp_path / "packs")
