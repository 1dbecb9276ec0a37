"""From a metric's name to its class: a file's name is the metric's."""

from __future__ import annotations

from maehpc.explain.methods.base import Setup
from maehpc.explain.methods.registry import read_options
from maehpc.explain.metrics.base import Metric
from maehpc.explain.plugin_class import plugin_class


def metric_class(name: str) -> type[Metric]:
    """The class of the metric of that name.

    Args:
        name: one of `maehpc.recipes.plugins.METRICS`.
    """
    found: type[Metric] = plugin_class("metrics", name, Metric)
    found.name = name
    return found


def make_metrics(setup: Setup, images: int | None = None) -> dict[str, Metric]:
    """The settings' metrics, in their order.

    Args:
        setup: of the engine whose maps are measured.
        images: in the split; not known where None.

    Raises:
        InputError: a metric's options are wrong, or do not fit the classifier or the split.
    """
    metrics = {}
    for name in setup.settings.metrics:
        kind = metric_class(name)
        metrics[name] = kind(setup, read_options(kind.Options, name, setup.settings.options), images)
    return metrics
