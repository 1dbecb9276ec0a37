"""How much a map changes when the image hardly does: max sensitivity by sampling (Yeh et al. 2019, equation 1).

    change_k = ||Phi(x) - Phi(x + delta_k)|| / ||Phi(x)||,   delta_k uniform in an L-inf ball

The maximum over k is captum's `sensitivity_max`, but for two differences: every sample is kept, because ten samples
are far from having converged; and a map that is zero everywhere gives NaN, where captum silently divides by 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maehpc.data import Preprocess
from maehpc.recipes import SensitivitySettings

_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}


def perturbed(pixels: Tensor, noise: Tensor, settings: SensitivitySettings, preprocess: Preprocess) -> Tensor:
    """The encoder's inputs under noise.

    Args:
        pixels: images in [0, 1], [B, C, S, S].
        noise: of the same shape, in units of the space of `settings`.
        settings: space, and whether pixel values are clipped to [0, 1].
        preprocess: the normalisation.

    Returns:
        Normalised images [B, C, S, S].
    """
    if settings.space == "pixel":
        moved = pixels + noise
        return preprocess.normalise(moved.clamp(0, 1) if settings.clip else moved)
    moved = preprocess.normalise(pixels) + noise
    if not settings.clip:
        return moved
    # Clipping at the normalised bounds spares the way to pixels and back, which would round untouched values too.
    black, white = torch.zeros_like(pixels[:1]), torch.ones_like(pixels[:1])
    return moved.clamp(preprocess.normalise(black), preprocess.normalise(white))


def relative_change(original: Tensor, changed: Tensor, norm: str) -> Tensor:
    """||original - changed|| / ||original|| of each image's map, over all its elements.

    Args:
        original: maps [B, ...].
        changed: maps of the perturbed images [B, ...].
        norm: `l1`, `l2` (Frobenius) or `linf`.

    Returns:
        [B]; NaN where the original is zero everywhere.
    """
    order = _ORDERS[norm]
    size = torch.linalg.vector_norm(original.flatten(1), order, dim=1)
    change = torch.linalg.vector_norm((original - changed).flatten(1), order, dim=1)
    return torch.where(size > 0, change / size, torch.nan)
