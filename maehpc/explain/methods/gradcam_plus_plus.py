"""GradCAM++ on a vision transformer: GradCAM whose positive gradients are weighted patch by patch."""

from __future__ import annotations

from torch import Tensor

from maehpc.explain.methods.gradcam import GradCam


class GradCamPlusPlus(GradCam):
    """Patch tokens weighted by w = sum(a g+), summed over channels.

    With g = df/dA at the tokens A, and exp(f) for the class score of the paper,

        a = g^2 / (2 g^2 + sum(A) g^3) = 1 / (2 + sum(A) g),    w = sum over patches of a max(g, 0)

    The factor exp(f) of w is the same for all channels and patches and is left out. The paper's A come from a ReLU, so
    that its a lie in [0, 1/2]. Tokens have both signs: where sum(A) g comes near -2, a grows without bounds. That is
    the method's own weakness here, and it is left visible.
    """

    title = "GradCAM++"
    source = "Chattopadhay et al. 2018, section 3, with an exponential class score"
    kind = "grid"
    signed = True
    differentiable = True
    needs = frozenset({"layer"})

    def weights(self, tokens: Tensor, gradient: Tensor) -> Tensor:
        """A weight a channel, [B, 1, D], of patch tokens and their gradients [B, h*w, D]."""
        positive = gradient.relu()
        # a is wanted where the gradient is positive alone; elsewhere this one is 1/2 instead of perhaps infinite.
        alpha = 1 / (2 + tokens.sum(dim=1, keepdim=True) * positive)
        return (alpha * positive).sum(dim=1, keepdim=True)
