"""Draws of metrics: functions of (seed, data set, metric, image index, sample) alone, as in `maehpc.explain.noise`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maehpc import keys
from maehpc.explain.noise import NoiseKey, uniform


def stream(key: NoiseKey, name: str) -> NoiseKey:
    """A stream of a metric's own, that overlaps neither with sensitivity's nor with another name's."""
    return NoiseKey(keys.derive(key.seed, "metric", name), key.dataset)


def fractions(key: NoiseKey, indices: Tensor, sample: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform in [0, 1), one of 2^24 equally spaced values.

    Args:
        key: the stream.
        indices: of the images, int64 [B].
        sample: number of the draw.
        shape: of one image's draw.
        device: where it is made.

    Returns:
        float32 [B, *shape].
    """
    return (uniform(key, indices, sample, shape, 1.0, device) + 1) / 2


def normal(key: NoiseKey, indices: Tensor, sample: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal, by Box and Muller's (1958) transform of two uniform draws an element, in float64.

    Args:
        key: the stream.
        indices: of the images, int64 [B].
        sample: number of the draw.
        shape: of one image's draw.
        device: where it is made.

    Returns:
        float32 [B, *shape].
    """
    drawn = fractions(key, indices, sample, (2, *shape), device).double()
    # 1 - u lies in (0, 1]; its logarithm is finite.
    length = (-2 * torch.log(1 - drawn[:, 0])).sqrt()
    return (length * torch.cos(2 * math.pi * drawn[:, 1])).float()
