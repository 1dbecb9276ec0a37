"""The pretrain stage: a data set's train split to MAE weights and a few reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maehpc import files, keys
from maehpc.data import Pack, dataset_name
from maehpc.devices import settle
from maehpc.errors import InputError
from maehpc.models import (
    MaskedAutoencoder,
    build_encoder,
    head_counts,
    load_mae_or_encoder,
    save_weights,
    visible_patches,
)
from maehpc.recipes import Recipe
from maehpc.stages.context import Context, StageFolder, stage_folder
from maehpc.stages.inputs import data_inputs, open_pack, split_batches
from maehpc.training.loop import Loop, train
from maehpc.training.pretrain import NAME, PretrainTask

ENCODER = "encoder.safetensors"
MAE = "mae.safetensors"
RECONSTRUCTIONS = "reconstructions.safetensors"


def pretrain(context: Context, dataset: str) -> dict[str, Any]:
    """Pretrains on one data set, or finds it done.

    Returns:
        The record of done.json.

    Raises:
        InputError: wrong data, or the folder holds another recipe's results.
        RunError: the loss is not finite, or the disk refused.
        Interrupted: somebody wanted to stop.
    """
    settle(context.device)
    recipe, name, world = context.recipe, dataset_name(dataset), context.world
    with open_pack(context, dataset) as pack:
        inputs = {
            **data_inputs(context, pack),
            "encoder": recipe.encoder.model_dump(mode="json", exclude={"weights"}),
            "pretrain": recipe.pretrain.model_dump(mode="json", exclude={"checkpoint", "weights"}),
            "weights": recipe.pretrain.weights and world.from_leader(lambda: first_digest(recipe)),
        }
        path = context.experiment.stage(NAME, name)
        with stage_folder(path, inputs, world, context.identity) as (folder, owner):
            if found := world.from_leader(folder.result):
                context.progress.say(f"{NAME} {name}: already done")
                return found
            mae = world.alike(lambda: build_mae(recipe).to(context.device))
            batches = world.alike(lambda: split_batches(context, pack, "train", NAME, recipe.pretrain.crop_scale))
            task = PretrainTask(mae, batches, recipe.pretrain, recipe.seed, world)
            loop = Loop(f"{NAME} {name}", NAME, recipe.seed, recipe.pretrain)
            train(task, loop, folder.path, folder.digest, owner, context.progress, world, context.stop)

            def finish() -> dict[str, Any]:
                owner.still_owner()
                outputs = write_outputs(context, folder, mae, pack)
                return folder.finish(owner, outputs, {"images": task.images, "dataset": name})

            return world.from_leader(finish)


def first_file(weights: str) -> Path:
    """The file that `pretrain.weights` names.

    Raises:
        InputError: there is none.
    """
    path = files.user_path(weights)
    if not path.is_file():
        raise InputError(f"pretrain.weights: {path} does not exist; give a weights file, or null to begin anew")
    return path


def first_digest(recipe: Recipe) -> str:
    """SHA-256 of the file that pretraining begins from."""
    assert recipe.pretrain.weights is not None
    return files.sha256_file(first_file(recipe.pretrain.weights))


def build_mae(recipe: Recipe) -> MaskedAutoencoder:
    """The MAE on the CPU with its first weights: decided by the seed, and by the file to begin from where there is one.

    Raises:
        InputError: the encoder cannot be pretrained, the mask ratio leaves nothing to do, or the file does not fit.
    """
    scratch = recipe.encoder.model_copy(update={"weights": "scratch"})
    encoder = build_encoder(scratch, recipe.data.image_size, recipe.data.channels, seed=recipe.seed)
    mae = MaskedAutoencoder(encoder, recipe.pretrain.decoder, recipe.pretrain.norm_pix, recipe.seed)
    visible_patches(mae.patches, recipe.pretrain.mask_ratio)
    if recipe.pretrain.weights is not None:
        load_mae_or_encoder(mae, first_file(recipe.pretrain.weights))
    return mae


def write_outputs(context: Context, folder: StageFolder, mae: MaskedAutoencoder, pack: Pack) -> list[str]:
    """Writes the encoder, the whole MAE and the reconstructions; returns the files' names."""
    mae.eval()
    save_weights(folder.path / ENCODER, mae.encoder.state_dict(), {"kind": "encoder", **head_counts(mae.encoder)})
    save_weights(folder.path / MAE, mae.state_dict(), {"kind": "mae", **head_counts(mae)})
    if not context.recipe.pretrain.reconstructions:
        return [ENCODER, MAE]
    pictures = reconstruct(context, mae, pack)
    save_weights(folder.path / RECONSTRUCTIONS, pictures, {"mask_ratio": str(context.recipe.pretrain.mask_ratio)})
    return [ENCODER, MAE, RECONSTRUCTIONS]


def reconstruct(context: Context, mae: MaskedAutoencoder, pack: Pack) -> dict[str, Tensor]:
    """Original, masked and reconstructed test images, spread evenly over the split.

    Returns:
        `original`, `masked`, `reconstructed`: uint8 [K, H, W, C]; `index`: int64 [K].
    """
    settings = context.recipe.pretrain
    batches = split_batches(context, pack, "test", NAME)
    count = min(settings.reconstructions, len(batches.split))
    indices = torch.linspace(0, len(batches.split) - 1, count).round().long()
    generator = keys.generator(context.recipe.seed, NAME, "reconstruct")
    noise = torch.rand(count, mae.patches, generator=generator).to(context.device)
    images = batches.plain(indices)
    with torch.no_grad():
        masked, reconstructed = mae.reconstruct(images, noise, settings.mask_ratio)

    def to_bytes(normalised: Tensor) -> Tensor:
        pixels = batches.preprocess.denormalise(normalised).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    return {
        "original": to_bytes(images),
        "masked": to_bytes(masked),
        "reconstructed": to_bytes(reconstructed),
        "index": indices,
    }
