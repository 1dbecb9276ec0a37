"""What a stage is given, and how a stage's folder is begun, resumed, refused or found done.

STAGE/DATASET/stage.json   what decides the result, written before any work
STAGE/DATASET/done.json    the record that the result stands: the digest of stage.json and of each file
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from maehpc import files
from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.interruption import Stop
from maehpc.ownership import Owner, own
from maehpc.progress import Progress
from maehpc.recipes import Recipe
from maehpc.stages.prometheus import ExplainMetrics
from maehpc.training.distributed import ALONE, World


@dataclass(frozen=True)
class Context:
    """Everything a stage needs besides the data set's name.

    Attributes:
        experiment: where results go.
        recipe: what to compute.
        device: what computes.
        packs: folder of packed data sets.
        progress: where to report.
        world: the ranks that compute together, this process one of them.
        stop: whether somebody wants the work to be saved and ended.
        identity: names the job of the scheduler that this is a start of; None where there is none.
        metrics: hears of what is explained; None where nobody asked for it.
    """

    experiment: Experiment
    recipe: Recipe
    device: torch.device
    packs: Path
    progress: Progress
    world: World = ALONE
    stop: Stop = field(default_factory=Stop)
    identity: str | None = None
    metrics: ExplainMetrics | None = None


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two JSON values, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted({*old, *new})
        return [line for name in names for line in differing_fields(old.get(name), new.get(name), f"{prefix}.{name}")]
    return [] if old == new else [f"{prefix.removeprefix('.')} was {old!r} and is {new!r} now"]


def read_json(path: Path) -> Any:
    """A JSON file's value, or None where there is no file.

    Raises:
        InputError: the file is not JSON.
        RunError: it may not be read.
    """
    try:
        with files.reading(path):
            return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); restore it, or delete {path.parent}") from error


_PLAIN = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
"""Names that stages give their files, none of which leaves the folder."""


def vouched_files(record: Any) -> dict[str, str] | None:
    """SHA-256 of each file that a stage's done.json vouches for, by name; None where it is no such record."""
    found = record.get("files") if isinstance(record, dict) else None
    if not isinstance(found, dict) or not found:
        return None
    whole = all(_PLAIN.fullmatch(name) and isinstance(digest, str) for name, digest in found.items())
    return found if whole else None


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder for one data set, once its inputs are settled."""

    path: Path
    digest: str

    def result(self) -> dict[str, Any] | None:
        """The record of the finished stage if it stands whole: same inputs, every file with its digest."""
        record = read_json(self.path / "done.json")
        vouched = vouched_files(record)
        if vouched is None or record.get("digest") != self.digest:
            return None
        for name, expected in vouched.items():
            path = self.path / name
            if not path.is_file() or files.sha256_file(path) != expected:
                return None
        whole: dict[str, Any] = record
        return whole

    def finish(self, owner: Owner, outputs: list[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Records that the stage is done; `outputs` are names of its files."""
        owner.still_owner()
        sums = {name: files.sha256_file(self.path / name) for name in outputs}
        record = {"digest": self.digest, "files": sums, **facts}
        files.write_json(self.path / "done.json", record)
        return record


@contextmanager
def stage_folder(
    path: Path, inputs: Mapping[str, Any], world: World = ALONE, identity: str | None = None
) -> Iterator[tuple[StageFolder, Owner]]:
    """Owns a stage's folder and settles its inputs; rank 0 does, for all.

    Args:
        path: STAGE/DATASET of an experiment.
        inputs: everything that decides the result, as JSON.
        world: the ranks of the run.
        identity: of the run, as in `own`.

    Raises:
        InputError: another process owns the folder, or it holds results of other inputs.
        RunError: it cannot be written.
    """
    inputs = json.loads(files.canonical_json(inputs))
    with ExitStack() as until_end:

        def settle() -> int:
            refuse_other_inputs(path / "stage.json", inputs)  # before an attempt is begun, which would fence a live one
            files.require_writable(path)
            owner = until_end.enter_context(own(path, identity))
            refuse_other_inputs(path / "stage.json", inputs)
            files.remove_partials(path)
            files.write_json(path / "stage.json", inputs)
            return owner.attempt

        attempt = world.from_leader(settle)
        yield StageFolder(path, files.digest(inputs)), Owner(path, attempt)


def refuse_other_inputs(path: Path, inputs: Any) -> None:
    """Compares inputs with those that were written down before.

    Raises:
        InputError: they differ; the sentence names the first difference.
    """
    before = read_json(path)
    if before is not None and before != inputs:
        changes = differing_fields(before, inputs)
        raise InputError(
            f"{path.parent} holds results of other inputs ({'; '.join(changes[:2])}"
            f"{f' and {len(changes) - 2} more' if len(changes) > 2 else ''}); "
            f"give this run another --name, or delete that folder"
        )
