"""Panels of explained images: image | a map a method, with each map's sensitivity above it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from maehpc.report.figures import style
from maehpc.report.figures.colours import GREY_OPACITY, colour_limit, colour_map, colour_range, grey, opacity
from maehpc.report.methods import Method, method

_CELL, _TEXT, _TOP, _BOTTOM, _GAP = 1.45, 1.25, 0.58, 0.36, 0.26  # inches
_WRAP = 19  # characters that fit left of a row


@dataclass(frozen=True)
class Panel:
    """One image and its maps.

    Attributes:
        heading: why this image is shown.
        lines: what else is said left of the row; long lines are wrapped.
        image: uint8 [H, W] or [H, W, 3]; None where the store keeps no pixels.
        maps: by method: [h, w], of any resolution over the same field of view.
        sensitivity: by method; NaN where none is known.
        measure: what `sensitivity` is, above each map.
    """

    heading: str
    lines: tuple[str, ...]
    image: NDArray[np.uint8] | None
    maps: dict[str, NDArray[np.float32]]
    sensitivity: dict[str, float]
    measure: str = "max sens."


def draw_panels(panels: Sequence[Panel], title: str, subtitle: str) -> Figure:
    """Draws one row a panel.

    Every map has its own colour range (its 99.5th percentile of magnitude): rows compare where evidence lies,
    not how much of it there is. Signed maps are centred on 0; coarse maps are laid over the image.
    """
    methods = list(panels[0].maps)
    with_image = any(panel.image is not None for panel in panels)
    columns = len(methods) + with_image
    width = _TEXT + columns * (_CELL + 0.12)
    height = _TOP + len(panels) * (_CELL + _GAP) + _BOTTOM
    figure = Figure(figsize=(width, height))
    style.head(figure, title, subtitle)
    grid = figure.add_gridspec(
        len(panels),
        columns,
        left=_TEXT / width,
        right=1 - 0.08 / width,
        top=1 - (_TOP + _GAP) / height,
        bottom=_BOTTOM / height,
        wspace=0.08,
        hspace=_GAP / _CELL,
    )
    axes = grid.subplots(squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        _draw_row(row, panel, methods, with_image)
    headings = ["Image"] * with_image + [method(name).title for name in methods]
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.annotate(
            heading, (0.5, 1), (0, 13), xycoords="axes fraction", textcoords="offset points",
            ha="center", va="bottom", fontweight="bold",
        )  # fmt: skip
    for axis, name in zip(axes[-1][with_image:], methods, strict=True):
        _draw_range(figure, axis, method(name))
    return figure


def _draw_row(row: Sequence[Axes], panel: Panel, methods: Sequence[str], with_image: bool) -> None:
    for axis in row:
        style.bare(axis)
    place: dict[str, Any] = {
        "xycoords": ("figure fraction", "axes fraction"),
        "textcoords": "offset points",
        "va": "top",
    }
    row[0].annotate(panel.heading, (0, 0.95), (6, 0), fontweight="bold", **place)
    text = "\n".join(textwrap.fill(line, _WRAP, subsequent_indent="  ") for line in panel.lines)
    row[0].annotate(text, (0, 0.95), (6, -14), fontsize=7.5, linespacing=1.35, **place)
    if with_image and panel.image is not None:
        _show(row[0], panel.image)
    for axis, name in zip(row[with_image:], methods, strict=True):
        _draw_map(axis, panel.maps[name], panel.image, method(name))
        axis.set_title(_heading(panel.maps[name], panel.measure, panel.sensitivity[name]), pad=3, fontsize=7.5)


def _heading(values: NDArray[np.float32], measure: str, sensitivity: float) -> str:
    if not np.isnan(sensitivity):
        return f"{measure} {sensitivity:#.3g}"
    return "" if values.any() else "all zero"


def _show(axis: Axes, picture: NDArray[Any], **options: Any) -> None:
    options.setdefault("interpolation", "nearest")
    axis.imshow(picture, extent=(0, 1, 0, 1), cmap=options.pop("cmap", "gray"), **options)


def _draw_map(axis: Axes, values: NDArray[np.float32], image: NDArray[np.uint8] | None, look: Method) -> None:
    limit = colour_limit(values)
    norm, cmap = Normalize(*colour_range(limit, look)), colour_map(look)
    if look.overlay and image is not None:
        _show(axis, grey(image), vmin=0, vmax=255, alpha=GREY_OPACITY)
        _show(axis, values, cmap=cmap, norm=norm, alpha=opacity(values, limit), interpolation="bicubic")
    else:
        _show(axis, values, cmap=cmap, norm=norm)


def _draw_range(figure: Figure, axis: Axes, look: Method) -> None:
    place = axis.get_position()
    bar = figure.add_axes(
        (place.x0 + 0.15 * place.width, place.y0 - 0.15 / figure.get_figheight(),
         0.7 * place.width, 0.06 / figure.get_figheight())
    )  # fmt: skip
    norm = Normalize(-1 if look.signed else 0, 1)
    scale = ScalarMappable(norm, colour_map(look))
    ticks, words = ([-1, 0, 1], ["against", "0", "for"]) if look.signed else ([0, 1], ["0", "large"])
    colours = figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=ticks)
    colours.ax.set_xticklabels(words, fontsize=6.5)
    colours.outline.set_linewidth(0.4)
    colours.ax.tick_params(length=1.5, width=0.4, pad=1.5)
    colours.ax.grid(False)
