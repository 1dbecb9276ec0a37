"""The four-host Slurm of cluster/mini for tests: fixtures, and disks that fill.

`mini` is up for the whole session; `on_mini` also points Slurm's commands at it during one test; `breakable_mini` is
for tests that hurt hosts or the network, and is mended after each.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import maehpc

__all__ = [
    "COMMAND",
    "SPARE",
    "Disk",
    "Mini",
    "MiniError",
    "RefusedError",
    "Settings",
    "UnfitError",
    "breakable_mini",
    "mini",
    "on_mini",
    "running",
    "small_disk",
]

COMMAND = Path(maehpc.__file__).parents[1] / "cluster" / "mini" / "mini.py"
if str(COMMAND.parent) not in sys.path:
    sys.path.append(str(COMMAND.parent))

if TYPE_CHECKING:
    from mini import Mini
    from mini_settings import MiniError, RefusedError, Settings, UnfitError
else:
    Mini = importlib.import_module("mini").Mini
    _settings = importlib.import_module("mini_settings")
    MiniError, RefusedError, UnfitError = _settings.MiniError, _settings.RefusedError, _settings.UnfitError
    Settings = _settings.Settings

SPARE = Settings(
    state=Path("/tmp/maehpc-mini-spare"), bridge="maehpc-b1", network="10.78.0", letter="m", port=6917, count=4
)
"""A second cluster that stands beside the first: for tests that start and stop one."""


@contextmanager
def running(mini: Mini, accounting: bool = False) -> Iterator[Mini]:
    """Starts a cluster unless it is up, and stops it at the end if it was started here.

    The test is skipped where this machine cannot have one.
    """
    try:
        made = mini.start(accounting=accounting)
    except UnfitError as error:
        pytest.skip(f"no mini cluster here: {error}")
    try:
        yield mini
    finally:
        if made:
            mini.stop()


@pytest.fixture(scope="session")
def mini() -> Iterator[Mini]:
    """The cluster, up; one that was up before the tests stays so."""
    with running(Mini()) as up:
        yield up


@pytest.fixture
def on_mini(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> Mini:
    """The cluster, and in this test's environment the variables that point Slurm's commands at it."""
    for name, value in mini.environment.items():
        monkeypatch.setenv(name, value)
    return mini


@pytest.fixture
def breakable_mini(on_mini: Mini) -> Iterator[Mini]:
    """The cluster for a test that hurts it: hosts, daemons and network are whole again afterwards."""
    try:
        yield on_mini
    finally:
        on_mini.start()


@dataclass(frozen=True)
class Disk:
    """A file system of its own that all hosts and this side see in one place."""

    path: Path

    def remount(self, options: str) -> None:
        """Changes it while it is in use: "ro", "rw", "size=8m"."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@contextmanager
def small_disk(mini: Mini, name: str, size_bytes: int) -> Iterator[Disk]:
    """A disk of a few pages in the cluster's shared folder, gone at the end even where a job still uses it."""
    path = mini.shared / name
    path.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "maehpc-test", str(path)], check=True)
        try:
            yield Disk(path)
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
    finally:
        path.rmdir()
