"""Chefer's relevance: attention weights by the positive part of their gradient, added up from block to block."""

from __future__ import annotations

from torch import Tensor

from maehpc.explain.attentions import AttentionMethod, heads_mean, patch_grid, represented
from maehpc.explain.passes import Pass


class Chefer(AttentionMethod):
    """r (R - I) at the patches: R <- R + A R from R = I on, with A = mean over heads of (weights * gradient)+.

    r is 1 at the class token, or 1 / patches at each patch where their mean is represented. Products of a vector and a
    matrix give that row. I, which every patch has alike, is left out: behind a class token it has no share in the
    patches, and in a mean over patches it would drown what the image is about.
    """

    title = "Chefer's relevance"
    source = "Chefer et al. 2021 (ICCV), equations 5 and 6"
    kind = "grid"
    signed = False
    differentiable = True
    needs = frozenset({"attention"})

    def attribute(self, seen: Pass) -> Tensor:
        """[B, h, w], not negative."""
        attentions = seen.attentions()
        start = row = represented(self.setup.classifier, attentions[-1].weights)
        for attention in reversed(attentions):
            assert attention.gradient is not None
            row = row + heads_mean(row, (attention.weights * attention.gradient).relu())
        return patch_grid(self.setup.classifier, row - start)
