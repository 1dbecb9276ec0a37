"""The log forgets what came after the checkpoint, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maehpc.errors import RunError
from maehpc.training.log import MetricsLog, read_metrics


def record(step: int, loss: float = 0.5) -> dict[str, object]:
    return {"kind": "step", "step": step, "epoch": step / 4, "loss": loss, "lr": 0.1}


def test_a_resumed_log_equals_an_undisturbed_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    with MetricsLog(whole, 0) as log:
        for step in range(1, 9):
            log.write(record(step))
    with MetricsLog(broken, 0) as log:
        for step in range(1, 7):
            log.write(record(step, loss=0.5 if step <= 4 else 99.0))
    with (broken / "metrics.jsonl").open("ab") as handle:
        handle.write(b'{"kind":"step","st')  # a kill in the middle of a line
    with MetricsLog(broken, 4) as log:
        for step in range(5, 9):
            log.write(record(step))
    assert (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()


def test_a_line_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":2')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_a_log_that_does_not_reach_its_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind":"step","step":1}\n\0\0\0\0\n{"kind":"step","step":3}\n')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    with pytest.raises(RunError, match=r"metrics.jsonl is damaged.*step 3"):
        MetricsLog(tmp_path, 3)


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as log:
        log.write(record(1, 0.25))
        log.write({"kind": "epoch", "epoch": 1, "step": 4, "split": "val", "loss": 0.75, "auc": None})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == {
        "train-step/loss": 0.25,
        "train-step/lr": 0.10000000149011612,
        "val/loss": 0.75,
    }


def test_scores_that_will_be_computed_again_are_left_out(tmp_path: Path) -> None:
    def scores(step: int) -> dict[str, object]:
        return {"kind": "epoch", "epoch": step // 4, "step": step, "split": "val", "loss": 0.5}

    with MetricsLog(tmp_path, 0) as log:
        for step in range(1, 10):
            log.write(record(step))
            if step % 4 == 0:
                log.write(scores(step))
    for scored, kinds in ((True, ["step", "epoch"]), (False, ["step"])):
        MetricsLog(tmp_path, 8, scored).__exit__(None, None, None)
        kept = read_metrics(tmp_path / "metrics.jsonl")
        assert [line["kind"] for line in kept if line["step"] == 8] == kinds
        assert [line["kind"] for line in kept if line["step"] == 4] == ["step", "epoch"]
