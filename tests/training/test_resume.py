"""Promise 2: a job killed at any instant and run again ends with the same weights and the same log, bit for bit."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import killed_after, killed_at_shares, killed_when, reached, tiny_context

from maehpc.data import prepare
from maehpc.errors import InputError, RunError
from maehpc.progress import Silent
from maehpc.stages.finetune import finetune
from maehpc.stages.pretrain import pretrain
from maehpc.training.checkpoints import list_checkpoints, read_checkpoint
from maehpc.training.log import read_metrics

KINDS = {
    "pretraining": (pretrain, "pretrain", ("pretrain.epochs=12",)),
    "pretraining, accumulated": (pretrain, "pretrain", ("pretrain.accumulate=2", "pretrain.epochs=8")),
    "frozen encoder": (finetune, "finetune", ("encoder.weights=scratch", "finetune.epochs=20")),
    "frozen encoder, augmented": (
        finetune,
        "finetune",
        ("encoder.weights=scratch", "finetune.crop_scale=[0.5, 1.0]", "finetune.epochs=12"),
    ),
    "whole classifier": (
        finetune,
        "finetune",
        (
            "encoder.weights=scratch",
            "finetune.freeze=false",
            "finetune.drop_path=0.3",
            "finetune.layer_decay=0.7",
            "finetune.crop_scale=[0.5, 1.0]",
            "finetune.optim.lr=1e-3",
        ),
    ),
}
SAME = {
    "pretrain": ["encoder.safetensors", "mae.safetensors", "reconstructions.safetensors", "metrics.jsonl", "done.json"],
    "finetune": ["classifier.safetensors", "metrics.jsonl", "done.json"],
}


class Listening(Silent):
    def __init__(self, said: list[str]) -> None:
        self._said = said

    def say(self, sentence: str) -> None:
        self._said.append(sentence)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_at_random_instants(kind: str, tmp_path: Path) -> None:
    stage, name, overrides = KINDS[kind]
    whole, broken = (tiny_context(tmp_path, *overrides, name=word) for word in ("whole", "broken"))
    prepare("digits", 28, whole.packs).close()
    begun = time.monotonic()
    assert not killed_after(lambda: stage(whole, "digits"), seconds=120)
    seconds = time.monotonic() - begun

    chance = random.Random(kind)
    kills = killed_at_shares(
        lambda after: killed_after(lambda: stage(broken, "digits"), after),
        [chance.uniform(0.05, 0.7) for _ in range(6)],
        seconds,
        lambda: shutil.rmtree(broken.experiment.root),
    )
    assert kills, "no attempt was killed while it worked"
    stage(broken, "digits")
    for file in SAME[name]:
        found, expected = (context.experiment.stage(name, "digits") / file for context in (broken, whole))
        assert found.read_bytes() == expected.read_bytes(), file


def test_a_killed_run_goes_on_from_its_checkpoint_and_not_from_the_start(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    folder = context.experiment.stage("pretrain", "digits")
    assert killed_when(lambda: pretrain(context, "digits"), reached(folder / "checkpoints", 8))
    said: list[str] = []
    pretrain(replace(context, progress=Listening(said)), "digits")
    assert said[0].startswith("pretrain digits: resuming after step ")
    assert int(said[0].split()[-1]) >= 8


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(tmp_path: Path) -> None:
    whole, broken = (tiny_context(tmp_path, name=word) for word in ("whole", "broken"))
    pretrain(whole, "digits")
    folder = broken.experiment.stage("pretrain", "digits")
    assert killed_when(lambda: pretrain(broken, "digits"), reached(folder / "checkpoints", 8))
    newest = list_checkpoints(folder / "checkpoints")[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    pretrain(broken, "digits")
    for file in SAME["pretrain"]:
        found, expected = (context.experiment.stage("pretrain", "digits") / file for context in (broken, whole))
        assert found.read_bytes() == expected.read_bytes(), file


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "pretrain.optim.base_lr=1e30", "pretrain.checkpoint.every_steps=1")
    with pytest.raises(RunError, match=r"step \d+: the (loss|grad norm) is (nan|inf)"):
        pretrain(context, "digits")
    folder = context.experiment.stage("pretrain", "digits")
    assert not (folder / "done.json").exists()
    kept, _ = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    assert all(tensor.isfinite().all() for tensor in kept.model.values())


def test_another_recipe_in_the_same_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    pretrain(tiny_context(tmp_path), "digits")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"pretrain.mask_ratio was 0.75 and is 0.5 now.*--name"):
        pretrain(tiny_context(tmp_path, "pretrain.mask_ratio=0.5"), "digits")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_finetuning_that_diverges_is_told_and_no_scores_are_made(tmp_path: Path) -> None:
    overrides = ("encoder.weights=scratch", "finetune.optim.lr=1e30", "finetune.optim.name=sgd", "finetune.epochs=1")
    context = tiny_context(tmp_path, *overrides, "finetune.batch_size=100")
    with pytest.raises(RunError, match=r"not finite|is (nan|inf).*--name"):
        finetune(context, "digits")  # the one step's own loss is finite; what it leaves is not
    assert not (context.experiment.stage("finetune", "digits") / "done.json").exists()
    assert list_checkpoints(context.experiment.stage("finetune", "digits") / "checkpoints") == []


def test_pretraining_goes_on_from_a_file(tmp_path: Path) -> None:
    first = tiny_context(tmp_path, name="first")
    pretrain(first, "digits")
    folder = first.experiment.stage("pretrain", "digits")
    losses = {}
    for name, weights in (
        ("anew", "null"),
        ("whole", folder / "mae.safetensors"),
        ("half", folder / "encoder.safetensors"),
    ):
        context = tiny_context(tmp_path, f"pretrain.weights={weights}", "seed=1", name=name)
        pretrain(context, "digits")
        losses[name] = read_metrics(context.experiment.stage("pretrain", "digits") / "metrics.jsonl")[0]["loss"]
    trained = read_metrics(folder / "metrics.jsonl")[-1]["loss"]
    assert losses["whole"] == pytest.approx(trained, rel=0.1)
    assert losses["whole"] < losses["anew"]
    assert losses["half"] != losses["anew"]


def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    once, thrice = (
        tiny_context(tmp_path, f"pretrain.accumulate={parts}", "pretrain.crop_scale=null", name=f"a{parts}")
        for parts in (1, 4)
    )
    logs = []
    for context in (once, thrice):
        pretrain(context, "digits")
        logs.append(read_metrics(context.experiment.stage("pretrain", "digits") / "metrics.jsonl"))
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_training_learns(tmp_path: Path) -> None:
    context = tiny_context(
        tmp_path,
        "encoder.weights=scratch",
        *("finetune.freeze=false", "finetune.adapter.layers=1", "finetune.epochs=20"),
        *("finetune.batch_size=10", "finetune.optim.lr=3e-3"),
    )
    record = finetune(context, "digits")
    assert record["scores"]["train"]["accuracy"] > 0.6  # chance is 0.1
    epochs = [line for line in read_metrics(tmp_path / "tiny/finetune/digits/metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["split"] for line in epochs] == ["train", "val"] * 20
    assert epochs[-2]["accuracy"] == record["scores"]["train"]["accuracy"]
