"""The explain stage: a classifier and a split to maps and scores in a store, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from maehpc import files
from maehpc.errors import Interrupted
from maehpc.maps import MapStore
from maehpc.ownership import Owner, own
from maehpc.pool import Done, Shard
from maehpc.progress import human_bytes
from maehpc.stages.context import Context
from maehpc.stages.explanations import Prepared, prepared


def explain(context: Context, dataset: str) -> dict[str, Any]:
    """Explains one data set's split; shards that stand whole are not computed again. Each rank takes some of them.

    Returns:
        `dataset`, `images`, `shards`, `computed` (shards of this run) and `store` (its path).

    Raises:
        InputError: no classifier, wrong settings, or the store holds other results.
        RunError: the disk refused, or a newer attempt took over.
        Interrupted: somebody wanted to stop; a shard that was not finished is computed again.
    """
    world = context.world
    with prepared(context, dataset) as ready, open_store(context, ready) as store:
        missing = remaining(context, store, ready.label)
        say_what_remains(context, store, ready.label, missing)
        if context.metrics is not None:
            context.metrics.begin(ready.name, context.experiment.root.name, ready.name, store, missing)
            context.metrics.pool(1)
        ours = missing[world.rank :: world.size]
        whole = sum(len(store.images(shard)) for shard in missing)
        world.together(lambda: write_shards(context, store, ours, whole, ready), context.stop)
        return told(context, ready, len(missing))


def remaining(context: Context, store: MapStore, label: str) -> list[int]:
    """The shards to compute; every rank is told all of them.

    A store that is whole by its records and by the presence and sizes of its files is done: to read every byte of it is
    `maehpc verify`'s work, and every reader compares digests. Where something is left to compute, something may have
    crashed: the rest is then read whole first, by all ranks.

    Raises:
        Interrupted: somebody wanted to stop while it was read.
    """
    world = context.world
    absent = world.from_leader(store.missing)
    there = sorted(set(range(store.layout.shards)).difference(absent)) if absent else []
    if not there:
        return absent
    ours = there[world.rank :: world.size]
    with context.progress.bar(f"{label}: reading what is there", len(ours), images=0) as bar:

        def watch(shard: int) -> None:
            if context.stop.reason is not None:
                raise Interrupted(label, context.stop.reason)
            bar.advance()

        damaged = world.together(lambda: store.damaged(ours, watch), context.stop)
    return sorted({*absent, *chain.from_iterable(damaged)})


def say_what_remains(context: Context, store: MapStore, label: str, missing: list[int]) -> None:
    """Tells what is about to be written; a file system that cannot take it is better known of now."""
    layout = store.layout
    if not missing:
        context.progress.say(f"{label}: already done")
        return
    images, size = sum(len(store.images(shard)) for shard in missing), sum(map(layout.values_bytes, missing))
    written = len(missing) * (len(layout.shard_files(0)) + 1)  # and the record
    context.progress.say(
        f"{label}: {images} images in {len(missing)} shards, {written} files, about {human_bytes(size)}"
    )


def told(context: Context, ready: Prepared, computed: int) -> dict[str, Any]:
    """The stage's record of one data set."""
    return {
        "dataset": ready.name,
        "images": ready.layout.images,
        "shards": ready.layout.shards,
        "computed": computed,
        "store": str(context.experiment.maps(ready.name)),
    }


def write_shards(context: Context, store: MapStore, shards: list[int], whole: int, ready: Prepared) -> None:
    """Computes and records shards, one after the other.

    Args:
        context: of the run.
        store: that they belong to.
        shards: of this rank.
        whole: images that all ranks have to explain.
        ready: what explains them.

    Raises:
        RunError: the disk refused, or a newer attempt took over.
        Interrupted: somebody wanted to stop, between two batches.
    """
    own = sum(len(store.images(shard)) for shard in shards)
    total, done = store.layout.images, 0
    with context.progress.bar(ready.label, total, total - whole) as bar:

        def advance(images: int) -> None:
            """Ranks come forward together: a part of this one's images stands for that part of all ranks'."""
            nonlocal done
            done += images
            bar.advance(done * whole // own - (done - images) * whole // own)

        for shard in shards:
            begun = time.perf_counter()
            images = store.images(shard)
            store.write_shard(shard, ready.compute(images, context.stop, advance, context.progress.warn))
            if context.metrics is not None:
                unit, seconds = Shard(ready.name, shard, len(images)), time.perf_counter() - begun
                context.metrics.heard(Done("this process", unit, seconds))


@contextmanager
def open_store(context: Context, ready: Prepared) -> Iterator[MapStore]:
    """Owns the data set's store and begins or reopens it; rank 0 does, and all may write shards."""
    path, ledger = context.experiment.maps(ready.name), context.experiment.ledger(ready.name)
    with ExitStack() as until_end:
        ours: list[MapStore] = []

        def begin() -> int:
            files.require_writable(ledger)
            owner = until_end.enter_context(own(ledger, context.identity))
            ours.append(MapStore.create(path, ledger, ready.layout, ready.inputs, owner))
            return owner.attempt

        attempt = context.world.from_leader(begin)
        yield context.world.alike(lambda: ours[0] if ours else MapStore.open(path, ledger, Owner(ledger, attempt)))
