"""A store as zarr alone reads it, without a line of maehpc: what a user does who has only the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray


def arrays_of_store(path: Path) -> dict[str, NDArray[Any]]:
    """Maps, scores and the images' indices by name; a score is [images] or [images, n] floats of the table."""
    group = zarr.open_group(path, mode="r", zarr_format=3)
    found = {name: np.asarray(group[name][...]) for name in group.array_keys()}
    names, table = found.pop("score").tolist(), found.pop("scores")
    columns: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        columns.setdefault(name.partition("[")[0], []).append(place)
    for name, places in columns.items():
        found[name] = table[:, places] if "[" in names[places[0]] else table[:, places[0]]
    return found
