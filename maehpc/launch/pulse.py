"""Signs of life of an attempt: its heartbeat on the disk, and the watch for what must end it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from maehpc.errors import RunError
from maehpc.launch.record import Heartbeat, JobFolder
from maehpc.progress import Bar, LineProgress

BEAT_S = 1.0
"""Seconds between two heartbeats."""
RATE_WINDOW_S = 20.0
"""Seconds over which images a second are averaged."""


class Pulse:
    """What is known of an attempt's progress; a thread puts it on the disk.

    Args:
        job: whose heartbeat it is.
        attempt: number of the attempt.
    """

    def __init__(self, job: JobFolder, attempt: int) -> None:
        self._job = job
        self._attempt = attempt
        self._lock = threading.Lock()
        self._beat = Heartbeat(sequence=0, phase="starting")
        self._started = time.monotonic()
        self._marks: list[tuple[float, int]] = []
        self._images = 1

    def begin(self, phase: str, dataset: str | None, total: int, done: int, unit: str, images: int) -> None:
        """A piece of work begins: `total` units of `images` images each (0: they are none), `done` finished earlier."""
        with self._lock:
            self._images = images
            self._marks = [(time.monotonic(), done)]
            self._beat = Heartbeat(
                sequence=self._beat.sequence + 1,
                phase=phase,
                dataset=dataset,
                done=done,
                total=total,
                unit=unit,
                first_step_s=self._beat.first_step_s,
            )

    def advance(self, count: int, loss: float | None) -> None:
        """`count` more units are finished."""
        now = time.monotonic()
        with self._lock:
            done = (self._beat.done or 0) + count
            self._marks.append((now, done))
            while len(self._marks) > 2 and now - self._marks[1][0] > RATE_WINDOW_S:
                self._marks.pop(0)
            since, before = self._marks[0]
            rate = (done - before) / (now - since) if now > since else None
            left = (self._beat.total or done) - done
            self._beat = self._beat.model_copy(
                update={
                    "sequence": self._beat.sequence + 1,
                    "done": done,
                    "images_per_second": rate * self._images if rate and self._images else None,
                    "seconds_left": left / rate if rate else None,
                    "loss": self._beat.loss if loss is None else loss,
                    "first_step_s": self._beat.first_step_s or now - self._started,
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
            self._job.beat(self._attempt, beat)


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


class _JobBar:
    def __init__(self, line: Bar, pulse: Pulse) -> None:
        self._line = line
        self._pulse = pulse

    def advance(self, count: int = 1, **values: float) -> None:
        self._line.advance(count, **values)
        self._pulse.advance(count, values.get("loss"))


class JobProgress(LineProgress):
    """Lines in the rank's log, and the heartbeat.

    Args:
        pulse: of the attempt.
        quiet: only warn; what all ranks would say alike, rank 0 says.
    """

    def __init__(self, pulse: Pulse, quiet: bool = False) -> None:
        super().__init__(quiet)
        self._pulse = pulse

    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> AbstractContextManager[Bar]:
        """A bar told in lines and heartbeats; its description is the stage and the data set."""
        return self._bar(description, total, done, images)

    @contextmanager
    def _bar(self, description: str, total: int, done: int, images: int) -> Iterator[Bar]:
        stage, _, dataset = description.partition(" ")
        self._pulse.begin(stage, dataset or None, total, done, "image" if stage == "explain" else "step", images)
        with super().bar(description, total, done, images) as line:
            yield _JobBar(line, self._pulse)
