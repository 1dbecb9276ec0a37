"""DeepLIFT as captum 0.9 computes it for a vision transformer with an adapter: the course report's variant.

captum knows rules for the adapter's ReLU alone. Inside the encoder it falls back to the gradient, so that the map does
not sum to the change of the logit; its completeness error is stored beside it.
"""

from __future__ import annotations

from torch import Tensor

from maehpc.errors import InputError
from maehpc.explain import captum_rules
from maehpc.explain.methods.base import Method, Options, Setup
from maehpc.explain.passes import Pass


class DeepLiftCaptum(Method):
    """m (x - b): multipliers by the rescale rule in the head, the gradient in the encoder."""

    title = "DeepLIFT (captum)"
    source = "Shrikumar et al. 2017, section 3.5.1, as captum 0.9 applies it"
    complete = True
    differentiable = True
    needs = frozenset({"deeplift-captum"})

    def __init__(self, setup: Setup, options: Options) -> None:
        super().__init__(setup, options)
        ruled = next(captum_rules.ruled_modules(setup.classifier.encoder), None)
        if ruled is not None:
            raise InputError(
                f"explain.methods: {self.name} does not serve this encoder, for whose module {ruled} captum has a "
                f"rule of its own; leave {self.name} out"
            )
        for module in setup.classifier.head.modules():
            if type(module) in captum_rules.RULED - captum_rules.RESCALED:
                raise InputError(
                    f"explain.methods: {self.name} does not serve this head, since captum's rule for "
                    f"{type(module).__name__} mixes the images of a batch; leave {self.name} out"
                )

    def attribute(self, seen: Pass) -> Tensor:
        """[B, C, S, S], signed."""
        return seen.captum_multipliers() * (seen.x - self.setup.baseline)
