from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from maehpc.data import prepare


def test_every_scan_is_there_once_with_its_label(tmp_path: Path):
    with prepare("digits", 28, tmp_path) as pack:
        pack.verify()
        assert pack.info.counts == {"train": 1197, "val": 200, "test": 400}
        assert pack.info.shape == (8, 8, 1)
        ours = [
            (image.tobytes(), int(label))
            for split in ("train", "val", "test")
            for image, label in zip(pack.images(split), pack.labels(split), strict=True)
        ]
    bunch = load_digits()
    theirs = [
        (np.array([[round(level * 255 / 16) for level in row] for row in image], dtype=np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images.tolist(), bunch.target, strict=True)
    ]
    assert sorted(ours) == sorted(theirs)


def test_splits_are_stratified_and_fixed(tmp_path: Path):
    with prepare("digits", 28, tmp_path) as pack:
        shares = np.bincount(load_digits().target) / 1797
        for split, count in pack.info.counts.items():
            numbers = np.bincount(pack.labels(split), minlength=10)
            assert np.abs(numbers - shares * count).max() < 1.5
        # The split is part of every published number on digits: it must not move.
        assert pack.info.digest == "c6302aa751fffe0f62d055fdd3534f9d0589d6718358b38ab65d5bd78d0a507e"


def test_a_limited_run_sees_every_digit(tmp_path: Path):
    with prepare("digits", 28, tmp_path) as pack:
        for split in pack.info.counts:
            assert np.bincount(pack.labels(split)[:40], minlength=10).min() >= 2
