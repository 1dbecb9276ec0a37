"""What a pool's worker computes with: the models and images of the data sets that it met last."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maehpc.data import dataset_name
from maehpc.devices import choose_device
from maehpc.experiment import Experiment
from maehpc.interruption import Stop
from maehpc.maps import MapStore
from maehpc.ownership import Owner
from maehpc.pool import Shard
from maehpc.pool.worker import Computed, Spec
from maehpc.progress import Silent
from maehpc.recipes import Recipe
from maehpc.stages.context import Context
from maehpc.stages.explanations import NAME, Prepared, prepared

KEPT = 2
"""Data sets whose model and images a worker keeps: the schedule leaves one for another and seldom comes back."""


@dataclass(frozen=True)
class Target:
    """A store that a pool fills.

    Attributes:
        context: of its experiment.
        dataset: as the recipe names it.
        attempt: that owns the store.
    """

    context: Context
    dataset: str
    attempt: int


def spec_of(targets: Mapping[str, Target], threads: int) -> Spec:
    """How a worker gets its computer.

    Args:
        targets: by the store's label in the pool.
        threads: CPU threads of a worker.
    """
    contexts = {_root(target): target.context for target in targets.values()}
    first = next(iter(contexts.values()))
    arguments = {
        "recipes": {root: context.recipe.model_dump(mode="json") for root, context in contexts.items()},
        "stores": {label: [_root(target), target.dataset, target.attempt] for label, target in targets.items()},
        "packs": str(first.packs.absolute()),
        "device": first.device.type,
        "threads": threads,
    }
    return Spec(f"{__name__}:computer", arguments)


def _root(target: Target) -> str:
    """The experiment's folder, also for workers that were begun elsewhere."""
    return str(target.context.experiment.root.absolute())


def computer(
    recipes: dict[str, dict[str, Any]],
    stores: dict[str, tuple[str, str, int]],
    packs: str,
    device: Any,
    threads: int,
) -> Explaining:
    """Makes a worker's computer; the arguments are JSON.

    Args:
        recipes: the whole one of each experiment, by its folder.
        stores: folder of the experiment, data set and owner's attempt, by the store's label.
        packs: folder of packed data sets.
        device: cpu or cuda; Ray shows a worker its own GPU alone.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    chosen = choose_device(device)
    contexts = {
        root: Context(Experiment(Path(root)), Recipe.model_validate(recipe), chosen, Path(packs), Silent())
        for root, recipe in recipes.items()
    }
    targets = {label: Target(contexts[root], dataset, attempt) for label, (root, dataset, attempt) in stores.items()}
    return Explaining(targets, threads)


@dataclass
class Explaining:
    """A worker's computer.

    Attributes:
        targets: by the store's label.
        threads: CPU threads.
    """

    targets: dict[str, Target]
    threads: int

    def __post_init__(self) -> None:
        self._kept: dict[str, tuple[Prepared, MapStore, ExitStack]] = {}

    def compute(self, shard: Shard, stop: Stop, again: bool) -> Computed:
        """Computes one shard; see `maehpc.pool.worker.Computer`.

        A worker that finds no memory gives the shard back, for another may have what the same bytes need. Passes are
        shortened for a shard that comes again, and from then on wherever they must be.
        """
        torch.set_num_threads(self.threads)  # of this thread: OpenMP keeps the number thread by thread
        ready, store = self._ready(shard.store)
        ready.explainer.shortens |= again
        warnings: list[str] = []
        arrays = ready.compute(store.images(shard.number), stop, lambda images: None, warnings.append)
        return Computed(partial(store.write_shard, shard.number, arrays), tuple(warnings))

    def _ready(self, label: str) -> tuple[Prepared, MapStore]:
        if label not in self._kept:
            while len(self._kept) >= KEPT:
                self._forget(next(iter(self._kept)))
            target = self.targets[label]
            name = dataset_name(target.dataset)
            with ExitStack() as until_forgotten:
                ready = until_forgotten.enter_context(prepared(target.context, target.dataset))
                ready = replace(ready, label=f"{NAME} {label}")
                ready.explainer.shortens = False
                ledger = target.context.experiment.ledger(name)
                store = MapStore.open(target.context.experiment.maps(name), ledger, Owner(ledger, target.attempt))
                self._kept[label] = ready, store, until_forgotten.pop_all()
        self._kept[label] = self._kept.pop(label)  # the one used last stands at the end
        ready, store, _ = self._kept[label]
        return ready, store

    def _forget(self, label: str) -> None:
        device = self.targets[label].context.device
        self._kept.pop(label)[2].close()
        if device.type == "cuda":
            torch.cuda.empty_cache()
