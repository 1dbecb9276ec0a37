"""What jobs do: their records, joined with what the scheduler says of all of them at once."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maehpc.errors import InputError
from maehpc.launch import slurm
from maehpc.launch.record import COMMENT, Accepted, Heartbeat, Intent, JobFolder, JobRecord, Submission
from maehpc.launch.slurm import SlurmError, SlurmJob
from maehpc.launch.states import (
    NEVER,
    Evidence,
    State,
    Verdict,
    judge_local,
    judge_slurm,
    not_submitted,
    translate,
)
from maehpc.launch.submission import ARRAY_TOKEN, succeeded

_LAST = ("done", "failed", "refused")
"""Outcomes after which nobody needs Slurm's word, where it has forgotten the job."""
_MOST_NAMES = 6
"""Of a pool's experiments, told in a sentence."""


@dataclass(frozen=True)
class Row:
    """One job as `maehpc status` shows it.

    Attributes:
        job: its folder.
        record: what was asked for; None where job.json cannot be read.
        scheduler: slurm, local or debug.
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
            "folder": str(self.job.path),
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


@dataclass
class _Known:
    """What a job's folder says of its submissions."""

    job: JobFolder
    record: JobRecord | None = None
    submissions: list[Submission] = field(default_factory=list)
    damage: str | None = None

    @property
    def scheduler(self) -> str:
        """slurm, local or debug."""
        accepted = [submission.accepted for submission in self.submissions if submission.accepted is not None]
        if accepted:
            return accepted[-1].scheduler
        return "slurm" if self.record is None else str(self.record.profile.get("kind", "slurm"))

    @property
    def began(self) -> bool:
        """Whether there was an attempt."""
        return self.job.newest_attempt() > 0

    @property
    def last_word(self) -> str | None:
        """How the newest attempt says that it ended."""
        try:
            outcome = self.job.outcome(self.job.newest_attempt())
        except InputError:  # told when the row is made
            return None
        return None if outcome is None else outcome.outcome

    def id_from(self, found: str, token: str) -> str:
        """This job's id, where the scheduler has `found` (of an array: the whole one's) under a submission's token."""
        array = self.record.array if self.record is not None and token.startswith(ARRAY_TOKEN) else None
        return found if array is None else f"{found}_{array.index}"


def _with_unrecorded(job: JobFolder, submissions: list[Submission]) -> list[Submission]:
    """The submissions, where the newest start tells of one whose client did not live to record the answer."""
    newest = submissions[-1] if submissions else Submission(0, job.path, Intent(token=""), None)
    if newest.accepted is not None:
        return submissions
    attempt = job.attempt(job.newest_attempt())
    known = {submission.accepted.job_id for submission in submissions if submission.accepted is not None}
    if attempt is None or attempt.job_id in known:
        return submissions
    accepted = Accepted(job_id=attempt.job_id, scheduler="slurm", logs=str(job.logs))
    return [*submissions[:-1], replace(newest, accepted=accepted)]


def _read(job: JobFolder) -> _Known:
    known = _Known(job)
    try:
        known.record = job.record()
        known.submissions = _with_unrecorded(job, job.submissions())
    except InputError as error:  # told in this job's row: the others must still be seen
        known.damage = str(error)
    return known


class Scheduler:
    """What Slurm says of a set of jobs: asked once, then looked up.

    Args:
        known: the jobs of interest.
    """

    def __init__(self, known: Sequence[_Known]) -> None:
        self.silence: str | None = None
        self._jobs: dict[str, SlurmJob] = {}
        mine = [one for one in known if one.scheduler == "slurm" and one.submissions]
        if not mine:
            return
        try:
            self._ask(mine)
        except SlurmError as error:
            self.silence = str(error)
            self._jobs = {}

    @property
    def answers(self) -> bool:
        """Whether Slurm could be asked."""
        return self.silence is None

    def _ask(self, known: list[_Known]) -> None:
        self._add(slurm.queue(ended=True))
        settled = [(_settle(one, self)[0], one) for one in known]
        ids = {newest.accepted.job_id: one for newest, one in settled if newest is not None and newest.accepted}
        missing = [job_id for job_id, one in ids.items() if job_id not in self._jobs and one.last_word not in _LAST]
        if missing:  # another person's, or forgotten
            self._add(slurm.known(missing))
            missing = [job_id for job_id in missing if job_id not in self._jobs]
        if missing:
            self._jobs |= slurm.accounting(missing) or {}
        # What the newest attempt left may be older than the newest start; and of an end the exit code is wanted.
        self._add(
            slurm.with_details(
                [
                    job
                    for job_id, one in ids.items()
                    if (job := self._jobs.get(job_id)) is not None
                    and job.source == "squeue"
                    and (
                        translate(job.state).ended
                        or one.last_word is not None
                        or (job.state == "PENDING" and one.began)
                    )
                ]
            )
        )

    def _add(self, jobs: Sequence[SlurmJob]) -> None:
        self._jobs |= {job.job_id: job for job in jobs}

    def find(self, submission: Submission) -> SlurmJob | None:
        """The job of a submission; None where Slurm doesn't know it.

        Ids begin again when a cluster is set up anew, so the comment, or else the name, must be ours too.
        """
        if submission.accepted is None:
            return None
        job = self._jobs.get(submission.accepted.job_id)
        if job is None:
            return None
        if job.comment.startswith(COMMENT):
            return job if job.comment == submission.intent.comment else None
        return job if job.name.startswith("maehpc") else None

    def by_comment(self, comment: str) -> str | None:
        """Id of the job (of an array: of the array) that carries a comment."""
        return next((job.job_id.partition("_")[0] for job in self._jobs.values() if job.comment == comment), None)


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


def _settle(known: _Known, scheduler: Scheduler) -> tuple[Submission | None, SlurmJob | None]:
    """The submission that counts (the newest that was accepted), and what Slurm says of it."""
    if not known.submissions:
        return None, None
    newest = known.submissions[-1]
    if newest.accepted is None and scheduler.answers and known.scheduler == "slurm":
        found = scheduler.by_comment(newest.intent.comment)
        if found is not None:
            accepted = Accepted(
                job_id=known.id_from(found, newest.intent.token), scheduler="slurm", logs=str(known.job.logs)
            )
            newest = replace(newest, accepted=accepted)
    if newest.accepted is None:
        newest = next((one for one in reversed(known.submissions) if one.accepted is not None), newest)
    return newest, scheduler.find(newest)


def _row(known: _Known, scheduler: Scheduler) -> Row:
    job, record = known.job, known.record
    if known.damage is not None:
        return Row(job, record, known.scheduler, None, State.UNKNOWN, known.damage)
    submission, said = _settle(known, scheduler)
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
        *_verdict(known, submission, evidence, said, scheduler),
        said=said,
        nodes=said.nodes if said and said.nodes else attempt.hosts if attempt else (),
        attempt=number,
        heartbeat=evidence.heartbeat,
    )


def _verdict(
    known: _Known, submission: Submission | None, evidence: Evidence, said: SlurmJob | None, scheduler: Scheduler
) -> tuple[State, str]:
    if submission is None or submission.accepted is None:
        verdict = not_submitted(submission is not None, scheduler.answers)
    elif known.scheduler == "slurm":
        verdict = judge_slurm(evidence, said, scheduler.answers)
    else:
        verdict = _local(known, submission, evidence)
    return verdict.state, " ".join(verdict.sentence.split())


def _local(known: _Known, submission: Submission, evidence: Evidence) -> Verdict:
    here = os.uname().nodename
    assert evidence.job_id is not None
    alive: bool | None = controller_lives(evidence.job_id, submission.intent.token)
    if not alive:
        began = evidence.attempt is not None and evidence.attempt.job_id == evidence.job_id
        hosts = evidence.attempt.hosts if began and evidence.attempt else ()
        alive = False if here in hosts else None
    return judge_local(evidence, alive, here, _waits(known, submission) if alive else "")


def _open(record: JobRecord | None) -> tuple[str, ...]:
    """Names of the jobs that a job comes after and that have not succeeded."""
    earlier = [JobFolder(Path(folder)) for folder in (record.after if record is not None else ())]
    return tuple(job.label for job in earlier if not succeeded(job))


def _waits(known: _Known, submission: Submission) -> str:
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
    found = [_read(job) for job in jobs]
    scheduler = scheduler or Scheduler(found)
    rows = []
    for known in found:
        try:
            rows.append(_row(known, scheduler))
        except InputError as error:
            rows.append(Row(known.job, known.record, known.scheduler, None, State.UNKNOWN, str(error)))
    return Reading(rows, scheduler)


def stuck(rows: Sequence[Row]) -> set[Path]:
    """Folders of jobs that wait, directly or not, for one that did not succeed: they never start by themselves."""
    found = {row.job.path for row in rows if row.never}
    while True:
        new = {
            row.job.path
            for row in rows
            if row.state is State.WAITING
            and row.record is not None
            and row.job.path not in found
            and any(Path(folder) in found for folder in row.record.after)
        }
        if not new:
            return found
        found |= new


def superseded(rows: Sequence[Row], of: str | None = None) -> set[Path]:
    """Folders of jobs that later ones replace: by stage and recipe, in each experiment that a job works on.

    Args:
        rows: the jobs.
        of: the one experiment that counts; None: all.
    """
    series: dict[tuple[Path, str], list[tuple[tuple[int, int], Path, dict[str, Any]]]] = {}
    for row in rows:
        if row.record is None:
            continue
        job, record = row.job, row.record
        for name, recipe in {job.experiment: record.recipe, **record.also}.items():
            if of in (None, name):
                number = job.number if name == job.experiment else record.numbers.get(name, 0)
                jobs = series.setdefault((job.path.parents[2] / name, record.stage), [])
                jobs.append(((number, job.number), job.path, recipe))
    replaced: set[Path] = set()
    needed: set[Path] = set()
    for jobs in series.values():
        later: list[dict[str, Any]] = []
        for _, path, recipe in sorted(jobs, key=lambda one: one[0], reverse=True):
            (replaced if recipe in later else needed).add(path)
            later.append(recipe)
    return replaced - needed


def worth_showing(rows: Sequence[Row]) -> list[Row]:
    """The rows shown without `--all`: what goes on, with all jobs of its experiment, and what wants a person.

    A failed or unknown job wants nobody once a later one has taken its place.
    """
    replaced = superseded(rows)
    lively = {row.job.path.parent for row in rows if row.active}
    wanting = (State.FAILED, State.UNKNOWN)
    return [
        row
        for row in rows
        if row.active or (row.job.path not in replaced and (row.job.path.parent in lively or row.state in wanting))
    ]


def progress(row: Row) -> str:
    """How far a job is, in words: "pretrain retina 120/800"."""
    beat = row.heartbeat
    if beat is None:
        return ""
    plain = (row.job.stage, "ending") if row.state.ended else (row.job.stage,)
    words = [beat.phase] if beat.phase not in plain else []
    if beat.parts:
        words.append(f"{len(beat.parts)} data sets")
    elif beat.dataset:
        words.append(beat.dataset)
    if beat.done is not None and beat.total is not None:
        words.append(f"{beat.done}/{beat.total}" + (" images" if beat.unit == "image" else ""))
    return " ".join(words)


def together(record: JobRecord | None, first: Collection[str] = ()) -> str:
    """Which experiments one pool explains, those of `first` before others; "" for a job of a single experiment."""
    if record is None or not record.also:
        return ""
    names = sorted(record.recipes, key=lambda name: name not in first)
    if len(names) > _MOST_NAMES:
        names[_MOST_NAMES - 1 :] = [f"{len(names) - _MOST_NAMES + 1} more"]
    return f"one pool explains {', '.join(names[:-1])} and {names[-1]}"


def parts(row: Row, of: Collection[str] = ()) -> list[str]:
    """What there is to tell of each data set that a running job works on, where the table does not tell it.

    Args:
        row: the job.
        of: experiments whose data sets are told, where one pool explains several; none: all.
    """
    beat = row.heartbeat if row.moving else None
    if beat is None:
        return []
    if of and row.record is not None and row.record.also:  # whose data sets are called EXPERIMENT/DATASET

        def own(name: str) -> bool:
            return name.partition("/")[0] in of

        beat = beat.model_copy(
            update={
                "parts": {name: part for name, part in beat.parts.items() if own(name)},
                "failures": {name: count for name, count in beat.failures.items() if own(name)},
            }
        )
    found = []
    for name, (done, total) in beat.parts.items():
        rate = beat.rates.get(name)
        words = [f"{name} {done}/{total}", *_failures(beat.failures.get(name))]
        if rate and done < total:
            words[1:1] = [f"{_rate(rate)} images/s", f"{duration((total - done) / rate)} left"]
        found.append(", ".join(words))
    if not beat.parts:
        found += [", ".join((name, *_failures(count))) for name, count in beat.failures.items()]
    return found


def _failures(count: int | None) -> list[str]:
    return [f"{count} failure{'s' * (count != 1)}"] if count else []


def _rate(rate: float) -> str:
    return f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"


def duration(seconds: float) -> str:
    """A time span for people: 0:00:42, 3:10:00, 2 d 04:00."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{days} d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def cells(row: Row) -> tuple[str, ...]:
    """The texts of `COLUMNS` for a job."""
    beat = row.heartbeat if row.moving else None
    last = row.heartbeat
    asked = "" if row.record is None else _nodes(row.record)
    rate = beat.images_per_second if beat else None
    return (
        row.job.label,
        row.job_id or "",
        str(row.state),
        asked,
        str(row.attempt) if row.attempt else "",
        progress(row),
        "" if rate is None else _rate(rate),
        "" if beat is None or beat.seconds_left is None else duration(beat.seconds_left),
        "" if last is None or last.loss is None else f"{last.loss:.4f}",
    )


def _nodes(record: JobRecord) -> str:
    return str(record.nodes) if record.min_nodes is None else f"{record.min_nodes}-{record.nodes}"


COLUMNS = ("job", "id", "state", "nodes", "attempt", "progress", "images/s", "left", "loss")
NUMBERS = frozenset({"nodes", "attempt", "images/s", "left", "loss"})
