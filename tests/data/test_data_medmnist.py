"""Official files, held to MedMNIST's own reader."""

from __future__ import annotations

from pathlib import Path

import medmnist
import numpy as np
import pytest

from maehpc.data import prepare
from maehpc.errors import InputError

FOUND = ("retinamnist", "breastmnist")


@pytest.mark.parametrize("name", FOUND)
def test_packs_equal_what_medmnist_reads(real_data: Path, monkeypatch, tmp_path: Path, name: str):
    monkeypatch.setenv("MAEHPC_DATA", str(real_data))
    reader = getattr(medmnist, medmnist.INFO[name]["python_class"])
    with prepare(name, 28, tmp_path) as pack:
        pack.verify()
        assert pack.path == tmp_path / f"{name}-28.h5"
        for split in ("train", "val", "test"):
            theirs = reader(split=split, root=str(real_data / "medmnist"))
            assert pack.info.counts[split] == len(theirs)
            images = theirs.imgs if theirs.imgs.ndim == 4 else theirs.imgs[..., None]
            np.testing.assert_array_equal(pack.images(split), images)
            np.testing.assert_array_equal(pack.labels(split), theirs.labels[:, 0])
        assert pack.info.task == medmnist.INFO[name]["task"]
        assert pack.info.fingerprint == "md5:" + medmnist.INFO[name]["MD5"]


def test_the_cache_is_searched_too_and_the_pack_then_serves_alone(real_data: Path, home: Path, tmp_path: Path):
    cache = home / ".medmnist"
    cache.mkdir()
    link = cache / "breastmnist.npz"
    link.symlink_to(real_data / "medmnist" / "breastmnist.npz")
    digest = prepare("breastmnist", 28, tmp_path).info.digest
    link.unlink()
    assert prepare("breastmnist", 28, tmp_path).info.digest == digest


def test_a_truncated_download_is_refused(real_data: Path, home: Path, tmp_path: Path):
    cache = home / ".medmnist"
    cache.mkdir()
    whole = (real_data / "medmnist" / "breastmnist.npz").read_bytes()
    (cache / "breastmnist.npz").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"breastmnist.npz is not MedMNIST's breastmnist.npz .*MD5.*cut off") as caught:
        prepare("breastmnist", 28, tmp_path / "packs")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "packs").exists()


def test_another_file_under_an_official_name_is_refused_but_serves_by_its_path(arrays, save_npz, monkeypatch, tmp_path):
    path = save_npz(arrays, "dermamnist.npz")
    monkeypatch.setenv("MAEHPC_DATA", str(tmp_path))
    with pytest.raises(InputError, match="is not MedMNIST's"):
        prepare("dermamnist", 28, tmp_path / "packs")
    assert prepare(str(path), 28, tmp_path / "packs").info.name == "dermamnist-own"


def test_a_folder_in_the_file_s_place_is_told(monkeypatch, tmp_path):
    (tmp_path / "dermamnist.npz").mkdir()
    monkeypatch.setenv("MAEHPC_DATA", str(tmp_path))
    with pytest.raises(InputError, match="is not a file"):
        prepare("dermamnist", 28, tmp_path / "packs")
