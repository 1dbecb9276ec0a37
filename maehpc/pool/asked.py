"""A question to Ray that may take a minute to be answered, or end in an error, where the cluster is just being lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Asked(Generic[Answer]):
    """Asks again and again in a thread of its own, so that nobody waits for the answer.

    Args:
        question: is asked.
        every_s: seconds between an answer and the next time it is asked.
    """

    def __init__(self, question: Callable[[], Answer], every_s: float) -> None:
        self._question = question
        self._every_s = every_s
        self._thread: threading.Thread | None = None
        self._answer: Answer | None = None
        self._next = time.monotonic()

    def newest(self) -> Answer | None:
        """The answer that came last; None before the first."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            self._next = time.monotonic() + self._every_s
        if self._thread is None and time.monotonic() >= self._next:
            self._thread = threading.Thread(target=self._ask, daemon=True)
            self._thread.start()
        return self._answer

    def anew(self, within_s: float) -> Answer | None:
        """The answer to the question asked now; the one before it where that takes longer."""
        deadline = time.monotonic() + within_s
        self._wait(deadline)  # one may be on its way that was asked before
        if self._thread is None or not self._thread.is_alive():
            self._thread, self._next = None, time.monotonic()
            self.newest()
            self._wait(deadline)
        return self._answer

    def _wait(self, deadline: float) -> None:
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _ask(self) -> None:
        self._answer = self._question()
