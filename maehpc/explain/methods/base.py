"""What a method says of itself and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from maehpc.explain.passes import Need, Pass
from maehpc.models import Classifier
from maehpc.recipes import ExplainSettings

MapKind = Literal["pixels", "plane", "grid"]
"""pixels: a value a pixel and channel, [B, C, S, S]; plane: a value a pixel, [B, S, S]; grid: a value a patch of the
encoder, [B, h, w]."""


class Options(BaseModel):
    """Base of a method's own settings, `explain.options.NAME` of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


_Options = Options  # the class attribute below has the same name


@dataclass(frozen=True)
class Setup:
    """What every method may know before it sees an image.

    Attributes:
        classifier: what is explained.
        settings: of the stage.
        baseline: the reference input, normalised, [1, C, S, S].
        seed: of the recipe, for methods that draw (`maehpc.keys`).
    """

    classifier: Classifier
    settings: ExplainSettings
    baseline: Tensor
    seed: int = 0


class Method(ABC):
    """An attribution method for one classifier.

    No image's map may depend on its neighbours in the batch, and nothing may be drawn from a global generator. Where
    `differentiable` holds, `attribute` must compute the map from the pass with differentiable operations alone.

    Args:
        setup: see there.
        options: of the class's `Options`.

    Raises:
        InputError: the settings do not fit the classifier.
    """

    # Each of these is written as a literal: `maehpc.recipes.plugins.facts` reads them where PyTorch is not imported.
    name: ClassVar[str]
    """Filled in from the file's name."""
    title: ClassVar[str]
    """In print."""
    source: ClassVar[str]
    """Paper, and equation or section."""
    kind: ClassVar[MapKind] = "pixels"
    signed: ClassVar[bool] = True
    """Whether 0 is the middle of the map's range, rather than its lower end."""
    over_channels: ClassVar[Literal["largest", "sum"]] = "sum"
    """How a map of kind `pixels` becomes one value a pixel."""
    complete: ClassVar[bool] = False
    """Whether the map sums to f(x) - f(baseline)."""
    local: ClassVar[bool] = False
    """Whether the map is a slope of the score an input unit, rather than a share of it (Ancona et al. 2018)."""
    differentiable: ClassVar[bool] = False
    """Whether the map may be differentiated: what a search for an adversarial perturbation needs."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    own_passes: ClassVar[tuple[int | Literal["patches"], int]] = (0, 0)
    """Forward passes (`patches`: one a patch) and pullbacks of an image beside the shared pass, at default options:
    what an estimate counts."""
    Options: ClassVar[type[_Options]] = _Options

    def __init__(self, setup: Setup, options: _Options) -> None:
        self.setup = setup
        self.options = options

    @abstractmethod
    def attribute(self, seen: Pass) -> Tensor:
        """The maps of a batch, of the shape that `map_kind` says.

        Args:
            seen: a pass that was told all of `needs`.
        """

    @property
    def map_kind(self) -> MapKind:
        """The shape of the maps; a method whose settings decide it says so here."""
        return self.kind
