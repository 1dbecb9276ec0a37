"""Measures of trust in maps, one a file: a file `lipschitz.py` here is the metric `lipschitz`.

A new metric is a new file with one subclass of `Metric`. A store holds its values as METHOD_METRIC, or
METHOD_METRIC_PART where it has several. `shared/` holds what several of them need.
"""

from maehpc.explain.metrics.base import Given, Metric
from maehpc.explain.metrics.registry import make_metrics, metric_class

__all__ = ["Given", "Metric", "make_metrics", "metric_class"]
