"""What runs in a worker's process: a computer made once, and asked for shard after shard."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any, Protocol

from maehpc.devices import is_out_of_memory
from maehpc.errors import Interrupted, MaehpcError
from maehpc.interruption import Stop
from maehpc.pool.schedule import Shard


class Computer(Protocol):
    """Computes and records shards. It is made in the worker's own process and keeps what it has loaded."""

    def compute(self, shard: Shard, stop: Stop, again: bool) -> list[str]:
        """Computes and records one shard.

        Args:
            shard: which.
            stop: looked at on the way.
            again: whether it has failed before, here or elsewhere.

        Returns:
            Warnings, each a sentence.

        Raises:
            MaehpcError: what would befall any other shard and worker too.
            Interrupted: the wish to stop was followed; nothing of the shard is recorded.
        """


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


def answer(computer: Computer, shard: Shard, stop: Stop, again: bool = False) -> Answer:
    """Computes a shard and tells how that went; whatever it raises is told, not raised."""
    begun = time.perf_counter()

    def after(kind: str, words: str = "", warnings: tuple[str, ...] = ()) -> Answer:
        return Answer(kind, time.perf_counter() - begun, words, warnings)

    if stop.reason is not None:
        return after("returned", stop.reason)
    try:
        return after("done", warnings=tuple(computer.compute(shard, stop, again)))
    except Interrupted as error:
        return after("returned", error.reason)
    except MaehpcError as error:
        return after("fatal", str(error))
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return after("failed", f"out of memory ({words})" if is_out_of_memory(error) else words)
