"""Blocks of what a report has gathered: safetensors files with a checksum of each array, of which parts are read.

They are read without being mapped into memory: on a network's file system somebody else may replace one meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from maehpc import files

Arrays = dict[str, NDArray[Any]]

_TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "u1", "BOOL": "?"
    }.items()
}  # fmt: skip
_NAMES = {kind: name for name, kind in _TYPES.items()}


def write_block(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes a block, whole or not at all; it need not outlive a loss of power.

    Raises:
        RunError: the disk refused.
    """
    parts = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    header: dict[str, Any] = {
        "__metadata__": {name: _checksum(_bytes(values), values.dtype, values.shape) for name, values in parts.items()}
    }
    stop = 0
    for name, values in parts.items():
        start, stop = stop, stop + values.nbytes
        header[name] = {"dtype": _NAMES[values.dtype], "shape": values.shape, "data_offsets": (start, stop)}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with files.atomic_path(path, durable=False) as partial, partial.open("wb") as handle:
        handle.write(len(head).to_bytes(8, "little") + head)
        for values in parts.values():
            handle.write(_bytes(values).data)


def read_block(path: Path, names: Sequence[str] | None = None) -> Arrays:
    """Some arrays of a block, or all.

    Raises:
        ValueError: it is absent or damaged, or has no such array.
    """
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"{path} is damaged")
            header = json.loads(handle.read(length))
            sums = header.pop("__metadata__")
            found = {}
            for name in header if names is None else names:
                start, stop = header[name]["data_offsets"]
                handle.seek(8 + length + start)
                data = handle.read(stop - start)
                kind, shape = _TYPES[header[name]["dtype"]], tuple(header[name]["shape"])
                if _checksum(np.frombuffer(data, np.uint8), kind, shape) != sums[name]:
                    raise ValueError(f"{path} is damaged")
                found[name] = np.frombuffer(data, kind).reshape(shape)
            return found
    except (OSError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is absent or damaged") from error


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


def _checksum(data: NDArray[np.uint8], kind: np.dtype[Any], shape: tuple[int, ...]) -> str:
    return f"{crc32c(data):08x} {kind.name} {shape}"
