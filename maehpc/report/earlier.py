"""The files of a report that an earlier one in the same folder had and this one has not: a figure or a table of
experiments that are no more would be taken for one of those that are."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from maehpc import files

WRITTEN = ".written.json"
"""In the report's folder: names of its files. What others put there is on no such list, and stays."""


def settle_earlier(out: Path, written: Collection[Path], keep: bool = False) -> None:
    """Deletes what earlier reports in `out` wrote and this one did not.

    Args:
        out: folder of the report.
        written: every file of this report, directly in `out`.
        keep: delete nothing now; a later report will, unless it writes it.

    Raises:
        RunError: one cannot be deleted, or the folder not be written.
    """
    names = {path.name for path in written}
    earlier = _listed(out) - names
    if keep:
        names |= earlier
    else:
        for name in earlier:
            with files.writing(out / name):
                (out / name).unlink(missing_ok=True)
    files.write_json(out / WRITTEN, sorted(names))


def _listed(out: Path) -> set[str]:
    """The files that are on the list; none where it is absent or damaged. What is hidden is none of a report's."""
    found = None
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads((out / WRITTEN).read_bytes())
    listed = {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()
    with os.scandir(out) as entries:
        there = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    return {name for name in listed & there if not name.startswith(".")}
