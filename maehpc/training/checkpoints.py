"""Training state on disk: whole or absent, checked before it is trusted, nothing in it executed.

    checkpoints/step-00001200/
      model.safetensors       parameters and buffers that training changes
      optimizer.safetensors   INDEX.KEY, the optimizer's tensors a parameter
      manifest.json           step, digest of the stage's inputs, SHA-256 of the two files

A folder is written under a temporary name, flushed, and renamed. The step in its name orders checkpoints; no clock
does. Random generators, the schedule and the data order need no place here: each is a function of the seed and the
step (`maehpc.keys`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maehpc import files
from maehpc.models import save_weights

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
MANIFEST = "manifest.json"

_NAME = re.compile(r"step-\d+")


class DamagedError(Exception):
    """A checkpoint's bytes are not those that were written."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest step first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `INDEX.KEY`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": value
        for index, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors from `optimizer_tensors` back."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, digest: str, keep: int, vouch: Callable[[], None] = lambda: None
) -> Path:
    """Writes one checkpoint and removes all but the newest `keep`.

    Args:
        folder: of the checkpoints.
        checkpoint: what is written.
        digest: of everything that decides the result.
        keep: how many stay.
        vouch: called when all is written and nothing is to be seen yet; what it raises leaves nothing behind.

    Raises:
        RunError: the disk refused; the earlier checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    files.make_folder(folder)
    partial = files.partial_name(final)
    try:
        with files.writing(final):
            partial.mkdir()
        save_weights(partial / MODEL, checkpoint.model)
        save_weights(partial / OPTIMIZER, checkpoint.optimizer)
        manifest = {
            "step": checkpoint.step,
            "digest": digest,
            "files": {name: files.sha256_file(partial / name) for name in (MODEL, OPTIMIZER)},
        }
        files.write_json(partial / MANIFEST, manifest)
        vouch()
        if final.exists():  # only a damaged one can stand here: a whole one would have been resumed from
            files.discard_folder(final)
        files.publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    # What lies above this step was refused when training resumed; it must not push out what is good.
    until_now = [path for path in list_checkpoints(folder) if step_of(path) <= checkpoint.step]
    for old in until_now[:-keep]:
        files.discard_folder(old)
    return final


def read_checkpoint(path: Path) -> tuple[Checkpoint, str]:
    """Reads one checkpoint and its digest, checking every byte.

    Raises:
        DamagedError: a file is missing, cut off or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        sums = manifest["files"]
        for name in (MODEL, OPTIMIZER):
            if files.sha256_file(path / name) != sums[name]:
                raise DamagedError(f"{path / name} does not match its digest")
        tensors = {name: load_file(path / name) for name in (MODEL, OPTIMIZER)}
        return Checkpoint(int(manifest["step"]), tensors[MODEL], tensors[OPTIMIZER]), str(manifest["digest"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedError(f"{path} is not whole ({' '.join(str(error).split())})") from error


def newest_whole(folder: Path, digest: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose bytes and digest are right, or None.

    Damaged ones are told through `warn` and passed over.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint, written_for = read_checkpoint(path)
        except DamagedError as error:
            warn(f"{error}; going back to the checkpoint before it")
            continue
        if written_for == digest:
            return checkpoint
        warn(f"{path} belongs to another recipe and is passed over")
    return None
