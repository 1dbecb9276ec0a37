"""The job is asked to go: preemption, signals, the end of its wall time, a requeue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cluster_jobs import MIDDLE, Study, same_result, until

from maehpc.launch.record import Outcome

pytestmark = pytest.mark.slow


def urgent(one: Study, nodes: int, seconds: int = 2) -> str:
    """A job that takes whole hosts from those of lesser rank; its id."""
    words = ("sbatch", "--parsable", "--partition=urgent", f"--nodes={nodes}", "--exclusive", "--output=/dev/null")
    return one.slurm(*words, f"--wrap=srun sleep {seconds}")


def saved_when_it_left(one: Study) -> int:
    """The step at which the first attempt was interrupted; a checkpoint of that very step is the one resumed from."""
    outcome = one.job.outcome(1)
    assert outcome is not None and outcome.outcome == "interrupted", one.told()
    step = int(outcome.reason.split("after step ")[1].split()[0])
    assert f"resuming after step {step}" in one.log(), one.told()
    return step


def test_preemption_with_grace_loses_nothing(study: Callable[..., Study], undisturbed: Study) -> None:
    one = study()
    one.submit()
    one.reached()
    urgent(one, nodes=4)
    until(lambda: one.job.newest_attempt() == 2, 120, one.told)
    one.completed()
    assert saved_when_it_left(one) >= MIDDLE
    same_result(one, undisturbed)


def test_sigterm_alone(study: Callable[..., Study], undisturbed: Study) -> None:
    one = study()
    one.submit()
    one.reached()
    one.slurm("scancel", "--signal=TERM", one.job_id)
    until(lambda: one.job.newest_attempt() == 2, 90, one.told)
    one.completed()
    assert saved_when_it_left(one) >= MIDDLE
    same_result(one, undisturbed)


def test_preemption_without_grace(study: Callable[..., Study], undisturbed: Study) -> None:
    one = study(profile={"partition": "nograce"})
    one.submit()
    one.reached()
    urgent(one, nodes=4)
    until(lambda: one.job.newest_attempt() == 2, 120, one.told)
    one.completed()
    same_result(one, undisturbed)


@pytest.mark.parametrize("requeue", [True, False], ids=["requeued", "chained"])
def test_the_wall_time_is_reached(requeue: bool, study: Callable[..., Study], undisturbed: Study) -> None:
    """Ten seconds are less than the work takes; where requeueing is forbidden the job submits itself anew."""
    # Slurm's signal comes up to a minute before the lead that is asked for, which is at any moment of these two.
    one = study(profile={"time_min": 2, "signal_lead_s": 110, "requeue": {"enabled": requeue}})
    one.submit()
    first = one.job_id

    def left() -> Outcome | None:
        """The word of an attempt that has left, its successor queued; the signal may meet one that has yet to begin."""
        until(lambda: one.state() == "RUNNING", 60, one.told)
        with one.queue_held():
            running = one.job_id
            until(lambda: one.job_id != running or one.state() == "PENDING", 120, one.told)
            outcome = one.outcome()
            if outcome is not None:  # one attempt more, to the end
                one.slurm("scontrol", "update", f"jobid={one.job_id}", "timelimit=20")
            return outcome

    outcome = until(left, 240, one.told)
    assert outcome.outcome == "interrupted" and "the wall time is near" in outcome.reason
    attempt = one.job.newest_attempt()
    until(lambda: one.job.newest_attempt() == attempt + 1, 120, one.told)
    assert (one.job_id == first) == requeue
    until(lambda: one.outcome() is not None and one.outcome().outcome == "done", 240, one.told)
    assert one.job.newest_attempt() == attempt + 1
    same_result(one, undisturbed)


def test_scontrol_requeue_of_a_running_job(study: Callable[..., Study], undisturbed: Study) -> None:
    one = study()
    one.submit()
    one.reached()
    one.slurm("scontrol", "requeue", one.job_id)
    until(lambda: one.job.newest_attempt() == 2, 120, one.told)
    one.completed()
    same_result(one, undisturbed)


def test_scontrol_requeue_of_a_failed_job(study: Callable[..., Study], undisturbed: Study, mini: Any) -> None:
    one = study(profile={"requeue": {"attempts_without_progress": 1}})
    one.submit()
    one.reached()
    one.kill(1)
    one.ended("FAILED", seconds=90)
    status = one.maehpc("status", str(one.results), "--all", "--json")
    assert '"failed"' in status.stdout
    one.slurm("scontrol", "requeue", one.job_id)
    # The first attempt's word must not be taken for the second's while that one waits.
    status = one.maehpc("status", str(one.results), "--all", "--json")
    assert '"failed"' not in status.stdout, status.stdout
    one.completed()
    same_result(one, undisturbed)


def test_scancel_is_not_a_preemption(study: Callable[..., Study]) -> None:
    one = study()
    one.submit()
    one.reached()
    one.slurm("scancel", one.job_id)
    one.ended("CANCELLED", seconds=60)
    status = one.maehpc("status", str(one.results), "--all", "--json")
    assert '"cancelled"' in status.stdout, status.stdout


def test_cancel_then_resume(study: Callable[..., Study], undisturbed: Study) -> None:
    one = study()
    one.submit()
    one.reached()
    one.maehpc("cancel", one.name, "--results", str(one.results))
    one.ended("CANCELLED", seconds=60)
    until(lambda: not one.slurm("squeue", "--noheader"), 60, one.told)
    one.maehpc("resume", one.name, "--results", str(one.results))
    one.completed()
    same_result(one, undisturbed)
