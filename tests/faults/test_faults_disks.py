"""The results folder is full, or cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cluster_jobs import Study, same_result, until
from mini_cluster import Disk, small_disk

from maehpc.training.checkpoints import list_checkpoints, read_checkpoint

pytestmark = pytest.mark.slow


def test_the_results_folder_is_full(study: Callable[..., Study], undisturbed: Study, mini: Any) -> None:
    with small_disk(mini, "full", 24 << 20) as disk:
        one = study(results=disk.path / "results")
        one.submit()
        one.reached()
        fill(disk.path)
        one.ended("FAILED", seconds=120)
        assert one.job.newest_attempt() == 1, "there is no point in starting again on a full disk"
        status = one.maehpc("status", str(one.results), "--all", "--json")
        assert json.loads(status.stdout)["jobs"][0]["state"] == "failed"
        checkpoints = list_checkpoints(one.folder / "checkpoints")
        assert checkpoints, "what was saved before is still there"
        for checkpoint in checkpoints:
            read_checkpoint(checkpoint)
        (disk.path / "ballast").unlink()
        one.maehpc("resume", one.name, "--results", str(one.results))
        one.completed()
        same_result(one, undisturbed)


def fill(folder: Path) -> None:
    """Takes the last byte of the disk."""
    handle = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT)
    try:
        with suppress(OSError):
            while True:
                os.write(handle, b"\0" * 4096)
    finally:
        os.close(handle)


def sealed(disk: Disk) -> bool:
    """Makes the disk read-only, unless somebody still writes to it."""
    try:
        disk.remount("ro")
    except subprocess.CalledProcessError:
        return False
    return True


def test_the_results_folder_becomes_read_only(study: Callable[..., Study], undisturbed: Study, mini: Any) -> None:
    with small_disk(mini, "readonly", 64 << 20) as disk:
        one = study(results=disk.path / "results")
        one.submit()
        one.reached()
        one.slurm("scontrol", "requeuehold", one.job_id)
        # A disk that is being written to cannot be remounted, so it happens between two attempts.
        until(lambda: not one.at_work() and sealed(disk), 60, one.told)
        one.slurm("scontrol", "release", one.job_id)
        until(lambda: one.state() == "FAILED", 120, one.told)
        disk.remount("rw")
        one.maehpc("resume", one.name, "--results", str(one.results))
        one.completed()
        same_result(one, undisturbed)


def test_nothing_is_submitted_from_a_read_only_folder(study: Callable[..., Study], mini: Any) -> None:
    with small_disk(mini, "sealed", 8 << 20) as disk:
        one = study(results=disk.path / "results")
        one.results.mkdir()
        disk.remount("ro")
        before = one.slurm("squeue", "--noheader")
        words = ("submit", "pretrain", "--quiet", "--cluster", "mini", "--name", "x", "--results", str(one.results))
        done = one.maehpc(*words, check=False)
        assert done.returncode in (1, 2) and "read-only" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert one.slurm("squeue", "--noheader") == before
        disk.remount("rw")
