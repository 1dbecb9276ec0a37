"""Files in MedMNIST's layout: {train,val,test}_images and {train,val,test}_labels in one .npz."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maehpc import files
from maehpc.data.catalogue import SPLITS, SplitName, dataset_name
from maehpc.data.sources.raw import Images, Labels, RawSplits, checked_images, checked_labels, one_line, plain_task
from maehpc.errors import InputError

LAYOUT = "{train,val,test}_images and {train,val,test}_labels"
_DAMAGE = (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of an .npz file with {LAYOUT}")
    with files.reading(path), path.open("rb") as handle:  # numpy would leave it open where the archive is damaged
        try:
            archive = np.load(handle, allow_pickle=False)
        except _DAMAGE as error:
            raise InputError(
                f"{path} is not a whole .npz file ({one_line(error)}); download or save it again"
            ) from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds one bare array; save an .npz with {LAYOUT}")
        with archive:
            yield archive


def _array(archive: Any, path: Path, name: str) -> NDArray[Any]:
    if name not in archive.files:
        raise InputError(f"{path} has no array {name}; save it with {LAYOUT}")
    try:
        array: NDArray[Any] = archive[name]
    except _DAMAGE as error:
        if "allow_pickle" in str(error):
            raise InputError(f"{path}: {name} holds Python objects; save it as a plain integer array") from error
        raise InputError(
            f"{path}: {name} cannot be read ({one_line(error)}); download or save the file again"
        ) from error
    return array


def read_labels(path: Path) -> dict[SplitName, Labels]:
    """The labels of all splits, checked against each other.

    Raises:
        InputError: a file, array, dtype, shape or value is wrong.
    """
    with _opened(path) as archive:
        labels = {
            split: checked_labels(_array(archive, path, f"{split}_labels"), f"{path}: {split}_labels")
            for split in SPLITS
        }
    for split in SPLITS[1:]:
        if labels[split].shape[1:] != labels["train"].shape[1:]:
            raise InputError(f"{path}: {split}_labels and train_labels differ in columns; give both the same")
    return labels


def read_images(path: Path, split: SplitName) -> Images:
    """One split's images, uint8 [N, H, W, C].

    Raises:
        InputError: a file, array, dtype or shape is wrong.
    """
    with _opened(path) as archive:
        return checked_images(_array(archive, path, f"{split}_images"), f"{path}: {split}_images")


@dataclass(frozen=True)
class NpzSource:
    """A user's own .npz file; classes are counted from its labels."""

    path: Path

    @property
    def name(self) -> str:
        """The file's stem, made safe."""
        return dataset_name(str(self.path))

    @property
    def pack_name(self) -> str:
        """The name alone: the file has one size, which only its bytes tell."""
        return self.name

    def where(self) -> str | None:
        """The file's path where it exists."""
        return str(self.path) if self.path.is_file() else None

    def fingerprint(self) -> str | None:
        """SHA-256 of the file."""
        if not self.path.is_file():
            return None
        with files.reading(self.path):
            return files.sha256_file(self.path)

    def read(self) -> RawSplits:
        """The file's splits.

        Raises:
            InputError: the file is absent or wrong.
        """
        labels = read_labels(self.path)
        multi = labels["train"].ndim == 2
        count = labels["train"].shape[1] if multi else 1 + max(int(values.max()) for values in labels.values())
        if count < 2:
            raise InputError(f"{self.path}: every label is 0; a classifier needs at least two classes")
        return RawSplits(
            name=self.name,
            title=self.path.stem,
            task="multi-label" if multi else plain_task(count),
            classes=tuple(map(str, range(count))),
            labels=labels,
            images=lambda split: read_images(self.path, split),
            description=f"file {self.path.name}",
            fingerprint=self.fingerprint(),
        )
