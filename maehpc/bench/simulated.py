"""A crew that computes nothing: hosts of GPUs on a clock of their own, which fail and come back."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from maehpc.errors import RunError
from maehpc.pool import Done, Event, Joined, Left, Returned, Shard


@dataclass(frozen=True)
class Machines:
    """What is simulated.

    Attributes:
        gpus: workers, one a GPU.
        gpus_per_host: those that fail together.
        start_s: seconds from a host's start to its workers' first shard (interpreter, CUDA, model).
        sigma: of the logarithm of a shard's seconds; 0 makes all alike.
        mtbf_h: mean hours between two failures of one host; None for hosts that never fail.
        repair_s: seconds until a failed host starts anew.
        wall_time_s: seconds until all have to end; None where they never have to.
    """

    gpus: int
    gpus_per_host: int = 8
    start_s: float = 20.0
    sigma: float = 0.25
    mtbf_h: float | None = None
    repair_s: float = 300.0
    wall_time_s: float | None = None


_Kind = Literal["start", "finish", "fail"]


class SimulatedCrew:
    """Workers on a simulated clock.

    Shard times are log-normal about what the shard's images are given; the draw belongs to the shard, not to the
    order of events, so that two schedules meet the same work.

    Args:
        machines: what there is.
        seconds_per_image: mean, by store.
        seed: of shard times and failures.
    """

    def __init__(self, machines: Machines, seconds_per_image: dict[str, float], seed: int) -> None:
        self.now = 0.0
        self.failures = 0
        self.own_s = 0.0
        self._machines = machines
        self._mean = seconds_per_image
        self._seed = seed
        self._stores = {store: place for place, store in enumerate(seconds_per_image)}
        self._failing = np.random.default_rng([seed, 1])
        self._order = itertools.count()
        self._due: list[tuple[float, int, _Kind, str | int]] = []
        self._queues: dict[str, deque[Shard]] = {}
        self._begun: dict[str, float] = {}
        self._starts: dict[int, int] = {}
        self._returned: list[Event] = []
        for host in range(-(-machines.gpus // machines.gpus_per_host)):
            self._later(machines.start_s, "start", host)

    def seconds_of(self, shard: Shard) -> float:
        """How long a shard takes, whoever computes it."""
        sigma = self._machines.sigma
        mean = shard.images * self._mean[shard.store]
        if not sigma:
            return mean
        draw = np.random.default_rng([self._seed, 2, self._stores[shard.store], shard.number]).standard_normal()
        return mean * float(np.exp(sigma * draw - sigma**2 / 2))

    def hand(self, worker: str, shard: Shard) -> None:
        """Gives a worker a shard."""
        begun = time.perf_counter()
        queue = self._queues[worker]
        queue.append(shard)
        if len(queue) == 1:
            self._begin(worker)
        self.own_s += time.perf_counter() - begun

    def events(self) -> list[Event]:
        """What happens next on the simulated clock."""
        begun = time.perf_counter()
        found, self._returned = self._returned, []
        while not found:
            if not self._due:
                raise RunError("no worker is left and none will come")
            self.now, _, kind, whom = heapq.heappop(self._due)
            if kind == "start":
                found = self._start(int(whom))
            elif kind == "fail":
                found = self._fail(int(whom))
            else:
                found = self._finish(str(whom))
        self.own_s += time.perf_counter() - begun
        return found

    @property
    def expected(self) -> int:
        """None: simulated workers do not fail shards, which is all that it matters to."""
        return 0

    def end(self, worker: str, reason: str) -> None:
        """Nobody hangs here."""
        raise AssertionError(reason)

    def seconds_left(self, worker: str) -> float | None:
        """Until the wall time is over."""
        limit = self._machines.wall_time_s
        return None if limit is None else limit - self.now

    def stop(self, reason: str) -> None:
        """Everything that is held comes back."""
        for worker, queue in self._queues.items():
            self._returned += [Returned(worker, shard) for shard in queue]
            queue.clear()
            self._begun.pop(worker, None)

    def _later(self, seconds: float, kind: _Kind, whom: str | int) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), kind, whom))

    def _workers(self, host: int) -> list[str]:
        each = self._machines.gpus_per_host
        count = min(each, self._machines.gpus - host * each)
        return [f"host{host}.{self._starts[host]}/gpu{gpu}" for gpu in range(count)]

    def _start(self, host: int) -> list[Event]:
        self._starts[host] = self._starts.get(host, 0) + 1
        if self._machines.mtbf_h is not None:
            self._later(float(self._failing.exponential(self._machines.mtbf_h * 3600)), "fail", host)
        workers = self._workers(host)
        self._queues |= {worker: deque() for worker in workers}
        return [Joined(worker) for worker in workers]

    def _fail(self, host: int) -> list[Event]:
        self.failures += 1
        self._later(self._machines.repair_s + self._machines.start_s, "start", host)
        gone = self._workers(host)
        for worker in gone:
            del self._queues[worker]
            self._begun.pop(worker, None)
        return [Left(worker, f"host{host} failed") for worker in gone]

    def _begin(self, worker: str) -> None:
        self._begun[worker] = self.now
        self._later(self.seconds_of(self._queues[worker][0]), "finish", worker)

    def _finish(self, worker: str) -> list[Event]:
        if worker not in self._begun:  # it failed, or gave everything back
            return []
        shard = self._queues[worker].popleft()
        seconds = self.now - self._begun.pop(worker)
        if self._queues[worker]:
            self._begin(worker)
        return [Done(worker, shard, seconds)]
