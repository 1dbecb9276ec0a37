"""Explaining as Prometheus sees it, if asked: counts and times over HTTP for as long as a run lasts.

It hears what a pool's log hears (`pool_log.py`); where one process explains, that process is the only worker. Labels
are the experiment and the data set alone, so that a series never ends up one a shard, a worker or a host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import maehpc
from maehpc.errors import InputError
from maehpc.maps import MapStore
from maehpc.pool import Done, Event, Failed, Joined, Left, Schedule, Shard

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

LOOPBACK = "127.0.0.1"
_LABELS = ("experiment", "dataset")
_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600, 1800, 3600)
"""Of a shard's seconds: from a test's to a huge model's on a CPU."""


class ExplainMetrics:
    """Counters of one run, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

        self.registry: CollectorRegistry = CollectorRegistry()
        ours: dict[str, Any] = {"registry": self.registry}
        each: dict[str, Any] = {"labelnames": _LABELS, **ours}
        ProcessCollector(**ours)
        Info("maehpc_build", "What computes.", **ours).info({"version": maehpc.__version__})
        self._images = Gauge("maehpc_images", "Images to explain in all.", **each)
        self._images_done = Counter(
            "maehpc_images_done", "Images whose explanations are recorded, those of earlier runs included.", **each
        )
        self._shards = Gauge("maehpc_shards", "Shards of the store in all.", **each)
        self._shards_done = Counter(
            "maehpc_shards_done", "Shards that are recorded, those of earlier runs included.", **each
        )
        self._seconds = Histogram(
            "maehpc_shard_seconds", "Seconds of work on a shard of this run.", buckets=_BUCKETS_S, **each
        )
        self._failed = Counter(
            "maehpc_shards_failed", "Times that computing a shard failed or ended its worker.", **each
        )
        self._quarantined = Gauge(
            "maehpc_shards_quarantined", "Shards given up in this run after failing again and again.", **each
        )
        self._workers = Gauge("maehpc_workers", "Workers that are there.", **ours)
        self._wanted = Gauge("maehpc_workers_wanted", "Workers that there shall be.", **ours)
        self._deaths = Counter("maehpc_worker_deaths", "Workers that have died.", **ours)
        self._names: dict[str, tuple[str, str]] = {}
        self._blamed: dict[str, int] = {}
        self._schedule: Schedule | None = None

    def begin(self, label: str, experiment: str, dataset: str, store: MapStore, missing: list[int]) -> None:
        """A store is about to be filled, or found whole.

        Args:
            label: of its shards in the pool.
            experiment: its name.
            dataset: its name.
            store: of the data set.
            missing: its shards that are not recorded.
        """
        self._names[label] = names = experiment, dataset
        images, shards = store.layout.images, store.layout.shards
        self._images.labels(*names).set(images)
        self._images_done.labels(*names).inc(images - sum(len(store.images(shard)) for shard in missing))
        self._shards.labels(*names).set(shards)
        self._shards_done.labels(*names).inc(shards - len(missing))
        for untouched in (self._seconds, self._failed, self._quarantined):
            untouched.labels(*names)  # told as 0 from the first scrape on

    def pool(self, workers: int, schedule: Schedule | None = None) -> None:
        """Work begins.

        Args:
            workers: that there shall be.
            schedule: that knows which shards failed and which were given up; None where one process computes.
        """
        self._wanted.set(workers)
        self._workers.set(0 if schedule else 1)
        self._schedule = schedule

    def heard(self, event: Event) -> None:
        """One event, once the schedule has taken it in."""
        match event:
            case Joined(_):
                self._workers.inc()
            case Done(_, shard, seconds):
                self._done(shard, seconds)
            case Left(_, _):
                self._workers.dec()
                self._deaths.inc()
                self._blame()
            case Failed(_, _, _):
                self._blame()
            case _:
                pass

    def _done(self, shard: Shard, seconds: float) -> None:
        names = self._names[shard.store]
        self._images_done.labels(*names).inc(shard.images)
        self._shards_done.labels(*names).inc()
        self._seconds.labels(*names).observe(seconds)

    def _blame(self) -> None:
        if self._schedule is None:
            return
        given_up: Mapping[Shard, str] = self._schedule.quarantined
        for label, count in self._schedule.blamed.items():
            self._failed.labels(*self._names[label]).inc(count - self._blamed.get(label, 0))
            self._blamed[label] = count
            self._quarantined.labels(*self._names[label]).set(sum(shard.store == label for shard in given_up))


@contextmanager
def serving(port: int, address: str, tell: Callable[[str], object]) -> Iterator[ExplainMetrics]:
    """Metrics that Prometheus can scrape for the length of the block.

    Args:
        port: to listen on; 0 for any that is free.
        address: of this host, to listen on.
        tell: told the URL.

    Raises:
        InputError: the port is taken, or the address is none of this host's.
    """
    from prometheus_client import start_http_server

    metrics = ExplainMetrics()
    try:
        server, thread = start_http_server(port, address, metrics.registry)
    except OSError as error:
        raise InputError(
            f"--metrics-port {port}: {address}:{port} cannot be listened on ({error.strerror or error}); give another "
            f"port, or 0 for one that is free"
        ) from error
    try:
        shown = f"[{address}]" if ":" in address else address
        tell(f"metrics for Prometheus at http://{shown}:{server.server_port}/metrics")
        yield metrics
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
