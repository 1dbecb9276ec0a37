"""Work in a terminal, as another terminal sees it: what `maehpc run` is at, as rows beside those of jobs.

results/NAME/.runs/PID-STAGE.json    there as long as that process is at work; replaced every second

Nothing rests on these files: one that is lost or cannot be written costs nothing. What a killed process left is told of
by nobody on its host, and removed by the next run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from maehpc import files
from maehpc.errors import RunError
from maehpc.experiment import Experiment
from maehpc.launch.pulse import BEAT_S, Pulse, watched
from maehpc.launch.record import Heartbeat, JobFolder
from maehpc.launch.states import State
from maehpc.launch.status import Row

SCHEDULER = "run"
"""Stands in a row where a job has Slurm."""


class _Told(BaseModel):
    """What one process tells of itself.

    Attributes:
        host: that it runs on.
        pid: there.
        born: when it began, which no other process of that number did.
        heartbeat: how far it is.
    """

    host: str
    pid: int
    born: float
    heartbeat: Heartbeat

    @property
    def here(self) -> bool:
        """Whether this host is the one that knows of it."""
        return self.host == os.uname().nodename

    @property
    def lives(self) -> bool:
        """Whether it does, where this host knows."""
        try:
            return bool(psutil.Process(self.pid).create_time() == self.born)
        except psutil.Error:
            return False


@dataclass(frozen=True)
class Foreground:
    """This process's work.

    Attributes:
        experiments: that it works on.
        stage: the word of the command line.
    """

    experiments: Sequence[Experiment]
    stage: str

    def tell(self, heartbeat: Heartbeat) -> None:
        """Replaces what is told in each experiment's folder.

        Raises:
            RunError: the disk refused.
        """
        pid = os.getpid()
        told = _Told(
            host=os.uname().nodename, pid=pid, born=psutil.Process(pid).create_time(), heartbeat=heartbeat
        ).model_dump_json()
        for path in self._paths:
            with files.atomic_path(path, durable=False) as partial:
                partial.write_text(told)

    @contextmanager
    def visible(self, pulse: Pulse) -> Iterator[None]:
        """Lets `status` see it for the length of the block.

        Args:
            pulse: of the work, kept by `tell`.
        """
        for experiment in self.experiments:
            for path, told in _read(experiment):
                if told is None or (told.here and not told.lives):
                    with suppress(OSError):
                        path.unlink()
        try:
            pulse.write()
            with watched(BEAT_S, pulse.write):
                yield
        finally:
            for path in self._paths:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    path.parent.rmdir()  # unless another run is there

    @property
    def _paths(self) -> list[Path]:
        return [experiment.runs / f"{os.getpid()}-{self.stage}.json" for experiment in self.experiments]


def at_work(experiments: Iterable[Experiment]) -> list[Row]:
    """What runs in terminals work on, a row each; of hosts that are not this one, what they told last."""
    found: dict[tuple[str, int], Row] = {}
    for experiment in experiments:
        for path, told in _read(experiment):
            if told is None or (told.here and not told.lives):
                continue
            sentence = (
                "" if told.here else f"runs in a terminal of {told.host}, which alone knows whether it still does"
            )
            row = Row(
                JobFolder(path.absolute().with_suffix("")),
                None,
                SCHEDULER,
                str(told.pid),
                State.RUNNING,
                sentence,
                nodes=(told.host,),
                heartbeat=told.heartbeat,
            )
            found.setdefault((told.host, told.pid), row)  # of several experiments in one pool, the first tells of all
    return list(found.values())


def at_work_below(results: Path) -> list[Row]:
    """The same of a folder of experiments."""
    return at_work(Experiment(path.parent) for path in sorted(results.glob("*/.runs")))


def _read(experiment: Experiment) -> list[tuple[Path, _Told | None]]:
    """Files and what they say; None where that is nothing."""
    found: list[tuple[Path, _Told | None]] = []
    with suppress(OSError, RunError):
        for path in sorted(experiment.runs.glob("*.json")):
            try:
                found.append((path, _Told.model_validate_json(path.read_bytes())))
            except FileNotFoundError:  # it has just ended
                continue
            except (OSError, ValidationError):
                found.append((path, None))
    return found
