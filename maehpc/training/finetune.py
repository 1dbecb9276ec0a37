"""Finetuning as a training task: an adapter on a frozen encoder, or the whole classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from maehpc import keys
from maehpc.data import Task, epoch_order
from maehpc.interruption import Stop
from maehpc.models import Classifier
from maehpc.recipes import FinetuneSettings
from maehpc.training.batches import Batches, Part, augmented_parts, dealt, parts_of_step
from maehpc.training.distributed import ALONE, World, summing
from maehpc.training.loop import TrainingTask, diverged
from maehpc.training.optim import build_optimizer, parameter_groups
from maehpc.training.scores import classification_loss, correct, scores

NAME = "finetune"


@dataclass(frozen=True)
class LabelledImages:
    """Some images of one split, with their labels.

    Attributes:
        batches: of the split.
        indices: which of its images, int64 [N] on the CPU.
    """

    batches: Batches
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        """Labels of the images: int64 [N] or [N, K], on the device."""
        return self.batches.split.labels[self.indices.to(self.batches.split.labels.device)]


class FinetuneTask(TrainingTask):
    """Trains a classifier; the last batch of an epoch may be smaller.

    With a frozen encoder and no augmentation, features are computed once and the adapter is trained on them: by every
    rank on whole batches, for that costs less than to exchange anything.

    Args:
        classifier: on the device of the data.
        train: images that are learned from.
        val: images that are only scored.
        task: kind of labels.
        settings: of the stage.
        seed: of the run.
        world: the ranks that share each step.
        stop: whether somebody wants to stop.

    Raises:
        Interrupted: that was so while features were computed.
    """

    def __init__(
        self,
        classifier: Classifier,
        train: LabelledImages,
        val: LabelledImages,
        task: Task,
        settings: FinetuneSettings,
        seed: int,
        world: World = ALONE,
        stop: Stop | None = None,
    ) -> None:
        self._classifier = classifier
        self._world = world
        self._stop = stop or Stop()
        self._train = train
        self._labels = train.labels
        self._task = task
        self._settings = settings
        self._order = lru_cache(maxsize=2)(partial(epoch_order, len(train.indices), keys.derive(seed, NAME)))
        self.batch_size = min(settings.batch_size, len(train.indices))
        self.steps_per_epoch = -(-len(train.indices) // self.batch_size)
        self.module = classifier.head if settings.freeze else classifier
        self.replicated = settings.freeze and settings.crop_scale is None
        classifier.encoder.requires_grad_(not settings.freeze)
        groups = parameter_groups(self.module, settings.optim, settings.layer_decay)
        self.optimizer = build_optimizer(groups, settings.optim)
        self._scored = {"train": train, "val": val}
        self._features = (
            {name: self._represent(split) for name, split in self._scored.items()} if settings.freeze else {}
        )
        self._set_mode()

    def _set_mode(self) -> None:
        self._classifier.train()
        if self._settings.freeze:
            self._classifier.encoder.eval()

    def _represent(self, images: LabelledImages) -> Tensor:
        self._classifier.encoder.eval()
        return self._for_every(images, self._classifier.represent)

    def _for_every(self, images: LabelledImages, compute: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return dealt(
                self._world,
                self._stop,
                NAME,
                images.indices,
                lambda chunk: compute(images.batches.plain(chunk)),
                images.batches.device,
            )

    def _chosen(self, step: int) -> Tensor:
        """Places of a step's images among the training images: int64 [B], CPU."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position * self.batch_size :][: self.batch_size]

    def _inputs(self, step: int, world: World) -> Iterator[tuple[Part, Tensor]]:
        """This rank's micro-batches of a step, with what the trained module is given."""
        settings = self._settings
        if self.replicated:
            chosen = self._chosen(step)
            for part in parts_of_step(len(chosen), settings.accumulate, world):
                yield part, self._features["train"][chosen[part.span].to(self._labels.device)]
            return
        batches, indices = self._train.batches, self._train.indices
        images_of = augmented_parts(batches, lambda n: indices[self._chosen(n)], step, settings.accumulate, world)
        for part, images in images_of:
            if not settings.freeze:
                yield part, images
                continue
            with torch.no_grad(), self._autocast():
                features = self._classifier.represent(images)
            yield part, features

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._labels.device.type, torch.bfloat16, enabled=self._settings.precision == "bf16")

    def backward(self, step: int) -> dict[str, Tensor]:
        """Gradients of the cross entropy over the step's images."""
        settings, device = self._settings, self._labels.device
        chosen = self._chosen(step)
        world = ALONE if self.replicated else self._world
        sums = {"loss": torch.zeros((), device=device), "accuracy": torch.zeros((), device=device)}
        for part, x in self._inputs(step, world):
            with summing(self.model, part.last):
                with self._autocast():
                    logits = self.model(x).float()
                labels = self._labels[chosen[part.span].to(device)]
                loss = classification_loss(logits, labels, self._task, settings.label_smoothing) * part.weight
                (loss * world.size).backward()
            sums["loss"] += loss.detach()
            sums["accuracy"] += correct(logits.detach(), labels, self._task) * part.weight
        return sums

    def logits_of(self, images: LabelledImages) -> Tensor:
        """Logits [N, K] in evaluation mode, float32."""
        self._classifier.eval()
        try:
            return self._for_every(images, self._classifier)
        finally:
            self._set_mode()

    def _split_logits(self, name: str) -> Tensor:
        if not self._features:
            return self.logits_of(self._scored[name])
        self._classifier.head.eval()
        with torch.no_grad():
            result: Tensor = self._classifier.head(self._features[name])
        self._classifier.head.train()
        return result

    def score(self, images: LabelledImages) -> dict[str, float | None]:
        """Loss, accuracy and AUC over `images`.

        Raises:
            RunError: a logit is not finite.
            Interrupted: somebody wants to stop.
        """
        known = next((name for name, split in self._scored.items() if split is images), None)
        logits = self.logits_of(images) if known is None else self._split_logits(known)
        if not logits.isfinite().all():
            raise diverged(f"the classifier's logits on the {known or 'test'} images are not finite")
        return scores(logits, images.labels, self._task)

    def end_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """Loss, accuracy and AUC on the training images and on the validation split."""
        return [{"split": name, **self.score(images)} for name, images in self._scored.items()]
