"""Workers as Ray actors: one process each, which makes its computer once and keeps it.

Ray brings processes to hosts and tells when one has died. What is dealt, retried or given up is our own schedule's
business: Ray retries nothing, restarts nothing, and carries no arrays.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from maehpc.errors import RunError
from maehpc.interruption import Stop
from maehpc.pool.drive import Done, Event, Failed, Joined, Left, Returned
from maehpc.pool.schedule import AHEAD, Shard
from maehpc.pool.worker import Answer, Spec, Turns, answer

LOOK_S = 0.5
"""Seconds that `events` waits at most."""
UNREACHABLE_S = 5.0
"""Seconds in which the end of a cluster's head is noticed here."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DETAIL = "Worker exit detail:"
_LONGEST = 300
ALONE_S = 300.0
"""Seconds without any worker after which none is expected any more: Ray waits for ever for a host that is gone."""
LATE_S = 120.0
"""Seconds after the first worker's coming in which all others are expected."""
COUNT_S = 2.0
"""Seconds between two looks at whether others have brought workers."""
STILLBORN = 3
"""Workers in a row that may die before they are ready; then no other is tried."""


class ClusterLostError(RunError):
    """The cluster is gone; what it has recorded stands, and another may go on."""


class Actor:
    """The actor's class; it is made in the worker's process."""

    def __init__(self, spec: Spec) -> None:
        self._computer = spec.make()
        self._stop = Stop()
        self._turns = Turns()

    def ready(self) -> int:
        """The worker's process id, once it can compute."""
        return os.getpid()

    def compute(self, shard: Shard, number: int, again: bool) -> Answer:
        """One shard, the worker's `number`-th from 0; the next may be computed while this one is written."""
        return answer(self._computer, shard, self._stop, again, self._turns, number)

    def stop(self, reason: str) -> None:
        """Asks for the end of what is being computed; runs beside `compute`."""
        self._stop.request(reason)


@dataclass
class _Member:
    handle: Any
    born: Any
    calls: dict[Any, Shard] = field(default_factory=dict)
    pid: int | None = None
    handed: int = 0
    ended: str | None = None


class RayCrew:
    """Workers on a Ray cluster that this process is connected to.

    Args:
        spec: of each worker's computer.
        workers: how many there shall be at first.
        gpus: of each; 0 where the CPU computes.
        warn: told each worker's warnings.
        seconds_left: until the hosts have to be given back; None while nobody knows of an end.
        lost: why the cluster is gone, None while it is there. Ray itself takes a minute to say so, and says it by
            ending this process.
        left: shards that are not done; more workers than that are not wanted.
        brought: for how many more workers others have made room. It is not Ray that is asked: what it does not answer
            because its head is lost ends this process a minute later.
    """

    def __init__(
        self,
        spec: Spec,
        workers: int,
        gpus: int = 0,
        warn: Callable[[str], None] = lambda sentence: None,
        lost: Callable[[], str | None] = lambda: None,
        seconds_left: Callable[[], float | None] = lambda: None,
        left: Callable[[], int] = lambda: 0,
        brought: Callable[[], int] = lambda: 0,
    ) -> None:
        import ray

        self._ray: Any = ray
        self._spec = spec
        self._warn = warn
        self._cluster_lost = lost
        self._seconds_left = seconds_left
        self._left = left
        self._brought = brought
        self._most_brought = 0
        self._looked_at = time.monotonic()
        self._births: list[tuple[float, Any]] = []
        self._kind = self._ray.remote(
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=AHEAD,
            concurrency_groups={"control": 1},
        )(Actor)
        self._members: dict[str, _Member] = {}
        self._refs: dict[Any, str] = {}
        self._failed: set[Shard] = set()
        self._named = 0
        self._bore_at = time.monotonic()
        self._stillborn = 0
        self._last_death = ""
        self._stopped = False
        self._seen = time.monotonic()
        self._late_at: float | None = None
        for _ in range(workers):
            self._bear()

    @property
    def processes(self) -> dict[str, int]:
        """Process id of each worker that is ready."""
        return {name: member.pid for name, member in self._members.items() if member.pid}

    def hand(self, worker: str, shard: Shard) -> None:
        """Gives a worker a shard."""
        member = self._members[worker]
        ref = member.handle.compute.remote(shard, member.handed, shard in self._failed)
        member.handed += 1
        member.calls[ref] = shard
        self._refs[ref] = worker

    @property
    def expected(self) -> int:
        """Workers that are on their way; those that have not come for long are waited for no more."""
        if time.monotonic() - self._bore_at > LATE_S:
            return 0
        return sum(member.pid is None for member in self._members.values()) + len(self._births)

    def seconds_left(self, worker: str) -> float | None:
        """Of all alike: the hosts are given back together."""
        return self._seconds_left()

    def stop(self, reason: str) -> None:
        """Asks all workers to give back what they hold."""
        self._stopped = True
        for member in self._members.values():
            member.handle.stop.options(concurrency_group="control").remote(reason)

    def end(self, worker: str, reason: str) -> None:
        """Kills a worker; another takes its place."""
        member = self._members[worker]
        member.ended = reason
        self._ray.kill(member.handle)

    def events(self) -> list[Event]:
        """What has happened since the last call.

        Raises:
            RunError: no worker is left and none will come, or one met what would befall all.
            ClusterLostError: the cluster is gone.
        """
        why = self._cluster_lost()
        if why is not None:
            raise ClusterLostError(why)
        for birth in [birth for birth in self._births if birth[0] <= time.monotonic()]:
            self._births.remove(birth)
            if birth[1] is not None:  # out of reach, and maybe alive: it must neither go on nor keep its GPU
                self._ray.kill(birth[1])
            self._bear()
        self._welcome()
        self._tell_of_late_ones()
        if any(member.pid for member in self._members.values()):
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > ALONE_S:
            raise ClusterLostError(f"no worker was there for {ALONE_S:.0f} s")
        if not self._refs:
            if not self._members and not self._births:
                raise RunError(f"no worker is left and none will come: {self._last_death}")
            time.sleep(LOOK_S)
            return []
        ready, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=LOOK_S)
        if ready:  # and whatever else has come meanwhile, so that a thousand workers cost one question
            ready, _ = self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        found: list[Event] = []
        for ref in ready:
            worker = self._refs.pop(ref, None)
            if worker is not None:
                found += self._heard(worker, ref)
        return found

    def _welcome(self) -> None:
        """More workers where others have brought room for more."""
        if self._stopped or time.monotonic() - self._looked_at < COUNT_S:
            return
        self._looked_at = time.monotonic()
        brought = self._brought()
        if brought > self._most_brought:
            self._stillborn = 0  # of other places
            for _ in range(min(brought - self._most_brought, self._left())):
                self._bear()
            self._most_brought = brought

    def _tell_of_late_ones(self) -> None:
        if self._late_at is None or time.monotonic() < self._late_at:
            return
        self._late_at = math.inf
        missing = sum(member.pid is None for member in self._members.values())
        if missing:
            self._warn(f"{missing} of {len(self._members)} workers have not come up; the others go on")

    def _heard(self, worker: str, ref: Any) -> list[Event]:
        member = self._members[worker]
        try:
            word = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._lost(worker, error)
        if ref == member.born:
            member.pid = word
            self._stillborn = 0
            if self._late_at is None:
                self._late_at = time.monotonic() + LATE_S
            return [Joined(worker)]
        shard = member.calls.pop(ref)
        for sentence in word.warnings:
            self._warn(sentence)
        if word.kind == "fatal":
            raise RunError(word.words)
        if word.kind == "done":
            return [Done(worker, shard, word.seconds)]
        if word.kind == "returned":
            return [Returned(worker, shard)]
        self._failed.add(shard)
        return [Failed(worker, shard, word.words)]

    def _lost(self, worker: str, error: Exception) -> list[Event]:
        member = self._members.pop(worker)
        for ref in member.calls:
            self._refs.pop(ref, None)
        # Ray tells that it cannot reach a worker before it knows why. Where the head is gone it would not give us
        # another for a minute, and then end this process; in some seconds we know better.
        unreachable = not isinstance(error, self._ray.exceptions.ActorDiedError)
        ready = member.pid is not None
        self._last_death = why = member.ended or _reason(error)
        if not ready:
            self._stillborn += 1
            if self._stillborn >= STILLBORN and not self._members:
                raise RunError(f"no worker comes up: {why}")
        if not self._stopped and self._stillborn < STILLBORN:
            now = time.monotonic()
            self._births.append((now + UNREACHABLE_S, member.handle) if unreachable else (now, None))
        return [Left(worker, why)] if ready else []

    def _bear(self) -> None:
        self._named += 1
        self._bore_at = time.monotonic()
        handle = self._kind.remote(self._spec)
        member = _Member(handle, handle.ready.remote())
        name = f"worker{self._named}"
        self._members[name] = member
        self._refs[member.born] = name


def _reason(error: Exception) -> str:
    """Ray's words for a death, in one short line."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    if "creation task" in lines[0]:
        return lines[-1]  # the end of the worker's own traceback
    words = " ".join(lines)
    words = words[words.index(_DETAIL) + len(_DETAIL) :] if _DETAIL in words else words
    return words.split(" Some common causes", 1)[0].strip()[:_LONGEST]
