"""Where everything of an experiment lies. Folders are listed here; no file is read or written.

results/NAME/
  recipe.yaml  provenance.json
  pretrain/DATASET/   stage.json metrics.jsonl speed.jsonl tensorboard/ checkpoints/ … done.json
  finetune/DATASET/   the same, and the classifier
  maps/DATASET.zarr   explanations
  pool.jsonl          what a pool of workers did
  ledger/DATASET/     store.json, attempts/, one record a finished shard
  report/             tables and figures
  export/DATASET/     explanations in other formats
  .pool/ .runs/       what a pool, and runs in terminals, tell while they are at work
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maehpc import files


@dataclass(frozen=True)
class Experiment:
    """The folder of one experiment."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        """Code, packages, machine and data of every run."""
        return self.root / "provenance.json"

    @property
    def pool_log(self) -> Path:
        """What pools of workers did, event by event."""
        return self.root / "pool.jsonl"

    @property
    def pool(self) -> Path:
        """Where a pool that is at work can be found."""
        return self.root / ".pool"

    @property
    def runs(self) -> Path:
        """What runs in terminals tell of themselves while they last."""
        return self.root / ".runs"

    def stage(self, stage: str, dataset: str) -> Path:
        """The folder of a training stage (`pretrain`, `finetune`) on one data set."""
        return self.root / stage / dataset

    def maps(self, dataset: str) -> Path:
        """The Zarr group of one data set's explanations."""
        return self.root / "maps" / f"{dataset}.zarr"

    def ledger(self, dataset: str) -> Path:
        """The ledger of that group."""
        return self.root / "ledger" / dataset

    @property
    def exports(self) -> Path:
        """Explanations in other formats, a folder a data set."""
        return self.root / "export"

    def mapped_datasets(self) -> list[str]:
        """Names of the data sets that have a ledger, sorted; see `datasets_of`."""
        return self.datasets_of("ledger")

    def datasets_of(self, stage: str) -> list[str]:
        """Names of the data sets that have a folder of `stage`, sorted.

        Raises:
            RunError: that folder may not be read.
        """
        folder = self.root / stage
        with files.reading(folder):
            return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def experiment_of(maps: Path) -> Experiment:
    """The experiment that a Zarr group of explanations belongs to."""
    return Experiment(maps.parent.parent)


def find_experiments(root: Path) -> list[Experiment]:
    """Experiments at or below `root` (folders that hold a recipe.yaml), sorted by path."""
    if (root / "recipe.yaml").is_file():
        return [Experiment(root)]
    return [
        Experiment(path.parent) for path in sorted(root.glob("*/recipe.yaml")) + sorted(root.glob("*/*/recipe.yaml"))
    ]
