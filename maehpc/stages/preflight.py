"""What can be refused before anything is written: settings that do not fit the model, weights that do not fit either.

A wrong GradCAM layer would otherwise be found after days of pretraining.
"""

from __future__ import annotations

from collections.abc import Collection

from maehpc.data import PackInfo, Preprocess
from maehpc.explain import Explainer, NoiseKey
from maehpc.models import build_classifier, load_encoder
from maehpc.recipes import Recipe
from maehpc.stages.finetune import weights_file
from maehpc.stages.pretrain import build_mae

_NO_DATA = PackInfo("none", "", "multi-class", ("0", "1"), "", (0.5,), (0.5,), {}, (1, 1, 1), 0.5, 0.5)
"""Stands for a data set where only the shapes that the recipe gives matter."""


def check(recipe: Recipe, stages: Collection[str]) -> None:
    """Builds each stage's model once, on the CPU and with random weights.

    Args:
        recipe: of the experiment.
        stages: that will be run.

    Raises:
        InputError: a setting does not fit the model, or a weights file is missing, unreadable or of another shape.
    """
    if "pretrain" in stages:
        build_mae(recipe)
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
