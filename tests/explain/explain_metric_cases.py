"""Batches as the explain stage hands them to metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from explain_references import explain_settings, images, preprocess, vit
from torch import Tensor

from maehpc.data import Preprocess
from maehpc.explain import Engine, NoiseKey
from maehpc.explain.metrics import Given, Metric, make_metrics
from maehpc.models import Classifier

KEY = NoiseKey(7, "toy")


def given_of(
    classifier: Classifier,
    *methods: str,
    pixels: Tensor | None = None,
    indices: Tensor | None = None,
    processing: Preprocess | None = None,
    **settings: object,
) -> Given:
    """A batch with its maps; four random images where none are given."""
    engine_settings = explain_settings(*methods, **settings)
    pixels = images(4) if pixels is None else pixels
    side = pixels.shape[-1]
    processing = processing or preprocess(side)
    indices = torch.arange(len(pixels)) if indices is None else indices
    weight = next(classifier.parameters())
    engine = Engine(classifier, engine_settings, weight.new_zeros(1, *pixels.shape[1:]), KEY.seed)
    x = processing.normalise(pixels).to(weight)
    seen = engine.attribute(x)
    return Given(engine, engine_settings, processing, pixels, x, indices, seen.targets, seen.logits, seen.maps, KEY)


def toy(*methods: str, **settings: object) -> Given:
    """Four images explained by a small ViT."""
    return given_of(vit(), *methods, **settings)


def with_maps(given: Given, **maps: Tensor) -> Given:
    """The same batch with maps made by hand."""
    return replace(given, maps={**given.maps, **maps})


def rows(given: Given, chosen: list[int]) -> Given:
    """Some images of a batch, explained among themselves."""
    names = ("pixels", "x", "indices", "targets", "logits")
    attributed = given.engine.attribute(given.x[chosen], given.targets[chosen])
    return replace(given, **{name: getattr(given, name)[chosen] for name in names}, maps=attributed.maps)


def metric(given: Given, name: str, **options: object) -> Metric:
    """One metric of the batch's engine."""
    settings = given.settings.model_copy(update={"metrics": (name,), "options": {name: options}})
    return make_metrics(replace(given.engine.setup, settings=settings))[name]


def mask_file(folder: Path, count: int = 8, side: int = 16) -> str:
    """A file with a rectangle an image, each another."""
    masks = np.zeros((count, side, side), dtype=bool)
    for index in range(count):
        masks[index, 2 + index % 5 : 9 + index % 3, 1 + index % 4 : 12] = True
    np.save(folder / "masks.npy", masks)
    return str(folder / "masks.npy")
