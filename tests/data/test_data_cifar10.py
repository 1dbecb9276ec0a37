"""Batches written as torchvision keeps them, and ones that mean harm."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from maehpc.data import catalogue, prepare
from maehpc.errors import InputError

FOLDER = "cifar-10-batches-py"


def write_batches(root: Path, count: int = 40, protocol: int = 2) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    (root / FOLDER).mkdir(parents=True)
    batches = {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        batch = {
            "batch_label": name,
            "labels": [int(label) for label in rng.permutation(np.arange(count) % 10)],
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "filenames": [f"{index}.png" for index in range(count)],
        }
        (root / FOLDER / name).write_bytes(pickle.dumps(batch, protocol=protocol))
        batches[name] = batch
    return batches


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAEHPC_DATA", str(tmp_path / "sources"))
    return tmp_path / "sources"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_splits(root: Path, tmp_path: Path, protocol: int):
    batches = write_batches(root, protocol=protocol)
    with prepare("cifar10", 28, tmp_path / "packs") as pack:
        assert pack.path.name == "cifar10-32.h5"
        assert pack.info.counts == {"train": 180, "val": 20, "test": 40}
        assert pack.info.classes == catalogue()["cifar10"].classes
        np.testing.assert_array_equal(np.bincount(pack.labels("val")), np.full(10, 2))
        test = batches["test_batch"]
        np.testing.assert_array_equal(pack.labels("test"), test["labels"])
        # The first image's second row, third column, blue: planes of 1024 in the file, channels last in the pack.
        assert pack.images("test")[0, 1, 2, 2] == test["data"][0, 2 * 1024 + 32 + 2]
        packed = [image.transpose(2, 0, 1).tobytes() for split in ("train", "val") for image in pack.images(split)]
    theirs = [row.tobytes() for name, batch in batches.items() if name != "test_batch" for row in batch["data"]]
    assert sorted(packed) == sorted(theirs)


def test_equal_to_torchvision_s_reader(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_batches(root)
    # Files made here have other checksums than the published ones; torchvision's reading itself is left as it is.
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    theirs = torchvision.datasets.CIFAR10(str(root), train=False)
    with prepare("cifar10", 28, tmp_path / "packs") as pack:
        np.testing.assert_array_equal(pack.images("test"), theirs.data)
        np.testing.assert_array_equal(pack.labels("test"), theirs.targets)


class Harm:
    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("place", ["data", "labels", "filenames"])
def test_a_malicious_batch_runs_nothing(root: Path, tmp_path: Path, place: str):
    batches = write_batches(root)
    flag = tmp_path / "harmed"
    batch = {**batches["data_batch_3"], place: Harm(flag)}
    (root / FOLDER / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(InputError, match=r"data_batch_3 is not a batch of CIFAR-10 \(it names \w+\.mkdir") as caught:
        prepare("cifar10", 28, tmp_path / "packs")
    assert "\n" not in str(caught.value)
    assert not flag.exists()
    pickle.loads((root / FOLDER / "data_batch_3").read_bytes())  # noqa: S301 - shows that the file would have done it
    assert flag.exists()


FAULTS = [
    ("data", lambda v: v.astype(np.float32), "'data' is not uint8"),
    ("data", lambda v: v[:, :3000], r"'data' is not uint8 \[n, 3072\]"),
    ("data", lambda v: v.tolist(), "'data' is not uint8"),
    ("labels", lambda v: v[:-1], "one number an image"),
    ("labels", lambda v: [10, *v[1:]], "0 to 9"),
    ("labels", lambda v: ["1", *v[1:]], "0 to 9"),
    ("labels", lambda v: None, "no 'data' and 'labels'"),
]


@pytest.mark.parametrize(("field", "change", "sentence"), FAULTS)
def test_wrong_batches_are_told(root: Path, tmp_path: Path, field, change, sentence):
    batch = write_batches(root)["test_batch"]
    changed = change(batch.pop(field))
    if changed is not None:
        batch[field] = changed
    (root / FOLDER / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(InputError, match=sentence) as caught:
        prepare("cifar10", 28, tmp_path / "packs")
    assert "test_batch" in str(caught.value)


def test_cut_off_and_absent_batches_are_told(root: Path, tmp_path: Path):
    write_batches(root)
    path = root / FOLDER / "data_batch_5"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="data_batch_5 is not a batch"):
        prepare("cifar10", 28, tmp_path / "packs")
    path.unlink()
    with pytest.raises(InputError, match="data_batch_5 does not exist"):
        prepare("cifar10", 28, tmp_path / "packs")
