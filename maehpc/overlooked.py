"""Results that no command finds: in folders that have lost their recipe.yaml, or that may not be looked into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from maehpc.places import is_remote

_TRACES = (
    *(f"{stage}/*/{record}" for stage in ("pretrain", "finetune", "probe") for record in ("stage.json", "done.json")),
    *("ledger/*/store.json", "maps/*.zarr/zarr.json"),
)
"""What only stages leave in an experiment; folders of such names others may have."""

_DEPTH = 2
"""Levels below a folder on which experiments are found, see `maehpc.experiment.find_experiments`."""


def overlooked(root: Path) -> dict[Path, str]:
    """What `find_experiments` passes over at or below `root`: folders that hold results and have lost their
    recipe.yaml, and those that may not be looked into. Of a remote place nothing is known.

    Returns:
        By folder, sorted, a sentence on what is wrong with it.
    """
    return {} if is_remote(root) else dict(sorted(_passed_over(root, _DEPTH)))


def _is_closed(folder: Path) -> bool:
    """Whether a folder may not be listed, or what is in it not be reached."""
    try:
        with os.scandir(folder):
            (folder / "recipe.yaml").lstat()
    except PermissionError:
        return True
    except OSError:  # it has no recipe, or is gone by now
        return False
    return False


def _passed_over(folder: Path, depth: int) -> Iterator[tuple[Path, str]]:
    if _is_closed(folder):
        yield folder, f"cannot read {folder}: permission is denied; make it readable"
    elif (folder / "recipe.yaml").is_file():
        return
    elif any(next(folder.glob(trace), None) for trace in _TRACES):
        yield folder, f"{folder} holds results but no recipe.yaml; restore it, or move the folder away"
    elif depth:
        for below in sorted(path for path in folder.glob("*/") if not path.name.startswith(".")):
            yield from _passed_over(below, depth - 1)
