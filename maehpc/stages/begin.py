"""Beginning an experiment, or going on with one: its recipe and provenance are written before anything is computed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from maehpc import files
from maehpc.data import dataset_name
from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.ownership import PATIENCE_S, shared_use, turn
from maehpc.recipes import Recipe, recipe_yaml
from maehpc.recipes.begun import begun_recipe
from maehpc.stages.context import Context, differing_fields
from maehpc.stages.inputs import prepared_pack
from maehpc.stages.provenance import provenance, record

DECIDED_BY = {
    "pretrain": ("seed", "data", "encoder", "pretrain"),
    "finetune": ("seed", "data", "encoder", "finetune"),
    "probe": ("seed", "data", "encoder", "probe"),
    "ledger": ("seed", "data", "encoder", "finetune", "explain"),
}
"""Sections of a recipe that may not change once the experiment holds that folder."""


def _decided(recipe: Recipe, folder: str) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", include=set(DECIDED_BY[folder]))
    values["data"].pop("resident_bytes")
    if folder == "pretrain":
        values["encoder"].pop("weights")
    for section in ("pretrain", "finetune", "probe"):
        values.get(section, {}).pop("checkpoint", None)
    return values


def settled_recipe(experiment: Experiment, recipe: Recipe) -> Recipe:
    """`recipe` with the data sets of earlier runs added, once it agrees with what they computed.

    Raises:
        InputError: it would change what the experiment already holds.
    """
    before = begun_recipe(experiment)
    if before is None:
        return recipe
    for folder in DECIDED_BY:
        if not (experiment.root / folder).is_dir():
            continue
        changes = differing_fields(_decided(before, folder), _decided(recipe, folder))
        if changes:
            raise InputError(
                f"{experiment.root} was begun with another recipe ({changes[0]}"
                f"{f' and {len(changes) - 1} more' if len(changes) > 1 else ''}); give this run another --name"
            )
    names = dict.fromkeys([*before.datasets, *recipe.datasets])
    return recipe.model_copy(update={"datasets": tuple(names)})


@contextmanager
def begin(context: Context, command: list[str], stages: Collection[str]) -> Iterator[None]:
    """Packs the data, writes recipe.yaml and provenance.json, and keeps the recipe unchanged for the block's length.

    Rank 0 does all of it; the others wait. Several runs may use one experiment at once as long as none changes its
    recipe.

    Args:
        context: of the run.
        command: words after `maehpc`.
        stages: that will be run.

    Raises:
        InputError: a data set cannot be had, the recipe contradicts the experiment, or another run uses the old one.
        RunError: the results folder cannot be written.
    """
    with ExitStack() as until_end:
        context.world.from_leader(lambda: _settle(context, command, stages, until_end))
        yield


def _settle(context: Context, command: list[str], stages: Collection[str], until_end: ExitStack) -> None:
    experiment, recipe = context.experiment, context.recipe
    settled_recipe(experiment, recipe)
    digests = _packed(context, stages)
    files.require_writable(experiment.root)
    # An earlier start of the same job may still hold the locks, on a host that was given up; it is about to end.
    patience_s = PATIENCE_S if context.identity else 0.0
    with turn(experiment.root / ".turn"):
        before = begun_recipe(experiment)
        settled = settled_recipe(experiment, recipe)
        changed = before is None or before.model_copy(update={"datasets": settled.datasets}) != settled
        refusal = f"{experiment.root} is in use by a run of another recipe; wait for it, or give another --name"
        use = shared_use(experiment.root / ".lock", refusal, alone=changed, patience_s=patience_s)
        share = until_end.enter_context(use)
        files.write_text(experiment.recipe, recipe_yaml(settled))
        record(experiment.provenance, provenance(command, context.device, digests))
        share()


def _packed(context: Context, stages: Collection[str]) -> dict[str, str]:
    """Digest of each data set's pack, by name."""
    digests: dict[str, str] = {}
    for dataset in context.recipe.datasets:
        name = dataset_name(dataset)
        if name in digests:
            raise InputError(f"datasets: two of them are called '{name}'; rename one of the files")
        with prepared_pack(context, dataset) as pack:
            digests[name] = pack.info.digest
            if "explain" in stages and context.recipe.explain.target == "label" and pack.info.task == "multi-label":
                raise InputError(
                    f"explain.target: label needs one label an image, and {name} has several; use prediction"
                )
    return digests
