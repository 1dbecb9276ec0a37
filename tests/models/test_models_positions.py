"""Positions against the formula written out, transformers' table, and timm's interpolation."""

from __future__ import annotations

import math

import pytest
import torch
from models_tiny import hf_mae

from maehpc.models.positions import resized_positions, sincos_positions


def naive(dimension: int, height: int, width: int, prefix: int) -> list[list[float]]:
    quarter = dimension // 4
    rows = [[0.0] * dimension for _ in range(prefix)]
    for y in range(height):
        for x in range(width):
            row = []
            for coordinate in (x, y):
                angles = [coordinate / 10000 ** (i / quarter) for i in range(quarter)]
                row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("dimension", "grid", "prefix"), [(8, (2, 3), 1), (192, (14, 14), 1), (4, (1, 5), 0), (12, (3, 2), 5)]
)
def test_sincos_is_the_formula(dimension: int, grid: tuple[int, int], prefix: int) -> None:
    expected = torch.tensor(naive(dimension, *grid, prefix), dtype=torch.float64).float()
    positions = sincos_positions(dimension, grid, prefix)
    assert positions.shape == (1, prefix + grid[0] * grid[1], dimension)
    torch.testing.assert_close(positions[0], expected, rtol=0, atol=1e-7)


def test_sincos_is_transformers_table() -> None:
    embeddings = hf_mae().vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False  # else version 5 leaves the table at 0
    embeddings.initialize_weights()
    theirs = embeddings.position_embeddings.data
    torch.testing.assert_close(sincos_positions(24, (4, 4)), theirs, rtol=0, atol=1e-7)


def test_resizing_keeps_prefix_and_linear_ramps() -> None:
    """Bicubic interpolation reproduces a linear ramp away from the border, at the new patches' centres."""
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1)
    table = torch.cat([torch.full((1, 2, 1), 99.0), ramp], dim=1)
    resized = resized_positions(table, (8, 8), (16, 16))
    assert resized.shape == (1, 2 + 256, 1)
    assert (resized[:, :2] == 99).all()
    centres = (torch.arange(16) + 0.5) / 2 - 0.5
    inner = resized[0, 2:, 0].reshape(16, 16)[:, 5:11]
    torch.testing.assert_close(inner, centres[5:11].expand(16, 6), rtol=0, atol=1e-5)


def test_same_grid_is_left_alone() -> None:
    table = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized_positions(table, (4, 4), (4, 4)), table)
