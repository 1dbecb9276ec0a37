"""Attribution localisation: how much of a map lies inside the mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from maehpc.explain.methods.base import Setup
from maehpc.explain.metrics.base import Arrays, Given, Metric
from maehpc.explain.metrics.shared.maps import at_pixels, where_any
from maehpc.explain.metrics.shared.masks import MaskOptions, Masks, digest


class Mass(Metric):
    """Positive attribution inside the mask over all positive attribution.

    `absolute` is the share of magnitudes instead. `weighted` is the positive share divided by the mask's share of the
    image: 1 for a map that is the same everywhere, so it can be compared between objects of different sizes
    (Kohlbrenner et al.'s weighted ratio; Quantus multiplies by the mask's share instead). NaN for images without a
    mask, and for maps without a positive value.
    """

    title = "Attribution localisation"
    source = "Kohlbrenner et al. 2020, inside-total relevance ratio"
    unit = "share of the map, 0 to 1"
    better = "higher"
    meaning = "How much of what speaks for the class lies on the object"
    numbers = (("", 1), ("absolute", 1), ("weighted", 1))
    Options: ClassVar[type[MaskOptions]] = MaskOptions
    options: MaskOptions

    def __init__(self, setup: Setup, options: MaskOptions, images: int | None = None) -> None:
        super().__init__(setup, options, images)
        self._masks = Masks(self.name, options, setup.baseline.shape[-1], images)

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digest of the masks."""
        return {"masks": digest(self._masks.path)}

    def arrays(self) -> Arrays:
        """Share of the positive part, of magnitudes, and the positive share over the mask's size."""
        return {"": ((), ()), "absolute": ((), ()), "weighted": ((), ())}

    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """Three ratios, each [B]."""
        masks = given.once((self.name, self.options), lambda: self._masks(given.indices, given.x.device)).flatten(1)
        full = given.maps[method]
        flat = at_pixels(full, self.explaining(given, method), given.x.shape[-1]).flatten(1).double()
        positive = _share(flat.clamp(min=0), masks)
        parts = {"": positive, "absolute": _share(flat.abs(), masks), "weighted": positive / masks.double().mean(dim=1)}
        some = masks.any(dim=1)
        return {part: torch.where(some, where_any(full, values), torch.nan) for part, values in parts.items()}


def _share(values: Tensor, masks: Tensor) -> Tensor:
    """Of the sum, inside the masks; NaN where the sum is 0."""
    return (values * masks).sum(dim=1) / values.sum(dim=1)
