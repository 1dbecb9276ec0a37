"""SmoothGrad: the gradient averaged over noisy copies of the image."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from maehpc import keys
from maehpc.explain.methods import base
from maehpc.explain.methods.base import Method, Setup
from maehpc.explain.passes import Pass


class SmoothGrad(Method):
    """|mean_k df/dx at x + sigma e_k|, where sigma is a share of the image's value range and e_k is normal noise.

    The noise is the same for every image, so that an image's map depends on no other and, where the image moves a
    little, the map does not move for the sake of new noise. Where the map shall be differentiated, the graphs of all
    samples are held at once; else memory is that of one.
    """

    title = "SmoothGrad"
    source = "Smilkov et al. 2017, section 2"
    kind = "pixels"
    signed = False
    over_channels = "largest"
    local = True
    differentiable = True
    own_passes = (25, 25)

    class Options(base.Options):
        """How much is averaged over."""

        samples: Annotated[int, Field(gt=0)] = Field(25, description="noisy copies an image")
        noise: Annotated[float, Field(ge=0)] = Field(
            0.15, description="standard deviation, as a share of the image's largest value less its smallest"
        )

    options: Options

    def __init__(self, setup: Setup, options: Options) -> None:
        super().__init__(setup, options)
        # float64, so that an engine of any precision gets the same noise, and rounds it as the last step.
        self.noise = [
            torch.randn(
                setup.baseline.shape, generator=keys.generator(setup.seed, "smoothgrad", sample), dtype=torch.float64
            ).to(setup.baseline)
            for sample in range(options.samples)
        ]

    def attribute(self, seen: Pass) -> Tensor:
        """[B, C, S, S], not negative."""
        spread = seen.x.amax((1, 2, 3), keepdim=True) - seen.x.amin((1, 2, 3), keepdim=True)
        mean: Tensor = torch.zeros_like(seen.x)
        for noise in self.noise:
            moved = seen.x + self.options.noise * spread * noise
            with closing(seen.again(moved, needs={"gradient"})) as sample:
                mean = mean + sample.gradient() / len(self.noise)
        return mean.abs()
