"""Optimizers with their parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from maehpc.recipes import OptimSettings
from maehpc.training.lars import Lars

_TOKENS = ("cls_token", "mask_token", "reg_token", "dist_token", "pos_embed", "relative_position_bias_table")
_STEM = (*_TOKENS, "patch_embed", "norm_pre")


def learning_rate(settings: OptimSettings, peak: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of 0-based optimizer step `step`: linear warm-up from 0, then constant or half a cosine.

    The position is the fractional epoch at the step's start, as in the MAE reference (`util/lr_sched.py`).
    """
    epoch = step / steps_per_epoch
    if epoch < settings.warmup_epochs:
        return peak * epoch / settings.warmup_epochs
    if settings.schedule == "constant":
        return peak
    progress = (epoch - settings.warmup_epochs) / max(epochs - settings.warmup_epochs, 1e-12)
    return settings.min_lr + (peak - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Learning-rate factor of a classifier's parameter by its depth (Clark et al. 2020; BEiT, MAE fine-tuning).

    The stem has depth 0, block i depth i + 1, the rest (final norm, head) the full rate.
    """
    inner = name.removeprefix("encoder.")
    block = re.match(r"blocks\.(\d+)\.", inner)
    if block:
        layer = int(block.group(1)) + 1
    elif inner != name and inner.startswith(_STEM):
        layer = 0
    else:
        layer = depth + 1
    return float(decay ** (depth + 1 - layer))


def parameter_groups(module: nn.Module, settings: OptimSettings, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups of trainable parameters by weight decay and learning-rate factor (`lr_scale`).

    Vectors (biases, norms) are never decayed; tokens and positions only with `decay_tokens`.
    """
    depth = 1 + max(
        (
            int(found.group(1))
            for name, _ in module.named_parameters()
            if (found := re.search(r"\bblocks\.(\d+)\.", name))
        ),
        default=-1,
    )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        token = name.split(".")[-1] in _TOKENS
        decayed = settings.decay_tokens if token else parameter.ndim > 1
        key = (settings.weight_decay if decayed else 0.0, layer_scale(name, depth, layer_decay))
        group = groups.setdefault(key, {"params": [], "weight_decay": key[0], "lr_scale": key[1]})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of the settings; `set_learning_rate` gives it its rate before every step."""
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum)
    if settings.name == "lars":
        return Lars(groups, lr=0.0, momentum=settings.momentum)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=0.0, betas=settings.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate to `rate` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
