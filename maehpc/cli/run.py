"""`maehpc run STAGE`: a stage in this process, on one device; the debug mode."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maehpc.cli.options import (
    complete_dataset,
    complete_method,
    complete_profile,
    complete_recipe,
    json_option,
    packs_option,
    results_option,
    set_verbosity,
    verbosity_options,
)

if TYPE_CHECKING:
    from maehpc.progress import Progress
    from maehpc.recipes import Recipe

DEFAULT_RECIPES = {
    "pretrain": "pretrain/vit-base",
    "finetune": "finetune/report",
    "explain": "explain/report",
    "pipeline": "pipeline/demo",
}


RESERVED_NAMES = ("packs", "report")
LONGEST_NAME = 100
"""Bytes: file names hold 255, and parts of reports are called after the experiment and the data set."""


@click.command("run")
@click.argument("stage", type=click.Choice(list(DEFAULT_RECIPES)))
@click.option(
    "--recipe",
    shell_complete=complete_recipe,
    help="A name from `maehpc recipe list` or a YAML file.  [default: the experiment's own, else by stage: "
    + ", ".join(f"{stage}: {recipe}" for stage, recipe in DEFAULT_RECIPES.items())
    + "]",
)
@click.option("--name", help="Experiment: the folder below RESULTS.  [default: the recipe's name]")
@click.option(
    "--datasets",
    shell_complete=complete_dataset,
    help="Names, .npz files or image folders, with commas between. NAME? is left out where its file is not here; "
    "all: every catalogue set that is here.",
)
@click.option("--methods", shell_complete=complete_method, help="Attribution methods, with commas between.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting, as optim.lr=1e-3.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of every random draw.")
@click.option(
    "--cluster", default="debug", show_default=True, shell_complete=complete_profile, help="Profile: where to compute."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="What computes.  [default: the profile's]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the profile's]")
@click.option("--pdb", "debugger", is_flag=True, help="Drop into the debugger where an error is raised.")
@results_option
@packs_option
@json_option
@verbosity_options
def command(debugger: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Run STAGE here: pretrain, finetune, explain, or pipeline for all in a chain.

    A run that was stopped in whatever way goes on from where it was when the same command is given again.
    """
    # A thread that spins while it waits starves the one it waits for when another program wants the core as well: a
    # step was seen to take ten times as long. Some microseconds are enough. OpenMP reads this as PyTorch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from maehpc.cli.terminal import reporter

    set_verbosity(verbose)
    try:
        _run(reporter(quiet), **options)
    except Exception:
        if debugger:
            import pdb
            import traceback

            traceback.print_exc()
            pdb.post_mortem(sys.exc_info()[2])
        raise


def _settings(datasets: tuple[str, ...], methods: str | None, seed: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if datasets:
        settings["datasets"] = datasets
    if methods:
        settings["explain"] = {"methods": tuple(word.strip() for word in methods.split(","))}
    if seed is not None:
        settings["seed"] = seed
    return settings


def _datasets(text: str | None, source_size: int, packs: Path, progress: Progress) -> tuple[str, ...]:
    """The data sets of `--datasets`; those that may be left out are, where their files are not here."""
    from maehpc.data import available
    from maehpc.errors import InputError

    if text is None:
        return ()
    here = {}
    for status in available(packs):
        if status.size == source_size or len(status.entry.sizes) == 1:
            here[status.entry.name] = status.state != "missing"
    words = [f"{name}?" for name in here] if text == "all" else [word.strip() for word in text.split(",")]

    def is_here(name: str) -> bool:
        return here.get(name, False) or (name not in here and Path(name).exists())

    chosen = [word.removesuffix("?") for word in words if word and (word[-1] != "?" or is_here(word[:-1]))]
    left_out = [word[:-1] for word in words if word.endswith("?") and word[:-1] not in chosen]
    if left_out:
        progress.say(f"left out: {', '.join(left_out)} (no file here; see `maehpc data list`)")
    if not chosen:
        raise InputError(f"--datasets {text}: no data set is here; see `maehpc data list`")
    return tuple(chosen)


def _run(
    progress: Progress,
    stage: str,
    recipe: str | None,
    name: str | None,
    datasets: str | None,
    methods: str | None,
    overrides: tuple[str, ...],
    seed: int | None,
    cluster: str,
    device: Any,
    threads: int | None,
    results: Path,
    packs: Path | None,
    as_json: bool,
) -> None:
    from maehpc.cli.summary import print_summary
    from maehpc.devices import choose_device, set_threads
    from maehpc.experiment import Experiment
    from maehpc.launch.profile import load_profile
    from maehpc.recipes import load_recipe
    from maehpc.report import aggregate
    from maehpc.stages.begin import begin, existing_recipe
    from maehpc.stages.context import Context
    from maehpc.stages.pipeline import run_stages, stages_of
    from maehpc.stages.preflight import check
    from maehpc.stages.provenance import recorded_threads

    profile = load_profile(cluster)
    packs = packs or results / "packs"
    experiment = Experiment(results / experiment_name(name, recipe, stage))
    base = existing_recipe(experiment)
    if recipe is None and base is None:
        recipe = DEFAULT_RECIPES[stage]
        progress.say(f"recipe {recipe} (the default of {stage}; `maehpc recipe list` shows the others)")
    given = load_recipe(recipe, overrides, stage, base=base)
    chosen = _datasets(datasets, given.data.source_size, packs, progress)
    settled: Recipe = load_recipe(recipe, overrides, stage, _settings(chosen, methods, seed), base)
    computing_device = choose_device(device or profile.device)
    set_threads(threads or profile.threads or recorded_threads(experiment.provenance))
    context = Context(experiment, settled, computing_device, packs, progress)
    names = stages_of(stage, settled.encoder.weights)
    check(context, names)
    with begin(context, sys.argv[1:], names), out_of_memory_told():
        records = run_stages(context, names)
    if stage == "pipeline":
        print_summary(aggregate(experiment.root, progress=progress), as_json)
    elif as_json:
        click.echo(json.dumps(records))
    else:
        progress.say(f"results in {experiment.root}")


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Turns running out of memory into a sentence that names the settings."""
    import torch

    from maehpc.errors import RunError

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RunError(
            "out of memory: raise pretrain.accumulate or finetune.accumulate (the numbers stay the same), or lower "
            "explain.batch_size or data.resident_bytes"
        ) from error


def experiment_name(name: str | None, recipe: str | None, stage: str) -> str:
    """The experiment's folder: as given, or the recipe's name.

    Raises:
        InputError: the name is a path, or one that is taken.
    """
    from maehpc.errors import InputError

    if name is None:
        recipe = recipe or DEFAULT_RECIPES[stage]
        name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")
    if Path(name).name != name or name.startswith(".") or len(name.encode()) > LONGEST_NAME:
        raise InputError(f"--name {name}: give a plain folder name; --results says where it lies")
    if name in RESERVED_NAMES:
        raise InputError(f"--name {name}: results/{name} is not an experiment's; choose another name")
    return name
