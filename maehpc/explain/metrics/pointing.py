"""Pointing game: whether a map's largest value lies on the object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from maehpc.explain.methods.base import Setup
from maehpc.explain.metrics.base import Given, Metric
from maehpc.explain.metrics.shared.maps import at_pixels, where_any
from maehpc.explain.metrics.shared.masks import MaskOptions, Masks, digest


class Pointing(Metric):
    """1 where the largest value, sign included, lies on the mask or within the tolerance, 0 elsewhere.

    Where several pixels share the largest value, the share of them that hit counts: what pointing at one of them by
    chance would give. Quantus counts a hit where any of them hits, and has no tolerance. NaN for images without a mask.
    """

    title = "Pointing game"
    source = "Zhang et al. 2018, pointing game"
    unit = "hit 1, miss 0"
    better = "higher"
    meaning = "Whether the most attributed pixel lies on the object"

    class Options(MaskOptions):
        """Where the object is, and how near is near enough."""

        tolerance: Annotated[float, Field(ge=0)] = Field(
            0.0,
            description="distance from the mask that still is a hit, pixels of the encoder's image; Zhang et al. allow "
            "15 in photographs",
        )

    options: Options

    def __init__(self, setup: Setup, options: Options, images: int | None = None) -> None:
        super().__init__(setup, options, images)
        self._masks = Masks(self.name, options, setup.baseline.shape[-1], images)

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digest of the masks."""
        return {"masks": digest(self._masks.path)}

    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """Hits, [B]."""
        targets, some = given.once((self.name, self.options), lambda: self._targets(given))
        full = given.maps[method]
        flat = at_pixels(full, self.explaining(given, method), given.x.shape[-1]).flatten(1)
        largest = flat == flat.amax(dim=1, keepdim=True)
        hits = (largest & targets.flatten(1)).sum(dim=1) / largest.sum(dim=1)
        return {"": torch.where(some, where_any(full, hits), torch.nan)}

    def _targets(self, given: Given) -> tuple[Tensor, Tensor]:
        """Pixels that are a hit, bool [B, S, S]; and whether the image has a mask, [B]."""
        masks = self._masks(given.indices, given.x.device)
        some = masks.flatten(1).any(dim=1)
        if not self.options.tolerance:
            return masks, some
        near = [distance_transform_edt(~mask) <= self.options.tolerance for mask in masks.cpu().numpy()]
        return torch.from_numpy(np.stack(near)).to(masks.device), some
