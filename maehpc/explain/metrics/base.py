"""What a metric says of itself and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from maehpc.data import Preprocess
from maehpc.explain.engine import Engine
from maehpc.explain.methods.base import Method, Options, Setup
from maehpc.explain.noise import NoiseKey
from maehpc.recipes import ExplainSettings

_Value = TypeVar("_Value")
_Options = Options  # the class attribute below has the same name

Arrays = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
"""By part ("" for the metric's own value): names and lengths of the dimensions after the image's."""

Coordinates = Mapping[str, tuple[float, ...] | tuple[str, ...]]
"""By name of a dimension."""


@dataclass(frozen=True)
class Given:
    """A batch and what is already known of it.

    Attributes:
        engine: which made the maps.
        settings: of the stage.
        preprocess: the data set's normalisation.
        pixels: images in [0, 1], [B, C, S, S].
        x: the same, normalised.
        indices: of the images in the split, int64 [B].
        targets: classes explained, int64 [B].
        logits: [B, K].
        maps: by method, as attributed: [B, C, S, S], [B, S, S] or [B, h, w].
        key: of the noise that sensitivity draws.
        changes: by method, relative change of the map under each perturbation that sensitivity drew, [B, n]; empty
            where it drew none.
    """

    engine: Engine
    settings: ExplainSettings
    preprocess: Preprocess
    pixels: Tensor
    x: Tensor
    indices: Tensor
    targets: Tensor
    logits: Tensor
    maps: Mapping[str, Tensor]
    key: NoiseKey
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, compute: Callable[[], _Value]) -> _Value:
        """What `compute` gives, computed for this batch at the first call: for what serves all methods.

        Args:
            key: of the result: everything but the batch that decides it.
            compute: makes it.
        """
        if key not in self._kept:
            self._kept[key] = compute()
        value: _Value = self._kept[key]
        return value


class Metric(ABC):
    """A measure of the maps of one classifier, an image and method at a time.

    No image's value may depend on its neighbours in the batch but for rounding, and nothing may be drawn from a global
    generator. A map that is zero everywhere gives NaN.

    Args:
        setup: of the engine whose maps are measured.
        options: of the class's `Options`.
        images: in the split; not known where None.

    Raises:
        InputError: the options do not fit the classifier or the split.
    """

    # Each of these is written as a literal: `maehpc.recipes.plugins.facts` reads them where PyTorch is not imported.
    name: ClassVar[str]
    """Filled in from the file's name."""
    title: ClassVar[str]
    """In print."""
    source: ClassVar[str]
    """Paper, and equation or section."""
    unit: ClassVar[str]
    """Unit and range."""
    better: ClassVar[Literal["higher", "lower", "neither"]]
    """Which values speak for the map."""
    meaning: ClassVar[str]
    """What the value says, in a sentence."""
    forwards: ClassVar[int] = 0
    """Forward passes of an image for all methods together, at default options: what an estimate counts."""
    forwards_each: ClassVar[int] = 0
    """Further forward passes of an image for each method."""
    attributions: ClassVar[int] = 0
    """Attributions of an image by all methods together."""
    shares_draws: ClassVar[bool] = False
    """Whether those of sensitivity serve instead, where it draws as many and its norm is l2."""
    numbers: ClassVar[tuple[tuple[str, int], ...]] = (("", 1),)
    """Parts, and how many numbers of each an image has, at default options."""
    Options: ClassVar[type[_Options]] = _Options

    def __init__(self, setup: Setup, options: _Options, images: int | None = None) -> None:
        self.setup = setup
        self.options = options
        self.images = images

    @abstractmethod
    def measure(self, given: Given, method: str) -> dict[str, Tensor]:
        """The values of a batch.

        Args:
            given: the batch.
            method: whose maps are measured.

        Returns:
            By part, "" for the metric's own value, float32 [B, ...]; of the shapes that `arrays` says.
        """

    def arrays(self) -> Arrays:
        """The parts and their dimensions, known before anything is computed. "" is always one value an image."""
        return {"": ((), ())}

    def coordinates(self) -> Coordinates:
        """What the places along dimensions of `arrays` stand for, where they stand for more than a number."""
        return {}

    @property
    def inputs(self) -> Mapping[str, str]:
        """SHA-256 of the files that decide the values beside the recipe, by option."""
        return {}

    @staticmethod
    def explaining(given: Given, method: str) -> Method:
        """The method of that name as it made the batch's maps."""
        return given.engine.methods[method]
