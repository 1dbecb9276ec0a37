"""Job folders for tests: as `maehpc submit` writes them, without a scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_recipe

from maehpc.experiment import Experiment
from maehpc.launch.profile import load_profile
from maehpc.launch.record import Attempt, Heartbeat, JobFolder, JobRecord
from maehpc.launch.states import State
from maehpc.launch.status import Row


def job_record(root: Path, name: str = "tiny", stage: str = "pretrain", **changes: Any) -> JobRecord:
    facts: dict[str, Any] = {
        "stage": stage,
        "experiment": name,
        "results": str(root),
        "packs": str(root / "packs"),
        "recipe": tiny_recipe().model_dump(mode="json"),
        "profile": load_profile("mini").model_dump(mode="json"),
        "profile_name": "mini",
        "nodes": 2,
        "tasks_per_node": 1,
        "time_min": 10,
        "code": str(root / ".code" / "none"),
        "code_digest": "0" * 64,
        "command": ("submit", stage),
        **changes,
    }
    return JobRecord(**facts)


def new_job(root: Path, name: str = "tiny", stage: str = "pretrain", **changes: Any) -> JobFolder:
    job = JobFolder.create(Experiment(root / name), stage)
    job.write_record(job_record(root, name, stage, **changes))
    return job


def start(job: JobFolder, job_id: str = "7", restart: int = 0, done: int | None = None, phase: str = "pretrain") -> int:
    """One attempt, which got to `done` units."""
    number = job.begin_attempt(Attempt(job_id=job_id, restart=restart, hosts=("n1", "n2"), ranks=2, pid=1))
    if done is not None:
        job.beat(number, Heartbeat(sequence=done, phase=phase, dataset="digits", done=done, total=100, unit="step"))
    return number


def row(job: JobFolder, state: str, beat: Heartbeat | None = None) -> Row:
    """A job of Slurm's in its first attempt, as `maehpc status` knows it."""
    return Row(job, job.record(), "slurm", "1", State(state), attempt=1, heartbeat=beat)
