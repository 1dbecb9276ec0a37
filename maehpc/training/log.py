"""The training log: numbers that depend on the recipe alone, one JSON object a line, and their TensorBoard copy.

metrics.jsonl   losses, scores, learning rates: equal, byte for byte, for a run that was killed and resumed
speed.jsonl     seconds and images a second: true of one machine and one moment, so kept apart
tensorboard/    the same numbers for TensorBoard
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from torch.utils.tensorboard import SummaryWriter

from maehpc import files
from maehpc.errors import RunError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a log, up to the first line that is none: a kill or a power failure left it."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was never finished
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


class MetricsLog:
    """Appends records; on a resume, forgets those after the checkpoint.

    Args:
        folder: the stage's folder.
        step: optimizer steps that the resumed checkpoint holds; 0 for a fresh start.
        scored: whether to keep that step's scores (`epoch` records); else they are computed again.

    Raises:
        RunError: the folder cannot be written, or the log does not reach up to the checkpoint.
    """

    def __init__(self, folder: Path, step: int, scored: bool = True) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self._path) if record["step"] <= step]
        if step and (not kept or kept[-1]["step"] != step):
            raise RunError(
                f"{self._path} is damaged: it lacks records up to the checkpoint's step {step}; restore it, or delete "
                f"{folder} to begin this stage anew"
            )
        if not scored:
            kept = [record for record in kept if record["step"] < step or record.get("kind") != "epoch"]
        files.write_bytes(self._path, b"".join(files.canonical_json(record) + b"\n" for record in kept))
        with files.writing(self._path):
            self._metrics: IO[bytes] = self._path.open("ab")
            self._speed: IO[bytes] = (folder / "speed.jsonl").open("ab")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; it must hold `kind` and `step`."""
        with files.writing(self._path):
            self._metrics.write(files.canonical_json(record) + b"\n")
        prefix = record.get("split", "train") + ("/" if record["kind"] == "epoch" else "-step/")
        for name, value in record.items():
            if name not in ("kind", "step", "epoch", "split") and value is not None:
                with files.writing(self._path.with_name("tensorboard")):  # its thread's error comes out here
                    self._board.add_scalar(prefix + name, value, record["step"])

    def write_speed(self, record: dict[str, Any]) -> None:
        """Appends one record of seconds."""
        with files.writing(self._path):
            self._speed.write(files.canonical_json(record) + b"\n")
            self._speed.flush()

    def push(self) -> None:
        """Hands every record to the system, for `sync`."""
        with files.writing(self._path):
            self._metrics.flush()

    def sync(self) -> None:
        """Puts what was pushed on the disk. Safe in another thread than the one that writes."""
        with files.writing(self._path):
            os.fsync(self._metrics.fileno())

    def flush(self) -> None:
        """Puts every record on the disk; done before a checkpoint is seen, so the log never lags behind it."""
        self.push()
        self.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with files.writing(self._path):
                self._metrics.close()
                self._speed.close()
                self._board.close()
        except RunError:
            if error is None:
                raise
