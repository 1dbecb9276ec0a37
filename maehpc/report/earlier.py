"""The files of a report that an earlier one in the same folder had and this one has not: a figure or a table of
experiments that are no more would be taken for one of those that are."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from maehpc import files

WRITTEN = ".written.json"
"""In the report's folder: names of its files. What others put there is on no such list, and stays."""


def remove_earlier(out: Path, written: Collection[Path]) -> None:
    """Deletes what the last report in `out` wrote and this one did not.

    Args:
        out: folder of the report.
        written: every file of this report, directly in `out`.

    Raises:
        RunError: one cannot be deleted, or the folder not be written.
    """
    names = sorted(path.name for path in written)
    for name in _names(out / WRITTEN) - set(names):
        with files.writing(out / name):
            (out / name).unlink(missing_ok=True)
    files.write_json(out / WRITTEN, names)


def _names(path: Path) -> set[str]:
    """The names in a list; none where it is absent or damaged."""
    found = None
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
    names = found if isinstance(found, list) else []
    return {name for name in names if isinstance(name, str) and name and Path(name).name == name and name[0] != "."}
