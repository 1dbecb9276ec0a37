"""The explain stage in a pool: the shards of all data sets, of one experiment or of a sweep, over as many workers as
there are.

The driver owns the stores and decides; workers compute and record (`pool_worker.py`). Each prepares a data set when it
meets its first shard of it and keeps it, so that a model is loaded once a worker.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maehpc.errors import Interrupted, MaehpcError, RunError
from maehpc.experiment import Experiment
from maehpc.maps import MapStore
from maehpc.pool import Done, Ended, Event, Failed, Left, Returned, Schedule, Shard, Work, drive
from maehpc.pool.schedule import NONE_CAN_BE
from maehpc.progress import Bar
from maehpc.stages.context import Context
from maehpc.stages.explain import open_store, remaining, say_what_remains, told
from maehpc.stages.explanations import NAME, prepared
from maehpc.stages.fleet import Fleet
from maehpc.stages.joining import announced, brought
from maehpc.stages.pool_log import PoolLog
from maehpc.stages.pool_worker import Target, spec_of

if TYPE_CHECKING:
    from maehpc.pool.cluster import Head

MANY_FILES = 8192
_NAMED = 5
"""Shards that a sentence names."""

Records = dict[str, dict[str, Any]]
"""The stage's record for each data set."""


def explain_pooled(contexts: Sequence[Context], fleet: Fleet) -> list[Records]:
    """Explains all data sets of one or more experiments by several workers.

    Args:
        contexts: of the experiments; one rank alone, and but for experiment and recipe all alike.
        fleet: the workers.

    Returns:
        The records of each experiment.

    Raises:
        InputError: no classifier, wrong settings, or a store holds other results.
        RunError: shards were given up, the disk refused, or a newer attempt took over.
        Interrupted: somebody wanted to stop; shards that were not finished are computed again.
    """
    records: list[Records] = []
    _allow_many_files()
    with ExitStack() as until_end:
        targets: dict[str, Target] = {}
        stores: dict[str, MapStore] = {}
        work: dict[str, Work] = {}
        for context in contexts:
            records.append({})
            for dataset in context.recipe.datasets:
                # The driver needs shapes and digests alone; GPUs are the workers'.
                with prepared(replace(context, device=torch.device("cpu")), dataset) as ready:
                    name = ready.name
                    label = name if len(contexts) == 1 else f"{context.experiment.root.name}/{name}"
                    store = until_end.enter_context(open_store(context, ready))
                    missing = remaining(context, store, f"{NAME} {label}")
                    records[-1][dataset] = told(context, ready, len(missing))
                    cost = ready.cost
                del ready  # the pool may run for days, and its workers need the memory
                say_what_remains(context, store, f"{NAME} {label}", missing)
                if context.metrics is not None:
                    context.metrics.begin(label, context.experiment.root.name, name, store, missing)
                if missing:
                    assert store.owner is not None
                    stores[label], targets[label] = store, Target(context, dataset, store.owner.attempt)
                    shards = tuple(Shard(label, shard, len(store.images(shard))) for shard in missing)
                    work[label] = Work(shards, cost)
        if work:
            try:
                ended = _driven(targets, stores, Schedule(work), fleet)
            except MaehpcError:
                with suppress(MaehpcError):  # what went wrong first is what the user must hear
                    _tidy(stores)
                raise
            _tidy(stores)
            _raise_unless_whole(ended)
            _raise_if_undone(stores)
    return records


def _allow_many_files() -> None:
    """A sweep holds two locks an experiment, and the usual limit is a thousand files."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if most == resource.RLIM_INFINITY else min(most, MANY_FILES)
    if least != resource.RLIM_INFINITY and least < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _tidy(stores: Mapping[str, MapStore]) -> None:
    """Workers are gone now, and some may have been killed while they wrote."""
    for store in stores.values():
        store.tidy()


def _driven(targets: Mapping[str, Target], stores: Mapping[str, MapStore], schedule: Schedule, fleet: Fleet) -> Ended:
    from maehpc.pool.crew import ClusterLostError, RayCrew
    from maehpc.pool.dashboard import told as told_of_dashboard

    context = next(iter(targets.values())).context
    count = min(fleet.workers, schedule.left)
    if context.metrics is not None:
        context.metrics.pool(count, schedule)
    with ExitStack() as until_end:
        watch = _Watch(context, targets, stores, schedule, count)
        until_end.enter_context(watch.bars())
        # Ray prints a paragraph about each death on standard output, which is for results; the watch says it in words.
        until_end.enter_context(redirect_stdout(until_end.enter_context(Path(os.devnull).open("w"))))
        heads: list[Head] = []
        lost = until_end.enter_context(fleet.cluster(heads.append))
        experiments = list({target.context.experiment: None for target in targets.values()})
        tokens = [until_end.enter_context(announced(one, heads[0], context.device.type)) for one in experiments]
        if heads[0].dashboard is not None:
            context.progress.say(told_of_dashboard(heads[0].dashboard, fleet.host, tokens[0]))
        crew = RayCrew(
            spec_of(targets, fleet.threads),
            count,
            fleet.gpus,
            context.progress.warn,
            lost,
            fleet.seconds_left,
            lambda: schedule.left,
            lambda: brought(experiments),
        )
        try:
            ended = drive(schedule, crew, context.stop, watch.heard)
        except ClusterLostError as error:
            if context.stop.reason is None:
                raise
            raise Interrupted(NAME, context.stop.reason) from error  # both were told to end
    watch.over(ended)
    return ended


class _Watch:
    """Tells a person what the pool does: a bar a data set, and a sentence where something went wrong."""

    def __init__(
        self,
        context: Context,
        targets: Mapping[str, Target],
        stores: Mapping[str, MapStore],
        schedule: Schedule,
        workers: int,
    ) -> None:
        self._metrics = context.metrics
        self._progress = context.progress
        self._schedule = schedule
        self._stores = stores
        self._bars: dict[str, Bar] = {}
        owners: dict[Experiment, dict[str, int]] = {}
        for label, target in targets.items():
            owners.setdefault(target.context.experiment, {})[label] = target.attempt
        logs = {experiment: PoolLog(experiment.pool_log, workers, ours) for experiment, ours in owners.items()}
        self._logs = list(logs.values())
        self._log_of = {label: logs[target.context.experiment] for label, target in targets.items()}

    @contextmanager
    def bars(self) -> Iterator[None]:
        """Shows a bar a data set for the length of the block."""
        left: dict[str, int] = dict.fromkeys(self._stores, 0)
        for shard in self._schedule.unfinished():
            left[shard.store] += shard.images
        with ExitStack() as until_end:
            for label, store in self._stores.items():
                total = store.layout.images
                bar = self._progress.bar(f"{NAME} {label}", total, total - left[label])
                self._bars[label] = until_end.enter_context(bar)
            yield

    def heard(self, event: Event) -> None:
        """One event of the pool."""
        for log in [self._log_of[event.shard.store]] if isinstance(event, (Done, Failed, Returned)) else self._logs:
            log.heard(event)
        if self._metrics is not None:
            self._metrics.heard(event)
        match event:
            case Done(_, shard, _):
                self._bars[shard.store].advance(shard.images)
            case Failed(worker, shard, reason):
                self._progress.warn(f"{NAME} {shard.store}: shard {shard.number} failed in {worker} ({reason})")
                self._tell_failures()
            case Left(worker, reason):
                self._progress.warn(f"{NAME}: {worker} died ({reason})")
                self._tell_failures()
            case _:
                pass

    def over(self, ended: Ended) -> None:
        """The pool's end."""
        for log in self._logs:
            log.over(ended)

    def _tell_failures(self) -> None:
        for label, count in self._schedule.blamed.items():
            self._bars[label].advance(0, failures=count)


def _raise_if_undone(stores: Mapping[str, MapStore]) -> None:
    """A worker out of reach may have begun to write a shard again that another has recorded, and be gone now."""
    for label, store in stores.items():
        if undone := store.missing():
            raise RunError(
                f"{NAME} {label}: {len(undone)} shards that were recorded are not there any more, shard {undone[0]} "
                "first; the same command computes them"
            )


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
