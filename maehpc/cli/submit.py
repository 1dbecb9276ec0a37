"""`maehpc submit STAGE`: a stage as a job of a cluster, or in the background of this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maehpc.cli.experiment import Words, apart, experiment_name, experiment_options, settle
from maehpc.cli.options import (
    complete_profile,
    dashboard_port_option,
    json_option,
    metrics_port_option,
    packs_option,
    results_option,
    set_verbosity,
    verbosity_options,
)
from maehpc.errors import InputError

if TYPE_CHECKING:
    from maehpc.experiment import Experiment
    from maehpc.launch.chain import Handed
    from maehpc.launch.plan import Member, Request
    from maehpc.launch.record import JobFolder
    from maehpc.launch.status import Reading, Row
    from maehpc.progress import Progress
    from maehpc.recipes import Recipe

LOOK_S = 2.0
"""Seconds between two looks of --wait."""
UNKNOWN_S = 60.0
"""Seconds after which --wait takes a state that nothing tells for the end."""


@click.command("submit")
@experiment_options
@click.option(
    "--cluster",
    default="local",
    show_default=True,
    envvar="MAEHPC_CLUSTER",
    show_envvar=True,
    shell_complete=complete_profile,
    help="Profile: where to compute. A shipped one's name or a YAML file.",
)
@click.option("--nodes", type=click.IntRange(min=1), help="Hosts of a job.  [default: the profile's]")
@click.option(
    "--min-nodes",
    type=click.IntRange(min=1),
    help="Explain with so many hosts where not all of --nodes can be had or come up.  [default: all]",
)
@click.option("--gpus-per-node", type=click.IntRange(min=0), help="GPUs on each host.  [default: the profile's]")
@click.option("--time", "time_min", help="Wall time: minutes, 12:00:00 or 2-00:00:00.  [default: the profile's]")
@click.option("--partition", help="Slurm's partition.  [default: the profile's]")
@click.option("--account", help="Who pays.  [default: the profile's]")
@click.option("--qos", help="Quality of service.  [default: the profile's]")
@click.option(
    "--array",
    multiple=True,
    metavar="KEY=V1,V2",
    help="A sweep: an experiment NAME-KEY-VALUE for each value, submitted as one array; several give a grid.",
)
@click.option(
    "--after",
    multiple=True,
    metavar="JOB",
    help="Begin when JOB has succeeded: EXPERIMENT (its newest), EXPERIMENT/NUMBER, EXPERIMENT/STAGE or Slurm's id.",
)
@metrics_port_option
@dashboard_port_option
@click.option("--dry-run", is_flag=True, help="Print the scripts and what it would cost; submit and write nothing.")
@click.option("--wait", is_flag=True, help="Stay until the jobs have ended; exit code 1 unless all are done.")
@results_option
@packs_option
@json_option
@verbosity_options
def command(quiet: bool, verbose: bool, dry_run: bool, wait: bool, as_json: bool, **options: Any) -> None:
    """Submit STAGE: pretrain, finetune, probe, explain, or pipeline for a chain of jobs that ends with the report.

    The code as it is now is kept beside the results, and every attempt of the job runs that copy. Submitting the same
    again while the job waits or runs finds it and submits nothing.
    """
    from maehpc.progress import LineProgress, Silent

    set_verbosity(verbose)
    progress = Silent() if quiet else LineProgress()
    request = _request(progress, **options)
    if dry_run:
        _show(request, as_json)
        return
    from maehpc.launch.chain import carry_out

    _check(request)
    handed = carry_out(request)
    _tell(handed, progress, as_json)
    if wait:
        sys.exit(_wait([one.job for one in handed], progress))


def _request(
    progress: Progress,
    cluster: str,
    nodes: int | None,
    min_nodes: int | None,
    gpus_per_node: int | None,
    time_min: str | None,
    partition: str | None,
    account: str | None,
    qos: str | None,
    array: tuple[str, ...],
    after: tuple[str, ...],
    metrics_port: int | None,
    dashboard_port: int | None,
    results: Path,
    packs: Path | None,
    **words: Any,
) -> Request:
    """The command line's words in order."""
    from maehpc.launch.plan import EXPLAIN, Request, check_request, overridden, pools
    from maehpc.launch.profile import load_profile

    profile = overridden(
        load_profile(cluster),
        {
            "nodes": nodes,
            "gpus_per_node": gpus_per_node,
            "time_min": time_min,
            "partition": partition,
            "account": account,
            "qos": qos,
        },
    )
    given = click.get_current_context().get_parameter_source("results")
    if profile.results is not None and given is click.core.ParameterSource.DEFAULT:
        results = Path(profile.results).expanduser()
    results = results.absolute()
    packs = (packs or (Path(profile.packs).expanduser() if profile.packs else results / "packs")).absolute()
    jobs, ids = _after(after, results, profile.kind)
    members = _members(Words(**words), array, results, packs, progress)
    if words["stage"] == EXPLAIN:
        members.sort(key=lambda member: member.experiment.root.name)  # the job is the first one's, in whatever order
    together = words["stage"] == EXPLAIN and pools(profile)  # a sweep is one pool there, and elsewhere a job each
    request = Request(
        stage=words["stage"],
        members=tuple(members[:1] if together else members),
        also=tuple(members[1:] if together else ()),
        profile=profile,
        profile_name=cluster,
        results=results,
        packs=packs,
        command=tuple(sys.argv[1:]),
        directory=Path.cwd(),
        after=tuple(jobs),
        after_jobs=tuple(ids),
        min_nodes=min_nodes,
        metrics_port=metrics_port,
        dashboard_port=dashboard_port,
    )
    check_request(request)
    return request


def _members(words: Words, array: tuple[str, ...], results: Path, packs: Path, progress: Progress) -> list[Member]:
    """The experiment that is meant, or those of a sweep."""
    from dataclasses import replace

    from maehpc.launch.plan import MOST_MEMBERS, Member, sweep
    from maehpc.progress import Silent

    members: list[Member] = []
    for named in apart(words):
        name = experiment_name(named.name, named.recipe, named.stage)
        for ending, overrides in sweep(array):
            one = replace(named, name=name + ending, overrides=(*named.overrides, *overrides))
            experiment, recipe = settle(one, results, packs, Silent() if members else progress, _begun)
            members.append(Member(experiment, recipe))
    if len(members) > MOST_MEMBERS:
        raise InputError(f"--name, --array: {len(members)} members, and {MOST_MEMBERS} are allowed; give fewer values")
    return members


def _begun(experiment: Experiment) -> Recipe | None:
    """The recipe of an experiment that has begun, or that waits in the queue."""
    from maehpc.launch.record import jobs_of
    from maehpc.recipes import Recipe
    from maehpc.recipes.begun import begun_recipe

    begun = begun_recipe(experiment)
    if begun is not None:
        return begun
    submitted = [job for job in jobs_of(experiment) if job.submissions()]
    return Recipe.model_validate(submitted[-1].record().recipe) if submitted else None


def _after(words: tuple[str, ...], results: Path, kind: str) -> tuple[list[JobFolder], list[str]]:
    """Our jobs and others of Slurm's that --after names."""
    from maehpc.launch.named import newest_job

    jobs: list[JobFolder] = []
    ids: list[str] = []
    for word in words:
        try:
            job = newest_job(word, results)
        except InputError:
            if not word.replace("_", "").isdigit():
                raise
            ids.append(word)
            continue
        scheduler = job.record().profile.get("kind")
        if scheduler != kind:
            raise InputError(
                f"--after {word}: that job is of kind {scheduler} and this one of {kind}; use one --cluster"
            )
        jobs.append(job)
    if ids and kind != "slurm":
        raise InputError(
            f"--after {ids[0]}: there is no such job of ours, and only Slurm has others; name a job of ours"
        )
    return jobs, ids


def _show(request: Request, as_json: bool) -> None:
    """What would be submitted, and what it would cost."""
    from maehpc.launch.estimate import estimate
    from maehpc.launch.hardware import hardware_for
    from maehpc.launch.plan import REPORT, chain_of, hosts_of, pools, preview, ranks_of

    jobs = preview(request)
    first = request.members[0]
    stages = [stage for stage in chain_of(request.stage, first.recipe) if stage != REPORT]
    profile = request.profile
    cost = estimate(
        first.recipe,
        stages,
        experiment=first.experiment,
        hardware=hardware_for(profile),
        ranks=ranks_of(profile),
        pool_hosts=hosts_of(profile) if pools(profile) else None,
    )
    members = len(request.members) + len(request.also)
    if as_json:
        told = [{"job": job.label, "members": job.members, "script": job.script} for job in jobs]
        click.echo(json.dumps({"jobs": told, "members": members, "estimate": cost.as_json()}))
        return
    for job in jobs:
        click.echo(f"==> {job.label}{f' and {job.members - 1} more, an array' if job.members > 1 else ''} <==")
        click.echo(job.script)
    if request.also:
        click.echo(
            f"One pool for {members} experiments: {', '.join(one.experiment.root.name for one in request.also)} too"
        )
    click.echo(f"Estimate{f' for each of {members} members' if members > 1 else ''}")
    for line in cost.lines():
        click.echo(line)


def _check(request: Request) -> None:
    """Refuses what would fail on the cluster, hours later.

    Raises:
        InputError: data are missing, earlier stages are not finished, or a setting does not fit.
    """
    import torch

    from maehpc import files
    from maehpc.data import require
    from maehpc.launch.plan import REPORT, chain_of, runs_this_python
    from maehpc.pool.dashboard import check_installed
    from maehpc.progress import Silent
    from maehpc.stages.begin import settled_recipe
    from maehpc.stages.context import Context
    from maehpc.stages.preflight import check

    _check_after(request)
    if request.dashboard_port is not None and runs_this_python(request.profile):
        check_installed(request.dashboard_port)
    looked: set[tuple[str, int]] = set()
    seen: set[str] = set()
    for member in (*request.members, *request.also):
        experiment, recipe = member.experiment, member.recipe
        settled_recipe(experiment, recipe)
        for dataset in recipe.datasets:
            if (dataset, recipe.data.source_size) not in looked:
                looked.add((dataset, recipe.data.source_size))
                require(dataset, recipe.data.source_size, request.packs)  # packing is the job's own work
        stages = [stage for stage in chain_of(request.stage, recipe) if stage != REPORT]
        made = [job.record().stage for job in request.after if job.path.parent.parent == experiment.root]
        # Members of a sweep that differ in learning rates alone need one look; where an earlier stage must be there,
        # it must be there for each.
        shape = recipe.model_dump(mode="json", include={"data", "encoder"}) | {
            "decoder": recipe.pretrain.decoder.model_dump(),
            "weights": recipe.pretrain.weights,
            "head": recipe.finetune.model_dump(include={"adapter", "representation"}),
            "explain": recipe.explain.model_dump(include={"methods", "gradcam", "target"}),
            "experiment": None if stages[0] == "pretrain" else experiment.root.name,
        }
        if (digest := files.digest(shape)) not in seen:
            seen.add(digest)
            context = Context(experiment, recipe, torch.device("cpu"), request.packs, Silent())
            check(context, [*made, *stages])


def _check_after(request: Request) -> None:
    from maehpc.launch import slurm
    from maehpc.launch.submission import still_going, succeeded

    for job in request.after:
        if not succeeded(job) and not still_going(job):
            raise InputError(f"--after {job.label}: it has not succeeded and is not at work; `maehpc resume` it first")
    for job_id in request.after_jobs:
        if slurm.show(job_id) is None:
            raise InputError(f"--after {job_id}: Slurm knows no such job; give one that `squeue` shows, or one of ours")


def _tell(handed: list[Handed], progress: Progress, as_json: bool) -> None:
    """What was submitted, and how to go on."""
    if as_json:
        rows = [
            {
                "job": one.job.label,
                "job_id": one.accepted.job_id,
                "scheduler": one.accepted.scheduler,
                "folder": str(one.job.path),
                "logs": one.accepted.logs,
                "already": one.found,
            }
            for one in handed
        ]
        click.echo(json.dumps(rows))
        return
    width = max(len(one.job.label) for one in handed)
    for one in handed:
        word = "process" if one.accepted.scheduler == "local" else "job"
        already = "  submitted already" if one.found else ""
        click.echo(f"{one.job.label:{width}}  {word} {one.accepted.job_id}{already}")
    results, first = handed[0].job.path.parent.parent.parent, handed[0].job
    option = "" if results == Path("results").absolute() else f" --results {results}"
    progress.say(f"follow them with: maehpc status{option}; maehpc logs -f {first.label}{option}")


def _wait(jobs: list[JobFolder], progress: Progress) -> int:
    """Follows jobs until nothing of them can change by itself.

    Returns:
        0 where all are done, 1 otherwise.
    """
    try:
        from maehpc.launch.status import read

        rows = _follow(jobs, lambda: read(jobs), progress)
    except KeyboardInterrupt:
        progress.say("\nno longer waiting; the jobs go on: `maehpc status` shows them, `maehpc cancel` ends them")
        return 130
    return 0 if all(row.state == "done" for row in rows) else 1


def _follow(jobs: list[JobFolder], look: Callable[[], Reading], progress: Progress) -> list[Row]:
    told: dict[Path, tuple[str, str]] = {}
    untold_since = time.monotonic()
    while True:
        reading = look()
        rows = reading.rows
        for row in rows:
            if told.get(row.job.path) != (row.state, row.sentence):
                told[row.job.path] = (row.state, row.sentence)
                progress.say(f"{row.job.label}: {row.state}{f' ({row.sentence})' if row.sentence else ''}")
        if reading.silence is not None or any(row.active and not row.never for row in rows):
            untold_since = time.monotonic()
        elif all(row.state.ended or row.never for row in rows) or time.monotonic() - untold_since > UNKNOWN_S:
            return rows
        time.sleep(LOOK_S)
