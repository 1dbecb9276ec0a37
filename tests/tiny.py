"""A study small enough for a test: digits at 8 pixels, a ViT of two blocks; and processes that are killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from maehpc.experiment import Experiment
from maehpc.progress import Silent
from maehpc.recipes import Recipe, load_recipe
from maehpc.stages.context import Context

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
