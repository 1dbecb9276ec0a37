"""What a stage leaves on the disk: bytes and files, from the shapes of what is written.

Tensors are counted exactly; headers, logs and records are estimated from above. Maps are counted as if they did not
compress. What `stages`, `training` and `maps` write is described here once more because asking them would import
PyTorch; the tests hold this description to real runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maehpc.launch.flops import Vit, adapter_layers
from maehpc.recipes import plugins
from maehpc.recipes.settings import (
    SEARCH_SCORES,
    AdapterSettings,
    DecoderSettings,
    ExplainSettings,
    OptimSettings,
    Recipe,
)

FLOAT = 4
HEADER = 110
"""Bytes that safetensors spends on naming one tensor, rounded up."""

RECORDS = 4096
"""Bytes of a stage's small records (stage.json, done.json, lock, attempt), rounded up."""

LOGGED = 500
"""Bytes a step of metrics.jsonl and its TensorBoard copy, rounded up."""

CHUNK = 64
"""Bytes around one compressed chunk of a store: frame, checksum, index entry."""

ARRAY = 1500
"""Bytes of one array's zarr.json, rounded up."""

ENTRY = 300
"""Bytes that store.json spends on one map or score, and the coordinate of scores on its name, rounded up."""

SHARD_RECORD = 250
"""Bytes a ledger spends on one file of one shard."""

EXPERIMENT_FILES = 4
"""recipe.yaml, provenance.json, and two locks."""


JOB_FILES = 10
"""A job that starts once: job, intent, script, acceptance, attempt, meeting place, heartbeat, outcome, two locks."""

LOGS = 2
"""Files of a rank's log."""


@dataclass(frozen=True)
class Tensors:
    """Some named tensors: how many, and numbers in all."""

    count: int = 0
    numbers: int = 0

    def __add__(self, other: Tensors) -> Tensors:
        """All of both."""
        return Tensors(self.count + other.count, self.numbers + other.numbers)

    @property
    def bytes(self) -> int:
        """Of a file that holds them in float32."""
        return self.numbers * FLOAT + self.count * HEADER


@dataclass(frozen=True)
class Footprint:
    """What a stage leaves and needs on the disk.

    Attributes:
        bytes: left at the end.
        peak_bytes: the most there is at any time.
        written_bytes: that went to the disk in all, every checkpoint included.
        files: left at the end; folders are not counted.
    """

    bytes: int
    peak_bytes: int
    written_bytes: int
    files: int


def job_files(jobs: int, ranks: int) -> int:
    """Files in the folders of so many jobs of so many ranks, if none of them is interrupted."""
    return jobs * (JOB_FILES + LOGS * ranks)


def pool_files(hosts: int) -> int:
    """Files of a job that is a pool on so many hosts: a process and its log on each, the word of each but the first,
    and pool.jsonl."""
    return job_files(1, hosts) + hosts


def _blocks(width: int, depth: int) -> Tensors:
    return Tensors(12 * depth, depth * (12 * width**2 + 13 * width))


def _encoder(vit: Vit) -> tuple[Tensors, Tensors]:
    """The encoder's weights, and its table of positions."""
    stem = Tensors(3, vit.width + vit.values * vit.width + vit.width)  # class token, projection and its bias
    weights = stem + _blocks(vit.width, vit.depth) + Tensors(2, 2 * vit.width)
    return weights, Tensors(1, vit.tokens * vit.width)


def _decoder(vit: Vit, settings: DecoderSettings) -> tuple[Tensors, Tensors]:
    """The decoder's weights, and its table of positions."""
    width = settings.width
    embed = Tensors(3, vit.width * width + width + width)  # with the mask token
    out = Tensors(4, 2 * width + width * vit.values + vit.values)
    return embed + _blocks(width, settings.depth) + out, Tensors(1, vit.tokens * width)


def _head(width: int, classes: int, settings: AdapterSettings) -> Tensors:
    layers = adapter_layers(width, classes, settings)
    return Tensors(2 * len(layers), sum(inputs * outputs + outputs for inputs, outputs in layers))


def _optimizer(trained: Tensors, settings: OptimSettings) -> Tensors:
    if settings.name == "lars":
        return trained
    if settings.name == "sgd":
        return trained if settings.momentum else Tensors()
    return Tensors(3 * trained.count, 2 * trained.numbers + trained.count)  # two moments, and the step


def checkpoint_bytes(state: Tensors, trained: Tensors, settings: OptimSettings) -> int:
    """One checkpoint: weights, optimizer, manifest."""
    return state.bytes + _optimizer(trained, settings).bytes + 1024


def _training(checkpoint: int, saves: int, keep: int, steps: int, outputs: list[int]) -> Footprint:
    kept = min(keep, saves)
    log = LOGGED * steps + RECORDS
    at_end = kept * checkpoint + sum(outputs) + log
    peak = max((kept + (saves > kept)) * checkpoint + log, at_end)
    return Footprint(at_end, peak, saves * checkpoint + sum(outputs) + log, 7 + 3 * kept + len(outputs))


def pretraining(recipe: Recipe, vit: Vit, steps: int) -> Footprint:
    """The pretrain stage of one data set."""
    settings = recipe.pretrain
    encoder, encoder_positions = _encoder(vit)
    decoder, decoder_positions = _decoder(vit, settings.decoder)
    state = encoder + encoder_positions + decoder + decoder_positions
    outputs = [(encoder + encoder_positions).bytes, state.bytes]
    if settings.reconstructions:
        outputs.append(3 * settings.reconstructions * vit.patches * vit.values + 1024)
    saves = -(-steps // settings.checkpoint.every_steps)
    size = checkpoint_bytes(state, encoder + decoder, settings.optim)
    return _training(size, saves, settings.checkpoint.keep, steps, outputs)


def finetuning(recipe: Recipe, vit: Vit, classes: int, steps: int) -> Footprint:
    """The finetune stage of one data set. The encoder's positions are trained with the rest."""
    settings = recipe.finetune
    encoder, positions = _encoder(vit)
    head = _head(vit.width, classes, settings.adapter)
    classifier = encoder + positions + head
    trained = head if settings.freeze else classifier
    saves = -(-steps // settings.checkpoint.every_steps)
    size = checkpoint_bytes(trained, trained, settings.optim)
    return _training(size, saves, settings.checkpoint.keep, steps, [classifier.bytes])


def probing(recipe: Recipe, vit: Vit, classes: int, steps: int) -> Footprint:
    """The probe stage of one data set: a linear layer, and the statistics that normalise its features."""
    settings = recipe.probe
    layer = Tensors(2, vit.width * classes + classes)
    state = layer + Tensors(2, 2 * vit.width)
    saves = -(-steps // settings.checkpoint.every_steps)
    size = checkpoint_bytes(state, layer, settings.optim)
    return _training(size, saves, settings.checkpoint.keep, steps, [state.bytes])


@dataclass(frozen=True)
class StoredArray:
    """One map or score, seen from one image.

    Attributes:
        numbers: how many it is.
        each: bytes that one takes on the disk; of scores, in their table.
        is_map: an array of its own, and a chunk an image; scores are one table.
    """

    numbers: int
    each: int = FLOAT
    is_map: bool = False


def stored_arrays(
    settings: ExplainSettings, image_size: int, channels: int, patches: int, classes: int, multi_label: bool
) -> dict[str, StoredArray]:
    """The arrays of a store of explanations by name."""
    number = {"float16": 2, "float32": 4}[settings.maps.dtype]
    samples, score = settings.sensitivity.drawn, StoredArray(1)
    arrays = {
        "label": StoredArray(classes if multi_label else 1),
        "prediction": score,
        "target": score,
        "logits": StoredArray(classes),
    }
    for name in settings.methods:
        facts = plugins.facts("methods", name)
        values = {
            "grid": patches,
            "plane": image_size**2,
            "pixels": image_size**2 * (channels if settings.maps.channels == "full" else 1),
        }[_map_kind(facts, settings)]
        arrays[name] = StoredArray(values, number, True)
        arrays[f"{name}_floor"] = score
        if facts.get("complete"):
            arrays[f"{name}_completeness"] = score
        for kind in settings.sensitivity.searches:
            arrays |= {f"{name}_{kind}_{part}": score for part in SEARCH_SCORES}
        if samples:
            arrays[f"{name}_sensitivity"] = StoredArray(samples)
            arrays[f"{name}_sensitivity_max"] = score
            arrays[f"{name}_sensitivity_mean"] = score
        for metric in settings.metrics:
            for part, numbers in plugins.facts("metrics", metric).get("numbers", (("", 1),)):
                arrays["_".join(filter(None, (name, metric, part)))] = StoredArray(numbers)
    if samples:
        arrays["flipped"] = StoredArray(samples)
    if settings.maps.pixels:
        arrays["pixels"] = StoredArray(image_size**2 * channels, 1, True)
    return arrays


def _map_kind(facts: Mapping[str, Any], settings: ExplainSettings) -> str:
    """Class activation maps are a value a pixel where they are upsampled."""
    kind: str = facts.get("kind", "pixels")
    activations = kind == "grid" and "layer" in facts.get("needs", ())
    return "plane" if activations and settings.gradcam.upsample != "none" else kind


def explanations(settings: ExplainSettings, arrays: dict[str, StoredArray], images: int) -> Footprint:
    """The explain stage of one data set: a store and its ledger."""
    shard = settings.maps.shard_images
    shards = -(-images // shard)
    maps = [array for array in arrays.values() if array.is_map]
    table = StoredArray(sum(array.numbers for array in arrays.values() if not array.is_map))
    stored = [*maps, table]
    size = RECORDS + 8 * images + 2 * CHUNK + ARRAY * (len(stored) + 3) + ENTRY * (len(maps) + table.numbers)
    for array in stored:
        chunks = images if array.is_map else shards
        places = images if array.is_map else shards * shard  # a chunk of scores is as long as a shard, even the last
        size += array.numbers * array.each * places + CHUNK * (chunks + shards)
    size += shards * len(stored) * SHARD_RECORD
    # The group; the coordinates of images and scores; each array's description and shards; store.json, lock and
    # attempt; a record a shard.
    count = 1 + 4 + len(stored) * (1 + shards) + 3 + shards
    return Footprint(size, size, size, count)
