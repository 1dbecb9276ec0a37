"""The explain stage in a pool: all data sets' shards at once, over as many workers as there are.

The driver owns the stores and decides; workers compute and record. Each prepares a data set when it meets its first
shard of it and keeps it, so that a model is loaded once a worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maehpc.data import dataset_name
from maehpc.devices import choose_device
from maehpc.errors import InputError, Interrupted, MaehpcError, RunError
from maehpc.experiment import Experiment
from maehpc.explain.explainer import passes_that_fit
from maehpc.interruption import Stop
from maehpc.maps import MapStore, codec
from maehpc.ownership import Owner
from maehpc.pool import Done, Ended, Event, Failed, Left, Schedule, Shard, Work, drive
from maehpc.pool.schedule import NONE_CAN_BE
from maehpc.pool.worker import Spec
from maehpc.progress import Bar, Silent
from maehpc.recipes import Recipe
from maehpc.stages.context import Context
from maehpc.stages.explain import open_store, told
from maehpc.stages.explanations import NAME, Prepared, prepared
from maehpc.stages.pool_log import PoolLog

KEPT = 2
"""Data sets whose model and images a worker keeps: the schedule leaves one for another and seldom comes back."""
_NAMED = 5
"""Shards that a sentence names."""


Lost = Callable[[], str | None]
"""Why a cluster is gone; None while it is there."""


@dataclass(frozen=True)
class Fleet:
    """Where a pool's workers are.

    Attributes:
        workers: how many there are at most.
        threads: CPU threads of each.
        gpus: of each; 0 or 1.
        cluster: begins a cluster of Ray on which they all fit, for the length of a block.
        seconds_left: until it has to be given back; None while nobody knows of an end.
    """

    workers: int
    threads: int
    gpus: int
    cluster: Callable[[], AbstractContextManager[Lost]]
    seconds_left: Callable[[], float | None] = lambda: None


def local_fleet(device: torch.device, workers: int) -> Fleet:
    """Workers of this machine, each on a GPU or a part of the cores.

    Raises:
        InputError: more workers than GPUs.
    """
    from maehpc.pool.cluster import cluster

    gpus = gpus_each(device, workers)
    threads = threads_each(torch.get_num_threads(), workers)
    return Fleet(workers, threads, gpus, lambda: cluster(workers, gpus * workers))


def threads_each(cpus: int, workers: int) -> int:
    """CPU threads of each of a host's workers: each thread computes a pass of its own, and all share its memory.

    Args:
        cpus: of the host.
        workers: on it.
    """
    return max(1, min(cpus, passes_that_fit()) // workers)


def explain_pooled(context: Context, fleet: Fleet) -> dict[str, dict[str, Any]]:
    """Explains all data sets of the recipe by several workers.

    Args:
        context: of the run; one rank alone.
        fleet: the workers.

    Returns:
        The stage's record for each data set.

    Raises:
        InputError: no classifier, wrong settings, or a store holds other results.
        RunError: shards were given up, the disk refused, or a newer attempt took over.
        Interrupted: somebody wanted to stop; shards that were not finished are computed again.
    """
    recipe = context.recipe
    with ExitStack() as until_end:
        stores: dict[str, MapStore] = {}
        records: dict[str, dict[str, Any]] = {}
        work: dict[str, Work] = {}
        owners: dict[str, int] = {}
        for dataset in recipe.datasets:
            # The driver needs shapes and digests alone; GPUs are the workers'.
            with prepared(replace(context, device=torch.device("cpu")), dataset) as ready:
                store = until_end.enter_context(open_store(context, ready))
                missing = store.missing(deep=True)
                records[dataset] = told(context, ready, len(missing))
                name = ready.name
            if not missing:
                context.progress.say(f"{NAME} {name}: already done")
                continue
            assert store.owner is not None
            stores[name], owners[name] = store, store.owner.attempt
            work[name] = Work(tuple(Shard(name, shard, len(store.images(shard))) for shard in missing))
        del ready  # the pool may run for days, and its workers need the memory
        if not work:
            return records
        spec = Spec("maehpc.stages.pooled:computer", _arguments(context, owners, fleet.threads))
        log = PoolLog(context.experiment.pool_log, fleet.workers, owners)
        watch = _Watch(context, stores, work, until_end, log)
        try:
            ended = _driven(context, spec, Schedule(work), watch, fleet)
        except MaehpcError:
            with suppress(MaehpcError):  # what went wrong first is what the user must hear
                _tidy(stores)
            raise
        log.over(ended)
        _tidy(stores)
        _raise_unless_whole(ended)
        return records


def _tidy(stores: Mapping[str, MapStore]) -> None:
    """Workers are gone now, and some may have been killed while they wrote."""
    for store in stores.values():
        store.tidy()


def gpus_each(device: torch.device, workers: int) -> int:
    """GPUs that each worker takes.

    Raises:
        InputError: there are fewer than workers.
    """
    if device.type != "cuda":
        return 0
    seen = torch.cuda.device_count()
    if workers > seen:
        raise InputError(f"--workers {workers}: each takes a GPU, and PyTorch sees {seen}; ask for {seen} or fewer")
    return 1


def _arguments(context: Context, owners: dict[str, int], threads: int) -> dict[str, Any]:
    return {
        "experiment": str(context.experiment.root),
        "recipe": context.recipe.model_dump(mode="json"),
        "packs": str(context.packs),
        "device": context.device.type,
        "threads": threads,
        "owners": owners,
    }


def _driven(context: Context, spec: Spec, schedule: Schedule, watch: _Watch, fleet: Fleet) -> Ended:
    from maehpc.pool.crew import ClusterLostError, RayCrew

    count = min(fleet.workers, schedule.left)
    # Ray prints a paragraph about each death on standard output, which is for results; the watch says it in a sentence.
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), fleet.cluster() as lost:
        crew = RayCrew(spec, count, fleet.gpus, context.progress.warn, lost, fleet.seconds_left)
        try:
            return drive(schedule, crew, context.stop, watch.heard)
        except ClusterLostError as error:
            if context.stop.reason is None:
                raise
            raise Interrupted(NAME, context.stop.reason) from error  # both were told to end


class _Watch:
    """Tells a person what the pool does: a bar a data set, and a sentence where something went wrong."""

    def __init__(
        self,
        context: Context,
        stores: dict[str, MapStore],
        work: dict[str, Work],
        until_end: ExitStack,
        log: PoolLog,
    ) -> None:
        self._log = log
        self._progress = context.progress
        self._bars: dict[str, Bar] = {}
        for name, store in stores.items():
            total, left = store.layout.images, sum(shard.images for shard in work[name].shards)
            bar = self._progress.bar(f"{NAME} {name}", total, total - left)
            self._bars[name] = until_end.enter_context(bar)

    def heard(self, event: Event) -> None:
        """One event of the pool."""
        self._log.heard(event)
        match event:
            case Done(_, shard, _):
                self._bars[shard.store].advance(shard.images)
            case Failed(worker, shard, reason):
                self._progress.warn(f"{NAME} {shard.store}: shard {shard.number} failed in {worker} ({reason})")
            case Left(worker, reason):
                self._progress.warn(f"{NAME}: {worker} died ({reason})")
            case _:
                pass


def _raise_unless_whole(ended: Ended) -> None:
    if ended.reason not in (None, NONE_CAN_BE):
        raise Interrupted(NAME, ended.reason)  # what was given up is tried again when the work goes on
    if ended.quarantined:
        named = [f"shard {one.number} of {one.store} ({why})" for one, why in sorted(ended.quarantined.items())]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        raise RunError(
            f"{len(named)} of the shards failed, or ended their worker, each time they were tried and were given up: "
            f"{', '.join(named[:_NAMED])}{more}; what else was computed is saved, and the same command goes on"
        )


@dataclass
class Explaining:
    """A worker's computer: keeps what it has prepared, for the data sets that it met last.

    Attributes:
        context: of this worker, which is told to nobody.
        threads: CPU threads.
        owners: attempt that owns each store.
    """

    context: Context
    threads: int
    owners: dict[str, int]

    def __post_init__(self) -> None:
        self._datasets = {dataset_name(dataset): dataset for dataset in self.context.recipe.datasets}
        self._kept: dict[str, tuple[Prepared, MapStore, ExitStack]] = {}

    def compute(self, shard: Shard, stop: Stop, again: bool) -> list[str]:
        """Computes and records one shard; see `maehpc.pool.worker.Computer`.

        A worker that finds no memory gives the shard back, for another may have what the same bytes need; only a shard
        that comes again is computed in shorter passes.
        """
        torch.set_num_threads(self.threads)  # of this thread: OpenMP keeps the number thread by thread
        ready, store = self._ready(shard.store)
        ready.explainer.shortens = again
        warnings: list[str] = []
        arrays = ready.compute(store.images(shard.number), stop, lambda images: None, warnings.append)
        store.write_shard(shard.number, arrays)
        return warnings

    def _ready(self, name: str) -> tuple[Prepared, MapStore]:
        if name not in self._kept:
            while len(self._kept) >= KEPT:
                self._forget(next(iter(self._kept)))
            with ExitStack() as until_forgotten:
                ready = until_forgotten.enter_context(prepared(self.context, self._datasets[name]))
                ledger = self.context.experiment.ledger(name)
                store = MapStore.open(self.context.experiment.maps(name), ledger, Owner(ledger, self.owners[name]))
                self._kept[name] = ready, store, until_forgotten.pop_all()
        self._kept[name] = self._kept.pop(name)  # the one used last stands at the end
        ready, store, _ = self._kept[name]
        return ready, store

    def _forget(self, name: str) -> None:
        self._kept.pop(name)[2].close()
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()


def computer(
    experiment: str, recipe: dict[str, Any], packs: str, device: Any, threads: int, owners: dict[str, int]
) -> Explaining:
    """Makes a worker's computer; the arguments are JSON.

    Args:
        experiment: its folder.
        recipe: the whole one.
        packs: folder of packed data sets.
        device: cpu or cuda; Ray shows a worker its own GPU alone.
        threads: CPU threads.
        owners: attempt that owns each store.
    """
    torch.set_num_threads(threads)
    codec.wake()
    context = Context(
        Experiment(Path(experiment)), Recipe.model_validate(recipe), choose_device(device), Path(packs), Silent()
    )
    return Explaining(context, threads, owners)
