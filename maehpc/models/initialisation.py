"""First weights: MAE's rules, drawn from a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from maehpc.keys import derive

TOKEN_STD = 0.02
"""Standard deviation of CLS and mask tokens (facebookresearch/mae `models_mae.py`)."""


@contextmanager
def drawing(seed: int, *words: str | int) -> Iterator[None]:
    """Inside the block, modules draw their first weights from the stream that `seed` and `words` name.

    Layers can draw from torch's global CPU generator alone, so the block borrows it and gives it back as it was:
    the weights depend on nothing but the key, and nothing else depends on the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, *words))
        yield


def initialise_linear_and_norm(module: nn.Module) -> None:
    """MAE's rule for every Linear and LayerNorm within: Xavier-uniform weights, zero biases, unit norms."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def initialise_patch_projection(projection: nn.Conv2d) -> None:
    """Xavier-uniform over the flattened patch, as if the convolution were the Linear layer it amounts to."""
    nn.init.xavier_uniform_(projection.weight.flatten(1))
