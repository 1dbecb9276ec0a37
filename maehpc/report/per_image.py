"""The table of single images: one row an image and method, written a data set at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maehpc import files
from maehpc.report.explanations import Explained

SCHEMA = pa.schema(
    {
        "experiment": pa.string(),
        "dataset": pa.string(),
        "image": pa.int64(),
        "label": pa.int64(),
        "prediction": pa.int64(),
        "method": pa.string(),
        "sensitivity_max": pa.float64(),
        "sensitivity_mean": pa.float64(),
        "flips": pa.int64(),
    }
)
"""`flips` counts the perturbations that changed the prediction. Null: `label` of multi-label tasks, sensitivity of an
all-zero map, and whatever was not measured."""

Append = Callable[[str, str, Explained], None]


@contextmanager
def per_image_table(path: Path) -> Iterator[Append]:
    """Opens the Parquet file; gives the function that appends (experiment, data set, scores).

    Raises:
        RunError: the disk refused; nothing is left at `path`.
    """
    with files.atomic_path(path) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:

        def append(experiment: str, dataset: str, explained: Explained) -> None:
            for name in explained.scores:
                writer.write_table(_rows(experiment, dataset, name, explained))

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
        "sensitivity_max": pa.array(scores.maximum, mask=np.isnan(scores.maximum)),
        "sensitivity_mean": pa.array(scores.mean, mask=np.isnan(scores.mean)),
        "flips": explained.flipped.sum(1) if explained.flipped.size else unknown,
    }
    return pa.table(columns, schema=SCHEMA)
