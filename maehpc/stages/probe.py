"""The probe stage: an encoder and labelled images to a linear classifier on frozen features, and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from maehpc.data import dataset_name
from maehpc.devices import settle
from maehpc.errors import InputError
from maehpc.models import Classifier, build_encoder, has_class_token, load_encoder, save_weights
from maehpc.recipes import Recipe
from maehpc.stages.context import Context, stage_folder
from maehpc.stages.finetune import dataset_facts, first_weights
from maehpc.stages.inputs import data_inputs, labelled_splits, open_pack
from maehpc.training.loop import Loop, train
from maehpc.training.probe import NAME, ProbeTask

PROBE = "probe.safetensors"


def probe(context: Context, dataset: str) -> dict[str, Any]:
    """Trains a linear probe on one data set, or finds it done.

    Returns:
        The record of done.json, with the scores of the training images, the val and the test split.

    Raises:
        InputError: wrong data or weights, or the folder holds another recipe's results.
        RunError: the loss is not finite, or the disk refused.
        Interrupted: somebody wanted to stop.
    """
    settle(context.device)
    recipe, name, world = context.recipe, dataset_name(dataset), context.world
    weights, identity = first_weights(context, dataset)
    with open_pack(context, dataset) as pack:
        inputs = {
            **data_inputs(context, pack),
            "encoder": recipe.encoder.model_dump(mode="json", exclude={"weights"}),
            "weights": identity,
            "probe": recipe.probe.model_dump(mode="json", exclude={"checkpoint"}),
        }
        path = context.experiment.stage(NAME, name)
        with stage_folder(path, inputs, world, context.identity) as (folder, owner):
            if found := world.from_leader(folder.result):
                context.progress.say(f"{NAME} {name}: already done")
                return found
            frozen = world.alike(lambda: frozen_encoder(recipe, weights).to(context.device))
            splits = world.alike(lambda: labelled_splits(context, pack, NAME, recipe.probe))
            kind, classes, stop = pack.info.task, len(pack.info.classes), context.stop
            task = ProbeTask(frozen.represent, splits, kind, classes, recipe.probe, recipe.seed, world, stop)
            loop = Loop(f"{NAME} {name}", NAME, recipe.seed, recipe.probe)
            train(task, loop, folder.path, folder.digest, owner, context.progress, world, stop)

            def finish() -> dict[str, Any]:
                facts = {
                    "scores": {split: task.score(split) for split in splits},
                    "images": {split: len(images.indices) for split, images in splits.items()},
                    "dataset": dataset_facts(pack),
                }
                owner.still_owner()
                about = {"kind": "probe", "representation": recipe.probe.representation}
                save_weights(folder.path / PROBE, task.probe.state_dict(), about)
                return folder.finish(owner, [PROBE], facts)

            return world.from_leader(finish)


def frozen_encoder(recipe: Recipe, weights: Path | None) -> Classifier:
    """A classifier on the CPU whose `represent` gives the features: the encoder with its weights, in evaluation mode.

    Args:
        recipe: of the run.
        weights: file that is put into the encoder; None where it has its weights when it is built.

    Raises:
        InputError: the encoder cannot be built, has no class token where one is needed, or the weights do not fit.
    """
    settings = recipe.encoder
    if settings.weights != "timm":
        settings = settings.model_copy(update={"weights": "scratch"})
    encoder = build_encoder(settings, recipe.data.image_size, recipe.data.channels, seed=recipe.seed)
    if recipe.probe.representation == "cls" and not has_class_token(encoder):
        raise InputError(
            "probe.representation: cls needs a class token, which this encoder does not have; set it to mean"
        )
    if weights is not None:
        load_encoder(encoder, weights)
    classifier = Classifier(encoder, nn.Identity(), recipe.probe.representation)
    return classifier.eval().requires_grad_(False)
