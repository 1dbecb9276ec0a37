"""Everything that an experiment recorded, held to its digests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maehpc import files, maps
from maehpc.data import Pack
from maehpc.errors import InputError, MaehpcError
from maehpc.experiment import Experiment, find_experiments
from maehpc.overlooked import overlooked
from maehpc.ownership import own
from maehpc.recipes import read_recipe
from maehpc.stages.context import read_json, vouched_files
from maehpc.stages.provenance import recorded_runs
from maehpc.training.checkpoints import DamagedError, list_checkpoints, read_checkpoint


@dataclass
class Findings:
    """What was looked at and what is wrong.

    Attributes:
        checked: packs, records, stores, checkpoints and finished results.
        problems: `kind`, `path`, `sentence` and, for a store's shard, `shard`.
        forgotten: shards by store that count as missing now, so that explain computes them.
    """

    checked: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    forgotten: dict[str, list[int]] = field(default_factory=dict)

    def add(self, kind: str, path: Path, sentence: str, shard: int | None = None) -> None:
        """Notes a problem."""
        self.problems.append({"kind": kind, "path": str(path), "sentence": sentence, "shard": shard})

    @contextmanager
    def tolerating(self, path: Path) -> Iterator[None]:
        """Runs a block that reads `path`; where it may not be read, notes that and goes on after the block."""
        try:
            yield
        except MaehpcError as error:
            self.add("unreadable", path, str(error))
        except OSError as error:
            where = error.filename or path
            self.add("unreadable", Path(where), f"cannot read {where}: {error.strerror}; make it readable")


def verify_results(path: Path, repair: bool = False) -> Findings:
    """Checks every experiment at or below `path`, and the packs beside them.

    Args:
        path: an experiment, or a folder of them.
        repair: forget the records of damaged shards.

    Raises:
        InputError: there is no experiment.
    """
    experiments = find_experiments(path) if path.is_dir() else []
    passed_over = overlooked(path) if path.is_dir() else {}
    if not experiments and not passed_over:
        raise InputError(f"{path} holds no experiment (a folder with recipe.yaml); give the results folder")
    findings = Findings()
    for folder, sentence in passed_over.items():
        findings.add("overlooked", folder, sentence)
    for pack in sorted((path / "packs").glob("*.h5")):
        _pack(pack, findings)
    for experiment in experiments:
        _experiment(experiment, repair, findings)
    return findings


def _experiment(experiment: Experiment, repair: bool, findings: Findings) -> None:
    _records(experiment, findings)
    for stage in ("pretrain", "finetune", "probe"):
        with findings.tolerating(experiment.root / stage):
            for dataset in experiment.datasets_of(stage):
                with findings.tolerating(experiment.stage(stage, dataset)):
                    _training(experiment.stage(stage, dataset), findings)
    datasets: list[str] = []
    with findings.tolerating(experiment.root / "ledger"):
        datasets = experiment.mapped_datasets()
    for dataset in datasets:
        _store(experiment, dataset, repair, findings)


def _pack(path: Path, findings: Findings) -> None:
    findings.checked += 1
    try:
        with Pack(path) as pack:
            pack.verify()
    except InputError as error:
        findings.add("damaged", path, str(error))


def _records(experiment: Experiment, findings: Findings) -> None:
    """The recipe and provenance can be read, and no store stands without a ledger."""
    for path, read in ((experiment.recipe, read_recipe), (experiment.provenance, recorded_runs)):
        findings.checked += 1
        try:
            read(path)
        except MaehpcError as error:
            findings.add("damaged", path, str(error))
    for store in sorted((experiment.root / "maps").glob("*.zarr")):
        with findings.tolerating(store):
            if not (experiment.ledger(store.stem) / "store.json").is_file():
                sentence = f"{store} has no ledger, so nothing vouches for it; move it away and run explain again"
                findings.add("unrecorded", store, sentence)


def _training(folder: Path, findings: Findings) -> None:
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        findings.checked += 1
        try:
            read_checkpoint(checkpoint)
        except DamagedError as error:
            findings.add("damaged", checkpoint, f"{error}; run the stage again, it goes back to an older one")
    done = folder / "done.json"
    if not done.exists():
        findings.add("unfinished", folder, f"{folder} is not finished; run the stage again to go on with it")
        return
    findings.checked += 1
    try:
        record = read_json(done)
    except InputError as error:
        findings.add("damaged", done, str(error))
        return
    vouched = vouched_files(record)
    if vouched is None:
        findings.add("damaged", done, f"{done} is no record of a stage; delete it and run the stage again")
        return
    for name, expected in vouched.items():
        path = folder / name
        if not path.is_file():
            findings.add("missing", path, f"{path} is missing; run the stage again")
        elif files.sha256_file(path) != expected:
            findings.add("flipped", path, f"{path} does not match its digest in done.json; run the stage again")


def _store(experiment: Experiment, dataset: str, repair: bool, findings: Findings) -> None:
    ledger = experiment.ledger(dataset)
    problems: list[maps.Problem] = []
    with findings.tolerating(ledger):
        if not (ledger / "store.json").exists():
            return
        findings.checked += 1
        try:
            problems = maps.verify(experiment.maps(dataset), ledger)
        except InputError as error:  # of one store, and all others are looked at
            findings.add("foreign", ledger / "store.json", str(error))
    for problem in problems:
        findings.add(problem.kind, problem.path, problem.sentence, problem.shard)
    if repair and problems:
        with own(ledger):
            forgotten = maps.discard(ledger, problems)
        if forgotten:
            findings.forgotten[str(experiment.maps(dataset))] = forgotten
