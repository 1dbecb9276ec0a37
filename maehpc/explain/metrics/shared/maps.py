"""From a map as it was attributed to one value a pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from maehpc.explain.methods.base import Method


def values(full: Tensor, method: Method) -> Tensor:
    """One value a pixel, or a patch where the map is on the encoder's grid, with its sign.

    Args:
        full: maps as attributed, [B, C, S, S], [B, S, S] or [B, h, w].
        method: whose class says how channels become one value: their sum, or the largest magnitude.

    Returns:
        [B, S, S] or [B, h, w].
    """
    if full.ndim == 3:
        return full
    return full.abs().amax(dim=1) if method.over_channels == "largest" else full.sum(dim=1)


def at_pixels(full: Tensor, method: Method, side: int) -> Tensor:
    """One value a pixel, with its sign; a map on another grid is interpolated bilinearly.

    Args:
        full: maps as attributed, [B, C, S, S], [B, S, S] or [B, h, w].
        method: see `values`.
        side: S, pixels.

    Returns:
        [B, S, S].
    """
    return _resized(values(full, method)[:, None], side)[:, 0]


def by_channel(full: Tensor, side: int) -> Tensor:
    """The map beside an image's channels, nothing reduced.

    Args:
        full: maps as attributed, [B, C, S, S], [B, S, S] or [B, h, w].
        side: S, pixels.

    Returns:
        [B, C, S, S], or [B, 1, S, S] where the map does not tell channels apart.
    """
    return full if full.ndim == 4 else _resized(full[:, None], side)


def where_any(full: Tensor, result: Tensor) -> Tensor:
    """A result in float32, NaN for images whose map is zero everywhere.

    Args:
        full: maps, [B, ...].
        result: [B, ...].
    """
    some = full.flatten(1).any(dim=1)
    return torch.where(some.view(-1, *[1] * (result.ndim - 1)), result, torch.nan).float()


def _resized(maps: Tensor, side: int) -> Tensor:
    """Bilinear interpolation of [B, C, h, w] with half-pixel centres, edges continued.

    `torch.nn.functional.interpolate` weighs an edge with itself, so that pixels beyond the last patch's centre differ
    by rounding alone and their order is a matter of chance; here they are equal.
    """
    if maps.shape[-2:] == (side, side):
        return maps
    for axis in (-2, -1):
        last = maps.shape[axis] - 1
        place = (torch.arange(side, device=maps.device, dtype=maps.dtype) + 0.5) * (last + 1) / side - 0.5
        place = place.clamp(0, last)
        low = place.long()
        share = (place - low).view(-1, *[1] * (-1 - axis))
        below, above = maps.index_select(axis, low), maps.index_select(axis, (low + 1).clamp(max=last))
        maps = below + share * (above - below)
    return maps
