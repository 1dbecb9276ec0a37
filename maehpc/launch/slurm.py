"""The scheduler's commands: the only module that runs squeue, scontrol, sacct, sinfo and scancel.

Everything is asked for in explicit formats that Slurm 20.11 to 24 know (JSON came later). Fields end with a control
character, so that names and comments may hold whatever people put into them.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from maehpc.errors import RunError

TIMEOUT_S = 15.0
"""Seconds a command may take: Slurm's own clients give up after about ten."""

_RECORD = "\x1e"
_FIELD = "\x1f"
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


@dataclass(frozen=True)
class SlurmJob:
    """What the scheduler says of one job.

    Attributes:
        job_id: "12", or "12_3" for a member of an array.
        state: the scheduler's full word, such as RUNNING.
        reason: why it waits or ended; "" where none is told.
        nodes: names of its hosts.
        restarts: how many times it was started again; None where not told.
        comment: what the submission wrote beside it.
        time_left_s: seconds of wall time left; None where unlimited or not told.
        partition: its partition.
        exit_code: of the batch script, as a shell has it (128 + signal); None where not told.
        name: its name.
        source: the command that answered.
    """

    job_id: str
    state: str
    reason: str = ""
    nodes: tuple[str, ...] = ()
    restarts: int | None = None
    comment: str = ""
    time_left_s: int | None = None
    partition: str = ""
    exit_code: int | None = None
    name: str = ""
    source: Literal["squeue", "scontrol", "sacct"] = "squeue"


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo tells it.

    Attributes:
        name: its name.
        default: whether jobs that name none go there.
        state: up, down, drain or inact.
        nodes: hosts in it.
        max_time_min: longest wall time, minutes; None where unlimited.
        gres: generic resources of its hosts, such as "gpu:4"; several kinds of hosts are joined with blanks.
        cpus_per_node: of its smallest host.
        memory_mb: of its smallest host.
    """

    name: str
    default: bool
    state: str
    nodes: int
    max_time_min: int | None
    gres: str
    cpus_per_node: int
    memory_mb: int


def available() -> bool:
    """Whether there is a squeue on the PATH."""
    return shutil.which("squeue") is not None


@dataclass(frozen=True)
class _Answer:
    command: str
    code: int
    out: str
    err: str

    def error(self, doing: str) -> SlurmError:
        """The sentence for an answer that is no use."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        said = (
            re.sub(r"^(slurm_load_jobs |slurm_\w+ )?error: ", "", re.sub(rf"^{self.command}: ", "", lines[-1]))
            if (lines)
            else f"exit code {self.code}"
        )
        if _SILENT.search(self.err):
            return SlurmError(
                f"{self.command} got no answer from Slurm's controller while {doing} ({said}); "
                "wait until `scontrol ping` says UP and run the same command again"
            )
        return SlurmError(f"{self.command} failed while {doing}: {said}; try it by hand, or ask the site's support")


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
    return _Answer(command, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def _batches(job_ids: Iterable[str]) -> list[list[str]]:
    ids = list(dict.fromkeys(job_ids))
    return [ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE)]


def _me() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container without the site's users
        return str(os.getuid())


def _format(*fields: str) -> str:
    return _RECORD + "".join(field + _FIELD for field in fields)


def _records(text: str, fields: int) -> list[list[str]]:
    """Splits an answer to `_format`; what stands between records (names of clusters, warnings) is dropped."""
    found = [record.split(_FIELD) for record in text.split(_RECORD)[1:]]
    return [record[:fields] for record in found if len(record) > fields]


def _seconds(text: str) -> int | None:
    """Seconds in Slurm's [days-]hours:minutes:seconds, minutes:seconds or minutes; None for words."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    assert first is not None
    if days is not None:
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return (first * 60 + (second or 0)) * 60 + third
    return first * 60 + (second or 0)


def _exit_code(text: str) -> int | None:
    """A shell's exit code from Slurm's CODE:SIGNAL, or from the plain wait status that `squeue -O` prints."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if match is None:
        return None
    if match[2] is None:
        code, by_signal = int(match[1]) >> 8, int(match[1]) & 127
    else:
        code, by_signal = int(match[1]), int(match[2])
    return 128 + by_signal if by_signal else code


def _told(text: str) -> str:
    """A field without the words that Slurm writes for nothing."""
    text = text.strip()
    return "" if text in {"None", "(null)", "N/A", "n/a", "None assigned", "Unknown"} else text


def _whole(text: str) -> int | None:
    match = re.match(r"\s*(\d+)", text)
    return int(match[1]) if match else None


def expand_nodes(text: str) -> tuple[str, ...]:
    """Names in one of Slurm's host lists: "n[1-3],gpu07" is n1, n2, n3, gpu07."""
    found: list[str] = []
    for word in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", text):
        parts = [
            _range(part[1:-1]) if part.startswith("[") else [part] for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", word)
        ]
        found += ["".join(combination) for combination in product(*parts)]
    return tuple(name for name in found if name)


def _range(text: str) -> list[str]:
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if dash and first.isdigit() and last.isdigit():
            found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        else:
            found.append(part)
    return found


_QUEUE = _format("%i", "%T", "%r", "%N", "%k", "%L", "%P", "%j")


def _parse_queue(text: str) -> list[SlurmJob]:
    return [
        SlurmJob(
            job_id=job_id,
            state=state,
            reason=_told(reason),
            nodes=expand_nodes(_told(nodes)),
            comment=_told(comment),
            time_left_s=_seconds(left),
            partition=partition,
            name=name,
            source="squeue",
        )
        for job_id, state, reason, nodes, comment, left, partition, name in _records(text, 8)
    ]


def queue(user: str | None = None, ended: bool = False) -> list[SlurmJob]:
    """Jobs of one person, members of arrays one by one.

    Args:
        user: whose; mine where None.
        ended: also those that have ended and that the controller still remembers (for MinJobAge, often five minutes).

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    states = ["-t", "all"] if ended else []
    answer = _run("listing the queue", "squeue", "-h", "-r", *states, "-u", user or _me(), "-o", _QUEUE)
    if answer.code:
        raise answer.error("listing the queue")
    return _parse_queue(answer.out)


def known(job_ids: Iterable[str]) -> list[SlurmJob]:
    """Those of the jobs, whoever's, that the controller still remembers, in the queue or ended.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    found: list[SlurmJob] = []
    doing = "asking for jobs"
    for batch in _batches(job_ids):
        answer = _run(doing, "squeue", "-h", "-r", "-t", "all", "-j", ",".join(batch), "-o", _QUEUE)
        if answer.code and not _FORGOTTEN.search(answer.err):
            raise answer.error(doing)
        found += _parse_queue(answer.out)
    return found


def with_details(jobs: Sequence[SlurmJob]) -> list[SlurmJob]:
    """The same jobs with their restarts and exit codes, which squeue's usual format cannot tell.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    found: dict[str, tuple[int | None, int | None]] = {}
    for batch in _batches(job.job_id for job in jobs):
        format_ = f"JobArrayID:40{_FIELD},RestartCnt:12{_FIELD},exit_code:12{_FIELD}"
        doing = "asking for restarts"
        answer = _run(doing, "squeue", "-h", "-r", "-t", "all", "-j", ",".join(batch), "-O", format_)
        if answer.code and not _FORGOTTEN.search(answer.err):
            raise answer.error(doing)
        for line in answer.out.split("\n"):
            fields = [field.strip() for field in line.split(_FIELD)]
            if len(fields) >= 3:
                found[fields[0]] = (_whole(fields[1]), _exit_code(fields[2]))
    return [
        replace(job, restarts=found[job.job_id][0], exit_code=found[job.job_id][1]) if job.job_id in found else job
        for job in jobs
    ]


def _parse_show(job_id: str, text: str) -> SlurmJob | None:
    """Reads `scontrol show job`, where free texts end their lines: fields are looked for where lines begin."""

    def field(pattern: str) -> str:
        found = re.findall(pattern, text, re.MULTILINE)
        return found[-1] if found else ""  # a name of several lines stands before all fields

    state = field(r"^ +JobState=(\S+)")
    if not state:
        return None
    limit, ran = _seconds(field(r"^ +RunTime=.*\bTimeLimit=(\S+)")), _seconds(field(r"^ +RunTime=(\S+)"))
    return SlurmJob(
        job_id=job_id,
        state=state,
        reason=_told(field(r"^ +JobState=\S+ Reason=(.*?)(?: FailedNode=\S+)?(?: Dependency=.*)?$")),
        nodes=expand_nodes(_told(field(r"^ +NodeList=(\S+)"))),
        restarts=_whole(field(r"^ +Requeue=.*\bRestarts=(\d+)")),
        comment=_told(field(r"^ +Comment=(.*)$")),
        time_left_s=None if limit is None or ran is None else max(0, limit - ran),
        partition=field(r"^ +Partition=(\S+)"),
        exit_code=_exit_code(field(r"^ +Requeue=.*\bExitCode=(\S+)")),
        name=text.partition(" JobName=")[2].rpartition("\n   UserId=")[0],
        source="scontrol",
    )


def show(job_id: str) -> SlurmJob | None:
    """One job, or None where the scheduler has forgotten it or never knew it.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    answer = _run(f"asking for job {job_id}", "scontrol", "show", "job", job_id)
    if answer.code == 0:
        return _parse_show(job_id, answer.out)
    if _FORGOTTEN.search(answer.err + answer.out):
        return None
    raise answer.error(f"asking for job {job_id}")


_SACCT = ("JobID", "State", "NodeList", "Partition", "Comment", "JobName", "ExitCode")


def _parse_sacct(text: str) -> list[SlurmJob]:
    lines: list[str] = []
    for line in text.split("\n"):
        if lines and lines[-1].count(_FIELD) < len(_SACCT) - 1:
            lines[-1] += "\n" + line  # a name or comment of several lines
        else:
            lines.append(line)
    found = []
    for line in lines:
        fields = line.split(_FIELD)
        if len(fields) != len(_SACCT):
            continue
        job_id, state, nodes, partition, comment, name, code = fields
        found.append(
            SlurmJob(
                job_id=job_id,
                state=state.split(" ")[0],  # "CANCELLED by 1000"
                reason=_told(state.partition(" ")[2]),
                nodes=expand_nodes(_told(nodes)),
                comment=_told(comment),
                partition=partition,
                exit_code=_exit_code(code),
                name=name,
                source="sacct",
            )
        )
    return found


def _sacct(doing: str, *words: str) -> list[SlurmJob] | None:
    if shutil.which("sacct") is None:
        return None
    answer = _run(doing, "sacct", "-X", "-n", "-P", f"--delimiter={_FIELD}", f"--format={','.join(_SACCT)}", *words)
    if _NO_ACCOUNTING.search(answer.err + answer.out):
        return None
    if answer.code:
        raise answer.error(doing)
    return _parse_sacct(answer.out)


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
        raise answer.error(doing)
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
    doing = f"setting what job {job_id} waits for"
    answer = _scontrol(doing, "update", f"JobId={job_id}", f"Dependency={expression}")
    if answer.code:
        raise answer.error(doing)


def cancel(job_ids: Iterable[str]) -> None:
    """Ends jobs, waiting or running; those that have ended already are no error.

    Raises:
        SlurmError: the scheduler refuses, or cannot be asked.
    """
    for batch in _batches(job_ids):
        answer = _run("cancelling jobs", "scancel", *batch)
        wrong = [line for line in answer.err.splitlines() if line.strip() and not _ENDED.search(line)]
        if wrong and (answer.code or _SILENT.search(answer.err)):
            raise replace(answer, err="\n".join(wrong)).error("cancelling jobs")


def time_left_s(job_id: str) -> int | None:
    """Seconds of wall time that a running job has left; None where unlimited or not known.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    doing = f"asking for the time left of job {job_id}"
    answer = _run(doing, "squeue", "-h", "-j", job_id, "-o", _format("%L"))
    if answer.code and not _FORGOTTEN.search(answer.err):
        raise answer.error(doing)
    records = _records(answer.out, 1)
    return _seconds(records[0][0]) if records else None


def _parse_partitions(text: str) -> list[Partition]:
    found: dict[str, Partition] = {}
    for starred, state, nodes, limit, gres, cpus, memory in _records(text, 7):
        name = starred.removesuffix("*")
        seconds = _seconds(limit)
        new = Partition(
            name=name,
            default=starred.endswith("*"),
            state=state,
            nodes=_whole(nodes) or 0,
            max_time_min=None if seconds is None else seconds // 60,
            gres=_told(gres),
            cpus_per_node=_whole(cpus) or 0,
            memory_mb=_whole(memory) or 0,
        )
        if name in found:  # hosts of several kinds have a line each
            old = found[name]
            new = replace(
                new,
                nodes=old.nodes + new.nodes,
                gres=" ".join(dict.fromkeys(word for word in (*old.gres.split(), new.gres) if word)),
                cpus_per_node=min(old.cpus_per_node, new.cpus_per_node),
                memory_mb=min(old.memory_mb, new.memory_mb),
            )
        found[name] = new
    return list(found.values())


def partitions() -> list[Partition]:
    """The partitions I may see.

    Raises:
        SlurmError: the scheduler cannot be asked.
    """
    doing = "listing the partitions"
    answer = _run(doing, "sinfo", "-h", "-o", _format("%P", "%a", "%D", "%l", "%G", "%c", "%m"))
    if answer.code:
        raise answer.error(doing)
    return _parse_partitions(answer.out)


def signal_name(exit_code: int) -> str | None:
    """Name of the signal that a shell's exit code tells of, such as SIGKILL for 137."""
    try:
        return signal.Signals(exit_code - 128).name if exit_code > 128 else None
    except ValueError:
        return None
