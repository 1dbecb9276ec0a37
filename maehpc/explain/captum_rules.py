"""For which modules captum 0.9's DeepLift has a rule of its own; every other function it pulls back by the gradient."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

RESCALED: frozenset[type[nn.Module]] = frozenset({nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus})
"""Elementwise modules captum's DeepLift rescales; subclasses do not count."""

RULED: frozenset[type[nn.Module]] = RESCALED | {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Softmax}
"""Every module captum's DeepLift has a rule for, those included that are never applied here."""


def ruled_modules(module: nn.Module) -> Iterator[str]:
    """Names of the modules inside `module` that captum's DeepLift would treat by a rule of its own."""
    return (name for name, child in module.named_modules() if type(child) in RULED)
