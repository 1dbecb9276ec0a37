"""Images in blocks of a few megabytes, so that no split need fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_BYTES = 8 << 20
"""About so much is read, hashed and written at once."""


def blocks(count: int, image_bytes: int) -> Iterator[slice]:
    """Consecutive slices of `count` images, about `BLOCK_BYTES` each."""
    step = max(1, BLOCK_BYTES // image_bytes)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
