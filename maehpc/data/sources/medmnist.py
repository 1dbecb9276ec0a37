"""The official MedMNIST files (Yang et al. 2023), told by their MD5."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from maehpc import files
from maehpc.catalogue import Entry
from maehpc.data.sources import search
from maehpc.data.sources.npz import open_images, read_labels
from maehpc.data.sources.raw import RawSplits
from maehpc.errors import InputError


def file_name(name: str, size: int) -> str:
    """The official file's name: no number for 28 pixels."""
    return f"{name}.npz" if size == 28 else f"{name}_{size}.npz"


def official_md5(name: str, size: int) -> str:
    """The MD5 that MedMNIST publishes for a file."""
    from maehpc.upstream import INFO

    return str(INFO[name]["MD5" if size == 28 else f"MD5_{size}"])


def md5_file(path: Path) -> str:
    """MD5 (hex) of a file's bytes, the checksum that MedMNIST publishes."""
    with files.reading(path), path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@dataclass(frozen=True)
class MedMnistSource:
    """One MedMNIST set at one size."""

    entry: Entry
    size: int

    @property
    def name(self) -> str:
        """The catalogue's name."""
        return self.entry.name

    @property
    def pack_name(self) -> str:
        """Name and size."""
        return f"{self.name}-{self.size}"

    @property
    def file_name(self) -> str:
        """The official file's name."""
        return file_name(self.name, self.size)

    def where(self) -> str | None:
        """The file's path where it was found."""
        path = search.find(self.file_name)
        return None if path is None else str(path)

    def fingerprint(self) -> str:
        """The MD5 that MedMNIST publishes: its pack serves without the file."""
        return f"md5:{official_md5(self.name, self.size)}"

    def read(self) -> RawSplits:
        """The official splits.

        Raises:
            InputError: the file is absent, or not the official one.
        """
        path = search.find(self.file_name)
        if path is None:
            raise search.absent(self.file_name, self.name, self.size)
        if not path.is_file():
            raise InputError(f"{path} is not a file; put MedMNIST's own {self.file_name} there")
        expected, actual = official_md5(self.name, self.size), md5_file(path)
        if actual != expected:
            raise InputError(
                f"{path} is not MedMNIST's {self.file_name} (its MD5 is {actual}, not {expected}): the download was "
                f"cut off or it is another file; download it again, or give a file of your own by its path"
            )
        return RawSplits(
            name=self.name,
            title=self.entry.title,
            task=self.entry.task,
            classes=self.entry.classes,
            labels=read_labels(path),
            images=lambda split: open_images(path, split),
            description=f"MedMNIST v2, {self.file_name}, official splits",
            fingerprint=self.fingerprint(),
        )
