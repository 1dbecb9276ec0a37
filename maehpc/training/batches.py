"""From a split's indices to the encoder's input: read, crop, normalise, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from maehpc import keys
from maehpc.data import CropFlip, Preprocess, Split

EVALUATION_BATCH = 256
"""Images a forward pass where no gradient is kept; fixed, so that features do not depend on the training batch."""


class Batches:
    """Normalised images of one split, plain or augmented.

    Args:
        split: where images come from.
        preprocess: to pixels in [0, 1] at the encoder's size, and to normalised space.
        crop: random resized crop and flip for `augmented`, or None.
        seed: of the run.
        name: of the stage; part of the key of every draw.
    """

    def __init__(self, split: Split, preprocess: Preprocess, crop: CropFlip | None, seed: int, name: str) -> None:
        self.split = split
        self.preprocess = preprocess
        self.crop = crop
        self._seed = seed
        self._name = name

    @property
    def device(self) -> torch.device:
        """Where images and labels are."""
        return self.split.labels.device

    def plain(self, indices: Tensor) -> Tensor:
        """Images at `indices` (int64 [B], CPU) as they are: float32 [B, C, S, S], normalised."""
        return self.preprocess.normalise(self.preprocess.pixels(self.split.batch(indices)))

    def augmented(self, indices: Tensor, step: int, part: int = 0) -> Tensor:
        """The same, cropped and flipped at random; the draw is keyed by the step and its micro-batch `part`."""
        if self.crop is None:
            return self.plain(indices)
        generator = keys.generator(self._seed, self._name, "crop", step, part)
        raw = self.preprocess.unresized(self.split.batch(indices))
        return self.preprocess.normalise(self.crop(raw, generator))

    def every(self, indices: Tensor) -> Iterator[Tensor]:
        """Plain batches over all of `indices`, in order."""
        for chunk in indices.split(EVALUATION_BATCH):
            yield self.plain(chunk)


def micro_batches(indices: Tensor, count: int) -> list[Tensor]:
    """Cuts a step's indices into at most `count` parts of nearly equal size."""
    return [part for part in torch.tensor_split(indices, count) if len(part)]
