"""A rank's place, from the variables that Slurm and submitit set (as the mini cluster's jobs print them)."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_jobs import new_job

from maehpc.errors import InputError
from maehpc.launch.record import ArrayMember
from maehpc.launch.seat import find_seat, own_folder

SLURM = {
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "n[1-4]",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_CPUS_PER_TASK": "3",
}


def test_a_rank_under_slurm() -> None:
    seat = find_seat(SLURM)
    assert (seat.scheduler, seat.job_id, seat.restart) == ("slurm", "41", 0)
    assert (seat.rank, seat.size, seat.local_rank, seat.local_size, seat.cpus) == (5, 8, 1, 2, 3)
    assert seat.hosts == ("n1", "n2", "n3", "n4")
    assert seat.member is None


def test_a_requeued_member_of_an_array() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    seat = find_seat({**SLURM, **array})
    assert (seat.job_id, seat.restart, seat.member) == ("40_3", 2, 3)


def test_a_step_on_fewer_hosts_than_the_job_has() -> None:
    seat = find_seat({**SLURM, "SLURM_STEP_NODELIST": "n[2-3]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"})
    assert (seat.hosts, seat.size, seat.local_size) == (("n2", "n3"), 4, 2)


def test_a_rank_of_the_local_executor() -> None:
    seat = find_seat(
        {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": "900",
            "SUBMITIT_LOCAL_NTASKS": "2",
            "SUBMITIT_LOCAL_GLOBALID": "1",
            "SUBMITIT_LOCAL_LOCALID": "1",
            "SLURM_JOB_ID": "41",  # of an interactive allocation that it was called in
        }
    )
    assert (seat.scheduler, seat.job_id, seat.rank, seat.size, seat.local_size) == ("local", "900", 1, 2, 2)


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "41"}])
def test_outside_a_launcher_it_says_what_to_do(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="maehpc submit"):
        find_seat(environment)


def test_a_member_finds_its_own_folder(tmp_path: Path) -> None:
    folders = [tmp_path / f"x-{index}/jobs/0001-pretrain" for index in range(3)]
    first = new_job(tmp_path, name="x-0", array=ArrayMember(index=0, folders=tuple(map(str, folders))))
    assert own_folder(first.path, 2).path == folders[2]
    assert own_folder(first.path, None) == first
    with pytest.raises(InputError, match="no member 3"):
        own_folder(first.path, 3)
