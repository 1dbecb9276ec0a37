"""One forward pass of a batch, and everything that is pulled back through it: the methods' common material.

Whatever two methods need is computed once. The gradients at the image and at the tapped layer come from one pullback,
of which the layer's is a stage on the way; other rules are further pullbacks through the same graph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from maehpc.explain.rules import Rule, Tape
from maehpc.explain.rules.tape import AttentionSeen

if TYPE_CHECKING:
    from maehpc.explain.network import Network

Need = Literal["gradient", "layer", "deeplift", "deeplift-captum", "attnlrp", "attention"]
"""What a method takes from a pass: the gradient at the image; tokens of the tapped layer and the gradient there; the
multipliers of exact DeepLIFT, or of captum's; the modified gradient of AttnLRP; every attention and its gradient."""


class References:
    """What DeepLIFT needs of the baseline, computed once.

    Attributes:
        image: the baseline, normalised, [1, C, S, S].
        tape: of the network's pass over it.
        logits: [1, K].

    Args:
        network: to run.
        image: see there.
        strict: method that needs a rule for everything, if any.

    Raises:
        InputError: (strict) something that the classifier computes from the image has no rule.
    """

    def __init__(self, network: Network, image: Tensor, strict: str | None = None) -> None:
        self.image = image
        self.tape, self.logits = network.record(image, strict)


class Pass:
    """A batch run forwards once; pullbacks are computed when they are asked for, and kept.

    Args:
        network: what is run.
        x: normalised images [B, C, S, S].
        targets: classes to explain, int64 [B]. Where None, the prediction for the first of every `rows` images is
            explained in all of them.
        rows: images that share a target, one after another; B is a multiple of it.
        references: of the baseline; needed for DeepLIFT.
        needs: all that will be asked for.
        differentiable: keep a graph from the results to `x`, which must then require a gradient.
    """

    def __init__(
        self,
        network: Network,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        rows: int = 1,
        references: References | None = None,
        needs: Collection[Need] = (),
        differentiable: bool = False,
    ) -> None:
        self.network = network
        self.references = references
        self._needs = frozenset(needs)
        self._differentiable = differentiable
        # Methods that look at other images alone (occlusion, say) need no graph of this one.
        self.x = x if differentiable else x.detach().requires_grad_(bool(self._needs))
        lifts = references is not None and self._needs & {"deeplift", "deeplift-captum"}
        self._tape = Tape(
            baseline=references.tape.baseline if references is not None and lifts else [],
            keeps_scores="deeplift" in self._needs,
            shares_slopes="deeplift-captum" in self._needs and len(self._needs) > 1,
            attentions=[] if "attention" in self._needs else None,
        )
        self._representation, self._logits = network.run(self.x, self._tape)
        if targets is None:
            targets = self._logits[::rows].argmax(dim=1).repeat_interleave(rows)
        self.targets = targets
        with torch.enable_grad():
            self._scores = self._logits.gather(1, targets[:, None])[:, 0]
        self._gradients: dict[str, Tensor] | None = None
        self._attentions: list[AttentionSeen] = []
        self._pulled: dict[str, Tensor] = {}
        self._left = len(self._needs - {"layer", "attention", "gradient"}) + bool(
            self._needs & {"layer", "attention", "gradient"}
        )

    @property
    def logits(self) -> Tensor:
        """[B, K]."""
        return self._logits if self._differentiable else self._logits.detach()

    @property
    def scores(self) -> Tensor:
        """The explained logit of each image, [B]."""
        return self._scores if self._differentiable else self._scores.detach()

    def gradient(self) -> Tensor:
        """d score / d x, [B, C, S, S]."""
        return self._by_gradient()["image"]

    def layer(self) -> tuple[Tensor, Tensor]:
        """Tokens of the tapped layer and d score / d tokens, both [B, N, D]."""
        tokens = self._tape.tapped[0]
        return tokens if self._differentiable else tokens.detach(), self._by_gradient()["layer"]

    def attentions(self) -> Sequence[AttentionSeen]:
        """Weights of every attention from the first block on, and d score / d weights."""
        assert "attention" in self._needs, "the pass was not told that attentions are needed"
        self._by_gradient()
        return self._attentions

    def modified_gradient(self, rule: Rule) -> Tensor:
        """What comes of pulling 1 at the explained logit back to the image by a rule, [B, C, S, S]."""
        if rule not in self._pulled:
            one = torch.ones_like(self._scores)
            self._pulled[rule] = self._pull(self._scores, self.x, one, rule, keep=self._keep())
        return self._pulled[rule]

    def captum_multipliers(self) -> Tensor:
        """Multipliers of captum's DeepLIFT: the rescale rule in the head, the gradient in the encoder.

        captum has a rule for no module of a ViT's encoder; `captum_rules` tells where it has.

        Returns:
            [B, C, S, S].
        """
        if "captum" not in self._pulled:
            one = torch.ones_like(self._scores)
            head = self._pull(self._scores, self._representation, one, "captum", keep=True)
            self._pulled["captum"] = self._pull(self._representation, self.x, head, "gradient", keep=self._keep())
        return self._pulled["captum"]

    def again(self, x: Tensor, needs: Collection[Need]) -> Pass:
        """Another pass for as many images with the same targets: for methods that look at several inputs.

        Args:
            x: normalised images [B, C, S, S]; of a differentiable pass, computed from its `x`.
            needs: what will be asked of the new pass.
        """
        return Pass(
            self.network,
            x,
            self.targets,
            references=self.references,
            needs=needs,
            differentiable=self._differentiable,
        )

    def scores_of(self, x: Tensor) -> Tensor:
        """The explained logits of other images with the same targets, [B], without a graph."""
        return self.network.logits(x).gather(1, self.targets[:, None])[:, 0]

    def close(self) -> None:
        """Lets go of the graph; logits and targets stay."""
        self._tape.clear()
        self._logits, self._scores = self._logits.detach(), self._scores.detach()
        self._representation = self._representation.detach()
        self._gradients, self._attentions, self._pulled = None, [], {}

    def _by_gradient(self) -> dict[str, Tensor]:
        if self._gradients is None:
            points = {"image": self.x} if self._needs & {"gradient", "attention"} else {}
            if "layer" in self._needs:
                (points["layer"],) = self._tape.tapped
            gradients = torch.autograd.grad(
                self._scores,
                list(points.values()),
                torch.ones_like(self._scores),
                retain_graph=self._keep(),
                create_graph=self._differentiable,
            )
            self._gradients = dict(zip(points, gradients, strict=True))
            # Copied, since pullbacks by other rules pass through the same attentions.
            self._attentions = [replace(seen) for seen in self._tape.attentions or ()]
        return self._gradients

    def _pull(self, outputs: Tensor, inputs: Tensor, weights: Tensor, rule: Rule, keep: bool) -> Tensor:
        self._tape.rule = rule
        try:
            (result,) = torch.autograd.grad(
                outputs, inputs, weights, retain_graph=keep, create_graph=self._differentiable
            )
        finally:
            self._tape.rule = "gradient"  # by which a differentiable result is itself differentiated
        return result

    def _keep(self) -> bool:
        """Whether the graph is still needed after the next pullback; the last one frees it on its way."""
        self._left -= 1
        return self._left > 0 or self._differentiable
