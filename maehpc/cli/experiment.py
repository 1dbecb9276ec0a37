"""From the command line's words to an experiment and its whole recipe; what `run` and `submit` share.

Nothing heavy is imported unless data sets have to be looked for (`all`, `NAME?`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from maehpc.cli.options import (
    complete_dataset,
    complete_kind,
    complete_method,
    complete_metric,
    complete_recipe,
    separated,
)

if TYPE_CHECKING:
    from maehpc.experiment import Experiment
    from maehpc.progress import Progress
    from maehpc.recipes import Recipe

DEFAULT_RECIPES = {
    "pretrain": "pretrain/vit-base",
    "finetune": "finetune/report",
    "probe": "probe/report",
    "explain": "explain/report",
    "pipeline": "pipeline/demo",
}
RESERVED_NAMES = ("benchmarks", "packs", "report")
LONGEST_NAME = 100
"""Bytes: file names hold 255, and parts of reports are called after the experiment and the data set."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Words:
    """What was given of an experiment on the command line.

    Attributes:
        stage: pretrain, finetune, probe, explain or pipeline.
        recipe: a shipped recipe's name or a YAML file.
        name: of the experiment.
        datasets: as typed, with commas between.
        methods: as typed, with commas between.
        sensitivity: kinds, as typed, with commas between.
        metrics: as typed, with commas between.
        overrides: KEY=VALUE texts.
        seed: of every random draw.
    """

    stage: str
    recipe: str | None
    name: str | None
    datasets: str | None
    methods: str | None
    sensitivity: str | None
    metrics: str | None
    overrides: tuple[str, ...]
    seed: int | None


def experiment_options(function: Function) -> Function:
    """Which stage of which experiment, and its recipe."""
    defaults = ", ".join(f"{stage}: {recipe}" for stage, recipe in DEFAULT_RECIPES.items())
    options = (
        click.argument("stage", type=click.Choice(list(DEFAULT_RECIPES))),
        click.option(
            "--recipe",
            shell_complete=complete_recipe,
            help="A name from `maehpc recipe list` or a YAML file.  [default: the experiment's own, else by stage: "
            f"{defaults}]",
        ),
        click.option(
            "--name",
            help="Experiment: the folder below RESULTS; to explain several at once, names with commas between.  "
            "[default: the recipe's name]",
        ),
        click.option(
            "--datasets",
            shell_complete=complete_dataset,
            help="Names, .npz files or image folders, with commas between. NAME? is left out where its file is not "
            "here; all: every catalogue set that is here, for explain every set with a finished classifier.",
        ),
        click.option("--methods", shell_complete=complete_method, help="Attribution methods, with commas between."),
        click.option(
            "--sensitivity",
            shell_complete=complete_kind,
            help="Perturbations: random, pgd, topk, centre, targeted, with commas between; none for none.",
        ),
        click.option(
            "--metrics", shell_complete=complete_metric, help="Further measures of trust, with commas between."
        ),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting, as optim.lr=1e-3."
        ),
        click.option("--seed", type=click.IntRange(min=0), help="Seed of every random draw."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def experiment_name(name: str | None, recipe: str | None, stage: str) -> str:
    """The experiment's folder: as given, or the recipe's name.

    Raises:
        InputError: the name is empty or cannot be printed, is a path, or is taken.
    """
    from maehpc.errors import InputError

    if name is None:
        recipe = recipe or DEFAULT_RECIPES[stage]
        name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")
    if not name.strip():  # of a shell's variable that is not set; the folder of all experiments would become one
        raise InputError("--name is empty; give the name of a folder, or leave the option out")
    if not name.isprintable():  # names are told in sentences of one line
        raise InputError(f"--name {name!a}: give a name that can be printed")
    if Path(name).name != name or name.startswith(".") or len(name.encode()) > LONGEST_NAME:
        raise InputError(f"--name {name}: give a plain folder name; --results says where it lies")
    if name in RESERVED_NAMES:
        raise InputError(f"--name {name}: results/{name} is not an experiment's; choose another name")
    return name


def apart(words: Words) -> list[Words]:
    """The words for each experiment that is named; several can be explained at once.

    Raises:
        InputError: several are named for another stage, or one of them twice.
    """
    from maehpc.errors import InputError

    names = [name.strip() for name in (words.name or "").split(",")]
    if len(names) == 1:
        return [words]
    if words.stage != "explain":
        raise InputError(f"--name {words.name}: {words.stage} works on one experiment at a time; give one name")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"--name {words.name}: {twice or 'nothing'} is named twice; name each once")
    # In one order, whoever names them: of two runs one then finds the first experiment in use, and not each another's.
    return [replace(words, name=name) for name in sorted(names)]


def settle(
    words: Words,
    results: Path,
    packs: Path,
    progress: Progress,
    begun: Callable[[Experiment], Recipe | None] | None = None,
) -> tuple[Experiment, Recipe]:
    """The experiment that is meant, and its recipe with everything in it.

    Args:
        words: of the command line.
        results: folder of experiments.
        packs: folder of packed data sets.
        progress: is told what was chosen for the user.
        begun: what tells the recipe an experiment has already; its recipe.yaml where None.

    Raises:
        InputError: a word is wrong.
    """
    from maehpc.experiment import Experiment
    from maehpc.recipes import load_recipe
    from maehpc.recipes.begun import begun_recipe

    experiment = Experiment(results / experiment_name(words.name, words.recipe, words.stage))
    base = (begun or begun_recipe)(experiment)
    recipe = words.recipe
    if recipe is None and base is None:
        recipe = DEFAULT_RECIPES[words.stage]
        progress.say(f"recipe {recipe} (the default of {words.stage}; `maehpc recipe list` shows the others)")
    given = load_recipe(recipe, words.overrides, words.stage, base=base)
    if words.stage == "explain" and words.datasets == "all":
        chosen = _classified(experiment, given, packs, progress)
    else:
        chosen = _datasets(words.datasets, given.data.source_size, packs, progress)
    return experiment, load_recipe(recipe, words.overrides, words.stage, _settings(words, chosen), base)


def _settings(words: Words, datasets: tuple[str, ...]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if datasets:
        settings["datasets"] = datasets
    explain: dict[str, Any] = {}
    if words.methods:
        explain["methods"] = separated(words.methods)
    if words.sensitivity:
        explain["sensitivity"] = {"kinds": () if words.sensitivity == "none" else separated(words.sensitivity)}
    if words.metrics:
        explain["metrics"] = () if words.metrics == "none" else separated(words.metrics)
    if explain:
        settings["explain"] = explain
    if words.seed is not None:
        settings["seed"] = words.seed
    return settings


def _datasets(text: str | None, source_size: int, packs: Path, progress: Progress) -> tuple[str, ...]:
    """The data sets of `--datasets`; those that may be left out are, where their files are not here."""
    from maehpc.errors import InputError

    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    here = _here(source_size, packs) if text == "all" or any(word.endswith("?") for word in words) else {}
    if text == "all":
        words = [f"{name}?" for name in here]

    def is_here(name: str) -> bool:
        return here.get(name, False) or (name not in here and Path(name).exists())

    chosen = [word.removesuffix("?") for word in words if word and (word[-1] != "?" or is_here(word[:-1]))]
    left_out = [word[:-1] for word in words if word.endswith("?") and word[:-1] not in chosen]
    if left_out:
        progress.say(f"left out: {', '.join(left_out)} (no file here; see `maehpc data list`)")
    if not chosen:
        raise InputError(f"--datasets {text}: no data set is here; see `maehpc data list`")
    return tuple(chosen)


def _classified(experiment: Experiment, recipe: Recipe, packs: Path, progress: Progress) -> tuple[str, ...]:
    """Every data set that has a finished classifier and whose images are here; says of the others why not.

    Raises:
        InputError: there is none.
    """
    from maehpc.data import dataset_name
    from maehpc.errors import InputError

    given = {dataset_name(dataset): dataset for dataset in recipe.datasets}
    here = _here(recipe.data.source_size, packs)
    begun = experiment.datasets_of("finetune")
    chosen, why_not = [], {}
    for name in dict.fromkeys([*begun, *(name for name, is_here in here.items() if is_here)]):
        dataset = given.get(name, name)
        if not (experiment.stage("finetune", name) / "done.json").is_file():
            why_not[name] = "no finished classifier"
        elif here.get(dataset, False) or Path(dataset).exists():
            chosen.append(dataset)
        else:
            why_not[name] = "its images are not here"
    if why_not:
        progress.say(f"left out: {', '.join(f'{name} ({why})' for name, why in why_not.items())}")
    if not chosen:
        raise InputError(
            f"--datasets all: no data set whose images are here has a finished classifier in {experiment.root}; run "
            f"`maehpc run finetune` first, or name the experiment with --name"
        )
    return tuple(chosen)


def _here(source_size: int, packs: Path) -> dict[str, bool]:
    """Whether each set of the catalogue is here at a size, pixels."""
    from maehpc.data import available

    return {
        status.entry.name: status.state != "missing"
        for status in available(packs)
        if status.size == source_size or len(status.entry.sizes) == 1
    }
