"""One rank of a measured training: `python -m maehpc.bench.rank SPEC.json RANK`.

`ours` runs the pretrain stage as a job does; `bare` is the peer, a loop that does what a short script with
DistributedDataParallel would do: the same model, batch and optimizer on the same images, and nothing else. Rank 0
leaves a record of times. The clock is the machine's own (CLOCK_MONOTONIC), which all its processes share.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from maehpc import files


@dataclass(frozen=True)
class Spec:
    """What the ranks of one run do.

    Attributes:
        kind: ours or bare.
        size: ranks.
        threads: CPU threads a rank.
        device: cpu or cuda.
        folder: of the run: results, meeting place, record.
        packs: of packed data sets.
        recipe: the resolved recipe.
        spawned: when the ranks were started, on the machine's clock.
    """

    kind: Literal["ours", "bare"]
    size: int
    threads: int
    device: Literal["cpu", "cuda"]
    folder: str
    packs: str
    recipe: dict[str, Any]
    spawned: float

    @property
    def record(self) -> Path:
        """Where rank 0 leaves its times."""
        return Path(self.folder) / "times.json"


@dataclass(frozen=True)
class Times:
    """What rank 0 leaves.

    Attributes:
        imported_s: from the start of the process until everything is imported.
        joined_s: meeting the other ranks took.
        first_step_s: from the start of the process to its first finished step.
        images_per_second: of every epoch but the first, over all ranks.
        all_reduce_s: one sum of all gradients among the ranks, several times.
        parameters: of the model.
    """

    imported_s: float
    joined_s: float
    first_step_s: float
    images_per_second: list[float]
    all_reduce_s: list[float]
    parameters: int


class _Meeting:
    """Ranks meet through a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def publish(self, facts: dict[str, Any]) -> None:
        files.write_json(self._path, facts)

    def find(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return None
        return found


class _FirstStep:
    """A silent reporter that notes when the first unit is done."""

    def __init__(self) -> None:
        self.at: float | None = None

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> Iterator[_FirstStep]:
        yield self

    def advance(self, count: int = 1, **values: float) -> None:
        if self.at is None and count:
            self.at = time.monotonic()

    def say(self, sentence: str) -> None:
        return None

    def warn(self, sentence: str) -> None:
        print(sentence, file=sys.stderr)


def _ours(spec: Spec, rank: int) -> Times | None:
    import torch

    from maehpc.devices import choose_device
    from maehpc.experiment import Experiment
    from maehpc.recipes import Recipe
    from maehpc.stages.begin import begin
    from maehpc.stages.context import Context
    from maehpc.stages.pipeline import run_stages
    from maehpc.training.distributed import World, join

    torch.set_num_threads(spec.threads)
    imported = time.monotonic()
    device = choose_device(spec.device, rank)
    meeting = _Meeting(Path(spec.folder) / "meeting.json")
    progress = _FirstStep()
    experiment = Experiment(Path(spec.folder) / "experiment")
    recipe = Recipe.model_validate(spec.recipe)
    with join(World(rank, spec.size, rank), device, meeting) as world:
        joined = time.monotonic()
        context = Context(experiment, recipe, device, Path(spec.packs), progress, world)
        with begin(context, ["bench"], ["pretrain"]):
            run_stages([context], ["pretrain"])
        parameters = _parameters(recipe)
        reduced = _all_reduces(parameters, device) if spec.size > 1 else []
    if rank:
        return None
    assert progress.at is not None
    lines = (experiment.stage("pretrain", recipe.datasets[0]) / "speed.jsonl").read_text().splitlines()
    speeds = [record["images_per_second"] for record in map(json.loads, lines) if "images_per_second" in record]
    return Times(
        imported_s=imported - spec.spawned,
        joined_s=joined - imported,
        first_step_s=progress.at - spec.spawned,
        images_per_second=speeds[1:],
        all_reduce_s=reduced,
        parameters=parameters,
    )


def _parameters(recipe: Any) -> int:
    from maehpc.stages.pretrain import build_mae

    return sum(parameter.numel() for parameter in build_mae(recipe).parameters() if parameter.requires_grad)


def _all_reduces(numbers: int, device: Any, repeats: int = 11) -> list[float]:
    """Seconds of summing so many float32 among the ranks; the first time, which connects them, is left out."""
    import torch
    import torch.distributed as dist

    tensor = torch.zeros(numbers, device=device)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def _bare(spec: Spec, rank: int) -> Times | None:
    import torch
    import torch.distributed as dist
    from torch import nn

    from maehpc.data import Preprocess, open_split, prepare
    from maehpc.recipes import Recipe
    from maehpc.stages.pretrain import build_mae

    torch.set_num_threads(spec.threads)
    imported = time.monotonic()
    recipe = Recipe.model_validate(spec.recipe)
    settings = recipe.pretrain
    device = torch.device(spec.device, rank) if spec.device == "cuda" else torch.device("cpu")
    if spec.size > 1:
        meeting = f"file://{Path(spec.folder).absolute() / 'store'}"
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(minutes=5)
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=spec.size, timeout=limit)
    joined = time.monotonic()

    with prepare(recipe.datasets[0], recipe.data.source_size, Path(spec.packs)) as pack:
        split = open_split(pack, "train", recipe.data, device)
        count = min(settings.images or len(split), len(split))
        preprocess = Preprocess(recipe.data, pack.info)
        images = preprocess.normalise(preprocess.pixels(split.batch(torch.arange(count))))
    mae = build_mae(recipe).to(device).train()
    model: nn.Module = mae
    if spec.size > 1:
        model = nn.parallel.DistributedDataParallel(mae, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    share = settings.batch_size // spec.size
    speeds, first = [], None
    for _ in range(settings.epochs):
        begun = time.perf_counter()
        order = torch.randperm(count)
        steps = count // settings.batch_size
        for step in range(steps):
            start = step * settings.batch_size + rank * share
            batch = images[order[start : start + share].to(device)]
            noise = torch.rand(share, mae.patches, device=device)
            optimizer.zero_grad(set_to_none=True)
            loss = model(batch, noise, settings.mask_ratio).loss
            loss.backward()
            optimizer.step()
            loss.item()
            first = first or time.monotonic()
        speeds.append(steps * settings.batch_size / (time.perf_counter() - begun))
    parameters = sum(parameter.numel() for parameter in mae.parameters() if parameter.requires_grad)
    reduced = _all_reduces(parameters, device) if spec.size > 1 else []
    if spec.size > 1:
        dist.destroy_process_group()
    if rank:
        return None
    assert first is not None
    return Times(
        imported_s=imported - spec.spawned,
        joined_s=joined - imported,
        first_step_s=first - spec.spawned,
        images_per_second=speeds[1:],
        all_reduce_s=reduced,
        parameters=parameters,
    )


def main(arguments: list[str]) -> None:
    """Runs one rank.

    Args:
        arguments: the spec's file and the rank.
    """
    spec = Spec(**json.loads(Path(arguments[0]).read_bytes()))
    times = {"ours": _ours, "bare": _bare}[spec.kind](spec, int(arguments[1]))
    if times is not None:
        files.write_json(spec.record, asdict(times))


if __name__ == "__main__":
    main(sys.argv[1:])
