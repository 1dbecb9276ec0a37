"""Attention rollout: attention weights multiplied from block to block."""

from __future__ import annotations

from torch import Tensor

from maehpc.explain.attentions import AttentionMethod, heads_mean, patch_grid, represented
from maehpc.explain.passes import Pass


class Rollout(AttentionMethod):
    """r A_L ... A_1 at the patches, with A = (I + mean of the heads' weights) / 2 for each of L blocks.

    r is 1 at the class token, or 1 / patches at each patch where their mean is represented: the row of the product
    that belongs to the representation, by products of a vector and a matrix. The map does not depend on the class.
    """

    title = "Attention rollout"
    source = "Abnar & Zuidema 2020, section 3"
    kind = "grid"
    signed = False
    differentiable = True
    needs = frozenset({"attention"})

    def attribute(self, seen: Pass) -> Tensor:
        """[B, h, w], not negative; with what the class token and registers hold, an image's values sum to 1."""
        attentions = seen.attentions()
        row = represented(self.setup.classifier, attentions[-1].weights)
        for attention in reversed(attentions):
            row = (row + heads_mean(row, attention.weights)) / 2
        return patch_grid(self.setup.classifier, row)
