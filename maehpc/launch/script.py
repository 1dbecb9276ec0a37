"""The batch script of a job.

submitit writes the script: its header, the place of the logs, and the line that starts the ranks. What it would start
there (a pickled function that swallows SIGTERM and requeues on rank 0 alone) is replaced by our own command:

    # setup      modules, variables, the snapshot of the code on PYTHONPATH
    srun … python -u -m maehpc.launch.worker FOLDER
    # teardown   python -m maehpc.launch.after FOLDER CODE: requeue, go on as a new job, or end
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path

from submitit.core.core import PicklingExecutor
from submitit.slurm.slurm import SlurmExecutor

from maehpc.errors import InputError
from maehpc.launch.profile import Container, SlurmProfile
from maehpc.launch.record import COMMENT, JobRecord

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_NAME = 120


class BatchExecutor(SlurmExecutor):
    """submitit's Slurm executor with our own command; it pickles nothing, and needs no srun to show a script."""

    def __init__(self, folder: Path) -> None:
        # SlurmExecutor's own refuses to be made where there is no srun, which --dry-run does not need.
        PicklingExecutor.__init__(self, folder)
        self.python = shlex.quote(sys.executable)

    def text(self, command: str) -> str:
        """The script that runs a line of the shell on every rank."""
        return self._make_submission_file_text(command, "")

    def words(self, script: Path) -> list[str]:
        """The command line that submits a script."""
        return self._make_submission_command(script)

    def job_id(self, output: str) -> str | None:
        """The job's id in sbatch's answer, None where there is none."""
        return self._get_job_id_from_submission_command(output) if re.search(r"job [0-9]+", output) else None


def _memory(gigabytes: float) -> str:
    return f"{math.ceil(gigabytes * 1024)}M" if gigabytes else "0"


def _header(record: JobRecord, profile: SlurmProfile, token: str, dependency: str | None) -> dict[str, object]:
    """Parameters of submitit's script, and of sbatch."""
    more: dict[str, object] = {
        "signal": f"USR2@{profile.signal_lead_s}",  # submitit's own follows a variable of the environment
        "requeue" if profile.requeue.enabled else "no-requeue": True,
        "chdir": record.directory or record.results,
    }
    if dependency:
        # A failed job can be resumed, and those that wait for it are then pointed at its new number.
        more["kill-on-invalid-dep"] = "no"
    if record.workers_per_node:
        more["no-kill"] = True  # a pool goes on with the hosts that are left
    if profile.reservation:
        more["reservation"] = profile.reservation
    more |= {key.replace("_", "-"): value for key, value in profile.sbatch.items() if value is not False}
    gpus = f"{profile.gpu_type}:" if profile.gpu_type else ""
    fewer = record.min_nodes is not None
    by_gres = profile.gpu_request == "gres"
    return {
        "job_name": _UNSAFE.sub("_", f"maehpc-{record.experiment}-{record.stage}")[:_LONGEST_NAME],
        "comment": COMMENT + token,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "time": record.time_min,
        "nodes": f"{record.min_nodes}-{record.nodes}" if fewer else record.nodes,
        # With this, sbatch asks for as many tasks as the fewest hosts hold, and Slurm gives no more of them.
        "ntasks_per_node": None if fewer else record.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "gpus_per_node": f"{gpus}{profile.gpus_per_node}" if profile.gpus_per_node and not by_gres else None,
        "gres": f"gpu:{gpus}{profile.gpus_per_node}" if profile.gpus_per_node and by_gres else None,
        "mem": None if profile.mem_gb is None else _memory(profile.mem_gb),
        "mem_per_cpu": None if profile.mem_per_cpu_gb is None else _memory(profile.mem_per_cpu_gb),
        "mem_per_gpu": None if profile.mem_per_gpu_gb is None else _memory(profile.mem_per_gpu_gb),
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "nodelist": profile.nodelist,
        "exclusive": profile.exclusive or None,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
        "dependency": dependency,
        "array_parallelism": profile.array_parallelism,
        "wckey": None,  # sites that use these keys refuse submitit's
        "additional_parameters": more,
    }


def _setup(record: JobRecord, profile: SlurmProfile) -> list[str]:
    """Lines before the ranks start."""
    lines = [f"module load {shlex.join(profile.modules)}"] if profile.modules else []
    lines += profile.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    if profile.interface:
        interface = shlex.quote(profile.interface)
        lines.append(f"export NCCL_SOCKET_IFNAME={interface} GLOO_SOCKET_IFNAME={interface}")
    if profile.scratch:
        lines.append(f'export TMPDIR="{profile.scratch}"')
    code = shlex.quote(record.code)
    lines += [
        # Code comes from the snapshot: neither from the folder that the job begins in nor from an installed package.
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        "export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1",
        'export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"',
    ]
    if profile.cpus_per_task:
        lines.append('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun no longer takes it from sbatch')
    lines.append("trap : TERM USR1 USR2  # what is meant for the ranks must not end this shell before its last line")
    return lines


def _mounts(container: Container, record: JobRecord) -> list[str]:
    """Folders that a container sees besides its own.

    Raises:
        InputError: a path cannot be written in a list of mounts.
    """
    wanted = {Path(path) for path in (record.results, record.packs, record.code, record.directory) if path}
    own = sorted(str(path) for path in wanted if not wanted & set(path.parents))
    for path in own:
        if "," in path or ":" in path:
            raise InputError(f"{path} cannot be mounted in a container: a comma or colon separates mounts; rename it")
    return [*(f"{path}:{path}" for path in own), *container.mounts]


def _in_container(profile: SlurmProfile, record: JobRecord) -> tuple[list[str], list[str]]:
    """Words for srun, and words before the interpreter."""
    container = profile.container
    if container is None:
        return [], []
    mounts = _mounts(container, record)
    # An image's own PYTHONPATH would win over the job's.
    code = ["env", f"PYTHONPATH={record.code}", "PYTHONSAFEPATH=1"]
    if container.kind == "pyxis":
        image, mounted = f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"
        return [image, mounted, f"--container-workdir={record.directory or record.results}", *container.arguments], code
    gpus = ["--nv"] if profile.gpus_per_node and profile.device != "cpu" else []
    bound = [word for mount in mounts for word in ("--bind", mount)]
    return [], ["apptainer", "exec", *gpus, *bound, *container.arguments, container.image, *code]


def interpreter(profile: SlurmProfile) -> str:
    """What the ranks run with."""
    return profile.python or ("python3" if profile.container else sys.executable)


def _teardown(job: Path, profile: SlurmProfile, to_srun: list[str], before: list[str]) -> list[str]:
    """Lines after the ranks have ended; the first must see srun's exit code."""
    container = profile.container
    if container is None or container.after_inside:
        alone = ["srun", "--nodes=1", "--ntasks=1", "--overlap", *to_srun] if to_srun else []
        words = [*alone, *before, interpreter(profile)]
    else:
        words = [container.host_python or sys.executable]
    after = shlex.join([*words, "-m", "maehpc.launch.after", str(job)])
    return [
        "code=$?",
        "trap '' TERM USR1 USR2  # the last line takes signals when it is ready to",
        f'exec {after} "$code"',
    ]


def _when_a_rank_ends(record: JobRecord) -> list[str]:
    """Ranks that compute one thing together end together; hosts of a pool do not."""
    return ["--kill-on-bad-exit=0", "--no-kill"] if record.workers_per_node else ["--kill-on-bad-exit=1"]


def _tasks(record: JobRecord) -> list[str]:
    """What sbatch was not told of the ranks where Slurm may give fewer hosts."""
    return [f"--ntasks-per-node={record.tasks_per_node}"] if record.min_nodes is not None else []


def script_text(
    job: Path,
    record: JobRecord,
    profile: SlurmProfile,
    token: str,
    dependency: str | None = None,
    members: int | None = None,
) -> str:
    """The whole script.

    Args:
        job: the job's folder; of an array, its first member's.
        record: what was asked for.
        profile: where.
        token: of this submission.
        dependency: what sbatch's option of that name is given.
        members: size of the array; None for a single job.

    Raises:
        InputError: a path cannot be mounted.
    """
    to_srun, before = _in_container(profile, record)
    executor = BatchExecutor(job / "logs")
    executor.update_parameters(
        **_header(record, profile, token, dependency),
        setup=_setup(record, profile),
        teardown=_teardown(job, profile, to_srun, before),
        srun_args=["--open-mode=append", *_when_a_rank_ends(record), *_tasks(record), *to_srun, *profile.srun],
    )
    if members is not None:
        executor.parameters["map_count"] = members
    command = [*before, interpreter(profile), "-u", "-m", "maehpc.launch.worker", str(job)]
    return executor.text(shlex.join(command)) + "\n"
