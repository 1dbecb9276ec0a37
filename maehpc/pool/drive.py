"""The driver's loop: what the crew reports goes to the schedule, what the schedule deals goes to the crew."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from maehpc.interruption import Stop
from maehpc.pool.schedule import Schedule, Shard
from maehpc.pool.watchdog import Watchdog


@dataclass(frozen=True)
class Joined:
    """A worker has come and can compute."""

    worker: str


@dataclass(frozen=True)
class Left:
    """A worker has gone, by whatever cause: what it held is not computed."""

    worker: str
    reason: str


@dataclass(frozen=True)
class Done:
    """A shard is recorded."""

    worker: str
    shard: Shard
    seconds: float


@dataclass(frozen=True)
class Failed:
    """A shard could not be computed; its worker goes on."""

    worker: str
    shard: Shard
    reason: str


@dataclass(frozen=True)
class Returned:
    """A worker gives a shard back unfinished, because it was asked to stop."""

    worker: str
    shard: Shard


Event = Joined | Left | Done | Failed | Returned


class Crew(Protocol):
    """Those who compute."""

    def hand(self, worker: str, shard: Shard) -> None:
        """Gives a worker a shard; it takes them up in the order given. Returns at once."""

    def events(self) -> list[Event]:
        """What has happened, in order. Waits for something to happen, but not long: an empty list is no sign.

        A worker's end is reported once, as `Left`; of what it held nothing is reported after that.

        Raises:
            RunError: there is no worker left and none will come.
        """

    @property
    def expected(self) -> int:
        """Workers that are not there yet and are about to come."""

    def seconds_left(self, worker: str) -> float | None:
        """Until a worker has to end; None where it may take as long as it likes."""

    def stop(self, reason: str) -> None:
        """Asks all workers to give back what they hold, as soon as they can."""

    def end(self, worker: str, reason: str) -> None:
        """Kills a worker, whose end is then reported with that reason. Returns at once."""


@dataclass(frozen=True)
class Ended:
    """How a pool ended.

    Attributes:
        quarantined: shards that were given up, each with its last reason.
        unfinished: shards that were not computed for want of time or because somebody wanted to stop.
        reason: why the pool was closed with work left; None where nothing was left.
    """

    quarantined: dict[Shard, str]
    unfinished: tuple[Shard, ...]
    reason: str | None


PATIENCE_S = 30.0
"""Seconds that workers have to give back what they hold once the end is asked for; then they are left, and end with
their cluster. What they compute is lost, and whatever they are writing is whole or not there."""
TIME_IS_SHORT = "the wall time left is less than a shard takes"


def drive(
    schedule: Schedule,
    crew: Crew,
    stop: Stop | None = None,
    watch: Callable[[Event], object] | None = None,
    watchdog: Watchdog | None = None,
) -> Ended:
    """Runs a schedule to its end.

    Args:
        schedule: what is to be computed.
        crew: who computes.
        stop: looked at between events; once it is requested nothing more is dealt.
        watch: told of every event after the schedule has taken it in.
        watchdog: judges who hangs; workers that do are killed, and what they held counts as after any death.

    Raises:
        RunError: there is no worker left and none will come.
    """
    stop, watchdog = stop or Stop(), watchdog or Watchdog()
    idle: dict[str, None] = {}
    asked_at: float | None = None
    while not schedule.over:
        touched: dict[str, None] = {}
        for event in crew.events():
            _take_in(schedule, event)
            if isinstance(event, Left):
                touched.pop(event.worker, None)
                idle.pop(event.worker, None)
                watchdog.gone(event.worker)
            else:
                touched[event.worker] = None
                watchdog.heard(event.worker)
            if watch is not None:
                watch(event)
        if stop.reason is not None and asked_at is None:
            asked_at = time.monotonic()
            schedule.close(stop.reason)
            crew.stop(stop.reason)
        if asked_at is not None and time.monotonic() - asked_at > PATIENCE_S:
            break
        schedule.expected = crew.expected
        # Those who hold something are asked again when it is done; those who hold nothing wait for what comes back.
        for worker in [*touched, *(idle if schedule.waiting else ())]:
            if not schedule.held(worker):
                watchdog.heard(worker)  # idleness is no silence
            while (shard := schedule.deal(worker, crew.seconds_left(worker))) is not None:
                crew.hand(worker, shard)
            if schedule.held(worker):
                idle.pop(worker, None)
            else:
                idle[worker] = None
        for worker, reason in watchdog.hung(schedule):
            crew.end(worker, reason)
        workers = schedule.workers
        if schedule.waiting and workers and len(idle) == len(workers) and not schedule.expected:
            schedule.close(TIME_IS_SHORT)  # all hands are empty, and nobody takes anything
    unfinished = tuple(schedule.unfinished())
    return Ended(dict(schedule.quarantined), unfinished, schedule.closed if unfinished else None)


def _take_in(schedule: Schedule, event: Event) -> None:
    match event:
        case Joined(worker):
            schedule.join(worker)
        case Left(worker, reason):
            schedule.leave(worker, reason)
        case Done(worker, shard, seconds):
            schedule.done(worker, shard, seconds)
        case Failed(worker, shard, reason):
            schedule.failed(worker, shard, reason)
        case Returned(worker, shard):
            schedule.returned(worker, shard)
