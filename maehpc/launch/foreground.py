"""Work in a terminal, as another terminal sees it: what `maehpc run` is at, as rows beside those of jobs.

results/NAME/.runs/PID-STAGE.json    there as long as that process is at work; replaced every second

Nothing rests on these files: one that is lost, damaged or cannot be written costs nothing. What a killed process left
is told of by nobody on its host, and removed by the next run there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, PositiveInt, ValidationError

from maehpc import files
from maehpc.errors import RunError
from maehpc.experiment import Experiment
from maehpc.launch.pulse import BEAT_S, Pulse, watched
from maehpc.launch.record import Heartbeat, JobFolder
from maehpc.launch.states import State
from maehpc.launch.status import IN_TERMINAL, Row


class _Told(BaseModel):
    """What one process tells of itself.

    Attributes:
        host: that it runs on.
        pid: there.
        born: when it began, as `_born` tells.
        heartbeat: how far it is.
    """

    host: str
    pid: PositiveInt
    born: str
    heartbeat: Heartbeat

    @property
    def here(self) -> bool:
        """Whether this host is the one that knows of it."""
        return self.host == os.uname().nodename

    @property
    def dead(self) -> bool:
        """Whether this host knows that it is no more."""
        return self.here and _born(self.pid) != self.born


def _born(pid: int) -> str | None:
    """The boot, and the clock ticks since then, at which a process began: no other of its number has the same, and no
    change of the clock moves them. None where there is no such process."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{boot} {facts.rpartition(')')[2].split()[19]}"  # the 22nd of proc(5); the name before may hold anything


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
        told = _Told(host=os.uname().nodename, pid=pid, born=_born(pid) or "", heartbeat=heartbeat).model_dump_json()
        for path in self._paths:
            files.write_passing(path, told)

    @contextmanager
    def visible(self, pulse: Pulse) -> Iterator[None]:
        """Lets `status` see it for the length of the block.

        Args:
            pulse: of the work, kept by `tell`.
        """
        for experiment in self.experiments:
            _tidy(experiment)
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
    """What runs in terminals work on, a row each; whether one of another host still does is not known here."""
    found: dict[tuple[str, int], Row] = {}
    for experiment in experiments:
        for path, told in _read(experiment):
            if told is None or told.dead:
                continue
            doubt = f"it ran in a terminal of {told.host}, and only {told.host} knows if it still does"
            row = Row(
                JobFolder(path.absolute().with_suffix("")),
                None,
                IN_TERMINAL,
                str(told.pid),
                State.RUNNING if told.here else State.UNKNOWN,
                "" if told.here else doubt,
                nodes=(told.host,),
                heartbeat=told.heartbeat,
            )
            found.setdefault((told.host, told.pid), row)  # of several experiments in one pool, the first tells of all
    return list(found.values())


def at_work_below(results: Path) -> list[Row]:
    """The same of a folder of experiments."""
    found: list[Path] = []
    with suppress(OSError):
        found = sorted(results.absolute().glob("*/.runs"))
    return at_work(Experiment(path.parent) for path in found)


def find_runs(word: str, results: Path) -> list[Row]:
    """The runs that a word on the command line means, as `maehpc.launch.named.find` does for jobs.

    Args:
        word: EXPERIMENT, EXPERIMENT/STAGE, EXPERIMENT/PID-STAGE, PID, or the path of an experiment or of a folder of
            them.
        results: folder of experiments.
    """
    name, _, rest = word.strip("/").partition("/")
    named = at_work([Experiment(results / name)]) if re.match(r"[^.~]", name) else []
    found = [row for row in named if rest in ("", row.job.stage, row.job.path.name)]
    if not found and word.isdecimal():
        found = [row for row in at_work_below(results) if row.job_id == word]
    if not found:
        path = files.user_path(word)
        found = at_work([Experiment(path)]) or at_work_below(path)
    return found


def _tidy(experiment: Experiment) -> None:
    """Removes what killed processes left; of another host's, what it was about to tell, which it tells again."""
    for path, told in _read(experiment):
        if told is None or told.dead:
            with suppress(OSError):
                path.unlink()
    with suppress(OSError, RunError):
        files.remove_partials(experiment.runs)


def _read(experiment: Experiment) -> list[tuple[Path, _Told | None]]:
    """Files and what they say; None where that is nothing."""
    found: list[tuple[Path, _Told | None]] = []
    with suppress(OSError):
        for path in sorted(experiment.runs.glob("*.json")):
            try:
                found.append((path, _Told.model_validate_json(path.read_bytes())))
            except FileNotFoundError:  # it has just ended
                continue
            except (OSError, ValidationError):
                found.append((path, None))
    return found
