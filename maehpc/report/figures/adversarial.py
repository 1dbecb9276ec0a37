"""Chance beside the worst found: the random maximum and what PGD found, one column a method, one row a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from maehpc.report.columns import Column, count
from maehpc.report.figures import style
from maehpc.report.figures.distributions import bin_edges, draw_histogram, draw_quartiles, label_rows
from maehpc.report.methods import method

_BINS = 32
_KEY = "grey: the largest of the random perturbations; coloured: the largest found by projected gradient ascent, the"
_KEY += " prediction\nunchanged; bar: quartiles, gap: median"


@dataclass(frozen=True)
class Comparison:
    """One data set's relative changes of maps.

    Attributes:
        label: what is said left of the row.
        random: by method: columns [N] of the largest change over the random perturbations, of the images of `searched`.
        searched: by method: [N] change at the perturbation that PGD found; finite, as `random` is.
        ball: where both kinds of perturbation lie ("radius 0.02 in normalised space").
    """

    label: str
    random: Mapping[str, Column]
    searched: Mapping[str, Column]
    ball: str


def draw_comparisons(rows: Sequence[Comparison]) -> Figure:
    """Draws both histograms on one scale, with the quartiles of each below.

    Args:
        rows: at least one, and at least one image among them.
    """
    balls = {row.ball for row in rows}
    ball = balls.pop() if len(balls) == 1 else "not all in one ball: see the recipes"
    names = list(dict.fromkeys(name for row in rows for name in row.searched))
    figure = Figure(figsize=(max(1.3 + 2.1 * len(names), 6.6), 1.2 + 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    everything = [values for row in rows for group in (row.random, row.searched) for values in group.values()]
    edges, logarithmic = bin_edges(everything, _BINS)
    for axis, name in zip(axes, names, strict=True):
        look = method(name)
        axis.set_title(look.title, fontweight="bold", color=look.colour)
        for place, row in enumerate(rows):
            if not count(row.searched.get(name, ())):
                continue
            for values, colour, below in (
                (row.random[name], style.MUTED, 0.1),
                (row.searched[name], look.colour, 0.22),
            ):
                draw_histogram(axis, -place, values, edges, colour)
                draw_quartiles(axis, -place - below, values, colour)
        label_rows(axis, [row.label for row in rows], edges, logarithmic)
    figure.supxlabel(f"relative change of the map ({ball})\n{_KEY}", fontsize=7.5)
    return figure
