"""Experiments on disk, as the stages leave them, made of numbers that tests can check. Stores go through MapStore."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy import ndimage

from maehpc import files
from maehpc.experiment import Experiment
from maehpc.maps import ArrayLayout, MapStore, StoreLayout
from maehpc.ownership import own
from maehpc.recipes import ExplainSettings, Recipe, recipe_yaml

METHODS = ("saliency", "gradcam", "deeplift-captum")
GRID = 4


@dataclass(frozen=True)
class Study:
    """One data set of an experiment.

    Attributes:
        name: of the data set.
        images: uint8 [N, S, S, C], those that are explained.
        samples: random perturbations an image; 0 leaves them out.
        searches: kinds of search for an adversarial perturbation.
        floors: images whose noise floor is known.
        metrics: names; `deletion` has a curve beside its own value.
        multi_label: whether labels are sets.
        full: whether maps keep their channels.
        pixels: whether the store keeps the images.
        written: shards that explain has finished; all where None.
    """

    name: str = "digits"
    images: NDArray[np.uint8] = field(
        default_factory=lambda: np.random.default_rng(1).integers(0, 256, (10, 16, 16, 3), np.uint8)
    )
    samples: int = 3
    searches: tuple[str, ...] = ()
    floors: int = 0
    metrics: tuple[str, ...] = ()
    multi_label: bool = False
    full: bool = False
    pixels: bool = True
    shard_images: int = 4
    written: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ("malignant", "normal, benign", "a_very long name of a class, with_underscores & more")

    @property
    def title(self) -> str:
        return self.name.title().replace("mnist", "MNIST")


def write_experiment(root: Path, *studies: Study, seed: int = 0) -> dict[str, dict[str, NDArray[Any]]]:
    """Writes a whole experiment; returns the arrays of each store by data set."""
    experiment = Experiment(root)
    write_recipe(experiment, "pretrain", *(study.name for study in studies))
    for study in studies:
        write_training(experiment, study)
    return {study.name: write_maps(experiment, study, seed) for study in studies}


def write_explanations(root: Path, study: Study, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Writes an experiment that holds maps alone, which is reported quickly; returns the arrays of its store."""
    experiment = Experiment(root)
    write_recipe(experiment, "scratch", study.name)
    return write_maps(experiment, study, seed)


UNTRAINED = ("finetuning is not finished, so accuracy and AUC are unknown", "no learning curve of finetuning")
"""What such an experiment lacks."""


def write_recipe(experiment: Experiment, weights: str, *datasets: str) -> None:
    recipe = Recipe.model_validate({"datasets": datasets, "encoder": {"weights": weights}})
    files.write_text(experiment.recipe, recipe_yaml(recipe))


def write_training(experiment: Experiment, study: Study) -> None:
    """Logs of pretraining and finetuning, their scores, and reconstructions."""
    rng = np.random.default_rng(5)
    pretrain, finetune = experiment.stage("pretrain", study.name), experiment.stage("finetune", study.name)
    lines: list[dict[str, Any]] = []
    for step in range(1, 121):
        noise = float(rng.normal(0, 0.02))
        lines.append(
            {"kind": "step", "step": step, "epoch": step / 6, "loss": 0.4 + 0.6 * 0.97**step + noise, "lr": 1e-3}
        )
        if step % 6 == 0:
            lines.append(
                {"kind": "epoch", "step": step, "epoch": step // 6, "split": "train", "loss": 0.4 + 0.6 * 0.97**step}
            )
    write_log(pretrain / "metrics.jsonl", lines)
    lines = []
    for step in range(1, 81):
        noise = float(rng.normal(0, 0.05))
        loss, accuracy = 0.7 + 0.97**step, 0.7 - 0.4 * 0.95**step
        step_scores = {"loss": loss + noise, "accuracy": accuracy - noise, "lr": 0.1, "grad_norm": 1.0}
        lines.append({"kind": "step", "step": step, "epoch": step / 8, **step_scores})
        if step % 8 == 0:
            for split, worse in (("train", 0.0), ("val", 0.08)):
                scores = {"loss": loss + worse, "accuracy": accuracy - worse, "auc": accuracy + 0.15 - worse}
                lines.append({"kind": "epoch", "step": step, "epoch": step // 8, "split": split, **scores})
    write_log(finetune / "metrics.jsonl", lines)
    files.write_json(
        finetune / "done.json",
        {
            "digest": "0" * 64,
            "files": {},
            "scores": {
                "train": {"loss": 0.5, "accuracy": 0.75, "auc": 0.875},
                "val": {"loss": 0.75, "accuracy": 0.625, "auc": 0.75},
                "test": {"loss": 1.25, "accuracy": 0.5625, "auc": None if study.multi_label else 0.6875},
            },
            "images": {"train": 1000, "val": 78, "test": 156},
            "dataset": {"name": study.name, "title": study.title, "task": "x", "classes": list(study.classes)},
        },
    )
    chosen = study.images[:8]
    write_reconstructions(pretrain / "reconstructions.safetensors", chosen)


def write_log(path: Path, lines: list[dict[str, Any]]) -> None:
    files.write_bytes(path, b"".join(files.canonical_json(line) + b"\n" for line in lines))


def write_reconstructions(path: Path, images: NDArray[np.uint8]) -> None:
    cell = images.shape[1] // GRID
    visible = np.random.default_rng(2).random((len(images), GRID, GRID)) < 0.25
    visible = visible.repeat(cell, 1).repeat(cell, 2)[..., None]
    blurred = ndimage.gaussian_filter(images, (0, cell / 3, cell / 3, 0))
    arrays = {
        "original": images,
        "masked": np.where(visible, images, 128).astype(np.uint8),
        "reconstructed": np.where(visible, images, blurred).astype(np.uint8),
        "index": np.arange(len(images), dtype=np.int64) * 7,
    }
    files.make_folder(path.parent)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {"mask_ratio": "0.75"})


def write_maps(experiment: Experiment, study: Study, seed: int = 0) -> dict[str, NDArray[Any]]:
    """A store of maps and scores; returns what all of its shards hold, written or not."""
    arrays = explanations(study, seed)
    layout = store_layout(study, arrays)
    ledger = experiment.ledger(study.name)
    with own(ledger) as owner:
        store = MapStore.create(experiment.maps(study.name), ledger, layout, {"seed": seed}, owner)
        for shard in range(layout.shards) if study.written is None else study.written:
            start, stop = layout.span(shard)
            store.write_shard(shard, {name: array[start:stop] for name, array in arrays.items()})
    return arrays


def explanations(study: Study, seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    count, side, _, channels = study.images.shape
    classes = len(study.classes)
    labels = rng.integers(0, 2, (count, classes)) if study.multi_label else rng.integers(0, classes, count)
    grey = study.images.mean(-1)
    edges = ndimage.gaussian_gradient_magnitude(grey, (0, 1.5, 1.5)) + 3
    full = rng.normal(size=(count, channels, side, side))
    saliency = np.abs(full) * edges[:, None]
    deeplift = ndimage.gaussian_filter(full, (0, 0, 1, 1)) * (grey - grey.mean((1, 2), keepdims=True))[:, None]
    gradcam = ndimage.gaussian_filter(rng.normal(size=(count, GRID, GRID)), (0, 0.7, 0.7))
    maps = {
        "saliency": saliency if study.full else saliency.max(1),
        "gradcam": gradcam,
        "deeplift-captum": deeplift if study.full else deeplift.sum(1),
    }
    arrays: dict[str, NDArray[Any]] = {
        "label": labels.astype(np.int64),
        "prediction": rng.integers(0, classes, count).astype(np.int64),
        "target": np.zeros(count, np.int64),
        "logits": rng.normal(size=(count, classes)).astype(np.float32),
        **{name: values.astype(np.float32) for name, values in maps.items()},
        "deeplift-captum_completeness": rng.lognormal(-1, 1, count).astype(np.float32),
    }
    if study.pixels:
        arrays["pixels"] = study.images
    if study.samples:
        arrays["flipped"] = rng.random((count, study.samples)) < 0.2
        for method, size in zip(METHODS, (0.2, 0.4, 0.05), strict=True):
            values = (size * rng.lognormal(0, 0.6, (count, 1)) * rng.uniform(0.6, 1, (count, study.samples))).astype(
                np.float32
            )
            if method == "gradcam":
                values[2] = np.nan
                arrays["gradcam"][2] = 0
            arrays[f"{method}_sensitivity"] = values
            arrays[f"{method}_sensitivity_max"] = values.max(1)
            arrays[f"{method}_sensitivity_mean"] = values.mean(1)
    arrays |= further_scores(study, np.random.default_rng(seed + 1000))
    return arrays


def further_scores(study: Study, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Noise floors, what searches found, and metrics; GradCAM's third map is zero everywhere."""
    count, arrays = len(study.images), {}
    for method in METHODS:
        zero = np.arange(count) == 2 if method == "gradcam" else np.zeros(count, np.bool_)
        drawn = {f"{method}_floor": np.where(np.arange(count) < study.floors, rng.lognormal(-14, 1, count), np.nan)}
        for kind in study.searches:
            drawn[f"{method}_{kind}_change"] = rng.lognormal(0, 0.6, count)
            drawn[f"{method}_{kind}_top"] = rng.random(count)
            drawn[f"{method}_{kind}_spearman"] = rng.uniform(-1, 1, count)
            drawn[f"{method}_{kind}_centre"] = rng.random(count) / 4
        for metric in study.metrics:
            drawn[f"{method}_{metric}"] = rng.random(count)
            if metric == "deletion":
                drawn[f"{method}_{metric}_curve"] = rng.random((count, 4))
        for name, values in drawn.items():
            values[zero] = np.nan
            arrays[name] = values.astype(np.float32)
    return arrays


def store_layout(study: Study, arrays: dict[str, NDArray[Any]]) -> StoreLayout:
    dims = {
        "label": ("class",) if study.multi_label else (),
        "logits": ("class",),
        "flipped": ("sample",),
        "gradcam": ("grid_y", "grid_x"),
        "pixels": ("y", "x", "channel"),
    }
    full = ("channel", "y", "x") if study.full else ("y", "x")
    dims |= {"saliency": full, "deeplift-captum": full}
    dims |= {f"{method}_sensitivity": ("sample",) for method in METHODS}
    dims |= {f"{method}_deletion_curve": ("step",) for method in METHODS}
    settings = ExplainSettings.model_validate(
        {
            "sensitivity": {"samples": study.samples, "kinds": ("random", *study.searches)},
            "metrics": study.metrics,
            "maps": {
                "channels": "full" if study.full else "reduced",
                "pixels": study.pixels,
                "shard_images": study.shard_images,
            },
        }
    )
    return StoreLayout(
        images=len(study.images),
        shard_images=study.shard_images,
        arrays={
            name: ArrayLayout(dims.get(name, ()), array.shape[1:], str(array.dtype)) for name, array in arrays.items()
        },
        attributes={
            "dataset": study.name,
            "title": study.title,
            "task": "multi-label" if study.multi_label else "multi-class",
            "classes": list(study.classes),
            "split": "test",
            "methods": list(METHODS),
            "explain": settings.model_dump(mode="json"),
            "seed": 0,
            "image_size": study.images.shape[1],
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
        },
    )
