"""LayerNorm and RMSNorm: y = c r w + b with r = (mean(c^2) + eps)^(-1/2) and c = x - mean(x), or c = x for RMSNorm.

gradient  m_c = r (g w) - c r^3 mean(g w c)
deeplift  the product c r by its two midpoints, r by its exact slope over the variance v, which is quadratic in c:
          dr/dv = -r r0 / (1/r + 1/r0),   m_c = r' (g w) + 2 c' dr/dv mean(g w c'),   c' = (c + c0)/2, r' = (r + r0)/2
attnlrp   m_c = r (g w): r is taken for a constant as relevance is passed on (Achtibat et al. 2024, proposition 3.4); a
          differentiable map still depends on it

In each case m_x = m_c - mean(m_c) for LayerNorm, since centring is linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maehpc.explain.rules.tape import Tape, differentiable


class _Norm(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, tape: Tape
    ) -> Tensor:
        if centred:
            y, mean, r = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        else:
            mean, r = None, (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            y = x * r if weight is None else x * r * weight
        ctx.baseline = tape.take(lambda: {"c": x if mean is None else x - mean, "r": r})
        ctx.tape, ctx.weight, ctx.bias, ctx.eps, ctx.centred = tape, weight, bias, eps, centred
        ctx.mean, ctx.r = mean, r
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        rule = ctx.tape.rule
        if rule in ("gradient", "captum") and ctx.centred and not differentiable():
            wanted = [True, False, False]
            m, _, _ = torch.ops.aten.native_layer_norm_backward(
                g.contiguous(), x, list(x.shape[-1:]), ctx.mean, ctx.r, ctx.weight, ctx.bias, wanted
            )
            return m, None, None, None, None, None
        mean, r = ctx.mean, ctx.r
        if differentiable():
            mean = x.mean(-1, keepdim=True) if ctx.centred else None
            c = x if mean is None else x - mean
            r = (c.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        else:
            c = x if mean is None else x - mean
        if ctx.weight is not None:
            g = g * ctx.weight
        if rule == "attnlrp":
            m = g * r
        elif rule != "deeplift":
            m = g * r - c * (r**3 * (g * c).mean(-1, keepdim=True))
        else:
            c0, r0 = ctx.baseline["c"], ctx.baseline["r"]
            middle = (c + c0) / 2
            slope = -r * r0 / (1 / r + 1 / r0)
            m = torch.addcmul(g * ((r + r0) / 2), middle, 2 * slope * (g * middle).mean(-1, keepdim=True))
        if ctx.centred:
            m = m - m.mean(-1, keepdim=True)
        return m, None, None, None, None, None


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, tape: Tape) -> Tensor:
    """LayerNorm (`centred`) or RMSNorm over the last dimension, pulled back by the tape's rule."""
    result: Tensor = _Norm.apply(x, weight, bias, eps, centred, tape)
    return result
