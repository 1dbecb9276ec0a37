"""What the benchmark of explanations explains: a classifier with fixed random weights, fixed images, keyed noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from maehpc import keys
from maehpc.data import PackInfo, Preprocess
from maehpc.devices import choose_device
from maehpc.explain import Explainer, NoiseKey
from maehpc.explain.noise import uniform
from maehpc.models import Classifier, build_classifier
from maehpc.recipes import AdapterSettings, DataSettings, EncoderSettings, ExplainSettings, FinetuneSettings
from maehpc.recipes.settings import Positive, Settings

CLASSES = 5
CHANNELS = 3
HEAD = FinetuneSettings(representation="cls", adapter=AdapterSettings())
"""The report's: on the class token, two layers and a ReLU, for which captum's DeepLift has a rule."""
GAIN = 1.25
"""By how much a linear layer widens its inputs: scores of an attention then have a deviation of about 1.5, so that its
weights are neither all alike nor all but one 0, and activations are far from linear."""


class Case(Settings):
    """One comparison.

    Attributes:
        encoder: the size of the model; its weights are drawn here.
        image_size: pixels.
        samples: perturbations an image.
        images: of a turn.
        device: cpu or cuda.
        precision: of the products, as `explain.precision` of a recipe.
        seed: of weights, images and noise.
    """

    encoder: EncoderSettings = EncoderSettings(name="vit-tiny", weights="scratch")
    image_size: Positive = 224
    samples: Positive = 10
    images: Positive = 8
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    seed: int = 0

    def settings(self, methods: tuple[str, ...]) -> ExplainSettings:
        """Those of the explain stage, but that maps keep their channels so that they can be compared."""
        return ExplainSettings.model_validate(
            {
                "methods": methods,
                "sensitivity": {"samples": self.samples},
                "precision": self.precision,
                "noise_floor_images": 0,
                "maps": {"channels": "full"},
            }
        )


@dataclass(frozen=True)
class Subject:
    """A case on its device.

    Attributes:
        case: see there.
        classifier: evaluation mode, weights frozen.
        preprocess: ImageNet's normalisation.
        key: of the noise.
        pixels: images in [0, 1], [B, C, S, S].
        indices: of the images, int64 [B].
    """

    case: Case
    classifier: Classifier
    preprocess: Preprocess
    key: NoiseKey
    pixels: Tensor
    indices: Tensor

    def explainer(self, methods: tuple[str, ...]) -> Explainer:
        """Ours for these methods in one pass."""
        return Explainer(self.classifier, self.case.settings(methods), self.preprocess, self.key)

    def with_images(self, count: int) -> Self:
        """The same with so many images, of which the first are the same."""
        pixels, indices = _images(self.case, count, self.pixels.device)
        return replace(self, case=self.case.model_copy(update={"images": count}), pixels=pixels, indices=indices)

    @property
    def x(self) -> Tensor:
        """The images normalised, [B, C, S, S]."""
        return self.preprocess.normalise(self.pixels)

    def noise(self) -> Tensor:
        """That of all samples, as ours draws it, [B, samples, C, S, S]."""
        radius = self.case.settings(("saliency",)).sensitivity.radius
        drawn = [
            uniform(self.key, self.indices, sample, self.pixels.shape[1:], radius, self.pixels.device)
            for sample in range(self.case.samples)
        ]
        return torch.stack(drawn, dim=1)


def make_subject(case: Case) -> Subject:
    """Builds the classifier and draws the images.

    Raises:
        InputError: the image does not divide into the model's patches, or there is no such device.
    """
    device = choose_device(case.device)
    data = DataSettings(image_size=case.image_size)
    info = PackInfo("bench", "Bench", "multi-class", (), "", (0.5,) * 3, (0.5,) * 3, {}, (case.image_size,) * 2 + (3,))
    pixels, indices = _images(case, case.images, device)
    return Subject(
        case=case,
        classifier=_classifier(case).to(device),
        preprocess=Preprocess(data, info),
        key=NoiseKey(case.seed, "bench"),
        pixels=pixels,
        indices=indices,
    )


def _images(case: Case, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (CHANNELS, case.image_size, case.image_size)
    drawn = [torch.rand(shape, generator=keys.generator(case.seed, "bench image", index)) for index in range(count)]
    return torch.stack(drawn).to(device), torch.arange(count, device=device)


def _classifier(case: Case) -> Classifier:
    classifier = build_classifier(case.encoder, HEAD.adapter, HEAD.representation, case.image_size, CHANNELS, CLASSES)
    generator = keys.generator(case.seed, "bench weights")
    with torch.no_grad():
        for name, weight in classifier.named_parameters():
            if "norm" in name:
                continue
            inputs = weight[0].numel()
            is_matrix = weight.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
            spread = GAIN / math.sqrt(inputs) if is_matrix else 0.2
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return classifier.eval().requires_grad_(False)


def wait_for(device: torch.device) -> None:
    """Returns once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
