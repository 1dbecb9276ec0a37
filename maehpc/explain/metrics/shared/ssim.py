"""Structural similarity of two maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_WINDOW, _K1, _K2 = 7, 0.01, 0.03


def ssim(one: Tensor, other: Tensor, span: float) -> Tensor:
    """Mean SSIM over uniform windows of 7 x 7, unbiased variances (Wang et al. 2004, equation 13).

    Args:
        one: [B, S, S]; smaller maps have the largest odd window that fits.
        other: likewise.
        span: of the values, largest less smallest possible.

    Returns:
        float64 [B], in [-1, 1]; what scikit-image's `structural_similarity` gives by default.
    """
    window = min(_WINDOW, *one.shape[1:])
    window -= 1 - window % 2
    count = window**2

    def mean(values: Tensor) -> Tensor:
        means: Tensor = F.avg_pool2d(values[:, None], window, stride=1)[:, 0]
        return means

    one, other = one.double(), other.double()
    first, second = mean(one), mean(other)
    unbiased = count / max(count - 1, 1)
    variances = unbiased * (mean(one**2) + mean(other**2) - first**2 - second**2)
    covariance = unbiased * (mean(one * other) - first * second)
    c1, c2 = (_K1 * span) ** 2, (_K2 * span) ** 2
    similar = (2 * first * second + c1) * (2 * covariance + c2) / ((first**2 + second**2 + c1) * (variances + c2))
    mean_similarity: Tensor = similar.flatten(1).mean(dim=1)
    return mean_similarity
