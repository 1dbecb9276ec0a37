"""Computers that go wrong, for real workers; each notes the shards it was given, and in another file those it wrote."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maehpc.errors import Interrupted, RunError
from maehpc.interruption import Stop
from maehpc.pool import Shard
from maehpc.pool.worker import Computed


@dataclass(frozen=True)
class Troubled:
    """Waits, and does to some shards what they are listed for."""

    book: str
    seconds: float
    deadly: tuple[int, ...]
    hungry: tuple[int, ...]
    broken: tuple[int, ...]
    fatal: tuple[int, ...]
    slow: tuple[int, ...]
    hanging: tuple[int, ...]

    def compute(self, shard: Shard, stop: Stop, again: bool) -> Computed:
        with Path(self.book).open("a") as book:
            book.write(f"{shard.number} {os.getpid()} {again} {time.monotonic()}\n")
        if shard.number in self.deadly:
            time.sleep(1.0)  # until the word about the shard before has gone out
            ctypes.string_at(0)  # in this very thread; a signal sent might end it too late
        if shard.number in self.hanging and not begun_before(Path(self.book), shard.number):
            os.kill(os.getpid(), signal.SIGSTOP)
        if shard.number in self.hungry:
            raise MemoryError("no room for the shard")
        if shard.number in self.broken:
            raise ValueError("the shard is broken")
        if shard.number in self.fatal:
            raise RunError("cannot write store: the disk is full; free some space")
        ends = time.monotonic() + self.seconds
        while time.monotonic() < ends:
            if stop.reason is not None:
                raise Interrupted("explain", stop.reason)
            time.sleep(0.01)
        warnings = ("the first shard is odd",) if shard.number == 0 else ()
        return Computed(partial(self.write, shard), warnings)

    def write(self, shard: Shard) -> None:
        if shard.number in self.slow:
            time.sleep(1.0)
        with Path(self.book).with_suffix(".written").open("a") as book:
            book.write(f"{shard.number} {time.monotonic()}\n")


def begun_before(book: Path, number: int) -> bool:
    """Whether a shard has been begun before."""
    return sum(line.split()[0] == str(number) for line in book.read_text().splitlines()) > 1


def computer(
    book: str,
    seconds: float = 0.05,
    deadly: tuple[int, ...] = (),
    hungry: tuple[int, ...] = (),
    broken: tuple[int, ...] = (),
    fatal: tuple[int, ...] = (),
    slow: tuple[int, ...] = (),
    hanging: tuple[int, ...] = (),
) -> Troubled:
    return Troubled(book, seconds, *map(tuple, (deadly, hungry, broken, fatal, slow, hanging)))


def stillborn(book: str) -> Troubled:
    raise RuntimeError("there is no such model")
