"""Signs of life of work: its heartbeat on the disk, and the watch for what must end it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from maehpc.errors import RunError
from maehpc.launch.record import Heartbeat
from maehpc.progress import Bar, Progress

BEAT_S = 1.0
"""Seconds between two heartbeats."""
RATE_WINDOW_S = 20.0
"""Seconds over which images a second are averaged."""


class _Rate:
    """Units a second over the last moments."""

    def __init__(self, now: float, done: int) -> None:
        self._marks = deque([(now, done)])

    def at(self, now: float, done: int) -> float | None:
        """The rate now that so many units are finished; None where it cannot be told yet."""
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] > RATE_WINDOW_S:
            self._marks.popleft()
        since, before = self._marks[0]
        return (done - before) / (now - since) if now > since else None


class Pulse:
    """What is known of how far work is; a thread puts it on the disk.

    Args:
        keep: puts a heartbeat on the disk.
    """

    def __init__(self, keep: Callable[[Heartbeat], object]) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._beat = Heartbeat(sequence=0, phase="starting")
        self._started = time.monotonic()
        self._rate = _Rate(self._started, 0)
        self._images = 1
        self._open: dict[str, tuple[int, int]] = {}
        self._rates: dict[str, _Rate] = {}
        self._failures: dict[str, int] = {}

    def begin(self, phase: str, dataset: str, total: int, done: int, unit: str, images: int) -> None:
        """A piece of work begins: `total` units of `images` images each (0: they are none), `done` finished earlier.

        Where another has begun and not ended, both are told together.
        """
        with self._lock:
            self._images = images
            self._open[dataset] = (done, total)
            self._failures.pop(dataset, None)
            together, now = self._together(), time.monotonic()
            self._rate, self._rates[dataset] = _Rate(now, together["done"]), _Rate(now, done)
            self._beat = Heartbeat(
                sequence=self._beat.sequence + 1,
                phase=phase,
                unit=unit,
                first_step_s=self._beat.first_step_s,
                **together,
            )

    def end(self, dataset: str) -> None:
        """A piece of work has ended; what was told of it last stands until another begins."""
        with self._lock:
            self._open.pop(dataset, None)

    def _together(self) -> dict[str, Any]:
        parts = self._open
        return {
            "dataset": ", ".join(filter(None, parts)) or None,
            "parts": dict(parts) if len(parts) > 1 else {},
            "done": sum(done for done, _ in parts.values()),
            "total": sum(total for _, total in parts.values()),
            "failures": {name: count for name, count in self._failures.items() if name in parts},
        }

    def _part_rates(self, now: float) -> dict[str, float]:
        if len(self._open) < 2 or not self._images:
            return {}
        found = {name: self._rates[name].at(now, done) for name, (done, _) in self._open.items()}
        return {name: rate * self._images for name, rate in found.items() if rate}

    def advance(self, count: int, loss: float | None, dataset: str, failures: int | None = None) -> None:
        """`count` more units of a piece of work are finished, and so many of its pieces have failed so far."""
        now = time.monotonic()
        with self._lock:
            before, total = self._open[dataset]
            self._open[dataset] = (before + count, total)
            if failures is not None:
                self._failures[dataset] = failures
            together = self._together()
            rate = self._rate.at(now, together["done"])
            left = together["total"] - together["done"]
            self._beat = self._beat.model_copy(
                update={
                    "sequence": self._beat.sequence + 1,
                    **together,
                    "rates": self._part_rates(now),
                    "images_per_second": rate * self._images if rate and self._images else None,
                    "seconds_left": left / rate if rate else None,
                    "loss": self._beat.loss if loss is None else loss,
                    # Told before the first unit: a failure.
                    "first_step_s": self._beat.first_step_s or (now - self._started if count else None),
                }
            )

    def phase(self, phase: str) -> None:
        """The attempt is at something that has no bar."""
        with self._lock:
            self._beat = self._beat.model_copy(update={"sequence": self._beat.sequence + 1, "phase": phase})

    def write(self) -> None:
        """Puts the heartbeat on the disk; one that cannot be written is left out, for it must not end the work."""
        with self._lock:
            beat = self._beat
        with suppress(RunError):
            self._keep(beat)


@contextmanager
def watched(interval_s: float, look: Callable[[], object]) -> Iterator[None]:
    """Calls `look` every `interval_s` seconds in a thread for the length of the block."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(interval_s):
            look()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _PulsingBar:
    def __init__(self, shown: Bar, pulse: Pulse, dataset: str) -> None:
        self._shown = shown
        self._pulse = pulse
        self._dataset = dataset

    def advance(self, count: int = 1, **values: float) -> None:
        self._shown.advance(count, **values)
        failures = values.get("failures")
        self._pulse.advance(count, values.get("loss"), self._dataset, None if failures is None else int(failures))


class PulsingProgress:
    """What is shown here, and the heartbeat.

    Args:
        shown: where a person sees it.
        pulse: of the work.
    """

    def __init__(self, shown: Progress, pulse: Pulse) -> None:
        self._shown = shown
        self._pulse = pulse
        self.say, self.warn = shown.say, shown.warn

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> Iterator[Bar]:
        """A bar told in heartbeats, too; its description is the stage and the data set."""
        stage, _, dataset = description.partition(" ")
        self._pulse.begin(stage, dataset, total, done, "image" if stage == "explain" else "step", images)
        try:
            with self._shown.bar(description, total, done, images) as shown:
                yield _PulsingBar(shown, self._pulse, dataset)
        finally:
            self._pulse.end(dataset)
