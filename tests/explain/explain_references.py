"""Classifiers small enough to work out by hand or to hold to captum, and captum itself made to fit them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from captum.attr import DeepLift, LayerGradCam, Saliency
from torch import Tensor, nn

from maehpc.data import PackInfo, Preprocess
from maehpc.explain.layers import layer_path
from maehpc.models import Classifier, build_classifier, grid_size, num_prefix_tokens
from maehpc.recipes import AdapterSettings, DataSettings, EncoderSettings, ExplainSettings

SIDE = 16
CLASSES = 5
TINY = EncoderSettings(name="vit-tiny", patch_size=4, width=32, depth=2, heads=4, weights="scratch")


def preprocess(side: int = SIDE, mean: float | None = None, std: float = 1.0) -> Preprocess:
    """ImageNet's normalisation, or one of a data set with the same mean and deviation in each channel."""
    settings = DataSettings(image_size=side, normalization="imagenet" if mean is None else "dataset")
    info = PackInfo("toy", "Toy", "multi-class", (), "", (mean or 0.0,) * 3, (std,) * 3, {}, (side, side, 3))
    return Preprocess(settings, info)


def vit(
    representation: str = "cls",
    activation: str = "relu",
    layers: int = 2,
    encoder: EncoderSettings = TINY,
    side: int = SIDE,
    seed: int = 0,
) -> Classifier:
    """A ViT whose random weights are large enough for attention and activations to be far from linear."""
    adapter = AdapterSettings(layers=layers, hidden=16 if layers == 2 else None, activation=activation)
    classifier = build_classifier(encoder, adapter, representation, side, 3, CLASSES)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in classifier.named_parameters():
            if "norm" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.5 / max(weight[0].numel(), 9) ** 0.25))
    return classifier.eval()


def images(count: int, side: int = SIDE, seed: int = 1) -> Tensor:
    """Pixels in [0, 1], [B, 3, S, S]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def explain_settings(*methods: str, **values: object) -> ExplainSettings:
    return ExplainSettings(methods=methods or ("saliency", "gradcam", "deeplift", "deeplift-captum"), **values)


class ToyEncoder(nn.Module):
    """What `Classifier` and explanation ask of an encoder, around any function of the image that gives tokens."""

    def __init__(self, features: Callable[[Tensor], Tensor], grid: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.num_prefix_tokens = 0
        self.cls_token = None
        self.patch_embed = SimpleNamespace(grid_size=grid, patch_size=(patch, patch))
        self.features = features
        self.tokens = nn.Identity()
        self.fc_norm = nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tokens(self.features(x))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def linear_classifier(weight: Tensor, side: int) -> Classifier:
    """f(x) = W x on the flattened image."""
    encoder = ToyEncoder(lambda x: x.flatten(1)[:, None], (1, 1), side)
    return Classifier(encoder, nn.Sequential(linear(weight)), "mean")


def quadratic_classifier(matrix: Tensor, side: int) -> Classifier:
    """f(x) = x'Ax/2 on the flattened image; A symmetric. One class."""
    encoder = ToyEncoder(lambda x: (x.flatten(1) * (x.flatten(1) @ matrix) / 2)[:, None], (1, 1), side)
    return Classifier(encoder, nn.Sequential(linear(torch.ones(1, matrix.shape[0], dtype=matrix.dtype))), "mean")


class _OnGrid(nn.Module):
    """A module that gives tokens; its patches pass through `grid` as [B, C, h, w], the shape captum needs."""

    def __init__(self, module: nn.Module, prefix: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.module, self.prefix, self.shape, self.grid = module, prefix, shape, nn.Identity()

    def forward(self, *inputs: Tensor, **options: object) -> Tensor:
        tokens = self.module(*inputs, **options)
        patches = tokens[:, self.prefix :].transpose(1, 2)
        patches = self.grid(patches.reshape(*patches.shape[:2], *self.shape)).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, : self.prefix], patches], dim=1)


def captum_gradcam(classifier: Classifier, layer: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, targets) -> [B, h, w]."""
    wrapped = copy.deepcopy(classifier)
    *parents, name = layer_path(wrapped.encoder, layer)
    holder = wrapped.encoder.get_submodule(".".join(parents))
    old = holder.get_submodule(name)
    on_grid = _OnGrid(old, num_prefix_tokens(wrapped.encoder), grid_size(wrapped.encoder))
    if isinstance(holder, nn.Sequential):
        holder[int(name)] = on_grid
    else:
        setattr(holder, name, on_grid)
    explainer = LayerGradCam(wrapped, on_grid.grid)
    return lambda x, targets: explainer.attribute(x, targets)[:, 0].detach()


def captum_saliency(classifier: Classifier) -> Callable[[Tensor, Tensor], Tensor]:
    explainer = Saliency(classifier)
    return lambda x, targets: explainer.attribute(x.clone().requires_grad_(), targets).detach()


def captum_deeplift(classifier: nn.Module, baseline: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    explainer = DeepLift(classifier)

    def attribute(x: Tensor, targets: Tensor) -> Tensor:
        reference = torch.zeros_like(x) if baseline is None else baseline.expand_as(x).contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return explainer.attribute(x, reference, targets).detach()

    return attribute
