"""The explain stage: a classifier and a split to maps and scores in a store, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maehpc import files
from maehpc.errors import Interrupted
from maehpc.maps import MapStore
from maehpc.ownership import own
from maehpc.pool import Done, Shard
from maehpc.progress import human_bytes
from maehpc.stages.context import Context
from maehpc.stages.explanations import Prepared, prepared

RECORDS = 3
"""Files of a store's ledger that are no shard's: store.json, the lock and the newest attempt's claim."""


def explain(context: Context, dataset: str) -> dict[str, Any]:
    """Explains one data set's split in this process; shards that stand whole are not computed again.

    Returns:
        `dataset`, `images`, `shards`, `computed` (shards of this run) and `store` (its path).

    Raises:
        InputError: no classifier, wrong settings, or the store holds other results.
        RunError: the disk refused, or a newer attempt took over.
        Interrupted: somebody wanted to stop; a shard that was not finished is computed again.
    """
    assert context.world.size == 1, "several processes explain as a pool"
    with prepared(context, dataset) as ready, open_store(context, ready) as store:
        missing = remaining(context, store, ready.label)
        say_what_remains(context, store, ready.label, missing)
        if context.metrics is not None:
            context.metrics.begin(ready.name, context.experiment.root.name, ready.name, store, missing)
            context.metrics.pool(1)
        write_shards(context, store, missing, ready)
        return told(context, ready, len(missing))


def remaining(context: Context, store: MapStore, label: str) -> list[int]:
    """The shards to compute.

    A store that is whole by its records and by the presence and sizes of its files is done: to read every byte of it is
    `maehpc verify`'s work, and every reader compares digests. Where something is left to compute, something may have
    crashed: the rest is then read whole first.

    Raises:
        Interrupted: somebody wanted to stop while it was read.
    """
    absent = store.missing()
    there = sorted(set(range(store.layout.shards)).difference(absent)) if absent else []
    if not there:
        return absent
    with context.progress.bar(f"{label}: reading what is there", len(there), images=0) as bar:

        def watch(shard: int) -> None:
            if context.stop.reason is not None:
                raise Interrupted(label, context.stop.reason)
            bar.advance()

        return sorted({*absent, *store.damaged(there, watch)})


def say_what_remains(context: Context, store: MapStore, label: str, missing: list[int]) -> None:
    """Tells what is about to be written; a file system that cannot take it is better known of now."""
    layout = store.layout
    if not missing:
        context.progress.say(f"{label}: already done")
        return
    images, size = sum(len(store.images(shard)) for shard in missing), sum(map(layout.values_bytes, missing))
    written = len(missing) * (len(layout.shard_files(0)) + 1)  # and the record
    context.progress.say(
        f"{label}: {images} images in {len(missing)} shards, {written} files "
        f"beside the store's own {len(layout.fixed_files) + RECORDS}, about {human_bytes(size)}"
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


def write_shards(context: Context, store: MapStore, shards: list[int], ready: Prepared) -> None:
    """Computes and records shards, one after the other.

    Args:
        context: of the run.
        store: that they belong to.
        shards: all that the store lacks.
        ready: what explains them.

    Raises:
        RunError: the disk refused, or a newer attempt took over.
        Interrupted: somebody wanted to stop, between two batches.
    """
    total = store.layout.images
    with context.progress.bar(ready.label, total, total - sum(len(store.images(shard)) for shard in shards)) as bar:
        for shard in shards:
            begun = time.perf_counter()
            images = store.images(shard)
            store.write_shard(shard, ready.compute(images, context.stop, bar.advance, context.progress.warn))
            if context.metrics is not None:
                unit, seconds = Shard(ready.name, shard, len(images)), time.perf_counter() - begun
                context.metrics.heard(Done("this process", unit, seconds))


@contextmanager
def open_store(context: Context, ready: Prepared) -> Iterator[MapStore]:
    """Owns the data set's store and begins or reopens it."""
    path, ledger = context.experiment.maps(ready.name), context.experiment.ledger(ready.name)
    files.require_writable(ledger)
    with own(ledger, context.identity) as owner:
        yield MapStore.create(path, ledger, ready.layout, ready.inputs, owner)
