"""The linear probe as a training task: one linear layer on the normalised features of a frozen encoder.

The protocol is that of He et al. 2022, appendix A.1, with one difference. The reference normalises features by a
BatchNorm without affine parameters, whose statistics are those of one GPU's part of a batch: its result depends on the
batch and on the number of GPUs. Here features are normalised by the mean and variance over all training images
(whole ones, also where training crops), computed once: the population of which the reference's statistics are samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from maehpc import keys
from maehpc.data import Task, epoch_order
from maehpc.interruption import Stop
from maehpc.models.initialisation import drawing
from maehpc.recipes import ProbeSettings
from maehpc.training.batches import dealt
from maehpc.training.distributed import ALONE, World
from maehpc.training.finetune import LabelledImages
from maehpc.training.loop import TrainingTask, diverged
from maehpc.training.optim import build_optimizer, parameter_groups
from maehpc.training.scores import classification_loss, correct, scores

NAME = "probe"

WEIGHT_STD = 0.01
"""Standard deviation of the first weights; the reference's."""

VARIANCE_EPS = 1e-6
"""Added to a feature's variance before the root; the reference's."""

_ROWS = 1 << 16


def population(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (by N) of each column of `[N, D]`, summed in float64 a part of the rows at a time."""
    parts = features.split(_ROWS)
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in parts:
        total += part.double().sum(0)
    mean = total / len(features)
    squares = torch.zeros_like(mean)
    for part in parts:
        squares += (part.double() - mean).square().sum(0)
    return mean, squares / len(features)


class LinearProbe(nn.Module):
    """Logits of features `[B, D]`: normalised by statistics that stay as they are, then one linear layer.

    Args:
        mean: of each feature, [D].
        variance: of each feature, [D].
        classes: number of logits.
        seed: of the first weights, which are normal; biases begin at 0.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, variance: Tensor, classes: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", (variance + VARIANCE_EPS).sqrt().float())
        with drawing(seed, NAME):
            self.output = nn.Linear(len(mean), classes)
            nn.init.normal_(self.output.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[B, K]` of features `[B, D]`, float32."""
        logits: Tensor = self.output((features - self.mean) / self.deviation)
        return logits


class ProbeTask(TrainingTask):
    """Trains a linear probe; the last batch of an epoch may be smaller.

    Features are computed once, or in every step where images are augmented: in chunks of a fixed size, which the ranks
    share and exchange. Every rank then takes the same steps on whole batches, so that the result is the same, bit for
    bit, for any number of ranks.

    Args:
        represent: from normalised images `[B, C, S, S]` to features `[B, D]`; frozen.
        splits: `train` is learned from, `val` and others are only scored.
        task: kind of labels.
        classes: number of logits.
        settings: of the stage.
        seed: of the run.
        world: the ranks that share the encoder's work.
        stop: whether somebody wants to stop.

    Raises:
        Interrupted: that was so while features were computed.
    """

    replicated = True

    def __init__(
        self,
        represent: Callable[[Tensor], Tensor],
        splits: Mapping[str, LabelledImages],
        task: Task,
        classes: int,
        settings: ProbeSettings,
        seed: int,
        world: World = ALONE,
        stop: Stop | None = None,
    ) -> None:
        self._represent = represent
        self._splits = splits
        self._task = task
        self._settings = settings
        self._world = world
        self._train = splits["train"]
        self._labels = {name: images.labels for name, images in splits.items()}
        self._device = self._labels["train"].device
        count = len(self._train.indices)
        self._order = lru_cache(maxsize=1)(partial(epoch_order, count, keys.derive(seed, NAME)))
        self.batch_size = min(settings.batch_size, count)
        self.steps_per_epoch = -(-count // self.batch_size)
        self._features = {name: self._plain_features(images, stop or Stop()) for name, images in splits.items()}
        self.probe = LinearProbe(*population(self._features["train"]), classes, seed).to(self._device)
        self.module = self.probe
        self.optimizer = build_optimizer(parameter_groups(self.probe, settings.optim), settings.optim)

    def _plain_features(self, images: LabelledImages, stop: Stop) -> Tensor:
        return self._dealt(images.indices, stop, images.batches.plain)

    def _augmented_features(self, chosen: Tensor, step: int) -> Tensor:
        indices, batches = self._train.indices[chosen], self._train.batches

        def read(places: Tensor) -> Tensor:
            return batches.augmented(indices, step, span=slice(int(places[0]), int(places[-1]) + 1))

        # No wish to stop is looked at here: the loop does, once the step is done.
        return self._dealt(torch.arange(len(indices)), Stop(), read)

    @torch.no_grad()
    def _dealt(self, indices: Tensor, stop: Stop, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Features [N, D] of the images that `read` gives for chunks of the indices."""
        device, reduced = self._device, self._settings.precision == "bf16"

        def compute(chunk: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
                return self._represent(read(chunk)).float()

        return dealt(self._world, stop, NAME, indices, compute, device)

    def backward(self, step: int) -> dict[str, Tensor]:
        """Gradients of the cross entropy over the step's images."""
        epoch, position = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[position * self.batch_size :][: self.batch_size]
        if self._settings.crop_scale is None:
            features = self._features["train"][chosen.to(self._device)]
        else:
            features = self._augmented_features(chosen, step)
        logits = self.probe(features)
        labels = self._labels["train"][chosen.to(self._device)]
        loss = classification_loss(logits, labels, self._task)
        loss.backward()
        return {"loss": loss.detach(), "accuracy": correct(logits.detach(), labels, self._task)}

    @torch.no_grad()
    def score(self, split: str) -> dict[str, float | None]:
        """Loss, accuracy and AUC over a split, on images as they are.

        Raises:
            RunError: a logit is not finite.
        """
        logits = self.probe(self._features[split])
        if not logits.isfinite().all():
            raise diverged(f"the probe's logits on the {split} images are not finite")
        return scores(logits, self._labels[split], self._task)

    def end_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """Loss, accuracy and AUC on the training images and on the validation split."""
        return [{"split": name, **self.score(name)} for name in ("train", "val")]
