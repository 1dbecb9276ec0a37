"""What a Slurm site is like: its configuration, the rules of its partitions, whose account one may use.

`maehpc.launch.slurm` asks about jobs; here is what only a person who sets up a profile wants to know.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from dataclasses import dataclass

from maehpc.launch import slurm
from maehpc.launch.slurm import SlurmError
from maehpc.launch.slurm_formats import Partition, number_in, seconds_in

NAMED_COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo", "scancel", "srun")


@dataclass(frozen=True)
class Rules:
    """A partition with what sinfo does not tell of it.

    Attributes:
        partition: as sinfo tells it.
        preempt_mode: off, requeue, cancel, suspend …: what happens to its jobs when others come first.
        grace_s: seconds between the signal of a preemption and the kill.
        default_time_min: wall time of a job that names none; None where it is the longest.
        accounts: that may use it; empty where all may.
        qos: that may use it; empty where all may.
        max_nodes: hosts of one job; None where unlimited.
    """

    partition: Partition
    preempt_mode: str = "off"
    grace_s: int = 0
    default_time_min: int | None = None
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    max_nodes: int | None = None


@dataclass(frozen=True)
class Association:
    """An account that this user may charge."""

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str


def missing_commands() -> list[str]:
    """Commands of Slurm that are not on the PATH."""
    return [name for name in NAMED_COMMANDS if shutil.which(name) is None]


def _answer(*words: str) -> str:
    """What a command prints.

    Raises:
        SlurmError: it is absent, fails, or does not answer in time.
    """
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=slurm.TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{' '.join(words[:3])} cannot be asked ({error})") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:200] or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(words[:3])} failed: {said}")
    return done.stdout


def version() -> str:
    """Slurm's version, such as 22.05.8.

    Raises:
        SlurmError: it does not tell.
    """
    return _answer("sinfo", "--version").split()[-1]


def config() -> dict[str, str]:
    """Every setting of `scontrol show config`.

    Raises:
        SlurmError: the controller does not answer.
    """
    pairs = (line.partition("=") for line in _answer("scontrol", "show", "config").splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def rules() -> list[Rules]:
    """All partitions.

    Raises:
        SlurmError: the controller does not answer.
    """
    details = parse_partitions(_answer("scontrol", "-o", "show", "partition"))
    return [_with_details(partition, details.get(partition.name, {})) for partition in slurm.partitions()]


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """`scontrol -o show partition`: fields by partition."""
    found = {}
    for line in text.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" in fields:
            found[fields["PartitionName"]] = fields
    return found


def _with_details(partition: Partition, fields: dict[str, str]) -> Rules:
    def names(key: str) -> tuple[str, ...]:
        value = fields.get(key, "ALL")
        return () if value in ("ALL", "(null)", "N/A", "") else tuple(value.split(","))

    default_s = seconds_in(fields.get("DefaultTime", ""))
    return Rules(
        partition,
        preempt_mode=fields.get("PreemptMode", "off").lower(),
        grace_s=number_in(fields.get("GraceTime", "")) or 0,
        default_time_min=None if default_s is None else default_s // 60,
        accounts=names("AllowAccounts"),
        qos=names("AllowQos"),
        max_nodes=number_in(fields.get("MaxNodes", "")),
    )


def associations() -> list[Association] | None:
    """Accounts of this user; None where the site has no accounting, or does not say.

    A site without accounting has no accounts to choose from either.
    """
    if shutil.which("sacctmgr") is None:
        return None
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
        columns = "account,partition,qos,defaultqos"
        text = _answer("sacctmgr", "-nP", "show", "associations", f"user={user}", f"format={columns}")
    except (SlurmError, KeyError):
        return None
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 3]
    return [
        Association(account, partition, tuple(word for word in qos.split(",") if word), default)
        for account, partition, qos, default in rows
    ]


def gpus(gres: str) -> tuple[int, str | None]:
    """GPUs of a partition's smallest host, and their type where all are of one.

    Args:
        gres: as sinfo tells it, such as "gpu:a100:4(S:0-1)"; several kinds of hosts with blanks between.
    """
    kinds = gres.split() or [""]
    counts, types = [], set()
    for kind in kinds:
        found = re.findall(r"\bgpu(?::([A-Za-z_][\w.-]*))?:(\d+)", kind)
        counts.append(sum(int(count) for _, count in found))
        types |= {name for name, _ in found}
    return min(counts), types.pop() if len(types) == 1 and "" not in types else None
