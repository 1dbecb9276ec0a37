"""Which jobs a person means: by path, EXPERIMENT, EXPERIMENT/NUMBER, EXPERIMENT/STAGE, or the scheduler's id.

A pool that explains several experiments is a job of each of them, wherever its folder lies.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from maehpc import files
from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.launch.foreground import find_runs
from maehpc.launch.record import JobFolder, explaining, jobs_of

_JOB_ID = re.compile(r"\d+(_\d+)?")
_LONGEST_NAME = 255
"""Bytes of a name in a folder; file systems have none longer."""


@dataclass(frozen=True)
class Meant:
    """What a word on the command line means.

    Attributes:
        jobs: oldest first; none where there is no such job.
        experiment: by whose name they were found; None where a job itself, or a folder of experiments, was named.
    """

    jobs: tuple[JobFolder, ...]
    experiment: str | None = None


def jobs_below(results: Path) -> list[JobFolder]:
    """Every job of a folder of experiments, by experiment, oldest first; absolute, as records name other jobs."""
    experiments = sorted(path.parent for path in results.absolute().glob("*/jobs"))
    return [job for experiment in experiments for job in jobs_of(Experiment(experiment))]


def _at(path: Path) -> Meant:
    """Jobs at a path: a job's folder, an experiment's, or a folder of experiments."""
    path = path.absolute()
    if (path / "job.json").is_file():
        return Meant((JobFolder(path),))
    below = () if (path / "jobs").is_dir() else jobs_below(path)
    return Meant(tuple(below)) if below else _in_experiment(path)


def _numbered(root: Path) -> list[tuple[int, JobFolder]]:
    """Jobs of an experiment with their numbers in it, oldest first: its own, and pools whose folder lies in another."""
    name = root.name
    found = [(job.number, job) for job in jobs_of(Experiment(root))]
    for job, record in explaining(root.parent):
        if name in record.also and job.experiment != name:
            found.append((record.numbers.get(name, 0), job))
    return sorted(found, key=lambda one: (one[0], one[1].number))


def _in_experiment(root: Path, word: str = "") -> Meant:
    """Jobs of an experiment: all, or by number ("2", "0002"), whole name or stage; of a stage the newest."""
    jobs = _numbered(root)
    found = [job for _, job in jobs]
    if word:
        exact = [
            job
            for number, job in jobs
            if word == f"{number:04d}-{job.stage}" or (word.isdigit() and number == int(word))
        ]
        found = exact or [job for job in found if job.stage == word][-1:]
    return Meant(tuple(found), root.name)


def look_up(word: str, results: Path) -> Meant:
    """What a word on the command line means, perhaps nothing.

    Args:
        word: a path, EXPERIMENT, EXPERIMENT/NUMBER, EXPERIMENT/NUMBER-STAGE, EXPERIMENT/STAGE (its newest), or an id.
        results: folder of experiments.
    """
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(word).parts):
        return Meant(())
    name = word.strip("/")
    experiment, _, rest = name.partition("/")
    results = results.absolute()
    if experiment and not experiment.startswith((".", "~")):
        found = _in_experiment(results / experiment, rest)
        if found.jobs:
            return found
    if _JOB_ID.fullmatch(word):
        found = Meant(tuple(job for job in jobs_below(results) if word in _ids(job)))
        if found.jobs:
            return found
    path = files.user_path(word)
    return _at(path) if path.is_dir() else Meant(())


def find(word: str, results: Path) -> Meant:
    """What `look_up` tells.

    Raises:
        InputError: there is no such job; the sentence names those that come near.
    """
    found = look_up(word, results)
    if not found.jobs:
        raise no_such(word, results.absolute())
    return found


def find_jobs(word: str, results: Path) -> list[JobFolder]:
    """The jobs that `find` tells, oldest first.

    Raises:
        InputError: there is none.
    """
    return list(find(word, results).jobs)


def newest_job(word: str, results: Path) -> JobFolder:
    """The one job that a word means: of an experiment its newest.

    Raises:
        InputError: there is none.
    """
    return find_jobs(word, results)[-1]


def _ids(job: JobFolder) -> set[str]:
    """The ids that the scheduler gave a job; a member of an array also answers to the array's."""
    accepted = [submission.accepted.job_id for submission in job.submissions() if submission.accepted is not None]
    return {part for job_id in accepted for part in (job_id, job_id.partition("_")[0])}


def no_such(word: str, results: Path) -> InputError:
    """The error that tells which jobs there are instead."""
    runs = find_runs(word, results)
    if runs:
        where = f"process {runs[0].job_id} of {runs[0].nodes[0]}"
        return InputError(f"'{word}' is no job: it runs in a terminal ({where}), which shows it; Ctrl-C there ends it")
    jobs = jobs_below(results)
    if not jobs:
        return InputError(
            f"there is no job '{word}', nor any other below {results}; --results names the folder of experiments"
        )
    labels = [job.label for job in jobs]
    labels += [
        f"{name}/{number:04d}-explain" for _, record in explaining(results) for name, number in record.numbers.items()
    ]
    names = list(dict.fromkeys(name for label in labels for name in (label.partition("/")[0], label)))
    near = difflib.get_close_matches(word.strip("/"), names, n=4, cutoff=0.5)
    if not near:  # the newest ones, then
        near = [job.label for job in jobs[-4:]]
    return InputError(f"there is no job '{word}' below {results}; there are {', '.join(near)}")
