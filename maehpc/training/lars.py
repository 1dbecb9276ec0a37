"""LARS: stochastic gradient descent whose steps are in proportion to the weights (You et al. 2017, arXiv 1708.03888).

For weights W with gradient G, momentum m and rate r:

    U = G + weight_decay * W
    V = m * V + q * U,   q = trust * |W| / |U|
    W = W - r * V

Vectors (biases, scales) are neither decayed nor scaled: there U = G and q = 1, as in the MAE reference's probe. q is 1
as well where one of the norms is 0, so that weights which begin at 0 can leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

TRUST = 0.001
"""The share of a weight's norm that a step may take at a rate of 1; the paper's and the MAE reference's."""

MOMENTUM = "momentum_buffer"


class Lars(torch.optim.Optimizer):
    """The rule of the module, for each tensor by itself.

    Args:
        params: tensors, or groups of them that may have a `weight_decay` of their own.
        lr: rate r.
        momentum: m, in [0, 1).
        weight_decay: of groups that do not say.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]] | Iterable[Tensor], lr: float, momentum: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without a gradient stay.

        Args:
            closure: computes gradients and loss before the step, where they are not there yet.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._update(weights, group)
        return loss

    def _update(self, weights: Tensor, group: dict[str, Any]) -> None:
        update = weights.grad
        assert update is not None
        if weights.ndim > 1:
            update = update + group["weight_decay"] * weights
            norm, size = torch.linalg.vector_norm(weights), torch.linalg.vector_norm(update)
            ratio = TRUST * norm / size
            update = update * torch.where((norm > 0) & (size > 0), ratio, torch.ones_like(ratio))
        state = self.state[weights]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(weights)
        state[MOMENTUM].mul_(group["momentum"]).add_(update)
        weights.sub_(state[MOMENTUM] * group["lr"])
