"""The data sets known by name, and the names of those that are given by path.

It stands below `data`, so that a command that only asks how many images there are need not wait for PyTorch.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from maehpc import files
from maehpc.errors import InputError

Task = Literal["multi-class", "binary-class", "ordinal-regression", "multi-label"]
SplitName = Literal["train", "val", "test"]

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
MEDMNIST_SIZES = (28, 64, 128, 224)

_MEDMNIST_TASKS: dict[str, Task] = {
    "multi-class": "multi-class",
    "binary-class": "binary-class",
    "ordinal-regression": "ordinal-regression",
    "multi-label, binary-class": "multi-label",
}
_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclass(frozen=True)
class Entry:
    """One data set of the catalogue.

    Attributes:
        name: what a recipe calls it.
        title: what a figure calls it.
        task: how its labels are to be read.
        classes: class names by label.
        channels: 1 for grey, 3 for RGB.
        sizes: sides it exists at, pixels.
        counts: images a split.
        origin: the package that defines its files.
    """

    name: str
    title: str
    task: Task
    classes: tuple[str, ...]
    channels: int
    sizes: tuple[int, ...]
    counts: dict[SplitName, int]
    origin: Literal["medmnist", "torchvision", "scikit-learn"]

    def size(self, source_size: int) -> int:
        """The side read when a recipe asks for `source_size`: the only one there is, or the one asked for.

        Raises:
            InputError: the set does not exist at that size.
        """
        if len(self.sizes) == 1:
            return self.sizes[0]
        if source_size not in self.sizes:
            raise InputError(
                f"{self.name} does not exist at {source_size} pixels; set data.source_size to one of "
                f"{', '.join(map(str, self.sizes))}"
            )
        return source_size


def _medmnist_info() -> dict[str, dict[str, Any]]:
    """MedMNIST's own table. Its module is run alone: the package around it imports PyTorch, pandas and scikit-learn."""
    package = importlib.util.find_spec("medmnist")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(next(iter(package.submodule_search_locations))) / "info.py"
    spec = importlib.util.spec_from_file_location("medmnist_info", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    info: dict[str, dict[str, Any]] = module.INFO
    return info


def _medmnist_entry(name: str, info: dict[str, Any]) -> Entry:
    return Entry(
        name=name,
        title=info["python_class"],
        task=_MEDMNIST_TASKS[info["task"]],
        classes=tuple(info["label"][label] for label in sorted(info["label"], key=int)),
        channels=info["n_channels"],
        sizes=MEDMNIST_SIZES,
        counts={split: info["n_samples"][split] for split in SPLITS},
        origin="medmnist",
    )


@cache
def catalogue() -> dict[str, Entry]:
    """Every known data set by name: the twelve 2-D sets of MedMNIST v2, CIFAR-10, and scikit-learn's digits."""
    entries = [_medmnist_entry(name, info) for name, info in _medmnist_info().items() if not name.endswith("3d")]
    entries.append(
        Entry(
            name="cifar10",
            title="CIFAR-10",
            task="multi-class",
            classes=_CIFAR10_CLASSES,
            channels=3,
            sizes=(32,),
            counts={"train": 45000, "val": 5000, "test": 10000},
            origin="torchvision",
        )
    )
    entries.append(
        Entry(
            name="digits",
            title="Digits",
            task="multi-class",
            classes=tuple(map(str, range(10))),
            channels=1,
            sizes=(8,),
            counts={"train": 1197, "val": 200, "test": 400},
            origin="scikit-learn",
        )
    )
    return {entry.name: entry for entry in entries}


def dataset_name(text: str) -> str:
    """The folder name of a data set as a recipe gives it: safe on any file system, `[a-z0-9_-]` alone.

    A path gives its file stem or folder name. One that would read like a catalogue name gets the ending `-own`, so
    that a user's file is never taken for the published set.

    Raises:
        InputError: the path has no name of its own.
    """
    if text in catalogue():
        return text
    path = files.user_path(text).absolute()
    stem = path.stem if path.suffix.lower() == ".npz" else path.name
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-")
    if not name:
        raise InputError(f"data set '{text}' gives no name to its results; rename it to letters and digits")
    return f"{name}-own" if name in catalogue() else name
