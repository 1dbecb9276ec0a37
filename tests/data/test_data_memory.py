"""Packing under a limit on memory that no whole split fits into."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maehpc.data import prepare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits a process by /proc")

MEBIBYTE = 1 << 20


def _limited(work: Callable[[], object], headroom: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + headroom, size + headroom))
    try:
        work()
    except MemoryError:
        sys.exit(3)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def limited(work: Callable[[], object], headroom: int) -> int:
    """Runs `work` in a process that may take `headroom` more bytes; 0: done, 3: a MemoryError came through."""
    child = multiprocessing.get_context("fork").Process(target=_limited, args=(work, headroom))
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def save(path: Path, train_images: np.ndarray, labels: np.dtype | type = np.uint8) -> Path:
    arrays = {"train_images": train_images, "train_labels": np.arange(len(train_images), dtype=labels) % 2}
    for split in ("val", "test"):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = train_images[:2], np.arange(2)
    np.savez_compressed(path, **arrays)
    return path


def test_a_split_larger_than_memory_is_packed(tmp_path: Path):
    path = save(tmp_path / "own.npz", np.zeros((1000, 256, 256, 3), dtype=np.uint8))
    assert limited(lambda: prepare(str(path), 28, tmp_path / "packs"), 100 * MEBIBYTE) == 0
    with prepare(str(path), 28, tmp_path / "packs") as pack:
        assert pack.info.counts["train"] * 256 * 256 * 3 > 180 * MEBIBYTE


def test_a_folder_larger_than_memory_is_packed(tmp_path: Path):
    for label in "ab":
        (tmp_path / "own" / label).mkdir(parents=True)
        for index in range(500):
            Image.new("RGB", (4, 4), (index % 256, 0, 0)).save(tmp_path / "own" / label / f"{index}.png")
    assert limited(lambda: prepare(str(tmp_path / "own"), 256, tmp_path / "packs"), 100 * MEBIBYTE) == 0
    with prepare(str(tmp_path / "own"), 256, tmp_path / "packs") as pack:
        assert pack.info.counts["train"] * 256 * 256 * 3 > 120 * MEBIBYTE


def test_a_lack_of_memory_is_not_told_as_a_damaged_file(tmp_path: Path):
    path = save(tmp_path / "own.npz", np.zeros((15_000_000, 1, 1), dtype=np.uint8), labels=np.int64)
    assert limited(lambda: prepare(str(path), 28, tmp_path / "packs"), 60 * MEBIBYTE) == 3
    assert not list((tmp_path / "packs").glob("*"))
