"""What the ruled functions of one forward pass share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["gradient", "deeplift", "captum", "attnlrp"]
"""See `maehpc.explain.rules`."""

Values = dict[str, Tensor]
"""What a function remembers of the baseline's pass, each with one row."""


@dataclass
class AttentionSeen:
    """One attention of a pass.

    Attributes:
        weights: [B, H, N, M], rows sum to 1.
        gradient: of the pulled-back scalar with respect to the weights, after a pullback by the gradient.
    """

    weights: Tensor
    gradient: Tensor | None = None


@dataclass
class Tape:
    """The state of one forward pass and its pullbacks.

    Attributes:
        rule: what backward follows; set before each pullback.
        baseline: by number of the call, what the functions remembered of the baseline; empty where nobody asked.
        recording: whether this pass is the baseline's.
        strict: method on whose behalf the baseline's pass refuses functions of the image that have no rule, if any.
        keeps_scores: whether attention's DeepLIFT rule will be asked for.
        shares_slopes: whether several pullbacks by the gradient will come, so that derivatives are worth keeping.
        products: type in which products with weights are computed; the weights' own where None.
        attentions: filled where it is a list.
        tapped: outputs of the layer that is listened to.
        calls: of ruled functions so far.
        ones: see `ones_like`.
    """

    rule: Rule = "gradient"
    baseline: list[Values] = field(default_factory=list)
    recording: bool = False
    strict: str | None = None
    keeps_scores: bool = False
    shares_slopes: bool = False
    products: torch.dtype | None = None
    attentions: list[AttentionSeen] | None = None
    tapped: list[Tensor] = field(default_factory=list)
    calls: int = 0
    ones: Tensor | None = None

    def take(self, remembered: Callable[[], Values]) -> Values:
        """Called once by each ruled function as it runs forwards.

        Args:
            remembered: makes the values to keep; asked while the baseline runs.

        Returns:
            The baseline's values of this call; empty where there is no baseline.
        """
        number, self.calls = self.calls, self.calls + 1
        if self.recording:
            self.baseline.append({name: value.detach() for name, value in remembered().items()})
            return {}
        return self.baseline[number] if self.baseline else {}

    def ones_like(self, x: Tensor) -> Tensor:
        """Ones of the shape and type of x: the same tensor as long as these stay the same; to be read only."""
        if self.ones is None or self.ones.shape != x.shape or self.ones.dtype != x.dtype:
            self.ones = torch.ones_like(x)
        return self.ones

    def clear(self) -> None:
        """Lets go of the pass's tensors: the graph refers to the tape and these to the graph."""
        self.tapped.clear()
        self.ones = None
        if self.attentions is not None:
            for seen in self.attentions:  # which the graph refers to as well
                seen.weights, seen.gradient = seen.weights.detach(), None
            self.attentions.clear()


_TINY = 1e-20
"""Added to differences of logarithms, which are either 0 or far larger."""


def differentiable() -> bool:
    """Whether a backward pass that is running shall itself be differentiable (`create_graph`)."""
    return torch.is_grad_enabled()


def tanh_over(h: Tensor) -> Tensor:
    """tanh(h)/h, and 1 where h is 0; in a differentiable pullback of accurate derivative everywhere.

    There the quotient's own derivative would be off by about eps / h, hence a series up to h^4 near 0.

    Args:
        h: overwritten, unless a graph needs it.
    """
    if not differentiable():
        h.add_(_TINY)
        return h.tanh().div_(h)
    near = h.abs() < 3 * torch.finfo(h.dtype).eps ** (1 / 6) / 4
    square = h * h
    far = torch.where(near, 1.0, h)
    return torch.where(near, 1 - square / 3 + square * square * (2 / 15), far.tanh() / far)


def threshold(x: Tensor) -> float:
    """Below this difference of inputs a difference quotient is worse than the derivative in the middle.

    The quotient's rounding error is about eps / d, the derivative's error d^2 / 24 for values and derivatives of the
    order of 1.
    """
    return float((24 * torch.finfo(x.dtype).eps) ** (1 / 3)) / 4
