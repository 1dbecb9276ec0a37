"""The finetune stage: an encoder and labelled images to a classifier and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maehpc import files
from maehpc.data import Pack, dataset_name
from maehpc.devices import settle
from maehpc.errors import InputError
from maehpc.models import Classifier, build_classifier, head_counts, load_encoder, save_weights
from maehpc.recipes import EncoderSettings
from maehpc.stages.context import Context, stage_folder
from maehpc.stages.inputs import data_inputs, labelled_splits, open_pack, stage_output
from maehpc.stages.pretrain import ENCODER
from maehpc.training.finetune import NAME, FinetuneTask
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

    def find() -> tuple[str | None, str]:
        if weights == "pretrain":
            path, digest = stage_output(context, "pretrain", dataset_name(dataset), ENCODER)
            return str(path), digest
        file = weights_file(context.recipe.encoder)
        return (None, weights) if file is None else (str(file), files.sha256_file(file))

    found, identity = context.world.from_leader(find)
    return None if found is None else Path(found), identity


def finetune(context: Context, dataset: str) -> dict[str, Any]:
    """Trains a classifier on one data set, or finds it done.

    Returns:
        The record of done.json, with the scores of the training images, the val and the test split.

    Raises:
        InputError: wrong data or weights, or the folder holds another recipe's results.
        RunError: the loss is not finite, or the disk refused.
        Interrupted: somebody wanted to stop.
    """
    settle(context.device)
    recipe, name, world = context.recipe, dataset_name(dataset), context.world
    weights, identity = first_weights(context, dataset)
    with open_pack(context, dataset) as pack:
        inputs = {
            **data_inputs(context, pack),
            "encoder": recipe.encoder.model_dump(mode="json", exclude={"weights"}),
            "weights": identity,
            "finetune": recipe.finetune.model_dump(mode="json", exclude={"checkpoint"}),
        }
        path = context.experiment.stage(NAME, name)
        with stage_folder(path, inputs, world, context.identity) as (folder, owner):
            if found := world.from_leader(folder.result):
                context.progress.say(f"{NAME} {name}: already done")
                return found
            classifier = world.alike(lambda: new_classifier(context, pack, weights))
            splits = world.alike(lambda: labelled_splits(context, pack, NAME, recipe.finetune))
            train_split, val, kind, stop = splits["train"], splits["val"], pack.info.task, context.stop
            task = FinetuneTask(classifier, train_split, val, kind, recipe.finetune, recipe.seed, world, stop)
            loop = Loop(f"{NAME} {name}", NAME, recipe.seed, recipe.finetune)
            train(task, loop, folder.path, folder.digest, owner, context.progress, world, stop)
            facts = {
                "scores": {split: task.score(images) for split, images in splits.items()},
                "images": {split: len(images.indices) for split, images in splits.items()},
                "dataset": dataset_facts(pack),
            }

            def finish() -> dict[str, Any]:
                owner.still_owner()
                about = {"kind": "classifier", **head_counts(classifier)}
                save_weights(folder.path / CLASSIFIER, classifier.state_dict(), about)
                return folder.finish(owner, [CLASSIFIER], facts)

            return world.from_leader(finish)


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
