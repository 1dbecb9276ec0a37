"""Finetuning as a training task: an adapter on a frozen encoder, or the whole classifier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from maehpc import keys
from maehpc.data import Task, epoch_order
from maehpc.models import Classifier
from maehpc.recipes import FinetuneSettings
from maehpc.training.batches import Batches, micro_batches
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

    With a frozen encoder and no augmentation, features are computed once and the adapter is trained on them.

    Args:
        classifier: on the device of the data.
        train: images that are learned from.
        val: images that are only scored.
        task: kind of labels.
        settings: of the stage.
        seed: of the run.
    """

    def __init__(
        self,
        classifier: Classifier,
        train: LabelledImages,
        val: LabelledImages,
        task: Task,
        settings: FinetuneSettings,
        seed: int,
    ) -> None:
        self._classifier = classifier
        self._train = train
        self._labels = train.labels
        self._task = task
        self._settings = settings
        self._order = lru_cache(maxsize=1)(partial(epoch_order, len(train.indices), keys.derive(seed, NAME)))
        self.batch_size = min(settings.batch_size, len(train.indices))
        self.steps_per_epoch = -(-len(train.indices) // self.batch_size)
        self.module = classifier.head if settings.freeze else classifier
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
        with torch.no_grad():
            return torch.cat([self._classifier.represent(batch) for batch in images.batches.every(images.indices)])

    def _logits(self, chosen: Tensor, step: int, part: int) -> Tensor:
        classifier, settings = self._classifier, self._settings
        if settings.freeze and settings.crop_scale is None:
            features = self._features["train"][chosen.to(self._labels.device)]
        else:
            with torch.set_grad_enabled(not settings.freeze):
                features = classifier.represent(self._train.batches.augmented(self._train.indices[chosen], step, part))
        logits: Tensor = classifier.head(features)
        return logits

    def backward(self, step: int) -> dict[str, Tensor]:
        """Gradients of the cross entropy over the step's images."""
        settings, device = self._settings, self._labels.device
        epoch, position = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[position * self.batch_size :][: self.batch_size]
        sums = {"loss": torch.zeros((), device=device), "accuracy": torch.zeros((), device=device)}
        for number, part in enumerate(micro_batches(chosen, settings.accumulate)):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = self._logits(part, step, number).float()
            labels = self._labels[part.to(device)]
            share = len(part) / len(chosen)
            loss = classification_loss(logits, labels, self._task, settings.label_smoothing) * share
            loss.backward()
            sums["loss"] += loss.detach()
            sums["accuracy"] += correct(logits.detach(), labels, self._task) * share
        return sums

    def logits_of(self, images: LabelledImages) -> Tensor:
        """Logits [N, K] in evaluation mode, float32."""
        self._classifier.eval()
        with torch.no_grad():
            result = torch.cat([self._classifier(batch) for batch in images.batches.every(images.indices)])
        self._set_mode()
        return result

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
        """
        known = next((name for name, split in self._scored.items() if split is images), None)
        logits = self.logits_of(images) if known is None else self._split_logits(known)
        if not logits.isfinite().all():
            raise diverged(f"the classifier's logits on the {known or 'test'} images are not finite")
        return scores(logits, images.labels, self._task)

    def end_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """Loss, accuracy and AUC on the training images and on the validation split."""
        return [{"split": name, **self.score(images)} for name, images in self._scored.items()]
