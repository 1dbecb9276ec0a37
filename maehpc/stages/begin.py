"""Beginning an experiment, or going on with one: its recipe and provenance are written before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maehpc import files
from maehpc.data import dataset_name
from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.recipes import Recipe, read_recipe, recipe_yaml
from maehpc.stages.context import Context, differing_fields
from maehpc.stages.inputs import open_pack
from maehpc.stages.provenance import provenance, record

DECIDED_BY = {
    "pretrain": ("seed", "data", "encoder", "pretrain"),
    "finetune": ("seed", "data", "encoder", "finetune"),
    "ledger": ("seed", "data", "encoder", "finetune", "explain"),
}
"""Sections of a recipe that may not change once the experiment holds that folder."""


def existing_recipe(experiment: Experiment) -> Recipe | None:
    """The recipe an experiment was begun with, or None where it is new."""
    return read_recipe(experiment.recipe) if experiment.recipe.is_file() else None


def _decided(recipe: Recipe, folder: str) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include=set(DECIDED_BY[folder]))
    values["data"].pop("resident_bytes")
    if folder == "pretrain":
        values["encoder"].pop("weights")
    for section in ("pretrain", "finetune"):
        values.get(section, {}).pop("checkpoint", None)
    return values


def settled_recipe(experiment: Experiment, recipe: Recipe) -> Recipe:
    """`recipe` with the data sets of earlier runs added, once it agrees with what they computed.

    Raises:
        InputError: it would change what the experiment already holds.
    """
    before = existing_recipe(experiment)
    if before is None:
        return recipe
    for folder in DECIDED_BY:
        if not (experiment.root / folder).is_dir():
            continue
        changes = differing_fields(_decided(before, folder), _decided(recipe, folder))
        if changes:
            raise InputError(
                f"{experiment.root} was begun with another recipe ({changes[0]}"
                f"{f' and {len(changes) - 1} more' if len(changes) > 1 else ''}); give this run another --name, "
                f"or delete {experiment.root / folder}"
            )
    names = dict.fromkeys([*before.datasets, *recipe.datasets])
    return recipe.model_copy(update={"datasets": tuple(names)})


def begin(context: Context, command: list[str]) -> None:
    """Packs the data, then writes recipe.yaml and provenance.json.

    Raises:
        InputError: a data set cannot be had, or the recipe contradicts the experiment.
        RunError: the results folder cannot be written.
    """
    root: Path = context.experiment.root
    recipe = settled_recipe(context.experiment, context.recipe)
    names = [dataset_name(dataset) for dataset in context.recipe.datasets]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"datasets: two of them are called '{name}'; rename one of the files")
    files.require_writable(root)
    digests: dict[str, str] = {}
    for dataset in context.recipe.datasets:
        with open_pack(context, dataset) as pack:
            digests[pack.info.name] = pack.info.digest
    files.write_text(context.experiment.recipe, recipe_yaml(recipe))
    record(context.experiment.provenance, provenance(command, context.device, digests))
