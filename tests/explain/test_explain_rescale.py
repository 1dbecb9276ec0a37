import pytest
import torch
from captum.attr._core import deep_lift
from explain_references import captum_deeplift, linear
from torch import nn

from maehpc.explain import rescale


def attribute(head, x, baseline, targets):
    start = nn.functional.one_hot(targets, head[-1].out_features).to(x)
    traces = rescale.trace(head, x), rescale.trace(head, baseline)
    return rescale.multipliers(head, *traces, start)


def mlp(activation, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 7), activation.__class__(), nn.Linear(7, 4)).double()


def test_saturated_unit():
    """f = 1 - ReLU(1 - x) at x = 2 against 0: the gradient is 0, the contribution 1 (Shrikumar et al., figure 1)."""
    one = torch.ones(1, 1)
    head = nn.Sequential(linear(-one, one[0]), nn.ReLU(), linear(-one, one[0]))
    x, baseline = torch.tensor([[2.0]]), torch.tensor([[0.0]])
    assert attribute(head, x, baseline, torch.tensor([0])) * (x - baseline) == 1
    x.requires_grad_()
    assert torch.autograd.grad(head(x).sum(), x)[0] == 0


def test_knows_the_modules_captum_knows():
    assert set(deep_lift.SUPPORTED_NON_LINEAR) == rescale.RULED
    elementwise = {kind for kind, rule in deep_lift.SUPPORTED_NON_LINEAR.items() if rule is deep_lift.nonlinear}
    assert elementwise == rescale.RESCALED


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.GELU, nn.SiLU]
)
def test_equals_captum(activation):
    head = mlp(activation())
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    baseline = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    targets = torch.arange(9) % 4
    ours = attribute(head, x, baseline, targets) * (x - baseline)
    torch.testing.assert_close(ours, captum_deeplift(head, baseline)(x, targets), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_complete(activation):
    head = mlp(activation())
    x, baseline = torch.randn(9, 6).double(), torch.randn(1, 6).double()
    targets = torch.arange(9) % 4
    total = (attribute(head, x, baseline, targets) * (x - baseline)).sum(dim=1)
    change = (head(x) - head(baseline)).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(total, change)


def test_baseline_itself_has_the_gradient():
    head = mlp(nn.ReLU())
    x = torch.randn(4, 6).double().requires_grad_()
    targets = torch.arange(4)
    gradient = torch.autograd.grad(head(x).gather(1, targets[:, None]).sum(), x)[0]
    torch.testing.assert_close(attribute(head, x.detach(), x.detach(), targets), gradient)


def test_names_ruled_modules():
    inside = nn.Sequential(nn.GELU(), nn.Sequential(nn.LayerNorm(3), nn.Softmax(-1)), nn.ReLU6())
    assert list(rescale.ruled_modules(inside)) == ["1.1"]
