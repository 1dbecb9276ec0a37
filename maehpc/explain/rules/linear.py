"""Linear functions whose pullback is worth an own hand; every rule pulls back alike.

Products with frozen weights: y = x W^T + b, g_x = g W.

On a CPU oneDNN multiplies matrices of float32, as PyTorch's compiler has it do: MKL, which PyTorch calls itself, is a
tenth to a fifth slower on processors that are not Intel's, above all in the pullback. Both factors are read as they
lie, and the pullback is the same product with the transposed weights, so that it can be pulled back in turn.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maehpc.explain.rules.tape import differentiable

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _Linear(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        assert _ONEDNN is not None
        result: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return linear(g, ctx.weight.t(), None), None, None


class _Unbound(torch.autograd.Function):
    """The parts of x along its first dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        ctx.like = x.detach()
        return tuple(part.view_as(part) for part in x.unbind(0))

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> Tensor:
        if differentiable():
            return torch.stack(parts)
        whole = torch.empty_like(ctx.like)  # of the same strides
        for place, part in zip(whole.unbind(0), parts, strict=True):
            place.copy_(part)
        return whole


def unbound(x: Tensor) -> tuple[Tensor, ...]:
    """`x.unbind(0)`, whose pullback lies in memory as x does.

    Queries, keys and values are cut from one product's output, whose dimensions were exchanged before. Stacked in the
    order of the dimensions their pullback would have to be copied once more.
    """
    result: tuple[Tensor, ...] = _Unbound.apply(x)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product with weights.

    Args:
        x: [..., K].
        weight: [M, K], frozen.
        bias: [M], frozen.

    Returns:
        [..., M].
    """
    known = all(value.dtype == torch.float32 and value.device.type == "cpu" for value in (x, weight))
    if _ONEDNN is None or not known or not x.numel() or x.ndim < 2:
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)
    return result
