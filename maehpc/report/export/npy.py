"""NumPy's own files: an array each, a row an image, to be mapped into memory (`np.load(mmap_mode="r")`).

Rows are appended through plain writes, shard by shard, and the header's count of them is set at the end: NumPy pads its
header for that. So memory holds one shard; shards that turn out damaged leave no gap; and a full disk is an error that
can be told, where a memory map of the final size ends the process (SIGBUS).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from maehpc import files
from maehpc.maps.layout import IMAGE, ArrayLayout
from maehpc.report.export.chosen import Chosen, Part
from maehpc.report.export.formats import Write

_INDICES = ArrayLayout((), (), "int64")


def check(chosen: Chosen) -> None:
    """Refuses nothing: any array can be written."""


def arrays(chosen: Chosen) -> list[str]:
    """Every array but those of methods that were not chosen; names of methods have no `_`."""
    left_out = set(chosen.attributes.methods) - set(chosen.methods)
    return [name for name in chosen.store.layout.arrays if name.partition("_")[0] not in left_out]


def count(chosen: Chosen, images: int) -> int:
    """One an array and one for the images' indices, however many images there are."""
    return len(arrays(chosen)) + 1 if images else 0


@contextmanager
def writing(folder: Path, chosen: Chosen) -> Iterator[Write]:
    """Takes the place of an earlier export of the store; see `maehpc.report.export` for the order."""
    layouts = {IMAGE: _INDICES, **{name: chosen.store.layout.arrays[name] for name in arrays(chosen)}}
    with ExitStack() as renames:  # undone from the last to the first: the images' indices come last
        columns = {
            name: renames.enter_context(_column(folder / f"{name}.npy", layout)) for name, layout in layouts.items()
        }

        def write(part: Part) -> None:
            columns[IMAGE].append(np.array(part.images, np.int64))
            for name, values in part.arrays.items():
                columns[name].append(values)

        yield write
        for column in columns.values():
            column.finish()
        for name in (IMAGE, *(name for name in chosen.store.layout.arrays if name not in layouts)):
            path = folder / f"{name}.npy"
            with files.writing(path):
                path.unlink(missing_ok=True)


@contextmanager
def _column(path: Path, layout: ArrayLayout) -> Iterator[_Column]:
    with files.atomic_path(path) as partial:
        yield _Column(path, partial, layout)


class _Column:
    """A .npy file that grows by rows under a temporary name."""

    def __init__(self, path: Path, partial: Path, layout: ArrayLayout) -> None:
        self._path, self._partial = path, partial
        self._dtype, self._shape = np.dtype(layout.dtype), layout.shape
        self._rows = 0
        with files.writing(path), partial.open("wb") as handle:
            self._write_header(handle)

    def append(self, values: NDArray[Any]) -> None:
        """Adds rows [n, *shape]."""
        with files.writing(self._path), self._partial.open("ab") as handle:
            handle.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self._rows += len(values)

    def finish(self) -> None:
        """Says in the header how many rows there are."""
        with files.writing(self._path), self._partial.open("r+b") as handle:
            self._write_header(handle)

    def _write_header(self, handle: BinaryIO) -> None:
        descr = npy_format.dtype_to_descr(self._dtype)
        shape = (self._rows, *self._shape)
        npy_format.write_array_header_1_0(handle, {"descr": descr, "fortran_order": False, "shape": shape})
