"""What Slurm's commands print: the formats they are asked for, and how answers are read. Pure: nothing is run here.

Formats are explicit ones that Slurm 20.11 to 24 know (JSON came later). Fields end with a control character, so that
names and comments may hold whatever people put into them.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

_RECORD = "\x1e"
_FIELD = "\x1f"


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


def _format(*fields: str) -> str:
    return _RECORD + "".join(field + _FIELD for field in fields)


def _records(text: str, fields: int) -> list[list[str]]:
    """Splits an answer to `_format`; what stands between records (names of clusters, warnings) is dropped."""
    found = [record.split(_FIELD) for record in text.split(_RECORD)[1:]]
    return [record[:fields] for record in found if len(record) > fields]


def seconds_in(text: str) -> int | None:
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


def number_in(text: str) -> int | None:
    """The whole number that a text begins with; None where there is none."""
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


QUEUE = _format("%i", "%T", "%r", "%N", "%k", "%L", "%P", "%j")
"""Of squeue, for `parse_queue`."""


def parse_queue(text: str) -> list[SlurmJob]:
    """The jobs that squeue lists."""
    return [
        SlurmJob(
            job_id=job_id,
            state=state,
            reason=_told(reason),
            nodes=expand_nodes(_told(nodes)),
            comment=_told(comment),
            time_left_s=seconds_in(left),
            partition=partition,
            name=name,
            source="squeue",
        )
        for job_id, state, reason, nodes, comment, left, partition, name in _records(text, 8)
    ]


DETAILS = f"JobArrayID:40{_FIELD},RestartCnt:12{_FIELD},exit_code:12{_FIELD}"
"""Of `squeue -O`, for `parse_details`: what QUEUE's letters cannot ask for."""


def parse_details(text: str) -> dict[str, tuple[int | None, int | None]]:
    """Restarts and exit codes by the ids of the jobs that `squeue -O` lists."""
    found: dict[str, tuple[int | None, int | None]] = {}
    for line in text.split("\n"):
        fields = [field.strip() for field in line.split(_FIELD)]
        if len(fields) >= 3:
            found[fields[0]] = (number_in(fields[1]), _exit_code(fields[2]))
    return found


TIME_LEFT = _format("%L")
"""Of squeue, for `parse_time_left`."""


def parse_time_left(text: str) -> int | None:
    """Seconds of wall time that one job has left; None where unlimited or not told."""
    records = _records(text, 1)
    return seconds_in(records[0][0]) if records else None


def parse_show(job_id: str, text: str) -> SlurmJob | None:
    """Reads `scontrol show job`, where free texts end their lines: fields are looked for where lines begin."""

    def field(pattern: str) -> str:
        found = re.findall(pattern, text, re.MULTILINE)
        return found[-1] if found else ""  # a name of several lines stands before all fields

    state = field(r"^ +JobState=(\S+)")
    if not state:
        return None
    limit, ran = seconds_in(field(r"^ +RunTime=.*\bTimeLimit=(\S+)")), seconds_in(field(r"^ +RunTime=(\S+)"))
    return SlurmJob(
        job_id=job_id,
        state=state,
        reason=_told(field(r"^ +JobState=\S+ Reason=(.*?)(?: FailedNode=\S+)?(?: Dependency=.*)?$")),
        nodes=expand_nodes(_told(field(r"^ +NodeList=(\S+)"))),
        restarts=number_in(field(r"^ +Requeue=.*\bRestarts=(\d+)")),
        comment=_told(field(r"^ +Comment=(.*)$")),
        time_left_s=None if limit is None or ran is None else max(0, limit - ran),
        partition=field(r"^ +Partition=(\S+)"),
        exit_code=_exit_code(field(r"^ +Requeue=.*\bExitCode=(\S+)")),
        name=text.partition(" JobName=")[2].rpartition("\n   UserId=")[0],
        source="scontrol",
    )


_ACCOUNTED = ("JobID", "State", "NodeList", "Partition", "Comment", "JobName", "ExitCode")
SACCT = ("-P", f"--delimiter={_FIELD}", f"--format={','.join(_ACCOUNTED)}")
"""Options of sacct, for `parse_sacct`."""


def parse_sacct(text: str) -> list[SlurmJob]:
    """The jobs that sacct lists."""
    lines: list[str] = []
    for line in text.split("\n"):
        if lines and lines[-1].count(_FIELD) < len(_ACCOUNTED) - 1:
            lines[-1] += "\n" + line  # a name or comment of several lines
        else:
            lines.append(line)
    found = []
    for line in lines:
        fields = line.split(_FIELD)
        if len(fields) != len(_ACCOUNTED):
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


PARTITIONS = _format("%P", "%a", "%D", "%l", "%G", "%c", "%m")
"""Of sinfo, for `parse_partitions`."""


def parse_partitions(text: str) -> list[Partition]:
    """The partitions that sinfo lists."""
    found: dict[str, Partition] = {}
    for starred, state, nodes, limit, gres, cpus, memory in _records(text, 7):
        name = starred.removesuffix("*")
        seconds = seconds_in(limit)
        new = Partition(
            name=name,
            default=starred.endswith("*"),
            state=state,
            nodes=number_in(nodes) or 0,
            max_time_min=None if seconds is None else seconds // 60,
            gres=_told(gres),
            cpus_per_node=number_in(cpus) or 0,
            memory_mb=number_in(memory) or 0,
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


def signal_name(exit_code: int) -> str | None:
    """Name of the signal that a shell's exit code tells of, such as SIGKILL for 137."""
    try:
        return signal.Signals(exit_code - 128).name if exit_code > 128 else None
    except ValueError:
        return None
