"""CIFAR-10 (Krizhevsky 2009) in the folder that torchvision keeps, `cifar-10-batches-py`.

Its batches are pickles. They are read by an unpickler that knows uint8 arrays and nothing else, and builds them itself:
no file calls a function of numpy's, some of which corrupt memory when given a forged state.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maehpc.catalogue import Entry, SplitName
from maehpc.data.sources import search
from maehpc.data.sources.raw import Images, ImageStream, Labels, RawSplits, in_memory, one_line
from maehpc.data.subset import stratified_order
from maehpc.errors import InputError

FOLDER = "cifar-10-batches-py"
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
_REMEDY = "unpack cifar-10-python.tar.gz again"

_MEMO_OPCODES = frozenset({"PUT", "LONG_BINPUT"})
_MOST_TUPLES = 1000
"""A batch has some ten; Python itself overflows its stack on hashing tuples nested a hundred thousand deep."""


class _Admitted:
    """What a pickle may name. A pickle may set the state of anything it holds, so these take none."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes what it names")


class _ArrayClass(_Admitted):
    """Stands for `numpy.ndarray`, which is only ever passed on."""

    __slots__ = ()


class _DtypeClass(_Admitted):
    """Stands for `numpy.dtype`."""

    __slots__ = ()

    def __call__(self, code: object, *flags: object) -> _Uint8:
        if code != "u1" or flags != (0, 1):  # align, copy
            raise pickle.UnpicklingError(f"an array of {str(code)[:20]}, not uint8")
        return _Uint8()


class _Uint8:
    """Stands for numpy's dtype of one byte."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignores byte order, fields and flags: a byte has none."""


class _Array:
    """Stands for a numpy array while it is read; `values` are made here, from bytes of the right length alone."""

    __slots__ = ("values",)
    values: NDArray[np.uint8]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1 or not isinstance(state[2], _Uint8):
            raise pickle.UnpicklingError("an array of an unknown kind")
        _, shape, _, fortran, data = state
        # Python 2 wrote bytes as text, which arrives here as Latin-1.
        self.fill(data.encode("latin1") if isinstance(data, str) else data, shape, "F" if fortran else "C")

    def fill(self, data: object, shape: object, order: Literal["C", "F"]) -> None:
        """Takes the bytes once they are known to fit."""
        if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
            raise pickle.UnpicklingError("an array without a shape")
        if not isinstance(data, bytes | bytearray) or len(data) != math.prod(shape):
            raise pickle.UnpicklingError("an array whose bytes do not fit its shape")
        self.values = np.frombuffer(bytes(data), np.uint8).reshape(shape, order=order)


class _Reconstruct(_Admitted):
    """Stands for numpy's function of that name: an array that the pickle then fills."""

    __slots__ = ()

    def __call__(self, kind: object, shape: object, code: object) -> _Array:
        if not isinstance(kind, _ArrayClass):
            raise pickle.UnpicklingError("an array of a class of its own")
        return _Array()


class _FromBuffer(_Admitted):
    """Stands for `_frombuffer`, by which numpy writes arrays from protocol 5 on."""

    __slots__ = ()

    def __call__(self, data: object, dtype: object, shape: object, order: object) -> _Array:
        if not isinstance(dtype, _Uint8) or order not in ("C", "F"):
            raise pickle.UnpicklingError("an array of an unknown kind")
        array = _Array()
        array.fill(data, shape, "F" if order == "F" else "C")
        return array


class _Encode(_Admitted):
    """Stands for `_codecs.encode`, by which Python 3 writes bytes in old protocols."""

    __slots__ = ()

    def __call__(self, text: object, encoding: object) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes written as {str(encoding)[:20]}")
        return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], _Admitted] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy", "ndarray"): _ArrayClass(),
    ("numpy", "dtype"): _DtypeClass(),
    ("_codecs", "encode"): _Encode(),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return _ADMITTED[module, name]


def _check_opcodes(data: bytes) -> None:
    """Refuses what no batch holds and Python's own unpickler cannot bear: deep nesting and a boundless memo."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(data):
        tuples += "TUPLE" in opcode.name
        if tuples > _MOST_TUPLES or (opcode.name in _MEMO_OPCODES and int(argument or 0) > len(data)):
            raise pickle.UnpicklingError(f"it uses {opcode.name} beyond what a batch needs")


def _unpickled(data: bytes) -> Any:
    _check_opcodes(data)
    return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()


def _read_batch(path: Path) -> tuple[Images, Labels]:
    """One batch: uint8 [n, 32, 32, 3] and int64 [n]."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; {_REMEDY}")
    try:
        batch = _unpickled(path.read_bytes())
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may raise anything; none of it runs code of the file's
        raise InputError(f"{path} is not a batch of CIFAR-10 ({one_line(error)}); {_REMEDY}") from error
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise InputError(f"{path} has no 'data' and 'labels'; {_REMEDY}")
    data, numbers = getattr(batch["data"], "values", None), batch["labels"]
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
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
        """None: its name stands for the published set."""
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

        def images(split: SplitName) -> ImageStream:
            return in_memory(test_images if split == "test" else train_images[train if split == "train" else val])

        return RawSplits(
            name=self.name,
            title=self.entry.title,
            task=self.entry.task,
            classes=self.entry.classes,
            labels=labels,
            images=images,
            description="CIFAR-10 python batches; validation is a fixed class-balanced tenth of the train batches",
        )
