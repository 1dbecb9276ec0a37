"""How alike two maps of an image are: the measures of Ghorbani, Abid and Zou (2019).

All look at *importance*, a map with one value a pixel (or patch) that is not negative: channels are reduced as the
method's class says, then the sign is dropped. So a feature that turns from speaking for a class to speaking against it
as strongly has not moved. The signed change of a map is what `maehpc.explain.sensitivity.relative_change` measures.

A map that is zero everywhere has no top, no ranks and no centre: what is compared with one is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

OverChannels = Literal["largest", "sum"]


@dataclass(frozen=True)
class Similarity:
    """Two maps of each image compared, in the maps' dtype.

    Attributes:
        top: share of the first map's top features among the second's, [B], in [0, 1].
        spearman: rank correlation of importance, [B], in [-1, 1].
        centre: distance of the centres of mass, as a share of the image's side, [B], in [0, sqrt 2).
    """

    top: Tensor
    spearman: Tensor
    centre: Tensor


def compare(original: Tensor, changed: Tensor, top: float, over_channels: OverChannels = "sum") -> Similarity:
    """Compares maps of the same shape, image by image.

    Args:
        original: [B, C, S, S], [B, S, S] or [B, h, w].
        changed: likewise.
        top: share of the elements that counts as the top, in (0, 1].
        over_channels: of the method's class; read for maps with channels.
    """
    one, other = importance(original, over_channels), importance(changed, over_channels)
    return Similarity(top_intersection(one, other, top), spearman(one, other), centre_shift(one, other))


def importance(maps: Tensor, over_channels: OverChannels = "sum") -> Tensor:
    """One value a pixel or patch, not negative; differentiable.

    Args:
        maps: [B, C, S, S], or [B, h, w] without channels.
        over_channels: `largest` takes the largest magnitude over channels, `sum` the magnitude of the sum.

    Returns:
        [B, S, S] or [B, h, w].
    """
    if maps.ndim == 4 and over_channels == "largest":
        return maps.abs().amax(dim=1)
    return (maps.sum(dim=1) if maps.ndim == 4 else maps).abs()


def top_weights(values: Tensor, top: float) -> Tensor:
    """How far each element belongs to the k largest of its map, k being the nearest whole number to `top` of them.

    Elements equal to the k-th largest share what the larger ones leave of k, so that neither order nor position of
    equal values decides: of a map of three patches and zeros, a top of five holds the three, and a little of each zero.

    Args:
        values: importance, [B, h, w].
        top: share of the elements, in (0, 1]; at least one element counts.

    Returns:
        [B, h, w] in [0, 1]; each map's weights sum to k.
    """
    flat = values.flatten(1)
    count = top_count(flat.shape[1], top)
    least = flat.topk(count, dim=1).values[:, -1:]
    above, equal = flat > least, flat == least
    left = (count - above.sum(dim=1, keepdim=True)).to(values.dtype) / equal.sum(dim=1, keepdim=True)
    return (above + equal * left).reshape(values.shape)


def top_count(elements: int, top: float) -> int:
    """How many of so many elements are the top."""
    return max(1, round(top * elements))


def top_intersection(original: Tensor, changed: Tensor, top: float) -> Tensor:
    """|top of the one and of the other| / k (Ghorbani et al. 2019, "top-k intersection").

    Args:
        original: importance, [B, h, w].
        changed: likewise.
        top: see `top_weights`.

    Returns:
        [B]: 1 for the same top, about `top` by chance; NaN where one of the two is zero everywhere.
    """
    both = torch.minimum(top_weights(original, top), top_weights(changed, top)).flatten(1).sum(dim=1)
    return torch.where(_any(original) & _any(changed), both / top_count(original[0].numel(), top), torch.nan)


def spearman(original: Tensor, changed: Tensor) -> Tensor:
    """Rank correlation; equal values have their average rank.

    Args:
        original: [B, ...].
        changed: likewise.

    Returns:
        [B], computed in float64; NaN where one of the two has the same value everywhere.
    """
    one, other = _centred_ranks(original), _centred_ranks(changed)
    product = (one * other).sum(dim=1)
    return (product / (one.square().sum(dim=1) * other.square().sum(dim=1)).sqrt()).to(original.dtype)


def _centred_ranks(values: Tensor) -> Tensor:
    """Average rank of each element less the mean rank, float64 [B, n]: exact, and 0 for constant maps."""
    flat = values.flatten(1).contiguous()
    ordered = flat.sort(dim=1).values
    below = torch.searchsorted(ordered, flat)
    not_above = torch.searchsorted(ordered, flat, right=True)
    return (below + not_above - flat.shape[1]).double() / 2


def centre_of_mass(values: Tensor) -> Tensor:
    """Mean position of the mass, from the upper left corner, as shares of height and width; differentiable.

    Args:
        values: importance, [B, h, w].

    Returns:
        [B, 2], down and across, in (0, 1); 0 where there is no mass.
    """
    total = values.sum(dim=(1, 2))
    total = torch.where(total > 0, total, 1)
    down, across = (
        (torch.arange(size, device=values.device, dtype=values.dtype) + 0.5) / size for size in values.shape[1:]
    )
    return torch.stack([values.sum(dim=2) @ down, values.sum(dim=1) @ across], dim=1) / total[:, None]


def centre_shift(original: Tensor, changed: Tensor) -> Tensor:
    """Distance of the centres of mass as a share of the image's side.

    Times the image's side it is in pixels; a map on the patch grid is measured by the same scale.

    Args:
        original: importance, [B, h, w].
        changed: likewise.

    Returns:
        [B]; NaN where one of the two is zero everywhere.
    """
    shift = torch.linalg.vector_norm(centre_of_mass(original) - centre_of_mass(changed), dim=1)
    return torch.where(_any(original) & _any(changed), shift, torch.nan)


def _any(values: Tensor) -> Tensor:
    """[B], whether a map has an element other than 0."""
    return values.flatten(1).any(dim=1)
