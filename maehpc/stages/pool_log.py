"""What a pool did, event by event: a line of JSON each in `pool.jsonl` of the experiment, for whoever wants to look.

    {"event": "begun", "workers": 4, "stores": {"digits": 3}}        3: the attempt that owns the store
    {"event": "joined", "worker": "worker1", "elapsed_s": 5.1}
    {"event": "done", "worker": "worker1", "store": "digits", "shard": 0, "images": 32, "seconds": 4.9, …}
    {"event": "failed" | "returned", "worker": …, "store": …, "shard": …, "images": …, …}
    {"event": "left", "worker": "worker1", "reason": "…", "elapsed_s": 12.7}
    {"event": "over", "reason": null, "unfinished": 0, "quarantined": 0, "elapsed_s": 60.2}

Runs follow one another. No decision rests on this file: one that is lost, cut off or cannot be written costs nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maehpc.pool import Done, Ended, Event, Failed, Joined, Left, Returned, Shard


class PoolLog:
    """Appends to the file.

    Args:
        path: the file.
        workers: that are wanted.
        stores: attempt that owns each.
    """

    def __init__(self, path: Path, workers: int, stores: Mapping[str, int]) -> None:
        self._path = path
        self._begun = time.monotonic()
        self._write({"event": "begun", "workers": workers, "stores": dict(stores)})

    def heard(self, event: Event) -> None:
        """One event of the pool."""
        match event:
            case Joined(worker):
                self._tell("joined", worker)
            case Left(worker, reason):
                self._tell("left", worker, reason=reason)
            case Done(worker, shard, seconds):
                self._tell("done", worker, shard, seconds=round(seconds, 4))
            case Failed(worker, shard, reason):
                self._tell("failed", worker, shard, reason=reason)
            case Returned(worker, shard):
                self._tell("returned", worker, shard)

    def over(self, ended: Ended) -> None:
        """The pool's end."""
        counts = {"unfinished": len(ended.unfinished), "quarantined": len(ended.quarantined)}
        self._write({"event": "over", "reason": ended.reason, **counts, "elapsed_s": self._elapsed_s()})

    def _tell(self, event: str, worker: str, shard: Shard | None = None, **facts: Any) -> None:
        where = {} if shard is None else {"store": shard.store, "shard": shard.number, "images": shard.images}
        self._write({"event": event, "worker": worker, **where, **facts, "elapsed_s": self._elapsed_s()})

    def _elapsed_s(self) -> float:
        return round(time.monotonic() - self._begun, 3)

    def _write(self, facts: Mapping[str, Any]) -> None:
        with suppress(OSError), self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(facts) + "\n")
