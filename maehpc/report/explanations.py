"""Reading a store of maps: the scores of every image whose shard stands whole, and the maps of chosen images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from maehpc.errors import InputError
from maehpc.maps import MapStore
from maehpc.recipes import ExplainSettings
from maehpc.recipes.settings import SEARCH_SCORES
from maehpc.report.columns import Column, count, known, mapped, place_of, value_at
from maehpc.report.figures.panels import Panel
from maehpc.report.gathered import IMAGE, Gathered, Reader, gather
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
    """Scores of the explained images of a store, in order of the images: columns, since they need not fit in memory.

    Attributes:
        store: where maps lie.
        attributes: what was explained, and how.
        gathered: the arrays as they are stored.
        scores: by method.
    """

    store: MapStore
    attributes: Attributes
    gathered: Gathered
    scores: dict[str, MethodScores]

    @property
    def images(self) -> int:
        """How many there are."""
        return self.gathered.images

    @property
    def image(self) -> Column:
        """[N] index in the split."""
        return self.gathered.column(IMAGE)

    @property
    def label(self) -> Column:
        """[N], or [N, K] of 0 and 1 for multi-label tasks."""
        return self.gathered.column("label")

    @property
    def prediction(self) -> Column:
        """[N]."""
        return self.gathered.column("prediction")

    @property
    def flipped(self) -> Column:
        """[N, n] whether a perturbation changed the prediction; n is 0 where sensitivity was left out."""
        if "flipped" in self.store.layout.arrays:
            return self.gathered.column("flipped")
        return mapped(_without_samples, self.image)


def _without_samples(image: NDArray[Any]) -> NDArray[np.bool_]:
    return np.zeros((len(image), 0), np.bool_)


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


def read_explained(
    store: MapStore,
    folder: Path,
    reader: Reader,
    missing: Callable[[str], None],
    read: Callable[[int], object] = lambda shards: None,
) -> Explained | None:
    """Scores from every shard that the ledger records and whose bytes are those recorded; None where there is none.

    Scores alone are read, and these bytes alone are checked: maps can fill a file system, and `maehpc verify` is there
    for them.

    Args:
        store: of one data set.
        folder: keeps what was gathered for the next report; this store's alone.
        reader: of what was gathered.
        missing: told, in words, which shards are left out.
        read: told how many shards have been dealt with.

    Raises:
        InputError: the store was not written by explain.
        UnwritableError: `folder` cannot be written.
    """
    attributes = read_attributes(store)
    gathered = gather(store, _score_arrays(store, attributes), folder, reader, missing, read)
    return _explained(store, attributes, gathered) if gathered.images else None


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


def _explained(store: MapStore, attributes: Attributes, gathered: Gathered) -> Explained:
    image = gathered.column(IMAGE)
    unknown = mapped(lambda images: np.full(len(images), np.nan), image)
    unsampled = mapped(lambda images: np.zeros((len(images), 0)), image)

    def score(array: str, otherwise: Column = unknown) -> Column:
        return mapped(_float64, gathered.column(array)) if array in store.layout.arrays else otherwise

    return Explained(
        store=store,
        attributes=attributes,
        gathered=gathered,
        scores={
            name: MethodScores(
                samples=score(f"{name}_sensitivity", unsampled),
                maximum=score(f"{name}_sensitivity_max"),
                mean=score(f"{name}_sensitivity_mean"),
                completeness=score(f"{name}_completeness"),
                floor=score(f"{name}_floor"),
                searched={
                    kind: Searched(**{part: score(f"{name}_{kind}_{part}") for part in SEARCH_SCORES})
                    for kind in attributes.explain.sensitivity.searches
                },
                metrics={key: score(array) for key, array in _metric_arrays(store, attributes, name).items()},
                elements={
                    key: store.layout.arrays[array].shape[0]
                    for key, array in _metric_arrays(store, attributes, name).items()
                    if store.layout.arrays[array].shape
                },
            )
            for name in attributes.methods
        },
    )


def _float64(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.astype(np.float64)


def ranking(scores: MethodScores) -> tuple[str, Column]:
    """What images are ranked by, in words, and its values [N]: max sensitivity, or else what PGD found."""
    if not scores.sampled and "pgd" in scores.searched:
        return "PGD change", scores.searched["pgd"].change
    return "max sensitivity", scores.maximum


def choose(explained: Explained) -> tuple[str, dict[int, str]]:
    """Images worth a look: lowest, median and highest sensitivity of the first method; ties go to the lower image.

    Returns:
        In words, what was chosen; and by place among the explained images, why.
    """
    attributes = explained.attributes
    name = attributes.methods[0]
    measure, values = ranking(explained.scores[name])
    ranked = count(known(values))
    if not ranked:
        return "The first images", {place: f"Image {place + 1}" for place in range(min(3, explained.images))}
    reasons: dict[int, str] = {}  # by rank, which also orders them
    for rank, reason in ((0, "Lowest"), (ranked - 1, "Highest"), ((ranked - 1) // 2, "Median")):
        reasons.setdefault(rank, reason)
    how = attributes.sampling if explained.scores[name].sampled else attributes.ball
    words = f"Lowest, median and highest {measure} of {method(name).title} ({how})"
    return words, {place_of(values, rank): reason for rank, reason in sorted(reasons.items())}


def read_panel(explained: Explained, place: int, heading: str) -> Panel:
    """The image and maps of one explained image.

    Raises:
        MaehpcError: the shard's bytes are not those recorded.
    """
    store = explained.store
    image = int(explained.gathered.row(IMAGE, place))
    shard = image // store.layout.shard_images
    row = store.images(shard).index(image)
    methods = explained.attributes.methods
    pixels = store.read("pixels", shard)[row] if "pixels" in store.layout.arrays else None
    measures = {name: ranking(explained.scores[name]) for name in methods}
    return Panel(
        heading=heading,
        lines=_about(explained, image, place),
        image=None if pixels is None else picture(pixels),
        maps={name: flat_map(name, store.read(name, shard)[row]) for name in methods},
        sensitivity={name: value_at(values, place) for name, (_, values) in measures.items()},
        measure=_SHORT[measures[methods[0]][0]],
    )


_SHORT = {"max sensitivity": "max sens.", "PGD change": "PGD change"}


def _about(explained: Explained, image: int, place: int) -> tuple[str, ...]:
    classes = explained.attributes.classes
    row = explained.gathered.row
    lines = (
        f"image {image}",
        f"label: {label_in_words(row('label', place), classes)}",
        f"predicted: {classes[row('prediction', place)]}",
    )
    if "flipped" not in explained.store.layout.arrays:
        return lines
    flipped = row("flipped", place)
    return (*lines, f"flips: {flipped.sum()} of {len(flipped)}")


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
