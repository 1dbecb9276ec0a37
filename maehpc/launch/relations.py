"""What jobs mean to one another: which can never start, which have been replaced, which a person wants to see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maehpc.launch.states import State
from maehpc.launch.status import Row


def stuck(rows: Sequence[Row]) -> set[Path]:
    """Folders of jobs that wait, directly or not, for one that did not succeed: they never start by themselves."""
    found = {row.job.path for row in rows if row.never}
    while True:
        new = {
            row.job.path
            for row in rows
            if row.state is State.WAITING
            and row.record is not None
            and row.job.path not in found
            and any(Path(folder) in found for folder in row.record.after)
        }
        if not new:
            return found
        found |= new


def superseded(rows: Sequence[Row], of: str | None = None) -> set[Path]:
    """Folders of jobs that later ones replace: by stage and recipe, in each experiment that a job works on.

    Args:
        rows: the jobs.
        of: the one experiment that counts; None: all.
    """
    series: dict[tuple[Path, str], list[tuple[tuple[int, int], Path, dict[str, Any]]]] = {}
    for row in rows:
        if row.record is None:
            continue
        job, record = row.job, row.record
        for name, recipe in {job.experiment: record.recipe, **record.also}.items():
            if of in (None, name):
                number = job.number if name == job.experiment else record.numbers.get(name, 0)
                jobs = series.setdefault((job.path.parents[2] / name, record.stage), [])
                jobs.append(((number, job.number), job.path, recipe))
    replaced: set[Path] = set()
    needed: set[Path] = set()
    for jobs in series.values():
        later: list[dict[str, Any]] = []
        for _, path, recipe in sorted(jobs, key=lambda one: one[0], reverse=True):
            (replaced if recipe in later else needed).add(path)
            later.append(recipe)
    return replaced - needed


def worth_showing(rows: Sequence[Row]) -> list[Row]:
    """The rows shown without `--all`: what goes on, with all jobs of its experiment, and what wants a person.

    A failed or unknown job wants nobody once a later one has taken its place.
    """
    replaced = superseded(rows)
    lively = {row.job.path.parent for row in rows if row.active}
    wanting = (State.FAILED, State.UNKNOWN)
    return [
        row
        for row in rows
        if row.active or (row.job.path not in replaced and (row.job.path.parent in lively or row.state in wanting))
    ]
