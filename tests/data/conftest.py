"""Data tests see no user's files: an empty home and no MAEHPC_DATA unless a test sets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("MAEHPC_DATA", raising=False)
    return folder


Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def arrays() -> Arrays:
    """Three classes, 6 x 5 pixels, RGB, in MedMNIST's layout."""
    rng = np.random.default_rng(0)
    result: Arrays = {}
    for split, count in (("train", 30), ("val", 6), ("test", 9)):
        result[f"{split}_images"] = rng.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
        result[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 3)[:, None]
    return result


@pytest.fixture
def save_npz(tmp_path: Path) -> Callable[[Arrays], Path]:
    def save(arrays: Arrays, name: str = "own.npz") -> Path:
        path = tmp_path / name
        np.savez_compressed(path, **arrays)
        return path

    return save
