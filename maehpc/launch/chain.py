"""Submitting a planned chain: what is there already is taken, what is missing submitted, what is refused taken back.

A chain is compared as a whole with the jobs that the experiment has. What waits or runs with the same record is the
same submission, met again after its client had died or was called twice: it is taken as it is, and only what is missing
is submitted. Anything else that is at work on the same stage is in the way, and told.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from maehpc import files
from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.launch import submission
from maehpc.launch.plan import EXPLAIN, Request, Step, check_request, steps_of
from maehpc.launch.profile import SlurmProfile
from maehpc.launch.record import (
    Accepted,
    ArrayMember,
    JobFolder,
    JobRecord,
    Submission,
    explaining,
    jobs_of,
    next_number,
    pooled_numbers,
)
from maehpc.launch.snapshot import Snapshot, discard_snapshot, take_snapshot
from maehpc.ownership import turn

_LOCK = ".submit.lock"
_INCOMPARABLE = {"command", "directory", "array", "numbers"}
"""Of two records: what does not make them different jobs."""


@dataclass(frozen=True)
class Handed:
    """A job that a scheduler has.

    Attributes:
        job: its folder.
        accepted: the scheduler's answer.
        found: whether it had been submitted before.
    """

    job: JobFolder
    accepted: Accepted
    found: bool


@dataclass(frozen=True)
class _Match:
    """What an experiment has of a planned step.

    Attributes:
        kind: new: nothing that could be taken; going: the same, at work; done: the same, finished; unsubmitted: the
            same, written down by a client that did not come to submit it.
        jobs: their folders, one a member; none where new.
    """

    kind: Literal["new", "going", "done", "unsubmitted"]
    jobs: tuple[JobFolder, ...] = ()


def _matches(request: Request, steps: Sequence[Step]) -> list[_Match]:
    """Compares the plan with the jobs that are there.

    Raises:
        InputError: another job is at work on one of the stages.
        RunError: the scheduler cannot be asked.
    """
    matches: list[_Match] = []
    _refuse_other_pools(request, steps)
    for number, step in enumerate(steps):
        if number == 0:
            planned = [_after_request(request, record) for record in step.records]
        elif matches[-1].jobs:
            planned = [_after(record, job) for record, job in zip(step.records, matches[-1].jobs, strict=True)]
        else:
            planned = []  # it comes after a job that is not there yet: nothing can be the same
        matches.append(_match(request, step, planned))
    if not any(match.kind in ("going", "unsubmitted") for match in matches):
        return [_Match("new") for _ in matches]  # what is done is found by the stages themselves
    return matches


def _refuse_other_pools(request: Request, steps: Sequence[Step]) -> None:
    """Looks for jobs that explain one of the experiments beside another's, and for those of experiments beside ours.

    Raises:
        InputError: one is at work, or waits.
    """
    ours = {one for step in steps if step.stage == EXPLAIN for record in step.records for one in record.works_on}
    if not ours:
        return
    first = {member.experiment.root.name for member in request.members}
    for job, record in explaining(request.results):
        if record.experiment in first:
            continue  # looked at as the same job, or another
        both = ours & record.works_on
        if both and job not in request.after and submission.recover(job) is not None and submission.still_going(job):
            name = min(both)[0]
            raise InputError(
                f"{job.label} explains {name} already; wait for it, end it with `maehpc cancel {job.label}`, or leave "
                f"{name} out"
            )


def _after(record: JobRecord, job: JobFolder) -> JobRecord:
    return record.model_copy(update={"after": (str(job.path),)})


def _after_request(request: Request, record: JobRecord) -> JobRecord:
    return record.model_copy(
        update={"after": tuple(str(job.path) for job in request.after), "after_jobs": request.after_jobs}
    )


def _match(request: Request, step: Step, planned: Sequence[JobRecord]) -> _Match:
    found: list[tuple[JobFolder, str]] = []
    for number, (member, record) in enumerate(zip(request.members, step.records, strict=True)):
        candidate = _newest_like(member.experiment, record)
        if candidate is None or candidate in request.after:
            continue
        job, there = candidate, candidate.record()
        difference = _difference(there, planned[number]) if planned else "what it comes after"
        taken = submission.recover(job)
        if taken is None:
            if difference is None:
                found.append((job, "unsubmitted"))
        elif submission.succeeded(job):
            if difference is None:
                found.append((job, "done"))
        elif submission.still_going(job):
            if difference is not None:
                raise InputError(_in_the_way(job, difference))
            found.append((job, "going"))
        elif submission.succeeded(job) and difference is None:  # it has ended between the two questions
            found.append((job, "done"))
    if not found:
        return _Match("new")
    kinds = {kind for _, kind in found}
    jobs = tuple(job for job, _ in found)
    whole = len(found) == len(request.members)
    if whole and kinds == {"unsubmitted"} and _one_array(jobs, request.array):
        return _Match("unsubmitted", jobs)
    if whole and kinds <= {"going", "done"} and _one_array(jobs, request.array):
        return _Match("going" if "going" in kinds else "done", jobs)
    going = next((job for job, kind in found if kind == "going"), None)
    if going is not None:
        raise InputError(f"{going.label} is submitted already, in another sweep; leave its value out of --array")
    return _Match("new")


def _one_array(jobs: Sequence[JobFolder], array: bool) -> bool:
    if not array:
        return True
    folders = tuple(str(job.path) for job in jobs)
    return all((place := job.record().array) is not None and place.folders == folders for job in jobs)


def _newest_like(experiment: Experiment, record: JobRecord) -> JobFolder | None:
    """The experiment's newest job of the same stage on one of the same data sets."""
    for job in reversed(jobs_of(experiment)):
        there = job.record()
        if there.stage == record.stage and there.works_on & record.works_on:
            return job
    return None


def _difference(there: JobRecord, planned: JobRecord) -> str | None:
    """The first thing in which two records are different jobs; None where they are the same."""
    if there.code_digest != planned.code_digest:
        return "the code has changed since"
    if set(there.also) != set(planned.also):
        return f"it explains {', '.join([there.experiment, *there.also])}"
    return _first(there.model_dump(mode="json"), planned.model_dump(mode="json"), "")


def _first(there: Any, planned: Any, name: str) -> str | None:
    if isinstance(there, Mapping) and isinstance(planned, Mapping):
        keys = [key for key in {**there, **planned} if name or key not in _INCOMPARABLE]
        differences = (_first(there.get(key), planned.get(key), f"{name}.{key}".strip(".")) for key in keys)
        return next((difference for difference in differences if difference is not None), None)
    return None if there == planned else f"{name} is {there!r} there and {planned!r} here"


def _in_the_way(job: JobFolder, difference: str) -> str:
    taken = submission.recover(job)
    number = f" (job {taken.accepted.job_id})" if taken is not None and taken.accepted is not None else ""
    return (
        f"{job.label}{number} is at work on this stage already, and not the same: {difference}; wait for it, end it "
        f"with `maehpc cancel {job.label}`, or put this one behind it with --after {job.label}"
    )


@dataclass
class _Made:
    """What a call has made so far, to be taken back where Slurm refuses."""

    snapshot: Snapshot | None = None
    folders: list[Path] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)

    def take_back(self) -> None:
        """Removes all of it."""
        submission.give_up(self.submissions)
        for folder in reversed(self.folders):
            with files.writing(folder):
                shutil.rmtree(folder, ignore_errors=False) if folder.is_dir() else folder.unlink(missing_ok=True)
        if self.snapshot is not None:
            discard_snapshot(self.snapshot)


@contextmanager
def _gate(results: Path) -> Iterator[None]:
    """Keeps making a results folder and taking it back apart, where the file system locks folders."""
    anchor = next(path for path in results.absolute().parents if path.is_dir())
    try:
        descriptor = os.open(anchor, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # a folder that may be passed through and not read
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _alone(results: Path) -> Iterator[None]:
    """One submission at a time in a results folder; what this call made for that goes again where it is refused."""
    lock = results / _LOCK
    while True:
        with _gate(results):
            absent = [path for path in (lock, results, *results.parents) if not path.exists()]
            files.make_folder(results)
            try:
                mine = lock.open("a")
            except FileNotFoundError:
                continue  # a refused submission has just taken the folder back
            except OSError as error:
                raise files.write_error(lock, error) from error
        with mine, turn(lock):
            if not _is(mine.fileno(), lock):
                continue  # a refused submission had made this lock, and has taken it back
            try:
                yield
            except InputError:
                with _gate(results), suppress(OSError):  # somebody else has begun to use the folder
                    for path in absent:
                        path.unlink() if path == lock else path.rmdir()
                raise
            return


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def carry_out(request: Request) -> list[Handed]:
    """Submits what of a request is not submitted yet.

    Returns:
        All its jobs, in the order of the chain.

    Raises:
        InputError: a wish cannot be met or Slurm refused; nothing is left.
        RunError: there is no telling whether Slurm took a job, or it cannot be asked; the same again goes on.
    """
    check_request(request)
    profile = request.profile
    if isinstance(profile, SlurmProfile):
        submission.check_site(profile, profile.nodes, profile.time_min)
    with _alone(request.results):
        made = _Made()
        try:
            made.snapshot = take_snapshot(request.results)
            steps = steps_of(request, made.snapshot)
            matches = _matches(request, steps)
            handed: list[Handed] = []
            earlier: tuple[JobFolder, ...] = ()
            for step, match in zip(steps, matches, strict=True):
                jobs = match.jobs or _create(request, step, earlier, made)
                if match.kind in ("new", "unsubmitted"):
                    _hand_over(request, jobs, _dependency(request, earlier), made)
                for job in jobs:
                    taken = submission.recover(job)
                    assert taken is not None and taken.accepted is not None
                    handed.append(Handed(job, taken.accepted, match.kind in ("going", "done")))
                earlier = jobs
        except InputError:
            made.take_back()
            raise
    return handed


def _create(request: Request, step: Step, earlier: Sequence[JobFolder], made: _Made) -> tuple[JobFolder, ...]:
    """Makes the folders of a step's jobs and writes their records."""
    jobs = []
    pooled = pooled_numbers(request.results)
    for member in request.members:
        root = member.experiment.root
        new = [folder for folder in (root, root / "jobs") if not folder.exists()]
        made.folders += new[:1]
        job = JobFolder.create(member.experiment, step.stage, pooled.get(root.name, 0))
        made.folders += [] if new else [job.path]
        jobs.append(job)
    folders = tuple(str(job.path) for job in jobs)
    numbers = {one.experiment.root.name: next_number(one.experiment, pooled) for one in request.also}
    for number, (job, record) in enumerate(zip(jobs, step.records, strict=True)):
        record = _after(record, earlier[number]) if earlier else _after_request(request, record)
        if request.array:
            record = record.model_copy(update={"array": ArrayMember(index=number, folders=folders)})
        job.write_record(record.model_copy(update={"numbers": numbers}))
    return tuple(jobs)


def _hand_over(request: Request, jobs: Sequence[JobFolder], dependency: str | None, made: _Made) -> None:
    groups = [jobs] if request.array else [[job] for job in jobs]
    for group in groups:
        made.submissions += submission.submit(group, dependency)


def _dependency(request: Request, earlier: Sequence[JobFolder]) -> str | None:
    """sbatch's dependency of a step."""
    if not isinstance(request.profile, SlurmProfile):
        return None
    waited = [job for job in (earlier or request.after) if not submission.succeeded(job)]
    ids = [taken.accepted.job_id for job in waited if (taken := submission.recover(job)) and taken.accepted]
    if not earlier:
        ids += request.after_jobs
    if not ids:
        return None
    arrays = {job_id.partition("_")[0] for job_id in ids}
    if earlier and request.array and len(arrays) == 1 and all("_" in job_id for job_id in ids):
        return f"aftercorr:{arrays.pop()}"
    return f"afterok:{':'.join(ids)}"
