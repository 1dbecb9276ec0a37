"""Sources: one module a kind of place that images come from."""

from __future__ import annotations

from maehpc import files
from maehpc.catalogue import Entry, catalogue
from maehpc.data.sources.cifar10 import Cifar10Source
from maehpc.data.sources.digits import DigitsSource
from maehpc.data.sources.folder import FolderSource
from maehpc.data.sources.medmnist import MedMnistSource
from maehpc.data.sources.npz import NpzSource
from maehpc.data.sources.raw import RawSplits, Source
from maehpc.errors import InputError

__all__ = ["RawSplits", "Source", "catalogue_source", "open_source"]


def catalogue_source(entry: Entry, size: int) -> Source:
    """The source of a catalogue set at one of its sizes, pixels."""
    if entry.origin == "medmnist":
        return MedMnistSource(entry, size)
    return Cifar10Source(entry) if entry.origin == "torchvision" else DigitsSource(entry)


def open_source(dataset: str, source_size: int) -> Source:
    """The source of a data set as a recipe gives it.

    Args:
        dataset: a catalogue name, the path of an .npz file, or a folder of images.
        source_size: side to read where there is a choice, pixels.

    Raises:
        InputError: `dataset` is none of these.
    """
    if entry := catalogue().get(dataset):
        return catalogue_source(entry, entry.size(source_size))
    path = files.user_path(dataset)
    if path.suffix.lower() == ".npz":
        return NpzSource(path)
    if dataset.strip() and (path.is_dir() or "/" in dataset):
        return FolderSource(path, source_size)
    raise InputError(
        f"there is no data set '{dataset}'; give one of {', '.join(catalogue())}, or the path of an .npz file or of "
        f"a folder of images"
    )
