"""GradCAM on a vision transformer: one layer's tokens, reshaped to the patch grid (Selvaraju et al. 2017, eq. 1-2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maehpc import keys
from maehpc.errors import InputError
from maehpc.models import grid_size, num_prefix_tokens
from maehpc.recipes import GradCamSettings

_FIX = "set explain.gradcam.layer to blocks.-1.norm1, the tokens that enter the last attention"


def resolve_layer(encoder: nn.Module, layer: str) -> nn.Module:
    """The module a dotted name means; a number picks a child by position, -1 the last.

    Raises:
        InputError: there is no such module.
    """
    module = encoder
    for word in layer.split("."):
        children = dict(module.named_children())
        if word.startswith("-") and word[1:].isdecimal() and 0 < int(word[1:]) <= len(children):
            word = list(children)[int(word)]
        if word not in children:
            known = ", ".join(children) or "nothing"
            raise InputError(
                f"explain.gradcam.layer: the encoder has no module {layer} ('{word}' is none of {known}); {_FIX}"
            )
        module = children[word]
    return module


class GradCam:
    """GradCAM at one layer of one encoder.

    Args:
        encoder: a timm vision transformer.
        settings: layer, sign and upsampling.

    Raises:
        InputError: the encoder has no such layer.
    """

    def __init__(self, encoder: nn.Module, settings: GradCamSettings) -> None:
        self._layer = resolve_layer(encoder, settings.layer)
        self._settings = settings
        self._grid = grid_size(encoder)
        self._prefix = num_prefix_tokens(encoder)

    @contextmanager
    def tap(self) -> Iterator[list[Tensor]]:
        """Gives a list that receives the layer's output each time the encoder runs inside the block."""
        outputs: list[Tensor] = []
        handle = self._layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            yield outputs
        finally:
            handle.remove()

    def check(self, represent: Callable[[Tensor], Tensor], image: Tensor) -> None:
        """Refuses a layer whose patch tokens cannot be weighted, before any image is explained.

        Behind the last attention the patches' gradients are exactly 0 where the CLS token alone is represented. One
        pullback of a random direction of the representation tells that from a head whose units are dead: the latter
        also gives all-zero maps, but as a finding about the classifier.

        Args:
            represent: images to representations, running the encoder.
            image: any input, [1, C, S, S].

        Raises:
            InputError: the layer does not give one row of tokens, or its patches do not reach the representation.
        """
        layer = f"explain.gradcam.layer {self._settings.layer}"
        count = self._grid[0] * self._grid[1]
        with torch.enable_grad(), self.tap() as outputs:
            representation = represent(image.detach().requires_grad_())
        if len(outputs) != 1:
            raise InputError(f"{layer} is run {len(outputs)} times for an image instead of once; {_FIX}")
        (tokens,) = outputs
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] not in (count, count + self._prefix):
            raise InputError(f"{layer} gives {shape}, not tokens of {count} patches [image, token, channel]; {_FIX}")
        direction = torch.randn(representation.shape, generator=keys.generator(0, "gradcam check"))
        (gradient,) = torch.autograd.grad(
            representation, tokens, direction.to(representation), allow_unused=True, materialize_grads=True
        )
        if not self._patches(gradient).any():
            raise InputError(
                f"{layer} lies behind the last attention, so its patches do not reach what is classified; {_FIX}"
            )

    def map(self, tokens: Tensor, gradient: Tensor, size: tuple[int, int]) -> Tensor:
        """The map: patch tokens weighted by the mean gradient over patches, summed over channels.

        Args:
            tokens: the layer's output, [B, N, C].
            gradient: of the explained logit with respect to it, [B, N, C].
            size: height and width of the image, pixels; used where the settings upsample.

        Returns:
            [B, h, w] on the patch grid, or [B, H, W].
        """
        weights = self._patches(gradient).mean(dim=1, keepdim=True)
        result = (weights * self._patches(tokens)).sum(dim=-1).reshape(-1, *self._grid)
        if self._settings.relu:
            result = result.relu()
        if self._settings.upsample == "none":
            return result
        upsampled: Tensor = F.interpolate(result[:, None], size=size, mode=self._settings.upsample)[:, 0]
        return upsampled

    def _patches(self, tokens: Tensor) -> Tensor:
        """[B, h*w, C]: all tokens but the prefix (CLS, registers), which timm puts first."""
        return tokens[:, -self._grid[0] * self._grid[1] :]
