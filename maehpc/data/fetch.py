"""Downloading catalogue sets, through the downloaders of the packages that define them."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

from maehpc import files
from maehpc.catalogue import Entry, catalogue
from maehpc.data.sources import search
from maehpc.data.sources.cifar10 import FOLDER
from maehpc.data.sources.medmnist import file_name, md5_file, official_md5
from maehpc.data.sources.raw import one_line
from maehpc.errors import InputError, RunError


def _is_whole(entry: Entry, size: int, target: Path) -> bool:
    """Whether nothing is to be done; a file that was cut off is downloaded again."""
    if entry.origin == "medmnist":
        return target.is_file() and md5_file(target) == official_md5(entry.name, size)
    return target.is_dir()


def _download(entry: Entry, size: int, folder: Path) -> None:
    """Both downloaders check the publisher's MD5."""
    import torchvision

    from maehpc.upstream import INFO, medmnist

    if entry.origin == "medmnist":
        dataset = getattr(medmnist, INFO[entry.name]["python_class"])
        dataset(split="train", download=True, root=str(folder), size=size)
    else:
        torchvision.datasets.CIFAR10(str(folder), download=True)


def fetch(name: str, size: int = 28, root: Path | None = None) -> Path:
    """Downloads a catalogue set, whole or not at all.

    Args:
        name: the catalogue's name.
        size: side, pixels; ignored where there is only one.
        root: folder to put it in; MedMNIST's cache (`~/.medmnist`), where packing looks for it, where None.

    Returns:
        The file, or CIFAR-10's folder; one that is already there and whole stays as it is.

    Raises:
        InputError: there is nothing of that name and size to download.
        RunError: the download failed.
    """
    entry = catalogue().get(name)
    if entry is None:
        raise InputError(f"there is no data set '{name}' to fetch; choose one of {', '.join(catalogue())}")
    if entry.origin == "scikit-learn":
        raise InputError(f"{name} needs no fetching: it comes with scikit-learn; use it right away")
    size = entry.size(size)
    target = (root or search.cache_folder()) / (file_name(name, size) if entry.origin == "medmnist" else FOLDER)
    if _is_whole(entry, size, target):
        return target
    partial = files.partial_name(target)
    files.make_folder(partial)
    try:
        # medmnist and torchvision speak to stdout, which belongs to the command's own result.
        with contextlib.redirect_stdout(sys.stderr):
            _download(entry, size, partial)
        files.publish(partial / target.name, target)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"cannot download {name} ({size} pixels): {_reason(error)}; check the network, or put {target.name} into "
            f"{target.parent} by hand"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _reason(error: BaseException) -> str:
    """The first cause in a chain of exceptions; packages wrap it in pages of advice."""
    while error.__context__ is not None:
        error = error.__context__
    return one_line(error)
