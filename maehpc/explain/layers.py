"""The layer that class activation maps look at: from its name to a module, and whether it can serve."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maehpc import keys
from maehpc.errors import InputError
from maehpc.explain.network import Network
from maehpc.explain.rules import Tape
from maehpc.models import grid_size, num_prefix_tokens

_FIX = "set explain.gradcam.layer to blocks.-1.norm1, the tokens that enter the last attention"


def layer_path(encoder: nn.Module, layer: str) -> list[str]:
    """Names of the modules from the encoder to the one a dotted name means; a number is a position, -1 the last.

    Raises:
        InputError: there is no such module.
    """
    module, path = encoder, []
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
        path.append(word)
    return path


def patch_tokens(encoder: nn.Module, tokens: Tensor) -> Tensor:
    """[B, h*w, D]: all tokens but the prefix (CLS, registers), which timm puts first."""
    height, width = grid_size(encoder)
    return tokens[:, -height * width :]


def check_layer(network: Network, layer: str, image: Tensor) -> None:
    """Refuses a tapped layer whose patch tokens cannot be weighted, before any image is explained.

    Behind the last attention the patches' gradients are exactly 0 where the CLS token alone is represented. One
    pullback of a random direction of the representation tells that from a head whose units are dead: the latter
    also gives all-zero maps, but as a finding about the classifier.

    Args:
        network: tapped at that layer.
        layer: its name, as the recipe has it.
        image: any input, [1, C, S, S].

    Raises:
        InputError: the layer does not give one row of tokens, or its patches do not reach the representation.
    """
    named = f"explain.gradcam.layer {layer}"
    encoder = network.classifier.encoder
    height, width = grid_size(encoder)
    count, prefix = height * width, num_prefix_tokens(encoder)
    tape = Tape()
    representation, _ = network.run(image.detach().clone().requires_grad_(), tape)
    if len(tape.tapped) != 1:
        raise InputError(f"{named} is run {len(tape.tapped)} times for an image instead of once; {_FIX}")
    (tokens,) = tape.tapped
    shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] not in (1, count, count + prefix):
        raise InputError(f"{named} gives {shape}, not tokens of {count} patches [image, token, channel]; {_FIX}")
    direction = torch.randn(representation.shape, generator=keys.generator(0, "gradcam check"))
    (gradient,) = torch.autograd.grad(
        representation, tokens, direction.to(representation), allow_unused=True, materialize_grads=True
    )
    tape.clear()
    behind = tokens.shape[1] < count  # the last block gives the class token alone
    if behind or not patch_tokens(encoder, gradient).any():
        raise InputError(
            f"{named} lies behind the last attention, so its patches do not reach what is classified; {_FIX}"
        )
