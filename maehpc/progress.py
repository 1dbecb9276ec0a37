"""How work tells that it is alive: an interface that every stage reports to, a silent one, and one for logs.

The command line gives a terminal's progress bars; a stage knows only the interface.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

LINE_EVERY = 10.0
"""Seconds between two lines about the same bar where there is no terminal."""


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, count: int = 1, **values: float) -> None:
        """Tells that `count` more units are done.

        Args:
            count: units.
            values: how it goes, by name (`loss`, say); what was told earlier stands until it is told anew.
        """


class Progress(Protocol):
    """Where a stage reports to."""

    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> AbstractContextManager[Bar]:
        """A bar of `total` units.

        Args:
            description: what is worked on.
            total: units in all.
            done: of them, those that were finished earlier.
            images: images a unit, so that a rate in images a second can be told; 0 where units are none.
        """

    def say(self, sentence: str) -> None:
        """Tells what happened."""

    def warn(self, sentence: str) -> None:
        """Tells what went wrong and was mended."""


class _SilentBar:
    def advance(self, count: int = 1, **values: float) -> None:
        return None


class Silent:
    """Reports nothing."""

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> Iterator[Bar]:
        """A bar that shows nothing."""
        yield _SilentBar()

    def say(self, sentence: str) -> None:
        """Says nothing."""

    def warn(self, sentence: str) -> None:
        """Says nothing."""


def in_words(values: Mapping[str, float]) -> str:
    """Numbers with their names: `loss 0.4100`, `failures 2`."""
    return ", ".join(
        f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4f}" for name, value in values.items()
    )


def rate_in_words(images: float, seconds: float) -> str:
    """Images a second; empty where there is nothing to tell."""
    if images <= 0 or seconds <= 0:
        return ""
    rate = images / seconds
    return f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


def human_bytes(size: int | None) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    if size is None:
        return "?"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


class _LineBar:
    """A bar in lines. A pool may begin with a data set hours after its bar was made: units are timed from the first."""

    def __init__(self, description: str, total: int, done: int, images: int) -> None:
        self._description, self._total, self._done, self._first = description, total, done, done
        self._images = images
        self._made = self._start = self._told = time.monotonic()
        self._told_done = done
        self._began = False
        self._values: dict[str, float] = {}

    def advance(self, count: int = 1, **values: float) -> None:
        self._done += count
        self._values |= values
        now = time.monotonic()
        if count and not self._began:
            self._began = True
            if now - self._made >= LINE_EVERY:
                self._start, self._first, self._told_done = now, self._done, self._done
        if now - self._told < LINE_EVERY and self._done < self._total:
            return
        # Since the last line; at the end of all, since what was done a moment ago says little.
        since, then = (self._told_done, self._told) if self._done < self._total else (self._first, self._start)
        rate = rate_in_words((self._done - since) * self._images, now - then)
        self._told, self._told_done = now, self._done
        words = [f"{self._description}: {self._done}/{self._total}", f"{now - self._made:.0f} s"]
        if self._first < self._done < self._total:
            left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
            words.append(f"about {left:.0f} s left")
        words += [rate, in_words(self._values)]
        print(", ".join(word for word in words if word), file=sys.stderr, flush=True)


class LineProgress:
    """A line now and then, on stderr; for logs.

    Args:
        quiet: only warn.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> AbstractContextManager[Bar]:
        """A bar told in lines."""
        return nullcontext(_SilentBar() if self._quiet else _LineBar(description, total, done, images))

    def say(self, sentence: str) -> None:
        """A plain line."""
        if not self._quiet:
            print(sentence, file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """A line that says so."""
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
