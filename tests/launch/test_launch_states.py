"""Every state of Slurm has one of ours, and what the job left is joined with it so that nothing is guessed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from maehpc.launch.record import Attempt, Heartbeat, Outcome
from maehpc.launch.slurm_formats import SlurmJob
from maehpc.launch.states import (
    NEVER,
    SLURM_STATES,
    Evidence,
    State,
    judge_local,
    judge_slurm,
    not_submitted,
    translate,
)

# The manual's lists ("JOB STATE CODES" of squeue and sacct, "JOB STATES" and flags of 23.11 to 25.05).
MANUAL = re.findall(
    r"\w+",
    """
    BOOT_FAIL CANCELLED COMPLETED COMPLETING CONFIGURING DEADLINE EXPEDITING EXPIRED FAILED GETENV_FAILED LAUNCH_FAILED
    NODE_FAIL OUT_OF_MEMORY PENDING POWER_UP_NODE PREEMPTED RECONFIG_FAIL REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING
    RESV_DEL_HOLD REVOKED RUNNING SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED SUSPENDED TIMEOUT UPDATE_DB
    """,
)

# What may be told of a job that has no record of its own: never that it is done.
WITHOUT_A_RECORD = {
    **dict.fromkeys(
        [
            *(
                "BOOT_FAIL",
                "DEADLINE",
                "EXPIRED",
                "FAILED",
                "GETENV_FAILED",
                "LAUNCH_FAILED",
                "NODE_FAIL",
                "OUT_OF_MEMORY",
            ),
            *("PREEMPTED", "RECONFIG_FAIL", "TIMEOUT"),
        ],
        "failed",
    ),
    **dict.fromkeys(["COMPLETED", "REVOKED", "UPDATE_DB"], "unknown"),
    "CANCELLED": "cancelled",
    **dict.fromkeys(["COMPLETING", "STAGE_OUT"], "stopping"),
    **dict.fromkeys(["CONFIGURING", "POWER_UP_NODE", "RUNNING", "RESIZING", "SIGNALING"], "starting"),
    **dict.fromkeys(["EXPEDITING", "REQUEUED", "REQUEUE_FED"], "continuing"),
    **dict.fromkeys(["REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"], "held"),
    **dict.fromkeys(["STOPPED", "SUSPENDED"], "suspended"),
    "PENDING": "waiting",
}


def evidence(
    outcome: str | None = None,
    *,
    job_id: str = "12",
    attempts: int = 1,
    of: str = "12",
    restart: int = 0,
    phase: str | None = "pretrain",
    **more: Any,
) -> Evidence:
    """What a job left whose newest attempt ran under the id `of`."""
    if attempts == 0:
        return Evidence(job_id=job_id, **more)
    return Evidence(
        job_id=job_id,
        number=attempts,
        attempt=Attempt(job_id=of, restart=restart, hosts=("n1",), ranks=1, pid=5),
        outcome=None
        if outcome is None
        else Outcome.model_validate({"outcome": outcome, "reason": f"it was {outcome}", "requeue": True}),
        heartbeat=None if phase is None else Heartbeat(sequence=3, phase=phase),
        **more,
    )


def slurm(state: str, **more: Any) -> SlurmJob:
    return SlurmJob(job_id="12", state=state, **more)


def test_the_table_has_every_state_of_the_manual_and_no_other() -> None:
    assert set(SLURM_STATES) == set(MANUAL) == set(WITHOUT_A_RECORD)


@pytest.mark.parametrize(("word", "expected"), WITHOUT_A_RECORD.items())
def test_slurms_word_alone(word: str, expected: str) -> None:
    assert judge_slurm(Evidence(job_id="12"), slurm(word), answers=True).state == expected


@pytest.mark.parametrize("word", ["HIBERNATING", "?", "", "1024"])
def test_a_state_that_nobody_listed_is_unknown(word: str) -> None:
    assert translate(word) is State.UNKNOWN
    assert judge_slurm(evidence("done"), slurm(word), answers=True).state == "unknown"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("CANCELLED,COMPLETING", "stopping"),
        ("RUNNING+SIGNALING", "running"),
        ("PENDING,REQUEUE_HOLD", "held"),
        ("PENDING,SPECIAL_EXIT", "held"),
        ("PENDING,REQUEUED", "continuing"),
        ("RUNNING,CONFIGURING", "starting"),
        ("COMPLETED,STAGE_OUT", "stopping"),
        ("PENDING,LAUNCH_FAILED", "waiting"),
        ("CANCELLED by 1000", "cancelled"),
        ("running", "running"),
    ],
)
def test_several_words_for_one_job(words: str, expected: str) -> None:
    assert translate(words) == expected


# (Slurm's state or None where it has forgotten the job, its restarts, outcome of the newest attempt, more) -> state
NOW = [
    # running: ours says how far
    ("RUNNING", 0, None, {}, "running"),
    ("RUNNING", 0, None, {"phase": "saving"}, "running"),
    ("RUNNING", 0, None, {"phase": "starting"}, "starting"),
    ("RUNNING", 0, None, {"phase": None}, "starting"),
    ("RUNNING", 0, None, {"attempts": 0}, "starting"),
    ("RUNNING", 0, None, {"cancelled": True}, "stopping"),
    ("RUNNING", 0, None, {"attempts": 0, "cancelled": True}, "stopping"),
    ("RUNNING", 0, "done", {}, "stopping"),
    ("RUNNING", 0, "interrupted", {}, "stopping"),
    ("RUNNING", 0, "failed", {}, "stopping"),
    ("RUNNING", None, "failed", {}, "stopping"),
    # running again: the record is of an earlier start
    ("RUNNING", 1, None, {}, "starting"),
    ("RUNNING", 1, "interrupted", {}, "starting"),
    ("RUNNING", 1, "failed", {}, "starting"),
    ("RUNNING", 1, "done", {}, "starting"),
    ("RUNNING", 1, None, {"restart": 1, "attempts": 2}, "running"),
    ("RUNNING", 0, "failed", {"of": "11"}, "starting"),
    ("SUSPENDED", 0, None, {}, "suspended"),
    ("COMPLETING", 0, None, {}, "stopping"),
    ("COMPLETING", 0, "done", {}, "stopping"),
    ("COMPLETING", 0, "failed", {}, "stopping"),
    # waiting: whatever the last attempt left is stale
    ("PENDING", 0, None, {"attempts": 0}, "waiting"),
    ("PENDING", 1, None, {}, "continuing"),
    ("PENDING", None, None, {}, "continuing"),
    ("PENDING", 0, None, {}, "running"),  # began after Slurm had answered
    ("PENDING", 0, None, {"phase": None}, "starting"),
    ("PENDING", 1, None, {"restart": 1, "attempts": 2}, "running"),
    ("PENDING", 1, "failed", {}, "continuing"),
    ("PENDING", 1, "done", {}, "continuing"),
    ("PENDING", 1, "interrupted", {}, "continuing"),
    ("PENDING", 0, "failed", {"of": "11"}, "continuing"),
    ("PENDING", 0, None, {"attempts": 0, "cancelled": True}, "stopping"),
    ("REQUEUED", 1, "interrupted", {}, "continuing"),
    ("REQUEUE_HOLD", 1, "failed", {}, "held"),
    # ended, and the job says so too
    ("COMPLETED", 0, "done", {}, "done"),
    ("COMPLETED", None, "done", {}, "done"),
    ("COMPLETED", 1, "done", {"restart": 1, "attempts": 2}, "done"),
    ("FAILED", 0, "failed", {}, "failed"),
    ("FAILED", 0, "refused", {}, "failed"),
    ("COMPLETED", 0, "failed", {}, "failed"),
    ("CANCELLED", 0, "interrupted", {"cancelled": True}, "cancelled"),
    ("COMPLETED", 0, "interrupted", {"cancelled": True}, "cancelled"),
    ("FAILED", 0, None, {"cancelled": True}, "cancelled"),
    ("CANCELLED", 0, None, {"attempts": 0, "cancelled": True}, "cancelled"),
    ("CANCELLED", 0, None, {}, "cancelled"),
    ("CANCELLED", 0, "interrupted", {}, "cancelled"),
    ("CANCELLED", 0, "failed", {}, "failed"),
    # ended, and the job left no word of this start
    ("COMPLETED", 0, None, {}, "unknown"),
    ("COMPLETED", 0, None, {"attempts": 0}, "unknown"),
    ("COMPLETED", 1, "done", {}, "unknown"),
    ("COMPLETED", 0, "done", {"of": "11"}, "unknown"),
    ("FAILED", 0, None, {}, "failed"),
    ("TIMEOUT", 0, None, {}, "failed"),
    ("NODE_FAIL", 0, None, {"attempts": 0}, "failed"),
    ("FAILED", 1, "done", {}, "failed"),
    # ended, and they contradict each other
    ("FAILED", 0, "done", {}, "unknown"),
    ("TIMEOUT", 0, "done", {}, "unknown"),
    ("CANCELLED", 0, "done", {}, "unknown"),
    ("CANCELLED", 0, "done", {"cancelled": True}, "unknown"),
    # saved, and nobody continued it
    ("COMPLETED", 0, "interrupted", {}, "failed"),
    ("PREEMPTED", 0, "interrupted", {}, "failed"),
    # forgotten by Slurm
    (None, None, "done", {}, "done"),
    (None, None, "failed", {}, "failed"),
    (None, None, "refused", {}, "failed"),
    (None, None, "interrupted", {}, "unknown"),
    (None, None, "interrupted", {"cancelled": True}, "cancelled"),
    (None, None, "fenced", {}, "unknown"),
    (None, None, None, {}, "unknown"),
    (None, None, None, {"attempts": 0}, "unknown"),
    (None, None, None, {"cancelled": True}, "cancelled"),
    (None, None, "done", {"cancelled": True}, "done"),
    (None, None, "done", {"of": "11"}, "unknown"),
    (None, None, "failed", {"of": "11"}, "unknown"),
]


@pytest.mark.parametrize(("word", "restarts", "outcome", "more", "expected"), NOW)
def test_state_of_a_job(
    word: str | None, restarts: int | None, outcome: str | None, more: dict[str, Any], expected: str
) -> None:
    said = None if word is None else slurm(word, restarts=restarts)
    assert judge_slurm(evidence(outcome, **more), said, answers=True).state == expected


@pytest.mark.parametrize("word", MANUAL)
@pytest.mark.parametrize("outcome", [None, "done", "interrupted", "failed", "refused", "fenced"])
@pytest.mark.parametrize("more", [{}, {"of": "11"}, {"cancelled": True}, {"attempts": 0}])
def test_done_needs_both_words(word: str, outcome: str | None, more: dict[str, Any]) -> None:
    verdict = judge_slurm(evidence(outcome, **more), slurm(word, restarts=0), answers=True)
    both = word == "COMPLETED" and outcome == "done" and "of" not in more and "attempts" not in more
    assert (verdict.state is State.DONE) == both
    if verdict.state in (State.UNKNOWN, State.FAILED):
        assert verdict.sentence


@pytest.mark.parametrize(
    ("outcome", "more", "expected"),
    [
        ("done", {}, "done"),
        ("failed", {}, "failed"),
        ("refused", {}, "failed"),
        ("interrupted", {}, "unknown"),
        (None, {}, "unknown"),
        (None, {"attempts": 0}, "unknown"),
        (None, {"cancelled": True}, "unknown"),
        ("done", {"of": "11"}, "unknown"),
        ("failed", {"of": "11"}, "unknown"),
    ],
)
def test_without_slurm_only_what_was_recorded(outcome: str | None, more: dict[str, Any], expected: str) -> None:
    assert judge_slurm(evidence(outcome, **more), None, answers=False).state == expected


@pytest.mark.parametrize(
    ("reason", "state", "words"),
    [
        ("Priority", "waiting", "higher priority"),
        (NEVER, "waiting", "can never start"),
        ("JobHeldUser", "held", "held by its owner"),
        ("JobHeldAdmin", "held", "administrator"),
        ("launch failed requeued held", "held", "could not be launched"),
        ("ReqNodeNotAvail, UnavailableNodes:n[3-4]", "waiting", "UnavailableNodes:n[3-4]"),
        ("QOSMaxJobsPerUserLimit", "waiting", "QOSMaxJobsPerUserLimit"),
        ("SomethingNew", "waiting", "Slurm's reason: SomethingNew"),
    ],
)
def test_why_a_job_waits(reason: str, state: str, words: str) -> None:
    verdict = judge_slurm(evidence(attempts=0), slurm("PENDING", reason=reason), answers=True)
    assert verdict.state == state
    assert words in verdict.sentence


def test_earlier_jobs_have_names() -> None:
    known = Evidence(job_id="12", earlier=("toy/0001-pretrain",))
    assert judge_slurm(known, slurm("PENDING", reason="Dependency"), True).sentence == "waits for toy/0001-pretrain"
    assert judge_slurm(known, slurm("PENDING", reason="Priority"), True).sentence == "jobs of higher priority go first"
    never = judge_slurm(known, slurm("PENDING", reason=NEVER), True).sentence
    assert never == "can never start: toy/0001-pretrain did not succeed; `maehpc resume` that one"


def test_a_failure_tells_its_own_reason_before_slurms() -> None:
    assert judge_slurm(evidence("failed"), slurm("FAILED", exit_code=1), True).sentence == "it was failed"
    killed = judge_slurm(evidence(), slurm("FAILED", exit_code=137), True)
    assert killed.sentence == "Slurm says FAILED (exit code 137, SIGKILL)"


def test_a_job_that_slurm_forgot_and_that_left_no_word() -> None:
    verdict = judge_slurm(evidence(), None, True)
    assert verdict.sentence == "neither Slurm nor the job says how it ended"


@pytest.mark.parametrize(
    ("alive", "outcome", "more", "waits", "expected"),
    [
        (True, None, {}, "", "running"),
        (True, None, {"phase": "starting"}, "", "starting"),
        (True, None, {"attempts": 0}, "", "starting"),
        (True, None, {"attempts": 0}, "waits for its turn", "waiting"),
        (True, "failed", {"of": "11"}, "waits for its turn", "continuing"),
        (True, None, {"attempts": 0, "cancelled": True}, "waits for its turn", "stopping"),
        (True, "interrupted", {}, "", "continuing"),
        (True, "interrupted", {"cancelled": True}, "", "stopping"),
        (True, "done", {}, "", "stopping"),
        (True, "failed", {}, "", "stopping"),
        (True, "failed", {"of": "11"}, "", "starting"),
        (False, "done", {}, "", "done"),
        (False, "failed", {}, "", "failed"),
        (False, "interrupted", {}, "", "failed"),
        (False, "interrupted", {"cancelled": True}, "", "cancelled"),
        (False, None, {}, "", "failed"),
        (False, None, {"cancelled": True}, "", "cancelled"),
        (None, "done", {}, "", "done"),
        (None, "failed", {}, "", "failed"),
        (None, "interrupted", {}, "", "unknown"),
        (None, None, {}, "", "unknown"),
        (None, None, {"cancelled": True}, "", "unknown"),
        (None, None, {"attempts": 0}, "", "unknown"),
        (None, "done", {"of": "11"}, "", "unknown"),
        (None, None, {"attempts": 0, "cancelled": True}, "", "cancelled"),
    ],
)
def test_local_jobs(alive: bool | None, outcome: str | None, more: dict[str, Any], waits: str, expected: str) -> None:
    verdict = judge_local(evidence(outcome, **more), alive, "here", waits)
    assert verdict.state == expected
    if verdict.state in (State.UNKNOWN, State.FAILED):
        assert verdict.sentence


def test_a_job_that_was_never_submitted() -> None:
    assert "never submitted" in not_submitted(intended=False, asked=True).sentence
    assert "knows nothing of it" in not_submitted(intended=True, asked=True).sentence
    assert "cannot be asked" in not_submitted(intended=True, asked=False).sentence
    assert {not_submitted(one, two).state for one in (True, False) for two in (True, False)} == {State.UNKNOWN}
