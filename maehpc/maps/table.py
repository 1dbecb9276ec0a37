"""A shard's scores as one table: a row an image, a column a number. One file holds it, whatever is measured.

An image has dozens of scores of a few bytes. A file each would be most of a store's files, and most of a report's time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maehpc.maps.layout import StoreLayout


def packed(layout: StoreLayout, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The table [n, columns] of n images' scores.

    Args:
        layout: of the store, which has scores.
        arrays: every score of it by name, [n, *shape], and any others.

    Raises:
        ValueError: a number is an integer beyond those that the table's type holds all of: 2^24, or 2^53 in float64.
    """
    assert layout.table is not None
    images = len(arrays[next(iter(layout.columns))])
    exact = 2 ** (np.finfo(layout.table.dtype).nmant + 1)
    table = np.empty((images, *layout.table.shape), layout.table.dtype)
    for name, columns in layout.columns.items():
        values = arrays[name].reshape(images, -1)
        table[:, columns] = values
        if values.dtype.kind == "i" and not ((values >= -exact) & (values <= exact)).all():
            raise ValueError(f"{name} holds an integer beyond {exact}")
    return table


def unpacked(layout: StoreLayout, tables: Sequence[NDArray[Any]], names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Some scores by name, [n, *shape] in their own types, from tables [m, columns] that hold n images in all."""
    images = sum(map(len, tables))
    found, parts = {}, []
    for name in names:
        array, columns = layout.arrays[name], layout.columns[name]
        values = np.empty((images, columns.stop - columns.start), array.dtype)
        found[name] = values.reshape(images, *array.shape)
        parts.append((values, columns))
    first = 0
    for table in tables:  # one after the other, each whole: it stays in the processor's cache meanwhile
        rows = slice(first, first + len(table))
        for values, columns in parts:
            values[rows] = table[:, columns]
        first = rows.stop
    return found
