"""DeepLIFT's rescale rule on a head, where captum 0.9 would apply it (Shrikumar et al. 2017, section 3.5.1).

captum replaces the gradient of an elementwise nonlinearity by (y - y') / (x - x') where it knows the module's type,
and keeps the gradient everywhere else: for GELU, LayerNorm, attention and every functional call. The same is done here
without hooks: module by module, backwards through a sequential head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

RESCALED: frozenset[type[nn.Module]] = frozenset({nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus})
"""Elementwise modules captum's DeepLift rescales; subclasses do not count."""

RULED: frozenset[type[nn.Module]] = RESCALED | {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Softmax}
"""Every module captum's DeepLift has a rule for, those included that are never applied here."""

EPSILON = 1e-10
"""Below this difference of inputs captum falls back to the gradient."""


def ruled_modules(module: nn.Module) -> Iterator[str]:
    """Names of the modules inside `module` that captum's DeepLift would treat by a rule of its own."""
    return (name for name, child in module.named_modules() if type(child) in RULED)


def trace(head: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """The input of every module of `head` in order, and the last one's output, without a graph."""
    values = [inputs.detach()]
    with torch.no_grad():
        for module in head:
            values.append(module(values[-1]))
    return values


def multipliers(head: nn.Sequential, values: list[Tensor], references: list[Tensor], start: Tensor) -> Tensor:
    """Multipliers of the head's inputs for a weighted sum of its outputs.

    Args:
        head: modules applied one after another, no module twice.
        values: `trace` of the inputs, rows [B, ...].
        references: `trace` of the baseline, rows [1, ...] or [B, ...].
        start: weights of the outputs, [B, K]; one-hot for a class.

    Returns:
        [B, D]: what stands in the gradient's place. Without a nonlinearity that has a rule it *is* the gradient.
    """
    result = start
    for module, x, y, x0, y0 in reversed(list(zip(head, values, values[1:], references, references[1:], strict=False))):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(module(point), point, result)
        if type(module) in RESCALED:
            step = x - x0
            gradient = torch.where(step.abs() < EPSILON, gradient, result * (y - y0) / step)
        result = gradient
    return result
