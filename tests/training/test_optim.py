"""Schedules and parameter groups, held to the reference's formula and to timm's groups."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from maehpc.recipes import OptimSettings
from maehpc.training.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate


def reference_rate(peak: float, low: float, epoch: float, warmup: float, epochs: float) -> float:
    """facebookresearch/mae's half-cosine schedule, written down from its description."""
    if epoch < warmup:
        return peak * epoch / warmup
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


@pytest.mark.parametrize("step", [0, 1, 7, 39, 40, 41, 399, 400, 799])
def test_the_cosine_is_the_references(step: int) -> None:
    settings = OptimSettings(lr=2.0, schedule="cosine", warmup_epochs=4, min_lr=0.1)
    expected = reference_rate(2.0, 0.1, step / 10, 4, 80)
    assert learning_rate(settings, 2.0, step, 10, 80) == pytest.approx(expected, rel=1e-12)


def test_a_constant_rate_is_constant_after_the_warm_up() -> None:
    settings = OptimSettings(lr=0.1, warmup_epochs=1)
    assert [learning_rate(settings, 0.1, step, 4, 5) for step in (0, 2, 4, 19)] == [0.0, 0.05, 0.1, 0.1]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
        self.head = nn.Linear(192, 3)


def test_layer_decay_is_the_references_and_agrees_with_timm_between_blocks() -> None:
    model = Wrapped()
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimSettings(lr=1.0, weight_decay=0.05), 0.65)
    scales = {name_of[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

    # facebookresearch/mae, util/lr_decay.py: the stem is layer 0, the last norm and the head have the full rate
    powers = {"cls_token": 13, "pos_embed": 13, "patch_embed.proj.weight": 13, "norm.bias": 0}
    powers |= {f"blocks.{i}.attn.qkv.weight": 12 - i for i in range(12)}
    for name, power in powers.items():
        assert scales[f"encoder.{name}"] == pytest.approx(0.65**power, rel=1e-12), name
    assert scales["head.weight"] == 1.0

    name_of = {id(parameter): name for name, parameter in model.encoder.named_parameters()}
    timms = param_groups_layer_decay(model.encoder, weight_decay=0.05, layer_decay=0.65)
    theirs = {name_of[id(p)]: group["lr_scale"] for group in timms for p in group["params"]}
    assert theirs.keys() == {name.removeprefix("encoder.") for name in scales if name.startswith("encoder.")}
    first, last = "blocks.0.mlp.fc1.weight", "blocks.11.mlp.fc1.weight"
    assert scales[f"encoder.{first}"] / scales[f"encoder.{last}"] == pytest.approx(theirs[first] / theirs[last])


def test_what_is_decayed() -> None:
    model = Wrapped()
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}

    def decayed(settings: OptimSettings) -> set[str]:
        groups = parameter_groups(model, settings)
        return {name_of[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    plain = decayed(OptimSettings(lr=1.0, weight_decay=0.1))
    assert "encoder.blocks.0.attn.qkv.weight" in plain
    assert not {name for name in plain if name.endswith("bias") or "norm" in name}
    assert "encoder.cls_token" not in plain
    assert decayed(OptimSettings(lr=1.0, weight_decay=0.1, decay_tokens=True)) - plain == {
        "encoder.cls_token",
        "encoder.pos_embed",
    }


def test_frozen_parameters_are_in_no_group() -> None:
    model = Wrapped()
    model.encoder.requires_grad_(False)
    groups = parameter_groups(model, OptimSettings(lr=1.0))
    assert sum(len(group["params"]) for group in groups) == 2


def test_adamw_steps_as_torchs_own() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    settings = OptimSettings(lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    optimizer = build_optimizer(parameter_groups(ours, settings), settings)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    for _ in range(3):
        x = torch.randn(4, 3)
        for model, steps in ((ours, optimizer), (theirs, reference)):
            steps.zero_grad()
            model(x).square().sum().backward()
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
