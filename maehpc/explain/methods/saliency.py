"""Saliency: the magnitude of the gradient."""

from __future__ import annotations

from torch import Tensor

from maehpc.explain.methods.base import Method
from maehpc.explain.passes import Pass


class Saliency(Method):
    """|d f / d x|."""

    title = "Saliency"
    source = "Simonyan et al. 2014, section 3"
    signed = False
    over_channels = "largest"
    local = True
    differentiable = True
    needs = frozenset({"gradient"})

    def attribute(self, seen: Pass) -> Tensor:
        """[B, C, S, S], not negative."""
        return seen.gradient().abs()
