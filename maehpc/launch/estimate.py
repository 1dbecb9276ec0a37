"""What a job will cost, told before it is submitted: images, operations, hours of a device, bytes and files.

Nothing heavy is imported, since every `maehpc submit --dry-run` prints this. What cannot be known without a heavy
library or without the data is None, and a note says what would tell it.
"""

from __future__ import annotations

import ast
import json
import statistics
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from maehpc import files
from maehpc.catalogue import SplitName, catalogue, dataset_name
from maehpc.experiment import Experiment
from maehpc.launch import flops, footprint
from maehpc.launch.flops import Vit
from maehpc.launch.hardware import ASSUMED_GPU, RANK_HOURS, UTILISATION, Hardware, gpu
from maehpc.progress import human_bytes
from maehpc.recipes.settings import ExplainSettings, Recipe

Counts = dict[SplitName, int]

SOME_CLASSES = 10
"""Where the number of classes is not known; it decides little."""

LAST_RECORDS = 10
"""Epochs of a log that a measured speed is the median of."""


@dataclass(frozen=True)
class Cost:
    """What one stage costs on one data set. None: not known.

    Attributes:
        stage: pretrain, finetune, probe, explain; or total.
        dataset: its name.
        images: images processed in all: images x epochs, or images explained.
        steps: optimizer steps.
        flops: floating-point operations of the models.
        device_hours: hours of one device, if one did all of it.
        basis: what the hours rest on.
        bytes: left on the disk.
        peak_bytes: the most there is at any time; one checkpoint more than is kept.
        written_bytes: that go to the disk in all.
        files: left on the disk.
        notes: what is not known, and why.
    """

    stage: str
    dataset: str
    images: int | None = None
    steps: int | None = None
    flops: float | None = None
    device_hours: float | None = None
    basis: str = ""
    bytes: int | None = None
    peak_bytes: int | None = None
    written_bytes: int | None = None
    files: int | None = None
    notes: tuple[str, ...] = ()


_SUMMED = ("images", "steps", "flops", "device_hours", "bytes", "written_bytes", "files")


@dataclass(frozen=True)
class Estimate:
    """What some stages cost.

    Attributes:
        costs: a stage and data set each.
        ranks: among which the work is divided; workers where a pool does it.
        hardware: of one of them.
        assumed: whether the hardware was not named by anybody.
        pool_hosts: hosts of the pool that explains; None where none does.
    """

    costs: tuple[Cost, ...]
    ranks: int
    hardware: Hardware
    assumed: bool = False
    pool_hosts: int | None = None

    @property
    def total(self) -> Cost:
        """All of it; a number is None as soon as one part of it is not known."""
        sums: dict[str, Any] = {}
        for name in _SUMMED:
            values = [getattr(cost, name) for cost in self.costs if not (name == "steps" and cost.stage == "explain")]
            sums[name] = None if None in values else sum(values)
        if sums["files"] is not None:
            stages = {cost.stage for cost in self.costs}  # a job each
            if self.pool_hosts is not None:
                stages.discard("explain")
                sums["files"] += footprint.pool_files(self.pool_hosts)
            sums["files"] += footprint.EXPERIMENT_FILES + footprint.job_files(len(stages), self.ranks)
        notes = dict.fromkeys(note for cost in self.costs for note in cost.notes)
        return Cost("total", "", peak_bytes=self._peak, notes=tuple(notes), **sums)

    @property
    def _peak(self) -> int | None:
        """Stages run one after another: what the earlier ones left, and the peak of the one at work."""
        left, peak = 0, 0
        for cost in self.costs:
            if cost.bytes is None or cost.peak_bytes is None:
                return None
            peak = max(peak, left + cost.peak_bytes)
            left += cost.bytes
        return peak

    @property
    def hours(self) -> float | None:
        """Wall time if every rank and worker were busy all the time."""
        total = self.total.device_hours
        return None if total is None else total / self.ranks

    def lines(self) -> list[str]:
        """For people: a table, what the hours rest on, and notes."""
        head = ("", "images", "steps", "FLOPs", self.hardware.unit, "disk", "at peak", "files")
        rows = [head, *(_row(cost) for cost in (*self.costs, self.total))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        table = [
            "  ".join(
                [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        bases = dict.fromkeys(f"{self.hardware.unit}: {cost.basis}" for cost in self.costs if cost.basis)
        assumed = ["no profile names the GPU: an NVIDIA A100 is assumed"] if self.assumed else []
        hours = human_hours(self.hours)
        wall = [f"about {hours} hours on {self._by}, if all are busy all the time"] if self.ranks > 1 else []
        return [*table, *bases, *assumed, *(wall if self.hours is not None else []), *self.total.notes]

    @property
    def _by(self) -> str:
        """What does the work, in words."""
        if self.pool_hosts is None:
            return f"{self.ranks} ranks"
        hosts = f"{self.pool_hosts} host{'s' * (self.pool_hosts > 1)}"
        alone = all(cost.stage == "explain" for cost in self.costs)
        workers = f"{self.ranks} workers of {hosts}"
        return workers if alone else f"{self.ranks} ranks (explaining: {workers})"

    def as_json(self) -> dict[str, Any]:
        """For scripts; `ranks` are workers where a pool does the work."""
        costs, total = [asdict(cost) for cost in self.costs], asdict(self.total)
        return {
            "costs": costs,
            "total": total,
            "ranks": self.ranks,
            "hardware": self.hardware.name,
            "hours": self.hours,
        }


def _row(cost: Cost) -> tuple[str, ...]:
    return (
        f"{cost.stage} {cost.dataset}".strip(),
        human_count(cost.images),
        "–" if cost.stage == "explain" else human_count(cost.steps),
        "?" if cost.flops is None else f"{cost.flops:.2e}",
        human_hours(cost.device_hours),
        human_bytes(cost.bytes),
        human_bytes(cost.peak_bytes),
        human_count(cost.files),
    )


def human_count(count: int | None) -> str:
    """A whole number with thousands apart."""
    return "?" if count is None else f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def human_hours(hours: float | None) -> str:
    """Hours with two significant digits."""
    if hours is None:
        return "?"
    return "< 0.01" if hours < 0.01 else f"{hours:.2g}" if hours < 100 else f"{hours:.0f}"


def estimate(
    recipe: Recipe,
    stages: Sequence[str],
    *,
    experiment: Experiment | None = None,
    hardware: Hardware | None = None,
    ranks: int = 1,
    pool_hosts: int | None = None,
) -> Estimate:
    """The cost of stages over all data sets of a recipe.

    Args:
        recipe: what to compute.
        stages: pretrain, finetune, probe, explain.
        experiment: whose earlier runs tell a speed; None: none is looked for.
        hardware: of one rank; an A100 where None.
        ranks: among which the work is divided.
        pool_hosts: hosts on which as many workers explain, in a pool; None where ranks do.

    Raises:
        InputError: a data set of the catalogue does not exist at the size that the recipe reads.
    """
    device = hardware or gpu(ASSUMED_GPU)
    pool_hosts = pool_hosts if "explain" in stages else None
    if pool_hosts is not None and set(stages) == {"explain"} and device.unit == RANK_HOURS:
        device = replace(device, unit="worker-hours")
    costs = [_cost(recipe, stage, dataset, experiment, device) for dataset in recipe.datasets for stage in stages]
    return Estimate(tuple(costs), ranks, device, assumed=hardware is None, pool_hosts=pool_hosts)


@dataclass(frozen=True)
class _Data:
    """What is known of a data set before it is packed."""

    name: str
    counts: Counts | None
    classes: int
    multi_label: bool = False
    note: str = ""


def _data(dataset: str, source_size: int) -> _Data:
    entry = catalogue().get(dataset)
    if entry is not None:
        entry.size(source_size)
        return _Data(entry.name, entry.counts, len(entry.classes), entry.task == "multi-label")
    name = dataset_name(dataset)
    shapes = _npz_shapes(dataset)
    counts: Counts = {}
    for split in ("train", "val", "test"):
        if f"{split}_images" not in shapes:
            note = f"{name}: the number of images is unknown until it is packed"
            if not files.user_path(dataset).exists():
                note += f"; nothing lies at {dataset}, and it will be refused"
            return _Data(name, None, SOME_CLASSES, note=note)
        counts[split] = shapes[f"{split}_images"][0]
    labels = shapes.get("train_labels", ())
    multi_label = len(labels) == 2 and labels[1] > 1
    return _Data(name, counts, labels[1] if multi_label else SOME_CLASSES, multi_label)


def _npz_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in an .npz file, from their headers alone; empty where it is none."""
    path = files.user_path(text)
    if path.suffix.lower() != ".npz":
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as handle:
                    start = handle.read(8)
                    form = "<H" if start[6] == 1 else "<I"
                    (length,) = struct.unpack(form, handle.read(struct.calcsize(form)))
                    header = ast.literal_eval(handle.read(min(length, 1 << 16)).decode("latin-1"))
                    shapes[member.removesuffix(".npy")] = tuple(int(side) for side in header["shape"])
    except (OSError, ValueError, SyntaxError, KeyError, IndexError, TypeError, struct.error, zipfile.BadZipFile):
        return {}  # packing it will tell what is wrong with it
    return {name: shape for name, shape in shapes.items() if shape}


def _cost(recipe: Recipe, stage: str, dataset: str, experiment: Experiment | None, device: Hardware) -> Cost:
    data = _data(dataset, recipe.data.source_size)
    cost = Cost(stage, data.name, notes=(data.note,) if data.note else ())
    vit = _vit(recipe)
    if vit is None:
        note = f"{recipe.encoder.name}: timm alone knows its size, so FLOPs, hours and bytes are not estimated"
        cost = replace(cost, notes=(*cost.notes, note))
    if data.counts is None:
        return cost
    kind = {"pretrain": _pretraining, "finetune": _finetuning, "probe": _probing, "explain": _explanation}[stage]
    cost, precision, disk = kind(cost, recipe, data, data.counts, vit)
    if disk is not None:
        cost = replace(
            cost,
            bytes=disk.bytes,
            peak_bytes=disk.peak_bytes,
            written_bytes=disk.written_bytes,
            files=disk.files,
        )
    if cost.flops is None:
        return cost
    measured = _measured(recipe, stage, data.name, experiment)
    if measured is not None and cost.images is not None:
        hours = cost.images / measured / 3600
        return replace(cost, device_hours=hours, basis=f"{measured:.3g} images/s a rank, measured in this experiment")
    share = f"{UTILISATION[precision]:.0%} {device.basis}" if device.unit == "GPU-hours" else device.basis
    hours = cost.flops / device.sustained[precision] / 3600
    return replace(cost, device_hours=hours, basis=f"{device.name} at {share} in {precision}, assumed")


def _vit(recipe: Recipe) -> Vit | None:
    try:
        return Vit.of(recipe.encoder, recipe.data.image_size, recipe.data.channels)
    except KeyError:
        return None


_Answer = tuple[Cost, str, "footprint.Footprint | None"]


def _pretraining(cost: Cost, recipe: Recipe, data: _Data, counts: Counts, vit: Vit | None) -> _Answer:
    settings = recipe.pretrain
    available = min(settings.images or counts["train"], counts["train"])
    batch = min(settings.batch_size, available)
    steps = settings.epochs * (available // batch)
    cost = replace(cost, images=steps * batch, steps=steps)
    if vit is None:
        return cost, settings.precision, None
    work = flops.autoencoder(vit, settings.decoder, settings.mask_ratio)
    shown = min(settings.reconstructions, counts["test"])
    total = steps * batch * work.training + shown * work.forward
    return replace(cost, flops=total), settings.precision, footprint.pretraining(recipe, vit, steps)


def _finetuning(cost: Cost, recipe: Recipe, data: _Data, counts: Counts, vit: Vit | None) -> _Answer:
    settings = recipe.finetune
    train = min(settings.images or counts["train"], counts["train"])
    scored = train + counts["val"]
    everything = scored + counts["test"]
    steps = settings.epochs * -(-train // min(settings.batch_size, train))
    cost = replace(cost, images=settings.epochs * train, steps=steps)
    if vit is None:
        return cost, settings.precision, None
    head = flops.adapter(vit.width, data.classes, settings.adapter)
    if settings.freeze:
        alone = flops.adapter_alone(vit.width, data.classes, settings.adapter)
        image = alone.training + (vit.forward if settings.crop_scale else 0.0)
        # Features of what is scored are computed once, those of the test split at the end.
        total = settings.epochs * (train * image + scored * head.forward)
        total += everything * (vit.forward + head.forward)
    else:
        whole = vit.stem(vit.patches).without_input_gradient + vit.body + head
        total = settings.epochs * (train * whole.training + scored * whole.forward) + everything * whole.forward
    return replace(cost, flops=total), settings.precision, footprint.finetuning(recipe, vit, data.classes, steps)


def _probing(cost: Cost, recipe: Recipe, data: _Data, counts: Counts, vit: Vit | None) -> _Answer:
    settings = recipe.probe
    train = min(settings.images or counts["train"], counts["train"])
    everything = train + counts["val"] + counts["test"]
    steps = settings.epochs * -(-train // min(settings.batch_size, train))
    cost = replace(cost, images=settings.epochs * train, steps=steps)
    if vit is None:
        return cost, settings.precision, None
    layer = flops.linear(1, vit.width, data.classes)
    image = layer.without_input_gradient.training + (vit.forward if settings.crop_scale else 0.0)
    # Features of all splits are computed once; the layer alone looks at them again after every epoch.
    total = everything * (vit.forward + layer.forward)
    total += settings.epochs * (train * image + (train + counts["val"]) * layer.forward)
    return replace(cost, flops=total), settings.precision, footprint.probing(recipe, vit, data.classes, steps)


def _explanation(cost: Cost, recipe: Recipe, data: _Data, counts: Counts, vit: Vit | None) -> _Answer:
    settings = recipe.explain
    images = min(settings.images or counts[settings.split], counts[settings.split])
    cost = replace(cost, images=images)
    if vit is None:
        return cost, "fp32", None
    work = flops.Explained(vit, data.classes, recipe.finetune, settings)
    channels, side = recipe.data.channels, recipe.data.image_size
    arrays = footprint.stored_arrays(settings, side, channels, vit.patches, data.classes, data.multi_label)
    disk = footprint.explanations(settings, arrays, images)
    if work.unknown:
        names = ", ".join(work.unknown)
        note = f"{names}: FLOPs and hours are not estimated where explain.options changes the number of passes"
        return replace(cost, notes=(*cost.notes, note)), settings.precision, disk
    computed = list(_computed(settings, images, counts[settings.split]))
    floored = sum(len(range(part.start, min(part.stop, settings.noise_floor_images))) for part in computed)
    engines = 2 if floored else 1  # the maps in float64 have an engine of their own
    total = sum(map(len, computed)) * work.image + floored * work.attribution + engines * work.preparation
    return replace(cost, flops=total), settings.precision, disk


def _computed(settings: ExplainSettings, images: int, in_split: int) -> Iterator[range]:
    """The images that are computed for each shard: whole groups, since what a shard cuts off is computed with it.

    How large groups are, the device's memory decides where the recipe does not; they are then taken to fit.
    """
    shard, group = settings.maps.shard_images, settings.batch_size or 1
    for start in range(0, images, shard):
        stop = min(start + shard, images)
        yield range(start // group * group, min(-(-stop // group) * group, in_split))


def _measured(recipe: Recipe, stage: str, dataset: str, experiment: Experiment | None) -> float | None:
    """Images a second and rank that this experiment's earlier runs of the stage reached, on any data set."""
    if experiment is None or not (stage == "pretrain" or (stage == "finetune" and not recipe.finetune.freeze)):
        return None  # a frozen encoder's log tells how fast the head alone is trained
    names = experiment.datasets_of(stage)
    for name in sorted(names, key=lambda name: name != dataset):
        speeds = list(_speeds(experiment, stage, name))[-LAST_RECORDS:]
        if speeds:
            return statistics.median(speeds)
    return None


def _speeds(experiment: Experiment, stage: str, dataset: str) -> Iterable[float]:
    try:
        lines = (experiment.stage(stage, dataset) / "speed.jsonl").read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
            speed = float(record["images_per_second"]) / int(record.get("ranks", 1))
        except (ValueError, KeyError, TypeError):
            continue  # another kind of record, or a line cut off by a kill
        if speed > 0:
            yield speed
