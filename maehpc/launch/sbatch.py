"""Running sbatch, and what its refusals mean."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from maehpc.errors import InputError
from maehpc.launch.record import JobRecord
from maehpc.launch.script import BatchExecutor
from maehpc.launch.slurm import SlurmError

SBATCH_TIMEOUT_S = 100.0
"""Seconds sbatch may take: a busy controller lets it wait, and it asks again on its own for a while."""

_KEPT = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_WCKEY": "wckey",
}
"""A person's own defaults that hold where a profile leaves the choice; sbatch lets them win over the script."""
_FOREIGN = re.compile(r"SLURM_(?!CONF$)\w*|SLURMD_\w+|SBATCH_\w+|SRUN_\w+|SUBMITIT_\w+|PMIX?_\w+|SALLOC_\w+")


def clean_environment(environment: Mapping[str, str], script: str, code: str) -> dict[str, str]:
    """What sbatch may see: nothing of an allocation around it, and a person's defaults only where the script is silent.

    Args:
        environment: of this process.
        script: its text.
        code: the snapshot, which the script itself puts on PYTHONPATH.
    """
    given = set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    kept = {
        name: value
        for name, value in environment.items()
        if not _FOREIGN.fullmatch(name) or (name in _KEPT and _KEPT[name] not in given)
    }
    paths = [path for path in kept.pop("PYTHONPATH", "").split(":") if path and path != code]
    return kept | ({"PYTHONPATH": ":".join(paths)} if paths else {})


class UnclearError(SlurmError):
    """sbatch ended without telling whether Slurm took the job."""


def hand_over(script: Path, text: str, record: JobRecord, held: Sequence[int] = ()) -> str:
    """Gives a script to sbatch.

    Args:
        script: its file.
        text: what the file holds.
        record: of the job.
        held: descriptors that sbatch keeps open, so that whoever waits for their locks also waits for sbatch.

    Returns:
        The job's id.

    Raises:
        InputError: Slurm refused.
        UnclearError: there is no telling whether Slurm took it.
    """
    executor = BatchExecutor(script.parent)
    try:
        done = subprocess.run(
            executor.words(script),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SBATCH_TIMEOUT_S,
            env={**clean_environment(os.environ, text, record.code), "LC_ALL": "C"},
            cwd=record.results,  # Slurm's own default for --chdir, which the script sets
            pass_fds=tuple(held),
            check=False,
        )
    except FileNotFoundError as error:
        raise no_sbatch() from error
    except OSError as error:
        raise InputError(f"sbatch cannot be run ({error.strerror or error}); check Slurm's installation") from error
    except subprocess.TimeoutExpired as error:
        raise UnclearError(f"sbatch gave no answer within {SBATCH_TIMEOUT_S:.0f} s") from error
    out, told = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    job_id = executor.job_id(out)
    if job_id is not None:
        return job_id
    if done.returncode == 0 or done.returncode < 0 or _UNCLEAR.search(told):
        raise UnclearError(f"sbatch ended without a job's number ({_last(told or out) or f'exit {done.returncode}'})")
    raise refusal(told or out, record)


def no_sbatch() -> InputError:
    """The sentence where Slurm is not installed."""
    return InputError(
        "there is no sbatch on the PATH, so --cluster cannot be a Slurm profile here; run this on a login node of the "
        "cluster, or give --cluster local"
    )


# Of a controller that cannot be contacted only "connect failure" says that it heard nothing.
_UNCLEAR = re.compile(
    r"timed out|zero bytes|connection reset|unexpected message|communications? error|(send|receive|shutdown) failure",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"^(sbatch: )?(error: )?(Batch job submission failed: )?")

_REFUSALS: tuple[tuple[str, str], ...] = (
    (
        r"unable to contact slurm controller|could not establish a configuration|connection refused|no route to host",
        "down",
    ),
    (r"munge|authentication|credential", "munge"),
    (
        r"invalid partition|partition name",
        "--partition {partition}: Slurm knows no such partition; choose one of `sinfo -s`",
    ),
    (
        r"group not permitted|not in the list of allowed|partition.*not (permitted|allowed)|access.permission denied",
        "--partition {partition}: you may not use it; choose another of `sinfo -s`, or ask for access",
    ),
    (
        r"invalid account|account/partition combination",
        "--account {account}: Slurm knows no such account for you; see `sacctmgr show associations user=$USER`",
    ),
    (r"invalid qos", "--qos {qos}: Slurm knows no such quality of service for you; choose one of `sacctmgr show qos`"),
    (
        r"SubmitJob|MaxSubmit|GrpSubmit|too many jobs",
        "your quota of submitted jobs is used up; wait until some have ended, or give another --qos",
    ),
    (
        r"QOS\w*|Assoc\w*(Limit|Max)|accounting/QOS policy|Association",
        "your quota does not allow it; ask for less with --nodes, --gpus-per-node or --time, or give another --qos",
    ),
    (r"time limit|invalid --time|time specification", "--time {time} min: longer than allowed; give a shorter one"),
    (
        r"node count|more processors|too many nodes|node configuration is not available|partition configuration",
        "--nodes {nodes} --gpus-per-node {gpus}: no hosts of the partition give that (see also the profile's "
        "cpus_per_task, mem_gb and nodelist); ask for less",
    ),
    (r"generic resource|gres", "gpus_per_node, gpu_type: Slurm knows no such GPUs; see Gres in `scontrol show node`"),
    (r"feature", "constraint: {constraint}: no host has these features; see `sinfo -o %f`"),
    (r"memory", "mem_gb, mem_per_cpu_gb, mem_per_gpu_gb: no host can give that much; ask for less"),
    (r"cpu count|cpus", "cpus_per_task: no host can give that many CPUs to each task; ask for fewer"),
    (r"node name", "nodelist, exclude: Slurm knows no such host; see `sinfo -N`"),
    (r"reservation", "reservation: Slurm knows no such reservation for you; see `scontrol show reservation`"),
    (r"dependency", "--after: Slurm does not know that job; give one that `squeue` shows"),
    (r"wckey", "sbatch.wckey: this site asks for another; see `sacctmgr show wckeys`"),
    (r"array", "--array: more members than the site allows; see MaxArraySize in `scontrol show config`"),
    (r"(unrecognized|unknown) option|invalid option|invalid .*specification", "sbatch: one of the profile's options"),
)


def _last(text: str) -> str:
    lines = [_PREFIX.sub("", line.strip()) for line in text.splitlines() if line.strip()]
    limit = next((line for line in lines if re.fullmatch(r"(QOS|Assoc)\w+", line)), None)
    return limit or (lines[-1] if lines else "")


def refusal(told: str, record: JobRecord) -> InputError:
    """One sentence for what sbatch wrote when it refused.

    Args:
        told: its standard error.
        record: of the job.
    """
    profile = record.profile
    said = _last(told)
    for pattern, sentence in _REFUSALS:
        if not re.search(pattern, told, re.IGNORECASE):
            continue
        if sentence == "down":
            return InputError("Slurm's controller does not answer, so nothing was submitted; try again when it is up")
        if sentence == "munge":
            return InputError(f"Slurm did not accept this host's credential ({said}); ask the site's support")
        filled = sentence.format(
            partition=profile.get("partition") or "(none)",
            account=profile.get("account") or "(none)",
            qos=profile.get("qos") or "(none)",
            constraint=profile.get("constraint"),
            time=record.time_min,
            nodes=record.nodes,
            gpus=profile.get("gpus_per_node"),
        )
        return InputError(f"{filled} (Slurm: {said})")
    return InputError(f"Slurm refused the job: {said}; change the profile or the options and submit again")
