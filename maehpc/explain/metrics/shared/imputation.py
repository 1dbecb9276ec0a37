"""Removed pixels filled from their neighbours: the linear imputation of ROAD."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Residual over right-hand side at which a system counts as solved."""


def imputed(x: Tensor, removed: Tensor) -> Tensor:
    """Each removed pixel becomes the weighted mean of its neighbours, those that are removed as well included.

    The four nearest have weight 1/6, the four diagonal ones 1/12 (Rong et al. 2022, noisy linear imputation); at edges
    the weights that remain are scaled to sum to 1. The system of these equations is symmetric and positive definite,
    and is solved by conjugate gradients (Hestenes and Stiefel 1952) for each image and channel on their own: what has
    converged stays as it is, so an image's pixels do not depend on its neighbours in the batch.

    Args:
        x: images, [B, C, S, S].
        removed: bool [B, S, S]; of each image at least one pixel stays.

    Returns:
        float64 [B, C, S, S]; pixels that stay are those of `x`.
    """
    unknown = removed[:, None].double()
    kept = x.double() * (1 - unknown)
    degree = _neighbours(torch.ones_like(kept[:1, :1]))  # 1 inside, less at edges

    def applied(value: Tensor) -> Tensor:
        return unknown * (degree * value - _neighbours(value))

    def inner(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum(dim=(2, 3), keepdim=True)

    right = unknown * _neighbours(kept)
    goal = TOLERANCE**2 * inner(right, right)
    solution, residual = torch.zeros_like(kept), right
    direction, size = right, inner(right, right)
    steps = x.shape[2] * x.shape[3]  # as many unknowns at most; far fewer are needed
    for step in range(steps):
        running = size > goal
        # Looking costs a wait for the device, and steps of what has converged change nothing.
        if step % 8 == 0 and not running.any():
            break
        image = applied(direction)
        curve = inner(direction, image)
        length = torch.where(running, size / torch.where(running, curve, 1), 0)
        solution = solution + length * direction
        residual = residual - length * image
        smaller = inner(residual, residual)
        follow = smaller / torch.where(size > 0, size, 1)
        direction = torch.where(running, residual + follow * direction, direction)
        size = torch.where(running, smaller, size)
    return kept + solution


def _neighbours(value: Tensor) -> Tensor:
    """Weighted sum of the eight neighbours, nothing beyond the edges, of [B, C, S, S]."""
    across = 2 * value
    across[..., 1:] += value[..., :-1]
    across[..., :-1] += value[..., 1:]
    both = 2 * across
    both[..., 1:, :] += across[..., :-1, :]
    both[..., :-1, :] += across[..., 1:, :]
    return (both - 4 * value) / 12
