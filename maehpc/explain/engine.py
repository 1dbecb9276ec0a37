"""Attributions of a batch: the one place where maps are computed.

Everything else in this package asks an `Engine` for maps and knows nothing of how they come about, so a faster engine
with the same constructor and `attribute` may stand in its place.

All methods share one forward pass. Saliency's gradient and GradCAM's layer gradient come from one pullback of the
explained logit; DeepLIFT is a second pullback through the same encoder graph, started from the head's rescale-rule
multipliers in place of its gradient. That is captum 0.9's DeepLIFT as long as captum has no rule for any module of the
encoder, which is checked.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maehpc.errors import InputError
from maehpc.explain import rescale
from maehpc.explain.gradcam import GradCam
from maehpc.models import Classifier
from maehpc.recipes import ExplainSettings

SALIENCY = "saliency"
GRADCAM = "gradcam"
DEEPLIFT = "deeplift-captum"


@dataclass(frozen=True)
class Attribution:
    """Maps of a batch, before any reduction.

    Attributes:
        logits: float [B, K].
        targets: int64 [B], the class whose logit is explained.
        maps: by method, in the order of the settings. saliency [B, C, S, S], not negative; gradcam [B, h, w] on the
            patch grid, or [B, S, S] where upsampled; deeplift-captum [B, C, S, S], signed.
        completeness: by method that claims completeness, [B]: |sum(map) - (f(x) - f(b))| / |f(x) - f(b)| for the
            explained logit f and the baseline b.
    """

    logits: Tensor
    targets: Tensor
    maps: dict[str, Tensor]
    completeness: dict[str, Tensor]


class Engine:
    """Computes the maps of the settings' methods for one classifier.

    It takes the classifier over: evaluation mode, every weight frozen, so that no graph is kept for the weights. The
    weights must not change afterwards, since the baseline is run only once.

    Args:
        classifier: whose logits are explained, on the device of the images to come.
        settings: the methods, and GradCAM's own settings.
        baseline: DeepLIFT's reference input, normalised, [1, C, S, S].

    Raises:
        InputError: GradCAM's layer does not serve, or the encoder holds modules for which captum's DeepLIFT has rules.
    """

    def __init__(self, classifier: Classifier, settings: ExplainSettings, baseline: Tensor) -> None:
        assert isinstance(classifier.head, nn.Sequential)
        self._classifier = classifier.eval().requires_grad_(False)
        self._head = classifier.head
        self._methods = settings.methods
        self._baseline = baseline
        self._gradcam: GradCam | None = None
        self._references: list[Tensor] = []
        if GRADCAM in self._methods:
            self._gradcam = GradCam(classifier.encoder, settings.gradcam)
            self._gradcam.check(classifier.represent, baseline)
        if DEEPLIFT in self._methods:
            ruled = next(rescale.ruled_modules(classifier.encoder), None)
            if ruled is not None:
                raise InputError(
                    f"explain.methods: {DEEPLIFT} does not serve this encoder, for whose module {ruled} captum has a "
                    f"rule of its own; leave {DEEPLIFT} out"
                )
            with torch.no_grad():
                self._references = rescale.trace(self._head, classifier.represent(baseline))

    def attribute(self, x: Tensor, targets: Tensor | None = None) -> Attribution:
        """Explains a batch. No image's maps depend on its neighbours, but for rounding.

        Args:
            x: normalised images, [B, C, S, S].
            targets: classes to explain, int64 [B]; each image's own prediction where None.

        Returns:
            Logits and maps, without a graph.
        """
        x = x.detach().requires_grad_()
        tap: AbstractContextManager[list[Tensor]] = self._gradcam.tap() if self._gradcam else nullcontext([])
        with torch.enable_grad(), tap as tapped:
            representation = self._classifier.represent(x)
            logits = self._head(representation)
            if targets is None:
                targets = logits.argmax(dim=1)
            scores = logits.gather(1, targets[:, None])[:, 0]

        points = {SALIENCY: x} if SALIENCY in self._methods else {}
        if self._gradcam:
            (points[GRADCAM],) = tapped
        slopes: dict[str, Tensor] = {}
        if points:
            one = torch.ones_like(scores)
            gradients = torch.autograd.grad(scores, list(points.values()), one, retain_graph=DEEPLIFT in self._methods)
            slopes = dict(zip(points, gradients, strict=True))

        maps: dict[str, Tensor] = {}
        completeness: dict[str, Tensor] = {}
        for method in self._methods:
            if method == SALIENCY:
                maps[method] = slopes[method].abs()
            elif method == GRADCAM:
                assert self._gradcam is not None
                maps[method] = self._gradcam.map(points[method].detach(), slopes[method], (x.shape[2], x.shape[3]))
            else:
                assert method == DEEPLIFT, method
                maps[method] = self._deeplift(x, representation, targets)
                change = scores.detach() - self._references[-1][0, targets]
                completeness[method] = (maps[method].flatten(1).sum(dim=1) - change).abs() / change.abs()
        return Attribution(logits.detach(), targets, maps, completeness)

    def _deeplift(self, x: Tensor, representation: Tensor, targets: Tensor) -> Tensor:
        """Multipliers of the head by the rescale rule, pulled back through the encoder, times x - baseline."""
        trace = rescale.trace(self._head, representation)
        start = F.one_hot(targets, trace[-1].shape[1]).to(trace[-1])
        multipliers = rescale.multipliers(self._head, trace, self._references, start)
        (slope,) = torch.autograd.grad(representation, x, multipliers)
        return slope * (x.detach() - self._baseline)
