"""Attributions of a batch: the methods of the settings over one shared pass.

    Engine ──► Pass (passes.py) ──► Network (network.py) ──► rules/
       └─────► methods/

Everything else in this package asks an `Engine` for maps and knows nothing of how they come about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from maehpc.devices import one_thread
from maehpc.explain.layers import check_layer, layer_path
from maehpc.explain.methods import Method, Setup, make_methods
from maehpc.explain.network import Network
from maehpc.explain.passes import Need, Pass, References
from maehpc.explain.precision import PRODUCTS
from maehpc.models import Classifier
from maehpc.recipes import ExplainSettings


@dataclass(frozen=True)
class Attribution:
    """Maps of a batch, before any reduction.

    Attributes:
        logits: float [B, K].
        targets: int64 [B], the class whose logit is explained.
        maps: by method, in the order of the settings; of the shape that the method's `map_kind` says.
        completeness: by method that claims completeness, [B]: |sum(map) - (f(x) - f(b))| / |f(x) - f(b)| for the
            explained logit f and the baseline b; NaN for an image that is the baseline.
    """

    logits: Tensor
    targets: Tensor
    maps: dict[str, Tensor]
    completeness: dict[str, Tensor]


class Engine:
    """Computes the maps of the settings' methods for one classifier. Several threads may use one at the same time.

    It takes the classifier over: evaluation mode, every weight frozen, so that no graph is kept for the weights. The
    weights must not change afterwards, since the baseline is run only once.

    Args:
        classifier: whose logits are explained, on the device of the images to come.
        settings: the methods and their own settings.
        baseline: the reference input, normalised, [1, C, S, S].
        seed: of the recipe, for methods that draw.

    Raises:
        InputError: a method or its options do not fit the classifier.
    """

    def __init__(self, classifier: Classifier, settings: ExplainSettings, baseline: Tensor, seed: int = 0) -> None:
        self.setup = Setup(classifier, settings, baseline, seed)
        self.methods: dict[str, Method] = make_methods(self.setup)
        self._needs: frozenset[Need] = frozenset().union(*(method.needs for method in self.methods.values()))
        path = layer_path(classifier.encoder, settings.gradcam.layer) if "layer" in self._needs else None
        self.network = Network(
            classifier, path, whole="attention" in self._needs, products=PRODUCTS.get(settings.precision)
        )
        if path is not None:
            check_layer(self.network, settings.gradcam.layer, baseline)
        self.baseline = baseline
        strict = next((name for name in ("deeplift", "attnlrp") if name in self._needs), None)
        with one_thread():  # as every group of images is computed, so that the baseline is the same anywhere
            self._references = References(self.network, baseline, strict)

    @property
    def row_bytes(self) -> int:
        """What the ruled functions keep of their inputs and outputs for one image."""
        return sum(value.nbytes for values in self._references.tape.baseline for value in values.values())

    def attribute(self, x: Tensor, targets: Tensor | None = None, rows: int = 1) -> Attribution:
        """Explains a batch. No image's maps depend on its neighbours, but for rounding.

        Args:
            x: normalised images, [B, C, S, S].
            targets: classes to explain, int64 [B]; the prediction for the first of every `rows` images where None.
            rows: images with one target, one after another.

        Returns:
            Logits and maps, without a graph.
        """
        with self.seen(x, targets, rows=rows) as seen:
            maps = {name: method.attribute(seen).detach() for name, method in self.methods.items()}
            completeness = {
                name: self._completeness(seen, maps[name]) for name, method in self.methods.items() if method.complete
            }
            return Attribution(seen.logits, seen.targets, maps, completeness)

    @contextmanager
    def seen(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        rows: int = 1,
        methods: Sequence[str] | None = None,
        differentiable: bool = False,
    ) -> Iterator[Pass]:
        """A pass over a batch from which methods may attribute; see `Pass`.

        Args:
            x: normalised images, [B, C, S, S].
            targets: see `attribute`.
            rows: see `attribute`.
            methods: those that will be asked; all where None.
            differentiable: whether maps shall have a graph to `x`.
        """
        names = self.methods if methods is None else methods
        needs: frozenset[Need] = frozenset().union(*(self.methods[name].needs for name in names))
        made = Pass(
            self.network,
            x,
            targets,
            rows=rows,
            references=self._references,
            needs=needs,
            differentiable=differentiable,
        )
        try:
            yield made
        finally:
            made.close()

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, K] of normalised images, nothing else."""
        return self.network.logits(x)

    def _completeness(self, seen: Pass, full: Tensor) -> Tensor:
        change = seen.scores - self._references.logits[0, seen.targets]
        return (full.flatten(1).sum(dim=1) - change).abs() / change.abs()
