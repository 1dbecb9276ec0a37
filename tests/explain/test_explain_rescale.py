"""captum's DeepLIFT: which modules it rescales, and that our pullback in a head equals it."""

import pytest
import torch
from captum.attr._core import deep_lift
from explain_references import ToyEncoder, captum_deeplift, explain_settings, linear
from torch import nn

from maehpc.explain import captum_rules
from maehpc.explain.engine import Engine
from maehpc.models import Classifier


def classifier_of(head, width):
    """The head on the flattened image, [B, 1, 1, width]."""
    return Classifier(ToyEncoder(lambda x: x.flatten(1)[:, None], (1, 1), width), head, "mean")


def attribute(head, x, baseline, targets, method="deeplift-captum"):
    shape = (-1, 1, 1, x.shape[1])
    engine = Engine(classifier_of(head, x.shape[1]), explain_settings(method), baseline.reshape(shape))
    return engine.attribute(x.reshape(shape), targets).maps[method].flatten(1)


def mlp(activation, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 7), activation.__class__(), nn.Linear(7, 4)).double()


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("method", ["deeplift", "deeplift-captum"])
def test_saturated_unit(method):
    """f = 1 - ReLU(1 - x) at x = 2 against 0: the gradient is 0, the contribution 1 (Shrikumar et al., figure 1)."""
    one = torch.ones(1, 1)
    head = nn.Sequential(linear(-one, one[0]), nn.ReLU(), linear(-one, one[0]))
    x, baseline = torch.tensor([[2.0]]), torch.tensor([[0.0]])
    assert attribute(head, x, baseline, torch.tensor([0]), method) == 1
    assert attribute(head, x, baseline, torch.tensor([0]), "saliency") == 0


def test_knows_the_modules_captum_knows():
    assert set(deep_lift.SUPPORTED_NON_LINEAR) == captum_rules.RULED
    elementwise = {kind for kind, rule in deep_lift.SUPPORTED_NON_LINEAR.items() if rule is deep_lift.nonlinear}
    assert elementwise == captum_rules.RESCALED


ACTIVATIONS = [nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.GELU, nn.SiLU])
def test_equals_captum(activation):
    """The last two are none of captum's and keep the gradient."""
    head = mlp(activation())
    x, baseline, targets = normal(9, 6, seed=3), normal(1, 6, seed=4), torch.arange(9) % 4
    ours = attribute(head, x, baseline, targets)
    torch.testing.assert_close(ours, captum_deeplift(head, baseline)(x, targets), rtol=1e-12, atol=1e-14)


def test_equals_captum_in_a_head_of_both_kinds():
    head = mlp(nn.ReLU())
    head[1] = nn.GELU()
    x, baseline, targets = normal(9, 6, seed=3), normal(1, 6, seed=4), torch.arange(9) % 4
    ours = attribute(head, x, baseline, targets)
    torch.testing.assert_close(ours, captum_deeplift(head, baseline)(x, targets), rtol=1e-12, atol=1e-14)
    assert (ours - attribute(head, x, baseline, targets, "deeplift")).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["deeplift", "deeplift-captum"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_complete(activation, method):
    head = mlp(activation())
    x, baseline, targets = normal(9, 6, seed=5), normal(1, 6, seed=6), torch.arange(9) % 4
    total = attribute(head, x, baseline, targets, method).sum(dim=1)
    change = (head(x) - head(baseline)).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(total, change.detach())


@pytest.mark.parametrize("method", ["deeplift", "deeplift-captum"])
def test_baseline_itself_has_the_gradient(method):
    """x differs from the baseline by far less than the bound below which the gradient stands in."""
    head, x = mlp(nn.ReLU()), normal(1, 6, seed=7)
    near = x + 1e-12 * normal(4, 6, seed=8)
    targets = torch.arange(4)
    point = near.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(point).gather(1, targets[:, None]).sum(), point)
    torch.testing.assert_close(attribute(head, near, x, targets, method), gradient * (near - x), rtol=1e-9, atol=0)


def test_names_ruled_modules():
    inside = nn.Sequential(nn.GELU(), nn.Sequential(nn.LayerNorm(3), nn.Softmax(-1)), nn.ReLU6())
    assert list(captum_rules.ruled_modules(inside)) == ["1.1"]
