"""DeepLIFT with an exact rule for every function of a vision transformer; see `maehpc.explain.rules`."""

from __future__ import annotations

from torch import Tensor

from maehpc.explain.methods.base import Method
from maehpc.explain.passes import Pass


class DeepLift(Method):
    """m (x - b), where the multipliers m are pulled back by rules that each sum to the change of their function."""

    title = "DeepLIFT"
    source = "Shrikumar et al. 2017, sections 3.1 and 3.5.1, with rules for attention, norms and gates"
    complete = True
    differentiable = True
    needs = frozenset({"deeplift"})

    def attribute(self, seen: Pass) -> Tensor:
        """[B, C, S, S], signed; sums to f(x) - f(b) within rounding."""
        return seen.modified_gradient("deeplift") * (seen.x - self.setup.baseline)
