"""Floating-point operations of the models, in closed form: what the matrix products of one image take.

A multiply-add counts as 2. With N tokens of width D, a transformer block's linear layers take 24 N D² and its attention
4 N² D; everything else (norms, activations, softmax, cropping and resizing) is left out, as in the literature.
A gradient with respect to a layer's input costs as much as the layer, one with respect to its weights as much again;
attention has no weights, and both of its factors need a gradient. What a method or metric costs beside the shared pass
is read from its file (`maehpc.recipes.plugins`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maehpc.recipes import plugins
from maehpc.recipes.settings import AdapterSettings, DecoderSettings, EncoderSettings, ExplainSettings, FinetuneSettings

PREFIX = 1
"""Tokens before the patches in an encoder of ours: the class token."""


@dataclass(frozen=True)
class Work:
    """Operations of one image through one piece of a model.

    Attributes:
        forward: forwards.
        pullback: gradient of the output brought back to the input, the weights being frozen.
        weights: gradient with respect to the weights, in addition.
        second: what a pullback takes in addition where it shall itself be pulled back, and is.
    """

    forward: float = 0.0
    pullback: float = 0.0
    weights: float = 0.0
    second: float = 0.0

    def __add__(self, other: Work) -> Work:
        """One piece after another."""
        return Work(
            self.forward + other.forward,
            self.pullback + other.pullback,
            self.weights + other.weights,
            self.second + other.second,
        )

    def times(self, count: int) -> Work:
        """Several equal pieces after another."""
        return Work(self.forward * count, self.pullback * count, self.weights * count, self.second * count)

    @property
    def training(self) -> float:
        """Forward and backward."""
        return self.forward + self.pullback + self.weights

    @property
    def without_input_gradient(self) -> Work:
        """The first piece of a model that is trained: nobody asks for the gradient of its input."""
        return Work(self.forward, 0.0, self.weights)


def linear(rows: int, inputs: int, outputs: int) -> Work:
    """A linear layer on so many rows."""
    once = 2.0 * rows * inputs * outputs
    return Work(once, once, once, once)


def attention(queries: int, keys: int, width: int) -> Work:
    """Attention without its linear layers; `width` is that of all heads' queries, keys and values together.

    Forwards it is two products, pulled back four. A pullback that shall be differentiable computes the weights anew,
    and the pullback of its five products is ten.
    """
    product = 2.0 * queries * keys * width
    return Work(2 * product, 4 * product, 0.0, 11 * product)


def blocks(tokens: int, width: int, depth: int) -> Work:
    """Transformer blocks with an MLP of four times their width."""
    return (linear(tokens, width, 12 * width) + attention(tokens, tokens, width)).times(depth)


def class_token_block(tokens: int, width: int, heads: int) -> Work:
    """The last block as far as the class token needs it (`maehpc.explain.last_block`).

    Keys and values are the tokens themselves, of the full width for each head; all linear layers have one row.
    """
    return linear(1, width, 12 * width) + attention(heads, tokens, width)


@dataclass(frozen=True)
class Vit:
    """The shape of an encoder of ours.

    Attributes:
        width: of a token.
        depth: blocks.
        heads: of each attention.
        patches: of an image.
        values: numbers in a patch, p * p * C.
    """

    width: int
    depth: int
    heads: int
    patches: int
    values: int

    @classmethod
    def of(cls, settings: EncoderSettings, image_size: int, channels: int) -> Vit:
        """The encoder of the settings for square images.

        Raises:
            KeyError: a timm encoder, whose shape timm alone knows.
        """
        width, depth, heads, patch = settings.dimensions
        return cls(width, depth, heads, (image_size // patch) ** 2, patch * patch * channels)

    @property
    def tokens(self) -> int:
        """Tokens of a whole image."""
        return PREFIX + self.patches

    def stem(self, patches: int) -> Work:
        """The embedding of so many patches."""
        return linear(patches, self.values, self.width)

    @property
    def body(self) -> Work:
        """All blocks on a whole image."""
        return blocks(self.tokens, self.width, self.depth)

    @property
    def forward(self) -> float:
        """A whole image to its tokens."""
        return (self.stem(self.patches) + self.body).forward


def autoencoder(vit: Vit, decoder: DecoderSettings, mask_ratio: float) -> Work:
    """A masked autoencoder: the encoder on visible patches alone, the decoder on all tokens."""
    visible = int(vit.patches * (1 - mask_ratio))
    return (
        vit.stem(visible).without_input_gradient
        + blocks(PREFIX + visible, vit.width, vit.depth)
        + linear(PREFIX + visible, vit.width, decoder.width)
        + blocks(vit.tokens, decoder.width, decoder.depth)
        + linear(vit.tokens, decoder.width, vit.values)
    )


def adapter_layers(width: int, classes: int, settings: AdapterSettings) -> list[tuple[int, int]]:
    """Inputs and outputs of the head's linear layers, first to last."""
    if settings.layers == 1:
        return [(width, classes)]
    hidden = settings.hidden or width
    return [(width, hidden), (hidden, classes)]


def adapter(width: int, classes: int, settings: AdapterSettings) -> Work:
    """The head on one representation."""
    first, *rest = (linear(1, *layer) for layer in adapter_layers(width, classes, settings))
    return sum(rest, first)


def adapter_alone(width: int, classes: int, settings: AdapterSettings) -> Work:
    """The head on a feature that was computed before."""
    first, *rest = (linear(1, *layer) for layer in adapter_layers(width, classes, settings))
    return sum(rest, first.without_input_gradient)


_COSTS = ("own_passes", "forwards", "forwards_each", "attributions")
"""Facts of a method or metric that hold for its default options."""

_RULES = ("deeplift", "deeplift-captum", "attnlrp")
"""Needs that are a pullback of their own each."""


class Explained:
    """What explaining one image costs, with a classifier of an encoder of ours; see `maehpc.explain.engine`.

    Args:
        vit: the encoder.
        classes: logits.
        finetune: the head, and what it is put on.
        settings: methods, metrics and perturbations.
    """

    def __init__(self, vit: Vit, classes: int, finetune: FinetuneSettings, settings: ExplainSettings) -> None:
        self._vit, self._settings = vit, settings
        self._methods = {name: plugins.facts("methods", name) for name in settings.methods}
        self._head = adapter(vit.width, classes, finetune.adapter)
        self._one = blocks(vit.tokens, vit.width, 1)
        self._rows_of_last = vit.tokens
        self._last = self._one
        if finetune.representation == "cls" and "attention" not in self._needs(*settings.methods):
            self._rows_of_last = 1
            self._last = class_token_block(vit.tokens, vit.width, vit.heads)
        self._network = vit.stem(vit.patches) + self._one.times(vit.depth - 1) + self._last + self._head

    @property
    def unknown(self) -> tuple[str, ...]:
        """Methods and metrics that count their passes by options of their own; then nothing else here holds."""
        every = {**self._methods, **{name: plugins.facts("metrics", name) for name in self._settings.metrics}}
        return tuple(
            name
            for name, facts in every.items()
            if self._settings.options.get(name) and any(facts.get(fact) for fact in _COSTS)
        )

    @property
    def image(self) -> float:
        """An image with all its perturbations, searches and metrics."""
        settings, count = self._settings, len(self._settings.methods)
        total = (1 + settings.sensitivity.drawn) * self.attribution
        for name in settings.methods:
            # The last point that a search visits is only looked at.
            search = settings.sensitivity.search.steps * self._climb(name) + self._attribution(name)
            total += len(settings.sensitivity.searches) * search
        for name in settings.metrics:
            facts = plugins.facts("metrics", name)
            forwards = facts.get("forwards", 0) + count * facts.get("forwards_each", 0)
            total += forwards * self._network.forward + self._attributions(facts) * self.attribution
        return total

    @property
    def attribution(self) -> float:
        """One image, or one perturbation of it, through all methods: one forward, and a pullback by each rule."""
        return self._attribution(*self._settings.methods)

    @property
    def preparation(self) -> float:
        """What is computed once before any image: the baseline is run, and a layer that is tapped is tried."""
        tries = "layer" in self._needs(*self._settings.methods)
        return (1 + tries) * self._network.forward + tries * self._above_layer.pullback

    def _attributions(self, facts: Mapping[str, Any]) -> int:
        """Those that a metric makes of an image, all methods together."""
        count: int = facts.get("attributions", 0)
        drawn = self._settings.sensitivity
        shared = facts.get("shares_draws") and drawn.drawn >= count and drawn.norm == "l2"
        return 0 if shared else count

    def _needs(self, *methods: str) -> set[str]:
        return {need for name in methods for need in self._methods[name].get("needs", ())}

    def _own(self, method: str) -> tuple[int, int]:
        """Forwards and pullbacks beside the shared pass."""
        forwards, pullbacks = self._methods[method].get("own_passes", (0, 0))
        return self._vit.patches if forwards == "patches" else forwards, pullbacks

    def _attribution(self, *methods: str) -> float:
        network = self._network
        total = network.forward + self._pulled(*methods).pullback
        for forwards, pullbacks in map(self._own, methods):
            total += forwards * network.forward + pullbacks * network.pullback
        return total

    def _climb(self, method: str) -> float:
        """One point that a search visits: the map, and the gradient of what is maximised, through map and network."""
        network, pulled = self._network, self._pulled(method)
        _, further = self._own(method)
        one = network.forward + pulled.pullback + pulled.second + network.pullback
        return one + further * (network.forward + 2 * network.pullback + network.second)

    def _pulled(self, *methods: str) -> Work:
        """All pullbacks of the shared pass."""
        needs = self._needs(*methods)
        total = Work()
        if needs & {"gradient", "attention"}:
            total += self._network
        elif "layer" in needs:
            total += self._above_layer + self._head
        return total + self._network.times(len(needs.intersection(_RULES)))

    @property
    def _above_layer(self) -> Work:
        """The encoder from the layer that class activation maps look at to its output."""
        depth, words = self._vit.depth, self._settings.gradcam.layer.split(".")
        if words[0] == "norm":
            return Work()
        number, inside = -1, []
        if words[0] == "blocks" and len(words) > 1 and words[1].lstrip("-").isdecimal():
            number, inside = int(words[1]) % depth, words[2:]
        above = depth - 1 - number
        total = self._one.times(above - 1) + self._last if above else Work()
        if not inside:
            return total
        own, rows = (self._one, self._vit.tokens) if above else (self._last, self._rows_of_last)
        if inside[0] == "norm1" or (inside[0] == "attn" and len(inside) > 1):
            return total + own
        behind_mlp = inside[0] in ("mlp", "ls2", "drop_path2") and len(inside) == 1
        return total if behind_mlp else total + linear(rows, self._vit.width, 8 * self._vit.width)
