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
            words = {"experiment": experiment, "dataset": dataset}
            for name, scores in explained.scores.items():
                for rows in _rows(explained, name):
                    whole.write_table(_table({**words, "method": name}, rows, SCHEMA))
                for (metric, part), values in scores.metrics.items():
                    if (metric, part) in scores.elements:
                        continue
                    if not long:
                        long.append(writer(metrics, METRICS))
                    about = {**words, "method": name, "metric": metric, "part": part}
                    for image, some in zip(explained.image, values, strict=True):
                        long[0].write_table(_table(about, {"image": image, "value": _known(some)}, METRICS))

        yield append


def _rows(explained: Explained, method: str) -> Iterator[dict[str, Any]]:
    """The columns of one method but for those that are the same in every row, some thousand images at a time."""
    scores = explained.scores[method]
    columns = {
        "image": explained.image,
        "label": explained.label,
        "prediction": explained.prediction,
        "flips": explained.flipped,
        "sensitivity_max": scores.maximum,
        "sensitivity_mean": scores.mean,
        "completeness": scores.completeness,
        "noise_floor": scores.floor,
        **{
            f"{kind}_{part}": getattr(scores.searched[kind], part)
            for kind in SEARCHES
            if kind in scores.searched
            for part in SEARCH_SCORES
        },
    }
    for arrays in zip(*columns.values(), strict=True):
        rows = dict(zip(columns, arrays, strict=True))
        label, flipped = rows.pop("label"), rows.pop("flips")
        found: dict[str, Any] = {name: _known(values) for name, values in rows.items()}
        if label.ndim == 1:
            found["label"] = label
        if flipped.size:
            found["flips"] = flipped.sum(1)
        yield found


def _table(words: dict[str, str], columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Rows of which some columns are one word; null where there is no column."""
    length = len(columns["image"])
    whole = {name: [word] * length for name, word in words.items()} | columns
    return pa.table({name: whole.get(name, [None] * length) for name in schema.names}, schema=schema)


def _known(values: NDArray[Any]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
