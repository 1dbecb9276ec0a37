"""Images in, everything that is stored about them out: maps, sensitivity by chance and at worst, flips, metrics.

A **group** of images, with all their perturbations, is what is computed as one. Groups are equal in size and cut at
fixed places, and each is computed by one thread, so an image's numbers depend neither on how many threads or workers
there are nor on how a split is cut into shards.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from maehpc.data import Preprocess
from maehpc.devices import is_out_of_memory
from maehpc.errors import InputError, RunError
from maehpc.explain import attacks
from maehpc.explain.attacks import Attacked, Sought
from maehpc.explain.engine import Attribution, Engine
from maehpc.explain.methods import Method
from maehpc.explain.metrics import Given, Metric, make_metrics
from maehpc.explain.noise import NoiseKey, uniform
from maehpc.explain.precision import in_precision
from maehpc.explain.sensitivity import perturbed, relative_change
from maehpc.memory import give_back_where_short
from maehpc.models import Classifier
from maehpc.recipes import ExplainSettings, MapSettings

CPU_PASS_BYTES = 1 << 30
"""What one thread's pass may keep of activations: beyond some rows a CPU does not get faster."""
CPU_ROWS = 64
"""Rows of a pass on a CPU at most."""
GPU_SHARE = 0.6
"""Share of a GPU's memory that a pass may keep."""
HELD = 2.0
"""Bytes a pass holds at its peak over those that the ruled functions keep of their inputs and outputs."""


@dataclass(frozen=True)
class Explanation:
    """What is stored about some images, on the device it was computed on.

    Attributes:
        logits: of the unperturbed images, [B, K].
        prediction: class of the largest logit, int64 [B].
        target: class explained, int64 [B]; the same for an image and all its perturbations.
        maps: by method, reduced and typed as the settings store them: [B, S, S] or [B, C, S, S], or [B, h, w] for
            those on the patch grid.
        sensitivity: by method, relative change of the unreduced float32 map a perturbation, [B, n]; NaN for zero maps.
        flipped: bool [B, n], whether the perturbed image is predicted as another class.
        completeness: by method that claims completeness, the unperturbed map's relative error, [B].
        floor: by method, relative difference of the unperturbed map from that computed in float64, [B]; NaN for
            images for which it was not measured.
        searched: by method and kind of search, METHOD_KIND, what was found.
        metrics: by METHOD_METRIC or METHOD_METRIC_PART, [B] or [B, k].
    """

    logits: Tensor
    prediction: Tensor
    target: Tensor
    maps: dict[str, Tensor]
    sensitivity: dict[str, Tensor]
    flipped: Tensor
    completeness: dict[str, Tensor]
    floor: dict[str, Tensor]
    searched: dict[str, Attacked]
    metrics: dict[str, Tensor]


class Explainer:
    """Explains images of one data set with one classifier.

    The result for an image depends on the classifier, the settings, the key and the image's index alone; on the images
    in its group only by rounding.

    Args:
        classifier: see `Engine`, which takes it over.
        settings: of the stage.
        preprocess: the data set's normalisation.
        key: of the noise.
        images: in the split; not known where None.

    Raises:
        InputError: the settings do not fit the classifier, or a metric's files not the split.
    """

    def __init__(
        self,
        classifier: Classifier,
        settings: ExplainSettings,
        preprocess: Preprocess,
        key: NoiseKey,
        images: int | None = None,
    ) -> None:
        self._settings = settings
        self._preprocess = preprocess
        self._key = key
        self._device = next(classifier.parameters()).device
        self._engine = Engine(classifier, settings, self._baseline(classifier), key.seed)
        attacks.check(self._engine.methods, settings.sensitivity)
        self.metrics: dict[str, Metric] = make_metrics(self._engine.setup, images)
        """By name, in the settings' order."""
        self._exact: Engine | None = None
        self._rows = self._rows_that_fit()
        self._warnings: list[str] = []
        self.group = settings.batch_size or max(1, self._rows // (1 + settings.sensitivity.drawn))
        """Images computed as one."""
        self.workers = self._threads()
        """Groups computed side by side."""
        self.shortens = True
        """Whether a pass that finds no memory is tried again in shorter ones, of which the rounding is another."""
        self._pool: ThreadPoolExecutor | None = None

    @property
    def methods(self) -> dict[str, Method]:
        """By name, in the settings' order."""
        return self._engine.methods

    def take_warnings(self) -> list[str]:
        """What a user should hear of since this was last asked."""
        taken, self._warnings = self._warnings, []
        return taken

    def explain(self, pixels: Tensor, indices: Tensor, labels: Tensor) -> Explanation:
        """Explains images, `group` of them at a time from the first one on.

        Args:
            pixels: images in [0, 1] at the encoder's size, [B, C, S, S].
            indices: their indices in the split, int64 [B].
            labels: int64 [B], or [B, K] for multi-label tasks; read where they are the target alone.

        Raises:
            InputError: labels are to be explained and an image has several.
            RunError: a logit or map is not finite, or a map does not fit the type it is stored in.
        """
        targets = self._targets(labels)
        groups = cut(pixels, indices, targets, self.group)
        with in_precision(self._settings.precision):
            if self.workers == 1:
                return joined([self._in_what_fits(*group) for group in groups])
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.workers, initializer=partial(torch.set_num_threads, 1))
            return joined(list(self._pool.map(self._in_what_fits, *zip(*groups, strict=True))))

    @torch.no_grad()  # of this thread, which may be one of the pool
    def _in_what_fits(self, pixels: Tensor, indices: Tensor, targets: Tensor | None) -> Explanation:
        """One group; where memory runs out, in passes half as long."""
        while True:
            rows = self._rows
            try:
                return joined([self._in_one(*part, rows) for part in cut(pixels, indices, targets, rows)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or rows == 1 or not self.shortens:
                    raise
            gc.collect()  # the pass that failed: its graph holds itself by the rules' functions
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._rows = min(self._rows, max(1, rows // 2))
            self._warnings.append(f"out of memory with {rows} rows a pass: going on with {self._rows}")

    def _in_one(self, pixels: Tensor, indices: Tensor, targets: Tensor | None, rows: int) -> Explanation:
        """As many images as fit into a pass; where memory is short, what it took is not kept for the next one."""
        try:
            return self._explained(pixels, indices, targets, rows)
        finally:
            if self._device.type == "cpu":
                give_back_where_short()

    def _explained(self, pixels: Tensor, indices: Tensor, targets: Tensor | None, rows: int) -> Explanation:
        """Images of which as many fit into a pass as there are, with the perturbations that fit beside them."""
        settings, count = self._settings.sensitivity, len(pixels)
        drawn = settings.drawn
        x = self._preprocess.normalise(pixels)
        together = rows // count  # rows of each image in one pass

        first = min(drawn, together - 1)
        stack = torch.stack([x, *(self._moved(pixels, indices, sample) for sample in range(first))], dim=1)
        seen = self._attribute(stack, targets)
        original = Attribution(
            seen.logits[:: 1 + first],
            seen.targets[:: 1 + first],
            {name: full[:: 1 + first] for name, full in seen.maps.items()},
            {name: error[:: 1 + first] for name, error in seen.completeness.items()},
        )
        unmoved = {name: full[:, None] for name, full in original.maps.items()}
        _require_finite(original.logits[:, None], unmoved, indices, None)
        prediction = original.logits.argmax(dim=1)
        flipped = prediction.new_empty((count, drawn), dtype=torch.bool)
        sensitivity = {name: full.new_empty((count, drawn)) for name, full in original.maps.items()}

        def compare(moved: Attribution, start: int, stop: int, skip: int) -> None:
            """Samples start to stop, which are a pass's rows from `skip` on of each image."""
            logits = moved.logits.unflatten(0, (count, -1))[:, skip:]
            maps = {name: full.unflatten(0, (count, -1))[:, skip:] for name, full in moved.maps.items()}
            _require_finite(logits, maps, indices, start)
            flipped[:, start:stop] = logits.argmax(dim=2) != prediction[:, None]
            for name, changed in maps.items():
                before = original.maps[name][:, None].expand_as(changed).flatten(0, 1)
                change = relative_change(before, changed.flatten(0, 1), settings.norm)
                sensitivity[name][:, start:stop] = change.unflatten(0, (count, -1))

        if first:
            compare(seen, 0, first, 1)
        for start in range(first, drawn, together):
            stop = min(drawn, start + together)
            stack = torch.stack([self._moved(pixels, indices, sample) for sample in range(start, stop)], dim=1)
            compare(self._attribute(stack, original.targets), start, stop, 0)
        return Explanation(
            logits=original.logits,
            prediction=prediction,
            target=original.targets,
            maps={name: stored(self.methods[name], full, self._settings.maps) for name, full in original.maps.items()},
            sensitivity=sensitivity,
            flipped=flipped,
            completeness=original.completeness,
            floor=self._floor(x, indices, original),
            searched=self._searched(pixels, indices, original, rows),
            metrics=self._measured(pixels, x, indices, original, sensitivity),
        )

    def _attribute(self, stack: Tensor, targets: Tensor | None) -> Attribution:
        """A pass over [B, rows, C, S, S], targets an image."""
        rows = stack.shape[1]
        repeated = None if targets is None else targets.repeat_interleave(rows)
        return self._engine.attribute(stack.flatten(0, 1), repeated, rows)

    def _moved(self, pixels: Tensor, indices: Tensor, sample: int) -> Tensor:
        settings = self._settings.sensitivity
        noise = uniform(self._key, indices, sample, pixels.shape[1:], settings.radius, pixels.device)
        return perturbed(pixels, noise, settings, self._preprocess)

    def _searched(self, pixels: Tensor, indices: Tensor, original: Attribution, rows: int) -> dict[str, Attacked]:
        settings, found = self._settings.sensitivity, {}
        for name in self.methods if settings.searches else ():
            sought = Sought(self._engine, name, pixels, indices, original, settings, self._preprocess, self._key)
            for kind in settings.searches:
                found[f"{name}_{kind}"] = attacks.search(sought, kind, rows)
        return found

    def _measured(
        self, pixels: Tensor, x: Tensor, indices: Tensor, original: Attribution, changes: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        given = Given(
            engine=self._engine,
            settings=self._settings,
            preprocess=self._preprocess,
            pixels=pixels,
            x=x,
            indices=indices,
            targets=original.targets,
            logits=original.logits,
            maps=original.maps,
            key=self._key,
            changes=changes if self._settings.sensitivity.drawn else {},
        )
        return {
            "_".join(filter(None, (method, name, part))): values
            for name, metric in self.metrics.items()
            for method in self.methods
            for part, values in metric.measure(given, method).items()
        }

    def _floor(self, x: Tensor, indices: Tensor, original: Attribution) -> dict[str, Tensor]:
        """What rounding alone changes: the map's distance from the one in float64, for the split's first images."""
        chosen = (indices < self._settings.noise_floor_images).to(x.device).nonzero()[:, 0]
        floor = {name: full.new_full((len(full),), torch.nan) for name, full in original.maps.items()}
        if len(chosen):
            if self._exact is None:
                classifier = copy.deepcopy(self._engine.network.classifier).double()
                settings = self._settings.model_copy(update={"precision": "fp32"})
                self._exact = Engine(classifier, settings, self._engine.baseline.double(), self._key.seed)
            exact = self._exact.attribute(x[chosen].double(), original.targets[chosen])
            for name, full in exact.maps.items():
                change = relative_change(full, original.maps[name][chosen].double(), "l2")
                floor[name][chosen] = change.to(floor[name].dtype)
        return floor

    def _targets(self, labels: Tensor) -> Tensor | None:
        if self._settings.target == "prediction":
            return None
        if labels.ndim != 1:
            raise InputError(
                "explain.target: label needs one label an image, and this data set has several; use target: prediction"
            )
        return labels

    def _baseline(self, classifier: Classifier) -> Tensor:
        """The reference input, normalised, [1, C, S, S]."""
        seen = self._preprocess.settings
        weight = next(classifier.parameters()).detach()
        zero = weight.new_zeros(1, seen.channels, seen.image_size, seen.image_size)
        return self._preprocess.normalise(zero) if self._settings.deeplift.baseline == "black" else zero

    def _rows_that_fit(self) -> int:
        held = HELD * max(1, self._engine.row_bytes)
        if self._device.type == "cuda":
            memory = torch.cuda.get_device_properties(self._device).total_memory
            return max(1, int(GPU_SHARE * memory / held))
        return max(1, min(CPU_ROWS, int(CPU_PASS_BYTES / held)))

    def _threads(self) -> int:
        if self._device.type != "cpu":
            return 1
        return max(1, min(torch.get_num_threads(), passes_that_fit()))


def passes_that_fit() -> int:
    """Passes of the CPU that may be computed side by side in half of this host's memory."""
    return int(psutil.virtual_memory().total / (2 * CPU_PASS_BYTES))


def cut(
    pixels: Tensor, indices: Tensor, targets: Tensor | None, images: int
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Pixels, indices and targets of so many images at a time."""
    parts = list(zip(pixels.split(images), indices.split(images), strict=True))
    aims: Sequence[Tensor | None] = [None] * len(parts) if targets is None else targets.split(images)
    return [(*part, aim) for part, aim in zip(parts, aims, strict=True)]


def joined(parts: list[Explanation]) -> Explanation:
    """Groups put together in their order."""

    def together(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], dict):
            return {name: together([value[name] for value in values]) for name in values[0]}
        kind = type(values[0])
        return kind(*(together([getattr(value, field.name) for value in values]) for field in fields(kind)))

    result: Explanation = together(parts) if len(parts) > 1 else parts[0]
    return result


def stored(method: Method, full: Tensor, settings: MapSettings) -> Tensor:
    """A method's maps as they are stored.

    Args:
        method: says how its channels are reduced.
        full: maps as attributed.
        settings: `channels` and `dtype`.

    Raises:
        RunError: a value is too large for the dtype.
    """
    result = full
    if settings.channels == "reduced" and method.map_kind == "pixels":
        result = full.abs().amax(dim=1) if method.over_channels == "largest" else full.sum(dim=1)
    if settings.dtype == "float32":
        return result
    largest = result.abs().max().item()
    half = result.half()
    if (result.flatten(1).any(dim=1) != half.flatten(1).any(dim=1)).any():
        raise RunError(
            f"explain.maps.dtype: float16 turns a {method.name} map of this classifier into zeros; set it to float32"
        )
    if largest > torch.finfo(torch.float16).max:
        raise RunError(
            f"explain.maps.dtype: float16 cannot hold the {method.name} values of this classifier, whose magnitude "
            f"reaches {largest:.3g}; set it to float32"
        )
    return half


def _require_finite(logits: Tensor, maps: dict[str, Tensor], indices: Tensor, sample: int | None) -> None:
    """A NaN must not pass for the NaN of a zero map.

    Args:
        logits: [B, n, K].
        maps: by method, [B, n, ...].
        indices: [B].
        sample: number of the first of n perturbations; None for the images themselves.
    """
    for name, values in {"logits": logits, **maps}.items():
        flat = values.flatten(2)
        if flat.sum(dim=2).isfinite().all():
            continue  # nearly always; sums may overflow where no value is infinite
        finite = flat.isfinite().all(dim=2)
        if not finite.all():
            row, place = (int(number) for number in (~finite).nonzero()[0])
            which = "" if sample is None else f", perturbation {sample + place},"
            raise RunError(
                f"the classifier's {name} of image {indices[row].item()}{which} are not finite; finetune it again with "
                f"a lower optim.lr, or lower explain.sensitivity.radius"
            )
