"""Products of two values that both depend on the image, and softmax where it stands alone.

Products  gradient  g_a = g b, g_b = g a
          deeplift  g_a = g (b + b0)/2, g_b = g (a + a0)/2: exact, since the product is bilinear
          attnlrp   the gradient, halved (Achtibat et al. 2024, propositions 3.2 and 3.3)
Softmax   see `attention`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maehpc.explain.rules.tape import Tape, tanh_over


class _Product(torch.autograd.Function):
    """a * b or a @ b, broadcast as PyTorch does; see the module's text."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, matrices: bool, tape: Tape) -> Tensor:
        ctx.baseline = tape.take(lambda: {"a": a, "b": b})
        ctx.matrices, ctx.tape = matrices, tape
        ctx.save_for_backward(a, b)
        return a @ b if matrices else a * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, b = ctx.saved_tensors
        if ctx.tape.rule == "deeplift":
            a, b = (a + ctx.baseline["a"]) / 2, (b + ctx.baseline["b"]) / 2
        elif ctx.tape.rule == "attnlrp":
            a, b = a / 2, b / 2
        shapes = tuple(x.shape for x in ctx.saved_tensors)
        if ctx.matrices:
            g_a, g_b = g @ b.transpose(-1, -2), a.transpose(-1, -2) @ g
        else:
            g_a, g_b = g * b, g * a
        return g_a.sum_to_size(shapes[0]), g_b.sum_to_size(shapes[1]), None, None


class _Softmax(torch.autograd.Function):
    """Over the last dimension."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, tape: Tape) -> Tensor:
        p = s.softmax(-1)
        ctx.baseline = tape.take(lambda: {"p": p, "log_p": _log_weights(s)})
        ctx.tape = tape
        ctx.save_for_backward(s, p)
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        s, p = ctx.saved_tensors
        mean = p
        if ctx.tape.rule == "deeplift":
            mean = (p + ctx.baseline["p"]) / 2 * tanh_over((_log_weights(s) - ctx.baseline["log_p"]) / 2)
        weighted = mean * g
        return weighted - mean * (weighted.sum(-1, keepdim=True) / mean.sum(-1, keepdim=True)), None


def _log_weights(s: Tensor) -> Tensor:
    """log softmax(s), finite where a mask of -inf was added to s: a difference of two such is then 0."""
    return s.clamp(min=torch.finfo(s.dtype).min / 4).log_softmax(-1)


def product(a: Tensor, b: Tensor, matrices: bool, tape: Tape) -> Tensor:
    """a * b (or a @ b, with `matrices`), pulled back by the tape's rule.

    Args:
        a: any shape; [..., N, K] for matrices.
        b: a shape that broadcasts with a's; [..., K, M] for matrices.
        matrices: which of the two products.
        tape: of the pass.
    """
    result: Tensor = _Product.apply(a, b, matrices, tape)
    return result


def softmax(s: Tensor, tape: Tape) -> Tensor:
    """Softmax over the last dimension, pulled back by the tape's rule."""
    result: Tensor = _Softmax.apply(s, tape)
    return result
