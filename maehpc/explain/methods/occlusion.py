"""Occlusion: how far the class score falls where a window of the image is covered."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from maehpc.errors import InputError
from maehpc.explain.methods import base
from maehpc.explain.methods.base import Method, Setup
from maehpc.explain.passes import Pass
from maehpc.models import patch_size


class Occlusion(Method):
    """The mean, over the windows that cover a pixel, of f(x) - f(x with the baseline inside the window).

    Windows start in the upper left corner, one every `stride` pixels, until all pixels are covered; the last ones may
    reach beyond the border.
    """

    title = "Occlusion"
    source = "Zeiler & Fergus 2014, section 4.2"
    kind = "plane"
    signed = True
    own_passes = ("patches", 0)

    class Options(base.Options):
        """The window. Sizes that are multiples of the encoder's patches cover whole patches."""

        size: Annotated[int, Field(gt=0)] | None = Field(
            None, description="side of the square window, pixels; the encoder's patch size where null"
        )
        stride: Annotated[int, Field(gt=0)] | None = Field(
            None, description="pixels from one window to the next, at most `size`; the patch size where null"
        )

    def __init__(self, setup: Setup, options: Options) -> None:
        super().__init__(setup, options)
        patch, side = patch_size(setup.classifier.encoder), setup.baseline.shape[-1]
        self.size = patch if options.size is None else options.size
        self.stride = patch if options.stride is None else options.stride
        if self.size > side:
            raise InputError(
                f"explain.options.{self.name}.size: a window of {self.size} pixels is larger than the image of {side}; "
                f"set it to at most {side}"
            )
        if self.stride > self.size:
            raise InputError(
                f"explain.options.{self.name}.stride: {self.stride} pixels from one window of {self.size} to the next "
                f"leave pixels uncovered; set it to at most {self.size}"
            )

    @torch.no_grad()
    def attribute(self, seen: Pass) -> Tensor:
        """[B, S, S], signed: positive where covering lowers the score."""
        x = seen.x.detach()
        whole = seen.scores_of(x)  # by the same operations as the others, whose rounding cancels
        total = x.new_zeros(len(x), *x.shape[2:])
        covered = x.new_zeros(x.shape[2:])
        for rows in self._windows(x.shape[2]):
            for columns in self._windows(x.shape[3]):
                occluded = x.clone()
                occluded[..., rows, columns] = self.setup.baseline[..., rows, columns]
                total[:, rows, columns] += (whole - seen.scores_of(occluded))[:, None, None]
                covered[rows, columns] += 1
        return total / covered

    def _windows(self, length: int) -> list[slice]:
        """Where windows lie along one side."""
        beyond = max(length - self.size, 0)
        return [slice(at, at + self.size) for at in range(0, beyond + self.stride, self.stride)]
