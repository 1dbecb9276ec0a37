"""Checkpoints that are written while training goes on: the state of their step, whole, told when they fail."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import in_world, killed_when, reached, tiny_context, world_killed_when

from maehpc.errors import RunError
from maehpc.stages.pretrain import pretrain
from maehpc.training import saving
from maehpc.training.checkpoints import Checkpoint, list_checkpoints, read_checkpoint
from maehpc.training.distributed import World
from maehpc.training.saving import CheckpointWriter


def nothing(checkpoint: Checkpoint) -> None:
    return None


class Gate:
    """Holds the writing thread until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(30)


def test_the_state_is_that_of_its_step_though_training_goes_on(tmp_path: Path) -> None:
    gate = Gate()
    weights, moments = torch.ones(3), torch.zeros(2)
    with CheckpointWriter(tmp_path, "digest", 2, nothing, gate) as writer:
        writer.save(1, {"w": weights}, {"0.m": moments})
        assert gate.reached.wait(30)
        assert list_checkpoints(tmp_path) == []  # nothing is seen before it is whole
        weights += 1
        moments += 1
        gate.opened.set()
        writer.save(2, {"w": weights}, {"0.m": moments})
        writer.wait()
        records = writer.speed()
    first, second = (read_checkpoint(path)[0] for path in list_checkpoints(tmp_path))
    assert first.model["w"].tolist() == [1, 1, 1] and first.optimizer["0.m"].tolist() == [0, 0]
    assert second.model["w"].tolist() == [2, 2, 2] and second.optimizer["0.m"].tolist() == [1, 1]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["checkpoint_stall_s"] >= 0 and record["checkpoint_write_s"] > 0 for record in records)
    assert writer.speed() == []


def test_saving_does_not_wait_for_the_disk_but_the_next_saving_does(tmp_path: Path) -> None:
    gate = Gate()
    with CheckpointWriter(tmp_path, "digest", 2, nothing, gate) as writer:
        writer.save(1, {"w": torch.ones(1)}, {})
        assert not (tmp_path / "step-00000001").exists()
        second = threading.Thread(target=lambda: writer.save(2, {"w": torch.ones(1)}, {}))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        gate.opened.set()
        second.join(30)
        assert not second.is_alive()
        assert (tmp_path / "step-00000001").is_dir()


def test_what_refuses_a_checkpoint_is_told_by_the_next_call_and_leaves_nothing(tmp_path: Path) -> None:
    def refuse() -> None:
        raise RunError("fenced")

    with CheckpointWriter(tmp_path, "digest", 2, nothing, refuse) as writer:
        writer.save(1, {"w": torch.ones(1)}, {})
        with pytest.raises(RunError, match="fenced"):
            writer.save(2, {"w": torch.ones(1)}, {})
        assert isinstance(writer.failure, RunError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_log_reaches_up_to_every_checkpoint_that_can_be_seen(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "pretrain.epochs=6", "pretrain.checkpoint.every_steps=1")
    folder = context.experiment.stage("pretrain", "digits")
    for step in (3, 9, 15):
        assert killed_when(lambda: pretrain(context, "digits"), reached(folder / "checkpoints", step))
        newest = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step-"))
        logged = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert logged[-1] >= newest >= step


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_killed_while_a_checkpoint_is_written_the_one_before_is_gone_on_from(size: int, tmp_path: Path) -> None:
    whole, broken = (tiny_context(tmp_path, name=name) for name in ("whole", "broken"))
    checkpoints = broken.experiment.stage("pretrain", "digits") / "checkpoints"

    def work(world: World) -> None:
        save = saving.save_checkpoint

        def slow(folder, checkpoint, digest, keep, vouch):
            def stuck() -> None:
                vouch()
                if checkpoint.step == 8:
                    (broken.experiment.root / "stuck").touch()
                    threading.Event().wait()

            return save(folder, checkpoint, digest, keep, stuck)

        saving.save_checkpoint = slow
        pretrain(replace(broken, world=world), "digits")

    assert world_killed_when(size, work, (broken.experiment.root / "stuck").exists)
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-00000004"]
    assert any(path.name.startswith(".step-00000008") for path in checkpoints.iterdir())
    pretrain(broken, "digits")
    assert not any(path.name.startswith(".") for path in checkpoints.iterdir())
    if size == 1:
        pretrain(whole, "digits")
        for name in ("mae.safetensors", "metrics.jsonl"):
            ours, theirs = (context.experiment.stage("pretrain", "digits") / name for context in (broken, whole))
            assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_on_every_rank(size: int, tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "pretrain.epochs=40")
    folder = context.experiment.stage("pretrain", "digits")

    def work(world: World) -> None:
        if world.leader:
            folder.mkdir(parents=True)
            (folder / "checkpoints").touch()  # a file where a folder is needed
        world.barrier()
        with pytest.raises(RunError, match=r"cannot write .*checkpoints"):
            pretrain(replace(context, world=world), "digits")

    in_world(size, work)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 200


def test_stalls_are_recorded(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    pretrain(context, "digits")
    lines = (context.experiment.stage("pretrain", "digits") / "speed.jsonl").read_text().splitlines()
    saves = [record for line in lines if "checkpoint_stall_s" in (record := json.loads(line))]
    assert [record["step"] for record in saves] == [4, 8, 12, 16, 18]
    assert all(record.keys() == {"step", "checkpoint_stall_s", "checkpoint_write_s"} for record in saves)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_a_gpu_is_copied_before_later_steps_change_it(tmp_path: Path) -> None:
    weights = torch.ones(1 << 24, device="cuda")
    with CheckpointWriter(tmp_path, "digest", 2, nothing, lambda: None) as writer:
        writer.save(1, {"w": weights}, {})
        for _ in range(50):
            weights += 1
        writer.wait()
    assert bool((read_checkpoint(tmp_path / "step-00000001")[0].model["w"] == 1).all())
