"""Stages among several ranks: rank 0 owns and writes, every rank gets the result or the same sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import begun_world, in_world, tiny_context, wait_for, world_killed_when

from maehpc import files
from maehpc.errors import InputError, Interrupted, RunError
from maehpc.interruption import Stop
from maehpc.ownership import own
from maehpc.progress import Silent
from maehpc.stages.begin import begin
from maehpc.stages.context import Context
from maehpc.stages.explain import explain
from maehpc.stages.pipeline import run_stages
from maehpc.stages.preflight import check
from maehpc.stages.pretrain import pretrain
from maehpc.stages.verify import verify_results
from maehpc.training.distributed import World

CHAIN = ["pretrain", "finetune", "explain"]


def pipeline(context: Context) -> dict[str, object]:
    context.world.from_leader(lambda: check(context, CHAIN))
    with begin(context, ["run", "pipeline"], CHAIN):
        return dict(run_stages([context], CHAIN)[0])


def maps_of(context: Context) -> dict[str, str]:
    folder = context.experiment.maps("digits")
    return {str(path.relative_to(folder)): files.sha256_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    context = tiny_context(tmp_path_factory.mktemp("finished"))
    pipeline(context)
    return context


def unexplained(context: Context, folder: Path, *overrides: str) -> Context:
    """A copy of an experiment without its maps."""
    shutil.copytree(context.experiment.root.parent, folder, dirs_exist_ok=True)
    copy = tiny_context(folder, *overrides)
    shutil.rmtree(copy.experiment.maps("digits"))
    shutil.rmtree(copy.experiment.ledger("digits"))
    return copy


@pytest.mark.slow
def test_a_pipeline_of_two_ranks_killed_in_each_stage_is_whole_in_the_end(tmp_path: Path) -> None:
    contexts = [tiny_context(tmp_path, name=name) for name in ("whole", "broken")]
    whole, broken = contexts

    def work(context: Context) -> Callable[[World], object]:
        def rank(world: World) -> None:
            records = pipeline(replace(context, world=world))
            assert all(record == records for record in world.together(lambda: json.loads(json.dumps(records))))

        return rank

    in_world(2, work(whole))
    for due in (
        "pretrain/digits/checkpoints/step-00000004",
        "finetune/digits/checkpoints/step-00000002",
        "ledger/digits/shard-00000.json",
    ):
        assert world_killed_when(2, work(broken), (broken.experiment.root / due).exists), due
    in_world(2, work(broken))
    for stage in ("pretrain", "finetune"):
        for name in ("done.json", "metrics.jsonl", "stage.json"):
            ours, theirs = (context.experiment.stage(stage, "digits") / name for context in contexts)
            assert ours.read_bytes() == theirs.read_bytes()
    assert maps_of(whole) == maps_of(broken)
    assert verify_results(broken.experiment.root).problems == []


@pytest.mark.parametrize("size", [2, 4])  # three shards: of four ranks one has none
def test_ranks_that_share_shards_write_the_bytes_of_one(size: int, finished: Context, tmp_path: Path) -> None:
    shared = unexplained(finished, tmp_path)

    def work(world: World) -> None:
        record = explain(replace(shared, world=world), "digits")
        assert record["computed"] == record["shards"] == 3

    in_world(size, work)
    assert maps_of(shared) == maps_of(finished)
    assert verify_results(shared.experiment.root).problems == []


def test_a_stop_of_one_rank_ends_explaining_on_all_between_batches(finished: Context, tmp_path: Path) -> None:
    whole, shared = (unexplained(finished, tmp_path / name, "explain.batch_size=1") for name in ("whole", "shared"))
    explain(whole, "digits")

    class AfterTwo(Stop):
        looks = 0

        @property
        def reason(self) -> str | None:
            self.looks += 1
            if self.looks == 3:
                self.request("the test wants it")
            return super().reason

    def work(world: World) -> None:
        stop = AfterTwo() if world.rank == 1 else Stop()
        with pytest.raises(Interrupted, match="explain digits was interrupted"):
            explain(replace(shared, world=world, stop=stop), "digits")
        assert stop.reason is not None

    in_world(2, work)
    assert not list(shared.experiment.ledger("digits").glob("shard-00001.json"))
    explain(shared, "digits")
    assert maps_of(shared) == maps_of(whole)


def test_a_refusal_is_told_on_every_rank_and_nobody_hangs(finished: Context, tmp_path: Path) -> None:
    other = tiny_context(finished.experiment.root.parent, "pretrain.mask_ratio=0.5")
    missing = tiny_context(tmp_path)

    def work(world: World) -> None:
        with pytest.raises(InputError, match=r"was begun with another recipe .*--name"):
            pipeline(replace(other, world=world))
        with pytest.raises(InputError, match=r"pretrain.mask_ratio was 0.75 and is 0.5 now.*--name"):
            pretrain(replace(other, world=world), "digits")
        with pytest.raises(InputError, match="no finished finetune; run `maehpc run finetune"):
            explain(replace(missing, world=world), "digits")

    in_world(2, work)


def test_a_folder_that_another_run_owns_is_refused_on_every_rank(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)

    def work(world: World) -> None:
        with pytest.raises(InputError, match="is being written by"):
            pretrain(replace(context, world=world), "digits")

    with own(context.experiment.stage("pretrain", "digits")):
        in_world(2, work)


@pytest.mark.parametrize("stage", ["pretrain", "explain"])
def test_a_newer_attempt_ends_all_ranks_of_the_older(stage: str, finished: Context, tmp_path: Path) -> None:
    overrides = ("explain.batch_size=1", "pretrain.epochs=60", "pretrain.checkpoint.every_steps=2")
    context = tiny_context(tmp_path, *overrides)
    if stage == "explain":
        context = unexplained(finished, tmp_path, "explain.batch_size=1")
    owned = context.experiment.ledger("digits") if stage == "explain" else context.experiment.stage(stage, "digits")

    def work(world: World) -> None:
        with pytest.raises(RunError, match=r"attempt 1 no longer owns .*: attempt 2 has begun; this process stops"):
            (explain if stage == "explain" else pretrain)(replace(context, world=world), "digits")

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


class Counted(Silent):
    """Keeps what each bar was told."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> Iterator[Any]:
        counted = [done]

        class Told:
            def advance(self, count: int = 1, **values: float) -> None:
                counted[0] += count

        yield Told()
        self.file.write_text(json.dumps([total, done, counted[0], images]))


@pytest.mark.parametrize(("size", "shards"), [(2, 3), (4, 3), (2, 1)])
def test_progress_tells_of_all_images_however_they_are_shared(
    size: int, shards: int, finished: Context, tmp_path: Path
) -> None:
    """20 images in shards of 8, of which rank 0 has 12, or 8, or all that is missing."""
    shared = unexplained(finished, tmp_path)
    if shards == 1:
        explain(shared, "digits")
        (shared.experiment.ledger("digits") / "shard-00001.json").unlink()

    def work(world: World) -> None:
        progress = Counted(tmp_path / f"told-{world.rank}")
        explain(replace(shared, world=world, progress=progress), "digits")

    in_world(size, work)
    total, done, counted, images = json.loads((tmp_path / "told-0").read_text())
    assert (total, done, images) == (20, 0 if shards == 3 else 12, 1)
    assert counted == total
