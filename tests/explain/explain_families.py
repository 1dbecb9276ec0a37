"""timm's families of vision transformers, small: what sets them apart, with weights that are far from linear."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maehpc.models import Adapter, Classifier
from maehpc.recipes import AdapterSettings

SIDE = 12
_SHAPE = {"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}

FAMILIES = {
    # rotary positions, no bias of keys, SwiGLU with a norm inside
    "eva": partial(Eva, **_SHAPE, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, mlp_ratio=2),
    # relative position biases on the scores, layer scale
    "beit": partial(Beit, **_SHAPE, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.5, global_pool="avg"),
    # registers behind the class token, layer scale, SwiGLU
    "registers": partial(
        VisionTransformer, **_SHAPE, reg_tokens=4, init_values=0.5, mlp_layer=SwiGLUPacked, global_pool="token"
    ),
    # no class token, a norm of the pooled tokens, norms of queries and keys
    "pooled": partial(VisionTransformer, **_SHAPE, class_token=False, qk_norm=True, global_pool="avg"),
}

CASES = [(name, form) for name in FAMILIES for form in ("cls", "mean") if (name, form) != ("pooled", "cls")]
"""Name and representation."""


def family(name: str, representation: str) -> Classifier:
    """A classifier of 5 classes of images of 12 pixels a side, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    classifier = Classifier(FAMILIES[name](), Adapter(32, 5, AdapterSettings(layers=2, hidden=16)), representation)
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.ndim > 1:
                scale = 0.5 / max(parameter[0].numel(), 9) ** 0.25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert isinstance(classifier.encoder.fc_norm, nn.Module)
    return classifier.eval()
