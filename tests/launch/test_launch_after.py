"""What becomes of a job when srun has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_jobs import new_job, start

from maehpc.launch.after import attempts_without_progress, continues_locally, decide, ours_to_decide
from maehpc.launch.record import Outcome
from maehpc.launch.slurm_formats import SlurmJob

INTERRUPTED = Outcome(outcome="interrupted", reason="SIGUSR2 (the wall time is near)", requeue=True)


@pytest.mark.parametrize(
    ("outcome", "code", "expected"),
    [
        (Outcome(outcome="done"), 0, "done"),
        (Outcome(outcome="done"), 143, "done"),
        (INTERRUPTED, 0, "continue"),
        (INTERRUPTED, 137, "continue"),
        (Outcome(outcome="failed", reason="the disk is full"), 1, "end"),
        (Outcome(outcome="refused", reason="no such file"), 2, "end"),
        (Outcome(outcome="fenced"), 70, "end"),
        (None, 137, "continue"),
        (None, 70, "continue"),
        (None, 0, "fail"),
    ],
)
def test_the_newest_attempts_word_decides(tmp_path: Path, outcome: Outcome | None, code: int, expected: str) -> None:
    job = new_job(tmp_path)
    number = start(job, done=5)
    if outcome:
        job.write_outcome(number, outcome)
    assert decide(job, "7", 0, code)[0] == expected


def test_the_word_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    job.write_outcome(start(job, restart=0), Outcome(outcome="done"))
    assert decide(job, "7", 1, 168) == ("continue", "srun ended with 168 before any rank had begun")


def test_a_start_that_was_given_up_leaves_its_successor_alone(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    job.write_outcome(start(job, restart=0, done=5), Outcome(outcome="fenced"))
    start(job, restart=1, done=6)
    assert decide(job, "7", 0, 70) == ("end", "")
    assert sorted(job.attempts()) == [1, 2], "a new attempt would fence the one that works"


def test_starts_that_no_rank_survives_count_as_attempts(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    assert [decide(job, "7", restart, 168)[0] for restart in range(3)] == ["continue", "continue", "fail"]
    assert sorted(job.attempts()) == [1, 2, 3]


def test_a_start_that_was_refused_is_not_repeated(tmp_path: Path) -> None:
    assert decide(new_job(tmp_path), "7", 0, 2) == ("fail", "the ranks were refused before they began")


@pytest.mark.parametrize(
    ("state", "reason", "restarts", "ours"),
    [
        ("RUNNING", "None", 2, False),  # a later start of it
        ("RUNNING", "None", 1, True),  # an ordinary end, a signal, or the grace of a preemption
        ("COMPLETING", "TimeLimit", 1, True),  # the wall time is over
        ("COMPLETING", "None", 1, False),  # cancelled: a requeue would bring it back to life
        ("COMPLETING", "None", 2, False),  # Slurm requeues it
        ("PENDING", "BeginTime", 2, False),
        ("CANCELLED", "None", 1, False),
    ],
)
def test_who_decides_on_a_job(state: str, reason: str, restarts: int, ours: bool) -> None:
    shown = SlurmJob(
        job_id="7",
        state=state,
        reason=reason,
        nodes=("n1",),
        restarts=restarts,
        comment="",
        time_left_s=None,
        partition="gpu",
        exit_code=None,
        name="x",
        source="scontrol",
    )
    assert ours_to_decide(shown, 1) == ours


def test_a_cancelled_job_is_not_continued(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    job.write_outcome(start(job), INTERRUPTED)
    job.mark_cancelled()
    assert decide(job, "7", 0, 143)[0] == "end"
    assert not continues_locally(job)


def test_attempts_that_come_no_further_are_counted(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    assert attempts_without_progress(job) == 0
    for restart, (done, count) in enumerate([(10, 1), (10, 2), (20, 1), (20, 2), (15, 3), (None, 4)]):
        start(job, restart=restart, done=done)
        assert attempts_without_progress(job) == count, (restart, done)


def test_another_stage_or_data_set_is_progress(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    start(job, restart=0, done=10)
    start(job, restart=1, done=3, phase="finetune")
    assert attempts_without_progress(job) == 1


def test_an_attempt_that_left_word_ends_the_count(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    start(job, restart=0, done=10)
    job.write_outcome(start(job, restart=1, done=10), INTERRUPTED)
    start(job, restart=2, done=10)
    assert attempts_without_progress(job) == 1


def test_the_profiles_limit_ends_a_job_that_dies_again_and_again(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    for restart in range(2):
        start(job, restart=restart, done=10)
        assert decide(job, "7", restart, 137)[0] == "continue"
    start(job, restart=2, done=10)
    verdict, reason = decide(job, "7", 2, 137)
    assert verdict == "fail"
    assert reason == "srun ended with 137 (signal 9); 3 attempts in a row came no further"


def test_local_ranks_start_again_after_the_wall_time_and_not_after_sigterm(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    number = start(job, done=5)
    assert continues_locally(job), "ranks that died are started again"
    job.write_outcome(number, INTERRUPTED)
    assert continues_locally(job)
    job.write_outcome(number, Outcome(outcome="interrupted", reason="SIGTERM (preempted or cancelled)", requeue=True))
    assert not continues_locally(job)
    job.write_outcome(number, Outcome(outcome="failed", reason="the disk is full"))
    assert not continues_locally(job)
