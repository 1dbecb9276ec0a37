"""Weights put into models, strictly: every tensor must be in the file, none may be left over, and shapes must agree.

Only positions of another patch grid are interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maehpc.errors import InputError
from maehpc.models import convert
from maehpc.models.encoder import grid_size
from maehpc.models.mae import MaskedAutoencoder
from maehpc.models.positions import resized_positions
from maehpc.models.weights import read_metadata, read_weights

_HEADS = {"heads": "encoder.heads", "decoder_heads": "pretrain.decoder.heads"}
"""What a file's header tells of attention heads, and the setting that decides it."""


def head_counts(module: nn.Module) -> dict[str, str]:
    """Numbers of attention heads for a file's header, since no tensor's shape tells them.

    Returns:
        `heads` of the encoder, and `decoder_heads` where there is a decoder.
    """
    found: dict[str, str] = {}
    for name, part in module.named_modules():
        count = getattr(part, "num_heads", None)
        if isinstance(count, int):
            found.setdefault("decoder_heads" if name.startswith("decoder.") else "heads", str(count))
    return found


def load_weights(module: nn.Module, path: Path) -> None:
    """Puts a file into the module whose `state_dict` was saved in it.

    Raises:
        InputError: the file cannot be read, or its names, shapes or numbers of heads are not the module's.
    """
    _load(module, path, read_weights(path), {})


def load_encoder(encoder: VisionTransformer, path: Path) -> None:
    """Puts the encoder's weights of a file into an encoder.

    Reads our own files (encoder, autoencoder, classifier), Meta's `mae_pretrain_*.pth` with or without decoder, timm's
    and transformers' ViTMAE. Decoder and classifier head are passed over; positions are interpolated to this grid.

    Raises:
        InputError: the file cannot be read, or does not fit.
    """
    state = convert.encoder_part(convert.to_ours(read_weights(path)))
    _load(encoder, path, state, {"pos_embed": grid_size(encoder)})


def load_mae(mae: MaskedAutoencoder, path: Path) -> None:
    """Puts a whole autoencoder's weights into `mae`, from any of the formats of `load_encoder` that holds a decoder.

    Raises:
        InputError: the file cannot be read, holds no decoder, or does not fit.
    """
    state = convert.to_ours(read_weights(path))
    if not _holds_decoder(state):
        raise InputError(
            f"weights {path} hold an encoder without a decoder; give a file that has one, such as Meta's "
            f"mae_pretrain_vit_base_full.pth"
        )
    state = {name: tensor for name, tensor in state.items() if not name.startswith(convert.HEADS)}
    _load(mae, path, state, {"encoder.pos_embed": mae.grid, "decoder.pos_embed": mae.grid})


def load_mae_or_encoder(mae: MaskedAutoencoder, path: Path) -> None:
    """Puts what a file holds into `mae`: a whole autoencoder, or an encoder alone (the decoder stays as it is).

    Raises:
        InputError: the file cannot be read, or does not fit.
    """
    if _holds_decoder(convert.to_ours(read_weights(path))):
        load_mae(mae, path)
    else:
        load_encoder(mae.encoder, path)


def _holds_decoder(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("decoder.") for name in state)


def _load(module: nn.Module, path: Path, state: dict[str, Tensor], positions: dict[str, tuple[int, int]]) -> None:
    """Loads `state` strictly; `positions` are the tables that may be interpolated, with the grid wanted."""
    target = module.state_dict()
    for name, tensor in state.items():
        wanted = target.get(name)
        if wanted is None or not wanted.is_floating_point():
            continue
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            problem = "holds NaN or infinite numbers" if tensor.is_floating_point() else f"is of type {tensor.dtype}"
            raise InputError(f"weights {path}: tensor {name} {problem}; give a file of finite floating-point weights")
    for name, grid in positions.items():
        if name in state and name in target:
            state[name] = _on_grid(state[name], target[name], grid)
    for name, tensor in target.items():
        if name in state and state[name].shape != tensor.shape:
            raise InputError(
                f"weights {path}: tensor {name} is {_shape(state[name])} in the file but {_shape(tensor)} in the "
                f"model; {_fix(name, state)}"
            )
    for name in target:
        if name not in state:
            raise InputError(f"weights {path}: tensor {name} of the model is missing there; {_fix(name, state)}")
    for name in state:
        if name not in target:
            raise InputError(f"weights {path}: the model has no place for tensor {name}; {_fix(name, state)}")
    _require_same_heads(module, path)
    module.load_state_dict(state)


def _require_same_heads(module: nn.Module, path: Path) -> None:
    """Refuses a file that says it was trained with other heads; one of others' making does not say."""
    said = read_metadata(path) if path.suffix == ".safetensors" else {}
    for key, count in head_counts(module).items():
        if said.get(key, count) != count:
            raise InputError(
                f"weights {path}: they were trained with {said[key]} attention heads and the model has {count}; set "
                f"{_HEADS[key]} to {said[key]}, or give another file"
            )


def _on_grid(positions: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """The file's positions on the model's grid, where the file's patches make a square; else as they are."""
    prefix = target.shape[1] - grid[0] * grid[1]
    if positions.ndim != 3 or positions.shape[1] < prefix:
        return positions
    side = math.isqrt(positions.shape[1] - prefix)
    if side == 0 or side**2 != positions.shape[1] - prefix:
        return positions
    return resized_positions(positions, (side, side), grid)


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(side) for side in tensor.shape) or "a scalar"


def _fix(name: str, state: Mapping[str, Tensor]) -> str:
    """What to set so that the model becomes the one in the file, as far as its tensors tell."""
    part = "decoder." if name.startswith("decoder.") else "encoder." if name.startswith("encoder.") else ""
    depth = _depth(state, f"{part}blocks.")
    if part == "decoder.":
        mask_token = state.get("decoder.mask_token")
        if mask_token is None or not depth:
            return "give a file of this decoder"
        return f"the file holds a decoder of width {mask_token.shape[-1]} and depth {depth}: set pretrain.decoder so"
    projection = state.get(f"{part}patch_embed.proj.weight")
    if projection is None or projection.ndim != 4 or not depth:
        return "give a file of this model"
    width, channels, patch, _ = projection.shape
    return (
        f"the file holds an encoder of width {width}, depth {depth}, patch_size {patch} and {channels} channels: set "
        f"encoder and data.channels so, or give another file"
    )


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of blocks whose names begin with `prefix`."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
