"""A study small enough for a test: digits at 8 pixels, a ViT of two blocks; and processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maehpc import files
from maehpc.experiment import Experiment
from maehpc.progress import Silent
from maehpc.recipes import Recipe, load_recipe
from maehpc.stages.context import Context
from maehpc.training.checkpoints import list_checkpoints, step_of
from maehpc.training.distributed import World, join

SETTINGS = {
    "datasets": ("digits",),
    "data": {"image_size": 8, "normalization": "dataset"},
    "encoder": {"name": "vit-tiny", "patch_size": 2, "width": 16, "depth": 2, "heads": 2},
    "pretrain": {
        "decoder": {"width": 16, "depth": 1, "heads": 2},
        "optim": {"base_lr": 1.5e-2, "warmup_epochs": 1},
        "epochs": 3,
        "batch_size": 32,
        "images": 200,
        "reconstructions": 3,
        "checkpoint": {"every_steps": 4},
    },
    "finetune": {"optim": {"lr": 0.002}, "epochs": 3, "images": 100, "checkpoint": {"every_steps": 2}},
    "explain": {
        "images": 20,
        "sensitivity": {"samples": 2},
        "batch_size": 4,
        "maps": {"shard_images": 8},
    },
}


def tiny_recipe(*overrides: str) -> Recipe:
    return load_recipe(None, overrides, settings=SETTINGS)


def tiny_context(root: Path, *overrides: str, name: str = "tiny") -> Context:
    """Results, packs and all below `root`."""
    return Context(Experiment(root / name), tiny_recipe(*overrides), torch.device("cpu"), root / "packs", Silent())


def in_child(work: Callable[[], object]) -> int:
    """Starts `work` in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def killed_when(work: Callable[[], object], due: Callable[[], bool], limit: float = 120.0) -> bool:
    """Runs `work` in a process and kills it (SIGKILL) as soon as `due`; False where it ended well before that."""
    pid = in_child(work)
    deadline = time.monotonic() + limit
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                pid = 0
                assert os.waitstatus_to_exitcode(status) == 0, "the work failed before it was killed"
                return False
            if due():
                return True
            time.sleep(0.001)
        raise AssertionError(f"neither ended nor killed within {limit} s")
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def killed_after(work: Callable[[], object], seconds: float) -> bool:
    """Runs `work` in a process and kills it after so many seconds; False where it ended well before that."""
    until = time.monotonic() + seconds
    return killed_when(work, lambda: time.monotonic() >= until, limit=seconds + 60)


def killed_at_shares(
    killed: Callable[[float], bool], shares: Iterable[float], seconds: float, begin_anew: Callable[[], object]
) -> int:
    """Runs attempts that are killed at shares of the time that a whole run took, and counts those that were.

    Args:
        killed: an attempt that is killed after so many seconds; False where it ended before.
        shares: of the time, one an attempt.
        seconds: that a whole run took.
        begin_anew: deletes what attempts left, as a run may take less time than was measured.
    """
    kills = 0
    for share in shares:
        kills += killed(share * seconds)
        if not kills:
            begin_anew()
            seconds /= 2
    return kills


def reached(checkpoints: Path, step: int) -> Callable[[], bool]:
    """Whether there is a checkpoint of a step or of a later one: each is there for a while alone."""
    return lambda: any(step_of(path) >= step for path in list_checkpoints(checkpoints))


class FileMeeting:
    """Ranks find each other through a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def publish(self, facts: dict[str, Any]) -> None:
        files.write_json(self._path, facts)

    def find(self) -> dict[str, Any] | None:
        return json.loads(self._path.read_bytes()) if self._path.exists() else None


_MEETINGS = tempfile.TemporaryDirectory(prefix="meetings-")  # removed when pytest ends


def begun_world(size: int, work: Callable[[World], object], timeout_s: float = 60.0) -> list[int]:
    """Starts `work` in a process a rank, which meet over gloo; returns their ids."""
    meeting = FileMeeting(Path(tempfile.mkdtemp(dir=_MEETINGS.name)) / "meeting.json")

    def rank_work(rank: int) -> None:
        with join(World(rank, size, rank), torch.device("cpu"), meeting, timeout_s, meet_s=60.0) as world:
            work(world)

    return [in_child(partial(rank_work, rank)) for rank in range(size)]


def wait_for(pids: list[int], due: Callable[[], bool] = lambda: False, limit: float = 120.0) -> list[int | None]:
    """Waits until all processes have ended, or it is `due`; then kills the rest (SIGKILL).

    Returns:
        Their exit codes (a signal's number negated); None for those that were killed here.
    """
    deadline = time.monotonic() + limit
    codes: dict[int, int | None] = {}
    try:
        while len(codes) < len(pids) and not due():
            assert time.monotonic() < deadline, f"{len(pids) - len(codes)} of {len(pids)} processes hang"
            for pid in pids:
                if pid not in codes:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
    finally:
        for pid in pids:
            if pid not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def in_world(size: int, work: Callable[[World], object], limit: float = 120.0) -> None:
    """Runs `work` in that many ranks, all of which must end well."""
    codes = wait_for(begun_world(size, work), limit=limit)
    assert codes == [0] * size, f"exit codes of the ranks: {codes}"


def world_killed_when(size: int, work: Callable[[World], object], due: Callable[[], bool]) -> bool:
    """Runs `work` in that many ranks and kills all of them as soon as it is `due`; False where they ended before."""
    codes = wait_for(begun_world(size, work), due)
    assert all(code in (0, None) for code in codes), f"exit codes of the ranks: {codes}"
    return None in codes
