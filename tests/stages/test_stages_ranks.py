"""Stages among several ranks: rank 0 owns and writes, every rank gets the result or the same sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import begun_world, in_world, reached, tiny_context, wait_for, world_killed_when

from maehpc.errors import InputError, RunError
from maehpc.ownership import own
from maehpc.stages.begin import begin
from maehpc.stages.context import Context
from maehpc.stages.finetune import finetune
from maehpc.stages.pipeline import run_stages
from maehpc.stages.preflight import check
from maehpc.stages.pretrain import pretrain
from maehpc.stages.verify import verify_results
from maehpc.training.distributed import World

CHAIN = ["pretrain", "finetune"]


def pipeline(context: Context) -> dict[str, object]:
    context.world.from_leader(lambda: check(context, CHAIN))
    with begin(context, ["run", "pipeline"], CHAIN):
        return dict(run_stages([context], CHAIN)[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    context = tiny_context(tmp_path_factory.mktemp("finished"))
    pipeline(context)
    return context


@pytest.mark.slow
def test_stages_of_two_ranks_killed_one_after_the_other_are_whole_in_the_end(tmp_path: Path) -> None:
    contexts = [tiny_context(tmp_path, name=name) for name in ("whole", "broken")]
    whole, broken = contexts

    def work(context: Context) -> Callable[[World], object]:
        def rank(world: World) -> None:
            records = pipeline(replace(context, world=world))
            assert all(record == records for record in world.together(lambda: json.loads(json.dumps(records))))

        return rank

    in_world(2, work(whole))
    for stage, step in (("pretrain", 4), ("finetune", 2)):
        due = reached(broken.experiment.root / stage / "digits" / "checkpoints", step)
        assert world_killed_when(2, work(broken), due), stage
    in_world(2, work(broken))
    for stage in ("pretrain", "finetune"):
        for name in ("done.json", "metrics.jsonl", "stage.json"):
            ours, theirs = (context.experiment.stage(stage, "digits") / name for context in contexts)
            assert ours.read_bytes() == theirs.read_bytes()
    assert verify_results(broken.experiment.root).problems == []


def test_a_refusal_is_told_on_every_rank_and_nobody_hangs(finished: Context, tmp_path: Path) -> None:
    other = tiny_context(finished.experiment.root.parent, "pretrain.mask_ratio=0.5")
    missing = tiny_context(tmp_path)

    def work(world: World) -> None:
        with pytest.raises(InputError, match=r"was begun with another recipe .*--name"):
            pipeline(replace(other, world=world))
        with pytest.raises(InputError, match=r"pretrain.mask_ratio was 0.75 and is 0.5 now.*--name"):
            pretrain(replace(other, world=world), "digits")
        with pytest.raises(InputError, match="no finished pretrain; run `maehpc run pretrain"):
            finetune(replace(missing, world=world), "digits")

    in_world(2, work)


def test_a_folder_that_another_run_owns_is_refused_on_every_rank(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)

    def work(world: World) -> None:
        with pytest.raises(InputError, match="is being written by"):
            pretrain(replace(context, world=world), "digits")

    with own(context.experiment.stage("pretrain", "digits")):
        in_world(2, work)


def test_a_newer_attempt_ends_all_ranks_of_the_older(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "pretrain.epochs=60", "pretrain.checkpoint.every_steps=2")
    owned = context.experiment.stage("pretrain", "digits")

    def work(world: World) -> None:
        with pytest.raises(RunError, match=r"attempt 1 no longer owns .*: attempt 2 has begun; this process stops"):
            pretrain(replace(context, world=world), "digits")

    pids = begun_world(2, work)
    first = owned / "attempts/0001.json"

    def fence() -> bool:
        if first.exists():
            (owned / "attempts/0002.json").touch()
        return False

    assert wait_for(pids, fence) == [0, 0]


def test_a_divergence_is_told_on_every_rank(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "pretrain.optim.base_lr=1e30", "pretrain.checkpoint.every_steps=1")

    def work(world: World) -> None:
        with pytest.raises(RunError, match=r"step \d+: the (loss|grad norm|weights .*) (is|are) (nan|inf|not finite)"):
            pretrain(replace(context, world=world), "digits")

    in_world(3, work)
    assert not (context.experiment.stage("pretrain", "digits") / "done.json").exists()
