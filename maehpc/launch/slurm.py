"""The scheduler's commands, run: questions about jobs, and what is to be done with them.

What is asked for and how answers are read stands in `slurm_formats`; `site` asks what else a site is like.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from maehpc.errors import RunError
from maehpc.launch.slurm_formats import (
    DETAILS,
    PARTITIONS,
    QUEUE,
    SACCT,
    TIME_LEFT,
    Partition,
    SlurmJob,
    parse_details,
    parse_partitions,
    parse_queue,
    parse_sacct,
    parse_show,
    parse_time_left,
)

TIMEOUT_S = 15.0
"""Seconds a command may take: Slurm's own clients give up after about ten."""

_AT_ONCE = 500
"""Job ids given to one command; a command line has a limited length."""

# SQUEUE_STATES, SCANCEL_NAME and the like stand for options that a person set for their own use of these commands.
_FOREIGN = re.compile(r"(SQUEUE|SACCT|SINFO|SCANCEL)_\w+|SLURM_TIME_FORMAT|SLURM_BITSTR_LEN|SCONTROL_\w+")
_FORGOTTEN = re.compile(r"invalid job[ _]?id|\bjob \S+ not found|no jobs? (in the system|found)", re.IGNORECASE)
_ENDED = re.compile(r"already (completing|completed)|job has already finished|invalid job[ _]?id", re.IGNORECASE)
_WAITS_AGAIN = re.compile(r"job is pending execution", re.IGNORECASE)
_SILENT = re.compile(
    r"unable to contact|connection refused|timed out|timeout|unable to establish|connection (reset|failure)"
    r"|no route to host|host unreachable|resource temporarily unavailable|protocol authentication|munge"
    r"|could not establish a configuration source|zero bytes|communication",
    re.IGNORECASE,
)
_NO_ACCOUNTING = re.compile(r"accounting storage is disabled|not running a supported accounting_storage", re.IGNORECASE)


class SlurmError(RunError):
    """A command of the scheduler failed for a reason that is not the user's input."""


def available() -> bool:
    """Whether there is a squeue on the PATH."""
    return shutil.which("squeue") is not None


@dataclass(frozen=True)
class _Answer:
    doing: str
    command: str
    code: int
    out: str
    err: str

    def error(self) -> SlurmError:
        """The sentence for an answer that is no use."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        said = (
            re.sub(r"^(slurm_load_jobs |slurm_\w+ )?error: ", "", re.sub(rf"^{self.command}: ", "", lines[-1]))
            if lines
            else f"exit code {self.code}"
        )
        if _SILENT.search(self.err):
            return SlurmError(
                f"{self.command} got no answer from Slurm's controller while {self.doing} ({said}); "
                "wait until `scontrol ping` says UP and run the same command again"
            )
        return SlurmError(
            f"{self.command} failed while {self.doing}: {said}; try it by hand, or ask the site's support"
        )


def _run(doing: str, command: str, *words: str) -> _Answer:
    """Runs a command of the scheduler.

    Args:
        doing: what for, for the sentence of an error.
        command: its name.
        words: its arguments.

    Raises:
        SlurmError: it is not there, or does not answer in time.
    """
    environment = {name: value for name, value in os.environ.items() if not _FOREIGN.fullmatch(name)}
    try:
        done = subprocess.run(
            [command, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            env={**environment, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command} on the PATH; run this on a host of the cluster (a login node), "
            "or load the module that brings Slurm's commands"
        ) from error
    except OSError as error:
        raise SlurmError(f"{command} cannot be run ({error.strerror or error}); check Slurm's installation") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command} got no answer from Slurm's controller within {TIMEOUT_S:.0f} s while {doing}; "
            "wait until `scontrol ping` says UP and run the same command again"
        ) from error
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return _Answer(doing, command, done.returncode, out, err)


def _batches(job_ids: Iterable[str]) -> list[list[str]]:
    ids = list(dict.fromkeys(job_ids))
    return [ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE)]


def _me() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container without the site's users
        return str(os.getuid())


def queue(user: str | None = None, ended: bool = False) -> list[SlurmJob]:
    """Jobs of one person, members of arrays one by one.

    Args:
        user: whose; mine where None.
        ended: also those that have ended and that the controller still remembers (for MinJobAge, often five minutes).

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    states = ["-t", "all"] if ended else []
    answer = _run("listing the queue", "squeue", "-h", "-r", *states, "-u", user or _me(), "-o", QUEUE)
    if answer.code:
        raise answer.error()
    return parse_queue(answer.out)


def known(job_ids: Iterable[str]) -> list[SlurmJob]:
    """Those of the jobs, whoever's, that the controller still remembers, in the queue or ended.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    found: list[SlurmJob] = []
    for batch in _batches(job_ids):
        answer = _run("asking for jobs", "squeue", "-h", "-r", "-t", "all", "-j", ",".join(batch), "-o", QUEUE)
        if answer.code and not _FORGOTTEN.search(answer.err):
            raise answer.error()
        found += parse_queue(answer.out)
    return found


def with_details(jobs: Sequence[SlurmJob]) -> list[SlurmJob]:
    """The same jobs with their restarts and exit codes, which squeue's usual format cannot tell.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    found: dict[str, tuple[int | None, int | None]] = {}
    for batch in _batches(job.job_id for job in jobs):
        answer = _run("asking for restarts", "squeue", "-h", "-r", "-t", "all", "-j", ",".join(batch), "-O", DETAILS)
        if answer.code and not _FORGOTTEN.search(answer.err):
            raise answer.error()
        found |= parse_details(answer.out)
    return [
        replace(job, restarts=found[job.job_id][0], exit_code=found[job.job_id][1]) if job.job_id in found else job
        for job in jobs
    ]


def show(job_id: str) -> SlurmJob | None:
    """One job, or None where the scheduler has forgotten it or never knew it.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    answer = _run(f"asking for job {job_id}", "scontrol", "show", "job", job_id)
    if answer.code == 0:
        return parse_show(job_id, answer.out)
    if _FORGOTTEN.search(answer.err + answer.out):
        return None
    raise answer.error()


def _sacct(doing: str, *words: str) -> list[SlurmJob] | None:
    if shutil.which("sacct") is None:
        return None
    answer = _run(doing, "sacct", "-X", "-n", *SACCT, *words)
    if _NO_ACCOUNTING.search(answer.err + answer.out):
        return None
    if answer.code:
        raise answer.error()
    return parse_sacct(answer.out)


def accounting(job_ids: Iterable[str]) -> dict[str, SlurmJob] | None:
    """The newest record of each job in the accounting database, or None where the site has none.

    Raises:
        SlurmError: there is one, and it cannot be asked.
    """
    found: dict[str, SlurmJob] = {}
    for batch in _batches(job_ids):
        jobs = _sacct("asking the accounting", "-j", ",".join(batch))
        if jobs is None:
            return None
        found |= {job.job_id: job for job in jobs}
    return found


def find_comment(comment: str) -> str | None:
    """Id of my job that carries exactly that comment; for an array the array's id; None where there is none.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    for job in queue(ended=True):
        if job.comment == comment:
            return job.job_id.partition("_")[0]
    jobs = _sacct("looking for a submission", "-u", _me(), "-S", "now-30days") or []
    for job in jobs:
        if job.comment == comment:
            return job.job_id.partition("_")[0]
    return None


def _scontrol(doing: str, *words: str) -> _Answer:
    answer = _run(doing, "scontrol", *words)
    if answer.code and _SILENT.search(answer.err):
        raise answer.error()
    return answer


def requeue(job_id: str) -> bool:
    """Puts a running or ended job back into the queue; False where the scheduler refuses (unknown, not requeueable).

    A job that is in the queue again already, since Slurm itself has just put it there, is no refusal.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    answer = _scontrol(f"putting job {job_id} back into the queue", "requeue", job_id)
    return answer.code == 0 or _WAITS_AGAIN.search(answer.err) is not None


def release(job_id: str) -> bool:
    """Lets a held job go; False where the scheduler refuses.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    return _scontrol(f"releasing job {job_id}", "release", job_id).code == 0


def set_dependency(job_id: str, expression: str) -> None:
    """Replaces what a waiting job waits for, such as "afterok:12:13"; "" for nothing.

    Raises:
        SlurmError: the scheduler refuses, or cannot be asked.
    """
    waits_for = f"Dependency={expression}"
    answer = _scontrol(f"setting what job {job_id} waits for", "update", f"JobId={job_id}", waits_for)
    if answer.code:
        raise answer.error()


def cancel(job_ids: Iterable[str]) -> None:
    """Ends jobs, waiting or running; those that have ended already are no error.

    Raises:
        SlurmError: the scheduler refuses, or cannot be asked.
    """
    for batch in _batches(job_ids):
        answer = _run("cancelling jobs", "scancel", *batch)
        wrong = [line for line in answer.err.splitlines() if line.strip() and not _ENDED.search(line)]
        if wrong and (answer.code or _SILENT.search(answer.err)):
            raise replace(answer, err="\n".join(wrong)).error()


def time_left_s(job_id: str) -> int | None:
    """Seconds of wall time that a running job has left; None where unlimited or not known.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    answer = _run(f"asking for the time left of job {job_id}", "squeue", "-h", "-j", job_id, "-o", TIME_LEFT)
    if answer.code and not _FORGOTTEN.search(answer.err):
        raise answer.error()
    return parse_time_left(answer.out)


def partitions() -> list[Partition]:
    """The partitions I may see.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    answer = _run("listing the partitions", "sinfo", "-h", "-o", PARTITIONS)
    if answer.code:
        raise answer.error()
    return parse_partitions(answer.out)
