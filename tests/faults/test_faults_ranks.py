"""A rank is killed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cluster_jobs import Study, same_result, until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_of_a_rank(rank: int, study: Callable[..., Study], undisturbed: Study) -> None:
    one = study()
    one.submit()
    one.reached()
    one.kill(rank)
    # The other rank ends at once, and the job is started again by itself.
    until(lambda: one.job.newest_attempt() == 2, 60, one.told)
    assert one.job.outcome(1) is None, "a rank that was killed leaves no word"
    one.completed()
    assert one.job.newest_attempt() == 2
    assert "resuming after step" in one.log()
    same_result(one, undisturbed)


def test_ranks_that_die_again_and_again_end_the_job_loudly(study: Callable[..., Study]) -> None:
    one = study(profile={"requeue": {"attempts_without_progress": 2}})
    one.submit()
    for attempt in (1, 2):
        until(lambda attempt=attempt: one.job.newest_attempt() >= attempt, 90, one.told)
        one.kill(1)
    one.ended("FAILED", seconds=60)
    outcome = one.outcome()
    assert outcome is not None and outcome.outcome == "failed"
    assert "2 attempts in a row came no further" in outcome.reason
    status = one.maehpc("status", str(one.results), "--all")
    assert "failed" in status.stdout and "came no further" in status.stdout
