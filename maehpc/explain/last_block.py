"""A vision transformer's last block as far as the class token needs it.

What follows the last block reads the class token alone, so only that token's query, projection and MLP are computed.
Keys and values need not be computed either. With y the normed tokens, k_j = W y_j + b and q the class token's query,

    q k_j = (W^T q) y_j + q b,        sum_j p_j v_j = V (sum_j p_j y_j) + c,

and q b is the same for all j, which softmax does not see. A head's scores and context therefore come from D-vectors and
the tokens as they are: N D operations a head instead of N D^2. The pullbacks of the rules are the same as those of the
whole block, since a bilinear midpoint does not change when a linear map is moved from one factor to the other.
"""

from __future__ import annotations

import copy
from typing import cast

import torch.nn.functional as F
from timm.layers import Attention, GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class LastBlock(nn.Module):
    """Computes the class token of a pre-norm block; shares the block's modules.

    Args:
        block: one for which `serves` holds.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.ls1, self.drop_path1 = block.norm1, block.ls1, block.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2
        self.attn = cast(Attention, block.attn)

    @staticmethod
    def serves(block: nn.Module) -> bool:
        """Whether a block is one of timm's own: tokens apart in its MLP, nothing between query, key and product."""
        if type(block) is not Block or type(block.attn) is not Attention:
            return False
        attention = cast(Attention, block.attn)
        if type(attention.qkv) is not nn.Linear or type(block.mlp) not in (Mlp, GluMlp, SwiGLU):
            return False
        between = (attention.q_norm, attention.k_norm)
        scales = all(type(scale) in (LayerScale, nn.Identity) for scale in (block.ls1, block.ls2))
        return scales and attention.gate is None and all(type(module) is nn.Identity for module in between)

    def forward(self, x: Tensor) -> Tensor:
        """The block's class token, [B, 1, D], of all tokens [B, N, D]."""
        class_token = x[:, :1] + self.drop_path1(self.ls1(self._attended(self.norm1(x))))
        result: Tensor = class_token + self.drop_path2(self.ls2(self.mlp(self.norm2(class_token))))
        return result

    def _attended(self, y: Tensor) -> Tensor:
        attention = self.attn
        rows, width = len(y), y.shape[-1]
        heads, size = attention.num_heads, attention.head_dim
        to_q, to_k, to_v = attention.qkv.weight.chunk(3)
        b_q, _, b_v = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        q = F.linear(y[:, 0], to_q, b_q).reshape(rows, heads, 1, size)
        absorbed = q @ to_k.reshape(heads, size, width)  # [B, heads, 1, D]
        # The heads are the queries of one attention, whose keys and values are the tokens.
        context = F.scaled_dot_product_attention(
            absorbed.transpose(1, 2), y[:, None], y[:, None], scale=attention.scale
        ).transpose(1, 2)
        out = context @ to_v.reshape(heads, size, width).transpose(1, 2)  # [B, heads, 1, size]
        out = out.reshape(rows, 1, heads * size)
        if b_v is not None:
            out = out + b_v
        result: Tensor = attention.proj_drop(attention.proj(attention.norm(out)))
        return result


def replaced(module: nn.Module, path: list[str], new: nn.Module) -> nn.Module:
    """A copy of `module` in which the child at `path` is another one; all else, weights included, is shared.

    Args:
        module: left as it is.
        path: names of children, from the outermost on; at least one.
        new: takes the child's place.
    """
    result = copy.copy(module)
    result._modules = dict(module._modules)
    child = module._modules[path[0]]
    assert child is not None
    result._modules[path[0]] = replaced(child, path[1:], new) if len(path) > 1 else new
    return result
