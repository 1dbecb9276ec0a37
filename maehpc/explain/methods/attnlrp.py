"""AttnLRP: layer-wise relevance propagation with rules for attention, norms and gates.

Each rule is written as a modified gradient, so that a pixel's relevance is its value times what reaches it (see
`maehpc.explain.rules`). Linear layers follow the epsilon rule with epsilon 0, by which biases keep their share. The
paper's own maps of vision transformers take the gamma rule there, which is less noisy and has to be tuned.
"""

from __future__ import annotations

from torch import Tensor

from maehpc.explain.methods.base import Method
from maehpc.explain.passes import Pass


class AttnLrp(Method):
    """x m, where m is pulled back by the rules of AttnLRP. x is the normalised image; there is no baseline."""

    title = "AttnLRP"
    source = "Achtibat et al. 2024, section 3.3, with the epsilon rule in linear layers"
    kind = "pixels"
    signed = True
    over_channels = "sum"
    differentiable = True
    needs = frozenset({"attnlrp"})

    def attribute(self, seen: Pass) -> Tensor:
        """[B, C, S, S], signed."""
        return seen.modified_gradient("attnlrp") * seen.x
