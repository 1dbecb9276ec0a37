"""Scores held to MedMNIST's evaluator on its own files and to scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from medmnist import Evaluator
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from maehpc.training.scores import classification_loss, correct, scores


@pytest.mark.parametrize(
    ("name", "task", "classes"), [("retinamnist", "ordinal-regression", 5), ("breastmnist", "binary-class", 2)]
)
def test_equal_to_medmnists_evaluator(real_data: Path, name: str, task: str, classes: int) -> None:
    evaluator = Evaluator(name, "test", root=str(real_data / "medmnist"))
    labels = torch.from_numpy(evaluator.labels.astype(np.int64)).squeeze(1)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(labels), classes, generator=generator) + torch.eye(classes)[labels]
    expected = evaluator.evaluate(logits.double().softmax(1).numpy())
    found = scores(logits, labels, task)
    assert found["auc"] == pytest.approx(expected.AUC, abs=1e-12)
    assert found["accuracy"] == pytest.approx(expected.ACC, abs=1e-12)
    assert found["loss"] == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(classes)), rel=1e-9)


def test_multi_label_is_the_mean_over_labels() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(50, 3, generator=generator)
    labels = (torch.rand(50, 3, generator=generator) < 0.4).long()
    found = scores(logits, labels, "multi-label")
    chances = logits.double().sigmoid().numpy()
    assert found["auc"] == pytest.approx(np.mean([roc_auc_score(labels[:, k], chances[:, k]) for k in range(3)]))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels.flatten(), (chances > 0.5).flatten()))
    assert float(correct(logits, labels, "multi-label")) == pytest.approx(found["accuracy"])
    naive = -np.mean(np.where(labels == 1, np.log(chances), np.log(1 - chances)))
    assert found["loss"] == pytest.approx(naive)


def test_an_undefined_auc_is_none_not_zero() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    absent = scores(logits, torch.tensor([0, 1, 0, 1, 0, 1]), "multi-class")
    assert absent["auc"] is None
    assert absent["accuracy"] is not None
    assert scores(logits[:1], torch.tensor([0]), "multi-class")["auc"] is None
    assert scores(logits, torch.zeros(6, 3).long(), "multi-label")["auc"] is None


def test_label_smoothing_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    log_probabilities = logits.log_softmax(1)[0]
    expected = -(0.9 + 0.1 / 3) * log_probabilities[0] - 0.1 / 3 * (log_probabilities[1] + log_probabilities[2])
    assert float(classification_loss(logits, labels, "multi-class", 0.1)) == pytest.approx(float(expected))
