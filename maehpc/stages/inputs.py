"""What the stages share: the pack of a data set, its batches, and the weights an encoder starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from maehpc import files, keys
from maehpc.data import CropFlip, Pack, Preprocess, SplitName, open_split, prepare, subset
from maehpc.errors import InputError
from maehpc.recipes import DataSettings, FinetuneSettings, ProbeSettings
from maehpc.stages.context import Context, read_json, vouched_files
from maehpc.training.batches import Batches
from maehpc.training.finetune import LabelledImages

RESULT_FORMAT = 2
"""Raised when the meaning of a stage's numbers changes, so that older results are not taken for newer ones."""


def prepared_pack(context: Context, dataset: str) -> Pack:
    """The data set's pack, made from its source where it is not there yet. For one rank.

    Raises:
        InputError: the data set is unknown, or its file is missing or corrupt.
    """
    return prepare(dataset, context.recipe.data.source_size, context.packs)


def open_pack(context: Context, dataset: str) -> Pack:
    """The data set's pack, on every rank; rank 0 makes it where it is not there yet.

    Raises:
        InputError: the data set is unknown, or its file is missing or corrupt.
    """
    world, ours = context.world, []

    def path() -> str:
        ours.append(prepared_pack(context, dataset))
        return str(ours[0].path)

    made = world.from_leader(path)
    return world.alike(lambda: ours[0] if ours else Pack(Path(made)))


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
    """Path and SHA-256 of a file that an earlier stage finished. For one rank.

    Raises:
        InputError: that stage is not done for the data set.
    """
    folder = context.experiment.stage(stage, dataset)
    vouched = vouched_files(read_json(folder / "done.json")) or {}
    path = folder / name
    if name not in vouched:
        raise InputError(
            f"{folder} holds no finished {stage}; run `maehpc run {stage} --name {context.experiment.root.name}` first"
            + (" (or set encoder.weights to scratch, timm or a file)" if stage == "pretrain" else "")
        )
    if not path.is_file() or files.sha256_file(path) != vouched[name]:
        raise InputError(f"{path} does not match the digest in done.json; run `maehpc run {stage}` again")
    return path, vouched[name]


def labelled_splits(
    context: Context, pack: Pack, name: str, settings: FinetuneSettings | ProbeSettings
) -> dict[str, LabelledImages]:
    """What the stage `name` learns from (a seeded subset of the train split), and the val and the test split."""
    seed = context.recipe.seed
    train = split_batches(context, pack, "train", name, settings.crop_scale)
    count = min(settings.images or len(train.split), len(train.split))
    chosen = subset(train.split.labels.cpu(), count, keys.derive(seed, name, "subset"))

    def whole(split: SplitName) -> LabelledImages:
        batches = split_batches(context, pack, split, name)
        return LabelledImages(batches, torch.arange(len(batches.split)))

    return {"train": LabelledImages(train, chosen), "val": whole("val"), "test": whole("test")}
