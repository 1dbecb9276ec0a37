"""How long work tells that it is alive: an interface that every stage reports to, and a silent one.

The command line gives a terminal's progress bars; a stage knows only this interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Tells that `count` more units are done; `note` says how it goes (a loss, say)."""


class Progress(Protocol):
    """Where a stage reports to."""

    def bar(self, description: str, total: int, done: int = 0) -> AbstractContextManager[Bar]:
        """A bar of `total` units, `done` of which were finished earlier."""

    def say(self, sentence: str) -> None:
        """Tells what happened."""

    def warn(self, sentence: str) -> None:
        """Tells what went wrong and was mended."""


class _SilentBar:
    def advance(self, count: int = 1, note: str = "") -> None:
        return None


class Silent:
    """Reports nothing."""

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar that shows nothing."""
        yield _SilentBar()

    def say(self, sentence: str) -> None:
        """Says nothing."""

    def warn(self, sentence: str) -> None:
        """Says nothing."""
