"""Files of tensors: safetensors written whole or not at all, and checkpoints read without running what is in them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from maehpc import files
from maehpc.errors import InputError

WRAPPING_KEYS = ("model", "state_dict")
"""Under which key of a pickled checkpoint the tensors lie (Meta's and timm's training scripts)."""

DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What can be saved, by its name in the format; the widest come first, so that all lie aligned."""


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors; equal tensors and metadata give equal bytes.

    Args:
        path: of the file, whole or absent.
        state: tensors by name, on any device, of a type in `DTYPES`.
        metadata: texts for the header.

    Raises:
        RunError: the disk refused.
    """
    with files.atomic_path(path) as partial, partial.open("wb") as handle:
        _write_safetensors(handle, state, metadata or {})


def _write_safetensors(handle: BinaryIO, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The format as its library writes it: size of the header in 8 bytes, header in JSON, the tensors' bytes.

    The library's own writer leaves the order of metadata to a random hash, puts a temporary file of its own beside the
    wanted one, and hides the system's error numbers.
    """
    order = list(DTYPES)
    names = sorted(state, key=lambda name: (order.index(state[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        tensor = state[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        handle.write(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, by the names they have there.

    `.safetensors` is read as such; anything else as a torch checkpoint, whose tensors may lie under `model` or
    `state_dict`. A pickle is read by torch's restricted reader: tensors, containers, and the `argparse.Namespace` that
    Meta's checkpoints carry. Whatever else it asks for is refused, not run.

    Raises:
        InputError: the file is missing, damaged, holds no tensors, or asks for code to be run.
    """
    _require_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    return _tensors(path, _read_pickle(path))


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file.

    Raises:
        InputError: the file is missing or damaged.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"weights {path} do not exist; give the path of a .safetensors or .pth file")


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return InputError(f"weights {path} cannot be read ({reason}); the file is damaged: fetch or write it again")


def _read_pickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is None:
            # torch's own message begins with the advice to run what is in the file
            reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
            raise _unreadable(path, ValueError(reason[1]) if reason else error) from error
        raise InputError(
            f"weights {path} ask for {forbidden[1]} to be called when read, which is refused; convert the file to "
            f"safetensors where you trust it"
        ) from error
    return loaded


def _tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        for key in WRAPPING_KEYS:
            if isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
                break
    tensors = (
        {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not tensors:
        raise InputError(
            f"weights {path} hold no tensors, neither at the top nor under {' or '.join(WRAPPING_KEYS)}; give a "
            f"checkpoint of weights"
        )
    return tensors
