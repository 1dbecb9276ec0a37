"""Pixels taken away, or put in, in the order of their attribution; and how probable the explained class then is."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from maehpc.explain.methods import base
from maehpc.explain.metrics.base import Arrays, Coordinates, Given, Metric
from maehpc.explain.metrics.shared.draws import fractions, stream
from maehpc.explain.metrics.shared.maps import at_pixels, where_any

Fill = Literal["mean", "black", "blur"]
"""What a removed pixel becomes: `mean`: 0 in normalised space; `black`: pixel value 0; `blur`: the blurred image's."""
Score = Literal["softmax", "sigmoid"]


def probability(logits: Tensor, targets: Tensor, score: Score) -> Tensor:
    """Of the explained class, [B], in [0, 1].

    Args:
        logits: [B, K].
        targets: int64 [B].
        score: `softmax` over classes, or `sigmoid` of the class's own logit, for tasks with several labels an image.
    """
    made = logits.softmax(dim=1) if score == "softmax" else logits.sigmoid()
    return made.gather(1, targets[:, None])[:, 0]


def ranks(given: Given, method: str) -> Tensor:
    """Place of each pixel in the order of attribution, 0 for the largest value.

    Equal values come in an order drawn for the image, since reading order would favour the upper left corner. Every
    method of a batch has the same draw.

    Args:
        given: the batch.
        method: whose maps decide.

    Returns:
        int64 [B, S, S].
    """
    side = given.x.shape[-1]
    flat = at_pixels(given.maps[method], Metric.explaining(given, method), side).flatten(1)

    def shuffled() -> Tensor:
        drawn = fractions(stream(given.key, "order"), given.indices, 0, flat.shape[1:], flat.device)
        return drawn.argsort(dim=1, stable=True)

    shuffle = given.once("order of equal values", shuffled)
    order = shuffle.gather(1, flat.gather(1, shuffle).argsort(dim=1, descending=True, stable=True))
    return order.argsort(dim=1).view(-1, side, side)  # the inverse: from a pixel to its place


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, the kernel cut at three sigma, edges continued.

    Args:
        x: [B, C, S, S].
        sigma: pixels.
    """
    reach = math.ceil(3 * sigma)
    distance = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-(distance**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    rows = F.pad(x.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(rows, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).view(x.shape)


class Removal(Metric):
    """The probability of the explained class while pixels go or come, the most attributed first, and its area."""

    inserts: ClassVar[bool]
    """Whether pixels are put in, rather than taken away."""

    class Options(base.Options):
        """How pixels go."""

        steps: Annotated[int, Field(gt=0, le=10_000)] = Field(
            32, description="of equal numbers of pixels; each is a forward pass a method"
        )
        fill: Fill = Field("mean", description="what is there without a pixel: 0 in normalised space, black, or blur")
        sigma: Annotated[float, Field(gt=0, le=1000)] = Field(
            5.0, description="of the blur, pixels of the encoder's image"
        )
        score: Score = Field("softmax", description="how a logit becomes a probability")

    options: Options

    def arrays(self) -> Arrays:
        """The area, and the curve: `steps` + 1 probabilities."""
        return {"": ((), ()), "curve": ((f"{self.name}_step",), (self.options.steps + 1,))}

    def coordinates(self) -> Coordinates:
        """Shares of pixels moved, which are rounded to whole pixels."""
        return {f"{self.name}_step": tuple(step / self.options.steps for step in range(self.options.steps + 1))}

    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """The area under the curve over the share of pixels, [B], and the curve [B, steps + 1]."""
        options, x = self.options, given.x
        place = ranks(given, method)[:, None]
        without = self._without(given)
        first, then = (without, x) if self.inserts else (x, without)
        pixels = place[0].numel()
        cuts = [round(step * pixels / options.steps) for step in range(options.steps + 1)]
        curve = torch.stack(
            [
                probability(given.engine.logits(torch.where(place < cut, then, first)), given.targets, options.score)
                for cut in cuts
            ],
            dim=1,
        ).double()
        share = torch.tensor(cuts, device=x.device, dtype=torch.float64) / pixels
        full = given.maps[method]
        return {"": where_any(full, torch.trapezoid(curve, share, dim=1)), "curve": where_any(full, curve)}

    def _without(self, given: Given) -> Tensor:
        """The images with all their pixels removed, [B, C, S, S]."""
        if self.options.fill == "mean":
            return torch.zeros_like(given.x)
        if self.options.fill == "black":
            return given.preprocess.normalise(torch.zeros_like(given.pixels))
        return blurred(given.x, self.options.sigma)
