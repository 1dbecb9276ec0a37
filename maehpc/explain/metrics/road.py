"""ROAD: removing the most, or the least, attributed pixels so that little tells which are gone."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from maehpc.explain.methods import base
from maehpc.explain.metrics.base import Arrays, Coordinates, Given, Metric
from maehpc.explain.metrics.shared.draws import normal, stream
from maehpc.explain.metrics.shared.imputation import imputed
from maehpc.explain.metrics.shared.maps import where_any
from maehpc.explain.metrics.shared.removal import Score, probability, ranks


class Road(Metric):
    """Remove and debias: probability after noisy linear imputation of the most or least relevant pixels.

    `morf` and `lerf` are the explained class's probability with the most and the least attributed pixels removed,
    `morf_kept` and `lerf_kept` whether it is still predicted: their means over images are Rong et al.'s accuracies
    where the label is explained, and agreement with the prediction otherwise. The metric's own value is the mean of
    `lerf - morf` over percentiles; it is positive where the map ranks pixels as the classifier uses them.

    Quantus removes the most relevant alone and draws the noise from a global generator; neighbours and weights are the
    same.
    """

    title = "ROAD"
    source = "Rong et al. 2022, noisy linear imputation in both orders"
    unit = "difference of probabilities, -1 to 1"
    better = "higher"
    meaning = "How much more the explained class loses with its most than with its least attributed pixels removed"
    forwards_each = 10
    numbers = (("", 1), ("morf", 5), ("lerf", 5), ("morf_kept", 5), ("lerf_kept", 5))

    class Options(base.Options):
        """How much is removed, and what comes in its place."""

        percentiles: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = Field(
            (10, 30, 50, 70, 90), description="shares of pixels removed, rising; each is two forward passes a method"
        )
        noise: Annotated[float, Field(ge=0)] = Field(
            0.01, description="deviation of the noise on imputed values, normalised units"
        )
        score: Score = Field("softmax", description="how a logit becomes a probability")

        @field_validator("percentiles")
        @classmethod
        def _rising(cls, percentiles: tuple[float, ...]) -> tuple[float, ...]:
            if not percentiles or any(one >= other for one, other in pairwise(percentiles)):
                raise ValueError("name at least one, each larger than the one before it")
            return percentiles

    options: Options

    def arrays(self) -> Arrays:
        """The mean, and a value a percentile for each order."""
        each = ((f"{self.name}_percentile",), (len(self.options.percentiles),))
        return {"": ((), ()), "morf": each, "lerf": each, "morf_kept": each, "lerf_kept": each}

    def coordinates(self) -> Coordinates:
        """Percentages of pixels removed."""
        return {f"{self.name}_percentile": self.options.percentiles}

    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """The mean of lerf - morf, [B]; probabilities and 0 or 1, [B, percentiles]."""
        place, full = ranks(given, method), given.maps[method]
        last = place[0].numel() - 1
        most, most_kept = self._curve(given, place)
        least, least_kept = self._curve(given, last - place)
        parts = {
            "": (least - most).mean(dim=1),
            "morf": most,
            "lerf": least,
            "morf_kept": most_kept,
            "lerf_kept": least_kept,
        }
        return {part: where_any(full, values) for part, values in parts.items()}

    def _curve(self, given: Given, place: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of the explained class, and whether it is predicted, as its first pixels go; [B, percentiles]."""
        x, key = given.x, stream(given.key, self.name)
        probabilities, kept = [], []
        for number, percentile in enumerate(self.options.percentiles):
            pixels = place[0].numel()
            removed = place < min(round(pixels * percentile / 100), pixels - 1)
            noise = self.options.noise * normal(key, given.indices, number, x.shape[1:], x.device)
            moved = imputed(x, removed) + torch.where(removed[:, None], noise, 0)
            logits = given.engine.logits(moved.to(x.dtype))
            probabilities.append(probability(logits, given.targets, self.options.score))
            kept.append(logits.argmax(dim=1) == given.targets)
        return torch.stack(probabilities, dim=1), torch.stack(kept, dim=1).float()
