"""What the stages share: the pack of a data set, its batches, and the weights an encoder starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maehpc import files
from maehpc.data import CropFlip, Pack, Preprocess, SplitName, open_split, prepare
from maehpc.errors import InputError
from maehpc.recipes import DataSettings
from maehpc.stages.context import Context, read_json
from maehpc.training.batches import Batches

RESULT_FORMAT = 1
"""Raised when the meaning of a stage's numbers changes, so that older results are not taken for newer ones."""


def open_pack(context: Context, dataset: str) -> Pack:
    """The data set's pack, made from its source where it is not there yet.

    Raises:
        InputError: the data set is unknown, or its file is missing or corrupt.
    """
    return prepare(dataset, context.recipe.data.source_size, context.packs)


def data_inputs(context: Context, pack: Pack) -> dict[str, Any]:
    """The part of a stage's inputs that the data decides."""
    data = context.recipe.data.model_dump(mode="json", exclude={"resident_bytes"})
    return {"format": RESULT_FORMAT, "seed": context.recipe.seed, "data": data, "pack": pack.info.digest}


def split_batches(
    context: Context, pack: Pack, split: SplitName, name: str, crop_scale: tuple[float, float] | None = None
) -> Batches:
    """Batches of one split for the stage `name`."""
    data: DataSettings = context.recipe.data
    crop = CropFlip(crop_scale, data.image_size, data.interpolation) if crop_scale else None
    images = open_split(pack, split, data, context.device)
    return Batches(images, Preprocess(data, pack.info), crop, context.recipe.seed, name)


def stage_output(context: Context, stage: str, dataset: str, name: str) -> tuple[Path, str]:
    """Path and SHA-256 of a file that an earlier stage finished.

    Raises:
        InputError: that stage is not done for the data set.
    """
    folder = context.experiment.stage(stage, dataset)
    done = read_json(folder / "done.json")
    path = folder / name
    if not isinstance(done, dict) or name not in done.get("files", {}):
        raise InputError(
            f"{folder} holds no finished {stage}; run `maehpc run {stage} --name {context.experiment.root.name}` first"
            + (" (or set encoder.weights to scratch, timm or a file)" if stage == "pretrain" else "")
        )
    if not path.is_file() or files.sha256_file(path) != done["files"][name]:
        raise InputError(f"{path} does not match the digest in done.json; run `maehpc run {stage}` again")
    return path, done["files"][name]
