"""What jobs do: their records, joined with what the scheduler says of all of them at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maehpc.errors import InputError
from maehpc.launch.inquiry import Known, Scheduler, look
from maehpc.launch.record import Heartbeat, JobFolder, JobRecord, Submission
from maehpc.launch.slurm_formats import SlurmJob
from maehpc.launch.states import NEVER, Evidence, State, Verdict, judge_local, judge_slurm, not_submitted
from maehpc.launch.submission import succeeded

IN_TERMINAL = "run"
"""Stands in a row where a job has its scheduler: what `maehpc run` works on, see `maehpc.launch.foreground`."""


@dataclass(frozen=True)
class Row:
    """One job, or run in a terminal, as `maehpc status` shows it.

    Attributes:
        job: its folder; of a run, the path of what it tells of itself, less the suffix.
        record: what was asked for; None of a run, and where job.json cannot be read.
        scheduler: slurm, local, debug, or run.
        job_id: the scheduler's, of the newest submission; None where there is none.
        state: ours.
        sentence: why it waits or ended; "" where the state tells enough.
        said: what Slurm says; None where it says nothing.
        nodes: names of the hosts of the newest attempt, or those that Slurm gave it.
        attempt: number of the newest; 0 before the first.
        heartbeat: how far the newest attempt is, or was.
    """

    job: JobFolder
    record: JobRecord | None
    scheduler: str
    job_id: str | None
    state: State
    sentence: str = ""
    said: SlurmJob | None = None
    nodes: tuple[str, ...] = ()
    attempt: int = 0
    heartbeat: Heartbeat | None = None

    @property
    def folder(self) -> Path:
        """Where it lies: the job's folder, or the experiment's of a run."""
        return self.job.path.parent.parent if self.scheduler == IN_TERMINAL else self.job.path

    @property
    def moving(self) -> bool:
        """Whether the heartbeat tells of work that goes on now."""
        return self.state is State.RUNNING

    @property
    def active(self) -> bool:
        """Whether the scheduler has it, so that it may still change by itself."""
        return not self.state.ended and self.state is not State.UNKNOWN

    @property
    def never(self) -> bool:
        """Whether it waits for a job that did not succeed."""
        return self.said is not None and self.said.reason == NEVER

    def as_json(self) -> dict[str, Any]:
        """Stable keys for scripts; what is not known is null. Times in seconds, rates in images a second."""
        beat = self.heartbeat
        return {
            "job": self.job.label,
            "folder": str(self.folder),
            "experiment": self.job.experiment,
            "also": [] if self.record is None else list(self.record.also),
            "stage": self.job.stage,
            "scheduler": self.scheduler,
            "job_id": self.job_id,
            "state": str(self.state),
            "sentence": self.sentence or None,
            "slurm_state": None if self.said is None else self.said.state,
            "slurm_reason": None if self.said is None else self.said.reason or None,
            "nodes_asked": None if self.record is None else self.record.nodes,
            "nodes": list(self.nodes),
            "attempt": self.attempt,
            "phase": None if beat is None else beat.phase,
            "dataset": None if beat is None else beat.dataset,
            "parts": {} if beat is None else {name: list(part) for name, part in beat.parts.items()},
            "rates": beat.rates if beat and self.moving else {},
            "failures": {} if beat is None else beat.failures,
            "done": None if beat is None else beat.done,
            "total": None if beat is None else beat.total,
            "unit": None if beat is None else beat.unit,
            "images_per_second": beat.images_per_second if beat and self.moving else None,
            "seconds_left": beat.seconds_left if beat and self.moving else None,
            "wall_seconds_left": self.said.time_left_s if self.said and self.moving else None,
            "loss": None if beat is None else beat.loss,
            "first_step_seconds": None if beat is None else beat.first_step_s,
            "sequence": None if beat is None else beat.sequence,
        }


@dataclass(frozen=True)
class Reading:
    """All jobs at one moment.

    Attributes:
        rows: as the jobs were given.
        scheduler: what Slurm said.
    """

    rows: list[Row]
    scheduler: Scheduler

    @property
    def silence(self) -> str | None:
        """Why Slurm could not be asked; None where it answered, or nothing had to be asked."""
        return self.scheduler.silence


def controller_lives(job_id: str, token: str) -> bool:
    """Whether a local job's controller lives on this host: the process must carry the submission's token."""
    try:
        words = Path(f"/proc/{int(job_id)}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    return token.encode() in words


def _row(known: Known, scheduler: Scheduler) -> Row:
    job, record = known.job, known.record
    if known.damage is not None:
        return Row(job, record, known.scheduler, None, State.UNKNOWN, known.damage)
    submission, said = scheduler.settle(known)
    # As Slurm is, a controller is asked for before its job's outcome is, which cannot be lacking then.
    alive = known.scheduler != "slurm" and submission is not None and _controller_lives(submission)
    number = job.newest_attempt()
    if number:
        # A listing makes network file systems look again for an outcome that was not there a moment ago.
        with_outcomes = job.path / "outcomes"
        if with_outcomes.is_dir():
            list(with_outcomes.iterdir())
    attempt = job.attempt(number) if number else None
    evidence = Evidence(
        job_id=submission.accepted.job_id if submission and submission.accepted else None,
        number=number,
        attempt=attempt,
        outcome=job.outcome(number) if number else None,
        heartbeat=job.heartbeat(number) if number else None,
        cancelled=job.cancelled,
        earlier=_open(record) if said is not None and said.state == "PENDING" else (),
    )
    return Row(
        job,
        record,
        known.scheduler,
        evidence.job_id,
        *_verdict(known, submission, evidence, said, alive, scheduler.answers),
        said=said,
        nodes=said.nodes if said and said.nodes else attempt.hosts if attempt else (),
        attempt=number,
        heartbeat=evidence.heartbeat,
    )


def _controller_lives(submission: Submission) -> bool:
    accepted = submission.accepted
    return accepted is not None and controller_lives(accepted.job_id, submission.intent.token)


def _verdict(
    known: Known,
    submission: Submission | None,
    evidence: Evidence,
    said: SlurmJob | None,
    controller_alive: bool,
    answers: bool,
) -> tuple[State, str]:
    if submission is None or submission.accepted is None:
        verdict = not_submitted(submission is not None, answers)
    elif known.scheduler == "slurm":
        verdict = judge_slurm(evidence, said, answers)
    else:
        verdict = _local(known, submission, evidence, controller_alive)
    return verdict.state, " ".join(verdict.sentence.split())


def _local(known: Known, submission: Submission, evidence: Evidence, controller_alive: bool) -> Verdict:
    here = os.uname().nodename
    alive: bool | None = controller_alive
    if not alive:
        began = evidence.attempt is not None and evidence.attempt.job_id == evidence.job_id
        hosts = evidence.attempt.hosts if began and evidence.attempt else ()
        alive = False if here in hosts else None
    return judge_local(evidence, alive, here, _waits(known, submission) if alive else "")


def _open(record: JobRecord | None) -> tuple[str, ...]:
    """Names of the jobs that a job comes after and that have not succeeded."""
    earlier = [JobFolder(Path(folder)) for folder in (record.after if record is not None else ())]
    return tuple(job.label for job in earlier if not succeeded(job))


def _waits(known: Known, submission: Submission) -> str:
    """What a local job's living controller waits for; "" once it has started ranks, which open their logs first."""
    assert submission.accepted is not None
    if (Path(submission.accepted.logs) / f"{submission.accepted.job_id}_0_log.out").exists():
        return ""
    earlier = _open(known.record)
    return f"waits for {' and '.join(earlier)}" if earlier else "waits for its turn among this machine's jobs"


def read(jobs: Sequence[JobFolder], scheduler: Scheduler | None = None) -> Reading:
    """The state of jobs now.

    Args:
        jobs: which.
        scheduler: what Slurm said of them a moment ago; asked now where None.
    """
    # Slurm is asked first: an outcome is written before the job ends, so what is read afterwards cannot lack it.
    found = [look(job) for job in jobs]
    scheduler = scheduler or Scheduler(found)
    rows = []
    for known in found:
        try:
            rows.append(_row(known, scheduler))
        except InputError as error:
            rows.append(Row(known.job, known.record, known.scheduler, None, State.UNKNOWN, str(error)))
    return Reading(rows, scheduler)
