"""How a map becomes colours, alone or over its image: one way for figures and for what is exported."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from maehpc.report.methods import Method

_CLIP = 99.5
"""Percentile of |map| at which the colours end: a single hot pixel does not darken the rest."""

_POSITIVE = LinearSegmentedColormap.from_list("positive", ["#ffffff", "#7fb2d6", "#0a559c", "#04152b"])
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#053061", "#4393c3", "#ffffff", "#d6604d", "#67001f"])

GREY_OPACITY = 0.6
"""Of an image beneath a map, on white: colours stay to be seen on a dark image."""


def colour_map(look: Method) -> LinearSegmentedColormap:
    """White at 0 and darker with the magnitude: blue, or for signed maps red for positive and blue for negative."""
    return _SIGNED if look.signed else _POSITIVE


def colour_limit(values: NDArray[np.float32]) -> float:
    """The magnitude at which a map's colours end, its 99.5th percentile; 1 for a map that is zero everywhere.

    Args:
        values: of any shape; what is not finite is left out.
    """
    magnitude = np.abs(values[np.isfinite(values)])
    return float(np.percentile(magnitude, _CLIP) or magnitude.max() or 1) if magnitude.size else 1.0


def colour_range(limit: float, look: Method) -> tuple[float, float]:
    """The values of the first and the last colour: symmetric about 0 for signed maps, else from 0."""
    return (-limit if look.signed else 0.0), limit


def opacity(values: NDArray[np.float32], limit: float) -> NDArray[np.float64]:
    """Of a map over its image, in [0, 1]: little where there is no evidence, so that the image is seen.

    Args:
        values: the map.
        limit: magnitude at which the colours end.
    """
    return 0.1 + 0.75 * np.clip(np.abs(np.nan_to_num(values)) / limit, 0, 1)


def grey(image: NDArray[np.uint8]) -> NDArray[Any]:
    """Brightness [H, W], 0 to 255, of an image [H, W] or [H, W, 3]."""
    return image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma
