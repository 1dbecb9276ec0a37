"""Which jobs a person means: by path, EXPERIMENT, EXPERIMENT/NUMBER, EXPERIMENT/STAGE, or the scheduler's id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from maehpc import files
from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.launch.record import JobFolder, jobs_of

_JOB_ID = re.compile(r"\d+(_\d+)?")


def jobs_below(results: Path) -> list[JobFolder]:
    """Every job of a folder of experiments, by experiment, oldest first; absolute, as records name other jobs."""
    experiments = sorted(path.parent for path in results.absolute().glob("*/jobs"))
    return [job for experiment in experiments for job in jobs_of(Experiment(experiment))]


def _at(path: Path) -> list[JobFolder]:
    """Jobs at a path: a job's folder, an experiment's, or a folder of experiments."""
    path = path.absolute()
    if (path / "job.json").is_file():
        return [JobFolder(path)]
    return jobs_of(Experiment(path)) if (path / "jobs").is_dir() else jobs_below(path)


def _in_experiment(root: Path, word: str) -> list[JobFolder]:
    """Jobs of an experiment by number ("2", "0002"), whole name or stage; of a stage the newest."""
    jobs = jobs_of(Experiment(root))
    exact = [job for job in jobs if job.path.name == word or (word.isdigit() and job.number == int(word))]
    return exact or [job for job in jobs if job.path.name.partition("-")[2] == word][-1:]


def find_jobs(word: str, results: Path) -> list[JobFolder]:
    """The jobs that a word on the command line means, oldest first.

    Args:
        word: a path, EXPERIMENT, EXPERIMENT/NUMBER, EXPERIMENT/NUMBER-STAGE, EXPERIMENT/STAGE (its newest), or an id.
        results: folder of experiments.

    Raises:
        InputError: there is no such job; the sentence names those that come near.
    """
    name = word.strip("/")
    experiment, _, rest = name.partition("/")
    results = results.absolute()
    if experiment and not experiment.startswith((".", "~")) and (results / experiment / "jobs").is_dir():
        found = _in_experiment(results / experiment, rest) if rest else jobs_of(Experiment(results / experiment))
        if found:
            return found
    if _JOB_ID.fullmatch(word):
        found = [job for job in jobs_below(results) if word in _ids(job)]
        if found:
            return found
    path = files.user_path(word)
    if path.is_dir() and (found := _at(path)):
        return found
    raise InputError(_no_such(word, results))


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


def _no_such(word: str, results: Path) -> str:
    jobs = jobs_below(results)
    if not jobs:
        return f"there is no job '{word}', nor any other below {results}; --results names the folder of experiments"
    names = list(dict.fromkeys(name for job in jobs for name in (job.label.partition("/")[0], job.label)))
    near = difflib.get_close_matches(word.strip("/"), names, n=4, cutoff=0.5)
    if not near:  # the newest ones, then
        near = [job.label for job in jobs[-4:]]
    return f"there is no job '{word}' below {results}; there are {', '.join(near)}"
