"""Scores of a classifier: cross entropy, accuracy and AUC. The last two are MedMNIST's own evaluator's."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from maehpc.data import Task

_MEDMNIST_TASK = {"multi-label": "multi-label, binary-class"}


def classification_loss(logits: Tensor, labels: Tensor, task: Task, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy, or binary cross entropy a label for multi-label tasks.

    Args:
        logits: float [B, K].
        labels: int64 [B], or [B, K] of 0 and 1 for multi-label.
        task: kind of labels.
        label_smoothing: mass moved to the uniform distribution; not used for multi-label.

    Returns:
        The mean over images (and labels), a scalar.
    """
    if task == "multi-label":
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """Class probabilities [B, K]: softmax, or a sigmoid a label for multi-label tasks."""
    return logits.sigmoid() if task == "multi-label" else logits.softmax(1)


def correct(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Share of right decisions in the batch, a scalar: by image, or by image and label for multi-label tasks."""
    if task == "multi-label":
        return ((logits > 0) == labels.bool()).float().mean()
    return (logits.argmax(1) == labels).float().mean()


def scores(logits: Tensor, labels: Tensor, task: Task) -> dict[str, float | None]:
    """Loss, accuracy and AUC over a whole split.

    Args:
        logits: float [N, K].
        labels: int64 [N] or [N, K].
        task: kind of labels.

    Returns:
        `loss` in nats, `accuracy` and `auc` in [0, 1]; `auc` is None where a class is absent or the split has fewer
        than two images, since it is undefined there.
    """
    logits = logits.double().cpu()
    labels = labels.cpu()
    loss = float(classification_loss(logits, labels, task))
    medmnist_task = _MEDMNIST_TASK.get(task, task)
    predicted = probabilities(logits, task).numpy()
    true = labels.numpy()
    if len(true) < 2:  # MedMNIST's evaluator squeezes a single row away
        return {"loss": loss, "accuracy": float(correct(logits, labels, task)), "auc": None}
    from maehpc.upstream import getACC, getAUC

    accuracy = float(getACC(true, predicted, medmnist_task))
    auc = float(getAUC(true, predicted, medmnist_task)) if _auc_defined(true, predicted.shape[1]) else math.nan
    return {"loss": loss, "accuracy": accuracy, "auc": None if math.isnan(auc) else auc}


def _auc_defined(labels: NDArray[np.int64], classes: int) -> bool:
    if labels.ndim == 2:
        return bool(((labels.min(0) == 0) & (labels.max(0) == 1)).all())
    return len(np.unique(labels)) == classes
