"""Uniform noise that is a pure function of what it is for: Philox4x32-10 (Salmon et al. 2011) on torch integers.

A draw is a counter run through a keyed bijection, so no state is carried from one image, batch or process to the next,
and only integer operations precede the last two exact scalings: a CPU and a GPU give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maehpc import keys

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class NoiseKey:
    """What a stream of noise belongs to: the recipe's seed and the data set's name."""

    seed: int
    dataset: str

    @property
    def words(self) -> tuple[int, int]:
        """The Philox key, two 32-bit words."""
        derived = keys.derive(self.seed, "explanation noise", self.dataset)
        return derived & _WORD, derived >> 32


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product; `multiplier` lies in [2^31, 2^32).

    The product with `multiplier - 2^32` stays inside a signed 64-bit integer, has the same low word, and its high word
    lacks exactly `word`.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of each counter.

    Args:
        counter: four int64 tensors of 32-bit words, any shapes that broadcast with one another.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of random 32-bit words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    for turn in range(_ROUNDS):
        k0, k1 = ((word + turn * weyl) & _WORD for word, weyl in zip(key, _WEYL, strict=True))
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def uniform(
    key: NoiseKey, indices: Tensor, sample: int, shape: Sequence[int], radius: float, device: torch.device | str
) -> Tensor:
    """The noise of one perturbation of each image, uniform in [-radius, radius).

    An image's noise depends on (seed, data set, image index, sample) alone, an element's also on its flat position in
    `shape`. It has 2^24 equally likely, equally spaced values.

    Args:
        key: the stream.
        indices: image indices in the data set's split, int64 [B], not negative.
        sample: number of the perturbation, in [0, 2^32).
        shape: shape of one image, such as (C, H, W).
        radius: half side of the L-inf ball, in the units of the image it is added to.
        device: where the noise is made.

    Returns:
        float32 [B, *shape].
    """
    elements = torch.Size(shape).numel()
    image = indices.to(device)[:, None]
    block = torch.arange(-(-elements // 4), device=device)[None]
    counter = (block, torch.full_like(image, sample), image & _WORD, image >> 32)
    words = torch.stack(philox(counter, key.words), dim=-1).flatten(1)[:, :elements]
    centred = ((words >> 8) - (1 << 23)).to(torch.float32) * 2.0**-23
    return (centred * radius).reshape(-1, *shape)
