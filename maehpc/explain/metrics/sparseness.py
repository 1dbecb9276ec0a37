"""Sparseness: whether few pixels hold most of a map, by the Gini index."""

from __future__ import annotations

import torch
from torch import Tensor

from maehpc.explain.metrics.base import Given, Metric
from maehpc.explain.metrics.shared.maps import values, where_any


class Sparseness(Metric):
    """1 - 2 sum_k (v_k / ||v||_1) (d - k + 1/2) / d over the d magnitudes v in rising order.

    It is taken of one value a pixel, and of one value a patch where the map is on the patch grid: interpolation would
    add no knowledge, but would smooth. Quantus has the same formula, with 1e-8 added to each magnitude.
    """

    title = "Sparseness"
    source = "Chalasani et al. 2020, Gini index of Hurley and Rickard 2009"
    unit = "Gini index, 0 to 1"
    better = "higher"
    meaning = "0 where all pixels count alike, towards 1 where one of them holds the whole map"

    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """The Gini index, [B], in [0, 1 - 1/d]."""
        full = given.maps[method]
        rising = values(full, self.explaining(given, method)).flatten(1).abs().double().sort(dim=1).values
        count = rising.shape[1]
        place = torch.arange(1, count + 1, device=rising.device, dtype=rising.dtype)
        weights = (count - place + 0.5) / count
        gini = 1 - 2 * (rising * weights).sum(dim=1) / rising.sum(dim=1)
        return {"": where_any(full, gini)}
