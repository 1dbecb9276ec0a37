"""The order in which an epoch visits its images."""

from __future__ import annotations

import torch
from torch import Tensor

from maehpc import keys


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `count` positions, int64 [count], that depends on (seed, epoch) alone."""
    return torch.randperm(count, generator=keys.generator(seed, "epoch order", epoch))
