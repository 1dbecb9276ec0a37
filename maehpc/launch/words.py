"""A job's row in words: the cells of the table that `maehpc status` prints, and a line a data set below it."""

from __future__ import annotations

import math
from collections.abc import Collection

from maehpc.launch.record import JobRecord
from maehpc.launch.status import Row

COLUMNS = ("job", "id", "state", "nodes", "attempt", "progress", "images/s", "left", "loss")
NUMBERS = frozenset({"nodes", "attempt", "images/s", "left", "loss"})
"""Columns whose texts are aligned at their right."""

_MOST_NAMES = 6
"""Of a pool's experiments, told in a sentence."""


def progress(row: Row) -> str:
    """How far a job is, in words: "pretrain retina 120/800"."""
    beat = row.heartbeat
    if beat is None:
        return ""
    plain = (row.job.stage, "ending") if row.state.ended else (row.job.stage,)
    words = [beat.phase] if beat.phase not in plain else []
    if beat.parts:
        words.append(f"{len(beat.parts)} data sets")
    elif beat.dataset:
        words.append(beat.dataset)
    if beat.done is not None and beat.total is not None:
        words.append(f"{beat.done}/{beat.total}" + (" images" if beat.unit == "image" else ""))
    return " ".join(words)


def together(record: JobRecord | None, first: Collection[str] = ()) -> str:
    """Which experiments one pool explains, those of `first` before others; "" for a job of a single experiment."""
    if record is None or not record.also:
        return ""
    names = sorted(record.recipes, key=lambda name: name not in first)
    if len(names) > _MOST_NAMES:
        names[_MOST_NAMES - 1 :] = [f"{len(names) - _MOST_NAMES + 1} more"]
    return f"one pool explains {', '.join(names[:-1])} and {names[-1]}"


def parts(row: Row, of: Collection[str] = ()) -> list[str]:
    """What there is to tell of each data set that a running job works on, where the table does not tell it.

    Args:
        row: the job.
        of: experiments whose data sets are told, where one pool explains several; none: all.
    """
    beat = row.heartbeat if row.moving else None
    if beat is None:
        return []
    if of and row.record is not None and row.record.also:  # whose data sets are called EXPERIMENT/DATASET

        def own(name: str) -> bool:
            return name.partition("/")[0] in of

        beat = beat.model_copy(
            update={
                "parts": {name: part for name, part in beat.parts.items() if own(name)},
                "failures": {name: count for name, count in beat.failures.items() if own(name)},
            }
        )
    found = []
    for name, (done, total) in beat.parts.items():
        rate = beat.rates.get(name)
        words = [f"{name} {done}/{total}", *_failures(beat.failures.get(name))]
        if rate and done < total:
            words[1:1] = [f"{_rate(rate)} images/s", f"{duration((total - done) / rate)} left"]
        found.append(", ".join(words))
    if not beat.parts:
        found += [", ".join((name, *_failures(count))) for name, count in beat.failures.items()]
    return found


def _failures(count: int | None) -> list[str]:
    return [f"{count} failure{'s' * (count != 1)}"] if count else []


def _rate(rate: float) -> str:
    return f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"


def duration(seconds: float) -> str:
    """A time span for people: 0:00:42, 3:10:00, 2 d 04:00; one without end is told as such."""
    if math.isinf(seconds):
        return "for ever"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{days} d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def cells(row: Row) -> tuple[str, ...]:
    """The texts of `COLUMNS` for a job."""
    beat = row.heartbeat if row.moving else None
    last = row.heartbeat
    asked = "" if row.record is None else _nodes(row.record)
    rate = beat.images_per_second if beat else None
    return (
        row.job.label,
        row.job_id or "",
        str(row.state),
        asked,
        str(row.attempt) if row.attempt else "",
        progress(row),
        "" if rate is None else _rate(rate),
        "" if beat is None or beat.seconds_left is None else duration(beat.seconds_left),
        "" if last is None or last.loss is None else f"{last.loss:.4f}",
    )


def _nodes(record: JobRecord) -> str:
    return str(record.nodes) if record.min_nodes is None else f"{record.min_nodes}-{record.nodes}"
