"""Activation functions: one value in, one value out.

gradient  m = g f'(x)
deeplift  m = g (f(x) - f(x0)) / (x - x0), the rescale rule (Shrikumar et al. 2017, section 3.5.1)
captum    the same for functions whose modules captum 0.9 rescales, g f'(x) for others
attnlrp   m = g f(x) / x, the identity rule (Achtibat et al. 2024, equation 9), for functions with f(0) = 0; g f'(x)
          for others
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maehpc.explain.rules.tape import Tape, Values, differentiable, threshold

_aten = torch.ops.aten
_SAME = 1e-10
"""Below this difference two inputs of a function with a kink are taken for the same; captum's own bound."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes:
        value: f(x).
        pull: (g, x, f(x)) -> g f'(x), itself differentiable.
        passes_zero: whether f(0) = 0.
        captum: whether captum's DeepLift rescales the module that computes f (`maehpc.explain.captum_rules`).
        bends: whether f' is smooth, so that the slope in the middle may stand for a quotient of small differences.
    """

    value: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]
    passes_zero: bool = True
    captum: bool = False
    bends: bool = True

    def slope(self, x: Tensor, y: Tensor) -> Tensor:
        """f'(x)."""
        return self.pull(torch.ones_like(x), x, y)


def _silu_pull(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    gate = torch.sigmoid(x)  # PyTorch's own pullback cannot be differentiated
    return g * (gate + y * (1 - gate))


GELU = Activation(F.gelu, lambda g, x, y: _aten.gelu_backward(g, x))
GELU_TANH = Activation(
    lambda x: F.gelu(x, approximate="tanh"), lambda g, x, y: _aten.gelu_backward(g, x, approximate="tanh")
)
SILU = Activation(F.silu, _silu_pull)
RELU = Activation(torch.relu, lambda g, x, y: g * (x > 0), captum=True, bends=False)
SIGMOID = Activation(torch.sigmoid, lambda g, x, y: g * (y * (1 - y)), passes_zero=False, captum=True)
TANH = Activation(torch.tanh, lambda g, x, y: g * (1 - y * y), captum=True)


def elu(alpha: float) -> Activation:
    """x, and alpha (exp(x) - 1) below 0."""
    return Activation(
        lambda x: F.elu(x, alpha),
        lambda g, x, y: _aten.elu_backward(g, alpha, 1.0, 1.0, False, x),
        captum=True,
        bends=False,
    )


def leaky_relu(slope: float) -> Activation:
    """x, and slope x below 0."""
    return Activation(
        lambda x: F.leaky_relu(x, slope), lambda g, x, y: torch.where(x > 0, g, g * slope), captum=True, bends=False
    )


def softplus(beta: float, threshold: float) -> Activation:
    """log(1 + exp(beta x)) / beta, and x where beta x is above a threshold."""
    return Activation(
        lambda x: F.softplus(x, beta, threshold),
        lambda g, x, y: _aten.softplus_backward(g, x, beta, threshold),
        passes_zero=False,
        captum=True,
    )


class _Elementwise(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, tape: Tape) -> Tensor:
        y = activation.value(x)
        ctx.baseline = tape.take(lambda: {"x": x, "y": y})
        ctx.activation, ctx.tape, ctx.slope = activation, tape, None
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, y = ctx.saved_tensors
        activation: Activation = ctx.activation
        rule = ctx.tape.rule
        if rule == "deeplift" or (rule == "captum" and activation.captum):
            secant = _secant(activation, x, y, ctx.baseline)
            return g * secant if differentiable() else secant.mul_(g), None, None
        if rule == "attnlrp" and activation.passes_zero:
            zero = x.new_zeros(())
            return g * _secant(activation, x, y, {"x": zero, "y": zero}), None, None
        if differentiable() or not ctx.tape.shares_slopes:
            return activation.pull(g, x, y), None, None
        if ctx.slope is None:
            ctx.slope = activation.pull(ctx.tape.ones_like(x), x, y)
        return g * ctx.slope, None, None


def _secant(activation: Activation, x: Tensor, y: Tensor, baseline: Values) -> Tensor:
    """(y - y0) / (x - x0), and the slope in the middle where the two points nearly meet."""
    x0, y0 = baseline["x"], baseline["y"]
    step = x - x0
    near = step.abs() < (threshold(x) if activation.bends else _SAME)
    if differentiable():
        middle = x0 + step / 2
        slope = activation.slope(middle, activation.value(middle))
        return torch.where(near, slope, (y - y0) / torch.where(near, 1.0, step))
    quotient = (y - y0).div_(step).contiguous()  # for the view below; no copy but of transposed inputs
    found = near.flatten().nonzero()[:, 0]
    middle = x.flatten()[found] - step.flatten()[found] / 2
    quotient.view(-1)[found] = activation.slope(middle, activation.value(middle))
    return quotient


def elementwise(activation: Activation, x: Tensor, tape: Tape) -> Tensor:
    """The activation of x, pulled back by the tape's rule."""
    result: Tensor = _Elementwise.apply(x, activation, tape)
    return result
