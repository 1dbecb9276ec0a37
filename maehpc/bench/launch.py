"""What launching costs: the dry run, the way to the first step, a checkpoint, a second rank.

Every part names a peer that does the bare minimum, and the ratio to it. Runs that are compared take turns, so that
other work on the machine meets all of them alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maehpc import files
from maehpc.bench.figures import Figure, Part, Ratio, Report, figure, surroundings
from maehpc.bench.rank import Spec, Times
from maehpc.errors import RunError
from maehpc.progress import Progress
from maehpc.recipes import Recipe, load_recipe, recipe_yaml

if TYPE_CHECKING:
    from maehpc.launch.record import JobFolder

PARTS = ("dry-run", "first-step", "checkpoint", "ddp")

SETTINGS: dict[str, Any] = {
    "datasets": ("digits",),
    "data": {"image_size": 28, "normalization": "dataset"},
    "encoder": {"name": "vit-tiny", "patch_size": 4},
    "pretrain": {
        "decoder": {"width": 128, "depth": 2, "heads": 4},
        "batch_size": 128,
        "images": 1024,
        "epochs": 4,
        "optim": {"warmup_epochs": 0},
        "crop_scale": None,
        "reconstructions": 0,
        "checkpoint": {"every_steps": 1_000_000},
    },
}
"""ViT-tiny on digits at 28 pixels, 49 patches: eight steps an epoch. No crops, which the bare loop has not."""

LIMIT_S = 1200.0
ASK_EVERY_S = 5.0
"""Seconds between two questions to the scheduler whether it still has a job."""

QUICK = {"epochs": 2, "images": 256}


def default_recipe(quick: bool = False) -> Recipe:
    """What is trained where no other recipe is given."""
    settings = {**SETTINGS, "pretrain": {**SETTINGS["pretrain"], **(QUICK if quick else {})}}
    return load_recipe(None, settings=settings)


def _quiet_environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "2000", "PYTHONUNBUFFERED": "1"}


def _seconds(command: Sequence[str]) -> float:
    """Wall time of a process that must succeed.

    Raises:
        RunError: it failed.
    """
    begun = time.perf_counter()
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": _quiet_environment()}
    try:
        done = subprocess.run(command, timeout=LIMIT_S, check=False, **options)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{' '.join(command[1:4])} … took more than {LIMIT_S:.0f} s; run it by hand") from error
    seconds = time.perf_counter() - begun
    if done.returncode:
        told = " ".join((done.stderr or done.stdout).split())[-300:]
        raise RunError(f"{' '.join(command[1:4])} … ended with {done.returncode} ({told}); bench measures what works")
    return seconds


def _maehpc(*words: str) -> list[str]:
    return [sys.executable, "-m", "maehpc", *words]


@contextmanager
def _workplace(results: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, on the file system of the results, which hosts of a cluster share."""
    files.make_folder(results)
    with files.writing(results), tempfile.TemporaryDirectory(prefix=".bench-", dir=results.absolute()) as folder:
        yield Path(folder)


def run(
    results: Path,
    progress: Progress,
    parts: Sequence[str] = PARTS,
    cluster: str | None = None,
    recipe: Recipe | None = None,
    repeats: int = 5,
    quick: bool = False,
) -> Report:
    """Measures.

    Args:
        results: folder of experiments, below which the work lies meanwhile.
        progress: where to report.
        parts: of `PARTS`.
        cluster: profile whose way to the first step is measured beside the local one; also that of the dry run.
        recipe: of the training; the default where None.
        repeats: runs of everything.
        quick: fewer steps.

    Raises:
        RunError: something that is measured does not work.
    """
    chosen, around = recipe or default_recipe(quick), surroundings()
    found: list[Part] = []
    with _workplace(results) as folder:
        if "dry-run" in parts:
            progress.say("bench: the dry run")
            found.append(dry_run(folder, chosen, cluster, repeats))
        if "first-step" in parts:
            for profile in ["local", *([cluster] if cluster not in (None, "local") else [])]:
                progress.say(f"bench: the way to the first step, profile {profile}")
                found.append(first_step(folder, chosen, profile, max(1, repeats // 2 + 1)))
        if "checkpoint" in parts:
            progress.say("bench: checkpoints")
            found += [
                checkpoint(folder, size, repeats) for size in (("vit-tiny",) if quick else ("vit-tiny", "vit-base"))
            ]
        if "ddp" in parts:
            progress.say("bench: one rank and two")
            found.append(ddp(folder, chosen, repeats, progress))
    return Report("launch", around, tuple(found))


def _written(folder: Path, recipe: Recipe) -> Path:
    path = folder / "recipe.yaml"
    if not path.exists():
        files.write_text(path, recipe_yaml(recipe))
    return path


def dry_run(folder: Path, recipe: Recipe, cluster: str | None, repeats: int) -> Part:
    """`maehpc submit --dry-run` in fresh processes, beside what Python and submitit alone take."""
    profile = cluster or "local"
    given = ["--recipe", str(_written(folder, recipe)), "--name", "dry", "--cluster", profile]
    command = _maehpc("submit", "pretrain", *given, "--results", str(folder / "dry"), "--dry-run")
    ours, python, submitit = [], [], []
    for _ in range(repeats):
        ours.append(_seconds(command))
        submitit.append(_seconds([sys.executable, "-c", "import submitit"]))
        python.append(_seconds([sys.executable, "-c", "pass"]))
    return Part(
        "dry run",
        f"maehpc submit pretrain --cluster {profile} --dry-run, {repeats} fresh processes",
        (
            figure("wall time", "s", ours),
            figure("importing submitit alone", "s", submitit),
            figure("starting Python alone", "s", python),
        ),
        (Ratio("to submitit", statistics.median(ours) / statistics.median(submitit), "wall time to its import alone"),),
    )


def first_step(folder: Path, recipe: Recipe, profile: str, repeats: int) -> Part:
    """Real jobs, from the submission to the first finished step.

    Raises:
        RunError: a job does not get there.
    """
    from maehpc.experiment import Experiment
    from maehpc.launch.record import jobs_of

    _pack(folder, recipe)
    path = _written(folder, recipe)
    submitted, began, stepped, torch_s = [], [], [], []
    for repeat in range(repeats):
        name = f"{Path(profile).stem}-{repeat}"
        options = ["--recipe", str(path), "--name", name, "--cluster", profile, "--packs", str(folder / "packs")]
        submitted.append(_seconds(_maehpc("submit", "pretrain", *options, "--results", str(folder / "jobs"))))
        accepted = time.monotonic()
        job = jobs_of(Experiment(folder / "jobs" / name))[-1]
        attempted, beat = _first_step_of(job, accepted + LIMIT_S)
        began.append(attempted - accepted)
        stepped.append(beat)
        _until_done(job, accepted + LIMIT_S)
        torch_s.append(_seconds([sys.executable, "-c", "import torch"]))
    whole = statistics.median([each + step for each, step in zip(began, stepped, strict=True)])
    return Part(
        f"first step, profile {profile}",
        f"pretraining submitted {repeats} times; data packed before",
        (
            figure("maehpc submit", "s", submitted),
            figure("accepted to attempt begun", "s", began),
            figure("attempt begun to first step", "s", stepped),
            figure("importing torch alone", "s", torch_s),
        ),
        (Ratio("to torch", whole / statistics.median(torch_s), "accepted to first step, to importing torch alone"),),
    )


def _first_step_of(job: JobFolder, deadline: float) -> tuple[float, float]:
    """When the first attempt began, on this process's clock, and the seconds from there to its first step.

    Raises:
        RunError: it has ended without one.
    """
    attempted = None
    for attempt in _looks(job, deadline, 0.02):
        attempted = attempted or (time.monotonic() if attempt else None)
        beat = job.heartbeat(attempt) if attempt else None
        if attempted and beat is not None and beat.first_step_s is not None:
            return attempted, beat.first_step_s
        outcome = job.outcome(attempt) if attempt else None
        if outcome is not None and outcome.outcome != "done":
            raise RunError(f"the measured job did not reach its first step: {outcome.reason}")
    raise RunError(f"the measured job did not reach its first step; run it by hand and see `maehpc logs {job.label}`")


def _until_done(job: JobFolder, deadline: float) -> None:
    for attempt in _looks(job, deadline, 0.1):
        if job.outcome(attempt) is not None:
            return
    raise RunError(f"the measured job did not end by itself; run it by hand and see `maehpc logs {job.label}`")


def _looks(job: JobFolder, deadline: float, pause_s: float) -> Iterator[int]:
    """The newest attempt, again and again while the scheduler has the job, and once more afterwards."""
    from maehpc.launch.submission import still_going

    asked, going = time.monotonic(), True
    while going and time.monotonic() < deadline:
        if time.monotonic() - asked > ASK_EVERY_S:
            going = still_going(job)
            asked = time.monotonic()
        yield job.newest_attempt()
        time.sleep(pause_s)
    yield job.newest_attempt()


def _pack(folder: Path, recipe: Recipe) -> None:
    from maehpc.data import prepare

    for dataset in recipe.datasets:
        prepare(dataset, recipe.data.source_size, folder / "packs").close()


def checkpoint(folder: Path, size: str, repeats: int) -> Part:
    """How long training stands still for a checkpoint, beside writing it there and then, and beside torch.save.

    The state is that of an autoencoder with AdamW; saves are far enough apart that none waits for the one before it.
    """
    import torch

    from maehpc.models import MaskedAutoencoder, build_encoder
    from maehpc.recipes import DecoderSettings, EncoderSettings
    from maehpc.training.checkpoints import Checkpoint, optimizer_tensors, save_checkpoint
    from maehpc.training.saving import CheckpointWriter

    mae = MaskedAutoencoder(build_encoder(EncoderSettings(name=size), 224, 3), DecoderSettings(), norm_pix=True)
    optimizer = torch.optim.AdamW([each for each in mae.parameters() if each.requires_grad])
    for each in mae.parameters():
        each.grad = torch.ones_like(each) if each.requires_grad else None
    optimizer.step()
    state = {"model": dict(mae.state_dict()), "optimizer": optimizer_tensors(optimizer)}
    numbers = sum(tensor.numel() * tensor.element_size() for part in state.values() for tensor in part.values())
    plain, peer, stall, write = [], [], [], []
    target = folder / f"checkpoints-{size}"
    with CheckpointWriter(target / "ours", "0" * 64, 2, lambda _: None, lambda: None) as writer:
        for repeat in range(repeats + 1):
            begun = time.perf_counter()
            save_checkpoint(target / "plain", Checkpoint(repeat + 1, state["model"], state["optimizer"]), "0" * 64, 2)
            plain.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            _torch_save(target / "peer.pt", state)
            peer.append(time.perf_counter() - begun)
            writer.save(repeat + 1, state["model"], state["optimizer"])
            writer.wait()
            for record in writer.speed():
                stall.append(record["checkpoint_stall_s"])
                write.append(record["checkpoint_write_s"])
    # The first save takes memory and makes folders.
    figures = (
        figure("stall", "s", stall[1:]),
        figure("stall of the first save", "s", stall[:1]),
        figure("writing in the background", "s", write[1:]),
        figure("writing there and then", "s", plain[1:]),
        figure("torch.save and fsync", "s", peer[1:]),
    )
    stalled, waited = figures[0].median, figures[4].median
    return Part(
        f"checkpoint of {size}",
        f"{numbers / 1e6:.0f} MB of weights and AdamW's moments, {repeats} saves",
        figures,
        (
            Ratio("to torch.save", stalled / waited, "stall to what torch.save and fsync take"),
            Ratio("writing to torch.save", figures[2].median / waited, "with SHA-256 of every byte, to without"),
        ),
    )


def _torch_save(path: Path, state: dict[str, Any]) -> None:
    import torch

    with path.open("wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())


def ddp(folder: Path, recipe: Recipe, repeats: int, progress: Progress) -> Part:
    """Images a second of two ranks and of one, the global batch the same; ours, and a bare loop's."""
    _pack(folder, recipe)
    speeds: dict[tuple[str, int], list[float]] = {}
    starts: dict[tuple[str, int], list[float]] = {}
    joins, reduces, parameters = [], [], 0
    for repeat in range(repeats):
        for size in (1, 2):
            for kind in ("ours", "bare"):
                times = _ranks(folder / f"{kind}-{size}-{repeat}", kind, size, recipe, folder / "packs")
                speeds.setdefault((kind, size), []).append(statistics.median(times.images_per_second))
                starts.setdefault((kind, size), []).append(times.first_step_s)
                if (kind, size) == ("ours", 2):
                    joins.append(times.joined_s)
                    reduces.append(statistics.median(times.all_reduce_s))
                    parameters = times.parameters
        progress.say(f"bench: round {repeat + 1} of {repeats}")
    middle = {key: statistics.median(values) for key, values in speeds.items()}
    settings = recipe.pretrain
    figures: list[Figure] = []
    for kind, who in (("ours", "maehpc"), ("bare", "bare loop")):
        for size in (1, 2):
            figures.append(figure(f"{who}, {size} rank{'s' * (size > 1)}", "images/s", speeds[kind, size]))
    figures += [
        figure("maehpc, 2 ranks, start to first step", "s", starts["ours", 2]),
        figure("bare loop, 2 ranks, start to first step", "s", starts["bare", 2]),
        figure("meeting of 2 ranks", "s", joins),
        figure(f"one sum of {parameters / 1e6:.1f} million gradients", "s", reduces),
    ]
    ratios = (
        Ratio("efficiency", middle["ours", 2] / (2 * middle["ours", 1]), "2 ranks to twice 1 rank"),
        Ratio("efficiency of the bare loop", middle["bare", 2] / (2 * middle["bare", 1]), "2 ranks to twice 1 rank"),
        Ratio("to the bare loop, 1 rank", middle["ours", 1] / middle["bare", 1], "images/s; 1 is no overhead"),
        Ratio("to the bare loop, 2 ranks", middle["ours", 2] / middle["bare", 2], "images/s; 1 is no overhead"),
    )
    conditions = (
        f"{recipe.encoder.name} at {recipe.data.image_size} px, batch {settings.batch_size} in all, 1 thread a rank, "
        f"{settings.epochs - 1} epochs of {settings.images} images, {repeats} rounds in turns"
    )
    return Part("ranks", conditions, tuple(figures), ratios)


def _ranks(folder: Path, kind: Any, size: int, recipe: Recipe, packs: Path) -> Times:
    """Runs all ranks of one measured training on this host.

    Raises:
        RunError: one of them failed.
    """
    files.make_folder(folder)
    import torch

    device: Any = "cuda" if torch.cuda.device_count() >= size else "cpu"
    values = recipe.model_dump(mode="json")
    spec = Spec(kind, size, 1, device, str(folder), str(packs), values, time.monotonic())
    path = folder / "spec.json"
    files.write_json(path, asdict(spec))
    ranks = []
    with (folder / "log").open("wb") as log:
        for rank in range(size):
            command = [sys.executable, "-m", "maehpc.bench.rank", str(path), str(rank)]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=_quiet_environment()))
        try:
            codes = [rank.wait(LIMIT_S) for rank in ranks]
        finally:
            for each in ranks:
                if each.poll() is None:
                    each.kill()
                    each.wait()
    if any(codes):
        told = " ".join((folder / "log").read_text(errors="replace").split())[-300:]
        raise RunError(f"a measured training of {size} ranks ended with {codes} ({told}); bench measures what works")
    return Times(**json.loads(spec.record.read_bytes()))
