"""What a person sees while a stage works: bars on a terminal, lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from maehpc.progress import Bar, LineProgress, Silent, in_words, rate_in_words
from maehpc.progress import Progress as Reporter


class _Rate(ProgressColumn):
    """Images a second over the last moments; nothing where units are no images."""

    def render(self, task: Task) -> Text:
        return Text(rate_in_words((task.speed or 0.0) * task.fields["images"], 1.0))


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._values: dict[str, float] = {}

    def advance(self, count: int = 1, **values: float) -> None:
        self._values |= values
        self._progress.update(self._task, advance=count, note=in_words(self._values))


class TerminalProgress:
    """Bars with the time left, on stderr."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> Iterator[Bar]:
        """A live bar; below others where they are there already."""
        if self._live is not None:
            yield self._added(self._live, description, total, done, images)
            return
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            _Rate(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as self._live:
            try:
                yield self._added(self._live, description, total, done, images)
            finally:
                self._live = None

    def _added(self, live: Progress, description: str, total: int, done: int, images: int) -> Bar:
        return _RichBar(live, live.add_task(description, total=total, completed=done, note="", images=images))

    def say(self, sentence: str) -> None:
        """A plain line."""
        self._console.print(sentence, highlight=False, markup=False)

    def warn(self, sentence: str) -> None:
        """A line that stands out."""
        self._console.print(f"warning: {sentence}", style="yellow", highlight=False, markup=False)


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
