"""Files in MedMNIST's layout: {train,val,test}_images and {train,val,test}_labels in one .npz."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from maehpc import files
from maehpc.catalogue import SPLITS, SplitName, dataset_name
from maehpc.data.blocks import blocks
from maehpc.data.sources.raw import (
    Images,
    ImageStream,
    Labels,
    RawSplits,
    checked_image_shape,
    checked_labels,
    one_line,
    plain_task,
)
from maehpc.errors import InputError

LAYOUT = "{train,val,test}_images and {train,val,test}_labels"
_DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def _require(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of an .npz file with {LAYOUT}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _require(path)
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


class _Member:
    """One array of an archive, whose bytes are read in order."""

    def __init__(self, handle: IO[bytes], size: int, where: str):
        """Reads the header of the `.npy` that `handle` gives, `size` bytes in all.

        Raises:
            InputError: it is damaged, or holds Python objects.
        """
        self._handle = handle
        self.where = where
        with self._told():
            version = npy.read_magic(handle)
            header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            self.shape, self.fortran, self.dtype = header(handle)
            if self.dtype.hasobject:
                raise InputError(f"{where} holds Python objects; save it as a plain integer array")
            # Held to the archive's own size, so that a damaged header cannot ask for more memory than there is.
            if handle.tell() + math.prod(self.shape) * self.dtype.itemsize != size:
                raise ValueError("its header does not fit its size")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise InputError(
                f"{self.where} cannot be read ({one_line(error)}); download or save the file again"
            ) from error

    def read(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The next bytes as an array, in C order.

        Raises:
            InputError: they are damaged or end too early.
        """
        size = math.prod(shape) * self.dtype.itemsize
        with self._told():
            data = self._handle.read(size)
            if len(data) != size:
                raise EOFError("it ends too early")
            return np.frombuffer(data, self.dtype).reshape(shape)

    def whole(self) -> NDArray[Any]:
        """All of it, whatever its order in memory.

        Raises:
            InputError: it is damaged.
        """
        array = self.read(self.shape[::-1]).T if self.fortran else self.read(self.shape)
        self.end()
        return array

    def end(self) -> None:
        """Reads past the last byte, where the archive holds all of them to its checksum.

        Raises:
            InputError: they do not match it.
        """
        with self._told():
            self._handle.read(1)


@contextmanager
def _member(path: Path, name: str) -> Iterator[_Member]:
    where = f"{path}: {name}"
    with _opened(path) as archive:
        try:
            info = archive.zip.getinfo(f"{name}.npy")
        except KeyError as error:
            raise InputError(f"{path} has no array {name}; save it with {LAYOUT}") from error
        try:
            handle = archive.zip.open(info)
        except _DAMAGE as error:
            raise InputError(f"{where} cannot be read ({one_line(error)}); download or save the file again") from error
        with handle:
            yield _Member(handle, info.file_size, where)


def read_labels(path: Path) -> dict[SplitName, Labels]:
    """The labels of all splits, checked against each other.

    Raises:
        InputError: a file, array, dtype, shape or value is wrong.
    """
    labels: dict[SplitName, Labels] = {}
    for split in SPLITS:
        with _member(path, f"{split}_labels") as member:
            labels[split] = checked_labels(member.whole(), member.where)
    for split in SPLITS[1:]:
        if labels[split].shape[1:] != labels["train"].shape[1:]:
            raise InputError(f"{path}: {split}_labels and train_labels differ in columns; give both the same")
    return labels


def open_images(path: Path, split: SplitName) -> ImageStream:
    """One split's images; the file is read as they are taken, and damage to it is told then.

    Raises:
        InputError: a file, array, dtype or shape is wrong.
    """
    name = f"{split}_images"
    with _member(path, name) as member:
        shape = checked_image_shape(member.shape, member.dtype, member.where)
    return ImageStream(shape, _image_blocks(path, name, shape))


def _image_blocks(path: Path, name: str, shape: tuple[int, int, int, int]) -> Iterator[Images]:
    with _member(path, name) as member:
        if member.fortran:  # its first image ends with the file's last bytes
            whole = member.whole().reshape(shape)
            yield from (whole[part] for part in blocks(shape[0], math.prod(shape[1:])))
            return
        for part in blocks(shape[0], math.prod(shape[1:])):
            yield member.read((part.stop - part.start, *shape[1:]))
        member.end()


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
        """The name and the kind: the file has one size, which only its bytes tell."""
        return f"{self.name}-npz"

    def where(self) -> str | None:
        """The file's path where it exists."""
        return str(self.path) if self.path.is_file() else None

    def fingerprint(self) -> str:
        """SHA-256 of the file.

        Raises:
            InputError: the file is absent.
        """
        _require(self.path)
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
            images=lambda split: open_images(self.path, split),
            description=f"file {self.path.name}",
            fingerprint=self.fingerprint(),
        )
