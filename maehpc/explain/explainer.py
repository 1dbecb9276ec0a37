"""A batch of images in, everything that is stored about them out: maps, sensitivity samples, flips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maehpc.data import Preprocess
from maehpc.errors import InputError, RunError
from maehpc.explain.engine import DEEPLIFT, SALIENCY, Attribution, Engine
from maehpc.explain.noise import NoiseKey, uniform
from maehpc.explain.sensitivity import perturbed, relative_change
from maehpc.models import Classifier
from maehpc.recipes import ExplainSettings, MapSettings


@dataclass(frozen=True)
class Explanation:
    """What is stored about a batch, on the device it was computed on.

    Attributes:
        logits: of the unperturbed images, [B, K].
        prediction: class of the largest logit, int64 [B].
        target: class explained, int64 [B]; the same for an image and all its perturbations.
        maps: by method, reduced and typed as the settings store them: [B, S, S] or [B, C, S, S]; gradcam [B, h, w]
            on the patch grid or [B, S, S].
        sensitivity: by method, relative change of the unreduced float32 map a perturbation, [B, n]; NaN for zero maps.
        flipped: bool [B, n], whether the perturbed image is predicted as another class.
        completeness: by method that claims completeness, the unperturbed map's relative error, [B].
    """

    logits: Tensor
    prediction: Tensor
    target: Tensor
    maps: dict[str, Tensor]
    sensitivity: dict[str, Tensor]
    flipped: Tensor
    completeness: dict[str, Tensor]


class Explainer:
    """Explains images of one data set with one classifier.

    The result for an image depends on the classifier, the settings, the key and the image's index alone: not on the
    order of images, and on the batch only by rounding.

    Args:
        classifier: see `Engine`, which takes it over.
        settings: of the stage.
        preprocess: the data set's normalisation.
        key: of the noise.

    Raises:
        InputError: the settings do not fit the classifier.
    """

    def __init__(
        self, classifier: Classifier, settings: ExplainSettings, preprocess: Preprocess, key: NoiseKey
    ) -> None:
        self._settings = settings
        self._preprocess = preprocess
        self._key = key
        self._engine = Engine(classifier, settings, self._baseline(classifier))

    @torch.no_grad()
    def explain(self, pixels: Tensor, indices: Tensor, labels: Tensor) -> Explanation:
        """Explains a batch.

        Args:
            pixels: images in [0, 1] at the encoder's size, [B, C, S, S].
            indices: their indices in the split, int64 [B].
            labels: int64 [B], or [B, K] for multi-label tasks; read where they are the target alone.

        Raises:
            InputError: labels are to be explained and an image has several.
            RunError: a logit or map is not finite, or a map does not fit the type it is stored in.
        """
        settings = self._settings.sensitivity
        original = self._engine.attribute(self._preprocess.normalise(pixels), self._targets(labels))
        _require_finite(original, indices, "")
        prediction = original.logits.argmax(dim=1)
        samples = (pixels.shape[0], settings.samples)
        flipped = prediction.new_empty(samples, dtype=torch.bool)
        sensitivity = {method: full.new_empty(samples) for method, full in original.maps.items()}
        for sample in range(settings.samples):
            noise = uniform(self._key, indices, sample, pixels.shape[1:], settings.radius, pixels.device)
            moved = self._engine.attribute(perturbed(pixels, noise, settings, self._preprocess), original.targets)
            _require_finite(moved, indices, f", perturbation {sample},")
            flipped[:, sample] = moved.logits.argmax(dim=1) != prediction
            for method, changes in sensitivity.items():
                changes[:, sample] = relative_change(original.maps[method], moved.maps[method], settings.norm)
        return Explanation(
            logits=original.logits,
            prediction=prediction,
            target=original.targets,
            maps={method: stored(method, full, self._settings.maps) for method, full in original.maps.items()},
            sensitivity=sensitivity,
            flipped=flipped,
            completeness=original.completeness,
        )

    def _targets(self, labels: Tensor) -> Tensor | None:
        if self._settings.target == "prediction":
            return None
        if labels.ndim != 1:
            raise InputError(
                "explain.target: label needs one label an image, and this data set has several; use target: prediction"
            )
        return labels

    def _baseline(self, classifier: Classifier) -> Tensor:
        """DeepLIFT's, normalised, [1, C, S, S]."""
        seen = self._preprocess.settings
        weight = next(classifier.parameters()).detach()
        zero = weight.new_zeros(1, seen.channels, seen.image_size, seen.image_size)
        return self._preprocess.normalise(zero) if self._settings.deeplift.baseline == "black" else zero


def stored(method: str, full: Tensor, settings: MapSettings) -> Tensor:
    """A method's maps as they are stored.

    Args:
        method: saliency is reduced by its largest channel, DeepLIFT by the sum over channels; gradcam has none.
        full: maps as attributed.
        settings: `channels` and `dtype`.

    Raises:
        RunError: a value is too large for the dtype.
    """
    result = full
    if settings.channels == "reduced" and method == SALIENCY:
        result = full.amax(dim=1)
    elif settings.channels == "reduced" and method == DEEPLIFT:
        result = full.sum(dim=1)
    if settings.dtype == "float32":
        return result
    largest = result.abs().max().item()
    half = result.half()
    if (result.flatten(1).any(dim=1) != half.flatten(1).any(dim=1)).any():
        raise RunError(
            f"explain.maps.dtype: float16 turns a {method} map of this classifier into zeros; set it to float32"
        )
    if largest > torch.finfo(torch.float16).max:
        raise RunError(
            f"explain.maps.dtype: float16 cannot hold the {method} values of this classifier, whose magnitude reaches "
            f"{largest:.3g}; set it to float32"
        )
    return half


def _require_finite(attribution: Attribution, indices: Tensor, which: str) -> None:
    """A NaN must not pass for the NaN of a zero map."""
    for name, values in {"logits": attribution.logits, **attribution.maps}.items():
        finite = values.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            first = indices[int((~finite).nonzero()[0])].item()
            raise RunError(
                f"the classifier's {name} of image {first}{which} are not finite; finetune it again with a lower "
                f"optim.lr, or lower explain.sensitivity.radius"
            )
