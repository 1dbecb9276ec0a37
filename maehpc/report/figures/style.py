"""One look for all figures, and writing them so that equal data give equal bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maehpc import files

TRAIN, VAL = "#0072B2", "#D55E00"
"""Colours of the splits (Okabe and Ito 2008)."""

MUTED = "#666666"

_STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": 8.0,
    "text.parse_math": False,  # a $ in the name of a class is a $
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "figure.dpi": 160.0,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # real letters in the PDF, as journals ask
    "pdf.compression": 6,
}


def in_style() -> AbstractContextManager[None]:
    """The block in which a figure must be drawn and saved to look as it should, whatever the user's matplotlibrc."""
    return matplotlib.style.context(["default", _STYLE])


_NO_DATES: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}


Draw = Callable[[], Figure]
"""Makes a figure. Called inside the style."""


def write_figure(stem: Path, draw: Draw) -> list[Path]:
    """Draws a figure in this package's style and writes it as PNG (160 dpi) and PDF.

    Args:
        stem: path without suffix.
        draw: makes the figure; called once.

    Returns:
        The PNG and the PDF.

    Raises:
        RunError: the disk refused.
    """
    written = []
    with in_style():
        figure = draw()
        for kind, metadata in _NO_DATES.items():
            path = stem.with_name(f"{stem.name}.{kind}")
            with files.atomic_path(path) as partial:
                figure.savefig(partial, format=kind, metadata=metadata)
            written.append(path)
            figure.set_layout_engine("none")  # the PDF keeps the PNG's layout instead of working out its own
    return written


def head(figure: Figure, title: str, subtitle: str = "") -> None:
    """Writes a title, and a muted line below it, at the top left."""
    height = figure.get_figheight()
    place: dict[str, Any] = {"x": 0.08 / figure.get_figwidth(), "ha": "left", "va": "top"}
    figure.text(y=1 - 0.07 / height, s=title, fontsize=9, fontweight="bold", **place)
    figure.text(y=1 - 0.25 / height, s=subtitle, fontsize=7, color=MUTED, **place)


def bare(axes: Axes) -> None:
    """Leaves an axes nothing but its picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
