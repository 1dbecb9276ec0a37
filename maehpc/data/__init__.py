"""Data: a catalogue and its sources, HDF5 packs, and batches of images on the device."""

from maehpc.catalogue import SPLITS, Entry, SplitName, Task, catalogue, dataset_name
from maehpc.data.augment import CropFlip
from maehpc.data.fetch import fetch
from maehpc.data.loading import Split, open_split
from maehpc.data.order import epoch_order
from maehpc.data.pack import Pack, PackInfo
from maehpc.data.prepare import Availability, available, prepare, require
from maehpc.data.preprocess import Preprocess
from maehpc.data.subset import subset

__all__ = [
    "SPLITS",
    "Availability",
    "CropFlip",
    "Entry",
    "Pack",
    "PackInfo",
    "Preprocess",
    "Split",
    "SplitName",
    "Task",
    "available",
    "catalogue",
    "dataset_name",
    "epoch_order",
    "fetch",
    "open_split",
    "prepare",
    "require",
    "subset",
]
