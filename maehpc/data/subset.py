"""Seeded choices among labelled images: balanced subsets, and orders whose every beginning is stratified."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maehpc import keys

Integers = NDArray[np.int64]


def _ranks(labels: Integers, seed: int, word: str) -> tuple[Integers, Integers]:
    """Each image's place in a shuffle of its own class, and the size of that class; both int64 [N]."""
    rank = np.empty(len(labels), dtype=np.int64)
    size = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = torch.randperm(len(members), generator=keys.generator(seed, word, int(label))).numpy()
        rank[members[shuffled]] = np.arange(len(members))
        size[members] = len(members)
    return rank, size


def subset(labels: NDArray[Any] | Tensor, count: int, seed: int) -> Tensor:
    """Which images to keep when only `count` of them are to be used.

    Classes take turns, so their numbers differ by at most 1 until a class runs out; a smaller subset of the same seed
    lies inside a larger one. Multi-label sets, which have no such balance, are drawn uniformly.

    Args:
        labels: integers [N], or [N, K] for a multi-label task.
        count: images wanted; all N where it is larger.
        seed: of the draw.

    Returns:
        Rising indices, int64 [min(count, N)] on the CPU.
    """
    values = torch.as_tensor(labels).cpu().numpy()
    if values.ndim == 2:
        order = torch.randperm(len(values), generator=keys.generator(seed, "subset"))
        return order[:count].sort().values
    rank, _ = _ranks(values, seed, "subset")
    classes, position = np.unique(values, return_inverse=True)
    # Which classes get the remainder is drawn too: otherwise the lowest labels would always be the larger ones.
    turn = torch.randperm(len(classes), generator=keys.generator(seed, "subset turns")).numpy()[position]
    return torch.from_numpy(np.sort(np.lexsort((turn, rank))[:count]).astype(np.int64))


def stratified_order(labels: Integers, seed: int, word: str) -> Integers:
    """An order of all images in which every beginning holds the classes in their proportions.

    Cutting it anywhere gives a stratified split with exact sizes: image r of a shuffled class of n stands at
    (r + 1/2) / n of the way.

    Args:
        labels: int64 [N].
        seed: of the shuffle.
        word: names the draw.

    Returns:
        Indices, int64 [N].
    """
    rank, size = _ranks(labels, seed, word)
    return np.lexsort((labels, (rank + 0.5) / size)).astype(np.int64)
