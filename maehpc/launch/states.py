"""What state a job is in, from what Slurm says and what the job itself left on the disk. Pure: nothing is asked here.

`done` is said only of a job whose newest attempt says so and whom Slurm does not contradict. Where nothing tells, the
state is `unknown`, and the sentence says what is missing. Nothing is inferred from the time of a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from maehpc.launch.record import Attempt, Heartbeat, Outcome
from maehpc.launch.slurm_formats import SlurmJob, signal_name


class State(StrEnum):
    """Our states."""

    WAITING = "waiting"
    HELD = "held"
    STARTING = "starting"
    RUNNING = "running"
    SUSPENDED = "suspended"
    STOPPING = "stopping"
    CONTINUING = "continuing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def ended(self) -> bool:
        """Whether it is certain that nothing more will happen by itself."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


SLURM_STATES: dict[str, State] = {
    "BOOT_FAIL": State.FAILED,
    "CANCELLED": State.CANCELLED,
    "COMPLETED": State.DONE,
    "COMPLETING": State.STOPPING,
    "CONFIGURING": State.STARTING,
    "DEADLINE": State.FAILED,
    "EXPEDITING": State.CONTINUING,
    "EXPIRED": State.FAILED,
    "FAILED": State.FAILED,
    "GETENV_FAILED": State.FAILED,
    "LAUNCH_FAILED": State.FAILED,
    "NODE_FAIL": State.FAILED,
    "OUT_OF_MEMORY": State.FAILED,
    "PENDING": State.WAITING,
    "POWER_UP_NODE": State.STARTING,
    "PREEMPTED": State.FAILED,
    "RECONFIG_FAIL": State.FAILED,
    "REQUEUED": State.CONTINUING,
    "REQUEUE_FED": State.CONTINUING,
    "REQUEUE_HOLD": State.HELD,
    "RESIZING": State.RUNNING,
    "RESV_DEL_HOLD": State.HELD,
    "REVOKED": State.UNKNOWN,  # another cluster of the federation has it
    "RUNNING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "SPECIAL_EXIT": State.HELD,
    "STAGE_OUT": State.STOPPING,
    "STOPPED": State.SUSPENDED,
    "SUSPENDED": State.SUSPENDED,
    "TIMEOUT": State.FAILED,
    "UPDATE_DB": State.UNKNOWN,  # tells of the database alone
}
"""Every state and flag of Slurm 20.11 to 25, and what it says by itself; DONE says only that Slurm saw no error."""

_STRONGEST = (
    State.HELD,
    State.CONTINUING,
    State.STOPPING,
    State.STARTING,
    State.SUSPENDED,
    State.RUNNING,
    State.WAITING,
    State.CANCELLED,
    State.FAILED,
    State.DONE,
    State.UNKNOWN,
)
"""Of several words for one job ("CANCELLED,COMPLETING"), the one that decides."""

NEVER = "DependencyNeverSatisfied"

_HELD = {"JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue"}

_REASONS = {
    "Priority": "jobs of higher priority go first",
    "Resources": "waits for free hosts",
    "Dependency": "waits for an earlier job",
    NEVER: "can never start: a job that it waits for did not succeed; `maehpc resume` that one, or cancel this one",
    "BeginTime": "waits for its earliest start",
    "Cleaning": "its last attempt is being cleaned up",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition starts no jobs",
    "PartitionNodeLimit": "its partition does not allow so many hosts, or they are down",
    "PartitionTimeLimit": "its partition does not allow so long a time: cancel it and submit it with a shorter --time",
    "ReqNodeNotAvail": "a host that it needs is not available",
    "JobHeldUser": "held by its owner; `maehpc resume` lets it go",
    "JobHeldAdmin": "held by an administrator of the cluster",
    "JobHoldMaxRequeue": "held: it was requeued too often; `maehpc resume` lets it go",
    "launch failed requeued held": "held: it could not be launched; `maehpc resume` lets it go",
}


@dataclass(frozen=True)
class Verdict:
    """A job's state, and a sentence where the state alone does not tell enough."""

    state: State
    sentence: str = ""


@dataclass(frozen=True)
class Evidence:
    """All that is known of a job's newest submission.

    Attributes:
        job_id: the scheduler's; None where no submission was recorded as accepted.
        number: of the newest attempt; 0 before the first.
        attempt: its record.
        outcome: how it ended.
        heartbeat: how far it is.
        cancelled: whether a person asked for the end.
        earlier: names of the jobs that it waits for and that have not succeeded.
    """

    job_id: str | None
    number: int = 0
    attempt: Attempt | None = None
    outcome: Outcome | None = None
    heartbeat: Heartbeat | None = None
    cancelled: bool = False
    earlier: tuple[str, ...] = ()

    def of_this_start(self, restarts: int | None) -> bool:
        """Whether the newest attempt belongs to this submission, and to its newest start where `restarts` is known."""
        if self.attempt is None or self.attempt.job_id != self.job_id:
            return False
        return restarts is None or self.attempt.restart >= restarts


def translate(word: str) -> State:
    """What Slurm's word for a job means by itself; unknown where the table doesn't have it."""
    states = {SLURM_STATES.get(part, State.UNKNOWN) for part in re.split(r"[,+\s]+", word.upper()) if part}
    return next((state for state in _STRONGEST if state in states), State.UNKNOWN)


def _reason(reason: str) -> str:
    word = reason.partition(",")[0]  # "ReqNodeNotAvail, UnavailableNodes:n3"
    if reason in _REASONS or word in _REASONS:
        return _REASONS.get(reason) or f"{_REASONS[word]} ({reason})"
    if reason.startswith(("QOS", "Assoc", "MaxCpuPer", "MaxNodePer", "MaxJobsPer")):
        return f"waits: a limit of its account or quality of service is reached ({reason})"
    return f"Slurm's reason: {reason}" if reason else ""


def _slurm_end(job: SlurmJob) -> str:
    """How Slurm says that a job ended."""
    told = f"Slurm says {job.state}"
    if job.exit_code:
        name = signal_name(job.exit_code)
        told += f" (exit code {job.exit_code}" + (f", {name})" if name else ")")
    return told


def not_submitted(intended: bool, asked: bool) -> Verdict:
    """The state of a job without an accepted submission.

    Args:
        intended: whether a submission was begun.
        asked: whether Slurm was asked for a job with its token, and has none.
    """
    if not intended:
        return Verdict(State.UNKNOWN, "it was never submitted; `maehpc resume` submits it")
    if asked:
        return Verdict(
            State.UNKNOWN, "its submission was broken off and Slurm knows nothing of it; `maehpc resume` submits it"
        )
    return Verdict(State.UNKNOWN, "its submission was broken off, and Slurm cannot be asked whether it took the job")


def judge_slurm(evidence: Evidence, job: SlurmJob | None, answers: bool) -> Verdict:
    """The state of a job that was submitted to Slurm.

    Args:
        evidence: what the job left.
        job: what Slurm says; None where it has forgotten the job, or does not answer.
        answers: whether Slurm could be asked.
    """
    if not answers:
        return _as_recorded(evidence)
    if job is None:
        return _forgotten(evidence)
    state = translate(job.state)
    if state is State.WAITING:
        return _queued(evidence, job)
    if state is State.CONTINUING:
        return Verdict(state, _reason(job.reason))
    if state is State.HELD:
        return Verdict(state, _reason(job.reason) or f"Slurm holds it ({job.state}); `maehpc resume` lets it go")
    if state is State.SUSPENDED:
        return Verdict(state, "Slurm has stopped it for a while")
    if state is State.STARTING:
        return Verdict(state, "its hosts are being made ready")
    if state is State.STOPPING:
        return Verdict(state, _stopping(evidence, job.restarts) or "Slurm is cleaning up after it")
    if state is State.RUNNING:
        return _running(evidence, job)
    if state is State.UNKNOWN:
        return Verdict(state, f"Slurm says {job.state}, which tells nothing of its end")
    return _ended(evidence, job, state)


def _queued(evidence: Evidence, job: SlurmJob) -> Verdict:
    if evidence.cancelled:
        return Verdict(State.STOPPING, "it was asked to end and is still in the queue")
    if job.reason in _HELD or job.reason.endswith("held"):
        return Verdict(State.HELD, _reason(job.reason))
    if job.restarts is not None and evidence.of_this_start(job.restarts):  # it began after Slurm had answered
        return _running(evidence, job)
    sentence = _reason(job.reason)
    if evidence.earlier and job.reason == "Dependency":
        sentence = f"waits for {' and '.join(evidence.earlier)}"
    if evidence.earlier and job.reason == NEVER:
        sentence = f"can never start: {' and '.join(evidence.earlier)} did not succeed; `maehpc resume` that one"
    return Verdict(State.CONTINUING if evidence.number else State.WAITING, sentence)


def _stopping(evidence: Evidence, restarts: int | None) -> str:
    if evidence.cancelled:
        return "it was asked to end"
    outcome = evidence.outcome if evidence.of_this_start(restarts) else None
    if outcome is None:
        return ""
    return {
        "done": "its work is done, and its hosts are being freed",
        "interrupted": f"it has saved its work and is to be continued ({outcome.reason})",
    }.get(outcome.outcome, outcome.reason)


def _running(evidence: Evidence, job: SlurmJob | None) -> Verdict:
    restarts = None if job is None else job.restarts
    if not evidence.of_this_start(restarts):
        sentence = "it was asked to end" if evidence.cancelled else "its ranks have not begun yet"
        return Verdict(State.STOPPING if evidence.cancelled else State.STARTING, sentence)
    if evidence.outcome is not None or evidence.cancelled:
        return Verdict(State.STOPPING, _stopping(evidence, restarts))
    beat = evidence.heartbeat
    if beat is None or beat.phase == "starting":
        return Verdict(State.STARTING)
    return Verdict(State.RUNNING, "a checkpoint is being written" if beat.phase == "saving" else "")


def _ended(evidence: Evidence, job: SlurmJob, state: State) -> Verdict:
    """Slurm says that the job has ended; `state` is how, by its word alone."""
    outcome = evidence.outcome if evidence.of_this_start(job.restarts) else None
    said = _slurm_end(job)
    if outcome is not None and outcome.outcome == "done":
        if state is State.DONE:
            return Verdict(State.DONE)
        return Verdict(
            State.UNKNOWN, f"attempt {evidence.number} says that it is done, but {said}; check with `maehpc verify`"
        )
    if evidence.cancelled:
        return Verdict(State.CANCELLED)
    if outcome is not None and outcome.outcome in ("failed", "refused"):
        return Verdict(State.FAILED, outcome.reason or said)
    if outcome is not None and outcome.outcome == "interrupted" and state is not State.CANCELLED:
        return Verdict(State.FAILED, f"it saved its work and was not continued ({said}); `maehpc resume` goes on")
    if state is State.DONE:
        begun = f"attempt {evidence.number} left no word of its end" if evidence.number else "no rank ever began"
        return Verdict(State.UNKNOWN, f"{said}, but {begun}")
    if state is State.CANCELLED:
        return Verdict(State.CANCELLED, "cancelled through Slurm")
    return Verdict(State.FAILED, said + ("" if evidence.number else ", before any rank had begun"))


def _forgotten(evidence: Evidence) -> Verdict:
    """Slurm answers, and knows nothing of the job: what it left has the last word."""
    outcome = evidence.outcome if evidence.of_this_start(None) else None
    if outcome is not None and outcome.outcome == "done":
        return Verdict(State.DONE)
    if evidence.cancelled:
        return Verdict(State.CANCELLED)
    if outcome is not None and outcome.outcome in ("failed", "refused"):
        return Verdict(State.FAILED, outcome.reason)
    if outcome is not None and outcome.outcome == "interrupted":
        return Verdict(
            State.UNKNOWN, "it saved its work to be continued, and Slurm no longer knows it; `maehpc resume` goes on"
        )
    if evidence.number == 0:
        return Verdict(State.UNKNOWN, "Slurm no longer knows it, and no rank ever began")
    return Verdict(State.UNKNOWN, "neither Slurm nor the job says how it ended")


def _as_recorded(evidence: Evidence) -> Verdict:
    """Slurm does not answer: only an end that the newest attempt recorded is known."""
    outcome = evidence.outcome if evidence.of_this_start(None) else None
    if outcome is not None and outcome.outcome == "done":
        return Verdict(State.DONE)
    if outcome is not None and outcome.outcome in ("failed", "refused"):
        return Verdict(State.FAILED, outcome.reason)
    if outcome is not None and outcome.outcome == "interrupted":
        return Verdict(State.UNKNOWN, "it saved its work; whether it was continued, only Slurm could say")
    return Verdict(State.UNKNOWN, "only Slurm could say")


def judge_local(evidence: Evidence, alive: bool | None, here: str, waits: str = "") -> Verdict:
    """The state of a job that submitit's local executor runs.

    Args:
        evidence: what the job left.
        alive: whether its controller lives on this host; None where that cannot be seen from this host.
        here: name of this host.
        waits: what its controller waits for, before the ranks are started; "" where they were.
    """
    if alive:
        if waits and not evidence.cancelled:
            return Verdict(State.CONTINUING if evidence.number else State.WAITING, waits)
        outcome = evidence.outcome if evidence.of_this_start(None) else None
        if outcome is not None and outcome.outcome == "interrupted" and outcome.requeue and not evidence.cancelled:
            return Verdict(State.CONTINUING, outcome.reason)
        return _running(evidence, None)
    outcome = evidence.outcome if evidence.of_this_start(None) else None
    if outcome is not None and outcome.outcome == "done":
        return Verdict(State.DONE)
    if evidence.cancelled and alive is False:
        return Verdict(State.CANCELLED)
    if outcome is not None and outcome.outcome in ("failed", "refused"):
        return Verdict(State.FAILED, outcome.reason)
    if alive is None and evidence.of_this_start(None) and evidence.attempt is not None:
        return Verdict(State.UNKNOWN, f"only {' '.join(evidence.attempt.hosts)} could say; this is {here}")
    if alive is None and evidence.cancelled:  # whoever asked for the end had found the controller
        return Verdict(State.CANCELLED)
    if alive is None:
        return Verdict(
            State.UNKNOWN, f"no rank began, and its controller is not on {here}: it ended, or belongs to another host"
        )
    if outcome is not None and outcome.outcome == "interrupted":
        return Verdict(State.FAILED, "it saved its work and was not continued; `maehpc resume` goes on")
    return Verdict(State.FAILED, "its processes are gone and left no word of their end")
