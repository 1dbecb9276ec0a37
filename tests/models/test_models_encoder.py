"""Encoders: what is built, from which draws, and what is refused in one sentence."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from models_tiny import TINY, draw

from maehpc.errors import InputError
from maehpc.models import build_encoder, grid_size, has_class_token, num_prefix_tokens, patch_size, width
from maehpc.models.positions import sincos_positions
from maehpc.recipes import EncoderSettings

# Smallest of each family that timm has: VisionTransformer, distilled, registers, Beit, Eva, attention pooling.
FAMILIES = [
    ("vit_tiny_patch16_224", 32, 1, 192),
    ("deit_tiny_distilled_patch16_224", 32, 2, 192),
    ("vit_wee_patch16_reg1_gap_256", 32, 1, 256),
    ("beit_base_patch16_224", 32, 1, 768),
    ("eva02_tiny_patch14_224", 28, 1, 192),
]


def test_ours_has_maes_make() -> None:
    encoder = build_encoder(TINY, 16, 1)
    assert (width(encoder), len(encoder.blocks), patch_size(encoder), grid_size(encoder)) == (24, 2, 4, (4, 4))
    assert num_prefix_tokens(encoder) == 1
    assert has_class_token(encoder)
    assert {norm.eps for norm in encoder.modules() if isinstance(norm, torch.nn.LayerNorm)} == {1e-6}
    assert all(block.attn.qkv.bias is not None and block.attn.num_heads == 3 for block in encoder.blocks)
    assert torch.equal(encoder.pos_embed, sincos_positions(24, (4, 4)))
    assert not encoder.pos_embed.requires_grad
    assert all(value.requires_grad for name, value in encoder.named_parameters() if name != "pos_embed")
    assert encoder(draw(2, 1, 16, 16)).shape == (2, 24)


@pytest.mark.parametrize(("name", "expected", "patch"), [("vit-tiny", 5.5, 16), ("vit-small", 21.7, 16)])
def test_sizes_are_the_published_ones(name: str, expected: float, patch: int) -> None:
    """Millions of parameters without a head (Dosovitskiy et al. 2021, table 1; Touvron et al. 2021, table 1)."""
    encoder = build_encoder(EncoderSettings(name=name), 224, 3)
    assert sum(value.numel() for value in encoder.parameters()) / 1e6 == pytest.approx(expected, abs=0.05)
    assert patch_size(encoder) == patch


def test_initialisation_is_maes() -> None:
    encoder = build_encoder(EncoderSettings(name="vit-tiny", depth=1), 32, 3)
    qkv = encoder.blocks[0].attn.qkv.weight
    assert qkv.abs().max() <= math.sqrt(6 / sum(qkv.shape))
    assert qkv.var().item() == pytest.approx(2 / sum(qkv.shape), rel=0.02)
    projection = encoder.patch_embed.proj.weight
    fans = 192 + 3 * 16 * 16
    assert projection.abs().max() <= math.sqrt(6 / fans)
    assert projection.var().item() == pytest.approx(2 / fans, rel=0.02)
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not encoder.blocks[0].mlp.fc1.bias.any()


@pytest.mark.parametrize("settings", [TINY, EncoderSettings(name="timm:vit_tiny_patch16_224", weights="scratch")])
def test_weights_depend_on_the_seed_alone(settings: EncoderSettings) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_encoder(settings, 32, 3, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build_encoder(settings, 32, 3, seed=5).state_dict()
    other = build_encoder(settings, 32, 3, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("name", ["vit-tiny", "timm:vit_tiny_patch16_224"])
def test_drop_path_rises_to_the_last_block(name: str) -> None:
    encoder = build_encoder(EncoderSettings(name=name, weights="scratch"), 32, 3, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0.3 * index / 11 for index in range(12)])


@pytest.mark.parametrize(("name", "size", "prefix", "dimension"), FAMILIES)
def test_timm_families(name: str, size: int, prefix: int, dimension: int) -> None:
    encoder = build_encoder(EncoderSettings(name=f"timm:{name}", weights="scratch"), size, 1)
    assert (num_prefix_tokens(encoder), width(encoder), grid_size(encoder)) == (prefix, dimension, (2, 2))
    tokens = encoder.forward_features(draw(2, 1, size, size))
    assert tokens.shape == (2, prefix + 4, dimension)


def test_attention_pooling_head_is_dropped() -> None:
    encoder = build_encoder(EncoderSettings(name="timm:vit_base_patch16_siglip_224", weights="scratch"), 32, 3)
    assert not has_class_token(encoder)
    assert not any("attn_pool" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit-tiny", 30, ["data.image_size", "30", "16", "vit-tiny"]),
        ("timm:vit_tiny_patch16_224", 30, ["data.image_size", "30", "16"]),
        (
            "timm:vit_teny_patch16_224",
            32,
            ["encoder.name", "vit_teny_patch16_224", "did you mean vit_tiny_patch16_224"],
        ),
        ("timm:zzzzzzzz", 32, ["encoder.name", "zzzzzzzz"]),
        ("timm:hf-hub:someone/something", 32, ["encoder.name", "hf-hub"]),
        ("timm:vit_base_patch16_224.mea", 32, ["encoder.name", "vit_base_patch16_224.mae"]),
        ("timm:resnet18", 32, ["encoder.name", "resnet18", "vit_base_patch16_224"]),
        ("timm:swin_tiny_patch4_window7_224", 32, ["encoder.name", "SwinTransformer"]),
    ],
)
def test_refusals_name_the_field(name: str, size: int, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build_encoder(EncoderSettings(name=name, weights="scratch"), size, 3)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence


def test_model_without_pretrained_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"encoder\.weights: timm has no pretrained weights of vit_giant_patch14_224"):
        build_encoder(EncoderSettings(name="timm:vit_giant_patch14_224", weights="timm"), 28, 3)


@pytest.mark.slow
def test_weights_that_cannot_be_fetched_are_one_sentence(tmp_path: object) -> None:
    code = (
        "from maehpc.errors import InputError\n"
        "from maehpc.models import build_encoder\n"
        "from maehpc.recipes import EncoderSettings\n"
        "try:\n"
        "    build_encoder(EncoderSettings(name='timm:vit_tiny_patch16_224', weights='timm'), 32, 3)\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "encoder.weights: timm's weights of vit_tiny_patch16_224 cannot be fetched" in done.stdout
