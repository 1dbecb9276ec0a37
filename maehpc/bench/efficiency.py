"""Whether several workers of one machine explain as many times faster as there are of them, written stores included."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maehpc import files
from maehpc.bench.case import Case, make_subject
from maehpc.bench.figures import Part, Ratio, figure
from maehpc.bench.maps import layout_of
from maehpc.devices import settle
from maehpc.explain import Explainer
from maehpc.interruption import Stop
from maehpc.maps import MapStore
from maehpc.ownership import Owner, own
from maehpc.pool import Done, Event, Joined, Schedule, Shard, Work, drive
from maehpc.pool.worker import Computed, Spec
from maehpc.progress import Progress
from maehpc.stages.explanations import stored_arrays

METHODS = ("saliency", "gradcam", "deeplift")


@dataclass(frozen=True)
class Load:
    """What is explained, by ViT-tiny at 224 pixels with ten perturbations an image.

    Attributes:
        shards: a worker.
        shard_images: images a shard.
        image_size: pixels.
        samples: perturbations an image.
    """

    shards: int = 10
    shard_images: int = 2
    image_size: int = 224
    samples: int = 10


def efficiency_part(
    progress: Progress, folder: Path, workers: int, load: Load, repeats: int
) -> tuple[Part, dict[str, Any]]:
    """One worker and several, in turns, each worker with one CPU thread.

    Args:
        progress: where to tell how far it is.
        folder: for stores, which are removed.
        workers: several.
        load: of a run.
        repeats: rounds.

    Returns:
        A part, and `efficiency`: images a second of all workers over so many times those of one (medians of the
        rounds), from each worker's first shard to its last; and `efficiency_with_ends`, in which the pool's time counts
        from the first worker's being ready to the last shard.
    """
    alone, together, whole = [], [], []
    files.make_folder(folder)
    with progress.bar("workers", 2 * repeats, images=0) as bar:
        for _ in range(repeats):
            alone.append(_run(folder, 1, load)[0])
            bar.advance()
            rate, with_ends = _run(folder, workers, load)
            together.append(rate)
            whole.append(with_ends)
            bar.advance()
    one, all_of_them = figure("one worker", "images/s", alone), figure(f"{workers} workers", "images/s", together)
    ends = figure(f"{workers} workers, from ready to done", "images/s", whole)
    efficiency = all_of_them.median / (workers * one.median)
    results = {
        "efficiency": efficiency,
        "efficiency_with_ends": ends.median / (workers * one.median),
        "images_per_second": all_of_them.median,
        "efficiency_load": asdict(load),
        "efficiency_workers": workers,
    }
    conditions = (
        f"ViT-tiny at {load.image_size} pixels, {', '.join(METHODS)}, {load.samples} perturbations an image, one CPU "
        f"thread a worker, {load.shards} shards of {load.shard_images} images each"
    )
    ratio = Ratio("efficiency", efficiency, f"1 is {workers} times as fast as one worker")
    return Part("efficiency", conditions, (one, all_of_them, ends), (ratio,)), results


def _run(folder: Path, workers: int, load: Load) -> tuple[float, float]:
    """Images a second: the sum of the workers' own rates, and of the pool as a whole."""
    from maehpc.pool.cluster import cluster
    from maehpc.pool.crew import RayCrew

    images = workers * load.shards * load.shard_images
    shards = tuple(Shard("store", number, load.shard_images) for number in range(workers * load.shards))
    joined: list[float] = []
    done: dict[str, list[float]] = {}
    with TemporaryDirectory(prefix=".pool-", dir=folder) as scratch:
        root = Path(scratch)
        ledger = root / "ledger"
        with own(ledger) as owner:
            layout = layout_of(_Explaining(load, None).arrays(), images, load.shard_images)
            MapStore.create(root / "maps", ledger, layout, {}, owner)
            arguments = {"root": str(root), "attempt": owner.attempt, "load": asdict(load)}
            with cluster(workers) as lost:
                crew = RayCrew(Spec(f"{__name__}:computer", arguments), workers, lost=lost)
                drive(Schedule({"store": Work(shards)}), crew, watch=partial(_clocked, joined, done))
    rates = [(len(times) - 1) * load.shard_images / (times[-1] - times[0]) for times in done.values() if len(times) > 1]
    return sum(rates), images / (max(times[-1] for times in done.values()) - joined[0])


def _clocked(joined: list[float], done: dict[str, list[float]], event: Event) -> None:
    if isinstance(event, Joined):
        joined.append(time.perf_counter())
    if isinstance(event, Done):
        done.setdefault(event.worker, []).append(time.perf_counter())


def _case(load: Load) -> Case:
    return Case(image_size=load.image_size, samples=load.samples, images=load.shard_images)


class _Explaining:
    """A worker's computer: the same images again and again, by a model of random weights."""

    def __init__(self, load: Load, store: MapStore | None) -> None:
        settle(torch.device("cpu"))
        torch.set_num_threads(1)
        self._subject = make_subject(_case(load))
        self._explainer: Explainer = self._subject.explainer(METHODS)
        self._store = store

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Of one shard."""
        labels = torch.zeros(len(self._subject.indices), dtype=torch.int64)
        explained = self._explainer.explain(self._subject.pixels, self._subject.indices, labels)
        tensors: Mapping[str, torch.Tensor] = stored_arrays(explained, labels)
        return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}

    def compute(self, shard: Shard, stop: Stop, again: bool) -> Computed:
        """One shard."""
        assert self._store is not None
        torch.set_num_threads(1)
        return Computed(partial(self._store.write_shard, shard.number, self.arrays()))


def computer(root: str, attempt: int, load: dict[str, int]) -> _Explaining:
    """A worker's computer."""
    ledger = Path(root) / "ledger"
    return _Explaining(Load(**load), MapStore.open(Path(root) / "maps", ledger, Owner(ledger, attempt)))
