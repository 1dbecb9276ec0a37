"""Packs: one HDF5 file a data set, the form in which every stage reads images.

NAME.h5
  attributes   format, name, title, task, classes, mean, std, grey_mean, grey_std, source, fingerprint, digest
  train/       images uint8 [N, H, W, C], one image a chunk;  labels int64 [N] or [N, K], one chunk
  val/ test/   the same

Every chunk carries a Fletcher-32 checksum, so a damaged image cannot be read as if it were whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast, get_args

import h5py
import numpy as np
from numpy.typing import NDArray

from maehpc.catalogue import SPLITS, SplitName, Task
from maehpc.data.blocks import blocks
from maehpc.data.sources.raw import Images, Labels, one_line
from maehpc.errors import InputError

FORMAT = 2

_REMEDY = "delete it and run the command again"


class OlderFormatError(InputError):
    """A pack was written by an earlier version; its source gives it anew."""


@dataclass(frozen=True)
class PackInfo:
    """What a pack holds.

    Attributes:
        name: as in `dataset_name`.
        title: for figures.
        task: how labels are to be read.
        classes: class names by label.
        digest: SHA-256 over names, shapes, dtypes and bytes of all arrays.
        mean: a channel, of the train split's pixels in [0, 1].
        std: a channel, likewise (population standard deviation).
        counts: images a split.
        shape: height, width, channels.
        grey_mean: mean of the train split's pixels averaged over channels.
        grey_std: their standard deviation.
        source: where the images came from, in words.
        fingerprint: of the source, where it had one.
    """

    name: str
    title: str
    task: Task
    classes: tuple[str, ...]
    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[SplitName, int]
    shape: tuple[int, int, int]
    grey_mean: float | None = None
    grey_std: float | None = None
    source: str = ""
    fingerprint: str | None = None


class ArrayDigest:
    """SHA-256 over named arrays, fed a block at a time."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def begin(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Announces the array whose bytes follow."""
        self._hash.update(f"{name} {','.join(map(str, shape))} {dtype.str}\n".encode())

    def update(self, block: NDArray[Any]) -> None:
        """Adds the next bytes, in C order."""
        self._hash.update(np.ascontiguousarray(block).data)

    def hexdigest(self) -> str:
        """The digest so far."""
        return self._hash.hexdigest()


class Pack:
    """A pack opened for reading; the file is opened once a process, so a pack may be forked or pickled."""

    def __init__(self, path: Path):
        """Opens the pack and reads what it holds.

        Raises:
            OlderFormatError: it was written by an earlier version.
            InputError: the file is absent, unreadable, not a pack, damaged, or of a later version.
        """
        self.path = path
        self._file: h5py.File | None = None
        self._process = 0
        self._digest: bytes | None = None
        try:
            self.info = self._read_info()
            self._digest = self.info.digest.encode()
        except InputError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": 0}

    def close(self) -> None:
        """Closes the file; a later read opens it again."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def _opened(self) -> h5py.File:
        if self._file is None or self._process != os.getpid():
            if not self.path.is_file():
                raise InputError(f"{self.path} does not exist; run `maehpc data pack` first")
            try:
                # A pack never changes under its name, and many cluster file systems know no locks.
                self._file = h5py.File(self.path, "r", locking=False)
            except PermissionError as error:
                raise InputError(f"cannot read {self.path}: permission is denied; make it readable") from error
            except OSError as error:
                raise self._damaged(one_line(error)) from error
            self._process = os.getpid()
            if self._digest not in (None, self._file.attrs.get("digest")):
                self.close()
                raise InputError(f"{self.path} was packed anew from other images meanwhile; run the command again")
        return self._file

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tells what HDF5 says about damaged bytes in one sentence."""
        try:
            yield
        except (KeyError, AttributeError, TypeError, ValueError, OSError, RuntimeError) as error:
            raise self._damaged(one_line(error)) from error

    def _damaged(self, error: str) -> InputError:
        return InputError(f"{self.path} is no whole pack ({error}); {_REMEDY}")

    def _read_info(self) -> PackInfo:
        with self._reading():
            handle = self._opened()
            attributes = dict(handle.attrs)
            found = attributes.get("format")
            if found in range(1, FORMAT):
                raise OlderFormatError(
                    f"{self.path} has pack format {found}, not {FORMAT}; run `maehpc data pack` where its source is"
                )
            if found != FORMAT:
                raise InputError(f"{self.path} has pack format {found}, not {FORMAT}; {_REMEDY}")
            shape = handle["train"]["images"].shape[1:]
            counts: dict[SplitName, int] = {}
            for split in SPLITS:
                images, labels = handle[split]["images"], handle[split]["labels"]
                if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
                    raise self._damaged(f"{split}/images is not uint8 [N, H, W, C]")
                if labels.dtype != np.int64 or len(labels) != len(images):
                    raise self._damaged(f"{split}/labels does not hold one label an image")
                counts[split] = len(images)
            task = cast(Task, attributes["task"].decode())
            if task not in get_args(Task):
                raise self._damaged(f"its task '{task}' is unknown")
            return PackInfo(
                name=attributes["name"].decode(),
                title=attributes["title"].decode(),
                task=task,
                classes=tuple(label.decode() for label in attributes["classes"]),
                digest=attributes["digest"].decode(),
                mean=tuple(attributes["mean"].tolist()),
                std=tuple(attributes["std"].tolist()),
                counts=counts,
                shape=shape,
                grey_mean=float(attributes["grey_mean"]),
                grey_std=float(attributes["grey_std"]),
                source=attributes["source"].decode(),
                fingerprint=attributes["fingerprint"].decode() if "fingerprint" in attributes else None,
            )

    def labels(self, split: SplitName) -> Labels:
        """One split's labels: int64 [N], or [N, K] for a multi-label task."""
        with self._reading():
            labels: Labels = self._opened()[split]["labels"][:]
        return labels

    def images(self, split: SplitName, indices: Labels | slice | None = None) -> Images:
        """Images of one split in the order asked for.

        Args:
            split: train, val or test.
            indices: int64 [n] in any order, a slice, or None for all.

        Returns:
            uint8 [n, H, W, C].

        Raises:
            IndexError: an index lies outside the split.
            InputError: the file is damaged.
        """
        if isinstance(indices, np.ndarray):
            count = self.info.counts[split]
            if len(indices) and not 0 <= indices.min() <= indices.max() < count:
                raise IndexError(f"{self.path}: {split} holds images 0 to {count - 1}")
        images: Images
        with self._reading():
            stored = self._opened()[split]["images"]
            if not isinstance(indices, np.ndarray):
                images = stored[indices or slice(None)]
                return images
            # One read an image: HDF5's own selection of many points takes twenty times as long.
            images = np.empty((len(indices), *self.info.shape), dtype=np.uint8)
            for position, index in enumerate(indices):
                images[position] = stored[index]
        return images

    def verify(self) -> None:
        """Reads every byte and holds it to the digest.

        Raises:
            InputError: the bytes are not those that were packed.
        """
        digest = ArrayDigest()
        image_bytes = int(np.prod(self.info.shape))
        for split in SPLITS:
            count = self.info.counts[split]
            digest.begin(f"{split}/images", (count, *self.info.shape), np.dtype(np.uint8))
            for part in blocks(count, image_bytes):
                digest.update(self.images(split, part))
            labels = self.labels(split)
            digest.begin(f"{split}/labels", labels.shape, labels.dtype)
            digest.update(labels)
        if digest.hexdigest() != self.info.digest:
            raise InputError(f"{self.path} does not match its digest: its bytes have changed; {_REMEDY}")
