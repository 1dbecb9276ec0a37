"""Model randomisation: whether a map would look the same had the classifier learned nothing."""

from __future__ import annotations

import threading
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from maehpc.explain.engine import Engine
from maehpc.explain.methods import base
from maehpc.explain.methods.base import Setup
from maehpc.explain.metrics.base import Arrays, Coordinates, Given, Metric
from maehpc.explain.metrics.shared.first_weights import drawn_anew, parts, randomised
from maehpc.explain.metrics.shared.maps import at_pixels, values, where_any
from maehpc.explain.metrics.shared.ssim import ssim
from maehpc.explain.similarity import spearman


class Randomisation(Metric):
    """Rank correlation of the map with that of the classifier with random weights, the class explained the same.

    Layers are the head, each block and the embedding, from the output on. The metric's own value belongs to the wholly
    random network, or is the mean over layers with `independent`; `by_part` has every step. `absolute` correlates
    magnitudes, and `ssim` is the structural similarity at image size of maps divided by their largest magnitude.
    Correlations are taken of one value a pixel, or a patch for maps on the patch grid. NaN where one of the two maps is
    the same everywhere.

    The weights are those of an untrained network. Quantus re-initialises by each module's `reset_parameters`, which
    leaves tokens and positions as they were, takes magnitudes by default, and averages over steps.
    """

    title = "Model randomisation"
    source = "Adebayo et al. 2018, model parameter randomisation test"
    unit = "rank correlation, -1 to 1"
    better = "lower"
    meaning = "How alike the map is to that of an untrained classifier; near 1 it shows nothing that was learned"
    attributions = 1
    numbers = (("", 1), ("absolute", 1), ("ssim", 1))

    class Options(base.Options):
        """Which weights are random."""

        order: Literal["whole", "cascading", "independent"] = Field(
            "whole",
            description="whole: all weights at once; cascading: one layer more at each step, from the output on; "
            "independent: one layer at a time. Each step is an attribution",
        )

    options: Options

    def __init__(self, setup: Setup, options: Options, images: int | None = None) -> None:
        super().__init__(setup, options, images)
        self.parts = parts(setup.classifier)
        """Names of the layers, from the output on."""
        self._fresh: dict[str, Tensor] | None = None
        self._engines: dict[frozenset[str], Engine] = {}
        self._building = threading.Lock()

    def arrays(self) -> Arrays:
        """Rank correlation, that of magnitudes, structural similarity; each at every step where there are several."""
        each = ((f"{self.name}_part",), (len(self._steps()),))
        measures = ("", "absolute", "ssim")
        arrays: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = dict.fromkeys(measures, ((), ()))
        if self.options.order != "whole":
            arrays |= {_by_part(measure): each for measure in measures}
        return arrays

    def coordinates(self) -> Coordinates:
        """Names of the layers."""
        return {} if self.options.order == "whole" else {f"{self.name}_part": self.parts}

    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """Each measure [B], and each [B, layers] where there are several steps."""
        kind, full, side = self.explaining(given, method), given.maps[method], given.x.shape[-1]
        span = 2.0 if kind.signed else 1.0
        one, one_pixels = values(full, kind), _unit(at_pixels(full, kind, side))
        steps: dict[str, list[Tensor]] = {"": [], "absolute": [], "ssim": []}
        for maps in given.once((self.name, self.options), lambda: self._random_maps(given)):
            other = values(maps[method], kind)
            steps[""].append(spearman(one, other))
            steps["absolute"].append(spearman(one.abs(), other.abs()))
            steps["ssim"].append(ssim(one_pixels, _unit(at_pixels(maps[method], kind, side)), span))
        result = {}
        for measure, taken in steps.items():
            each = where_any(full, torch.stack(taken, dim=1))
            result[measure] = each.mean(dim=1) if self.options.order == "independent" else each[:, -1]
            if self.options.order != "whole":
                result[_by_part(measure)] = each
        return result

    def _steps(self) -> list[frozenset[str]]:
        """Which layers are random, step by step."""
        if self.options.order == "whole":
            return [frozenset(self.parts)]
        if self.options.order == "independent":
            return [frozenset({part}) for part in self.parts]
        return [frozenset(self.parts[: count + 1]) for count in range(len(self.parts))]

    def _random_maps(self, given: Given) -> list[dict[str, Tensor]]:
        return [self._engine(step).attribute(given.x, given.targets).maps for step in self._steps()]

    def _engine(self, chosen: frozenset[str]) -> Engine:
        """Of the network in which some layers are random; made when it is first asked for."""
        with self._building:
            if chosen not in self._engines:
                setup = self.setup
                if self._fresh is None:
                    self._fresh = drawn_anew(setup.classifier, setup.seed)
                network = randomised(setup.classifier, self._fresh, chosen)
                self._engines[chosen] = Engine(network, setup.settings, setup.baseline, setup.seed)
            return self._engines[chosen]


def _by_part(measure: str) -> str:
    return f"{measure}_by_part" if measure else "by_part"


def _unit(maps: Tensor) -> Tensor:
    """Divided by the largest magnitude; NaN where that is 0."""
    return maps / maps.abs().amax(dim=(1, 2), keepdim=True)
