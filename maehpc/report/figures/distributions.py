"""Distribution of max sensitivity over images: one column a method, one row a data set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter
from numpy.typing import NDArray

from maehpc.report.columns import Column, count, extremes, histogram, moments, quantiles
from maehpc.report.methods import Method, method

_FEWEST_BINS, _MOST_BINS = 16, 48
_KEY = "bar: quartiles, gap: median; diamond: mean with its 95 % confidence interval"


@dataclass(frozen=True)
class Distribution:
    """One data set's scores.

    Attributes:
        label: what is said left of the row.
        scores: by method: columns [N] of max sensitivity, NaN and infinite values left out.
        intervals: by method: ends of the confidence interval of the mean, NaN where unknown.
        sampling: how the scores came about ("10 perturbations, radius 0.02 in normalised space").
    """

    label: str
    scores: Mapping[str, Column]
    intervals: Mapping[str, tuple[float, float]]
    sampling: str


def draw_distributions(rows: Sequence[Distribution]) -> Figure:
    """Draws histograms on one scale, with median, quartiles and the mean's confidence interval below each.

    Args:
        rows: at least one, and at least one score among them.
    """
    samplings = {row.sampling for row in rows}
    sampling = samplings.pop() if len(samplings) == 1 else "not all sampled alike: see the recipes"
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    figure = Figure(figsize=(1.3 + 2.1 * len(names), 1.05 + 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    everything = [scores for row in rows for scores in row.scores.values()]
    bins = int(np.clip(2 * np.sqrt(max(map(count, everything))), _FEWEST_BINS, _MOST_BINS))
    edges, logarithmic = bin_edges(everything, bins)
    for axis, name in zip(axes, names, strict=True):
        look = method(name)
        axis.set_title(look.title, fontweight="bold", color=look.colour)
        for place, row in enumerate(rows):
            if count(row.scores.get(name, ())):
                _draw_one(axis, -place, row.scores[name], row.intervals[name], edges, look)
        label_rows(axis, [row.label for row in rows], edges, logarithmic)
    figure.supxlabel(f"max sensitivity ({sampling})\n{_KEY}", fontsize=7.5)
    return figure


def label_rows(axis: Axes, labels: Sequence[str], edges: NDArray[np.float64], logarithmic: bool) -> None:
    """Gives an axes one row a label, from the top down at 0, -1, ..., over the scale of the bins."""
    if logarithmic:
        axis.set_xscale("log")
        # Chosen and written here: powers of ten would be mathematics, which our style does not set.
        axis.xaxis.set_major_locator(FixedLocator(_ticks(edges[0], edges[-1])))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(-len(labels) + 0.55, 0.8)
    axis.set_yticks([-place for place in range(len(labels))], labels)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="y", visible=False)


_TICKS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8))
_MOST_TICKS = 4


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in a logarithmic range: the fewest kinds of them of which there are two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _TICKS:
        found = [number for decade in decades for step in steps if low <= (number := step * 10.0**decade) <= high]
        if len(found) > 1:
            break
    return found[:: -(-len(found) // _MOST_TICKS) or 1]


def bin_edges(columns: Iterable[Column], bins: int) -> tuple[NDArray[np.float64], bool]:
    """Edges of so many bins over all scores, and whether they are logarithmic: they are unless some score is 0."""
    low, high = extremes([np.array(extremes(column)) for column in columns if count(column)])
    if low > 0:
        return np.geomspace(low / 1.25, high * 1.25, bins + 1), True
    return np.linspace(low, high * 1.05 or 1.0, bins + 1), False


def _draw_one(
    axis: Axes,
    base: float,
    values: Column,
    interval: tuple[float, float],
    edges: NDArray[np.float64],
    look: Method,
) -> None:
    draw_histogram(axis, base, values, edges, look.colour)
    below = base - 0.1
    draw_quartiles(axis, below, values, look.colour)
    mean = moments(values).mean
    ends = (mean, mean) if np.isnan(interval[0]) else interval
    axis.plot(ends, [below - 0.14] * 2, color="black", linewidth=0.8, marker="|", markersize=4, markeredgewidth=0.8)
    axis.plot(mean, below - 0.14, marker="D", color="black", markersize=2.2, markeredgewidth=0)


def draw_histogram(axis: Axes, base: float, values: Column, edges: NDArray[np.float64], colour: str) -> None:
    """Bars that stand on `base` and are as high as the row lets the highest be."""
    counts = histogram(values, edges)
    axis.stairs(0.62 * counts / counts.max() + base, edges, baseline=base, fill=True, color=colour, alpha=0.45)


def draw_quartiles(axis: Axes, height: float, values: Column, colour: str) -> None:
    """A bar from the first quartile to the third, with a gap at the median."""
    first, middle, third = quantiles(values, [0.25, 0.5, 0.75])
    axis.plot([first, third], [height, height], color=colour, linewidth=3.2, solid_capstyle="butt")
    axis.plot(middle, height, marker="|", color="white", markersize=5, markeredgewidth=1.4)
