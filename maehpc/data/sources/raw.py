"""What every source gives: uint8 images and int64 labels of three splits, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from maehpc.catalogue import SplitName, Task
from maehpc.data.blocks import blocks
from maehpc.errors import InputError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

MOST_CLASSES = 10_000


@dataclass(frozen=True)
class ImageStream:
    """One split's images, read as they are asked for.

    Attributes:
        shape: N, H, W, C with C in {1, 3}.
        blocks: uint8 [n, H, W, C] each, N images in all; may be taken once.
    """

    shape: tuple[int, int, int, int]
    blocks: Iterator[Images]


def in_memory(images: Images) -> ImageStream:
    """An array uint8 [N, H, W, C] as a stream."""
    count, height, width, channels = images.shape
    image_bytes = height * width * channels
    return ImageStream((count, height, width, channels), (images[part] for part in blocks(count, image_bytes)))


@dataclass(frozen=True)
class RawSplits:
    """A data set before packing.

    Attributes:
        name: as in `dataset_name`.
        title: for figures.
        task: how labels are to be read.
        classes: class names by label.
        labels: int64 [N], or [N, K] of 0 and 1 for a multi-label task, a split.
        images: opens one split's images.
        description: where the images come from and how they were split, in words.
        fingerprint: as `Source.fingerprint` gives it.
    """

    name: str
    title: str
    task: Task
    classes: tuple[str, ...]
    labels: dict[SplitName, Labels]
    images: Callable[[SplitName], ImageStream]
    description: str
    fingerprint: str | None = None


class Source(Protocol):
    """A place to read a data set from; making one touches no file."""

    @property
    def name(self) -> str:
        """The data set's name."""

    @property
    def pack_name(self) -> str:
        """The stem of its pack's file."""

    def where(self) -> str | None:
        """Where its bytes lie now, None where they are absent."""

    def fingerprint(self) -> str | None:
        """What a pack made from this source must carry to serve in its place; None where only a name tells it.

        A published set has the publisher's checksum, whether its file is there or not. A set given by its path has the
        digest of the bytes that lie there now.

        Raises:
            InputError: the path holds nothing.
        """

    def read(self) -> RawSplits:
        """The images and labels.

        Raises:
            InputError: the source is absent or wrong.
        """


def one_line(error: BaseException) -> str:
    """What a library said, fit for the inside of a sentence."""
    return " ".join(str(error).split()) or type(error).__name__


def plain_task(classes: int) -> Task:
    """The task of a single-label set that says nothing else about itself."""
    return "binary-class" if classes == 2 else "multi-class"


def checked_image_shape(shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> tuple[int, int, int, int]:
    """N, H, W, C of an array of images; grey [N, H, W] gets its channel.

    Args:
        shape: of the array in the file.
        dtype: likewise.
        where: the file and array, for the sentence.

    Raises:
        InputError: the dtype or shape is not that of images.
    """
    if dtype != np.uint8:
        raise InputError(f"{where} is {dtype}; save the images as uint8 from 0 to 255")
    count, height, width, channels = (*shape, 1) if len(shape) == 3 else shape if len(shape) == 4 else (0, 0, 0, 0)
    if channels not in (1, 3) or 0 in (count, height, width):
        raise InputError(f"{where} has shape {shape}; give at least one image as [N, H, W] or [N, H, W, 3]")
    return count, height, width, channels


def checked_labels(array: NDArray[Any], where: str) -> Labels:
    """`array` as int64 [N], or [N, K] of 0 and 1 where it has more than one column.

    Args:
        array: labels as a file gave them.
        where: the file and array, for the sentence.

    Raises:
        InputError: the dtype, shape or values are not those of labels.
    """
    if array.dtype.kind not in "iub":
        raise InputError(f"{where} is {array.dtype}; save the labels as integers")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2) or 0 in array.shape:
        shapes = "[N] or [N, 1], or [N, K] for multi-label"
        raise InputError(f"{where} has shape {array.shape}; give at least one label, as {shapes}")
    highest = 1 if array.ndim == 2 else MOST_CLASSES - 1
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > highest:
        meaning = "multi-label columns hold 0 or 1" if array.ndim == 2 else f"classes go from 0 to {highest} at most"
        raise InputError(f"{where} holds label {low if low < 0 else high}; {meaning}")
    return array.astype(np.int64)
