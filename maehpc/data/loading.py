"""Batches of one split: from memory (or the GPU's) where it fits, else straight from the pack."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from maehpc.catalogue import SplitName
from maehpc.data.pack import Pack
from maehpc.recipes import DataSettings


class Split(Protocol):
    """One split's images and labels on a device. Both kinds give the same bytes."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], or [N, K] for a multi-label task, on the device."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """Images in the order asked for.

        Args:
            indices: int64 [B] on the CPU, each from 0 to N - 1.

        Returns:
            uint8 [B, C, H, W] at source size, on the device.

        Raises:
            IndexError: an index lies outside the split.
        """


class _LabelledSplit:
    def __init__(self, pack: Pack, split: SplitName, device: torch.device):
        self._device = device
        self.labels = torch.from_numpy(pack.labels(split)).to(device)

    def __len__(self) -> int:
        return len(self.labels)


class ResidentSplit(_LabelledSplit):
    """All images of the split, uint8, on the device."""

    def __init__(self, pack: Pack, split: SplitName, device: torch.device):
        super().__init__(pack, split, device)
        images = torch.from_numpy(pack.images(split)).to(device)
        self._images = images.permute(0, 3, 1, 2).contiguous()

    def batch(self, indices: Tensor) -> Tensor:
        """As `Split.batch`."""
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"the split holds images 0 to {len(self) - 1}")
        return self._images.index_select(0, indices.to(self._device))


class StreamedSplit(_LabelledSplit):
    """Images read from the pack as they are asked for."""

    def __init__(self, pack: Pack, split: SplitName, device: torch.device):
        super().__init__(pack, split, device)
        self._pack = pack
        self._split = split

    def batch(self, indices: Tensor) -> Tensor:
        """As `Split.batch`."""
        images = torch.from_numpy(self._pack.images(self._split, indices.numpy())).to(self._device)
        return images.permute(0, 3, 1, 2).contiguous()


def open_split(pack: Pack, split: SplitName, settings: DataSettings, device: torch.device) -> Split:
    """One split, resident on `device` where it takes at most `settings.resident_bytes`, else streamed."""
    height, width, channels = pack.info.shape
    fits = pack.info.counts[split] * height * width * channels <= settings.resident_bytes
    return (ResidentSplit if fits else StreamedSplit)(pack, split, device)
