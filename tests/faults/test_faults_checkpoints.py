"""A checkpoint is interrupted, cut off or changed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_jobs import Study, same_result, until

from maehpc import files
from maehpc.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.slow


def test_kill_9_during_a_checkpoint(study: Callable[..., Study], undisturbed: Study) -> None:
    one = study()
    one.submit()
    one.reached()
    pid = one.rank_pid(0)
    checkpoints = one.folder / "checkpoints"
    deadline = time.monotonic() + 60
    while not any(files.is_partial(path) for path in checkpoints.iterdir()):
        assert time.monotonic() < deadline, one.told()
    os.kill(pid, signal.SIGKILL)
    until(lambda: one.job.newest_attempt() == 2, 60, one.told)
    one.completed()
    assert not any(files.is_partial(path) for path in checkpoints.iterdir()), "leftovers are tidied away"
    same_result(one, undisturbed)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_off, flip])
def test_the_newest_checkpoint_is_damaged(
    damage: Callable[[Path], None], study: Callable[..., Study], undisturbed: Study
) -> None:
    one = study()
    one.submit()
    one.reached()
    one.slurm("scontrol", "requeuehold", one.job_id)
    until(lambda: not one.at_work(), 60, one.told)
    newest = list_checkpoints(one.folder / "checkpoints")[-1]
    damage(newest / "model.safetensors")
    one.slurm("scontrol", "release", one.job_id)
    one.completed()
    assert f"{newest.name}" in one.log() and "going back to the checkpoint before it" in one.log()
    same_result(one, undisturbed)
