"""Reading a store of maps: the scores of every image whose shard stands whole, and the maps of chosen images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from maehpc.errors import InputError, MaehpcError
from maehpc.maps import MapStore
from maehpc.recipes import ExplainSettings
from maehpc.recipes.settings import SEARCH_SCORES
from maehpc.report.figures.panels import Panel
from maehpc.report.methods import method
from maehpc.report.statistics import MethodScores, Searched

_SCORES = ("sensitivity", "sensitivity_max", "sensitivity_mean", "completeness", "floor")


class Attributes(BaseModel):
    """What a store says of itself, as far as a report needs it."""

    title: str
    task: str
    classes: tuple[str, ...]
    split: str
    methods: tuple[str, ...]
    explain: ExplainSettings
    seed: int
    image_size: int
    classifier: str | None = None

    @property
    def sampling(self) -> str:
        """How sensitivity was sampled, in words."""
        return f"{self.explain.sensitivity.drawn} perturbations, {self.ball}"

    @property
    def ball(self) -> str:
        """Where perturbations lie, in words."""
        settings = self.explain.sensitivity
        clipped = ", clipped" if settings.clip else ""
        return f"radius {settings.radius:g} in {settings.space} space{clipped}"


@dataclass(frozen=True)
class Explained:
    """Scores of the explained images of a store, in order of `image`.

    Attributes:
        store: where they and their maps lie.
        attributes: what was explained, and how.
        image: [N] index in the split.
        label: [N], or [N, K] of 0 and 1 for multi-label tasks.
        prediction: [N].
        flipped: [N, n] whether a perturbation changed the prediction; n is 0 where sensitivity was left out.
        scores: by method.
    """

    store: MapStore
    attributes: Attributes
    image: NDArray[np.int64]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    flipped: NDArray[np.bool_]
    scores: dict[str, MethodScores]


def read_attributes(store: MapStore) -> Attributes:
    """What a store says of itself.

    Raises:
        InputError: its attributes or arrays are not those that explain writes.
    """
    try:
        attributes = Attributes.model_validate(store.attributes)
    except ValidationError as error:
        field = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        raise InputError(f"{store.path} was not written by explain: attribute {field} is missing or wrong") from error
    for name in ("label", "prediction", *attributes.methods):
        if name not in store.layout.arrays:
            raise InputError(f"{store.path} was not written by explain: there is no array {name}")
    return attributes


def read_explained(store: MapStore, missing: Callable[[str], None]) -> Explained | None:
    """Scores from every shard that the ledger records and whose bytes are those recorded; None where there is none.

    Scores alone are read, a shard at a time, and these bytes alone are checked: maps can fill a file system, and
    `maehpc verify` is there for them.

    Args:
        store: of one data set.
        missing: told, in words, which shards are left out.

    Raises:
        InputError: the store was not written by explain.
        RunError: a record cannot be read.
    """
    attributes = read_attributes(store)
    names = _score_arrays(store, attributes)
    parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
    absent = store.missing()
    for shard in store.shards():
        try:
            arrays = {name: store.read(name, shard) for name in names}
        except MaehpcError as error:
            missing(str(error))
            continue
        parts["image"].append(np.array(store.images(shard), np.int64))
        for name, array in arrays.items():
            parts[name].append(array)
    if absent:
        missing(f"{len(absent)} of {store.layout.shards} shards not explained: {_listed(absent)}")
    return _joined(store, attributes, parts) if parts else None


def _score_arrays(store: MapStore, attributes: Attributes) -> list[str]:
    wanted = ["label", "prediction", "flipped"]
    for name in attributes.methods:
        wanted += [f"{name}_{score}" for score in _SCORES]
        wanted += [
            f"{name}_{kind}_{part}" for kind in attributes.explain.sensitivity.searches for part in SEARCH_SCORES
        ]
        wanted += _metric_arrays(store, attributes, name).values()
    return [name for name in wanted if name in store.layout.arrays]


def _metric_arrays(store: MapStore, attributes: Attributes, method: str) -> dict[tuple[str, str], str]:
    """Names of the arrays of a method's metrics, by metric and part; names of methods and metrics have no `_`."""
    found = {}
    for name, layout in store.layout.arrays.items():
        of, metric, part = (*name.split("_", 2), "", "")[:3]
        if of == method and metric in attributes.explain.metrics and len(layout.shape) < 2:
            found[metric, part] = name
    order = attributes.explain.metrics.index
    return dict(sorted(found.items(), key=lambda item: (order(item[0][0]), item[0][1])))


def _joined(store: MapStore, attributes: Attributes, parts: dict[str, list[NDArray[Any]]]) -> Explained:
    arrays = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    count = len(arrays["image"])
    unknown = np.full(count, np.nan)

    def score(name: str, kind: str, otherwise: NDArray[np.float64]) -> NDArray[np.float64]:
        return arrays[f"{name}_{kind}"].astype(np.float64) if f"{name}_{kind}" in arrays else otherwise

    return Explained(
        store=store,
        attributes=attributes,
        image=arrays["image"],
        label=arrays["label"],
        prediction=arrays["prediction"],
        flipped=arrays.get("flipped", np.zeros((count, 0), np.bool_)),
        scores={
            name: MethodScores(
                samples=score(name, "sensitivity", np.zeros((count, 0))),
                maximum=score(name, "sensitivity_max", unknown),
                mean=score(name, "sensitivity_mean", unknown),
                completeness=score(name, "completeness", unknown),
                floor=score(name, "floor", unknown),
                searched={
                    kind: Searched(**{part: score(name, f"{kind}_{part}", unknown) for part in SEARCH_SCORES})
                    for kind in attributes.explain.sensitivity.searches
                },
                metrics={
                    key: arrays[array].astype(np.float64)
                    for key, array in _metric_arrays(store, attributes, name).items()
                },
            )
            for name in attributes.methods
        },
    )


def _listed(numbers: list[int], most: int = 12) -> str:
    rest = len(numbers) - most
    return ", ".join(map(str, numbers[:most])) + (f" and {rest} more" if rest > 0 else "")


def ranking(scores: MethodScores) -> tuple[str, NDArray[np.float64]]:
    """What images are ranked by, in words, and its values [N]: max sensitivity, or else what PGD found."""
    if not scores.samples.size and "pgd" in scores.searched:
        return "PGD change", scores.searched["pgd"].change
    return "max sensitivity", scores.maximum


def choose(explained: Explained) -> tuple[str, dict[int, str]]:
    """Images worth a look: lowest, median and highest sensitivity of the first method; ties go to the lower image.

    Returns:
        In words, what was chosen; and by position in `explained`, why.
    """
    attributes = explained.attributes
    name = attributes.methods[0]
    measure, values = ranking(explained.scores[name])
    ranked = [int(place) for place in np.argsort(values, kind="stable") if not np.isnan(values[place])]
    if not ranked:
        return "The first images", {place: f"Image {place + 1}" for place in range(min(3, len(values)))}
    reasons: dict[int, str] = {}
    for place, reason in ((0, "Lowest"), (-1, "Highest"), ((len(ranked) - 1) // 2, "Median")):
        reasons.setdefault(ranked[place], reason)
    how = attributes.sampling if explained.scores[name].samples.size else attributes.ball
    words = f"Lowest, median and highest {measure} of {method(name).title} ({how})"
    return words, dict(sorted(reasons.items(), key=lambda item: ranked.index(item[0])))


def read_panel(explained: Explained, position: int, heading: str) -> Panel:
    """The image and maps of one explained image.

    Raises:
        MaehpcError: the shard's bytes are not those recorded.
    """
    store = explained.store
    image = int(explained.image[position])
    shard = image // store.layout.shard_images
    row = store.images(shard).index(image)
    methods = explained.attributes.methods
    pixels = store.read("pixels", shard)[row] if "pixels" in store.layout.arrays else None
    return Panel(
        heading=heading,
        lines=_about(explained, position),
        image=None if pixels is None else picture(pixels),
        maps={name: flat_map(name, store.read(name, shard)[row]) for name in methods},
        sensitivity={name: float(ranking(explained.scores[name])[1][position]) for name in methods},
        measure=_SHORT[ranking(explained.scores[methods[0]])[0]],
    )


_SHORT = {"max sensitivity": "max sens.", "PGD change": "PGD change"}


def _about(explained: Explained, position: int) -> tuple[str, ...]:
    classes = explained.attributes.classes
    lines = (
        f"image {explained.image[position]}",
        f"label: {label_in_words(explained.label[position], classes)}",
        f"predicted: {classes[explained.prediction[position]]}",
    )
    flipped = explained.flipped[position]
    return (*lines, f"flips: {flipped.sum()} of {len(flipped)}") if len(flipped) else lines


def label_in_words(label: NDArray[np.int64], classes: Sequence[str]) -> str:
    """The classes that an image belongs to.

    Args:
        label: of one image: a scalar, or [K] of 0 and 1 for multi-label tasks.
        classes: their names.
    """
    numbers = [int(label)] if label.ndim == 0 else [int(number) for number in np.flatnonzero(label)]
    return ", ".join(classes[number] for number in numbers) or "none"


def picture(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Stored pixels [H, W, C] as they are drawn: [H, W] where there is one channel."""
    return pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels


def flat_map(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """A method's map with one value a pixel, [h, w], from [h, w] or [channel, h, w]."""
    if values.ndim == 3:
        values = np.abs(values).max(0) if method(name).over_channels == "largest" else values.sum(0, np.float32)
    return values.astype(np.float32)
