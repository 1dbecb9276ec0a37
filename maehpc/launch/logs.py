"""What a job's ranks print: files that grow, appear later, and go on after a requeue."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maehpc.launch.record import JobFolder

Stream = Literal["out", "err"]

CONTROLLER = "controller.log"
"""What a local job's controller prints: why no rank was started."""

_BLOCK = 1 << 20
_NAME = re.compile(r"(?P<job>\d+(?:_\d+)?)_(?P<rank>\d+)_log\.(?P<stream>out|err)")


@dataclass(frozen=True)
class LogFile:
    """One file that a rank prints into.

    Attributes:
        path: where it is.
        job_id: the scheduler's.
        rank: whose it is; rank 0's also holds what the batch script prints.
        stream: out or err.
    """

    path: Path
    job_id: str
    rank: int
    stream: Stream


def log_files(job: JobFolder) -> list[LogFile]:
    """The files of a job that are there by now, in the order of its submissions, by rank, standard output first."""
    accepted = [submission.accepted for submission in job.submissions() if submission.accepted is not None]
    places = [(Path(one.logs), one.job_id) for one in accepted]
    places += [(job.logs, attempt.job_id) for attempt in job.attempts().values()]  # of an answer that nobody recorded
    found: list[LogFile] = []
    for folder, job_id in dict.fromkeys(places):
        controller = folder / CONTROLLER
        if controller.exists():
            found.append(LogFile(controller, "", 0, "err"))
        here: list[LogFile] = []
        for path in folder.iterdir() if folder.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match is not None and match["job"] == job_id:
                stream: Stream = "out" if match["stream"] == "out" else "err"
                here.append(LogFile(path, job_id, int(match["rank"]), stream))
        found += sorted(here, key=lambda log: (log.rank, log.stream == "err"))
    return list(dict.fromkeys(found))


def start_of_last_lines(path: Path, count: int) -> int:
    """Bytes before the last `count` lines of a file, found from its end: logs grow large."""
    with path.open("rb") as handle:
        position = handle.seek(0, 2)
        if count == 0:
            return position
        wanted = count
        last = True
        while position > 0:
            step = min(_BLOCK, position)
            position -= step
            handle.seek(position)
            block = handle.read(step)
            end = len(block)
            if last and block.endswith(b"\n"):
                end -= 1  # ends the last line, and begins none
            last = False
            while (found := block.rfind(b"\n", 0, end)) >= 0:
                wanted -= 1
                if wanted == 0:
                    return position + found + 1
                end = found
        return 0


@dataclass
class Tail:
    """Reads what is appended to a file, line by line; starts again where it was cut.

    Attributes:
        log: the file.
        position: bytes read so far.
    """

    log: LogFile
    position: int = 0
    _identity: int | None = None
    _rest: str = ""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def lines(self) -> Iterator[str]:
        """Lines that were finished since the last call."""
        try:
            with self.log.path.open("rb") as handle:
                facts = handle.seek(0, 2), os.fstat(handle.fileno()).st_ino
                if facts[0] < self.position or self._identity not in (None, facts[1]):
                    self._begin_again()
                self._identity = facts[1]
                handle.seek(self.position)
                while block := handle.read(_BLOCK):
                    self.position += len(block)
                    *whole, self._rest = (self._rest + self._decoder.decode(block)).split("\n")
                    yield from whole
        except FileNotFoundError:
            self._begin_again()

    def last(self) -> Iterator[str]:
        """The unfinished last line, if there is one; called when nothing more comes."""
        rest = self._rest + self._decoder.decode(b"", final=True)
        self._rest = ""
        if rest:
            yield rest

    def _begin_again(self) -> None:
        self.position, self._rest, self._identity = 0, "", None
        self._decoder.reset()


@dataclass(frozen=True)
class Line:
    """One line of a log.

    Attributes:
        log: the file that it stands in.
        text: without the line's end.
    """

    log: LogFile
    text: str


class Follower:
    """Reads a job's logs as they grow.

    Args:
        job: whose logs.
        rank: one rank's alone, or all.
        streams: which of out and err.
        tail: begin with so many lines of each file that is there at the first call; all where None.
    """

    def __init__(
        self,
        job: JobFolder,
        rank: int | None = None,
        streams: Iterable[Stream] = ("out", "err"),
        tail: int | None = None,
    ) -> None:
        self._job = job
        self._rank = rank
        self._streams = frozenset(streams)
        self._tail = tail
        self._tails: dict[Path, Tail] = {}

    def files(self) -> list[LogFile]:
        """The files that are there and asked for."""
        return [
            log
            for log in log_files(self._job)
            if log.stream in self._streams and (self._rank is None or log.rank == self._rank)
        ]

    def lines(self) -> Iterator[Line]:
        """What is new since the last call, file by file."""
        for log in self.files():
            if log.path not in self._tails:
                start = 0 if self._tail is None else start_of_last_lines(log.path, self._tail)
                self._tails[log.path] = Tail(log, start)
        self._tail = None  # files that appear later are read from their beginning
        for tail in self._tails.values():
            for text in tail.lines():
                yield Line(tail.log, text)

    def last(self) -> Iterator[Line]:
        """Unfinished last lines."""
        for tail in self._tails.values():
            for text in tail.last():
                yield Line(tail.log, text)
