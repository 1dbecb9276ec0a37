"""One data set's split, ready to be explained: the classifier, the batches, the layout of its store, and any image of
it to the arrays that are kept. Which shards are computed, where and by whom is `explain`'s and `pooled`'s business."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maehpc.data import Pack, dataset_name
from maehpc.devices import settle
from maehpc.errors import InputError, Interrupted
from maehpc.explain import Explainer, Explanation, NoiseKey
from maehpc.explain.methods import Method
from maehpc.interruption import Stop
from maehpc.maps import ArrayLayout, StoreLayout
from maehpc.models import Classifier, grid_size, load_weights
from maehpc.recipes import ExplainSettings, plugins
from maehpc.recipes.settings import SEARCH_SCORES
from maehpc.stages.context import Context, differing_fields, read_json
from maehpc.stages.finetune import CLASSIFIER, new_classifier
from maehpc.stages.inputs import data_inputs, prepared_pack, split_batches, stage_output
from maehpc.training.batches import Batches

NAME = "explain"


@dataclass(frozen=True)
class Prepared:
    """What explains a split's images.

    Attributes:
        name: of the data set.
        label: how progress and warnings name it.
        layout: of its store.
        inputs: JSON of all that the content depends on besides.
        explainer: the engine.
        batches: of the split.
        settings: of the recipe.
        cost: of an image, about: multiplications by weights. What a pool deals first rests on it until times are known.
    """

    name: str
    label: str
    layout: StoreLayout
    inputs: dict[str, Any]
    explainer: Explainer
    batches: Batches
    settings: ExplainSettings
    cost: float

    def compute(
        self, wanted: range, stop: Stop, advance: Callable[[int], object], warn: Callable[[str], object]
    ) -> dict[str, NDArray[Any]]:
        """Arrays of some images, by their names in the store; the first axis is the image.

        Args:
            wanted: indices of the images.
            stop: looked at between two batches.
            advance: told how many images are finished.
            warn: told what the engine warns of.

        Raises:
            Interrupted: somebody wanted to stop.
        """
        group, workers = self.explainer.group, self.explainer.workers
        parts = []
        for chunk in whole_groups(wanted, group, group * workers, len(self.batches.split)):
            if stop.reason is not None:
                raise Interrupted(self.label, stop.reason)
            kept = [place for place, image in enumerate(chunk) if image in wanted]
            arrays = explain_batch(self.explainer, self.batches, torch.tensor(chunk), self.settings)
            parts.append({name: values[kept[0] : kept[-1] + 1] for name, values in arrays.items()})
            for warning in self.explainer.take_warnings():
                warn(f"{self.label}: {warning}")
            advance(len(kept))
        return concatenated(parts)


@contextmanager
def prepared(context: Context, dataset: str) -> Iterator[Prepared]:
    """Makes one data set ready, whose pack is open for the length of the block.

    Raises:
        InputError: no classifier, or wrong settings.
    """
    settle(context.device)
    recipe, name = context.recipe, dataset_name(dataset)
    classifier_path, classifier_digest = finished_classifier(context, name)
    with prepared_pack(context, dataset) as pack:
        inputs = {
            **data_inputs(context, pack),
            "encoder": recipe.encoder.model_dump(mode="json", exclude={"weights"}),
            "classifier": {
                "weights": classifier_digest,
                "adapter": recipe.finetune.adapter.model_dump(mode="json"),
                "representation": recipe.finetune.representation,
            },
            "explain": recipe.explain.model_dump(mode="json"),
        }
        batches = split_batches(context, pack, recipe.explain.split, NAME)
        classifier = load_classifier(context, pack, classifier_path)
        explainer = Explainer(
            classifier, recipe.explain, batches.preprocess, NoiseKey(recipe.seed, name), len(batches.split)
        )
        files_read = {name: dict(metric.inputs) for name, metric in explainer.metrics.items() if metric.inputs}
        if files_read:
            inputs["metrics"] = files_read
        count = min(recipe.explain.images or len(batches.split), len(batches.split))
        grid = grid_size(classifier.encoder)
        layout = store_layout(context, pack, batches, explainer, grid, count, classifier_digest)
        weights = sum(weight.numel() for weight in classifier.encoder.parameters())
        patches = math.prod(grid)
        cost = float(weights * patches * evaluations(recipe.explain, patches))
        yield Prepared(name, f"{NAME} {name}", layout, inputs, explainer, batches, recipe.explain, cost)


def evaluations(settings: ExplainSettings, patches: int) -> int:
    """About how often a model is run, forward or back, to explain one image.

    Args:
        settings: methods, perturbations, searches and metrics.
        patches: of an image.
    """
    each = 0
    for name in settings.methods:
        forwards, pullbacks = plugins.facts("methods", name).get("own_passes", (0, 0))
        each += 2 + (patches if forwards == "patches" else forwards) + pullbacks
    sensitivity = settings.sensitivity
    found = each * (1 + sensitivity.drawn + len(sensitivity.searches) * sensitivity.search.steps)
    for name in settings.metrics:
        facts = plugins.facts("metrics", name)
        found += facts.get("forwards", 0) + len(settings.methods) * facts.get("forwards_each", 0)
        found += each * facts.get("attributions", 0)
    return found


def finished_classifier(context: Context, name: str) -> tuple[Path, str]:
    """Path and SHA-256 of the classifier to explain, once it is known to be the recipe's.

    Raises:
        InputError: there is none, or it is another recipe's.
    """
    found = stage_output(context, "finetune", name, CLASSIFIER)
    refuse_other_classifier(context, name)
    return found


def refuse_other_classifier(context: Context, name: str) -> None:
    """Compares the recipe with what the classifier was finetuned with: its weights do not tell what they serve.

    Raises:
        InputError: they differ.
    """
    path = context.experiment.stage("finetune", name) / "stage.json"
    made_with = read_json(path)
    if not isinstance(made_with, dict):
        raise InputError(f"{path} is missing; run `maehpc run finetune` again")
    recipe = context.recipe
    wanted = {
        "encoder": recipe.encoder.model_dump(mode="json", exclude={"weights"}),
        "finetune": recipe.finetune.model_dump(mode="json", exclude={"checkpoint"}),
    }
    changes = differing_fields({section: made_with.get(section) for section in wanted}, wanted)
    if changes:
        raise InputError(
            f"{path.parent} holds a classifier of another recipe ({changes[0]}); restore the recipe, or give this run "
            f"another --name and finetune there"
        )


def load_classifier(context: Context, pack: Pack, path: Path) -> Classifier:
    """The finished classifier in evaluation mode, its weights frozen."""
    scratch = context.recipe.encoder.model_copy(update={"weights": "scratch"})
    without = replace(context, recipe=context.recipe.model_copy(update={"encoder": scratch}))
    classifier = new_classifier(without, pack, None)
    load_weights(classifier, path)
    return classifier.eval().requires_grad_(False)


def whole_groups(wanted: range, group: int, chunk: int, images: int) -> Iterator[range]:
    """Cuts a shard's images into chunks of whole groups, so that an image has the same group however a split is cut.

    Where a shard ends inside a group, the rest of the group is computed with it and dropped.

    Args:
        wanted: the shard's images.
        group: images computed as one; groups begin at its multiples.
        chunk: images at a time, a multiple of `group`.
        images: in the split.
    """
    start = wanted.start // group * group
    stop = min(-(-wanted.stop // group) * group, images)
    return (range(place, min(place + chunk, stop)) for place in range(start, stop, chunk))


def explain_batch(
    explainer: Explainer, batches: Batches, indices: Tensor, settings: ExplainSettings
) -> dict[str, NDArray[Any]]:
    """Arrays of one batch, by their names in the store; the first axis is the image."""
    pixels = batches.preprocess.pixels(batches.split.batch(indices))
    labels = batches.split.labels[indices.to(batches.split.labels.device)]
    explanation = explainer.explain(pixels, indices, labels)
    arrays = stored_arrays(explanation, labels)
    if settings.maps.pixels:
        arrays["pixels"] = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return {name: array.detach().cpu().numpy() for name, array in arrays.items()}


def stored_arrays(explanation: Explanation, labels: Tensor) -> dict[str, Tensor]:
    """An explanation under the names its parts have in a store."""
    arrays = {
        "label": labels,
        "prediction": explanation.prediction,
        "target": explanation.target,
        "logits": explanation.logits,
        **explanation.maps,
        **explanation.metrics,
    }
    for method, values in explanation.completeness.items():
        arrays[f"{method}_completeness"] = values
    for method, values in explanation.floor.items():
        arrays[f"{method}_floor"] = values
    for name, found in explanation.searched.items():
        for score in SEARCH_SCORES:
            arrays[f"{name}_{score}"] = getattr(found, score)
    if explanation.flipped.shape[1] == 0:
        return arrays  # no perturbation was asked for
    arrays["flipped"] = explanation.flipped
    for method, values in explanation.sensitivity.items():
        arrays[f"{method}_sensitivity"] = values
        arrays[f"{method}_sensitivity_max"] = values.amax(1)
        arrays[f"{method}_sensitivity_mean"] = values.mean(1)
    return arrays


def concatenated(parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Batches put together along the image axis."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def map_layout(
    method: Method, settings: ExplainSettings, side: int, channels: int, grid: tuple[int, int]
) -> ArrayLayout:
    """Dimensions of one image's map."""
    dtype = settings.maps.dtype
    if method.map_kind == "grid":
        return ArrayLayout(("grid_y", "grid_x"), grid, dtype)
    if method.map_kind == "plane" or settings.maps.channels == "reduced":
        return ArrayLayout(("y", "x"), (side, side), dtype)
    return ArrayLayout(("channel", "y", "x"), (channels, side, side), dtype)


def store_layout(
    context: Context,
    pack: Pack,
    batches: Batches,
    explainer: Explainer,
    grid: tuple[int, int],
    count: int,
    classifier: str,
) -> StoreLayout:
    """Arrays, dimensions and attributes of the store of one split."""
    settings, data, info = context.recipe.explain, context.recipe.data, pack.info
    side, classes = data.image_size, len(info.classes)
    labels = (
        ArrayLayout(("class",), (classes,), "int64") if info.task == "multi-label" else ArrayLayout((), (), "int64")
    )
    arrays = {
        "label": labels,
        "prediction": ArrayLayout((), (), "int64"),
        "target": ArrayLayout((), (), "int64"),
        "logits": ArrayLayout(("class",), (classes,), "float32"),
    }
    samples, score = settings.sensitivity.drawn, ArrayLayout((), (), "float32")
    for name, method in explainer.methods.items():
        arrays[name] = map_layout(method, settings, side, data.channels, grid)
        arrays[f"{name}_floor"] = score
        if method.complete:
            arrays[f"{name}_completeness"] = score
        for kind in settings.sensitivity.searches:
            arrays |= {f"{name}_{kind}_{part}": score for part in SEARCH_SCORES}
        if samples:
            arrays[f"{name}_sensitivity"] = ArrayLayout(("sample",), (samples,), "float32")
            arrays[f"{name}_sensitivity_max"] = score
            arrays[f"{name}_sensitivity_mean"] = score
        for metric, measure in explainer.metrics.items():
            for part, (dims, shape) in measure.arrays().items():
                arrays["_".join(filter(None, (name, metric, part)))] = ArrayLayout(dims, shape, "float32")
    if samples:
        arrays["flipped"] = ArrayLayout(("sample",), (samples,), "bool")
    if settings.maps.pixels:
        arrays["pixels"] = ArrayLayout(("y", "x", "channel"), (side, side, data.channels), "uint8")
    attributes = {
        "dataset": info.name,
        "title": info.title,
        "task": info.task,
        "classes": list(info.classes),
        "split": settings.split,
        "classifier": classifier,
        "methods": list(settings.methods),
        "explain": settings.model_dump(mode="json"),
        "seed": context.recipe.seed,
        "image_size": side,
        # What METHOD_deletion_curve[3] stands for is the fourth of "deletion_curve".
        "places": {
            "_".join(filter(None, (metric, part))): list(places)
            for metric, measure in explainer.metrics.items()
            for part, (dims, _) in measure.arrays().items()
            for dim, places in measure.coordinates().items()
            if dims == (dim,)
        },
        "mean": list(batches.preprocess.mean),
        "std": list(batches.preprocess.std),
    }
    return StoreLayout(count, settings.maps.shard_images, arrays, attributes)
