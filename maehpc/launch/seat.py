"""Which rank of which start of which job this process is, from what the launcher left in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maehpc.errors import InputError
from maehpc.launch.record import JobFolder
from maehpc.launch.slurm_formats import expand_nodes


@dataclass(frozen=True)
class Seat:
    """A rank's place.

    Attributes:
        scheduler: who started it.
        job_id: the scheduler's, `12_3` for a member of an array.
        restart: how many times the scheduler had restarted the job; 0 where it doesn't count.
        rank: 0 to size - 1.
        size: ranks of the job.
        local_rank: among the ranks of this host.
        local_size: ranks of this host.
        hosts: names, rank 0's first.
        member: index in an array.
        cpus: CPU threads meant for this rank, None where nobody says.
    """

    scheduler: Literal["slurm", "local"]
    job_id: str
    restart: int
    rank: int
    size: int
    local_rank: int
    local_size: int
    hosts: tuple[str, ...]
    member: int | None
    cpus: int | None


def slurm_job_id(environment: Mapping[str, str]) -> str | None:
    """The job's id as `scontrol` takes it, `12_3` for a member of an array; None outside Slurm."""
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def array_member(environment: Mapping[str, str]) -> int | None:
    """The place in an array that Slurm gave this job."""
    text = environment.get("SLURM_ARRAY_TASK_ID")
    return int(text) if text else None


def restarts(environment: Mapping[str, str]) -> int:
    """How many times Slurm had restarted this job."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def find_seat(environment: Mapping[str, str]) -> Seat:
    """Reads Slurm's variables, or those of submitit's local executor.

    Raises:
        InputError: neither started this process.
    """
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        size = int(environment["SUBMITIT_LOCAL_NTASKS"])
        rank = int(environment["SUBMITIT_LOCAL_GLOBALID"])
        local_id = environment["SUBMITIT_LOCAL_JOB_ID"]
        return Seat("local", local_id, 0, rank, size, rank, size, (os.uname().nodename,), None, None)
    job_id = slurm_job_id(environment)
    if job_id is None or "SLURM_PROCID" not in environment:
        raise InputError("this is a rank of a job and runs under srun alone; use `maehpc submit` or `maehpc run`")
    cpus = environment.get("SLURM_CPUS_PER_TASK")
    hosts = expand_nodes(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
    size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    return Seat(
        scheduler="slurm",
        job_id=job_id,
        restart=restarts(environment),
        rank=int(environment["SLURM_PROCID"]),
        size=size,
        local_rank=int(environment["SLURM_LOCALID"]),
        local_size=max(1, -(-size // len(hosts))),
        hosts=hosts,
        member=array_member(environment),
        cpus=int(cpus) if cpus else None,
    )


def own_folder(first: Path, member: int | None) -> JobFolder:
    """The job folder of this process: the one given, or that of its member of the array.

    Raises:
        InputError: there is no such member.
    """
    job = JobFolder(first)
    if member is None:
        return job
    array = job.record().array
    if array is None or member >= len(array.folders):
        raise InputError(f"{first / 'job.json'}: array: it has no member {member}; submit the sweep again")
    return JobFolder(Path(array.folders[member]))
