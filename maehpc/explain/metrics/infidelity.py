"""Infidelity: how badly a map foretells what removing parts of the image does to the explained logit."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from maehpc.explain.methods import base
from maehpc.explain.metrics.base import Arrays, Given, Metric
from maehpc.explain.metrics.shared.draws import fractions, normal, stream
from maehpc.explain.metrics.shared.maps import by_channel, where_any


class Infidelity(Metric):
    """Mean over perturbations I of (I . Phi - (f(x) - f(x - I)))^2, f being the explained logit.

    A map is either a slope of the score (a local attribution, such as saliency) or a share of it (DeepLIFT, GradCAM,
    occlusion). A slope is multiplied by I. A share is multiplied by I / (x - b), b being the baseline, as captum does
    for methods that multiply by the input: for the square that is the sum of the map inside it. Maps that do not
    tell channels apart are shares of pixels for the square; Gaussian noise they meet in every channel alike, and
    undivided.

    `scaled` is the same after the map was multiplied by the one factor that makes it least, captum's `normalize`: it
    asks only for proportion, so methods with different units can be compared by it.

    Quantus replaces squares of a grid one after the other without putting the earlier ones back, multiplies every map
    by I, whichever it is, and sums its channels first.
    """

    title = "Infidelity"
    source = "Yeh et al. 2019, definition 2.1, with square removal or Gaussian noise"
    unit = "squared logits, 0 and up"
    better = "lower"
    meaning = "Mean squared error of the change of the logit that the map foretells for a perturbed image"
    forwards = 33
    numbers = (("", 1), ("scaled", 1))

    class Options(base.Options):
        """How images are perturbed."""

        samples: Annotated[int, Field(gt=0)] = Field(
            32, description="perturbations an image; each is a forward pass, shared by all methods"
        )
        perturbation: Literal["square", "gaussian"] = Field(
            "square", description="a random square set to the baseline, or noise on every value"
        )
        size: Annotated[float, Field(gt=0, le=1)] = Field(
            0.25, description="side of the square, as a share of the image's"
        )
        deviation: Annotated[float, Field(gt=0)] = Field(0.2, description="of the noise, normalised units")

    options: Options

    def arrays(self) -> Arrays:
        """As defined, and at the map's best scale."""
        return {"": ((), ()), "scaled": ((), ())}

    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """The mean squared error of the map, and of the map times its best factor, each [B]."""
        foretold, happened = given.once((self.name, self.options), lambda: self._changes(given))
        one = foretold[method]
        square = one.square().sum(dim=1, keepdim=True)
        factor = (one * happened).sum(dim=1, keepdim=True) / torch.where(square > 0, square, 1)
        full = given.maps[method]
        return {
            "": where_any(full, (one - happened).square().mean(dim=1)),
            "scaled": where_any(full, (factor * one - happened).square().mean(dim=1)),
        }

    def _changes(self, given: Given) -> tuple[dict[str, Tensor], Tensor]:
        """I . Phi by method, and f(x) - f(x - I); float64 [B, samples]."""
        x, side = given.x, given.x.shape[-1]
        key, baseline = stream(given.key, self.name), given.engine.baseline.to(x)
        maps = {name: by_channel(full, side) for name, full in given.maps.items()}
        shares = {name: not self.explaining(given, name).local for name in maps}

        def score(moved: Tensor) -> Tensor:
            return given.engine.logits(moved).gather(1, given.targets[:, None])[:, 0].double()

        foretold: dict[str, list[Tensor]] = {name: [] for name in maps}
        happened = []
        unmoved = score(x)
        for sample in range(self.options.samples):
            if self.options.perturbation == "square":
                part = self._square(given, sample).to(x.dtype)
                change = part * (x - baseline)
            else:
                change = self.options.deviation * normal(key, given.indices, sample, x.shape[1:], x.device)
                above = x - baseline
                # Where x = b nothing can be shared out, and the map is 0.
                part = torch.where(above != 0, change / torch.where(above != 0, above, 1), 0)
            happened.append(unmoved - score(x - change))
            for name, full in maps.items():
                divided = shares[name] and (self.options.perturbation == "square" or full.shape[1] == x.shape[1])
                product = full * (part if divided else change)
                foretold[name].append(product.flatten(1).sum(dim=1, dtype=torch.float64))
        return {name: torch.stack(ones, dim=1) for name, ones in foretold.items()}, torch.stack(happened, dim=1)

    def _square(self, given: Given, sample: int) -> Tensor:
        """A square anywhere inside each image, bool [B, 1, S, S]."""
        side, device = given.x.shape[-1], given.x.device
        size = max(1, round(self.options.size * side))
        drawn = fractions(stream(given.key, self.name), given.indices, sample, (2,), device)
        corner = (drawn * (side - size + 1)).long()
        place = torch.arange(side, device=device)
        within = (place >= corner[..., None]) & (place < corner[..., None] + size)  # [B, 2, S]
        return (within[:, 0, :, None] & within[:, 1, None, :])[:, None]
