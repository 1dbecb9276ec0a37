"""Attention followed from block to block: whether an encoder allows it, from where it starts, what reaches a patch."""

from __future__ import annotations

from torch import Tensor

from maehpc.errors import InputError
from maehpc.explain.methods.base import Method, Options, Setup
from maehpc.explain.network import Network
from maehpc.explain.rules import Tape
from maehpc.models import Classifier, grid_size, num_prefix_tokens


class AttentionMethod(Method):
    """A method that multiplies a row vector with one matrix a block, from the representation down to the patches."""

    def __init__(self, setup: Setup, options: Options) -> None:
        super().__init__(setup, options)
        check_attentions(setup.classifier, setup.baseline, self.name)


def check_attentions(classifier: Classifier, image: Tensor, name: str) -> None:
    """Refuses an encoder whose attentions do not follow one another, before any image is explained.

    A chain of attentions is defined where each block has one, over all tokens, beside a residual connection. timm's
    three families of transformers have the latter by construction.

    Args:
        classifier: what is explained; see `Network`, which takes it over.
        image: any input, [1, C, S, S].
        name: of the method that asks.

    Raises:
        InputError: a block has no attention or several, or one of another shape than all tokens by all tokens.
    """
    encoder = classifier.encoder
    height, width = grid_size(encoder)
    tokens = num_prefix_tokens(encoder) + height * width
    blocks = len(getattr(encoder, "blocks", ()))
    tape = Tape(attentions=[])
    Network(classifier, whole=True).run(image.detach().clone().requires_grad_(), tape)
    found = [tuple(seen.weights.shape[2:]) for seen in tape.attentions or ()]
    tape.clear()
    if not found or found != [(tokens, tokens)] * blocks:
        shapes = ", ".join(f"{rows} x {columns}" for rows, columns in sorted(set(found))) or "none"
        raise InputError(
            f"explain.methods: {name} needs one softmax attention of {tokens} x {tokens} tokens in each of the "
            f"encoder's {blocks} blocks, and there are {len(found)} in all ({shapes}); leave {name} out"
        )


def represented(classifier: Classifier, like: Tensor) -> Tensor:
    """How much each token counts in the representation: 1 for the class token, or 1 / patches for each patch.

    Args:
        classifier: what is explained.
        like: attention weights, [B, H, N, N].

    Returns:
        [B, N].
    """
    row = like.new_zeros(like.shape[0], like.shape[-1])
    if classifier.representation == "cls":
        row[:, 0] = 1
    else:
        patches = row[:, num_prefix_tokens(classifier.encoder) :]
        patches += 1 / patches.shape[1]
    return row


def patch_grid(classifier: Classifier, row: Tensor) -> Tensor:
    """The patches' share of a value a token, [B, N], on their grid, [B, h, w]."""
    patches = row[:, num_prefix_tokens(classifier.encoder) :]
    return patches.reshape(-1, *grid_size(classifier.encoder))


def heads_mean(row: Tensor, weights: Tensor) -> Tensor:
    """A row vector times the mean matrix over heads.

    Args:
        row: [B, N].
        weights: [B, H, N, M].

    Returns:
        [B, M].
    """
    by_head = row[:, None, None] @ weights
    return by_head[:, :, 0].mean(dim=1)
