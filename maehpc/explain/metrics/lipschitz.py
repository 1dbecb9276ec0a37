"""Local Lipschitz estimate: the steepest change of a map found near an image."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from maehpc.explain.methods import base
from maehpc.explain.metrics.base import Arrays, Given, Metric
from maehpc.explain.metrics.shared.maps import where_any
from maehpc.explain.noise import uniform
from maehpc.explain.sensitivity import perturbed


class Lipschitz(Metric):
    """max_k ||Phi(x) - Phi(x + d_k)||_2 / ||d_k||_2, d_k uniform in sensitivity's ball.

    The perturbations are those of `explain.sensitivity` (radius, space, clipping and draws), so that both say something
    about the same points, and changes that sensitivity has measured already are not computed again. Distances are
    Euclidean over all elements of the unreduced map and of the encoder's normalised input.

    Quantus draws Gaussian noise of deviation 0.1, 200 times, and by default divides each map by its largest magnitude
    first; here the map keeps its unit, so compare images and classifiers by one method, not methods with each other.
    """

    title = "Local Lipschitz estimate"
    source = "Alvarez-Melis and Jaakkola 2018, local Lipschitz estimate over random points"
    unit = "units of the map per normalised input unit, 0 and up"
    better = "lower"
    meaning = "Largest change of the map per change of the image, over random perturbations in a small ball"
    attributions = 10
    shares_draws = True
    numbers = (("", 1), ("samples", 10))

    class Options(base.Options):
        """How many points are compared with the image."""

        samples: Annotated[int, Field(gt=0)] = Field(
            10, description="perturbations an image; each is an attribution, unless sensitivity has drawn as many"
        )

    options: Options

    def arrays(self) -> Arrays:
        """The largest, and each perturbation's."""
        return {"": ((), ()), "samples": ((f"{self.name}_sample",), (self.options.samples,))}

    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """The largest ratio, [B], and each perturbation's, [B, samples]."""
        lengths = given.once(("length", self.options), lambda: self._lengths(given))
        full = given.maps[method]
        ratios = where_any(full, self._changes(given, method) / lengths)
        return {"": ratios.amax(dim=1), "samples": ratios}

    def _changes(self, given: Given, method: str) -> Tensor:
        """||Phi(x) - Phi(x + d)||, [B, samples]."""
        known = given.changes.get(method)
        if known is not None and known.shape[1] >= self.options.samples and given.settings.sensitivity.norm == "l2":
            return known[:, : self.options.samples] * _length(given.maps[method])[:, None]
        return given.once(("changes", self.options), lambda: self._computed_changes(given))[method]

    def _computed_changes(self, given: Given) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in given.maps}
        for sample in range(self.options.samples):
            moved = given.engine.attribute(self._moved(given, sample), given.targets)
            for name, maps in moved.maps.items():
                parts[name].append(_length(maps - given.maps[name]))
        return {name: torch.stack(lengths, dim=1) for name, lengths in parts.items()}

    def _lengths(self, given: Given) -> Tensor:
        """||d|| in normalised units, [B, samples]."""
        moved = (self._moved(given, sample) for sample in range(self.options.samples))
        return torch.stack([_length(x - given.x) for x in moved], dim=1)

    @staticmethod
    def _moved(given: Given, sample: int) -> Tensor:
        settings, shape = given.settings.sensitivity, given.pixels.shape[1:]
        noise = uniform(given.key, given.indices, sample, shape, settings.radius, given.pixels.device)
        return perturbed(given.pixels, noise, settings, given.preprocess)


def _length(values: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return length
