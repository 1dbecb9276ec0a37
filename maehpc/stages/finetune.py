"""The finetune stage: an encoder and labelled images to a classifier and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from maehpc import files, keys
from maehpc.data import Pack, SplitName, dataset_name, subset
from maehpc.devices import make_reproducible
from maehpc.errors import InputError
from maehpc.models import Classifier, build_classifier, load_encoder, save_weights
from maehpc.recipes import EncoderSettings
from maehpc.stages.context import Context, stage_folder
from maehpc.stages.inputs import data_inputs, open_pack, split_batches, stage_output
from maehpc.stages.pretrain import ENCODER
from maehpc.training.finetune import NAME, FinetuneTask, LabelledImages
from maehpc.training.loop import Loop, train

CLASSIFIER = "classifier.safetensors"


def weights_file(encoder: EncoderSettings) -> Path | None:
    """The file that `encoder.weights` names; None where it is one of the words.

    Raises:
        InputError: there is no such file.
    """
    if encoder.weights in ("pretrain", "scratch", "timm"):
        return None
    path = files.user_path(encoder.weights)
    if not path.is_file():
        raise InputError(f"encoder.weights: {path} does not exist; give a weights file, pretrain, scratch or timm")
    return path


def first_weights(context: Context, dataset: str) -> tuple[Path | None, str]:
    """The file an encoder starts from (None: it has its weights when it is built) and what identifies it.

    Raises:
        InputError: the file is missing, or pretraining is not done.
    """
    weights = context.recipe.encoder.weights
    if weights == "pretrain":
        return stage_output(context, "pretrain", dataset_name(dataset), ENCODER)
    path = weights_file(context.recipe.encoder)
    return (None, weights) if path is None else (path, files.sha256_file(path))


def finetune(context: Context, dataset: str) -> dict[str, Any]:
    """Trains a classifier on one data set, or finds it done.

    Returns:
        The record of done.json, with the scores of the training images, the val and the test split.

    Raises:
        InputError: wrong data or weights, or the folder holds another recipe's results.
        RunError: the loss is not finite, or the disk refused.
    """
    make_reproducible(context.device)
    recipe, name = context.recipe, dataset_name(dataset)
    weights, identity = first_weights(context, dataset)
    with open_pack(context, dataset) as pack:
        inputs = {
            **data_inputs(context, pack),
            "encoder": recipe.encoder.model_dump(mode="json", exclude={"weights"}),
            "weights": identity,
            "finetune": recipe.finetune.model_dump(mode="json", exclude={"checkpoint"}),
        }
        with stage_folder(context.experiment.stage(NAME, name), inputs) as (folder, owner):
            if found := folder.result():
                context.progress.say(f"{NAME} {name}: already done")
                return found
            classifier = new_classifier(context, pack, weights)
            train_images, val, test = labelled_images(context, pack)
            task = FinetuneTask(classifier, train_images, val, pack.info.task, recipe.finetune, recipe.seed)
            loop = Loop(f"{NAME} {name}", NAME, recipe.seed, recipe.finetune)
            train(task, loop, folder.path, folder.digest, owner, context.progress)
            splits = {"train": train_images, "val": val, "test": test}
            facts = {
                "scores": {split: task.score(images) for split, images in splits.items()},
                "images": {split: len(images.indices) for split, images in splits.items()},
                "dataset": dataset_facts(pack),
            }
            owner.still_owner()
            save_weights(folder.path / CLASSIFIER, classifier.state_dict(), {"kind": "classifier"})
            return folder.finish(owner, [CLASSIFIER], facts)


def dataset_facts(pack: Pack) -> dict[str, Any]:
    """What a report says of a data set."""
    info = pack.info
    return {"name": info.name, "title": info.title, "task": info.task, "classes": list(info.classes)}


def new_classifier(context: Context, pack: Pack, weights: Path | None) -> Classifier:
    """A classifier with its encoder's first weights, on the context's device.

    Raises:
        InputError: the weights do not fit the encoder.
    """
    recipe = context.recipe
    encoder = recipe.encoder
    if encoder.weights != "timm":
        encoder = encoder.model_copy(update={"weights": "scratch"})
    classifier = build_classifier(
        encoder,
        recipe.finetune.adapter,
        recipe.finetune.representation,
        recipe.data.image_size,
        recipe.data.channels,
        len(pack.info.classes),
        recipe.finetune.drop_path,
        recipe.seed,
    )
    if weights is not None:
        load_encoder(classifier.encoder, weights)
    return classifier.to(context.device)


def labelled_images(context: Context, pack: Pack) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """The training images (a seeded subset), the val and the test split."""
    settings, seed = context.recipe.finetune, context.recipe.seed
    train_batches = split_batches(context, pack, "train", NAME, settings.crop_scale)
    count = min(settings.images or len(train_batches.split), len(train_batches.split))
    chosen = subset(train_batches.split.labels.cpu(), count, keys.derive(seed, NAME, "subset"))

    def whole(split: SplitName) -> LabelledImages:
        batches = split_batches(context, pack, split, NAME)
        return LabelledImages(batches, torch.arange(len(batches.split)))

    return LabelledImages(train_batches, chosen), whole("val"), whole("test")
