"""What runs in a worker's process: a computer made once, and asked for shard after shard."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from maehpc.devices import is_out_of_memory
from maehpc.errors import Interrupted, MaehpcError
from maehpc.interruption import Stop
from maehpc.pool.schedule import Shard


@dataclass(frozen=True)
class Computed:
    """A shard that is computed and not yet on the disk.

    Attributes:
        write: writes and records it; runs beside the computing of the next one. Raises MaehpcError for what would
            befall any other shard too.
        warnings: sentences for the user.
    """

    write: Callable[[], object]
    warnings: tuple[str, ...] = ()


class Computer(Protocol):
    """Computes shards, one at a time. It is made in the worker's own process and keeps what it has loaded."""

    def compute(self, shard: Shard, stop: Stop, again: bool) -> Computed:
        """Computes one shard.

        Args:
            shard: which.
            stop: looked at on the way.
            again: whether it has failed before, here or elsewhere.

        Raises:
            MaehpcError: what would befall any other shard and worker too.
            Interrupted: the wish to stop was followed; nothing of the shard is recorded.
        """


class Turns:
    """Lets threads do one thing after the other, in an order that was settled before they began."""

    def __init__(self) -> None:
        self._next = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, number: int) -> Iterator[None]:
        """Waits until all lower numbers have had their turn; each from 0 on must be taken once."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == number)
        try:
            yield
        finally:
            with self._changed:
                self._next += 1
                self._changed.notify_all()


@dataclass(frozen=True)
class Spec:
    """How a worker gets its computer: `factory(**arguments)`.

    Attributes:
        factory: MODULE:FUNCTION, importable where the worker runs.
        arguments: JSON.
    """

    factory: str
    arguments: dict[str, Any]

    def make(self) -> Computer:
        """Imports the factory and calls it."""
        module, _, function = self.factory.partition(":")
        computer: Computer = getattr(importlib.import_module(module), function)(**self.arguments)
        return computer


@dataclass(frozen=True)
class Answer:
    """What became of a shard.

    Attributes:
        kind: done; returned (unfinished, as was asked for); failed (the shard's fault, as far as one can see);
            fatal (it would befall any other too).
        seconds: of work on it.
        words: why, where it is not done.
        warnings: sentences for the user.
    """

    kind: str
    seconds: float
    words: str = ""
    warnings: tuple[str, ...] = ()


def answer(computer: Computer, shard: Shard, stop: Stop, again: bool, turns: Turns, number: int) -> Answer:
    """Computes and writes a shard and tells how that went; whatever it raises is told, not raised.

    Args:
        computer: of this process.
        shard: to compute.
        stop: looked at on the way.
        again: whether the shard has failed before.
        turns: of this process: while a thread writes its shard, the next one computes.
        number: of the turn.
    """
    begun = time.perf_counter()

    def after(kind: str, words: str = "", warnings: tuple[str, ...] = ()) -> Answer:
        return Answer(kind, time.perf_counter() - begun, words, warnings)

    try:
        with turns.taken(number):
            begun = time.perf_counter()
            if stop.reason is not None:
                return after("returned", stop.reason)
            computed = computer.compute(shard, stop, again)
        computed.write()
        return after("done", warnings=computed.warnings)
    except Interrupted as error:
        return after("returned", error.reason)
    except MaehpcError as error:
        return after("fatal", str(error))
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return after("failed", f"out of memory ({words})" if is_out_of_memory(error) else words)
