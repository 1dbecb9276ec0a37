from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maehpc.data import prepare
from maehpc.errors import InputError

RNG = np.random.default_rng(0)


def save(path: Path, shape: tuple[int, ...] = (20, 30, 3), value: int | None = None) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_presplit_folder(tmp_path: Path):
    root = tmp_path / "Skin"
    wide = save(root / "test" / "benign" / "b.png", (28, 40, 3))
    save(root / "test" / "malignant" / "a.JPG")
    save(root / "train" / "benign" / "deep" / "a.png")
    save(root / "train" / "malignant" / "a.bmp")
    save(root / "val" / "malignant" / "a.jpeg")
    (root / "train" / "notes.txt").write_text("not an image")
    with prepare(str(root), 28, tmp_path / "packs") as pack:
        assert pack.path.name == "skin-28.h5"
        assert pack.info.title == "Skin"
        assert pack.info.classes == ("benign", "malignant")
        assert pack.info.task == "binary-class"
        assert pack.info.counts == {"train": 2, "val": 1, "test": 2}
        np.testing.assert_array_equal(pack.labels("test"), [0, 1])
        np.testing.assert_array_equal(pack.labels("val"), [1])
        # 28 rows need no resizing: the centre 28 of 40 columns come as they are.
        np.testing.assert_array_equal(pack.images("test")[0], wide[:, 6:34])


def test_a_folder_of_classes_is_split_by_class(tmp_path: Path):
    for label, count in (("a", 100), ("b", 30)):
        for index in range(count):
            save(tmp_path / "own" / label / f"{index:03d}.png", (4, 4), index)
    with prepare(str(tmp_path / "own"), 28, tmp_path / "packs") as pack:
        assert pack.info.shape == (28, 28, 1)
        assert pack.info.counts == {"train": 91, "val": 13, "test": 26}
        np.testing.assert_array_equal(np.bincount(pack.labels("train")), [70, 21])
        np.testing.assert_array_equal(np.bincount(pack.labels("val")), [10, 3])
        np.testing.assert_array_equal(np.bincount(pack.labels("test")), [20, 6])
        seen = [
            (int(label), int(image[0, 0, 0]))
            for split in ("train", "val", "test")
            for image, label in zip(pack.images(split), pack.labels(split), strict=True)
        ]
        assert sorted(seen) == [(0, index) for index in range(100)] + [(1, index) for index in range(30)]
        assert sorted(pack.images("test")[:, 0, 0, 0]) != list(range(20)) + list(range(6)), "a shuffle, not the first"
    again = prepare(str(tmp_path / "own"), 28, tmp_path / "packs-2")
    assert again.info.digest == pack.info.digest


@pytest.mark.parametrize("presplit", [False, True])
def test_every_beginning_of_a_split_mixes_the_classes(tmp_path: Path, presplit: bool):
    """A run limited to the first images of a split must not see the first classes alone."""
    counts = {"a": 60, "b": 30, "c": 30}
    for top in ("train", "val", "test") if presplit else (".",):
        for label, count in counts.items():
            for index in range(count):
                save(tmp_path / "own" / top / label / f"{index:02d}.png", (4, 4), index)
    with prepare(str(tmp_path / "own"), 4, tmp_path / "packs") as pack:
        assert "order that mixes the classes" in pack.info.source
        for split, count in pack.info.counts.items():
            labels = pack.labels(split)
            for first in range(4, count + 1, 4):
                numbers = np.bincount(labels[:first], minlength=3)
                assert np.abs(numbers - first * np.array([0.5, 0.25, 0.25])).max() <= 2
            for label in range(3):
                values = pack.images(split)[labels == label, 0, 0, 0]
                assert len(values) < 6 or list(values) != sorted(values), "a shuffle within each class too"
    again = prepare(str(tmp_path / "own"), 4, tmp_path / "packs-2")
    assert again.info == pack.info


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int):
    upright = RNG.integers(0, 256, (12, 12), dtype=np.uint8)
    # How a camera held so stores the scene (EXIF 2.32, tag 274), the inverse of what a viewer does.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    for split in ("train", "val", "test"):
        for label in "ab":
            save(tmp_path / "own" / split / label / "x.png", (12, 12))
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "own" / "train" / "a" / "x.png", exif=exif)
    with prepare(str(tmp_path / "own"), 12, tmp_path / "packs") as pack:
        image = pack.images("train")[list(pack.labels("train")).index(0), :, :, 0]
    np.testing.assert_array_equal(image, upright)


def test_kinds_of_images(tmp_path: Path):
    root = tmp_path / "kinds"
    for split in ("train", "val", "test"):
        for label in "ab":
            save(root / split / label / "x.png", (28, 28))
    deep = RNG.integers(0, 65536, (28, 28)).astype(np.uint16)
    Image.fromarray(deep).save(root / "test" / "a" / "deep.png")
    with prepare(str(root), 28, tmp_path / "grey") as pack:
        assert pack.info.shape == (28, 28, 1)
        np.testing.assert_array_equal(pack.images("test")[0, :, :, 0], np.rint(deep / 65535 * 255))
    colour = RNG.integers(0, 256, (28, 28, 4), dtype=np.uint8)
    Image.fromarray(colour).save(root / "test" / "a" / "alpha.png")
    with prepare(str(root), 28, tmp_path / "colour") as pack:
        assert pack.info.shape == (28, 28, 3)
        np.testing.assert_array_equal(pack.images("test")[0], colour[..., :3])


def test_source_size_gives_a_pack_each(tmp_path: Path):
    for label in "ab":
        for index in range(10):
            save(tmp_path / "own" / label / f"{index}.png")
    assert prepare(str(tmp_path / "own"), 28, tmp_path / "packs").info.shape == (28, 28, 3)
    assert prepare(str(tmp_path / "own"), 64, tmp_path / "packs").info.shape == (64, 64, 3)
    assert sorted(path.name for path in (tmp_path / "packs").iterdir()) == ["own-28.h5", "own-64.h5"]


def test_faults_are_told(tmp_path: Path):
    def refused(sentence: str) -> None:
        with pytest.raises(InputError, match=sentence) as caught:
            prepare(str(tmp_path / "own"), 28, tmp_path / "packs")
        assert str(tmp_path / "own") in str(caught.value)
        assert "\n" not in str(caught.value)

    root = tmp_path / "own"
    refused("does not exist")
    save(root / "only" / "a.png")
    refused("fewer than two classes")
    save(root / "other" / "a.png")
    refused("leaves no image for the")
    save(root / "train" / "a" / "a.png")
    refused("has a folder train but none val")
    save(root / "val" / "b" / "a.png")
    save(root / "test" / "a" / "a.png")
    (root / "test" / "a" / "b.png").write_bytes(b"no image")
    refused("test/a/b.png is not a readable image")
    save(root / "test" / "a" / "b.png")
    whole = (root / "test" / "a" / "b.png").read_bytes()
    (root / "test" / "a" / "b.png").write_bytes(whole[: len(whole) // 2])
    refused("test/a/b.png is a damaged image")
    assert not list((tmp_path / "packs").glob("**/*"))


def test_a_changed_image_makes_a_new_pack(tmp_path: Path):
    for label in "ab":
        for index in range(10):
            save(tmp_path / "own" / label / f"{index}.png", value=10)
    first = prepare(str(tmp_path / "own"), 28, tmp_path / "packs")
    assert prepare(str(tmp_path / "own"), 28, tmp_path / "packs").info == first.info
    save(tmp_path / "own" / "a" / "3.png", value=200)
    second = prepare(str(tmp_path / "own"), 28, tmp_path / "packs")
    assert second.info.digest != first.info.digest
