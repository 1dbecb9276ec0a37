from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import maps_writer
import pytest


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
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory; call it with mount options, again to change them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        command = ["mount", "-t", "tmpfs", "-o", options, "maehpc-test", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"mounting is not permitted here: {error}")
        mounted = True
        return folder

    try:
        yield mount
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
