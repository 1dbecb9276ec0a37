"""Input x gradient, with the input measured from the baseline."""

from __future__ import annotations

from torch import Tensor

from maehpc.explain.methods.base import Method
from maehpc.explain.passes import Pass


class InputXGradient(Method):
    """(x - b) d f / d x, elementwise; b is `explain.deeplift.baseline`, 0 in normalised space by default."""

    title = "Input × gradient"
    source = "Shrikumar et al. 2016, section 2"
    differentiable = True
    needs = frozenset({"gradient"})

    def attribute(self, seen: Pass) -> Tensor:
        """[B, C, S, S], signed."""
        return (seen.x - self.setup.baseline) * seen.gradient()
