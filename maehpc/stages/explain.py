"""The explain stage: a classifier and a split to maps and scores in a store, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maehpc import files
from maehpc.data import Pack, dataset_name
from maehpc.devices import make_reproducible
from maehpc.errors import InputError
from maehpc.explain import Explainer, Explanation, NoiseKey
from maehpc.maps import ArrayLayout, MapStore, StoreLayout
from maehpc.models import Classifier, grid_size, load_weights
from maehpc.ownership import own
from maehpc.recipes import ExplainSettings
from maehpc.stages.context import Context, differing_fields, read_json
from maehpc.stages.finetune import CLASSIFIER, new_classifier
from maehpc.stages.inputs import data_inputs, open_pack, split_batches, stage_output
from maehpc.training.batches import Batches

NAME = "explain"


def explain(context: Context, dataset: str) -> dict[str, Any]:
    """Explains one data set's split; shards that stand whole are not computed again.

    Returns:
        `dataset`, `images`, `shards`, `computed` (shards of this run) and `store` (its path).

    Raises:
        InputError: no classifier, wrong settings, or the store holds other results.
        RunError: the disk refused, or a newer attempt took over.
    """
    make_reproducible(context.device)
    recipe, name = context.recipe, dataset_name(dataset)
    classifier_path, classifier_digest = stage_output(context, "finetune", name, CLASSIFIER)
    refuse_other_classifier(context, name)
    with open_pack(context, dataset) as pack:
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
        explainer = Explainer(classifier, recipe.explain, batches.preprocess, NoiseKey(recipe.seed, name))
        count = min(recipe.explain.images or len(batches.split), len(batches.split))
        layout = store_layout(context, pack, batches, grid_size(classifier.encoder), count, classifier_digest)
        with open_store(context, name, layout, inputs) as store:
            missing = store.missing(deep=True)
            finished = layout.shards - len(missing)
            if not missing:
                context.progress.say(f"{NAME} {name}: already done")
            shard_size = layout.shard_images
            done = min(finished * shard_size, count)
            with context.progress.bar(f"{NAME} {name}", count, done) as bar:
                for shard in missing:
                    indices = torch.arange(shard * shard_size, min((shard + 1) * shard_size, count))
                    parts = []
                    for chunk in indices.split(recipe.explain.batch_size):
                        parts.append(explain_batch(explainer, batches, chunk, recipe.explain))
                        bar.advance(len(chunk))
                    store.write_shard(shard, concatenated(parts))
            return {
                "dataset": name,
                "images": count,
                "shards": layout.shards,
                "computed": len(missing),
                "store": str(context.experiment.maps(name)),
            }


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


@contextmanager
def open_store(context: Context, name: str, layout: StoreLayout, inputs: dict[str, Any]) -> Iterator[MapStore]:
    """Owns the data set's store and begins or reopens it."""
    ledger = context.experiment.ledger(name)
    files.require_writable(ledger)
    with own(ledger) as owner:
        yield MapStore.create(context.experiment.maps(name), ledger, layout, inputs, owner)


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
    }
    for method, values in explanation.completeness.items():
        arrays[f"{method}_completeness"] = values
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


def map_layout(method: str, settings: ExplainSettings, side: int, channels: int, grid: tuple[int, int]) -> ArrayLayout:
    """Dimensions of one image's map."""
    dtype = settings.maps.dtype
    if method == "gradcam" and settings.gradcam.upsample == "none":
        return ArrayLayout(("grid_y", "grid_x"), grid, dtype)
    if method == "gradcam" or settings.maps.channels == "reduced":
        return ArrayLayout(("y", "x"), (side, side), dtype)
    return ArrayLayout(("channel", "y", "x"), (channels, side, side), dtype)


def store_layout(
    context: Context, pack: Pack, batches: Batches, grid: tuple[int, int], count: int, classifier: str
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
    samples = settings.sensitivity.samples
    for method in settings.methods:
        arrays[method] = map_layout(method, settings, side, data.channels, grid)
        if method.startswith("deeplift"):
            arrays[f"{method}_completeness"] = ArrayLayout((), (), "float32")
        if samples:
            arrays[f"{method}_sensitivity"] = ArrayLayout(("sample",), (samples,), "float32")
            arrays[f"{method}_sensitivity_max"] = ArrayLayout((), (), "float32")
            arrays[f"{method}_sensitivity_mean"] = ArrayLayout((), (), "float32")
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
        "mean": list(batches.preprocess.mean),
        "std": list(batches.preprocess.std),
    }
    return StoreLayout(count, settings.maps.shard_images, arrays, attributes)
