"""From stored uint8 images to the encoder's input, on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from maehpc.data.pack import PackInfo
from maehpc.recipes import DataSettings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALLEST_STD = 1 / 255
"""A channel that never changes is divided by one grey level rather than by 0."""


class Preprocess:
    """Channels, size and normalisation as the recipe says.

    An image's result does not depend on the batch it comes in.

    Attributes:
        mean: a channel, subtracted from pixels in [0, 1].
        std: a channel, pixels are then divided by it.
    """

    def __init__(self, settings: DataSettings, info: PackInfo):
        self.settings = settings
        self.mean, self.std = _statistics(settings, info)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def unresized(self, batch: Tensor) -> Tensor:
        """Pixels with the recipe's channels at source size, for a crop that resizes by itself.

        Args:
            batch: uint8 [B, 1 or 3, H, W].

        Returns:
            float32 [B, C, H, W] in [0, 1].
        """
        return self._repeated(self._levels(batch))

    def pixels(self, batch: Tensor) -> Tensor:
        """Pixels as the encoder sees them, before normalisation.

        Args:
            batch: uint8 [B, 1 or 3, H, W].

        Returns:
            float32 [B, C, S, S] in [0, 1]; resized with antialiasing where the size differs, aspect not kept.
        """
        size = (self.settings.image_size, self.settings.image_size)
        levels = self._levels(batch)
        if levels.shape[2:] != size:
            levels = functional.interpolate(levels, size=size, mode=self.settings.interpolation, antialias=True)
        return self._repeated(levels.clamp(0, 1))  # bicubic weights overshoot at edges

    def normalise(self, pixels: Tensor) -> Tensor:
        """(pixels - mean) / std, for [B, C, H, W]."""
        mean, std = self._tensors(pixels.device)
        return (pixels - mean) / std

    def denormalise(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._tensors(x.device)
        return x * std + mean

    def _levels(self, batch: Tensor) -> Tensor:
        """float32 in [0, 1]; colour averaged where the recipe wants grey, grey not yet repeated."""
        if batch.shape[1] == 3 and self.settings.channels == 1:
            # Whole numbers up to 765 are exact in float32, so the sum's order cannot show.
            return batch.float().sum(dim=1, keepdim=True) / (3 * 255)
        return batch.float() / 255

    def _repeated(self, levels: Tensor) -> Tensor:
        return levels.expand(-1, self.settings.channels, -1, -1).contiguous()

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = (
                torch.tensor(self.mean, device=device).view(1, -1, 1, 1),
                torch.tensor(self.std, device=device).view(1, -1, 1, 1),
            )
        return self._on_device[device]


def _statistics(settings: DataSettings, info: PackInfo) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if settings.normalization == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = info.mean, info.std
    if len(mean) == 3 and settings.channels == 1:
        assert info.grey_mean is not None and info.grey_std is not None, "a pack of colour images has both"
        mean, std = (info.grey_mean,), (info.grey_std,)
    elif len(mean) == 1:
        mean, std = mean * settings.channels, std * settings.channels
    return mean, tuple(max(value, SMALLEST_STD) for value in std)
