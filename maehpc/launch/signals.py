"""The signals by which a scheduler, or a person, asks a process to end."""

from __future__ import annotations

import signal

from maehpc.interruption import Stop


def take_signals(stop: Stop) -> None:
    """Lets the signals of a scheduler ask for the end; without this SIGTERM would lose the last steps."""
    reasons: dict[int, str] = {
        signal.SIGUSR1: "SIGUSR1",
        signal.SIGUSR2: "SIGUSR2 (the wall time is near)",
        signal.SIGTERM: "SIGTERM (preempted or cancelled)",
    }

    def ask(number: int, _frame: object) -> None:
        stop.request(reasons[number])

    for number in reasons:
        signal.signal(number, ask)
