"""Products with weights as oneDNN computes them, held to float64 and to PyTorch's own in every derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maehpc.errors import RunError
from maehpc.explain import explainer
from maehpc.explain.rules import linear as module
from maehpc.explain.rules.linear import linear, unbound

SIZES = st.integers(1, 40)


@given(rows=SIZES, inner=SIZES, width=SIZES, biased=st.booleans(), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_value_and_pullback(rows: int, inner: int, width: int, biased: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, rows, inner, requires_grad=True)
    weight, bias = torch.randn(width, inner), torch.randn(width) if biased else None
    g = torch.randn(2, rows, width)
    y = linear(x, weight, bias)
    (pulled,) = torch.autograd.grad(y, x, g)
    exact = F.linear(x.detach().double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5 * inner)
    torch.testing.assert_close(pulled.double(), g.double() @ weight.double(), rtol=0, atol=1e-5 * width)


def test_weights_may_be_views_and_inputs_transposed() -> None:
    whole = torch.randn(12, 7)
    x = torch.randn(7, 5, 3, requires_grad=True)
    _, weight, _ = whole.chunk(3)
    y = linear(x.transpose(0, 2), weight, None)
    torch.testing.assert_close(y, x.transpose(0, 2) @ weight.T)
    (pulled,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(pulled, weight.sum(0)[:, None, None].expand_as(x))


def test_a_pullback_can_be_differentiated() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4), torch.randn(6)

    def second(product: Callable[..., torch.Tensor]) -> torch.Tensor:
        x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        y = product(x, weight, bias).tanh().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), x)
        return found

    torch.testing.assert_close(second(linear), second(F.linear))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_pytorchs_own(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))


def test_without_onednn_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ONEDNN", None)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))


def test_a_single_vector() -> None:
    x, weight = torch.randn(4), torch.randn(5, 4)
    torch.testing.assert_close(linear(x, weight, None), weight @ x)


def test_nothing_times_something() -> None:
    assert linear(torch.randn(0, 4), torch.randn(5, 4), None).shape == (0, 5)


def test_parts_are_pulled_back_to_where_they_lay() -> None:
    """As a transformer cuts queries, keys and values from one product."""

    def cut(x: torch.Tensor, parts: Callable[..., tuple[torch.Tensor, ...]]) -> torch.Tensor:
        q, k, v = parts(x.view(2, 5, 3, 4).permute(2, 0, 1, 3))
        result: torch.Tensor = (q * k).sum() + v.square().sum()
        return result

    x = torch.linspace(-1, 1, 120).view(2, 5, 12).requires_grad_()
    (wanted,) = torch.autograd.grad(cut(x, torch.unbind), x, create_graph=True)
    (found,) = torch.autograd.grad(cut(x, unbound), x)
    assert torch.equal(found, wanted) and found.is_contiguous()
    (first,) = torch.autograd.grad(cut(x, unbound), x, create_graph=True)
    second = [torch.autograd.grad(each.pow(3).sum(), x)[0] for each in (first, wanted)]
    assert torch.equal(*second)


def test_large_maps_are_finite() -> None:
    """Their sum is not."""
    logits, index = torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.int64)
    explainer._require_finite(logits, {"m": torch.full((1, 1, 4), 3e38)}, index, None)
    for wrong in (torch.inf, torch.nan):
        with pytest.raises(RunError, match="m of image 0 are not finite"):
            explainer._require_finite(logits, {"m": torch.tensor([[[1.0, wrong]]])}, index, None)
