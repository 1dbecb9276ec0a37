"""Absolute position embeddings: MAE's fixed sine-cosine ones, and learned ones on another grid.

A table of positions is `[1, prefix + height * width, dimension]`: the rows of the prefix tokens (CLS, registers)
first, then those of the patches, row by row.
"""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor


def sincos_positions(dimension: int, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """The fixed 2-D sine-cosine positions of MAE (He et al. 2022, appendix A.1; Vaswani et al. 2017, section 3.5).

    The first half of a row encodes the column, the second half the row: "w goes first" in the reference, and every
    published checkpoint relies on it. Within a half come all sines, then all cosines, of `position / 10000^(4i/d)`.

    Args:
        dimension: d, a multiple of 4.
        grid: patches down and across.
        prefix: rows of zeros put before the patches, one a prefix token.

    Returns:
        float32 `[1, prefix + height * width, dimension]`, computed in float64.
    """
    assert dimension % 4 == 0, dimension
    height, width = grid
    exponents = torch.arange(dimension // 4, dtype=torch.float64) / (dimension // 4)
    frequencies = 10000.0**-exponents

    def waves(coordinates: Tensor) -> Tensor:
        angles = torch.outer(coordinates, frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    columns = waves(torch.arange(width, dtype=torch.float64)).repeat(height, 1)
    rows = waves(torch.arange(height, dtype=torch.float64)).repeat_interleave(width, dim=0)
    patches = torch.cat([columns, rows], dim=1)
    return torch.cat([torch.zeros(prefix, dimension, dtype=torch.float64), patches]).float().unsqueeze(0)


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions of one patch grid interpolated to another: bicubic, antialiased, as timm does it.

    Args:
        positions: `[1, prefix + old height * old width, dimension]`; the prefix rows are kept as they are.
        old: the grid they belong to, patches down and across.
        new: the grid wanted.

    Returns:
        `[1, prefix + new height * new width, dimension]`, of the same dtype.
    """
    prefix = positions.shape[1] - old[0] * old[1]
    assert prefix >= 0, (positions.shape, old)
    resized: Tensor = resample_abs_pos_embed(
        positions, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix
    )
    return resized
