"""Ranks that train together: as one process within rounding, and as themselves, bit for bit, whatever happens."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    begun_world,
    in_world,
    killed_at_shares,
    reached,
    tiny_context,
    tiny_recipe,
    wait_for,
    world_killed_when,
)
from torch import nn

from maehpc import files
from maehpc.data import prepare
from maehpc.data.loading import StreamedSplit
from maehpc.errors import Interrupted
from maehpc.interruption import Stop
from maehpc.progress import Silent
from maehpc.stages.context import Context, stage_folder
from maehpc.stages.finetune import finetune
from maehpc.stages.pretrain import pretrain
from maehpc.training import distributed
from maehpc.training.batches import Part, dealt, parts_of_step
from maehpc.training.checkpoints import list_checkpoints
from maehpc.training.distributed import World, summing
from maehpc.training.log import read_metrics
from maehpc.training.loop import Loop, TrainingTask, train
from maehpc.training.optim import build_optimizer

Stage = Callable[[Context, str], dict[str, Any]]
STAGES: dict[str, Stage] = {"pretrain": pretrain, "finetune": finetune}
OUTPUT = {"pretrain": "mae.safetensors", "finetune": "classifier.safetensors"}
WHOLE = ("encoder.weights=scratch", "finetune.freeze=false", "finetune.optim.lr=1e-3")
KINDS = {
    "pretraining": ("pretrain", ()),
    "pretraining, accumulated": ("pretrain", ("pretrain.accumulate=4",)),
    # 33 images in batches of 8: the last batch of an epoch holds one, so that the other ranks have none
    "whole classifier": (
        "finetune",
        (*WHOLE, "finetune.images=33", "finetune.batch_size=8", "finetune.crop_scale=[0.5, 1.0]"),
    ),
    "frozen encoder": ("finetune", ("encoder.weights=scratch", "finetune.images=100")),
    "frozen encoder, augmented": ("finetune", ("encoder.weights=scratch", "finetune.crop_scale=[0.5, 1.0]")),
}


def folder_of(context: Context, name: str) -> Path:
    return context.experiment.stage(name, "digits")


def work(context: Context, name: str, bucket_mib: float = 0.002) -> Callable[[World], object]:
    """One rank of a stage; gradients of the tiny model go in several parts."""

    def rank(world: World) -> None:
        distributed.BUCKET_MIB = bucket_mib
        STAGES[name](replace(context, world=world), "digits")

    return rank


def results(context: Context, name: str) -> dict[str, str]:
    folder = folder_of(context, name)
    return {file: files.sha256_file(folder / file) for file in (OUTPUT[name], "metrics.jsonl", "done.json")}


def close(one: Context, other: Context, name: str, rel: float) -> None:
    ours, theirs = (read_metrics(folder_of(context, name) / "metrics.jsonl") for context in (one, other))
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine == {
            key: pytest.approx(value, rel=rel) if isinstance(value, float) else value for key, value in yours.items()
        }
    first, second = (load_file(folder_of(context, name) / OUTPUT[name]) for context in (one, other))
    for key, tensor in first.items():
        if key.endswith("qkv.bias"):
            # Keys' biases have no effect: their gradients are rounding alone, which Adam brings to the size of a step.
            tensor, second[key] = (weights.view(3, -1)[[0, 2]] for weights in (tensor, second[key]))
        torch.testing.assert_close(tensor, second[key], rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "accumulate"), [(32, 1), (32, 4), (30, 7), (3, 1), (1, 8)])
def test_parts_cover_a_step_once(size: int, count: int, accumulate: int) -> None:
    parts = [parts_of_step(count, accumulate, World(rank, size)) for rank in range(size)]
    own = [part for rank in parts for part in rank if part.weight]
    assert [index for part in own for index in range(count)[part.span]] == list(range(count))
    assert sum(part.weight for part in own) == pytest.approx(1)
    assert all(part.weight == (part.span.stop - part.span.start) / count for part in own)
    assert all([part.last for part in rank] == [False] * (len(rank) - 1) + [True] for rank in parts)
    most = -(-count // accumulate)  # what one process alone computes at once
    assert all(part.span.stop - part.span.start <= most for part in own)
    assert all(len(rank) == 1 and rank[0] == Part(slice(0, 1), 0.0, True) for rank in parts if not rank[0].weight)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_agrees_with_one_process(size: int, kind: str, tmp_path: Path) -> None:
    name, overrides = KINDS[kind]
    alone, many = (tiny_context(tmp_path, *overrides, name=word) for word in ("alone", "many"))
    STAGES[name](alone, "digits")
    in_world(size, work(many, name))
    if kind == "frozen encoder":  # every rank takes the same steps
        assert results(alone, name) == results(many, name)
    close(alone, many, name, rel=2e-3)


def test_the_first_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    overrides = ("pretrain.epochs=2", "pretrain.images=10", "pretrain.batch_size=10")  # 3 ranks: 4, 3 and 3 images
    alone, many = (tiny_context(tmp_path, *overrides, name=word) for word in ("alone", "many"))
    pretrain(alone, "digits")
    in_world(3, work(many, "pretrain"))
    ours, theirs = (read_metrics(folder_of(context, "pretrain") / "metrics.jsonl")[0] for context in (alone, many))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_micro_batches_do_not_change_a_crop_or_a_mask(tmp_path: Path) -> None:
    first = []
    for parts in (1, 4):
        overrides = (f"pretrain.accumulate={parts}", "pretrain.crop_scale=[0.3, 1.0]", "pretrain.epochs=2")
        context = tiny_context(tmp_path, *overrides, name=f"a{parts}")
        pretrain(context, "digits")
        first.append(read_metrics(folder_of(context, "pretrain") / "metrics.jsonl")[0])
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("pretraining", ("pretrain.epochs=8",)),
        ("pretraining, accumulated", ("pretrain.epochs=6",)),
        ("whole classifier", ("finetune.drop_path=0.3", "finetune.epochs=3")),
        ("frozen encoder, augmented", ("finetune.epochs=3",)),
    ],
)
def test_four_ranks_killed_at_random_instants_end_bitwise_the_same(
    kind: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    name, more = KINDS[kind]
    whole, broken = (tiny_context(tmp_path, *more, *overrides, name=word) for word in ("whole", "broken"))
    prepare("digits", 28, whole.packs).close()
    begun = time.monotonic()
    in_world(4, work(whole, name))
    seconds = time.monotonic() - begun
    chance = random.Random(kind)

    def killed(after: float) -> bool:
        until = time.monotonic() + after
        return world_killed_when(4, work(broken, name), lambda: time.monotonic() >= until)

    shares = [chance.uniform(0.2, 0.8) for _ in range(4)]
    kills = killed_at_shares(killed, shares, seconds, lambda: shutil.rmtree(broken.experiment.root))
    assert kills, "no attempt was killed while it worked"
    in_world(4, work(broken, name))
    assert results(broken, name) == results(whole, name)


class Lopsided(TrainingTask):
    """One of its layers gets no gradient."""

    batch_size = 4
    steps_per_epoch = 5

    def __init__(self, world: World) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
        self.module.forward = lambda x: self.module["used"](x)
        self.optimizer = build_optimizer(
            [{"params": list(self.module.parameters()), "lr_scale": 1.0, "weight_decay": 0.1}],
            tiny_recipe().pretrain.optim,
        )
        self._world = world

    def backward(self, step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        total = torch.zeros(())
        for part in parts_of_step(4, 2, self._world):
            with summing(self.model, part.last):
                loss = self.model(x[part.span]).square().mean() * part.weight
                (loss * self._world.size).backward()
            total += loss.detach()
        return {"loss": total}


def test_parameters_without_a_gradient_are_left_alone_as_by_one_process(tmp_path: Path) -> None:
    def rank(world: World) -> None:
        task = Lopsided(world)
        before = {name: tensor.clone() for name, tensor in task.module.state_dict().items()}
        folder = tmp_path / str(world.size)
        loop = Loop("lopsided", "test", 0, tiny_recipe().pretrain)
        with stage_folder(folder, {}, world) as (_, owner):
            train(task, loop, folder, "digest", owner, Silent(), world)
        after = task.module.state_dict()
        assert torch.equal(before["unused.weight"], after["unused.weight"])
        assert not torch.equal(before["used.weight"], after["used.weight"])

    for size in (1, 2):
        in_world(size, rank)
    one, two = (read_metrics(tmp_path / str(size) / "metrics.jsonl") for size in (1, 2))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)


@pytest.mark.slow
def test_three_ranks_killed_after_a_checkpoint_end_bitwise_the_same(tmp_path: Path) -> None:
    # The first backward decides where gradients stand among others, and so the rounding of sums of three.
    whole, broken = (tiny_context(tmp_path, name=word) for word in ("whole", "broken"))
    in_world(3, work(whole, "pretrain"))
    due = reached(folder_of(broken, "pretrain") / "checkpoints", 8)
    assert world_killed_when(3, work(broken, "pretrain"), due)
    in_world(3, work(broken, "pretrain"))
    assert results(broken, "pretrain") == results(whole, "pretrain")


@pytest.mark.slow
def test_one_rank_killed_ends_the_others_and_nothing_is_lost(tmp_path: Path) -> None:
    whole, broken = (tiny_context(tmp_path, "pretrain.epochs=6", name=word) for word in ("whole", "broken"))
    in_world(3, work(whole, "pretrain"))
    pids = begun_world(3, work(broken, "pretrain"))
    codes = _killed(pids, pids[1], reached(folder_of(broken, "pretrain") / "checkpoints", 8))
    assert codes[1] == -9 and codes[0] == codes[2] == 1
    in_world(3, work(broken, "pretrain"))
    assert results(broken, "pretrain") == results(whole, "pretrain")


def _killed(pids: list[int], victim: int, due: Callable[[], bool]) -> list[int | None]:
    struck = False

    def strike() -> bool:
        nonlocal struck
        if not struck and due():
            os.kill(victim, signal.SIGKILL)
            struck = True
        return False

    return wait_for(pids, strike, limit=60.0)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_state_loads_on_any_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    whole, moved = (tiny_context(tmp_path, "pretrain.epochs=4", name=word) for word in ("whole", "moved"))
    pretrain(whole, "digits")
    due = reached(folder_of(moved, "pretrain") / "checkpoints", 12)
    assert world_killed_when(before, work(moved, "pretrain"), due)
    in_world(after, work(moved, "pretrain"))
    close(whole, moved, "pretrain", rel=5e-3)


class StopAt(Stop):
    """Asks for the end when it has been looked at so many times; then tells how many times it was."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def reason(self) -> str | None:
        self.looks -= 1
        if self.looks < 0:
            self.request("the test wants it")
        return super().reason


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_one_rank_that_is_asked_to_stop_stops_all_after_the_same_step(size: int, tmp_path: Path) -> None:
    whole, broken = (tiny_context(tmp_path, name=word) for word in ("whole", "broken"))
    in_world(size, work(whole, "pretrain"))

    def stopped(world: World) -> None:
        distributed.BUCKET_MIB = 0.002
        stop = StopAt(6) if world.rank == size - 1 else Stop()
        with pytest.raises(Interrupted, match=r"pretrain digits was interrupted \(the test wants it\)") as caught:
            pretrain(replace(broken, world=world, stop=stop), "digits")
        assert caught.value.step == 7
        assert (folder_of(broken, "pretrain") / "checkpoints/step-00000007").is_dir()

    in_world(size, stopped)
    assert read_metrics(folder_of(broken, "pretrain") / "metrics.jsonl")[-1]["step"] == 7
    in_world(size, work(broken, "pretrain"))
    assert results(broken, "pretrain") == results(whole, "pretrain")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("overrides", [WHOLE, ("encoder.weights=scratch",)], ids=["whole classifier", "frozen encoder"])
def test_asked_to_stop_at_any_look_nothing_is_lost(overrides: tuple[str, ...], size: int, tmp_path: Path) -> None:
    """Features, steps, scores at an epoch's end, scores at the end: each is stopped in, and gone on with."""
    few = (*overrides, "finetune.epochs=2", "finetune.batch_size=50", "finetune.checkpoint.every_steps=3")
    whole = tiny_context(tmp_path, *few, name="whole")
    in_world(size, work(whole, "finetune"))
    record = tmp_path / "interruptions"

    def stopped(world: World) -> None:
        for looks in range(100):
            broken = replace(tiny_context(tmp_path, *few, name=f"broken{looks}"), world=world)
            stop = StopAt(looks) if world.rank == size - 1 else Stop()
            try:
                finetune(replace(broken, stop=stop), "digits")
                return
            except Interrupted as interrupted:
                if world.leader:
                    with record.open("a") as handle:
                        handle.write(f"{interrupted.step}\n")
            finetune(broken, "digits")
            assert results(broken, "finetune") == results(whole, "finetune"), looks
        raise AssertionError("it never came to its end")

    in_world(size, stopped)
    assert set(record.read_text().split()) == {"None", "1", "2", "3", "4"}


def test_a_stop_while_a_checkpoint_is_there_already_writes_no_other(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    with pytest.raises(Interrupted):
        pretrain(replace(context, stop=StopAt(3)), "digits")
    checkpoints = folder_of(context, "pretrain") / "checkpoints"
    (there,) = list_checkpoints(checkpoints)
    assert there.name == "step-00000004"
    inode = there.stat().st_ino
    with pytest.raises(Interrupted) as caught:
        finetune(replace(tiny_context(tmp_path, "encoder.weights=scratch"), stop=StopAt(0)), "digits")
    assert caught.value.step is None  # features were being computed: nothing had been trained
    assert there.stat().st_ino == inode


def test_a_streamed_split_gives_the_same_and_each_rank_reads_its_own_images_alone(tmp_path: Path) -> None:
    # The images of a step are read while the one before it is computed.
    crops = ("pretrain.crop_scale=[0.5, 1.0]", "pretrain.epochs=2")
    resident, alone = tiny_context(tmp_path, *crops, name="resident"), tiny_context(tmp_path, *crops, name="alone")
    streamed = tiny_context(tmp_path, *crops, "data.resident_bytes=1", name="alone")
    pretrain(resident, "digits")
    pretrain(streamed, "digits")
    assert results(resident, "pretrain") == results(alone, "pretrain")

    many = tiny_context(tmp_path, *crops, "data.resident_bytes=1", name="many")
    several = tiny_context(tmp_path, *crops, name="several")

    def rank(world: World) -> None:
        read: list[int] = []
        batch = StreamedSplit.batch

        def counted(split: StreamedSplit, indices: torch.Tensor) -> torch.Tensor:
            read.append(len(indices))
            return batch(split, indices)

        StreamedSplit.batch = counted
        work(many, "pretrain")(world)
        assert read
        assert set(read) == ({16, 3} if world.leader else {16})  # 3: reconstructions
        work(several, "pretrain")(world)

    in_world(2, rank)
    assert results(many, "pretrain") == results(several, "pretrain")


def test_a_rank_without_a_chunk_has_the_result_where_it_is_wanted() -> None:
    """Features of a small split are computed by one rank, and trained on by every rank's own device."""

    class Second(World):
        def gather(self, tensor: torch.Tensor | None) -> list[torch.Tensor]:
            assert tensor is None, "the only chunk is rank 0's"
            return [torch.ones(3, 2), torch.empty(0, 2)]

        def largest(self, value: int) -> int:
            return value

    wanted = torch.device("meta")  # stands for a GPU
    rows = dealt(Second(rank=1, size=2), Stop(), "x", torch.arange(3), lambda chunk: chunk, wanted)
    assert (rows.device, rows.shape) == (wanted, (3, 2))
