"""Being asked to stop: a wish that a signal handler notes and that work looks at between its steps."""

from __future__ import annotations


class Stop:
    """Whether somebody wants this process to save its work and end."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def request(self, reason: str) -> None:
        """Notes the wish; the first reason stands. Safe in a signal handler: it takes no lock."""
        if self._reason is None:
            self._reason = reason

    @property
    def reason(self) -> str | None:
        """Why to stop, or None where nobody wants it."""
        return self._reason
