"""The training loop: steps, schedule, log, checkpoints, exact resume. What a step computes is the task's business.

Nothing random survives from one step to the next: the global generator is seeded before every step from the run's
seed and the step's number, so resuming after step s needs the weights, the optimizer's tensors and s alone.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maehpc import files, keys
from maehpc.errors import RunError
from maehpc.ownership import Owner
from maehpc.progress import Progress
from maehpc.recipes import FinetuneSettings, PretrainSettings
from maehpc.training.checkpoints import (
    Checkpoint,
    newest_whole,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from maehpc.training.log import MetricsLog
from maehpc.training.optim import learning_rate, set_learning_rate

LOOK_EVERY = 20
"""Steps between two looks at the device's losses; a look waits for the device, so it is not taken every step."""


class TrainingTask(ABC):
    """What is trained, and what one step and one epoch's end compute."""

    module: nn.Module
    """Holds every parameter and buffer that training changes; its state is what checkpoints hold."""
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    batch_size: int

    @abstractmethod
    def backward(self, step: int) -> dict[str, Tensor]:
        """Accumulates the gradients of 0-based step `step`; returns scalar tensors, `loss` among them."""

    def end_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """Scores after `epoch` finished epochs: records with `split`, `loss` and what else there is."""
        return []


@dataclass(frozen=True)
class Loop:
    """How long and how a task is trained.

    Attributes:
        label: what a person sees.
        stream: names the random streams; the same for every data set.
        seed: of the run.
        settings: length, optimizer, checkpoints.
    """

    label: str
    stream: str
    seed: int
    settings: PretrainSettings | FinetuneSettings


def diverged(what: str) -> RunError:
    """The sentence for training that has left the finite numbers."""
    return RunError(
        f"{what}; the last checkpoint, all finite, is kept: train under another --name with a lower optim.lr, with "
        f"optim.clip_grad or with precision: fp32"
    )


def _clip(module: nn.Module, limit: float | None) -> Tensor:
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)


@dataclass
class _Pending:
    """Device scalars of steps not looked at yet."""

    records: list[tuple[int, float, dict[str, Tensor]]]

    def drain(self, log: MetricsLog, steps_per_epoch: int) -> float | None:
        """Writes the records; returns the last loss.

        Raises:
            RunError: a loss or gradient is not finite.
        """
        last = None
        for step, rate, scalars in self.records:
            values = {name: float(value) for name, value in scalars.items()}
            for name in ("loss", "grad_norm"):
                if not math.isfinite(values[name]):
                    log.flush()
                    raise diverged(f"step {step}: the {name.replace('_', ' ')} is {values[name]}")
            log.write({"kind": "step", "step": step, "epoch": step / steps_per_epoch, "lr": rate, **values})
            last = values["loss"]
        self.records.clear()
        return last


def train(task: TrainingTask, loop: Loop, folder: Path, digest: str, owner: Owner, progress: Progress) -> None:
    """Trains `task` to the end, from its newest whole checkpoint where there is one.

    Args:
        task: what is trained; its module and optimizer are changed in place.
        loop: length, schedule, checkpoints.
        folder: the stage's folder: log and checkpoints go there.
        digest: of everything that decides the result; a checkpoint with another one is not resumed.
        owner: claim on `folder`, checked before each checkpoint.
        progress: where to report.

    Raises:
        RunError: the loss is not finite, the disk refused, or a newer attempt took over.
    """
    settings = loop.settings
    peak = settings.optim.peak_lr(task.batch_size)
    checkpoints = folder / "checkpoints"
    files.remove_partials(checkpoints)
    found = newest_whole(checkpoints, digest, progress.warn)
    if found:
        task.module.load_state_dict(found.model)
        restore_optimizer(task.optimizer, found.optimizer)
        progress.say(f"{loop.label}: resuming after step {found.step}")
    first = found.step if found else 0
    total = settings.epochs * task.steps_per_epoch

    def save(step: int) -> None:
        log.flush()
        owner.still_owner()
        state = Checkpoint(step, dict(task.module.state_dict()), optimizer_tensors(task.optimizer))
        for name, tensor in state.model.items():
            if not tensor.isfinite().all():
                raise diverged(f"step {step}: the weights {name} are not finite")
        save_checkpoint(checkpoints, state, digest, settings.checkpoint.keep)

    with MetricsLog(folder, first) as log, progress.bar(loop.label, total, first) as bar:
        pending = _Pending([])
        clock, clock_step = time.perf_counter(), first
        for step in range(first, total):
            torch.manual_seed(keys.derive(loop.seed, loop.stream, "step", step))
            rate = learning_rate(settings.optim, peak, step, task.steps_per_epoch, settings.epochs)
            set_learning_rate(task.optimizer, rate)
            task.optimizer.zero_grad(set_to_none=True)
            scalars = task.backward(step)
            scalars["grad_norm"] = _clip(task.module, settings.optim.clip_grad)
            task.optimizer.step()
            done = step + 1
            pending.records.append((done, rate, {name: value.detach() for name, value in scalars.items()}))
            epoch_ends = done % task.steps_per_epoch == 0
            checkpoint_due = done % settings.checkpoint.every_steps == 0 or done == total
            if epoch_ends or checkpoint_due or len(pending.records) >= LOOK_EVERY:
                count = len(pending.records)
                loss = pending.drain(log, task.steps_per_epoch)
                bar.advance(count, f"loss {loss:.4f}")
            if epoch_ends:
                seconds = time.perf_counter() - clock
                images = (done - clock_step) * task.batch_size
                log.write_speed({"step": done, "seconds": seconds, "images_per_second": images / seconds})
                epoch = done // task.steps_per_epoch
                for record in task.end_epoch(epoch):
                    log.write({"kind": "epoch", "epoch": epoch, "step": done, **record})
                clock, clock_step = time.perf_counter(), done
            if checkpoint_due:
                save(done)
