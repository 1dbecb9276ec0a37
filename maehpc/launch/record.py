"""What is written about a job: one folder each, which the client, the batch script, the ranks and `status` share.

    results/EXPERIMENT/jobs/0001-pretrain/
      job.json                     what was asked for; written before any submission, never changed
      submissions/0001/            intent.json (before sbatch), script.sh, accepted.json (after it)
      attempts/0001.json           one a start, created exclusively by rank 0; the highest number owns the job
      rendezvous/0001.json         where that attempt's rank 0 listens
      hosts/0001/NAME.json         what another host of a pool said of its part in that attempt, if anything
      heartbeats/0001.json         how far that attempt is; replaced about every second
      outcomes/0001.json           how that attempt ended
      cancelled                    a person asked for the end
      logs/JOBID_RANK_log.out|err  one file a rank, appended to by later attempts

A pool that explains several experiments is one job: its folder lies in the first one, and it counts among the jobs of
each, by a number of its own there.

An attempt without an outcome was killed, or is at work: only the scheduler can tell which. No decision rests on the
time of a file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from maehpc import files
from maehpc.catalogue import dataset_name
from maehpc.errors import InputError, RunError
from maehpc.experiment import Experiment

COMMENT = "maehpc:"
"""Begins the scheduler's comment of every job; the submission's token follows."""

_FOLDER = re.compile(r"(\d{4,})-([a-z]+)")
_NUMBERED = re.compile(r"(\d{4,})")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArrayMember(_Record):
    """A job's place in a sweep that was submitted as one array."""

    index: int
    folders: tuple[str, ...]


class JobRecord(_Record):
    """What was asked for.

    Attributes:
        stage: pretrain, finetune, probe, explain, or report (aggregate what the others left).
        experiment: the experiment's name.
        results: absolute path of the folder of experiments.
        packs: absolute path of the packed data sets.
        recipe: the whole resolved recipe.
        also: resolved recipes, by name, of further experiments that the same pool explains.
        numbers: the job's number among the jobs of each of those.
        profile: the whole resolved profile.
        profile_name: as given on the command line.
        nodes: hosts.
        min_nodes: of them, without which the pool that explains does not go on; None: all.
        tasks_per_node: ranks a host; one a GPU.
        workers_per_node: of the pool that explains, a host; 0 where ranks compute by themselves.
        metrics_port: where explaining tells Prometheus how far it is; 0: a free one; None: nowhere.
        dashboard_port: of the dashboard of Ray that the pool that explains has; 0: a free one; None: no dashboard.
        time_min: wall time asked for, minutes.
        code: absolute path of the snapshot that runs.
        code_digest: of the snapshot's files.
        command: words after `maehpc`.
        directory: absolute path of the folder the client stood in; the recipe's relative paths are resolved there.
        after: folders of jobs that must have succeeded.
        after_jobs: ids of the scheduler's jobs, not ours, that must have succeeded.
        array: place in a sweep.
    """

    format: Literal[1] = 1
    stage: str
    experiment: str
    results: str
    packs: str
    recipe: dict[str, Any]
    also: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    profile: dict[str, Any]
    profile_name: str
    nodes: int
    min_nodes: int | None = None
    tasks_per_node: int
    workers_per_node: int = 0
    metrics_port: int | None = None
    dashboard_port: int | None = None
    time_min: int
    code: str
    code_digest: str
    command: tuple[str, ...]
    directory: str = ""
    after: tuple[str, ...] = ()
    after_jobs: tuple[str, ...] = ()
    array: ArrayMember | None = None

    @model_validator(mode="after")
    def _names_its_datasets(self) -> Self:
        for recipe in self.recipes.values():
            datasets = recipe.get("datasets", [])
            if not isinstance(datasets, list | tuple) or not all(isinstance(one, str) for one in datasets):
                raise ValueError("a recipe's datasets are no list of names")
        return self

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Of all experiments that it works on, by name; the one first that holds its folder."""
        return {self.experiment: self.recipe, **self.also}

    @property
    def works_on(self) -> set[tuple[str, str]]:
        """Experiment and data set of each folder or store that its stage fills."""
        each = [(name, text) for name, recipe in self.recipes.items() for text in recipe.get("datasets", ())]
        return {(name, dataset_name(text)) for name, text in each}

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks_per_node


class Intent(_Record):
    """A submission about to be made; the token is in the scheduler's comment."""

    token: str

    @property
    def comment(self) -> str:
        """What the scheduler keeps with the job."""
        return COMMENT + self.token


class Accepted(_Record):
    """A submission that the scheduler took."""

    job_id: str
    scheduler: Literal["slurm", "local"]
    logs: str


class Attempt(_Record):
    """One start of a job.

    Attributes:
        job_id: the scheduler's.
        restart: how many times the scheduler had restarted it.
        hosts: names, rank 0's first.
        ranks: processes that were started.
        pid: of rank 0, on the first host.
    """

    job_id: str
    restart: int
    hosts: tuple[str, ...]
    ranks: int
    pid: int


class Heartbeat(_Record):
    """How far an attempt is.

    Attributes:
        sequence: grows by one a heartbeat; two equal ones some seconds apart mean that nothing moves.
        phase: what it is at: starting, a stage's name, saving, ending.
        dataset: being worked on; several have commas between.
        parts: where several are worked on at once, units finished and units in all, by data set.
        rates: of those parts, images a second over the last moments.
        failures: times that a piece of the work failed or ended its worker, by data set; those without are left out.
        done: units finished.
        total: units of the present work.
        unit: step or image.
        images_per_second: measured over the last moments.
        seconds_left: estimate for the present work.
        loss: the last one told.
        first_step_s: seconds from the attempt's start to its first finished unit.
    """

    sequence: int
    phase: str
    dataset: str | None = None
    parts: dict[str, tuple[int, int]] = {}
    rates: dict[str, FiniteFloat] = {}
    failures: dict[str, int] = {}
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    images_per_second: FiniteFloat | None = None
    seconds_left: FiniteFloat | None = None
    loss: float | None = None
    first_step_s: FiniteFloat | None = None


class Outcome(_Record):
    """How an attempt ended.

    Attributes:
        outcome: done; interrupted (saved, to be continued); failed (a sentence tells why; running it again as it is
            would fail again); refused (wrong input); fenced (a newer attempt had begun).
        reason: one sentence.
        requeue: whether the attempt asks to be continued.
    """

    outcome: Literal["done", "interrupted", "failed", "refused", "fenced"]
    reason: str = ""
    requeue: bool = False


class Word(_Record):
    """What a host of a pool said last of its part in an attempt."""

    said: str


class Rendezvous(_Record):
    """Where rank 0 listens."""

    facts: dict[str, Any]


Kind = TypeVar("Kind", bound=_Record)


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    """A record, or None where there is none.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}); restore or delete it"
        ) from error


def _write(path: Path, record: _Record) -> None:
    files.write_json(path, record.model_dump(mode="json"))


def _create(path: Path, record: _Record) -> bool:
    """Writes a record that must not exist yet, durably; False where it does."""
    files.make_folder(path.parent)
    partial = files.partial_name(path)
    with files.writing(path):
        try:
            partial.write_bytes(json.dumps(record.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n")
            files.fsync_path(partial)
            try:
                os.link(partial, path)  # whole when it appears, and refused where the name is taken
            except FileExistsError:
                return False
            files.fsync_path(path.parent)
            return True
        finally:
            partial.unlink(missing_ok=True)


def _numbers(folder: Path, suffix: str) -> list[int]:
    found = folder.iterdir() if folder.is_dir() else ()
    names = [path.name.removesuffix(suffix) for path in found if path.name.endswith(suffix)]
    return sorted(int(name) for name in names if _NUMBERED.fullmatch(name))


@dataclass(frozen=True)
class Submission:
    """One time that a job was handed to the scheduler.

    Attributes:
        number: 1, 2, …
        folder: its files.
        intent: what was about to be done.
        accepted: the scheduler's answer; None where the client ended before it was recorded.
    """

    number: int
    folder: Path
    intent: Intent
    accepted: Accepted | None


@dataclass(frozen=True)
class JobFolder:
    """The folder of one job."""

    path: Path

    @classmethod
    def create(cls, experiment: Experiment, stage: str, above: int = 0) -> JobFolder:
        """Makes the next free folder of an experiment.

        Args:
            experiment: whose job it is.
            stage: what it computes.
            above: a number that is taken, with all below it.

        Raises:
            RunError: it cannot be written.
        """
        root = files.make_folder(experiment.root / "jobs")
        number = max([above, *(job.number for job in jobs_of(experiment))])
        while True:
            number += 1
            if any(name.name.startswith(f"{number:04d}-") for name in root.iterdir()):
                continue
            path = root / f"{number:04d}-{stage}"
            try:
                with files.writing(path):
                    path.mkdir()
                    files.fsync_path(root)
            except RunError as error:
                if isinstance(error.__cause__, FileExistsError):
                    continue
                raise
            return cls(path)

    @property
    def experiment(self) -> str:
        """Name of the experiment that its folder lies in."""
        return self.path.parent.parent.name

    @property
    def number(self) -> int:
        """Its number in that experiment."""
        return int(self.path.name.partition("-")[0])

    @property
    def stage(self) -> str:
        """What it computes."""
        return self.path.name.partition("-")[2]

    @property
    def label(self) -> str:
        """How a person names it: EXPERIMENT/NNNN-STAGE."""
        return f"{self.experiment}/{self.path.name}"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs (of an array: those of its first member)."""
        return self.path / "logs"

    def record(self) -> JobRecord:
        """What was asked for.

        Raises:
            InputError: it is missing or damaged.
        """
        found = _read(self.path / "job.json", JobRecord)
        if found is None:
            raise InputError(f"{self.path} holds no job.json: it is no job, or its submission was never finished")
        return found

    def write_record(self, record: JobRecord) -> None:
        """Writes job.json."""
        _write(self.path / "job.json", record)

    def submissions(self) -> list[Submission]:
        """Oldest first."""
        found = []
        for number in _numbers(self.path / "submissions", ""):
            folder = self.path / "submissions" / f"{number:04d}"
            intent = _read(folder / "intent.json", Intent)
            if intent is not None:
                found.append(Submission(number, folder, intent, _read(folder / "accepted.json", Accepted)))
        return found

    def intend(self, token: str) -> Submission:
        """Records that a submission is about to be made."""
        number = max(_numbers(self.path / "submissions", ""), default=0) + 1
        folder = self.path / "submissions" / f"{number:04d}"
        intent = Intent(token=token)
        _write(folder / "intent.json", intent)
        return Submission(number, folder, intent, None)

    def accept(self, submission: Submission, accepted: Accepted) -> Submission:
        """Records the scheduler's answer."""
        _write(submission.folder / "accepted.json", accepted)
        return Submission(submission.number, submission.folder, submission.intent, accepted)

    def begin_attempt(self, attempt: Attempt) -> int:
        """Records a start; the number owns the job from now on, and every older attempt is fenced."""
        while True:
            number = self.newest_attempt() + 1
            if _create(self.path / "attempts" / f"{number:04d}.json", attempt):
                return number

    def newest_attempt(self) -> int:
        """The highest attempt's number; 0 before the first."""
        return max(_numbers(self.path / "attempts", ".json"), default=0)

    def attempt(self, number: int) -> Attempt | None:
        """One attempt's record."""
        return _read(self.path / "attempts" / f"{number:04d}.json", Attempt)

    def attempts(self) -> dict[int, Attempt]:
        """All of them by number."""
        found = {number: self.attempt(number) for number in _numbers(self.path / "attempts", ".json")}
        return {number: attempt for number, attempt in found.items() if attempt is not None}

    def write_outcome(self, attempt: int, outcome: Outcome) -> None:
        """Records how an attempt ended."""
        _write(self.path / "outcomes" / f"{attempt:04d}.json", outcome)

    def outcome(self, attempt: int) -> Outcome | None:
        """How an attempt ended; None where nothing tells."""
        return _read(self.path / "outcomes" / f"{attempt:04d}.json", Outcome)

    def beat(self, attempt: int, heartbeat: Heartbeat) -> None:
        """Replaces an attempt's heartbeat.

        Raises:
            RunError: the disk refused.
        """
        files.write_passing(self.path / "heartbeats" / f"{attempt:04d}.json", heartbeat.model_dump_json())

    def heartbeat(self, attempt: int) -> Heartbeat | None:
        """The attempt's newest heartbeat."""
        return _read(self.path / "heartbeats" / f"{attempt:04d}.json", Heartbeat)

    def publish_rendezvous(self, attempt: int, facts: dict[str, Any]) -> None:
        """Tells the other ranks where rank 0 listens."""
        _write(self.path / "rendezvous" / f"{attempt:04d}.json", Rendezvous(facts=facts))

    def rendezvous(self, attempt: int) -> dict[str, Any] | None:
        """Where that attempt's rank 0 listens."""
        found = _read(self.path / "rendezvous" / f"{attempt:04d}.json", Rendezvous)
        return None if found is None else found.facts

    def say(self, attempt: int, host: str, said: str) -> None:
        """Records what a host has to say of its part in an attempt, in place of what it said before."""
        _write(self.path / "hosts" / f"{attempt:04d}" / f"{host}.json", Word(said=said))

    def said(self, attempt: int, host: str) -> str | None:
        """What a host said last of its part in an attempt."""
        found = _read(self.path / "hosts" / f"{attempt:04d}" / f"{host}.json", Word)
        return None if found is None else found.said

    @property
    def cancelled(self) -> bool:
        """Whether a person asked for the end."""
        return (self.path / "cancelled").exists()

    def mark_cancelled(self) -> None:
        """Records that a person asked for the end."""
        files.write_text(self.path / "cancelled", "")

    def unmark_cancelled(self) -> None:
        """Forgets that, before the job is submitted again."""
        with files.writing(self.path):
            (self.path / "cancelled").unlink(missing_ok=True)


def jobs_of(experiment: Experiment) -> list[JobFolder]:
    """Jobs of an experiment that were at least written down, oldest first."""
    return sorted(_jobs(experiment.root / "jobs"), key=lambda job: job.number)


def _jobs(root: Path) -> Iterator[JobFolder]:
    for path in root.iterdir() if root.is_dir() else ():
        if _FOLDER.fullmatch(path.name) and (path / "job.json").is_file():
            yield JobFolder(path)


def explaining(results: Path) -> Iterator[tuple[JobFolder, JobRecord]]:
    """Every job of a folder of experiments that explains, with its record; a damaged one is left out."""
    for root in sorted(results.glob("*/jobs")):
        try:
            jobs = sorted(_jobs(root), key=lambda job: job.number)
        except OSError:  # another person's, who lets nobody look
            continue
        for job in jobs:
            if job.stage == "explain":
                try:
                    record = job.record()
                except InputError:  # a client is about to write it, or it is damaged
                    continue
                yield job, record


def pooled_numbers(results: Path) -> dict[str, int]:
    """By experiment, the highest number that a pool has among its jobs whose folder lies in another experiment."""
    highest: dict[str, int] = {}
    for _, record in explaining(results):
        for name, number in record.numbers.items():
            highest[name] = max(number, highest.get(name, 0))
    return highest


def next_number(experiment: Experiment, pooled: Mapping[str, int]) -> int:
    """The number of an experiment's next job, given `pooled_numbers`."""
    return 1 + max([pooled.get(experiment.root.name, 0), *(job.number for job in jobs_of(experiment))])
