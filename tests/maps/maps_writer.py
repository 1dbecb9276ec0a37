"""A small store that tests write, kill, damage and write again; importable by the processes they start."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maehpc.maps import ArrayLayout, MapStore, StoreLayout
from maehpc.ownership import Owner, own

INPUTS = {"seed": 3, "explain": {"radius": 0.02, "methods": ["saliency"]}, "classifier": "ab" * 32}

LAYOUT = StoreLayout(
    images=10,
    shard_images=4,
    arrays={
        "label": ArrayLayout((), (), "int64"),
        "saliency": ArrayLayout(("y", "x"), (6, 5), "float32"),
        "saliency_sensitivity": ArrayLayout(("sample",), (3,), "float32"),
        "flipped": ArrayLayout(("sample",), (3,), "bool"),
    },
    attributes={"dataset": "demo", "classes": ["left", "right"], "mean": [0.5], "explain": {"radius": 0.02}},
)

SMALL = StoreLayout(
    images=3,
    shard_images=2,
    arrays={"saliency": ArrayLayout(("y", "x"), (3, 3), "float16"), "label": ArrayLayout((), (), "int64")},
    attributes={},
)

LARGE = StoreLayout(
    images=24,
    shard_images=4,
    arrays={"saliency": ArrayLayout(("y", "x"), (256, 256), "float32"), "label": ArrayLayout((), (), "int64")},
    attributes={},
)


def values(layout: StoreLayout, shard: int) -> dict[str, NDArray[Any]]:
    """The arrays of a shard: the same wherever they are asked for."""
    start, stop = layout.span(shard)
    made = {}
    for name, array in layout.arrays.items():
        words = np.frombuffer(hashlib.sha256(f"{name} {shard}".encode()).digest(), np.uint32)
        draws = np.random.default_rng(words).integers(0, 100, (stop - start, *array.shape))
        made[name] = (draws / 8 if array.dtype.startswith("float") else draws).astype(array.dtype)
    return made


def begin(root: Path, owner: Owner, layout: StoreLayout = LAYOUT) -> MapStore:
    return MapStore.create(root / "maps", root / "ledger", layout, INPUTS, owner)


def explain(root: Path, layout: StoreLayout = LAYOUT) -> list[int]:
    """Computes what is missing once every byte was read; gives the shards it wrote."""
    with own(root / "ledger") as owner:
        store = begin(root, owner, layout)
        missing = store.missing(deep=True)
        for shard in missing:
            store.write_shard(shard, values(layout, shard))
        return missing


def explain_part(root: Path, owner: Owner, shards: list[int]) -> None:
    """One of several workers under the same claim."""
    store = MapStore.open(root / "maps", root / "ledger", owner)
    for shard in shards:
        store.write_shard(shard, values(store.layout, shard))


def rewrite(root: Path) -> None:
    """Writes shard 0 of a whole store once more, with other values, as another kind of device might."""
    with own(root / "ledger") as owner:
        begin(root, owner).write_shard(0, values(LAYOUT, 1))


def die_at(root: Path, moment: int, action: Callable[..., Any], *arguments: Any) -> None:
    """Does `action`, but ends by SIGKILL just before a file below `root` is touched for the `moment`-th time."""
    touched = 0

    def watch(event: str, about: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and str(about[0]).startswith(str(root)):
            touched += 1
            if touched == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    action(*arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
