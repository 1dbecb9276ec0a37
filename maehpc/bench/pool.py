"""What a pool makes of its time: the real schedule and driver, on simulated GPUs or on real workers that only wait."""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import maehpc
from maehpc.bench.figures import Part, Ratio, Report, figure
from maehpc.bench.simulated import Machines, SimulatedCrew
from maehpc.pool import Done, Ended, Event, Joined, Schedule, Shard, Work, drive
from maehpc.pool.watchdog import Watchdog
from maehpc.progress import Progress

COSTS = (1.0, 4.0, 0.5, 2.0)
"""How much an image of the stores costs, in turn, before all are scaled to the mean that was asked for: image sizes
and numbers of methods differ among data sets."""


@dataclass(frozen=True)
class Load:
    """What the simulated pool has to do.

    Attributes:
        images: in all stores together.
        stores: their number; the k-th has 1/k as many images as the first.
        shard_images: images a shard.
        seconds_per_image: mean over all images, on one worker.
    """

    images: int
    stores: int
    shard_images: int
    seconds_per_image: float

    def sizes(self) -> dict[str, int]:
        """Images by store; they sum to `images`."""
        weights = [1 / (place + 1) for place in range(self.stores)]
        sizes = [int(self.images * weight / sum(weights)) for weight in weights]
        sizes[0] += self.images - sum(sizes)
        return {f"store{place}": size for place, size in enumerate(sizes) if size}

    def seconds(self) -> dict[str, float]:
        """Seconds an image, by store."""
        sizes = self.sizes()
        costs = {store: COSTS[place % len(COSTS)] for place, store in enumerate(sizes)}
        mean = sum(costs[store] * size for store, size in sizes.items()) / self.images
        return {store: self.seconds_per_image * cost / mean for store, cost in costs.items()}

    def work(self) -> dict[str, Work]:
        """Its shards, of which the schedule knows the cost but not the time."""
        seconds = self.seconds()
        return {store: Work(self._shards(store, size), seconds[store]) for store, size in self.sizes().items()}

    def _shards(self, store: str, images: int) -> tuple[Shard, ...]:
        each = self.shard_images
        return tuple(Shard(store, place // each, min(each, images - place)) for place in range(0, images, each))


@dataclass(frozen=True)
class Simulated:
    """How one simulated run went.

    Attributes:
        makespan_s: simulated seconds from the start to the last shard.
        bound_s: seconds that no schedule could do without.
        driver_s: seconds that the real driver computed.
        driver_bytes: memory that schedule and driver took.
        shards: finished.
        failures: of hosts.
        ended: what was left undone.
    """

    makespan_s: float
    bound_s: float
    driver_s: float
    driver_bytes: int
    shards: int
    failures: int
    ended: Ended


LONG_SHARD_S = 5.0
"""What the cost of a shard is held against."""


def simulate(load: Load, machines: Machines, seed: int) -> Simulated:
    """Runs the schedule on simulated workers.

    The bound is the larger of the mean load of a worker that never fails, and the longest shard; no worker begins
    before it has started.
    """
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    work = load.work()
    crew = SimulatedCrew(machines, load.seconds(), seed)
    schedule = Schedule(work)
    begun = time.perf_counter()
    ended = drive(schedule, crew, watchdog=Watchdog(clock=lambda: crew.now))
    driver_s = time.perf_counter() - begun - crew.own_s
    taken = max(0, process.memory_info().rss - before)
    shards = [shard for part in work.values() for shard in part.shards]
    undone = {*ended.unfinished, *ended.quarantined}
    seconds = [crew.seconds_of(shard) for shard in shards if shard not in undone]
    bound = machines.start_s + max(sum(seconds) / machines.gpus, max(seconds, default=0.0))
    return Simulated(crew.now, bound, driver_s, taken, len(seconds), crew.failures, ended)


def run_simulated(progress: Progress, load: Load, machines: Machines, repeats: int, seed: int) -> Report:
    """Simulates several times, each with its own shard times and failures.

    Returns:
        A report whose `results` has `makespan_over_bound` (median), `makespan_over_bound_worst`,
        `driver_seconds_per_shard`, `driver_load` (part of the makespan that the driver computes) and `driver_bytes`.
    """
    found = []
    with progress.bar("simulating", repeats, images=0) as bar:
        for repeat in range(repeats):
            found.append(simulate(load, machines, seed + repeat))
            bar.advance()
    over = [one.makespan_s / one.bound_s for one in found]
    middle = figure("makespan over bound", "", over).median
    figures = (
        figure("makespan", "s", [one.makespan_s for one in found]),
        figure("lower bound", "s", [one.bound_s for one in found]),
        figure("hosts that failed", "", [one.failures for one in found]),
        figure("shards", "", [one.shards for one in found]),
        figure("shards given up", "", [len(one.ended.quarantined) for one in found]),
        figure("shards left for want of time", "", [len(one.ended.unfinished) for one in found]),
        figure("driver, computing", "s", [one.driver_s for one in found]),
        figure("driver, a shard", "us", [1e6 * one.driver_s / max(one.shards, 1) for one in found]),
        figure("driver, memory", "MB", [one.driver_bytes / 1e6 for one in found]),
    )
    results: dict[str, Any] = {
        "simulated": True,
        "load": asdict(load),
        "machines": asdict(machines),
        "seed": seed,
        "makespan_over_bound": middle,
        "makespan_over_bound_worst": max(over),
        "driver_seconds_per_shard": figures[-2].median / 1e6,
        "driver_load": figure("", "", [one.driver_s / one.makespan_s for one in found]).median,
        "driver_bytes": max(one.driver_bytes for one in found),
    }
    conditions = (
        f"{machines.gpus} GPUs, {load.images} images in {load.stores} stores, shards of {load.shard_images} images and "
        f"{load.shard_images * load.seconds_per_image:.2g} s in the mean"
    )
    ratio = Ratio("makespan over bound", middle, "1 is a pool that never waits, loses nothing and ends together")
    return Report("pool", _around(), (Part("simulated pool", conditions, figures, (ratio,)),), results)


def run_real(progress: Progress, workers: int, shards: int, seconds: float, repeats: int) -> Report:
    """Brings Ray up on this machine and deals shards of which each takes exactly so many seconds of waiting.

    Returns:
        A report whose `results` has `overhead_seconds_per_shard` (mean between the ends of two shards of one worker,
        less the shard's own time; median of the runs), `overhead_of_5s_shard` (the part of a shard of five seconds
        that this would be), `bring_up_s`, `first_worker_s` and `end_s`.
    """
    from maehpc.pool.cluster import cluster
    from maehpc.pool.crew import RayCrew
    from maehpc.pool.worker import Spec

    up, first, over, end = [], [], [], []
    with progress.bar("pool", repeats, images=0) as bar:
        for _ in range(repeats):
            begun = time.perf_counter()
            with cluster(workers) as lost:
                up.append(time.perf_counter() - begun)
                crew = RayCrew(Spec("maehpc.pool.pretend:computer", {"seconds": seconds}), workers, lost=lost)
                joined: list[float] = []
                done: dict[str, list[float]] = {}
                schedule = Schedule({"store": Work(tuple(Shard("store", number, 1) for number in range(shards)))})
                drive(schedule, crew, watch=partial(_clocked, joined, done))
                over_at = time.perf_counter()
                first.append(joined[0] - begun)
                gaps = [later - one for times in done.values() for one, later in pairwise(times)]
                over.append(statistics.fmean(gaps) - seconds)
            end.append(time.perf_counter() - over_at)
            bar.advance()
    figures = (
        figure("Ray comes up", "s", up),
        figure("first worker ready", "s", first),
        figure("overhead a shard", "s", over),
        figure("everything gone", "s", end),
    )
    overhead = figures[2].median
    results: dict[str, Any] = {
        "simulated": False,
        "workers": workers,
        "overhead_seconds_per_shard": overhead,
        "overhead_of_5s_shard": overhead / LONG_SHARD_S,
        "bring_up_s": figures[0].median,
        "first_worker_s": figures[1].median,
        "end_s": figures[3].median,
    }
    ratio = Ratio("overhead of a 5 s shard", overhead / LONG_SHARD_S, "what the pool takes of a shard's time")
    conditions = f"{workers} workers of this machine, {shards} shards that wait {seconds:g} s each"
    return Report("pool", _around(), (Part("pool", conditions, figures, (ratio,)),), results)


def _clocked(joined: list[float], done: dict[str, list[float]], event: Event) -> None:
    if isinstance(event, Joined):
        joined.append(time.perf_counter())
    if isinstance(event, Done):
        done.setdefault(event.worker, []).append(time.perf_counter())


def _around() -> dict[str, Any]:
    return {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_average": list(os.getloadavg()),
        "maehpc": maehpc.__version__,
    }
