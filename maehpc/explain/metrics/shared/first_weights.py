"""A classifier whose weights are drawn anew, wholly or in parts."""

from __future__ import annotations

import copy
from collections.abc import Collection
from types import MethodType

import torch
from torch import Tensor, nn

from maehpc.models import Classifier, grid_size, num_prefix_tokens
from maehpc.models.initialisation import (
    TOKEN_STD,
    drawing,
    initialise_linear_and_norm,
    initialise_patch_projection,
)
from maehpc.models.positions import sincos_positions

HEAD = "head"
EMBEDDING = "embedding"


def parts(classifier: Classifier) -> tuple[str, ...]:
    """A classifier's layers from the output to the input: the head, each block, the embedding.

    Norms behind the last block belong to the head; tokens, positions and all else before the first block to the
    embedding.
    """
    names = [name for name, _ in classifier.named_parameters()]
    found = {_part(name, _behind_blocks(classifier)): None for name in names}
    blocks = sorted((part for part in found if part not in (HEAD, EMBEDDING)), key=lambda part: -int(part[7:]))
    return tuple(part for part in (HEAD, *blocks, EMBEDDING) if part in found)


def drawn_anew(classifier: Classifier, seed: int) -> dict[str, Tensor]:
    """First weights for every parameter of a classifier, on its device and in its dtype.

    The encoder's layers are drawn by MAE's rules (Xavier-uniform, zero biases, unit norms) and the head's by PyTorch's,
    as this project's own models are; so are those of a timm model, whatever it was first drawn by. Tokens and learned
    positions are normal with a deviation of 0.02. What is not learned stays: fixed sine-cosine positions, and gains
    that a layer has no rule for.

    Args:
        classifier: the trained one; it is not changed.
        seed: of the draws; each module has a stream of its own.

    Returns:
        By name of the parameter.
    """
    # On the CPU, whose draws are the same on every machine.
    fresh = copy.deepcopy(classifier).cpu().float().requires_grad_(False)
    positions = {id(value) for value in fresh.parameters() if _is_fixed(value, fresh)}
    for name, module in fresh.named_modules():
        with drawing(seed, "model randomisation", name):
            _draw(name, module, positions)
    trained = dict(classifier.named_parameters())
    return {name: value.detach().to(trained[name]) for name, value in fresh.named_parameters()}


def randomised(classifier: Classifier, fresh: dict[str, Tensor], chosen: Collection[str]) -> Classifier:
    """A copy with new weights in some parts; all other weights and buffers are shared with the trained classifier.

    Args:
        classifier: the trained one.
        fresh: of `drawn_anew`.
        chosen: of `parts`.
    """
    behind = _behind_blocks(classifier)
    known: dict[int, object] = {id(buffer): buffer for buffer in classifier.buffers()}
    for name, value in classifier.named_parameters():
        new = nn.Parameter(fresh[name], requires_grad=False)
        known[id(value)] = new if _part(name, behind) in chosen else value
    return copy.deepcopy(classifier, known)


def _behind_blocks(classifier: Classifier) -> frozenset[str]:
    """Names of the encoder's modules that come after its blocks."""
    names = [name for name, _ in classifier.encoder.named_children()]
    return frozenset(names[names.index("blocks") + 1 :]) if "blocks" in names else frozenset()


def _part(parameter: str, behind: frozenset[str]) -> str:
    first, *rest = parameter.split(".")
    if first != "encoder" or rest[0] in behind:
        return HEAD
    return f"blocks.{rest[1]}" if rest[0] == "blocks" else EMBEDDING


def _draw(name: str, module: nn.Module, fixed: set[int]) -> None:
    in_head = name.startswith("head")
    if not [*module.parameters(recurse=False)]:
        return
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and not in_head:
        initialise_linear_and_norm(module)
    elif isinstance(module, nn.Conv2d) and not in_head:
        initialise_patch_projection(module)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(reset := getattr(module, "reset_parameters", None), MethodType) and not [*module.children()]:
        reset()
    else:
        for own, value in module.named_parameters(recurse=False):
            if "bias" in own:
                nn.init.zeros_(value)
            elif value.ndim > 1 and id(value) not in fixed:
                nn.init.normal_(value, std=TOKEN_STD)


def _is_fixed(value: Tensor, classifier: Classifier) -> bool:
    """Whether a parameter is MAE's table of sine-cosine positions."""
    encoder = classifier.encoder
    if value is not getattr(encoder, "pos_embed", None) or value.shape[-1] % 4:
        return False
    table = sincos_positions(value.shape[-1], grid_size(encoder), num_prefix_tokens(encoder))
    return table.shape == value.shape and torch.allclose(table, value, atol=1e-4)
