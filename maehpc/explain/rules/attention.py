"""Attention: o = p v, p = softmax(s), s = scale q k^T + mask.

gradient  g_v = p^T g, g_p = g v^T, g_s = p (g_p - sum(p g_p)), g_q = scale g_s k, g_k = scale g_s^T q
deeplift  products by the midpoint of their other factor: g_v = p'^T g, g_p = g v'^T, g_q = scale g_s k',
          g_k = scale g_s^T q' with a' = (a + a0)/2. Softmax by the logarithmic mean L of p and p0:
              g_s = L (g_p - sum(L g_p) / sum(L)),   L = (p - p0) / (log p - log p0) = p' tanh(h)/h,
              h = (log p - log p0)/2,
          which sums to delta since sum(p) = sum(p0)
attnlrp   the gradient, halved at either factor of both products (Achtibat et al. 2024, propositions 3.1 and 3.3)

Where tokens attend to each other, keys and values are padded with rows of zeros to a multiple of `_MULTIPLE`: products
of matrices whose rows do not begin at a vector register's edge are up to a third slower. Scores of what is padded are
so low that its weights are 0, and so is all that is pulled back to it. Where a pullback shall itself be differentiable,
nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maehpc.explain.rules.tape import AttentionSeen, Tape, differentiable, tanh_over

_MULTIPLE = 8


def _flat(x: Tensor, rows: int = 0) -> Tensor:
    """[B, H, N, d] to [B*H, N + rows, d], with zeros at the end."""
    if not rows:
        return x.reshape(-1, x.shape[-2], x.shape[-1])
    padded = x.new_empty(*x.shape[:2], x.shape[2] + rows, x.shape[3])
    padded[:, :, : x.shape[2]] = x
    padded[:, :, x.shape[2] :] = 0
    return padded.flatten(0, 1)


def _half_log_weights(scores: Tensor, p: Tensor) -> Tensor:
    """Half of log p without a logarithm an element: scores less log-sum-exp, read off the row's largest weight."""
    half_sum = (scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()) / 2
    return torch.add(-half_sum, scores, alpha=0.5)


class _Attention(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, tape: Tape) -> Tensor:
        ctx.shape, ctx.mask, ctx.scale, ctx.tape = q.shape, mask, scale, tape
        tokens = k.shape[2]
        rows = -tokens % _MULTIPLE if q.shape[2] == tokens else 0
        flat_q, flat_k, flat_v = _flat(q), _flat(k, rows), _flat(v, rows)
        scores = torch.bmm(flat_q * scale, flat_k.transpose(1, 2))
        if mask is not None:
            scores.view(*q.shape[:3], -1)[..., :tokens] += mask
        if rows:
            scores[..., tokens:] = torch.finfo(scores.dtype).min / 4
        p = scores.softmax(-1)
        o = torch.bmm(p, flat_v).view(*q.shape[:-1], v.shape[-1])
        ctx.baseline = tape.take(
            lambda: {"q": flat_q, "k": flat_k, "v": flat_v, "p": p, "half": _half_log_weights(scores, p)}
        )
        ctx.flat = flat_q, flat_k, flat_v  # copies, which several pullbacks share
        ctx.p, ctx.scores = p, scores if tape.keeps_scores else None
        ctx.seen = None
        if tape.attentions is not None:
            ctx.seen = AttentionSeen(p.view(*q.shape[:3], -1)[..., :tokens])
            tape.attentions.append(ctx.seen)
        ctx.save_for_backward(q, k, v, o)
        return o

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, o = ctx.saved_tensors
        pull = _lift if ctx.tape.rule == "deeplift" else _gradient
        flat_q, flat_k, flat_v = (_flat(q), _flat(k), _flat(v)) if differentiable() else ctx.flat
        g_q, g_k, g_v = pull(ctx, flat_q, flat_k, flat_v, _flat(o), _flat(g))
        if ctx.tape.rule == "attnlrp":
            g_q, g_k, g_v = g_q / 4, g_k / 4, g_v / 2
        g_k, g_v = (padded.unflatten(0, k.shape[:2])[:, :, : k.shape[2]] for padded in (g_k, g_v))
        return g_q.view(q.shape), g_k, g_v, None, None, None


def _weights(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and weights: the forward pass's, or computed anew where the pullback shall be differentiable."""
    if not differentiable():
        return ctx.scores, ctx.p
    scores = torch.bmm(q * ctx.scale, k.transpose(1, 2))
    if ctx.mask is not None:
        scores = (scores.view(*ctx.shape[:3], -1) + ctx.mask).flatten(0, 1)
    return scores, scores.softmax(-1)


def _gradient(ctx: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, p = _weights(ctx, q, k)
    g_v = torch.bmm(p.transpose(1, 2), g)
    g_p = torch.bmm(g, v.transpose(1, 2))
    if ctx.seen is not None:  # in a differentiable pullback these weights have a graph, which the forward pass's lack
        tokens = ctx.seen.weights.shape[-1]
        ctx.seen.weights, ctx.seen.gradient = (x.view(*ctx.shape[:3], -1)[..., :tokens] for x in (p, g_p))
    inner = (g * o).sum(-1, keepdim=True)  # equals sum(p g_p)
    g_s = p * (g_p - inner) if differentiable() or ctx.seen is not None else g_p.sub_(inner).mul_(p)
    return torch.bmm(g_s, k) * ctx.scale, torch.bmm(g_s.transpose(1, 2), q) * ctx.scale, g_v


def _lift(ctx: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores, p = _weights(ctx, q, k)
    of_heads = (-1, ctx.shape[1])  # the baseline has one row a head, which is broadcast over the images
    q0, k0, v0, p0, half0 = (ctx.baseline[name] for name in ("q", "k", "v", "p", "half"))
    if differentiable():
        tokens = k.shape[1]
        k0, v0, p0, half0 = k0[:, :tokens], v0[:, :tokens], p0[..., :tokens], half0[..., :tokens]

    def beside(a: Tensor, operation: Callable[[Tensor, Tensor], Tensor], a0: Tensor) -> Tensor:
        return operation(a.unflatten(0, of_heads), a0).flatten(0, 1)

    # Each midpoint is taken twice as large, and their factors are put right in the small ones.
    weights = beside(p, torch.add, p0)
    half = beside(_half_log_weights(scores, p), _in_place(torch.sub), half0)
    mean = _in_place(torch.mul)(tanh_over(half), weights)
    weighted = _in_place(torch.mul)(torch.bmm(g, beside(v, torch.add, v0).transpose(1, 2)), mean)
    share = weighted.sum(-1, keepdim=True) / mean.sum(-1, keepdim=True)
    g_s = (
        torch.addcmul(weighted, mean, share, value=-1) if differentiable() else weighted.addcmul_(mean, share, value=-1)
    )
    g_q = torch.bmm(g_s, beside(k, torch.add, k0) * (ctx.scale / 8))
    g_k = torch.bmm(g_s.transpose(1, 2), beside(q, torch.add, q0) * (ctx.scale / 8))
    return g_q, g_k, torch.bmm(weights.transpose(1, 2), g / 2)


def _in_place(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operation, on top of its first operand where no graph needs that any more: allocations cost as much."""
    if differentiable():
        return operation
    return lambda a, b: operation(a, b, out=a)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, tape: Tape) -> Tensor:
    """Attention [B, H, N, d], pulled back by the tape's rule.

    Args:
        q: [B, H, N, e].
        k: [B, H, M, e].
        v: [B, H, M, d].
        mask: float, added to the scores, [1 or B, 1 or H, N, M]; a constant.
        scale: of the scores.
        tape: of the pass.
    """
    result: Tensor = _Attention.apply(q, k, v, mask, scale, tape)
    return result
