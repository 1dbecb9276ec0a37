"""Random resized crops and flips of whole batches, on the device.

A crop and its resizing are two small matrices an image, one for rows and one for columns: `out = R @ image @ C^T`.
So a batch of different crops is two batched products, and each result equals that of cropping and resizing the
image alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ATTEMPTS = 10
RATIOS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Crops:
    """Where each image of a batch is cropped. All tensors are [B] on the CPU: int64, and bool for `flip`."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor

    def part(self, span: slice) -> Crops:
        """Those of some of the images."""
        return Crops(self.top[span], self.left[span], self.height[span], self.width[span], self.flip[span])


def draw_crops(count: int, height: int, width: int, scale: tuple[float, float], generator: torch.Generator) -> Crops:
    """Draws crops as Inception did (Szegedy et al. 2015): uniform area, log-uniform aspect ratio, uniform place.

    The first of ten attempts that fits is taken; where none does, the largest centred crop of an allowed ratio. The
    draw of image i depends on the generator's state and i alone, not on `count`.

    Args:
        count: images.
        height: of the images, pixels.
        width: of the images, pixels.
        scale: smallest and largest area as fractions of the image's.
        generator: on the CPU.
    """
    draws = torch.rand(count, 2 * ATTEMPTS + 3, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :ATTEMPTS])
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    ratio = torch.exp(low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS])
    fallback_width, fallback_height = _largest(height, width)
    widths = torch.cat([(area * ratio).sqrt().round(), torch.full((count, 1), fallback_width)], dim=1).long()
    heights = torch.cat([(area / ratio).sqrt().round(), torch.full((count, 1), fallback_height)], dim=1).long()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    crop_height, crop_width = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    place = draws[:, -3:]
    top = (place[:, 0] * (height - crop_height + 1)).long()
    left = (place[:, 1] * (width - crop_width + 1)).long()
    centred = first[:, 0] == ATTEMPTS
    return Crops(
        top=torch.where(centred, (height - crop_height) // 2, top),
        left=torch.where(centred, (width - crop_width) // 2, left),
        height=crop_height,
        width=crop_width,
        flip=place[:, 2] < 0.5,
    )


def _largest(height: int, width: int) -> tuple[float, float]:
    """Width and height of the largest crop of an allowed ratio."""
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    return float(min(width, round(height * ratio))), float(min(height, round(width / ratio)))


def _kernel(distance: Tensor, interpolation: Literal["bilinear", "bicubic"]) -> Tensor:
    """The interpolation's weight at a distance in source pixels; bicubic is Keys (1981) with a = -1/2, as in Pillow."""
    x = distance.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _resize_weights(
    start: Tensor, length: Tensor, source: int, size: int, interpolation: Literal["bilinear", "bicubic"]
) -> Tensor:
    """Matrices that crop `length` of `source` pixels from `start` and resize them to `size`.

    Where pixels are dropped the kernel is stretched over them (antialiasing). Weights outside the crop are 0 and each
    row sums to 1.

    Args:
        start: [B], first pixel of the crop.
        length: [B], pixels of the crop.
        source: pixels of the image along this axis.
        size: pixels wanted.
        interpolation: the kernel.

    Returns:
        float32 [B, size, source].
    """
    start, length = start.double()[:, None, None], length.double()[:, None, None]
    step = length / size
    centre = (torch.arange(size, device=start.device)[None, :, None] + 0.5) * step
    pixel = torch.arange(source, device=start.device)[None, None, :] - start
    weights = _kernel((pixel + 0.5 - centre) / step.clamp(min=1), interpolation)
    weights = weights.where((pixel >= 0) & (pixel < length), 0)
    return (weights / weights.sum(dim=2, keepdim=True)).float()


class CropFlip:
    """Random resized crop (aspect 3/4 to 4/3) and horizontal flip with probability 1/2."""

    def __init__(
        self, scale: tuple[float, float], size: int, interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    ):
        """Takes crops of `scale` (fractions of the image's area) and resizes them to `size` x `size` pixels."""
        self.scale = scale
        self.size = size
        self.interpolation: Literal["bilinear", "bicubic"] = interpolation

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Crops, resizes and flips every image of a batch by its own draw.

        Args:
            pixels: float [B, C, H, W] in [0, 1].
            generator: on the CPU; advanced by the same amount whatever the device.

        Returns:
            [B, C, size, size] in [0, 1], of the same dtype and device.
        """
        return self.apply(pixels, self.draw(len(pixels), pixels.shape[2], pixels.shape[3], generator))

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Crops:
        """Crops for `count` images of `height` x `width` pixels."""
        return draw_crops(count, height, width, self.scale, generator)

    def apply(self, pixels: Tensor, crops: Crops) -> Tensor:
        """The given crops of `pixels`; shapes as in a call."""
        height, width, device = pixels.shape[2], pixels.shape[3], pixels.device
        rows = _resize_weights(crops.top.to(device), crops.height.to(device), height, self.size, self.interpolation)
        columns = _resize_weights(crops.left.to(device), crops.width.to(device), width, self.size, self.interpolation)
        columns = torch.where(crops.flip.to(device)[:, None, None], columns.flip(1), columns)
        rows, columns = rows.to(pixels.dtype), columns.to(pixels.dtype)
        # Channels ride along as rows of the first product and as columns of the second.
        wide = (pixels.flatten(1, 2) @ columns.transpose(1, 2)).unflatten(1, (-1, height))
        resized: Tensor = (rows @ wide.transpose(1, 2).flatten(2)).unflatten(2, (-1, self.size)).transpose(1, 2)
        return resized.clamp(0, 1).contiguous()  # bicubic weights overshoot at edges
