"""What a person sees while a stage works: bars on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from maehpc.progress import Bar, Silent
from maehpc.progress import Progress as Reporter

LINE_EVERY = 10.0
"""Seconds between two lines about the same bar where there is no terminal."""


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)


class TerminalProgress:
    """Bars with the time left, on stderr."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A live bar."""
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            yield _RichBar(progress, progress.add_task(description, total=total, completed=done, note=""))

    def say(self, sentence: str) -> None:
        """A plain line."""
        self._console.print(sentence, highlight=False, markup=False)

    def warn(self, sentence: str) -> None:
        """A line that stands out."""
        self._console.print(f"warning: {sentence}", style="yellow", highlight=False, markup=False)


class _LineBar:
    def __init__(self, description: str, total: int, done: int) -> None:
        self._description, self._total, self._done, self._first = description, total, done, done
        self._start = self._told = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told < LINE_EVERY and self._done < self._total:
            return
        self._told = now
        elapsed = now - self._start
        left = elapsed / (self._done - self._first) * (self._total - self._done)
        times = f"{elapsed:.0f} s, about {left:.0f} s left" if self._done < self._total else f"{elapsed:.0f} s"
        words = [f"{self._description}: {self._done}/{self._total}", times, *([note] if note else [])]
        print(", ".join(words), file=sys.stderr, flush=True)


class LineProgress:
    """A line now and then, on stderr; for logs."""

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar told in lines."""
        yield _LineBar(description, total, done)

    def say(self, sentence: str) -> None:
        """A plain line."""
        print(sentence, file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """A line that says so."""
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


class QuietProgress(Silent):
    """Warnings alone."""

    def warn(self, sentence: str) -> None:
        """A line that says so."""
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def stdout() -> Console:
    """Where results are printed; a file has no width of its own, so it is given one that tables fit in."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def reporter(quiet: bool) -> Reporter:
    """What fits the terminal, or the absence of one."""
    if quiet:
        return QuietProgress()
    console = Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else LineProgress()
