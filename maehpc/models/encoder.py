"""The encoder: a timm vision transformer, of our own sizes or by any timm name.

Every encoder is one of timm's three ViT families (`VisionTransformer`, `Eva`, `Beit`) without a classifier head. What
differs between them is asked through the helpers here.
"""

from __future__ import annotations

import difflib
from functools import partial

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maehpc.errors import InputError
from maehpc.models.initialisation import (
    TOKEN_STD,
    drawing,
    initialise_linear_and_norm,
    initialise_patch_projection,
)
from maehpc.models.positions import sincos_positions
from maehpc.recipes import EncoderSettings

layer_norm = partial(nn.LayerNorm, eps=1e-6)
"""The LayerNorm of MAE's encoder and decoder."""

TIMM_PREFIX = "timm:"


def build_encoder(
    settings: EncoderSettings, image_size: int, channels: int, drop_path: float = 0.0, seed: int = 0
) -> VisionTransformer:
    """An encoder with its first weights: random ones by MAE's rules, or timm's (`weights: timm`).

    Ours (`vit-tiny` … `vit-huge`) have a class token, LayerNorm eps 1e-6, biases on q, k, v, and fixed sine-cosine
    positions (`pos_embed.requires_grad` is False). Weights of a file or of this experiment's own pretraining are put
    in afterwards by `load_encoder`.

    Args:
        settings: size and origin.
        image_size: side of the square input, pixels.
        channels: of the input.
        drop_path: rate of stochastic depth at the last block, rising linearly from 0.
        seed: of the random weights; equal arguments give equal weights.

    Raises:
        InputError: timm does not know the name, the model is not a ViT, the image does not divide into patches, or
            pretrained weights cannot be had.
    """
    with drawing(seed, "encoder"):
        if settings.name.startswith(TIMM_PREFIX):
            return _timm_encoder(settings, image_size, channels, drop_path)
        return _mae_encoder(settings, image_size, channels, drop_path)


def _mae_encoder(settings: EncoderSettings, image_size: int, channels: int, drop_path: float) -> VisionTransformer:
    width, depth, heads, patch = settings.dimensions
    _require_whole_patches(settings.name, image_size, patch)
    encoder = VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        in_chans=channels,
        num_classes=0,
        global_pool="token",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        norm_layer=layer_norm,
        weight_init="skip",
    )
    initialise_linear_and_norm(encoder)
    initialise_patch_projection(encoder.patch_embed.proj)
    nn.init.normal_(encoder.cls_token, std=TOKEN_STD)
    with torch.no_grad():
        encoder.pos_embed.copy_(sincos_positions(width, grid_size(encoder)))
    encoder.pos_embed.requires_grad_(False)
    return encoder


def _timm_encoder(settings: EncoderSettings, image_size: int, channels: int, drop_path: float) -> VisionTransformer:
    name = settings.name.removeprefix(TIMM_PREFIX)
    _require_known(name)
    pretrained = settings.weights == "timm"
    if pretrained and not timm.is_model_pretrained(name):
        raise InputError(
            f"encoder.weights: timm has no pretrained weights of {name}; set encoder.weights: scratch or choose "
            f"another model"
        )
    options = {
        "num_classes": 0,
        "img_size": image_size,
        "in_chans": channels,
        "drop_path_rate": drop_path,
    }
    try:
        # Built without weights first, so that a wrong model is told apart from a failed download.
        encoder = timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"encoder.name: {settings.name} cannot be built for {channels} x {image_size} x {image_size} images "
            f"({_first_line(error)}); choose a vision transformer such as timm:vit_base_patch16_224"
        ) from error
    if not isinstance(encoder, (VisionTransformer, Eva, Beit)):
        raise InputError(
            f"encoder.name: {settings.name} is a {type(encoder).__name__}, not a vision transformer; choose one such "
            f"as timm:vit_base_patch16_224"
        )
    _require_whole_patches(settings.name, image_size, patch_size(encoder))
    if pretrained:
        encoder = _with_timm_weights(name, options)
    if getattr(encoder, "attn_pool", None) is not None:
        encoder.reset_classifier(0, "avg")  # an attention-pooling head is a head; ours stands in its place
    return encoder


def _with_timm_weights(name: str, options: dict[str, float]) -> VisionTransformer:
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # whatever the hub client and the libraries beneath it raise without a network
        raise InputError(
            f"encoder.weights: timm's weights of {name} cannot be fetched ({_first_line(error)}); run once where there "
            f"is network, or set encoder.weights to a file that holds them"
        ) from error


def _require_known(name: str) -> None:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise InputError(f"encoder.name: timm knows no model {name}; {hint}")
    known = timm.list_pretrained(f"{architecture}.*")
    if "." in name and name not in known:
        raise InputError(
            f"encoder.name: timm knows no weights {name}; of {architecture} there are: {', '.join(known) or 'none'}"
        )


def _require_whole_patches(name: str, image_size: int, patch: int) -> None:
    if image_size % patch:
        raise InputError(
            f"data.image_size: {image_size} is not divisible by the patch size {patch} of {name}; set data.image_size "
            f"to a multiple of {patch} or choose another patch size"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def num_prefix_tokens(encoder: VisionTransformer) -> int:
    """How many tokens (CLS, distillation, registers) stand before the patches."""
    return int(encoder.num_prefix_tokens)


def grid_size(encoder: VisionTransformer) -> tuple[int, int]:
    """Patches down and across."""
    height, width = encoder.patch_embed.grid_size
    return int(height), int(width)


def patch_size(encoder: VisionTransformer) -> int:
    """Side of a patch, pixels."""
    height, width = encoder.patch_embed.patch_size
    assert height == width, (height, width)
    return int(height)


def width(encoder: VisionTransformer) -> int:
    """Dimension of a token."""
    return int(encoder.embed_dim)


def has_class_token(encoder: VisionTransformer) -> bool:
    """Whether the first token is a class token."""
    return encoder.cls_token is not None
