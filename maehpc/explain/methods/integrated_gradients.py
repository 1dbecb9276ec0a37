"""Integrated Gradients: the gradient averaged on the straight way from the baseline to the image."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from maehpc.explain.methods import base
from maehpc.explain.methods.base import Method, Setup
from maehpc.explain.passes import Pass


class IntegratedGradients(Method):
    """(x - b) sum_k w_k df/dx at b + a_k (x - b): a quadrature of the path integral with nodes a_k and weights w_k.

    Where the map shall be differentiated, the graphs of all steps are held at once; else memory is that of one.
    """

    title = "Integrated Gradients"
    source = "Sundararajan et al. 2017, equations 1 and 3"
    kind = "pixels"
    signed = True
    over_channels = "sum"
    complete = True
    differentiable = True
    own_passes = (32, 32)

    class Options(base.Options):
        """How the integral is approximated.

        `gauss-legendre` is exact for gradients that are polynomials of degree 2 steps - 1 along the way; `midpoint` is
        the Riemann sum over the middles of equal intervals; `right` that over their right ends, the paper's equation 3.
        """

        steps: Annotated[int, Field(gt=0)] = Field(32, description="gradients an image")
        rule: Literal["gauss-legendre", "midpoint", "right"] = "gauss-legendre"

    def __init__(self, setup: Setup, options: Options) -> None:
        super().__init__(setup, options)
        self.nodes, self.weights = quadrature(options.rule, options.steps)

    def attribute(self, seen: Pass) -> Tensor:
        """[B, C, S, S], signed; sums to f(x) - f(b) within the error of the quadrature."""
        baseline = self.setup.baseline
        mean: Tensor = torch.zeros_like(seen.x)
        for node, weight in zip(self.nodes, self.weights, strict=True):
            with closing(seen.again(torch.lerp(baseline, seen.x, node), needs={"gradient"})) as step:
                mean = mean + weight * step.gradient()
        return mean * (seen.x - baseline)


def quadrature(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Nodes in [0, 1] and weights, which sum to 1.

    Args:
        rule: see `IntegratedGradients.Options`.
        steps: number of nodes.
    """
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
    shift = 0.5 if rule == "midpoint" else 1.0
    return [(k + shift) / steps for k in range(steps)], [1 / steps] * steps
