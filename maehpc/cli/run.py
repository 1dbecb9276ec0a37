"""`maehpc run STAGE`: a stage in this process, on one device; the debug mode."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maehpc.cli.experiment import Words, apart, experiment_options, settle
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

if TYPE_CHECKING:
    import torch

    from maehpc.experiment import Experiment
    from maehpc.progress import Progress


@click.command("run")
@experiment_options
@click.option(
    "--cluster", default="debug", show_default=True, shell_complete=complete_profile, help="Profile: where to compute."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="What computes.  [default: the profile's]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the profile's]")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that explain, each on a GPU or on its part of the cores.",
)
@click.option(
    "--pool-address",
    metavar="IP",
    help="Address of this host at which workers of other hosts may --join.  [default: those of this host alone]",
)
@click.option("--join", is_flag=True, help="Bring --workers to the run that is explaining the experiment already.")
@metrics_port_option
@click.option(
    "--metrics-address",
    help="Address of this host to serve them on.  [default: 127.0.0.1, which no other host reaches]",
)
@dashboard_port_option
@click.option("--pdb", "debugger", is_flag=True, help="Drop into the debugger where an error is raised.")
@results_option
@packs_option
@json_option
@verbosity_options
def command(debugger: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Run STAGE here: pretrain, finetune, probe, explain, or pipeline for all but probe in a chain.

    A run that was stopped in whatever way goes on from where it was when the same command is given again.
    """
    # A thread that spins while it waits starves the one it waits for when another program wants the core as well: a
    # step was seen to take ten times as long. Some microseconds are enough. OpenMP reads this as PyTorch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from maehpc.cli.terminal import reporter
    from maehpc.errors import InputError

    set_verbosity(verbose)
    if debugger and options["workers"] > 1:
        raise InputError("--pdb sees this process alone; leave --workers out")
    try:
        _run(reporter(quiet), **options)
    except Exception:
        if debugger:
            import pdb
            import traceback

            traceback.print_exc()
            pdb.post_mortem(sys.exc_info()[2])
        raise


def _run(
    progress: Progress,
    cluster: str,
    device: Any,
    threads: int | None,
    workers: int,
    pool_address: str | None,
    join: bool,
    metrics_port: int | None,
    metrics_address: str | None,
    dashboard_port: int | None,
    results: Path,
    packs: Path | None,
    as_json: bool,
    **words: Any,
) -> None:
    from maehpc.cli.summary import print_summary
    from maehpc.devices import choose_device, set_threads
    from maehpc.errors import InputError
    from maehpc.interruption import Stop
    from maehpc.launch.foreground import Foreground
    from maehpc.launch.profile import load_profile
    from maehpc.launch.pulse import Pulse, PulsingProgress
    from maehpc.launch.signals import take_signals
    from maehpc.pool.dashboard import check as check_dashboard
    from maehpc.report import aggregate
    from maehpc.stages.begin import begin
    from maehpc.stages.context import Context
    from maehpc.stages.fleet import local_fleet
    from maehpc.stages.guard import out_of_memory_told
    from maehpc.stages.pipeline import run_stages, stages_of
    from maehpc.stages.preflight import check
    from maehpc.stages.prometheus import LOOPBACK, serving
    from maehpc.stages.provenance import recorded_threads

    profile = load_profile(cluster)
    packs = packs or results / "packs"
    wanted = apart(Words(**words))
    settled = [settle(one, results, packs, progress) for one in wanted]
    stage, (experiment, recipe) = wanted[0].stage, settled[0]
    computing_device = choose_device(device or profile.device)
    if join:
        if dashboard_port is not None:
            raise InputError(f"--dashboard-port {dashboard_port}: the run that is joined has Ray's head; leave it out")
        _join(experiment, stage, computing_device, workers, progress)
        return
    set_threads(threads or profile.threads or recorded_threads(experiment.provenance))
    stop = Stop()
    take_signals(stop)
    names = stages_of(stage, recipe.encoder.weights)
    pooled = workers > 1 or pool_address is not None
    if pooled and "explain" not in names:
        raise InputError(f"--workers {workers}: {stage} is computed by one process; leave the option out")
    if metrics_port is not None and "explain" not in names:
        raise InputError(f"--metrics-port {metrics_port}: metrics tell of explaining; leave it out of {stage}")
    if metrics_port is None and metrics_address is not None:
        raise InputError(f"--metrics-address {metrics_address} says where alone; give --metrics-port too")
    if dashboard_port is not None and "explain" not in names:
        raise InputError(f"--dashboard-port {dashboard_port}: a pool that explains has Ray; leave it out of {stage}")
    if dashboard_port is not None and not pooled:
        raise InputError(f"--dashboard-port {dashboard_port}: one process explains without Ray; give --workers too")
    with ExitStack() as until_end:
        metrics = None
        if metrics_port is not None:
            metrics = until_end.enter_context(serving(metrics_port, metrics_address or LOOPBACK, progress.say))
        if dashboard_port is not None:
            check_dashboard(dashboard_port)
        work = Foreground([experiment for experiment, _ in settled], stage)
        pulse = Pulse(work.tell)
        pulsing = PulsingProgress(progress, pulse)
        contexts = [
            Context(experiment, recipe, computing_device, packs, pulsing, stop=stop, metrics=metrics)
            for experiment, recipe in settled
        ]
        for context in contexts:
            check(context, names)
        fleet = local_fleet(computing_device, workers, pool_address, dashboard_port) if pooled else None
        for context in contexts:
            until_end.enter_context(begin(context, sys.argv[1:], names))
        until_end.enter_context(work.visible(pulse))
        until_end.enter_context(out_of_memory_told())
        records = run_stages(contexts, names, fleet)
    if stage == "pipeline":
        print_summary(aggregate(experiment.root, progress=progress), as_json)
    elif as_json:
        by_name = {context.experiment.root.name: found for context, found in zip(contexts, records, strict=True)}
        click.echo(json.dumps(by_name if len(contexts) > 1 else records[0]))
    else:
        progress.say(f"results in {', '.join(str(context.experiment.root) for context in contexts)}")


def _join(experiment: Experiment, stage: str, device: torch.device, workers: int, progress: Progress) -> None:
    from maehpc.errors import InputError
    from maehpc.interruption import Stop
    from maehpc.launch.signals import take_signals
    from maehpc.stages.fleet import gpus_each
    from maehpc.stages.joining import join_pool

    if stage != "explain":
        raise InputError(f"--join: {stage} has no pool of workers; leave the option out")
    stop = Stop()
    take_signals(stop)
    join_pool(experiment, workers, gpus_each(device, workers), device.type, stop, progress.say)
    progress.say("the pool is over" if stop.reason is None else "left the pool, which goes on")
