"""Handing jobs to the scheduler once, and finding those again whose client did not live to write down the answer.

    intent.json (a token) ──► sbatch --comment maehpc:TOKEN ──► accepted.json (the job's id)

Whoever meets an intent without an answer looks the token up before anything is submitted again. sbatch inherits a lock
that lies beside the intent: while it lives on without its client, others wait for it and only then look.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from maehpc import files
from maehpc.errors import InputError, RunError
from maehpc.launch import slurm
from maehpc.launch.profile import LocalProfile, SlurmProfile, parse_profile
from maehpc.launch.record import COMMENT, Accepted, JobFolder, JobRecord, Submission
from maehpc.launch.snapshot import verify_snapshot
from maehpc.launch.states import State, translate
from maehpc.ownership import turn

ARRAY_TOKEN = "array-"
"""Begins the token of a whole array; any other token is one job's own."""
LOOK_AGAIN_S = (0.0, 2.0, 4.0, 8.0, 8.0)
"""Seconds before each look for a job whose sbatch got no answer: a busy controller may take it in a little later."""
END_S = 90.0
"""Seconds that a job taken back has to end: Slurm's own default for a running one's grace is 30."""
_LOCK = "sbatch.lock"
_TURN = ".turn"


def submit(jobs: Sequence[JobFolder], dependency: str | None = None) -> list[Submission]:
    """Hands jobs to their scheduler; several are one array.

    Args:
        jobs: their records are written, and equal but for experiment and recipe.
        dependency: what sbatch's option of that name is given.

    Returns:
        Their submissions, accepted.

    Raises:
        InputError: refused; no intent is left.
        RunError: there is no telling whether it was taken; the same again looks first.
    """
    with turn(jobs[0].path / _TURN):
        return _submit(jobs, dependency)


def recover(job: JobFolder) -> Submission | None:
    """The newest submission that a scheduler took; where the client had died over it, its answer is found and recorded.

    Raises:
        RunError: the scheduler cannot be asked.
    """
    with turn(job.path / _TURN):
        return _recover(job)


def resubmit(job: JobFolder, dependency: str | None = None) -> Submission:
    """Hands a job to its scheduler once more, alone even where it was a member of an array, with the code it had.

    Jobs that wait for it wait for its new number from then on.

    Args:
        job: its folder.
        dependency: what it waits for; None for the jobs of its record that have not succeeded yet.

    Returns:
        Its submission; where it goes on already, because somebody else was faster, that one.

    Raises:
        InputError: refused.
        RunError: the snapshot is damaged, there is no telling whether it was taken, or it was cancelled meanwhile.
    """
    record = job.record()
    verify_snapshot(Path(record.code), record.code_digest)
    with turn(job.path / _TURN):
        there = _recover(job)
        if there is not None and not _is_named(there, dependency) and _goes_on(there):
            return there
        if dependency is None:
            dependency = open_dependency(record)
        (submission,) = _submit([job], dependency, alone=True)
    assert submission.accepted is not None
    if job.cancelled:  # whoever asked for the end may have looked for its number before it had this one
        give_up([submission])
        raise RunError(f"{job.label} was cancelled while it was submitted again; `maehpc resume` lets it go on")
    repoint_dependents(job, submission.accepted.job_id)
    return submission


def repoint_dependents(job: JobFolder, new_id: str) -> list[str]:
    """Lets the jobs that wait for an earlier submission of `job` wait for a newer one.

    Args:
        job: that was submitted again.
        new_id: its number now.

    Returns:
        Ids of the jobs that were changed.

    Raises:
        RunError: the scheduler refuses or cannot be asked.
    """
    changed = []
    for other in _jobs_after(job):
        submission = recover(other)
        if submission is None or submission.accepted is None or submission.accepted.scheduler != "slurm":
            continue
        waiting = slurm.show(submission.accepted.job_id)
        if waiting is None or translate(waiting.state) is not State.WAITING:
            continue
        expression = open_dependency(other.record(), {str(job.path): new_id})
        slurm.set_dependency(submission.accepted.job_id, expression or "")
        changed.append(submission.accepted.job_id)
    return changed


def _jobs_after(job: JobFolder) -> list[JobFolder]:
    """Jobs of the same results folder whose record says that they come after `job`."""
    results = job.path.parent.parent.parent
    found = []
    for path in sorted(results.glob("*/jobs/*/job.json")):
        with files.reading(path):
            mentioned = str(job.path).encode() in path.read_bytes()  # before reading a thousand records in full
        if mentioned and path.parent != job.path and str(job.path) in JobFolder(path.parent).record().after:
            found.append(JobFolder(path.parent))
    return found


def open_dependency(record: JobRecord, known: dict[str, str] | None = None) -> str | None:
    """sbatch's dependency for what a job still has to wait for; None where that is nothing.

    Args:
        record: of the job.
        known: ids of earlier jobs, by folder, that are known already.

    Raises:
        RunError: the scheduler cannot be asked.
    """
    ids = []
    for path in record.after:
        earlier = JobFolder(Path(path))
        if known and path in known:
            ids.append(known[path])
        elif not succeeded(earlier) and (submission := recover(earlier)) is not None and submission.accepted:
            ids.append(submission.accepted.job_id)
    for job_id in record.after_jobs:
        found = slurm.show(job_id)
        if found is not None and translate(found.state) is not State.DONE:
            ids.append(job_id)
    return f"afterok:{':'.join(ids)}" if ids else None


def succeeded(job: JobFolder) -> bool:
    """Whether a job's newest attempt says that it is done."""
    outcome = job.outcome(job.newest_attempt())
    return outcome is not None and outcome.outcome == "done"


def still_going(job: JobFolder) -> bool:
    """Whether a job waits, runs, or will be continued by its scheduler.

    Raises:
        RunError: the scheduler cannot be asked.
    """
    submission = recover(job)
    return submission is not None and _goes_on(submission)


def _goes_on(submission: Submission) -> bool:
    """Whether a submission that was accepted waits, runs, or will be continued by its scheduler."""
    assert submission.accepted is not None
    if submission.accepted.scheduler == "local":
        from maehpc.launch.local import controller_of

        return controller_of(submission.intent.token) is not None
    found = slurm.show(submission.accepted.job_id)
    return found is not None and not translate(found.state).ended


def _is_named(submission: Submission, dependency: str | None) -> bool:
    """Whether a dependency such as `afterany:12` is on that submission: then its own job asks for the next one."""
    assert submission.accepted is not None
    return submission.accepted.job_id in (dependency or "").split(":")


def give_up(submissions: Sequence[Submission]) -> None:
    """Takes back submissions that were accepted a moment ago.

    Raises:
        RunError: the scheduler cannot be asked, or the jobs do not end.
    """
    accepted = [submission.accepted for submission in submissions if submission.accepted is not None]
    ids = [one.job_id for one in accepted if one.scheduler == "slurm"]
    if ids:
        slurm.cancel(ids)
        deadline = time.monotonic() + END_S
        while any((job := slurm.show(job_id)) is not None and not translate(job.state).ended for job_id in ids):
            if time.monotonic() > deadline:
                raise RunError(f"jobs {' '.join(ids)} do not end; cancel them by hand with scancel")
            time.sleep(0.2)
    for one, submission in zip(accepted, submissions, strict=True):
        if one.scheduler == "local":
            _end_controller(int(one.job_id), submission.intent.token)


def _end_controller(pid: int, token: str) -> None:
    import psutil

    from maehpc.launch.local import controller_of

    if controller_of(token) == pid:
        process = psutil.Process(pid)
        process.terminate()
        try:
            process.wait(END_S)
        except psutil.TimeoutExpired as error:
            raise RunError(f"process {pid} does not end; end it by hand with kill") from error


def _new_token(array: bool) -> str:
    return (ARRAY_TOKEN if array else "") + uuid.uuid4().hex


def _submit(jobs: Sequence[JobFolder], dependency: str | None, alone: bool = False) -> list[Submission]:
    record = jobs[0].record()
    profile = parse_profile(record.profile, f"{jobs[0].path / 'job.json'}: profile")
    array = record.array is not None and not alone
    token = _new_token(array)
    files.make_folder(jobs[0].logs)
    submissions = [job.intend(token) for job in jobs]
    try:
        if isinstance(profile, SlurmProfile):
            job_id = _sbatch(jobs, record, profile, submissions[0], dependency, array)
            ids = [f"{job_id}_{index}" if array else job_id for index in range(len(jobs))]
        elif isinstance(profile, LocalProfile):
            from maehpc.launch import local

            assert len(jobs) == 1, "this machine has no arrays: jobs of a sweep wait for their turn"
            ids = [local.start(jobs[0], record, profile, token)]
        else:
            raise InputError("--cluster debug computes in the foreground; use `maehpc run`, or --cluster local")
    except InputError:
        for submission in submissions:
            shutil.rmtree(submission.folder)
        raise
    scheduler, logs = profile.kind, str(jobs[0].logs)
    return [
        job.accept(submission, Accepted(job_id=one, scheduler=scheduler, logs=logs))
        for job, submission, one in zip(jobs, submissions, ids, strict=True)
    ]


def _sbatch(
    jobs: Sequence[JobFolder],
    record: JobRecord,
    profile: SlurmProfile,
    submission: Submission,
    dependency: str | None,
    array: bool,
) -> str:
    """Writes the script and gives it to sbatch; the job's id."""
    from maehpc.launch.sbatch import UnclearError, hand_over
    from maehpc.launch.script import script_text

    members = len(jobs) if array else None
    text = script_text(jobs[0].path, record, profile, submission.intent.token, dependency, members)
    script = submission.folder / "script.sh"
    files.write_text(script, text)
    try:
        with _locked(submission.folder / _LOCK) as descriptor:
            return hand_over(script, text, record, (descriptor,))
    except UnclearError as error:
        for pause in LOOK_AGAIN_S:
            time.sleep(pause)
            job_id = slurm.find_comment(submission.intent.comment)
            if job_id is not None:
                return job_id
        raise RunError(
            f"{error}, and Slurm knows nothing of {jobs[0].label} yet; run the same command again when `scontrol ping` "
            f"says UP: it looks for the job before it submits one"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Holds a lock that a child process may inherit; it is free when all have ended that have it open."""
    with files.writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise files.write_error(path, error) from error
        yield descriptor
    finally:
        os.close(descriptor)


def _recover(job: JobFolder) -> Submission | None:
    submissions = job.submissions()
    if submissions and submissions[-1].accepted is None:
        submissions[-1] = _answered(job, submissions[-1])
    return next((one for one in reversed(submissions) if one.accepted is not None), None)


def _answered(job: JobFolder, submission: Submission) -> Submission:
    """A submission without a recorded answer, with the answer where there was one."""
    record = job.record()
    profile = parse_profile(record.profile, f"{job.path / 'job.json'}: profile")
    token = submission.intent.token
    array = record.array if token.startswith(ARRAY_TOKEN) else None
    first = job if array is None else JobFolder(Path(array.folders[0]))
    if isinstance(profile, LocalProfile):
        from maehpc.launch.local import controller_of

        pid = controller_of(token)
        job_id = None if pid is None else str(pid)
    else:
        with ExitStack() as held:
            if first != job:
                held.enter_context(turn(first.path / _TURN))  # its client may be about to run sbatch
            of_first = (one.folder for one in first.submissions() if one.intent.token == token)
            lock = next(of_first, submission.folder) / _LOCK
            if lock.exists():
                held.enter_context(turn(lock))  # sbatch may have outlived its client, and not have asked yet
            job_id = slurm.find_comment(COMMENT + token)
        job_id = f"{job_id}_{array.index}" if job_id is not None and array is not None else job_id
    if job_id is None:
        job_id = began_as(job, job.submissions())
    if job_id is None:
        return submission
    scheduler = "local" if isinstance(profile, LocalProfile) else "slurm"
    return job.accept(submission, Accepted(job_id=job_id, scheduler=scheduler, logs=str(first.logs)))


def began_as(job: JobFolder, submissions: Sequence[Submission]) -> str | None:
    """The id of the newest start that none of its submissions explains: Slurm may have forgotten a job that ran."""
    known = {submission.accepted.job_id for submission in submissions if submission.accepted is not None}
    attempt = job.attempt(job.newest_attempt())
    return attempt.job_id if attempt is not None and attempt.job_id not in known else None


_GPUS = re.compile(r"\bgpu(?::[^:,\s(]+)?:(\d+)")
"""The number in `gpu:4`, `gpu:a100:4(S:0-1)`, as sinfo writes a host's GPUs."""


def check_site(profile: SlurmProfile, nodes: int, time_min: int) -> None:
    """Refuses what Slurm would take and never start, and says so where Slurm is not there, before anything is written.

    Args:
        profile: where.
        nodes: hosts asked for.
        time_min: wall time asked for, minutes.

    Raises:
        InputError: there is no Slurm, it does not answer, or the partition is too small.
    """
    if shutil.which("sbatch") is None:
        from maehpc.launch.sbatch import no_sbatch

        raise no_sbatch()
    try:
        partitions = slurm.partitions()
    except slurm.SlurmError as error:
        raise InputError(f"nothing was submitted: {error}") from error
    named = (profile.partition or "").split(",")
    asked = [one for one in partitions if (one.name in named if profile.partition else one.default)]
    if not asked:
        return  # hidden from sinfo, or wrong: sbatch will tell
    largest = max(asked, key=lambda one: one.nodes)
    if nodes > largest.nodes:
        raise InputError(
            f"--nodes {nodes}: partition {largest.name} has {largest.nodes} hosts; give at most so many, or another "
            f"--partition ({', '.join(one.name for one in partitions)})"
        )
    gpus = [int(count) for one in asked for count in _GPUS.findall(one.gres)]
    if gpus and profile.gpus_per_node > max(gpus):
        raise InputError(
            f"--gpus-per-node {profile.gpus_per_node}: the hosts of partition {asked[0].name} have {max(gpus)}; give "
            f"at most so many, and more --nodes"
        )
    limits = [one.max_time_min for one in asked]
    longest = max((limit for limit in limits if limit is not None), default=0)
    if None not in limits and time_min > longest:
        raise InputError(
            f"--time {time_min} min: partition {asked[0].name} allows {longest} min; give a shorter time (the job "
            f"requeues itself and goes on), or another --partition"
        )
