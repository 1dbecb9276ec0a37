"""CIFAR-10 (Krizhevsky 2009) in the folder that torchvision keeps, `cifar-10-batches-py`.

Its batches are pickles. They are read by an unpickler that knows numpy arrays and nothing else, so that no file can
make this process run anything.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from maehpc.data.catalogue import Entry, SplitName
from maehpc.data.sources import search
from maehpc.data.sources.raw import Images, Labels, RawSplits, one_line
from maehpc.data.subset import stratified_order
from maehpc.errors import InputError

FOLDER = "cifar-10-batches-py"
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
_REMEDY = "unpack cifar-10-python.tar.gz again"


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which Python 3 writes bytes in old pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding}")
    return text.encode("latin1")


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> Any:
    """Stands in for numpy's function of that name: an empty array, which the pickle then fills."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError("an array of a class of its own")
    return np.ndarray((0,), np.uint8)


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return _ADMITTED[module, name]


def _unpickled(handle: BinaryIO) -> Any:
    return _ArrayUnpickler(handle, encoding="latin1").load()


def _read_batch(path: Path) -> tuple[Images, Labels]:
    """One batch: uint8 [n, 32, 32, 3] and int64 [n]."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; {_REMEDY}")
    try:
        with path.open("rb") as handle:
            batch = _unpickled(handle)
    except Exception as error:  # a damaged pickle may raise anything; none of it runs code of the file's
        raise InputError(f"{path} is not a batch of CIFAR-10 ({one_line(error)}); {_REMEDY}") from error
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise InputError(f"{path} has no 'data' and 'labels'; {_REMEDY}")
    data, numbers = batch["data"], batch["labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise InputError(f"{path}: 'data' is not uint8 [n, 3072]; {_REMEDY}")
    if not isinstance(numbers, list) or len(numbers) != len(data):
        raise InputError(f"{path}: 'labels' does not hold one number an image; {_REMEDY}")
    if not all(type(number) is int and 0 <= number < 10 for number in numbers):
        raise InputError(f"{path}: 'labels' holds something else than 0 to 9; {_REMEDY}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(numbers, dtype=np.int64)


@dataclass(frozen=True)
class Cifar10Source:
    """CIFAR-10; a tenth of its train batches, balanced over the classes, serves as validation."""

    entry: Entry

    @property
    def name(self) -> str:
        """The catalogue's name."""
        return self.entry.name

    @property
    def pack_name(self) -> str:
        """Name and size."""
        return f"{self.name}-{self.entry.sizes[0]}"

    def where(self) -> str | None:
        """The folder's path where it was found."""
        path = search.find(FOLDER)
        return None if path is None else str(path)

    def fingerprint(self) -> str | None:
        """None: a published set does not change."""
        return None

    def read(self) -> RawSplits:
        """The train batches in file order without the validation tenth, that tenth, and the test batch.

        Raises:
            InputError: a file is absent or wrong.
        """
        folder = search.find(FOLDER)
        if folder is None:
            raise search.absent(f"the folder {FOLDER}", self.name, self.entry.sizes[0])
        batches = [_read_batch(folder / name) for name in TRAIN_BATCHES]
        train_images = np.concatenate([images for images, _ in batches])
        train_labels = np.concatenate([labels for _, labels in batches])
        test_images, test_labels = _read_batch(folder / TEST_BATCH)
        order = stratified_order(train_labels, 0, "cifar10 split")
        tenth = len(order) // 10
        val, train = np.sort(order[:tenth]), np.sort(order[tenth:])
        labels: dict[SplitName, Labels] = {
            "train": train_labels[train],
            "val": train_labels[val],
            "test": test_labels,
        }

        def images(split: SplitName) -> Images:
            return test_images if split == "test" else train_images[train if split == "train" else val]

        return RawSplits(
            name=self.name,
            title=self.entry.title,
            task=self.entry.task,
            classes=self.entry.classes,
            labels=labels,
            images=images,
            description="CIFAR-10 python batches; validation is a fixed class-balanced tenth of the train batches",
        )
