"""Checkpoints written by a thread while training goes on.

The state is copied to memory of the CPU: at once where it is there already, in the order of the device's work
otherwise, so that later steps wait for the copy and this process does not. The thread writes, hashes, flushes and
publishes. One checkpoint is under way at most: the next one waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from maehpc.training.checkpoints import Checkpoint, save_checkpoint


class CheckpointWriter:
    """Writes checkpoints of one stage; used by one thread.

    Args:
        folder: of the checkpoints.
        digest: of everything that decides the stage's result.
        keep: how many checkpoints stay.
        inspect: refuses a state, by raising, before anything of it is written. Called in the writing thread.
        vouch: the last word before a checkpoint is seen; raises to refuse. Called in the writing thread.
        step: of the checkpoint that training began from, 0 where there was none.
    """

    def __init__(
        self,
        folder: Path,
        digest: str,
        keep: int,
        inspect: Callable[[Checkpoint], None],
        vouch: Callable[[], None],
        step: int = 0,
    ) -> None:
        self._folder = folder
        self._digest = digest
        self._keep = keep
        self._inspect = inspect
        self._vouch = vouch
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, Tensor] = {}
        self._failure: Exception | None = None
        self._speed: list[dict[str, Any]] = []
        self.step = step
        """Of the newest checkpoint that is there, or was begun."""

    @property
    def failure(self) -> Exception | None:
        """Why a checkpoint could not be written."""
        return self._failure

    def save(self, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Takes the state as it is now and returns before it is written.

        Raises:
            RunError: the checkpoint before this one could not be written.
        """
        begun = time.perf_counter()
        self.wait()
        self.step = step
        checkpoint = Checkpoint(step, self._copied("model", model), self._copied("optimizer", optimizer))
        copied = None
        if any(tensor.is_cuda for tensor in model.values()):
            copied = torch.cuda.Event()
            copied.record()
        self._thread = threading.Thread(target=self._write, args=(checkpoint, copied, begun), name="checkpoint")
        stalled = time.perf_counter() - begun
        self._speed.append({"step": step, "checkpoint_stall_s": stalled})
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is under way.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def speed(self) -> list[dict[str, Any]]:
        """Records of checkpoints written since the last call: `step`, `checkpoint_stall_s`, `checkpoint_write_s`."""
        # Looked at once each: the thread may finish one meanwhile.
        told = [("checkpoint_write_s" in record, record) for record in self._speed]
        self._speed = [record for written, record in told if not written]
        return [record for written, record in told if written]

    def _copied(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            key = f"{kind} {name}"
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[key] = buffer
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, checkpoint: Checkpoint, copied: torch.cuda.Event | None, begun: float) -> None:
        record = self._speed[-1]
        try:
            if copied is not None:
                copied.synchronize()
            self._inspect(checkpoint)
            save_checkpoint(self._folder, checkpoint, self._digest, self._keep, self._vouch)
            record["checkpoint_write_s"] = time.perf_counter() - begun - record["checkpoint_stall_s"]
        except Exception as error:  # told by `wait`, in the thread that trains
            self._failure = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join()
