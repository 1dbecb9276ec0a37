"""LARS, held to the MAE reference's rule written out in plain numbers, and to closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from maehpc.recipes import OptimSettings, ProbeSettings
from maehpc.training.checkpoints import optimizer_tensors, restore_optimizer
from maehpc.training.lars import TRUST, Lars
from maehpc.training.optim import build_optimizer, parameter_groups, set_learning_rate

Array = NDArray[np.float64]


def reference_step(
    weights: list[Array], gradients: list[Array], velocities: list[Array], rate: float, momentum: float, decay: float
) -> None:
    """One step as facebookresearch/mae describes it (`util/lars.py`), a tensor at a time, norms by loops."""
    for weight, gradient, velocity in zip(weights, gradients, velocities, strict=True):
        step = gradient.copy()
        if weight.ndim > 1:
            step += decay * weight
            norm = math.sqrt(sum(float(value) ** 2 for value in weight.flat))
            size = math.sqrt(sum(float(value) ** 2 for value in step.flat))
            if norm > 0 and size > 0:
                step *= 0.001 * norm / size
        velocity *= momentum
        velocity += step
        weight -= rate * velocity


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_are_the_references(decay: float) -> None:
    draw = np.random.default_rng(0)
    shapes = [(4, 3), (4,), (2, 3, 2), (3, 2), ()]
    expected = [draw.normal(size=shape) for shape in shapes]
    expected[3] = np.zeros((3, 2))  # begins at 0: its first step is not scaled
    ours = [nn.Parameter(torch.tensor(weight, dtype=torch.float64)) for weight in expected]
    velocities = [np.zeros(shape) for shape in shapes]
    optimizer = Lars(ours, lr=0.0, momentum=0.9, weight_decay=decay)
    for step in range(7):
        gradients = [draw.normal(size=shape) for shape in shapes]
        if step == 2:
            gradients[0] = np.zeros((4, 3))
        rate = 3.0 / (1 + step)
        for weight, gradient in zip(ours, gradients, strict=True):
            weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        reference_step(expected, gradients, velocities, rate, 0.9, decay)
        for weight, wanted in zip(ours, expected, strict=True):
            np.testing.assert_allclose(weight.detach().numpy(), wanted, rtol=1e-12, atol=1e-14)


def test_a_matrix_moves_by_its_share_whatever_the_gradients_size() -> None:
    for size in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.ones(3, 3))
        weight.grad = torch.full((3, 3), size)
        Lars([weight], lr=2.0, momentum=0.0).step()
        torch.testing.assert_close(weight.detach(), torch.full((3, 3), 1 - 2 * TRUST))


def test_a_vector_moves_as_under_plain_descent() -> None:
    bias, other = (nn.Parameter(torch.arange(4.0)) for _ in range(2))
    plain = torch.optim.SGD([other], lr=0.5, momentum=0.9)
    ours = Lars([bias], lr=0.5, momentum=0.9, weight_decay=0.7)  # vectors are never decayed
    for step in range(3):
        bias.grad, other.grad = (torch.full((4,), step + 0.25) for _ in range(2))
        plain.step()
        ours.step()
    torch.testing.assert_close(bias, other)


def test_a_parameter_without_a_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    Lars([weight], lr=1.0, momentum=0.9, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_a_closure_computes_the_gradients_and_its_loss_comes_back() -> None:
    weight = nn.Parameter(torch.full((2,), 3.0))
    optimizer = Lars([weight], lr=0.5, momentum=0.0)

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 18.0
    torch.testing.assert_close(weight.detach(), torch.zeros(2))


def test_the_recipes_optimizer_resumes_bit_for_bit() -> None:
    settings = ProbeSettings().optim
    assert settings.name == "lars"

    def steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            optimizer.zero_grad()
            layer(torch.randn(8, 5, generator=draw)).square().mean().backward()
            set_learning_rate(optimizer, 6.4)
            optimizer.step()

    def begun() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        return layer, build_optimizer(parameter_groups(layer, settings), settings)

    whole, whole_optimizer = begun()
    steps(whole, whole_optimizer, range(6))
    first, first_optimizer = begun()
    steps(first, first_optimizer, range(3))
    second, second_optimizer = begun()
    second.load_state_dict(first.state_dict())
    restore_optimizer(second_optimizer, optimizer_tensors(first_optimizer))
    steps(second, second_optimizer, range(3, 6))
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)
    assert not torch.equal(second.weight, first.weight)


def test_decay_of_the_settings_reaches_matrices_alone() -> None:
    layer = nn.Linear(3, 2)
    settings = OptimSettings(name="lars", lr=1.0, weight_decay=0.1, momentum=0.8)
    optimizer = build_optimizer(parameter_groups(layer, settings), settings)
    assert isinstance(optimizer, Lars)
    decays = {
        id(p): (group["weight_decay"], group["momentum"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert decays == {id(layer.weight): (0.1, 0.8), id(layer.bias): (0.0, 0.8)}
