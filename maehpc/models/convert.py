"""Names of tensors: ours, and those of the published checkpoints. Pure functions from dictionary to dictionary.

Ours are those of a `MaskedAutoencoder`: `encoder.` and timm's names, `decoder.` and the `Decoder`'s. Known besides:

- flat: Meta's checkpoints and timm's (`cls_token`, `blocks.0.attn.qkv.weight`, `decoder_blocks.0…`, `mask_token`);
- transformers' ViTMAE, with or without its decoder, in the names of the published files (`vit.encoder.layer.0…`) and
  in those of the module since version 5 (`vit.layers.0…`). It keeps queries, keys and values apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

HEADS = ("head.", "head_dist.")
"""Prefixes of classifier heads, which belong to no encoder."""

WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")
"""What `torch.compile` and DistributedDataParallel put before every name."""

FLAT_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_embed": "decoder.embed",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "decoder.pred",
}
"""First word of a flat name of the decoder, and ours."""

TRANSFORMERS_STEM = {
    "encoder.cls_token": "vit.embeddings.cls_token",
    "encoder.pos_embed": "vit.embeddings.position_embeddings",
    "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "encoder.norm": "vit.layernorm",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.pos_embed": "decoder.decoder_pos_embed",
    "decoder.embed": "decoder.decoder_embed",
    "decoder.norm": "decoder.decoder_norm",
    "decoder.pred": "decoder.decoder_pred",
}
"""Ours, and transformers' name of what stands outside the blocks."""

TRANSFORMERS_BLOCKS = {
    "encoder.blocks": ("vit.encoder.layer", "vit.layers"),
    "decoder.blocks": ("decoder.decoder_layers", "decoder.decoder_encoder.layer"),
}
"""Ours, and transformers' names of the two stacks of blocks; the first is that of the published files."""

TRANSFORMERS_PARTS = {
    "norm1": ("layernorm_before",),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
"""Ours, and transformers' names of the parts of a block; the first is that of the published files."""

_STEM_TO_OURS = {theirs: ours for ours, theirs in TRANSFORMERS_STEM.items()}
_BLOCKS_TO_OURS = {theirs: ours for ours, names in TRANSFORMERS_BLOCKS.items() for theirs in names}
_PARTS_TO_OURS = {theirs: ours for ours, names in TRANSFORMERS_PARTS.items() for theirs in names}

_PARAMETER = re.compile(r"^(.+?)(\.weight|\.bias)?$")
_BLOCK = re.compile(r"^(.+?)\.(\d+)\.(.+)$")


def to_ours(state: Mapping[str, Tensor]) -> State:
    """A state of any known naming in ours. Names that no naming knows are kept as they are."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if any(name.removeprefix("vit.").startswith("embeddings.") for name in state):
        return from_transformers(state)
    if any(name.startswith("encoder.") for name in state):
        return state
    return from_flat(state)


def from_flat(state: Mapping[str, Tensor]) -> State:
    """Meta's or timm's names in ours. A classifier head keeps its name."""
    return {_flat_to_ours(name): tensor for name, tensor in state.items()}


def _flat_to_ours(name: str) -> str:
    if name.startswith(HEADS):
        return name
    word, dot, rest = name.partition(".")
    return FLAT_DECODER[word] + dot + rest if word in FLAT_DECODER else f"encoder.{name}"


def encoder_part(state: Mapping[str, Tensor]) -> State:
    """The encoder's tensors of a state in our naming, by timm's names. Unknown names stay, to be refused later."""
    return {
        name.removeprefix("encoder."): tensor
        for name, tensor in state.items()
        if not name.startswith(("decoder.", *HEADS))
    }


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """Transformers' ViTMAE names in ours, q, k and v of each block joined in this order."""
    return _joined({_transformers_to_ours(name): tensor for name, tensor in state.items()})


def _transformers_to_ours(name: str) -> str:
    if name.startswith("classifier."):
        return name.replace("classifier.", "head.", 1)
    full = name if name.startswith(("vit.", "decoder.")) else f"vit.{name}"
    module, leaf = _split(full)
    if module in _STEM_TO_OURS:
        return _STEM_TO_OURS[module] + leaf
    for theirs, ours in _BLOCKS_TO_OURS.items():
        if module.startswith(f"{theirs}."):
            index, _, part = module.removeprefix(f"{theirs}.").partition(".")
            if part in _PARTS_TO_OURS:
                return f"{ours}.{index}.{_PARTS_TO_OURS[part]}{leaf}"
    return name


def _joined(state: State) -> State:
    """Replaces `attn.q`, `attn.k`, `attn.v` of a block by timm's `attn.qkv`; an incomplete triple stays as it is."""
    result: State = {}
    for name, tensor in state.items():
        module, leaf = _split(name)
        stem, _, last = module.rpartition(".")
        triple = [f"{stem}.{letter}{leaf}" for letter in "qkv"]
        if last not in ("q", "k", "v") or not all(key in state for key in triple):
            result[name] = tensor
        elif last == "q":
            result[f"{stem}.qkv{leaf}"] = torch.cat([state[key] for key in triple])
    return result


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """Our state in the names of transformers' published files, which its `from_pretrained` reads in every version.

    A classifier head is left out.

    Raises:
        KeyError: a tensor that ViTMAE has no place for, such as a register token's.
    """
    result: State = {}
    for name, tensor in state.items():
        if name.startswith(HEADS):
            continue
        module, leaf = _split(name)
        if module in TRANSFORMERS_STEM:
            result[TRANSFORMERS_STEM[module] + leaf] = tensor
            continue
        block = _BLOCK.match(module)
        if block is None:
            raise KeyError(name)
        stack, index, part = block.groups()
        prefix = f"{TRANSFORMERS_BLOCKS[stack][0]}.{index}."
        if part == "attn.qkv":
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[prefix + TRANSFORMERS_PARTS[f"attn.{letter}"][0] + leaf] = piece.clone()
        else:
            result[prefix + TRANSFORMERS_PARTS[part][0] + leaf] = tensor
    return result


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as its module and `.weight`, `.bias` or nothing."""
    match = _PARAMETER.match(name)
    assert match is not None, name
    return match[1], match[2] or ""
