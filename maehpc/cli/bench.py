"""`maehpc bench`: measured figures of this machine, each beside a peer's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maehpc.cli.options import (
    complete_method,
    complete_profile,
    complete_recipe,
    json_option,
    results_option,
    set_verbosity,
    verbosity_options,
)
from maehpc.cli.paths import GivenPath

if TYPE_CHECKING:
    from maehpc.bench.figures import Report
    from maehpc.progress import Progress

PARTS = ("dry-run", "first-step", "checkpoint", "ddp")


def _measured(name: str) -> Callable[[Callable[..., Report]], Callable[..., None]]:
    """Lets a command write the figures down that its function returns, and print them.

    Beside its own options the function is given `progress`, `results` (the folder of experiments) and `out` (the file
    of the figures where one was named).
    """

    def decorate(function: Callable[..., Report]) -> Callable[..., None]:
        @wraps(function)
        def measure(out: Path | None, results: Path, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
            from maehpc.cli.terminal import reporter

            set_verbosity(verbose)
            found = function(progress=reporter(quiet), results=results, out=out, **options)
            _told(found, out or results / "benchmarks" / f"{name}-{_time()}.json", as_json)

        to_file = click.option(
            "--out",
            type=GivenPath(dir_okay=False, path_type=Path),
            help=f"File of the figures.  [default: RESULTS/benchmarks/{name}-TIME.json]",
        )
        return to_file(results_option(json_option(verbosity_options(measure))))

    return decorate


@click.group("bench")
def command() -> None:
    """Measure speed on this machine and write it down."""


@command.command("launch")
@click.option("--cluster", shell_complete=complete_profile, help="Also measure through this profile's scheduler.")
@click.option("--recipe", shell_complete=complete_recipe, help="What is trained.  [default: ViT-tiny on digits, 28 px]")
@click.option("--parts", help=f"Of {', '.join(PARTS)}, with commas between.  [default: all]")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each part.")
@click.option("--quick", is_flag=True, help="Fewer steps: figures to try the command out, not to keep.")
@_measured("launch")
def launch(
    cluster: str | None,
    recipe: str | None,
    parts: str | None,
    repeats: int,
    quick: bool,
    progress: Progress,
    results: Path,
    out: Path | None,
) -> Report:
    """What launching costs: the dry run, the way to the first step, a checkpoint, a second rank."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as every job has it; OpenMP reads it as PyTorch is imported
    from maehpc.bench.launch import run
    from maehpc.launch.profile import load_profile
    from maehpc.recipes import load_recipe

    chosen = _parts(parts)
    if cluster is not None:
        load_profile(cluster)  # a wrong name is told before minutes of measuring
    trained = load_recipe(recipe, stage="pretrain") if recipe else None
    return run(results, progress, chosen, cluster, trained, repeats, quick)


@command.command("explain")
@click.option(
    "--peer",
    type=click.Choice(["captum", "captum-stock", "none"]),
    default="captum",
    show_default=True,
    help="What stands beside ours; captum-stock: with its own noise, in fp32 whatever --precision says.",
)
@click.option(
    "--model", default="vit-tiny", show_default=True, help="vit-tiny, vit-small, vit-base, vit-large, vit-huge."
)
@click.option("--image-size", type=click.IntRange(min=1), default=224, show_default=True, help="Pixels.")
@click.option(
    "--methods",
    default="saliency,gradcam,deeplift-captum,deeplift",
    show_default=True,
    shell_complete=complete_method,
    help="With commas between.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Perturbations an image.  [default: 10; quick: 2]")
@click.option("--images", type=click.IntRange(min=1), help="Of a turn.  [default: what fills the threads, 8 or more]")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds.  [default: 5; quick: 1]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of either.  [default: PyTorch's]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of products with weights, ours and the peer's.",
)
@click.option("--quick", is_flag=True, help="Less of everything: figures to try the command out, not to keep.")
@_measured("explain")
def explain(
    peer: Any,
    model: str,
    image_size: int,
    methods: str,
    samples: int | None,
    images: int | None,
    repeats: int | None,
    device: Any,
    threads: int | None,
    precision: Any,
    quick: bool,
    progress: Progress,
    results: Path,
    out: Path | None,
) -> Report:
    """What explaining costs: maps and max sensitivity a second, by each method and by three together."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from maehpc.bench.case import Case
    from maehpc.bench.explain import Effort, run
    from maehpc.devices import choose_device, set_threads
    from maehpc.errors import InputError
    from maehpc.recipes import EncoderSettings
    from maehpc.recipes.settings import ENCODER_SIZES

    if model not in ENCODER_SIZES:
        raise InputError(f"--model {model}: choose from {', '.join(ENCODER_SIZES)}")
    case = Case(
        encoder=EncoderSettings(name=model, weights="scratch"),
        image_size=image_size,
        samples=samples or (2 if quick else 10),
        device="cuda" if choose_device(device).type == "cuda" else "cpu",
        precision=precision,
    )
    least = Effort(repeats=1, turns=2, matrix=512) if quick else Effort()
    effort = replace(least, repeats=repeats or least.repeats)
    set_threads(threads)
    words = [word.strip() for word in methods.split(",") if word.strip()]
    return run(progress, case, words, peer, images or (2 if quick else None), effort)


@command.command("pool")
@click.option("--simulate", is_flag=True, help="Drive the real scheduler over simulated GPUs.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Real ones, on this machine.")
@click.option("--shards", type=click.IntRange(min=2), default=200, show_default=True, help="Of the real workers.")
@click.option(
    "--shard-seconds",
    type=click.FloatRange(min=0),
    default=0.1,
    show_default=True,
    help="That a real worker waits for each.",
)
@click.option("--explain", is_flag=True, help="Also explain with one real worker and with all of them.")
@click.option("--gpus", type=click.IntRange(min=1), default=1024, show_default=True, help="Workers, one a GPU.")
@click.option("--images", type=click.IntRange(min=1), default=10_000_000, show_default=True, help="In all stores.")
@click.option("--stores", type=click.IntRange(min=1), default=12, show_default=True, help="Of unequal size and cost.")
@click.option("--shard-images", type=click.IntRange(min=1), default=64, show_default=True, help="Images a shard.")
@click.option(
    "--seconds-per-image",
    type=click.FloatRange(min=0, min_open=True),
    default=0.08,
    show_default=True,
    help="Mean, on one worker.",
)
@click.option("--sigma", type=click.FloatRange(min=0), default=0.25, show_default=True, help="Of log shard seconds.")
@click.option("--gpus-per-host", type=click.IntRange(min=1), default=8, show_default=True, help="They fail together.")
@click.option(
    "--mtbf",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Mean hours between two failures of a host; 0: none fails.",
)
@click.option(
    "--repair", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds until it is back."
)
@click.option(
    "--start", type=click.FloatRange(min=0), default=20.0, show_default=True, help="Seconds to a worker's first shard."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs, each with a new seed.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first run.")
@_measured("pool")
def pool(
    simulate: bool,
    workers: int,
    shards: int,
    shard_seconds: float,
    explain: bool,
    gpus: int,
    images: int,
    stores: int,
    shard_images: int,
    seconds_per_image: float,
    sigma: float,
    gpus_per_host: int,
    mtbf: float,
    repair: float,
    start: float,
    repeats: int,
    seed: int,
    progress: Progress,
    results: Path,
    out: Path | None,
) -> Report:
    """What a pool makes of its time: overhead a shard; of a thousand GPUs, the makespan beside its lower bound.

    Options from --gpus to --seed belong to --simulate.
    """
    from maehpc.bench.pool import Load, run_real, run_simulated
    from maehpc.bench.simulated import Machines
    from maehpc.errors import InputError

    if not simulate:
        found = run_real(progress, workers, shards, shard_seconds, repeats)
        if explain:
            from maehpc.bench.efficiency import Load as Explained
            from maehpc.bench.efficiency import efficiency_part

            folder = results / "benchmarks" if out is None else out.parent
            part, more = efficiency_part(progress, folder, workers, Explained(), repeats)
            found = replace(found, parts=(*found.parts, part), results={**found.results, **more})
        return found
    if stores > images:
        raise InputError(f"--stores {stores}: there are no more than {images} images; choose fewer stores")
    load = Load(images, stores, shard_images, seconds_per_image)
    machines = Machines(gpus, gpus_per_host, start, sigma, mtbf or None, repair)
    return run_simulated(progress, load, machines, repeats, seed)


@command.command("maps")
@click.option("--images", type=click.IntRange(min=1), help="Of the finished store.  [default: 1000000; quick: 20000]")
@click.option("--shard-images", type=click.IntRange(min=1), default=256, show_default=True, help="Images a shard.")
@click.option("--image-size", type=click.IntRange(min=16), default=224, show_default=True, help="Pixels.")
@click.option(
    "--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True, help="Of maps."
)
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds.  [default: 7; quick: 2]")
@click.option("--quick", is_flag=True, help="Less of everything: figures to try the command out, not to keep.")
@_measured("maps")
def maps(
    images: int | None,
    shard_images: int,
    image_size: int,
    dtype: Any,
    repeats: int | None,
    quick: bool,
    progress: Progress,
    results: Path,
    out: Path | None,
) -> Report:
    """What a store of explanations costs: a shard beside np.save and zarr, a finished store that is taken up.

    Files are written below RESULTS/benchmarks, on whose file system it is measured, and removed.
    """
    from maehpc.bench.maps import Load, run
    from maehpc.errors import InputError

    if image_size % 16:
        raise InputError(f"--image-size {image_size}: choose a multiple of 16, the side of the model's patches")
    least = Load(images=20_000, explained=2, repeats=2) if quick else Load()
    load = replace(
        least,
        images=images or least.images,
        shard_images=shard_images,
        image_size=image_size,
        dtype=dtype,
        repeats=repeats or least.repeats,
    )
    return run(progress, results / "benchmarks", load)


def _parts(text: str | None) -> list[str]:
    from maehpc.errors import InputError

    chosen = list(PARTS) if text is None else [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in chosen if word not in PARTS]
    if wrong or not chosen:
        raise InputError(f"--parts {text}: choose from {', '.join(PARTS)}, with commas between")
    return chosen


def _told(found: Report, path: Path, as_json: bool) -> None:
    """Writes the figures down and prints them."""
    from maehpc import files

    files.write_json(path, found.as_json())
    if as_json:
        click.echo(json.dumps(found.as_json()))
        return
    click.echo("\n".join(found.lines()))
    click.echo(f"written to {path}")


def _time() -> str:
    """A name for people; nothing is decided by it."""
    from datetime import UTC, datetime

    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
