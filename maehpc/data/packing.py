"""Writing packs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from numpy.typing import NDArray

from maehpc import files
from maehpc.catalogue import SPLITS, SplitName
from maehpc.data.pack import FORMAT, ArrayDigest
from maehpc.data.sources.raw import Images, ImageStream, RawSplits
from maehpc.errors import InputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Statistics:
    """Exact mean and standard deviation of uint8 pixels, from counts of their values."""

    def __init__(self, channels: int):
        self._channels = [np.zeros(256, dtype=np.int64) for _ in range(channels)]
        self._sums = np.zeros(255 * channels + 1, dtype=np.int64)

    def update(self, images: Images) -> None:
        for channel, counts in enumerate(self._channels):
            counts += np.bincount(images[..., channel].ravel(), minlength=len(counts))
        self._sums += np.bincount(images.sum(axis=3, dtype=np.int64).ravel(), minlength=len(self._sums))

    @staticmethod
    def _moments(counts: NDArray[np.int64]) -> tuple[float, float]:
        """Mean and standard deviation, both in [0, 1]; integers until the last step, so they are exact."""
        number = int(counts.sum())
        total = sum(value * int(count) for value, count in enumerate(counts))
        squares = sum(value * value * int(count) for value, count in enumerate(counts))
        highest = len(counts) - 1
        return total / (number * highest), ((number * squares - total * total) / (number * highest) ** 2) ** 0.5

    def channels(self) -> tuple[list[float], list[float]]:
        """Means and standard deviations a channel."""
        moments = [self._moments(counts) for counts in self._channels]
        return [mean for mean, _ in moments], [std for _, std in moments]

    def grey(self) -> tuple[float, float]:
        """Mean and standard deviation of the average over channels."""
        return self._moments(self._sums)


def _checked(raw: RawSplits, split: SplitName, shape: tuple[int, ...] | None) -> ImageStream:
    """One split's images, held to its labels and to the other splits."""
    images, labels = raw.images(split), raw.labels[split]
    if images.shape[0] != len(labels):
        raise InputError(
            f"{raw.description}: {split} has {images.shape[0]} images but {len(labels)} labels; give one label an image"
        )
    if shape is not None and images.shape[1:] != shape:
        raise InputError(
            f"{raw.description}: {split} images are {images.shape[1:]}, those of train {shape}; give all the same shape"
        )
    highest = 1 if labels.ndim == 2 else len(raw.classes) - 1
    if labels.min() < 0 or labels.max() > highest:
        raise InputError(
            f"{raw.description}: {split} holds a label outside 0 to {highest}; mend the labels or download it again"
        )
    if labels.ndim == 2 and labels.shape[1] != len(raw.classes):
        raise InputError(f"{raw.description}: {split} has {labels.shape[1]} label columns, not {len(raw.classes)}")
    return images


class _Sink(io.FileIO):
    """The file that HDF5 writes to. HDF5 cannot close a file after a failed write, so it is never told of one."""

    def __init__(self, path: Path):
        super().__init__(path, "w+")
        self._error: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        """Writes all of `data`; notes the first failure and drops everything after it."""
        rest = memoryview(data)
        size = rest.nbytes
        while self._error is None and rest.nbytes:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self._error = error
        return size

    def check(self) -> None:
        """Raises the first failure, if any."""
        if self._error is not None:
            raise self._error


def _write(handle: h5py.File, raw: RawSplits, sink: _Sink) -> None:
    digest = ArrayDigest()
    shape: tuple[int, ...] | None = None
    for split in SPLITS:
        images, labels = _checked(raw, split, shape), raw.labels[split]
        shape = images.shape[1:]
        group = handle.create_group(split)
        stored = group.create_dataset("images", images.shape, np.uint8, chunks=(1, *shape), fletcher32=True)
        digest.begin(f"{split}/images", images.shape, stored.dtype)
        statistics = _Statistics(shape[2])
        written = 0
        for block in images.blocks:
            try:
                stored[written : written + len(block)] = block
            except OSError as error:
                if error.errno is None and "allocation failed" in str(error):  # HDF5 has no word of its own for it
                    raise MemoryError(str(error)) from error
                raise
            sink.check()
            written += len(block)
            digest.update(block)
            if split == "train":
                statistics.update(block)
        assert written == images.shape[0]
        if split == "train":
            handle.attrs["mean"], handle.attrs["std"] = statistics.channels()
            handle.attrs["grey_mean"], handle.attrs["grey_std"] = statistics.grey()
        group.create_dataset("labels", data=labels, chunks=labels.shape, fletcher32=True)
        digest.begin(f"{split}/labels", labels.shape, labels.dtype)
        digest.update(labels)
    text = {"name": raw.name, "title": raw.title, "task": raw.task, "source": raw.description}
    text["digest"] = digest.hexdigest()
    if raw.fingerprint is not None:
        text["fingerprint"] = raw.fingerprint
    # Strings of fixed length lie in the object header, which HDF5 checksums; its heap of variable ones has no checksum.
    for key, value in text.items():
        handle.attrs[key] = np.bytes_(value.encode())
    handle.attrs["classes"] = np.array([label.encode() for label in raw.classes])
    handle.attrs["format"] = FORMAT


def write_pack(path: Path, raw: RawSplits) -> None:
    """Packs a data set into one HDF5 file, whole or not at all.

    Raises:
        InputError: the source's arrays do not fit together.
        RunError: the file cannot be written.
    """
    with files.atomic_path(path) as partial, _Sink(partial) as sink:
        # The v110 format indexes chunks by a flat array: a quarter of a million of them stay quick to look up.
        with h5py.File(sink, "w", libver=("v110", "v110")) as handle:
            _write(handle, raw, sink)
        sink.check()
