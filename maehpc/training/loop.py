"""The training loop: steps, schedule, log, checkpoints, exact resume. What a step computes is the task's business.

Nothing random survives from one step to the next: the global generator is seeded before every step from the run's
seed and the step's number, so resuming after step s needs the weights, the optimizer's tensors and s alone.

Ranks take every step together. Whether one of them wants to stop, or rank 0 could not write, is agreed on with a
number that travels while a step is computed; so all end after the same step, and none waits for one that is gone.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from maehpc import files, keys
from maehpc.errors import Interrupted, RunError
from maehpc.interruption import Stop
from maehpc.ownership import Owner
from maehpc.progress import Bar, Progress
from maehpc.recipes import FinetuneSettings, PretrainSettings, ProbeSettings
from maehpc.training.checkpoints import (
    Checkpoint,
    newest_whole,
    optimizer_tensors,
    restore_optimizer,
)
from maehpc.training.distributed import ALONE, World
from maehpc.training.log import MetricsLog
from maehpc.training.optim import learning_rate, set_learning_rate
from maehpc.training.saving import CheckpointWriter

LOOK_EVERY = 20
"""Steps between two looks at the device's losses; a look waits for the device, so it is not taken every step."""

_STOP, _FAILED = 1, 2  # what a rank tells the others in every step; the largest counts


class TrainingTask(ABC):
    """What is trained, and what one step and one epoch's end compute."""

    module: nn.Module
    """Holds every parameter and buffer that training changes; its state is what checkpoints hold."""
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    batch_size: int
    """Images a step, over all ranks."""
    replicated: bool = False
    """Whether every rank takes whole steps by itself: then nothing is summed among ranks."""
    _shared: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        """What `backward` calls: the module, or the module as the ranks share it."""
        return self.module if self._shared is None else self._shared

    def share(self, world: World, unused: bool) -> None:
        """Lets the ranks sum the module's gradients; `unused` where some of its trained parameters get none."""
        self._shared = world.parallel(self.module, unused)

    @abstractmethod
    def backward(self, step: int) -> dict[str, Tensor]:
        """Accumulates the gradients of 0-based step `step`.

        Returns:
            Scalar tensors, `loss` among them: this rank's share of the step's, or the whole where `replicated`.
        """

    def end_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """Scores after `epoch` finished epochs: records with `split`, `loss` and what else there is.

        Raises:
            Interrupted: somebody wants to stop; the scores will be computed when training goes on.
        """
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
    settings: PretrainSettings | FinetuneSettings | ProbeSettings


def diverged(what: str) -> RunError:
    """The sentence for training that has left the finite numbers."""
    return RunError(
        f"{what}; the last checkpoint, all finite, is kept: train under another --name with a lower optim.lr, with "
        f"optim.clip_grad or with precision: fp32"
    )


def _clip(module: nn.Module, limit: float | None) -> Tensor:
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)


def train(
    task: TrainingTask,
    loop: Loop,
    folder: Path,
    digest: str,
    owner: Owner,
    progress: Progress,
    world: World = ALONE,
    stop: Stop | None = None,
) -> None:
    """Trains `task` to the end, from its newest whole checkpoint where there is one.

    Args:
        task: what is trained; its module and optimizer are changed in place, to the same on every rank.
        loop: length, schedule, checkpoints.
        folder: the stage's folder: log and checkpoints go there, from rank 0.
        digest: of everything that decides the result; a checkpoint with another one is not resumed.
        owner: claim on `folder`, checked before each checkpoint.
        progress: where to report.
        world: the ranks that train together.
        stop: whether somebody wants to stop.

    Raises:
        RunError: the loss is not finite, the disk refused, or a newer attempt took over.
        Interrupted: somebody wanted to stop; a checkpoint holds everything up to then.
    """
    first = _resume(task, loop, folder / "checkpoints", digest, progress, world)
    total = loop.settings.epochs * task.steps_per_epoch
    if first < total:
        _warm_up(task, world, first)
    with ExitStack() as ends:
        training = _Training(task, loop, folder, digest, owner, world, stop or Stop(), first, ends)
        with progress.bar(loop.label, total, first, task.batch_size) as bar:
            if first and first % task.steps_per_epoch == 0:
                training.end_epoch(first)
            for step in range(first, total):
                training.step(step, bar)
        training.finish()


def _resume(task: TrainingTask, loop: Loop, checkpoints: Path, digest: str, progress: Progress, world: World) -> int:
    """Takes up the newest whole checkpoint; returns its step, 0 where there is none. All ranks get rank 0's bytes."""
    found: list[Checkpoint] = []

    def newest() -> int:
        files.remove_partials(checkpoints)
        checkpoint = newest_whole(checkpoints, digest, progress.warn)
        found.extend([checkpoint] if checkpoint else [])
        return checkpoint.step if checkpoint else 0

    step = world.from_leader(newest)
    if step:
        task.module.load_state_dict(world.copy_from_leader(found[0].model if found else None))
        restore_optimizer(task.optimizer, world.copy_from_leader(found[0].optimizer if found else None))
        progress.say(f"{loop.label}: resuming after step {step}")
    return step


def _warm_up(task: TrainingTask, world: World, step: int) -> None:
    """Shares the module among the ranks, and settles the order in which its gradients are summed.

    DistributedDataParallel puts gradients together in the order in which its first backward had them, and the sum of
    more than two numbers depends on where they stand. So the first backward is one of which nothing is kept: then a
    run that was resumed sums as one that was not.
    """
    if world.size == 1 or task.replicated:
        return
    buffers = {name: buffer.clone() for name, buffer in task.module.named_buffers()}
    task.backward(step)
    trained = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    task.share(world, unused=any(parameter.grad is None for parameter in trained))
    task.optimizer.zero_grad(set_to_none=True)
    task.backward(step)
    task.optimizer.zero_grad(set_to_none=True)
    for name, buffer in task.module.named_buffers():
        buffer.copy_(buffers[name])


class _Training:
    """A run of `train`: what its steps share. Rank 0 has the log and writes the checkpoints."""

    def __init__(
        self,
        task: TrainingTask,
        loop: Loop,
        folder: Path,
        digest: str,
        owner: Owner,
        world: World,
        stop: Stop,
        first: int,
        ends: ExitStack,
    ) -> None:
        self._task = task
        self._loop = loop
        self._world = world
        self._stop = stop
        self._total = loop.settings.epochs * task.steps_per_epoch
        self._peak = loop.settings.optim.peak_lr(task.batch_size)
        self._pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self._failure: Exception | None = None
        self._log: MetricsLog | None = None
        self._writer: CheckpointWriter | None = None
        self._clock, self._clock_step = time.perf_counter(), first

        def open_files() -> None:
            log = ends.enter_context(MetricsLog(folder, first, scored=first % task.steps_per_epoch > 0))

            def vouch() -> None:
                log.sync()
                owner.still_owner()

            checkpoints, keep = folder / "checkpoints", loop.settings.checkpoint.keep
            writer = CheckpointWriter(checkpoints, digest, keep, _refuse_not_finite, vouch, first)
            self._log, self._writer = log, ends.enter_context(writer)

        world.from_leader(open_files)

    def step(self, step: int, bar: Bar) -> None:
        """One optimizer step and what is due after it."""
        task, settings = self._task, self._loop.settings
        # On its way while the step is computed, so that it costs nothing.
        flag = self._world.begin_largest(self._asked())
        torch.manual_seed(self._step_seed(step))
        rate = learning_rate(settings.optim, self._peak, step, task.steps_per_epoch, settings.epochs)
        set_learning_rate(task.optimizer, rate)
        task.optimizer.zero_grad(set_to_none=True)
        scalars = task.backward(step)
        scalars["grad_norm"] = _clip(task.module, settings.optim.clip_grad)
        task.optimizer.step()
        done = step + 1
        self._pending.append((done, rate, {name: value.detach() for name, value in scalars.items()}))
        asked = flag.wait()
        if asked == _FAILED:
            self._raise_failure()
        epoch_ends = done % task.steps_per_epoch == 0
        due = done % settings.checkpoint.every_steps == 0 or done == self._total
        looks = epoch_ends or due or asked or len(self._pending) >= LOOK_EVERY
        bar.advance(1, **({"loss": self._look()} if looks else {}))
        if epoch_ends:
            self._write_speed(done)
            if not asked:
                self.end_epoch(done)
        if asked:
            self._interrupt(done)
        if due:
            self._save(done)

    def end_epoch(self, done: int) -> None:
        """Scores after step `done`, the last of an epoch."""
        epoch = done // self._task.steps_per_epoch
        try:
            records = self._task.end_epoch(epoch)
        except Interrupted:
            self._interrupt(done)
        for record in records:
            self._write({"kind": "epoch", "epoch": epoch, "step": done, **record})
        self._clock, self._clock_step = time.perf_counter(), done

    def finish(self) -> None:
        """Waits until everything is on the disk."""

        def wait() -> None:
            if self._failure is not None:
                raise self._failure
            assert self._log is not None and self._writer is not None
            self._writer.wait()
            for record in self._writer.speed():
                self._log.write_speed(record)
            self._log.flush()

        self._world.from_leader(wait)

    def _asked(self) -> int:
        if self._failure is not None or (self._writer is not None and self._writer.failure is not None):
            return _FAILED
        return _STOP if self._stop.reason is not None else 0

    def _step_seed(self, step: int) -> int:
        words = ("step", step)
        if self._task.replicated or self._world.leader:
            return keys.derive(self._loop.seed, self._loop.stream, *words)
        return keys.derive(self._loop.seed, self._loop.stream, *words, self._world.rank)

    def _as_leader(self, work: Callable[[MetricsLog], object]) -> None:
        """Rank 0 writes. What goes wrong is told to all ranks with the next step's flag: none of them waits for it."""
        if self._log is None or self._failure is not None:
            return
        try:
            work(self._log)
        except Exception as error:
            self._failure = error

    def _write(self, record: dict[str, Any]) -> None:
        self._as_leader(lambda log: log.write(record))

    def _raise_failure(self) -> NoReturn:
        """Raises what went wrong on rank 0, on every rank."""
        self.finish()
        raise AssertionError("a rank told of a failure that is none")

    def _look(self) -> float:
        """Waits for the device, sums the pending scalars among the ranks and writes them; returns the last loss.

        Raises:
            RunError: a loss or gradient is not finite.
        """
        names = list(self._pending[0][2])
        ours = torch.stack([torch.stack([scalars[name] for name in names]) for _, _, scalars in self._pending])
        parts = self._world.gather(ours.cpu().unsqueeze(0))
        shares = parts[:1] if self._task.replicated else parts
        for number, (done, rate, _) in enumerate(self._pending):
            values = {name: sum(float(part[0, number, place]) for part in shares) for place, name in enumerate(names)}
            values["grad_norm"] = float(parts[0][0, number, names.index("grad_norm")])  # every rank has the whole
            for name in ("loss", "grad_norm"):
                if not math.isfinite(values[name]):
                    self._as_leader(MetricsLog.flush)
                    raise diverged(f"step {done}: the {name.replace('_', ' ')} is {values[name]}")
            record = {"kind": "step", "step": done, "epoch": done / self._task.steps_per_epoch, "lr": rate, **values}
            self._write(record)
        self._pending.clear()
        return values["loss"]

    def _write_speed(self, done: int) -> None:
        seconds = time.perf_counter() - self._clock
        images = (done - self._clock_step) * self._task.batch_size
        record = {
            "step": done,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "ranks": self._world.size,
        }
        self._as_leader(lambda log: log.write_speed(record))

    def _save(self, done: int) -> None:
        """Begins a checkpoint of the state after `done` steps."""

        def save(log: MetricsLog) -> None:
            assert self._writer is not None
            log.push()
            self._writer.save(done, self._task.module.state_dict(), optimizer_tensors(self._task.optimizer))
            for record in self._writer.speed():
                log.write_speed(record)

        self._as_leader(save)

    def _interrupt(self, done: int) -> NoReturn:
        """Saves the state after `done` steps and ends the work on every rank."""
        if self._writer is not None and self._writer.step != done:
            self._save(done)
        self.finish()
        reasons = self._world.together(lambda: self._stop.reason)
        raise Interrupted(self._loop.label, next(reason for reason in reasons if reason is not None), done)


def _refuse_not_finite(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.model.items():
        if not tensor.isfinite().all():
            raise diverged(f"step {checkpoint.step}: the weights {name} are not finite")
