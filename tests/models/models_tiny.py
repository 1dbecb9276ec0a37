"""Tiny models for the tests, and transformers' ViTMAE of the same make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maehpc.models import MaskedAutoencoder, build_encoder
from maehpc.recipes import DecoderSettings, EncoderSettings

TINY = EncoderSettings(name="vit-tiny", width=24, depth=2, heads=3, patch_size=4)
DECODER = DecoderSettings(width=16, depth=2, heads=2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_noise(*shape: int, seed: int = 1) -> Tensor:
    """Uniform numbers in [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def tiny_mae(
    image_size: int = 16, channels: int = 3, norm_pix: bool = True, seed: int = 0, **encoder: Any
) -> MaskedAutoencoder:
    settings = TINY.model_copy(update=encoder)
    return MaskedAutoencoder(build_encoder(settings, image_size, channels, seed=seed), DECODER, norm_pix, seed)


def scrambled(module: Any, seed: int = 7) -> Any:
    """Adds noise to every tensor, biases and norms too, so that none can be left out unnoticed."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=stream))
    return module


def hf_mae(image_size: int = 16, channels: int = 3, patch: int = 4, norm_pix: bool = True, ratio: float = 0.75) -> Any:
    """transformers' ViTMAEForPreTraining of `tiny_mae`'s dimensions, every tensor scrambled."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=image_size,
        patch_size=patch,
        num_channels=channels,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        layer_norm_eps=1e-6,
        mask_ratio=ratio,
        norm_pix_loss=norm_pix,
    )
    return ViTMAEForPreTraining(config)
