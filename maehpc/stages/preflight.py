"""What can be refused before anything is written: missing data, stages out of order, settings or weights that fit no
model.

A wrong GradCAM layer would otherwise be found after days of pretraining.
"""

from __future__ import annotations

from collections.abc import Collection

from maehpc.data import PackInfo, Preprocess, dataset_name, require
from maehpc.errors import InputError
from maehpc.explain import Explainer, NoiseKey
from maehpc.models import build_classifier, load_encoder
from maehpc.stages.context import Context
from maehpc.stages.finetune import CLASSIFIER, weights_file
from maehpc.stages.inputs import stage_output
from maehpc.stages.pretrain import ENCODER, build_mae
from maehpc.stages.probe import frozen_encoder

_NO_DATA = PackInfo("none", "", "multi-class", ("0", "1"), "", (0.5,), (0.5,), {}, (1, 1, 1), 0.5, 0.5)
"""Stands for a data set where only the shapes that the recipe gives matter."""


def check(context: Context, stages: Collection[str]) -> None:
    """Looks for the data and for what earlier stages must have left, and builds each stage's model once on the CPU.

    Args:
        context: of the run.
        stages: that will be run.

    Raises:
        InputError: a data set is not there, an earlier stage is not finished, a setting does not fit the model, or a
            weights file is missing, unreadable or of another shape.
    """
    recipe = context.recipe
    for dataset in recipe.datasets:  # no stage can be finished for what a word misspells
        require(dataset, recipe.data.source_size, context.packs)
    for dataset in recipe.datasets:
        name = dataset_name(dataset)
        if {"finetune", "probe"} & set(stages) and "pretrain" not in stages and recipe.encoder.weights == "pretrain":
            stage_output(context, "pretrain", name, ENCODER)
        if "explain" in stages and "finetune" not in stages:
            stage_output(context, "finetune", name, CLASSIFIER)
    if "pretrain" in stages:
        if recipe.encoder.weights != "pretrain":
            raise InputError(
                f"encoder.weights is {recipe.encoder.weights}, so that classifiers would not begin from what is "
                f"pretrained; set it to pretrain (and pretrain.weights to the file that pretraining begins from)"
            )
        build_mae(recipe)
    if "probe" in stages:
        untrained = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"weights": "scratch"})})
        frozen_encoder(untrained, weights_file(recipe.encoder))
    if not {"finetune", "explain"} & set(stages):
        return
    encoder = recipe.encoder.model_copy(update={"weights": "scratch"})
    head, data = recipe.finetune, recipe.data
    classifier = build_classifier(encoder, head.adapter, head.representation, data.image_size, data.channels, classes=2)
    path = weights_file(recipe.encoder)
    if path is not None:
        load_encoder(classifier.encoder, path)
    if "explain" in stages:
        Explainer(classifier, recipe.explain, Preprocess(data, _NO_DATA), NoiseKey(recipe.seed, "none"))
