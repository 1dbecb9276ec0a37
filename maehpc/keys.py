"""Random streams by name: what a draw is for decides its value, not when or where it is made.

Nothing here keeps a state, so a job that is killed and run again has no generator to restore.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *words: str | int) -> int:
    """A 63-bit seed from the run's seed and the words that name the draw (SHA-256, so streams do not overlap)."""
    text = "\x1f".join([str(seed), *(f"{type(word).__name__}:{word}" for word in words)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *words: str | int) -> torch.Generator:
    """A CPU generator for the named draw; the same numbers whatever the device of the model is."""
    import torch  # here, so that a report can name its draws without it

    return torch.Generator().manual_seed(derive(seed, *words))
