"""From what a person asked for to jobs: the stages of a chain, the members of a sweep, and the scripts they would have.

Nothing is written here, and no scheduler is asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.launch.profile import LocalProfile, Profile, SlurmProfile, parse_profile
from maehpc.launch.record import ArrayMember, JobFolder, JobRecord, next_number, pooled_numbers
from maehpc.launch.snapshot import Snapshot, current_snapshot
from maehpc.recipes import Recipe

MOST_MEMBERS = 1000
"""Of a sweep; Slurm's own default for the size of an array is 1001."""
EXPLAIN = "explain"
"""The stage that a pool computes where a job would have several ranks."""
REPORT = "report"
"""The stage that aggregates a finished pipeline."""
REPORT_MIN = 60
"""Wall time of that, minutes."""


@dataclass(frozen=True)
class Member:
    """One experiment of a submission; a sweep has several.

    Attributes:
        experiment: its folder, absolute.
        recipe: what is computed.
    """

    experiment: Experiment
    recipe: Recipe


@dataclass(frozen=True)
class Request:
    """What a person asked for.

    Attributes:
        stage: pretrain, finetune, probe, explain or pipeline.
        members: one, or those of a sweep; each has jobs of its own.
        also: experiments that the first one's pool explains too, in the same job.
        profile: where, with the command line's own wishes in it.
        profile_name: as given.
        results: folder of experiments, absolute.
        packs: folder of packed data sets, absolute.
        command: words after `maehpc`.
        directory: where the client stands, absolute.
        after: our jobs that must have succeeded first.
        after_jobs: ids of other jobs of Slurm's that must have succeeded first.
        min_nodes: hosts without which explaining does not go on; None: all of a job's.
        metrics_port: where explaining tells Prometheus how far it is; 0: a free one; None: nowhere.
        dashboard_port: of the dashboard of Ray that the pool that explains has; 0: a free one; None: no dashboard.
    """

    stage: str
    members: tuple[Member, ...]
    profile: Profile
    profile_name: str
    results: Path
    packs: Path
    command: tuple[str, ...]
    directory: Path
    after: tuple[JobFolder, ...] = ()
    after_jobs: tuple[str, ...] = ()
    also: tuple[Member, ...] = ()
    min_nodes: int | None = None
    metrics_port: int | None = None
    dashboard_port: int | None = None

    @property
    def array(self) -> bool:
        """Whether the jobs of a stage are one array of Slurm's."""
        return len(self.members) > 1 and isinstance(self.profile, SlurmProfile)


@dataclass(frozen=True)
class Step:
    """One stage of the chain.

    Attributes:
        stage: its name.
        records: of each member, without what it comes after and without its place in an array.
    """

    stage: str
    records: tuple[JobRecord, ...]


def ranks_of(profile: Profile) -> int:
    """Ranks of a job there; the pool that explains has as many workers instead."""
    if isinstance(profile, SlurmProfile):
        return profile.nodes * profile.ranks_per_node
    return profile.tasks if isinstance(profile, LocalProfile) else 1


def runs_this_python(profile: Profile) -> bool:
    """Whether jobs run by the Python that this process has, so that what is installed here is there."""
    return not (isinstance(profile, SlurmProfile) and (profile.python or profile.container))


def hosts_of(profile: Profile) -> int:
    """Hosts of a job there."""
    return profile.nodes if isinstance(profile, SlurmProfile) else 1


def pools(profile: Profile) -> bool:
    """Whether explaining is one pool of workers there, which may serve several experiments."""
    return ranks_of(profile) > 1


def chain_of(stage: str, recipe: Recipe) -> tuple[str, ...]:
    """The jobs that a stage of the command line stands for."""
    if stage != "pipeline":
        return (stage,)
    before = ("pretrain",) if recipe.encoder.weights == "pretrain" else ()
    return (*before, "finetune", "explain", REPORT)


def sweep(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The grid of `--array KEY=V1,V2`: for each member the end of its name and its settings.

    Raises:
        InputError: a word is no KEY=V1,V2, a member occurs twice, or there are too many.
    """
    grid: list[tuple[str, tuple[str, ...]]] = [("", ())]
    keys = [word.partition("=")[0] for word in words]
    for word, key in zip(words, keys, strict=True):
        values = _split(word.partition("=")[2])
        if not key or len(values) < 1 or not all(values):
            raise InputError(f"--array {word}: write KEY=V1,V2, for example finetune.optim.lr=1e-3,1e-2")
        last = key.rpartition(".")[2]
        short = last if [other.rpartition(".")[2] for other in keys].count(last) == 1 else key
        grid = [
            (f"{name}-{short}-{_in_a_name(value)}", (*settings, f"{key}={value}"))
            for name, settings in grid
            for value in values
        ]
        if len(grid) > MOST_MEMBERS:
            raise InputError(f"--array: {len(grid)} members or more, and {MOST_MEMBERS} are allowed; give fewer values")
    names = [name for name, _ in grid]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"--array: two members would be called …{twice}; give each value once")
    return grid


def _split(text: str) -> list[str]:
    """Splits at commas that stand in no brackets or quotes."""
    parts = re.findall(r"((?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,\[{\"'])*)(?:,|$)", text)
    return [part.strip() for part in (parts[:-1] if len(parts) > 1 and not text.endswith(",") else parts)]


def _in_a_name(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_-]+", "_", value).strip("_") or "empty"


def steps_of(request: Request, code: Snapshot) -> list[Step]:
    """The jobs of a request, stage by stage.

    Args:
        request: checked.
        code: what runs.
    """
    chain = chain_of(request.stage, request.members[0].recipe)
    return [Step(stage, tuple(_record(request, stage, member, code) for member in request.members)) for stage in chain]


def _record(request: Request, stage: str, member: Member, code: Snapshot) -> JobRecord:
    profile = request.profile
    if stage == REPORT and isinstance(profile, SlurmProfile):
        # One GPU stays: partitions of GPUs often refuse jobs without.
        profile = profile.model_copy(
            update={
                "nodes": 1,
                "gpus_per_node": min(1, profile.gpus_per_node),
                "tasks_per_node": 1,
                "time_min": min(profile.time_min, REPORT_MIN),
            }
        )
    workers = 0
    if stage == EXPLAIN and isinstance(profile, SlurmProfile) and pools(profile):
        # One task a host keeps a part of the pool there, and needs what its ranks would have had together.
        workers = profile.ranks_per_node
        cpus = profile.cpus_per_task and profile.cpus_per_task * workers
        profile = profile.model_copy(update={"tasks_per_node": 1, "cpus_per_task": cpus})
    if isinstance(profile, SlurmProfile):
        nodes, tasks, time_min = profile.nodes, profile.ranks_per_node, profile.time_min
        python = profile.python or (None if profile.container else sys.executable)
        profile = profile.model_copy(update={"python": python})
    else:
        assert isinstance(profile, LocalProfile)
        workers = profile.tasks if stage == EXPLAIN and pools(profile) else 0
        nodes, tasks, time_min = 1, 1 if workers or stage == REPORT else profile.tasks, profile.time_min
    return JobRecord(
        stage=stage,
        experiment=member.experiment.root.name,
        results=str(request.results),
        packs=str(request.packs),
        recipe=member.recipe.model_dump(mode="json"),
        also={one.experiment.root.name: one.recipe.model_dump(mode="json") for one in request.also},
        profile=profile.model_dump(mode="json"),
        profile_name=request.profile_name,
        nodes=nodes,
        min_nodes=request.min_nodes if workers and request.min_nodes != nodes else None,
        tasks_per_node=tasks,
        workers_per_node=workers,
        metrics_port=request.metrics_port if stage == EXPLAIN else None,
        dashboard_port=request.dashboard_port if stage == EXPLAIN else None,
        time_min=time_min,
        code=str(code.path),
        code_digest=code.digest,
        command=request.command,
        directory=str(request.directory),
    )


@dataclass(frozen=True)
class Preview:
    """What would be submitted.

    Attributes:
        label: of the job, as it would be called.
        members: jobs in it; more than one are an array.
        script: the whole script.
    """

    label: str
    members: int
    script: str


def preview(request: Request) -> list[Preview]:
    """The scripts of a request; nothing is written, and no scheduler is asked.

    Raises:
        InputError: a wish cannot be met.
    """
    check_request(request)
    steps = steps_of(request, current_snapshot(request.results))
    pooled = pooled_numbers(request.results)
    found = []
    before = [f"JOB-{job.label}" for job in request.after] + list(request.after_jobs)
    for offset, step in enumerate(steps):
        folders = [_next_folder(member.experiment, step.stage, offset, pooled) for member in request.members]
        array = ArrayMember(index=0, folders=tuple(map(str, folders))) if request.array else None
        kind = "aftercorr" if offset and request.array else "afterok"
        dependency = f"{kind}:{':'.join(before)}" if before else None
        for folder, record in zip(folders[: 1 if request.array else None], step.records, strict=False):
            record = record.model_copy(update={"array": array})
            found.append(_preview(folder, record, request.profile, dependency))
        before = [f"JOB-{folders[0].name}"]
    return found


def _next_folder(experiment: Experiment, stage: str, offset: int, pooled: Mapping[str, int]) -> Path:
    number = next_number(experiment, pooled) + offset
    return experiment.root / "jobs" / f"{number:04d}-{stage}"


def _preview(folder: Path, record: JobRecord, profile: Profile, dependency: str | None) -> Preview:
    label = JobFolder(folder).label
    members = 1 if record.array is None else len(record.array.folders)
    if isinstance(profile, SlurmProfile):
        from maehpc.launch.script import script_text

        resolved = parse_profile(record.profile)
        assert isinstance(resolved, SlurmProfile)
        return Preview(
            label,
            members,
            script_text(folder, record, resolved, "TOKEN", dependency, None if members == 1 else members),
        )
    from maehpc.launch.local import shell_text

    return Preview(label, members, shell_text(folder, record, dependency))


def overridden(profile: Profile, wishes: Mapping[str, Any]) -> Profile:
    """A profile with the command line's own wishes in it.

    Args:
        profile: as its file has it.
        wishes: nodes, gpus_per_node, time_min, partition, account, qos; None where not given.

    Raises:
        InputError: a wish is wrong, or means nothing to this kind of profile.
    """
    given = {name: value for name, value in wishes.items() if value is not None}
    options = {name: f"--{name.removesuffix('_min').replace('_', '-')}" for name in given}
    if isinstance(profile, LocalProfile):
        if given.get("nodes", 1) != 1:
            raise InputError(f"--nodes {given['nodes']}: this machine is one; give a Slurm profile with --cluster")
        given.pop("nodes", None)
        if (gpus := given.pop("gpus_per_node", None)) is not None:
            given |= {"gpus": gpus, "tasks": max(1, gpus)}
    foreign = next((name for name in given if name not in type(profile).model_fields), None)
    if foreign is not None:
        raise InputError(f"{options[foreign]} is Slurm's, and the profile is of kind {profile.kind}; leave it out")
    if isinstance(profile, SlurmProfile) and given.get("gpus_per_node") is not None:
        # Ranks follow the GPUs that are asked for, where the profile has a rank for each.
        if profile.tasks_per_node == profile.gpus_per_node:
            given["tasks_per_node"] = given["gpus_per_node"] or None
        if given["gpus_per_node"] == 0:
            given |= {"gpu_type": None, "mem_per_gpu_gb": None}
    resolved = profile.model_dump(mode="json") | given
    return parse_profile(resolved, " ".join(f"{options.get(name, name)}" for name in wishes if name in options))


def check_request(request: Request) -> None:
    """Refuses what is wrong whatever the scheduler says.

    Raises:
        InputError: a path that Slurm's header cannot hold, members of a sweep with different stages, a profile that
            takes no jobs, or a wish that the stage cannot meet.
    """
    if not isinstance(request.profile, (SlurmProfile, LocalProfile)):
        raise InputError("--cluster debug computes in the foreground; use `maehpc run`, or --cluster local")
    if len({chain_of(request.stage, member.recipe) for member in request.members}) > 1:
        raise InputError("--array encoder.weights: members would not go through the same stages; submit them apart")
    if request.min_nodes is not None:
        _check_min_nodes(request, request.min_nodes)
    if request.metrics_port is not None:
        _check_metrics_port(request, request.metrics_port)
    if request.dashboard_port is not None:
        _check_dashboard_port(request, request.dashboard_port)
    for member in (*request.members, *request.also):
        root = str(member.experiment.root)
        if "%" in root or re.search(r"[\x00-\x1f\x7f]", root):
            raise InputError(f"--results, --name: {root!r} holds a % or a line break, which Slurm changes; rename it")


def _check_min_nodes(request: Request, least: int) -> None:
    profile = request.profile
    if EXPLAIN not in chain_of(request.stage, request.members[0].recipe):
        why = {"pretrain": "pretraining", "finetune": "finetuning", "probe": "probing"}[request.stage]
        raise InputError(f"--min-nodes {least}: {why} shares every batch among all ranks; leave it out")
    if not isinstance(profile, SlurmProfile):
        raise InputError(f"--min-nodes {least}: this machine is one; give a Slurm profile with --cluster")
    if least > profile.nodes:
        raise InputError(f"--min-nodes {least}: the job has {profile.nodes} hosts; give at most so many")


def _check_metrics_port(request: Request, port: int) -> None:
    if EXPLAIN not in chain_of(request.stage, request.members[0].recipe):
        raise InputError(f"--metrics-port {port}: metrics tell of explaining; leave it out of {request.stage}")
    if port and len(request.members) > 1:
        raise InputError(f"--metrics-port {port}: members of a sweep may share a host; give 0 for a free port each")


def _check_dashboard_port(request: Request, port: int) -> None:
    if EXPLAIN not in chain_of(request.stage, request.members[0].recipe):
        raise InputError(f"--dashboard-port {port}: a pool that explains has Ray; leave it out of {request.stage}")
    if not pools(request.profile):
        raise InputError(
            f"--dashboard-port {port}: one process would explain, without Ray; ask for more --nodes or GPUs, or leave "
            "the option out"
        )
    if port and len(request.members) > 1:
        raise InputError(f"--dashboard-port {port}: members of a sweep may share a host; give 0 for a free port each")
