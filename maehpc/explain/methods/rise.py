"""RISE: the class score of randomly masked images, averaged where a pixel was kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from maehpc import keys
from maehpc.errors import InputError
from maehpc.explain.methods import base
from maehpc.explain.methods.base import Method, Setup
from maehpc.explain.passes import Pass


class Rise(Method):
    """sum_i (f_i - mean f) M_i / sum_i M_i at each pixel, where f_i is the score of M_i x + (1 - M_i) b.

    It is the paper's E[f | the pixel is kept], but for two things that follow from f being a logit, which has no
    absolute zero where the paper's probability has: the mean score is taken off, which shifts an image's map by a
    constant; and E[M] is the mean of the masks that were drawn, pixel by pixel, so that their uneven cover does not
    show. The masks are the same for every image.
    """

    title = "RISE"
    source = "Petsiuk et al. 2018, equation 6 and section 3.2"
    kind = "plane"
    signed = True
    own_passes = (500, 0)

    class Options(base.Options):
        """The masks."""

        masks: Annotated[int, Field(gt=1)] = Field(500, description="masked copies an image")
        grid: Annotated[int, Field(gt=0)] = Field(7, description="cells a side of a mask, before it is upsampled")
        keep: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="probability that a cell is kept")

    options: Options

    def __init__(self, setup: Setup, options: Options) -> None:
        super().__init__(setup, options)
        self.side = setup.baseline.shape[-1]
        if options.grid > self.side:
            raise InputError(
                f"explain.options.{self.name}.grid: a mask of {options.grid} cells a side is finer than the image of "
                f"{self.side} pixels; set it to at most {self.side}"
            )
        self.cell = -(-self.side // options.grid)
        generator = keys.generator(setup.seed, "rise")
        # Whole numbers and float32 are drawn, whatever the engine's precision is: the same masks for all.
        drawn = torch.rand(options.masks, 1, 1, options.grid, options.grid, generator=generator)
        self.cells = (drawn < options.keep).to(setup.baseline)
        self.shifts: list[list[int]] = torch.randint(self.cell, (options.masks, 2), generator=generator).tolist()

    def masks(self) -> Iterator[Tensor]:
        """Each mask, [1, 1, S, S] in [0, 1]: cells upsampled bilinearly, cut out at a random shift of up to a cell."""
        upsampled = [(self.options.grid + 1) * self.cell] * 2
        for cells, (down, right) in zip(self.cells, self.shifts, strict=True):
            smooth = F.interpolate(cells, upsampled, mode="bilinear")
            yield smooth[..., down : down + self.side, right : right + self.side]

    @torch.no_grad()
    def attribute(self, seen: Pass) -> Tensor:
        """[B, S, S], signed: positive where keeping the pixel goes with higher scores."""
        x = seen.x.detach()
        scores = torch.stack([seen.scores_of(torch.lerp(self.setup.baseline, x, mask)) for mask in self.masks()])
        scores -= scores.mean(dim=0)
        total = x.new_zeros(len(x), self.side, self.side)
        kept = x.new_zeros(self.side, self.side)
        for change, mask in zip(scores, self.masks(), strict=True):
            total += change[:, None, None] * mask[0]
            kept += mask[0, 0]
        return total / kept.clamp_min(torch.finfo(kept.dtype).tiny)  # a pixel that no mask keeps gets 0
