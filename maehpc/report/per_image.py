"""The tables of single images: one row an image and method, and one a metric; written a data set at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maehpc import files
from maehpc.recipes.settings import SEARCH_SCORES, SEARCHES
from maehpc.report.explanations import Explained
from maehpc.report.statistics import MethodScores

_IDENTITY = {"experiment": pa.string(), "dataset": pa.string(), "image": pa.int64()}

SCHEMA = pa.schema(
    {
        **_IDENTITY,
        "label": pa.int64(),
        "prediction": pa.int64(),
        "method": pa.string(),
        "sensitivity_max": pa.float64(),
        "sensitivity_mean": pa.float64(),
        "flips": pa.int64(),
        "completeness": pa.float64(),
        "noise_floor": pa.float64(),
        **{f"{kind}_{part}": pa.float64() for kind in SEARCHES for part in SEARCH_SCORES},
    }
)
"""`flips` counts the random perturbations that changed the prediction; `pgd_change` and its like are adversarial (see
`maehpc.report.statistics.Searched`). Null: `label` of multi-label tasks, sensitivity of an all-zero map, and whatever
was not measured."""

METRICS = pa.schema(
    {**_IDENTITY, "method": pa.string(), "metric": pa.string(), "part": pa.string(), "value": pa.float64()}
)
"""Metrics with one value an image; `part` is empty for a metric's own value. Null: a metric that is not defined for an
image."""

Append = Callable[[str, str, Explained], None]


@contextmanager
def per_image_tables(path: Path, metrics: Path) -> Iterator[Append]:
    """Opens the Parquet files; gives the function that appends (experiment, data set, scores).

    Args:
        path: of the table of `SCHEMA`.
        metrics: of the table of `METRICS`, written where something has metrics alone.

    Raises:
        RunError: the disk refused; nothing is left at the paths.
    """
    with ExitStack() as until_end:

        def writer(path: Path, schema: pa.Schema) -> Any:
            partial = until_end.enter_context(files.atomic_path(path))
            return until_end.enter_context(pq.ParquetWriter(partial, schema))

        whole = writer(path, SCHEMA)
        long: list[Any] = []

        def append(experiment: str, dataset: str, explained: Explained) -> None:
            for name, scores in explained.scores.items():
                whole.write_table(_rows(experiment, dataset, name, explained))
                for (metric, part), values in scores.metrics.items():
                    if values.ndim == 1:
                        if not long:
                            long.append(writer(metrics, METRICS))
                        long[0].write_table(_values(experiment, dataset, explained, name, metric, part, values))

        yield append


def _rows(experiment: str, dataset: str, method: str, explained: Explained) -> pa.Table:
    count, scores = len(explained.image), explained.scores[method]
    unknown = [None] * count
    columns = {
        "experiment": [experiment] * count,
        "dataset": [dataset] * count,
        "image": explained.image,
        "label": explained.label if explained.label.ndim == 1 else unknown,
        "prediction": explained.prediction,
        "method": [method] * count,
        "sensitivity_max": _known(scores.maximum),
        "sensitivity_mean": _known(scores.mean),
        "flips": explained.flipped.sum(1) if explained.flipped.size else unknown,
        "completeness": _known(scores.completeness),
        "noise_floor": _known(scores.floor),
        **_searched(scores, unknown),
    }
    return pa.table(columns, schema=SCHEMA)


def _searched(scores: MethodScores, unknown: list[None]) -> dict[str, Any]:
    return {
        f"{kind}_{part}": _known(getattr(scores.searched[kind], part)) if kind in scores.searched else unknown
        for kind in SEARCHES
        for part in SEARCH_SCORES
    }


def _values(
    experiment: str,
    dataset: str,
    explained: Explained,
    method: str,
    metric: str,
    part: str,
    values: NDArray[np.float64],
) -> pa.Table:
    words = {"experiment": experiment, "dataset": dataset, "method": method, "metric": metric, "part": part}
    columns = {name: [word] * len(values) for name, word in words.items()}
    return pa.table({**columns, "image": explained.image, "value": _known(values)}, schema=METRICS)


def _known(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
