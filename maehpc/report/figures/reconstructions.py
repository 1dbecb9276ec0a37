"""MAE reconstructions of test images: original, masked, reconstructed (He et al. 2022, figure 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from maehpc.report.figures import style

MOST = 8


@dataclass(frozen=True)
class Reconstructions:
    """Images that the MAE filled in.

    Attributes:
        original: uint8 [K, H, W, C], C 1 or 3, K at least 1; so are `masked` and `reconstructed`.
        masked: what the encoder saw.
        reconstructed: what the decoder made of it, visible patches pasted in.
        index: [K] position of each image in the test split.
        mask_ratio: fraction of patches hidden.
    """

    original: NDArray[np.uint8]
    masked: NDArray[np.uint8]
    reconstructed: NDArray[np.uint8]
    index: NDArray[np.int64]
    mask_ratio: float


def draw_reconstructions(images: Reconstructions, title: str) -> Figure:
    """Draws the first `MOST` images, one a column."""
    rows = {
        "Original": images.original,
        f"Masked {images.mask_ratio:.0%}": images.masked,
        "Reconstructed": images.reconstructed,
    }
    count = min(len(images.original), MOST)
    cell, text, top = 0.88, 0.95, 0.42
    width, height = text + count * cell, top + 3 * cell
    figure = Figure(figsize=(width, height))
    style.head(figure, title)
    axes = figure.subplots(
        3,
        count,
        squeeze=False,
        gridspec_kw={
            "left": text / width,
            "right": 1 - 0.06 / width,
            "top": 1 - top / height,
            "bottom": 0.06 / height,
            "wspace": 0.06,
            "hspace": 0.06,
        },
    )
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, pictures, strict=False):
            style.bare(axis)
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
    for axis, number in zip(axes[0], images.index, strict=False):
        axis.set_title(f"#{number}", pad=2.5, fontsize=7, color=style.MUTED)
    return figure
