"""Ending jobs, and letting ended ones go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from maehpc.errors import InputError, MaehpcError, RunError
from maehpc.launch import slurm
from maehpc.launch.named import jobs_below
from maehpc.launch.record import JobFolder
from maehpc.launch.relations import superseded
from maehpc.launch.slurm import SlurmError
from maehpc.launch.states import State
from maehpc.launch.status import Reading, Row, controller_lives, read
from maehpc.launch.words import together

STOPPING_S = 120.0
"""Seconds that a job is given to end before it is submitted again."""

Tell = Callable[[str], None]
"""Takes one sentence for the user."""


def _silent(reading_silence: str | None) -> None:
    if reading_silence is not None:
        raise SlurmError(reading_silence)


def dependents(of: Sequence[Row], among: Sequence[Row]) -> list[Row]:
    """Jobs that wait, directly or not, for one of the given jobs to succeed; those first that wait directly."""
    gone = {str(row.job.path) for row in of}
    found: list[Row] = []
    while True:
        new = [
            row
            for row in among
            if row.record is not None and str(row.job.path) not in gone and gone & set(row.record.after)
        ]
        if not new:
            return found
        found += new
        gone |= {str(row.job.path) for row in new}


def cancel(jobs: Sequence[JobFolder], results: Path, tell: Tell) -> list[Row]:
    """Ends jobs, and those that wait for them and could never run.

    Args:
        jobs: which; those that have ended are told so and left as they are.
        results: folder of experiments, where jobs that wait for these are looked for.
        tell: is told what was done, a sentence a job.

    Returns:
        The jobs that were asked to end.

    Raises:
        SlurmError: Slurm could not be asked, or refused.
        RunError: a local job belongs to another host.
    """
    everything = list(dict.fromkeys([*jobs, *jobs_below(results)]))
    reading = read(everything)
    rows = {row.job: row for row in reading.rows}
    named = [rows[job] for job in jobs]
    if any(row.scheduler == "slurm" for row in named):
        _silent(reading.silence)
    elsewhere = [row for row in named if row.scheduler == "local" and row.state is State.UNKNOWN and row.attempt]
    ending = [row for row in named if row.active]
    waiting = [row for row in dependents(ending, reading.rows) if row.active and row not in ending]
    # First of all: a rank that is told to end must not ask to be continued.
    for row in (*ending, *waiting):
        row.job.mark_cancelled()
    slurm.cancel(_slurm_ids([*waiting, *ending]))  # what waits goes first, or it might start
    for row in (*waiting, *ending):
        if row.scheduler == "local":
            _end_controllers(row.job)
    for row in named:
        if row in ending:
            tell(f"{row.job.label}: asked to end (it was {row.state}){_for_all(row)}")
        elif row.state.ended:
            tell(f"{row.job.label}: it has ended already ({row.state})")
        elif row not in elsewhere:
            tell(f"{row.job.label}: nothing to end; {row.sentence or row.state}")
    for row in waiting:
        tell(f"{row.job.label}: asked to end, since it waits for a job that will not succeed{_for_all(row)}")
    if elsewhere:
        names = " ".join(row.job.label for row in elsewhere)
        raise RunError(f"{names}: {elsewhere[0].sentence}; cancel it there")
    return [*ending, *waiting]


def _for_all(row: Row) -> str:
    """What the end of a pool means for the experiments that were not named; "" for another job."""
    words = together(row.record)
    return f"; {words}, and ends for all of them" if words else ""


def _slurm_ids(rows: Sequence[Row]) -> list[str]:
    """Ids of all submissions of these jobs: one may just be handing over to the next."""
    found = []
    for row in rows:
        if row.scheduler == "slurm":
            submitted = [submission.accepted.job_id for submission in row.job.submissions() if submission.accepted]
            # An id of long ago may be another job's by now: the last two alone can be alive.
            found += list(dict.fromkeys([*submitted[-2:], *([row.job_id] if row.job_id else [])]))
    return found


def _end_controllers(job: JobFolder) -> None:
    for submission in job.submissions():
        if submission.accepted is not None and submission.accepted.scheduler == "local":
            _end_controller(submission.accepted.job_id, submission.intent.token)


def _end_controller(job_id: str, token: str) -> None:
    """Asks a local job's controller, and so its ranks, to end; nobody else who may have got its process id."""
    with suppress(ProcessLookupError, ValueError):
        descriptor = os.pidfd_open(int(job_id))
        try:
            if controller_lives(job_id, token):  # the descriptor holds on to the process that was looked at
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        finally:
            os.close(descriptor)


def _once_stopped(jobs: Sequence[JobFolder], everything: list[JobFolder], tell: Tell) -> Reading:
    """What is known of all jobs, once those to be resumed have ended that were asked to a moment ago."""
    deadline, told = time.monotonic() + STOPPING_S, False
    while True:
        reading = read(everything)
        stopping = [row for row in reading.rows if row.job in jobs and row.state is State.STOPPING]
        if not stopping or time.monotonic() > deadline:
            return reading
        if not told:
            tell(f"{stopping[0].job.label}: waiting for its end ({stopping[0].sentence or stopping[0].state})")
            told = True
        time.sleep(1.0)


def resume(
    jobs: Sequence[JobFolder], results: Path, tell: Tell, every: bool = False, of: str | None = None
) -> list[JobFolder]:
    """Lets jobs go on: submits ended ones again, as they were, and releases held ones.

    Args:
        jobs: which, in the order in which they depend on each other.
        results: folder of experiments.
        tell: is told what was done, a sentence a job.
        every: whether an experiment was named and not each job: those that need nothing are passed over.
        of: that experiment, where there is one: a pool is passed over, too, if a later job has taken its place there.

    Returns:
        The jobs that were submitted again or released.

    Raises:
        InputError: a job that was named goes on by itself, is done, needs an earlier one that has not succeeded, or
            works on what another is at work on.
        SlurmError: Slurm could not be asked, or refused.
    """
    folders = dict.fromkeys([results.absolute(), *(job.path.parents[2] for job in jobs)])
    everything = list(dict.fromkeys([*jobs, *(job for folder in folders for job in jobs_below(folder))]))
    reading = _once_stopped(jobs, everything, tell)
    rows = {row.job: row for row in reading.rows}
    named = [rows[job] for job in jobs]
    if any(row.scheduler == "slurm" for row in named):
        _silent(reading.silence)
    if every:
        replaced = superseded(named, of)
        named = [row for row in named if _wants(row) and row.job.path not in replaced]
    by_folder = {str(row.job.path): row for row in reading.rows}
    going = {str(row.job.path) for row in named}
    from maehpc.launch.submission import open_dependency

    for row in named:  # all of them before any is touched
        _refuse(row, by_folder, going)
        _refuse_beside_another(row, reading.rows)
    for row in named:
        if row.state is State.HELD:
            _release(row)
            tell(f"{row.job.label}: job {row.job_id} was released")
        elif row.never:
            assert row.job_id is not None
            expression = open_dependency(row.job.record()) or ""
            slurm.set_dependency(row.job_id, expression)
            ids = expression.partition(":")[2].split(":")
            others = f"job {' and '.join(ids)}" if expression else "no other job"
            tell(f"{row.job.label}: job {row.job_id} waits for {others} now")
        else:
            tell(f"{row.job.label}: {_again(row)}")
    if not named:
        tell("there is nothing to resume: no job has failed, was cancelled, is held or unknown")
    return [row.job for row in named]


def _wants(row: Row) -> bool:
    """Whether a job needs a person to go on."""
    return (not row.active and row.state is not State.DONE) or row.state is State.HELD or row.never


def _refuse(row: Row, rows: dict[str, Row], going: set[str]) -> None:
    """Refuses what cannot be resumed.

    Raises:
        InputError: told why.
    """
    label = row.job.label
    if row.record is None:
        raise InputError(row.sentence)
    if row.state is State.DONE:
        raise InputError(f"{label} is done; submit it anew to compute it again")
    if row.active and row.state is not State.HELD and not row.never:
        told = f" ({row.sentence})" if row.sentence else ""
        fix = "wait until it has ended" if row.state is State.STOPPING else "it goes on by itself"
        raise InputError(f"{label} is {row.state}{told}; {fix}")
    if row.scheduler == "local" and row.state is State.UNKNOWN and row.attempt:
        raise InputError(f"{label}: {row.sentence}; resume it there")
    for folder in row.record.after:
        earlier = rows.get(folder)
        if folder in going or (earlier is not None and (earlier.active or earlier.state is State.DONE)):
            continue
        name = JobFolder(Path(folder)).label
        state = earlier.state if earlier is not None else "gone"
        raise InputError(f"{label} needs {name}, which is {state}; resume that one first, or the whole experiment")


def _refuse_beside_another(row: Row, rows: Sequence[Row]) -> None:
    """Refuses a job while another one is at work on the same stage of one of its data sets, and neither waits for the
    other: the lock on that folder or store would end whichever comes second.

    Raises:
        InputError: there is one.
    """
    assert row.record is not None
    ordered = {row.job, *(one.job for one in dependents([row], rows))}
    for other in rows:
        if not other.active or other.record is None or other.job in ordered:
            continue
        if (other.job.path.parents[2], other.record.stage) != (row.job.path.parents[2], row.record.stage):
            continue
        both = row.record.works_on & other.record.works_on
        if both and row not in dependents([other], rows):
            name, number = other.job.label, f"job {other.job_id}, " if other.job_id else ""
            raise InputError(
                f"{row.job.label} would work on {'/'.join(min(both))} as {name} ({number}{other.state}) does already; "
                f"wait for that one, or end it with `maehpc cancel {name}`"
            )


def _release(row: Row) -> None:
    assert row.job_id is not None
    if not slurm.release(row.job_id):
        raise RunError(
            f"{row.job.label}: Slurm does not release job {row.job_id} ({row.sentence}); ask the site's support"
        )


def _again(row: Row) -> str:
    """Submits a job again; tells what came of it."""
    from maehpc.launch.submission import resubmit, still_going

    if still_going(row.job):  # its submission was broken off, and the scheduler had taken it
        return "it had been submitted, and goes on"
    was_cancelled = row.job.cancelled
    row.job.unmark_cancelled()
    try:
        submission = resubmit(row.job)
    except MaehpcError:
        if was_cancelled:
            row.job.mark_cancelled()
        raise
    assert submission.accepted is not None
    words = together(row.record)
    told = f"submitted again as job {submission.accepted.job_id} (it was {row.state})"
    return f"{told}; {words}" if words else told
