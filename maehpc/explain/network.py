"""The classifier as it is explained: same weights and values, ruled pullbacks, one layer that is listened to."""

from __future__ import annotations

import threading
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maehpc.explain.last_block import LastBlock, replaced
from maehpc.explain.rules import Ruled, Tape
from maehpc.models import Classifier


class _Tapped(nn.Module):
    """A layer whose outputs are told to the pass that runs."""

    def __init__(self, layer: nn.Module, running: threading.local) -> None:
        super().__init__()
        self.layer = layer
        self._running = running

    def __getattr__(self, name: str) -> Any:
        """The layer's own attributes: some of timm's modules read their children's weights."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The layer's output."""
        output = self.layer(*inputs, **options)
        self._running.tape.tapped.append(output)
        return output


class Network:
    """Runs a classifier under rules. Several threads may use one at the same time.

    The classifier is taken over: evaluation mode, every weight frozen, so that no graph is kept for the weights. It
    keeps its own modules; a network has its own where it needs others.

    Args:
        classifier: whose logits are explained.
        layer: names of the modules from the encoder to the one that is tapped; None for none.
        whole: compute every token of the last block and keep every attention's weights, even where the class token
            alone is represented.
        products: type in which products with weights are computed; the weights' own where None.
    """

    def __init__(
        self,
        classifier: Classifier,
        layer: list[str] | None = None,
        whole: bool = False,
        products: torch.dtype | None = None,
    ) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self._running = threading.local()
        self._products = products
        encoder: nn.Module = classifier.encoder
        if layer is not None:
            tapped = _Tapped(encoder.get_submodule(".".join(layer)), self._running)
            encoder = replaced(encoder, layer, tapped)
        if not whole and classifier.representation == "cls" and isinstance(encoder, VisionTransformer):
            blocks = encoder.blocks
            name = str(len(blocks) - 1)
            if isinstance(blocks, nn.Sequential) and LastBlock.serves(blocks[-1]):
                encoder = replaced(encoder, ["blocks", name], LastBlock(blocks[-1]))
        ruled = replaced(self.classifier, ["encoder"], encoder)
        assert isinstance(ruled, Classifier)
        self._ruled = ruled

    def run(self, x: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """A forward pass, with a graph if the images require a gradient.

        Args:
            x: normalised images [B, C, S, S].
            tape: of the pass.

        Returns:
            Representation [B, D] and logits [B, K].
        """
        self._running.tape = tape
        tape.products = self._products
        with torch.enable_grad(), Ruled(tape):
            representation = self._ruled.represent(x)
            logits: Tensor = self._ruled.head(representation)
        return representation, logits

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, K] of normalised images [B, C, S, S], without a graph."""
        _, logits = self.run(x.detach(), Tape())
        return logits

    def record(self, baseline: Tensor, strict: str | None = None) -> tuple[Tape, Tensor]:
        """A tape with what the ruled functions remember of a baseline, and the baseline's logits [1, K].

        Args:
            baseline: normalised, [1, C, S, S].
            strict: method that needs a rule for everything, if any.

        Raises:
            InputError: (strict) something that is computed from the image has no rule.
        """
        tape = Tape(recording=True, strict=strict)
        _, logits = self.run(baseline.detach().clone().requires_grad_(), tape)
        tape.recording = False
        tape.clear()
        return tape, logits.detach()
