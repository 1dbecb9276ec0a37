"""Learning curves: loss of pretraining; loss, accuracy and AUC of finetuning, a step and an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from maehpc.report.figures import style

QUANTITIES = {"loss": "loss", "accuracy": "accuracy", "auc": "AUC"}
"""What can be drawn, by its name in a metrics log, with its name in print."""

_POINTS = 1000
_LOOKS = {"train": (style.TRAIN, "o", "-"), "val": (style.VAL, "s", "--"), "test": (style.MUTED, "^", ":")}


@dataclass(frozen=True)
class Curve:
    """One quantity over training: x in epochs, y; NaN where undefined."""

    epochs: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """What one training stage logged.

    Attributes:
        steps: by quantity, on the training batches as they came.
        epochs: by quantity, by split, after whole epochs.
        steps_an_epoch: optimizer steps an epoch, for the second scale; 0 where unknown.
    """

    steps: Mapping[str, Curve]
    epochs: Mapping[str, Mapping[str, Curve]]
    steps_an_epoch: float

    @property
    def quantities(self) -> list[str]:
        """Those of loss, accuracy and AUC that have a value anywhere."""
        return [name for name in QUANTITIES if name in self.steps or name in self.epochs]


def draw_curves(stages: Mapping[str, Curves], title: str) -> Figure:
    """Draws one panel a quantity a stage, side by side.

    Args:
        stages: by name in print ("Pretraining"); each with at least one quantity.
        title: heading of the figure.
    """
    panels = [(stage, curves, name) for stage, curves in stages.items() for name in curves.quantities]
    figure = Figure(figsize=(0.4 + 2.35 * len(panels), 2.55), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (stage, curves, name) in zip(axes, panels, strict=True):
        _draw_quantity(axis, curves, name)
        axis.set_ylabel(f"{stage} {QUANTITIES[name]}")
    return figure


def _draw_quantity(axis: Axes, curves: Curves, name: str) -> None:
    if name in curves.steps:
        curve = thinned(curves.steps[name])
        axis.plot(curve.epochs, curve.values, color=style.TRAIN, alpha=0.3, linewidth=0.8, label="train, a step")
    for split, curve in curves.epochs.get(name, {}).items():
        colour, marker, line = _LOOKS[split]
        few = len(curve.epochs) <= 40
        axis.plot(
            curve.epochs, curve.values, color=colour, linestyle=line, marker=marker if few else None,
            markersize=2.6, label=f"{split}, an epoch",
        )  # fmt: skip
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.margins(x=0.02)
    axis.legend(loc="best", handlelength=1.6, borderaxespad=0.2)
    if curves.steps_an_epoch:
        ratio = curves.steps_an_epoch
        steps = axis.secondary_xaxis("top", functions=(lambda x: np.multiply(x, ratio), lambda x: np.divide(x, ratio)))
        steps.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        steps.set_xlabel("step", fontsize=7, color=style.MUTED, labelpad=2)
        steps.tick_params(labelsize=6.5, colors=style.MUTED)
        steps.spines["top"].set_visible(False)


def thinned(curve: Curve) -> Curve:
    """At most 1000 points: means over equal runs of consecutive ones (a long run's PDF stays small)."""
    run = -(-len(curve.values) // _POINTS)
    if run <= 1:
        return curve
    starts = np.arange(0, len(curve.values), run)
    lengths = np.diff([*starts, len(curve.values)])
    return Curve(np.add.reduceat(curve.epochs, starts) / lengths, np.add.reduceat(curve.values, starts) / lengths)
