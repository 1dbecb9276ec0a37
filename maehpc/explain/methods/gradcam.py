"""GradCAM on a vision transformer: one layer's tokens, reshaped to the patch grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from maehpc.explain.layers import patch_tokens
from maehpc.explain.methods.base import MapKind, Method
from maehpc.explain.passes import Pass
from maehpc.models import grid_size


class GradCam(Method):
    """Patch tokens weighted by their mean gradient over patches, summed over channels."""

    title = "GradCAM"
    source = "Selvaraju et al. 2017, equations 1 and 2"
    kind = "grid"
    differentiable = True
    needs = frozenset({"layer"})

    @property
    def map_kind(self) -> MapKind:
        """On the patch grid, or a plane where the settings upsample."""
        return "grid" if self.setup.settings.gradcam.upsample == "none" else "plane"

    def attribute(self, seen: Pass) -> Tensor:
        """[B, h, w] on the patch grid, or [B, S, S]."""
        tokens, gradient = (patch_tokens(self.setup.classifier.encoder, value) for value in seen.layer())
        return self.on_grid((self.weights(tokens, gradient) * tokens).sum(dim=-1), seen)

    def weights(self, tokens: Tensor, gradient: Tensor) -> Tensor:
        """A weight a channel, [B, 1, D], of patch tokens and their gradients [B, h*w, D]."""
        return gradient.mean(dim=1, keepdim=True)

    def on_grid(self, values: Tensor, seen: Pass) -> Tensor:
        """A value a patch, [B, h*w], as the settings want it: positive part alone, upsampled."""
        settings = self.setup.settings.gradcam
        result = values.reshape(-1, *grid_size(self.setup.classifier.encoder))
        if settings.relu:
            result = result.relu()
        if settings.upsample == "none":
            return result
        upsampled: Tensor = F.interpolate(result[:, None], size=seen.x.shape[2:], mode=settings.upsample)[:, 0]
        return upsampled
