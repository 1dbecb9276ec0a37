"""File systems of a few kilobytes, to be filled or made read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Mount = Callable[[str], Path]


@contextmanager
def small_disk(folder: Path) -> Iterator[Mount]:
    """Gives a function that mounts a file system in memory at `folder`, or changes its options when called again.

    The test is skipped where mounting is not permitted.
    """
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
