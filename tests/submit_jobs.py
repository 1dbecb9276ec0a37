"""Requests for tests, as `maehpc submit` makes them; a folder on the real cluster; an sbatch that can be disturbed."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import tiny_recipe

from maehpc.experiment import Experiment
from maehpc.launch import slurm
from maehpc.launch.plan import Member, Request
from maehpc.launch.profile import load_profile, parse_profile
from maehpc.launch.record import JobFolder
from maehpc.launch.slurm_formats import SlurmJob

HELD = {"sbatch": {"hold": True}, "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1}
"""A job that Slurm takes and never starts: nothing computes while its submission is looked at."""


def request(results: Path, stage: str = "pretrain", names: tuple[str, ...] = ("study",), **changes: Any) -> Request:
    """What `maehpc submit STAGE --name NAME` asks for; several names are a sweep over the seed."""
    overrides = changes.pop("overrides", ())
    profile = parse_profile(load_profile("mini").model_dump(mode="json") | HELD | changes.pop("profile", {}))
    seeds = [[f"seed={number}"] if len(names) > 1 else [] for number in range(len(names))]
    members = [
        Member(Experiment(results / name), tiny_recipe(*overrides, *seed))
        for name, seed in zip(names, seeds, strict=True)
    ]
    facts: dict[str, Any] = {
        "stage": stage,
        "members": tuple(members),
        "profile": profile,
        "profile_name": "mini",
        "results": results,
        "packs": results / "packs",
        "command": ("submit", stage),
        "directory": results.parent,
        **changes,
    }
    return Request(**facts)


@contextmanager
def place(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that all hosts see, and Slurm's commands; its jobs are ended afterwards."""
    for name, value in mini.environment.items():
        monkeypatch.setenv(name, value)
    folder = Path(mini.shared) / f"submit-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    path = os.environ["PATH"]
    try:
        yield folder
    finally:
        with pytest.MonkeyPatch.context() as patch:  # whatever the test had done to the environment
            for name, value in {**mini.environment, "PATH": path}.items():
                patch.setenv(name, value)
            slurm.cancel([job.job_id for job in queued(folder)])
        shutil.rmtree(folder, ignore_errors=True)


def jobs_in(folder: Path) -> list[JobFolder]:
    """Every job below a folder, whatever has become of it; what is renamed meanwhile is passed over."""
    return [JobFolder(Path(root)) for root in sorted(root for root, _, names in os.walk(folder) if "job.json" in names)]


def comments(folder: Path) -> set[str]:
    return {one.intent.comment for job in jobs_in(folder) for one in job.submissions()}


def queued(folder: Path) -> list[SlurmJob]:
    """What Slurm has of a folder's jobs, found by the folder's name in the jobs' own."""
    known = comments(folder)
    return [job for job in slurm.queue() if job.comment in known]


def everything(folder: Path) -> dict[str, bytes | None]:
    """All that lies below a folder, with contents."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


class Sbatch:
    """An `sbatch` before the real one on the PATH that runs a line of shell around it.

    `real "$@"` is the real one; every call is noted.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = shutil.which("sbatch")
        assert real is not None
        self.folder = folder
        self.calls = folder / "calls"
        self.took = folder / "took"
        self._script = folder / "sbatch"
        self._head = (
            f'#!/bin/bash\nreal() {{ {real} "$@"; }}\necho call >> {self.calls}\ncalls=$(wc -l < {self.calls})\n'
        )
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        self.does('real "$@"')

    def does(self, line: str) -> None:
        self._script.write_text(f"{self._head}{line}\n")
        self._script.chmod(0o755)

    def called(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


def until(true: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def kill_with_ranks(pid: int) -> None:
    """Ends a local job's controller and all below it; they may be ending by themselves just now."""
    with suppress(psutil.NoSuchProcess):
        controller = psutil.Process(pid)
        for process in [controller, *controller.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def dependency(job_id: str) -> str:
    """What Slurm says a job waits for."""
    shown = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=True).stdout
    return shown.split("Dependency=")[1].split()[0]
