"""A method looks as its class says of itself, and a new one needs no line here."""

from __future__ import annotations

import pytest

from maehpc.explain.methods import method_class
from maehpc.recipes.plugins import METHODS
from maehpc.report.methods import Method, method

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_looks_as_its_class_says(name: str) -> None:
    kind, look = method_class(name), method(name)
    assert look.title == kind.title != name
    assert look.signed == kind.signed
    assert look.over_channels == kind.over_channels
    assert look.overlay == (kind.kind == "grid")
    assert look.colour in OKABE_ITO


def test_the_reports_methods_are_told_apart() -> None:
    names = ("saliency", "gradcam", "deeplift", "deeplift-captum")
    assert len({method(name).colour for name in names}) == 4
    assert [method(name).colour for name in names[:3]] == ["#0072B2", "#D55E00", "#009E73"]


def test_an_unknown_method_is_drawn_in_grey_under_its_own_name() -> None:
    assert method("of-tomorrow") == Method("of-tomorrow", "#555555", signed=True, overlay=False, over_channels="sum")
