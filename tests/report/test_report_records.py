"""Readers of the training stages' files give the numbers written, and refuse what is not theirs in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from report_experiments import write_log, write_reconstructions
from safetensors.numpy import save_file

from maehpc.errors import InputError
from maehpc.report.records import read_curves, read_reconstructions, read_scored


def test_curves_hold_what_was_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"kind": "step", "step": 1, "epoch": 0.5, "loss": 3.0, "lr": 0.1, "grad_norm": 2.0},
        {"kind": "step", "step": 2, "epoch": 1.0, "loss": 2.0, "lr": 0.1, "accuracy": 0.25},
        {"kind": "epoch", "step": 2, "epoch": 1, "split": "train", "loss": 2.5, "auc": None},
        {"kind": "epoch", "step": 2, "epoch": 1, "split": "val", "loss": 2.75, "auc": None},
    ]
    write_log(path, lines)
    curves = read_curves(path)
    assert curves is not None
    assert curves.steps_an_epoch == 2
    assert curves.quantities == ["loss", "accuracy"]
    assert curves.steps["loss"].epochs.tolist() == [0.5, 1.0]
    assert curves.steps["loss"].values.tolist() == [3.0, 2.0]
    assert {split: curve.values.tolist() for split, curve in curves.epochs["loss"].items()} == {
        "train": [2.5],
        "val": [2.75],
    }


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = {"kind": "step", "step": 1, "epoch": 0.5, "loss": 3.0}
    write_log(path, [line, {**line, "step": 2, "loss": 7.0}])
    path.write_bytes(path.read_bytes()[:-1])
    curves = read_curves(path)
    assert curves is not None
    assert curves.steps["loss"].values.tolist() == [3.0]


def test_what_is_absent_or_empty_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert read_curves(tmp_path / "metrics.jsonl") is None
    assert read_curves(tmp_path / "nowhere" / "metrics.jsonl") is None
    assert read_scored(tmp_path / "done.json") is None
    assert read_reconstructions(tmp_path / "reconstructions.safetensors") is None


@pytest.mark.parametrize("line", ["{", "[]", '{"kind":"step","epoch":1}', '{"kind":"step","step":"one","epoch":1}'])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"step","step":1,"epoch":0.5,"loss":1}\n' + line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2, cannot be used") as caught:
        read_curves(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"scores": {"test": {"loss": "low"}}, "images": {}, "dataset": {"title": ""}}']
)
def test_wrong_scores_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "done.json").write_text(text)
    with pytest.raises(InputError, match=r"done\.json cannot be used") as caught:
        read_scored(tmp_path / "done.json")
    assert "\n" not in str(caught.value)


def test_reconstructions_come_back(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    path = tmp_path / "reconstructions.safetensors"
    write_reconstructions(path, images)
    found = read_reconstructions(path)
    assert found is not None
    np.testing.assert_array_equal(found.original, images)
    assert found.index.tolist() == [0, 7, 14]
    assert found.mask_ratio == 0.75


def test_damaged_reconstructions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "reconstructions.safetensors"
    write_reconstructions(path, np.zeros((3, 8, 8, 1), np.uint8))
    whole = path.read_bytes()
    for data in (b"", whole[:5], whole[:-10], b"\xff" * 100):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"reconstructions\.safetensors does not hold reconstructions"):
            read_reconstructions(path)


@pytest.mark.parametrize(
    "change",
    [
        {"masked": np.zeros((2, 8, 8, 1), np.uint8)},
        {"masked": np.zeros((3, 8, 8, 1), np.float32)},
        {"index": np.zeros(2, np.int64)},
        {"other": np.zeros(2)},
    ],
)
def test_other_tensors_are_no_reconstructions(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    path = tmp_path / "reconstructions.safetensors"
    pictures = {name: np.zeros((3, 8, 8, 1), np.uint8) for name in ("original", "masked", "reconstructed")}
    save_file({**pictures, "index": np.zeros(3, np.int64), **change}, path, {"mask_ratio": "0.5"})
    with pytest.raises(InputError, match="does not hold reconstructions"):
        read_reconstructions(path)
