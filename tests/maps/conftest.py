from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import maps_writer
import pytest
from small_disks import Mount, small_disk


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    assert maps_writer.explain(root) == [0, 1, 2]
    return root


@pytest.fixture
def whole(_pristine: Path, tmp_path: Path) -> Path:
    """A folder with a complete store, to be damaged."""
    root = tmp_path / "whole"
    shutil.copytree(_pristine, root)
    return root


@pytest.fixture(scope="session")
def reference(_pristine: Path) -> dict[str, bytes]:
    """Every byte of the complete store."""
    return maps_writer.contents(_pristine / "maps")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    with small_disk(tmp_path / "disk") as mount:
        yield mount


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: for tests that write often, and in which no machine dies."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)
