"""Figures show the numbers they are given, inside their own borders, and equal data give equal bytes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from maehpc.report.figures.adversarial import Comparison, draw_comparisons
from maehpc.report.figures.curves import Curve, Curves, draw_curves, thinned
from maehpc.report.figures.distributions import Distribution, draw_distributions
from maehpc.report.figures.panels import Panel, draw_panels
from maehpc.report.figures.reconstructions import MOST, Reconstructions, draw_reconstructions
from maehpc.report.figures.style import in_style, write_figure

RNG = np.random.default_rng(0)
NAMES = ("saliency", "gradcam", "deeplift-captum")


def panel(sensitivity: float = 0.25, **maps: np.ndarray) -> Panel:
    drawn = {
        "saliency": np.abs(RNG.normal(size=(16, 16))),
        "gradcam": RNG.normal(size=(4, 4)),
        "deeplift-captum": RNG.normal(size=(16, 16)) + 0.5,
    } | maps
    lines = ("image 12345", "label: squamous cell carcinoma in situ", "predicted: none", "flips: 10 of 10")
    image = RNG.integers(0, 256, (16, 16, 3), np.uint8)
    maps32 = {name: values.astype(np.float32) for name, values in drawn.items()}
    return Panel("Lowest", lines, image, maps32, dict.fromkeys(drawn, sensitivity))


def panels_figure() -> Figure:
    title = "RetinaMNIST, test split, demo/retinamnist"
    return draw_panels([panel(), panel(), panel()], title, "Lowest, median and highest max sensitivity of Saliency")


def curves_figure() -> Figure:
    steps = np.arange(1, 201) / 10
    epochs = np.arange(1, 21, dtype=np.float64)
    some = {name: Curve(steps, RNG.random(200)) for name in ("loss", "accuracy")}
    whole = {name: {s: Curve(epochs, RNG.random(20)) for s in ("train", "val")} for name in ("loss", "accuracy", "auc")}
    pretraining = Curves({"loss": Curve(steps, RNG.random(200))}, {}, 10)
    return draw_curves({"Pretraining": pretraining, "Finetuning": Curves(some, whole, 10)}, "Learning curves, demo")


def reconstructions(channels: int, count: int) -> Reconstructions:
    pictures = [RNG.integers(0, 256, (count, 8, 8, channels), np.uint8) for _ in range(3)]
    return Reconstructions(*pictures, index=np.arange(count) * 100, mask_ratio=0.75)


def reconstructions_figure() -> Figure:
    return draw_reconstructions(reconstructions(3, 8), "Masked autoencoder on test images, demo/retinamnist")


def distributions_figure() -> Figure:
    rows = []
    for label in ("RetinaMNIST\ndemo", "BreastMNIST\nsome/longer-name"):
        scores = {name: np.split(RNG.lognormal(-1, 0.5, 50), [20]) for name in NAMES}
        rows.append(Distribution(label, scores, dict.fromkeys(NAMES, (0.3, 0.5)), "10 perturbations, radius 0.02"))
    return draw_distributions(rows)


def comparisons_figure() -> Figure:
    rows = []
    for label in ("RetinaMNIST\ndemo", "BreastMNIST\nsome/longer-name"):
        random = {name: [RNG.lognormal(-1, 0.5, 50)] for name in NAMES}
        searched = {name: [RNG.lognormal(1, 0.5, 50)] for name in NAMES}
        rows.append(Comparison(label, random, searched, "radius 0.02 in normalised space"))
    return draw_comparisons(rows)


def narrow_comparisons_figure() -> Figure:
    values = RNG.lognormal(-1, 0.5, 50)
    return draw_comparisons(
        [
            Comparison(
                "Digits\ndemo", {"deeplift": [values]}, {"deeplift": [3 * values]}, "radius 0.02 in normalised space"
            )
        ]
    )


FIGURES = [
    panels_figure,
    curves_figure,
    reconstructions_figure,
    distributions_figure,
    comparisons_figure,
    narrow_comparisons_figure,
]


@pytest.mark.parametrize("draw", FIGURES)
def test_no_text_is_cut_off_or_printed_over_another(draw) -> None:
    with in_style():
        figure = draw()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        used = figure.get_tightbbox(renderer)
        ticks = {id(label) for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())}
        texts = [text for text in figure.findobj(Text) if text.get_text() and id(text) not in ticks]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_visible()]
    width, height = figure.get_size_inches()
    assert used.x0 >= 0 and used.y0 >= 0 and used.x1 <= width and used.y1 <= height
    named = [(words, box) for words, box in boxes if re.search("[A-Za-z]{3}", words)]
    assert len(named) >= 2
    for number, (words, box) in enumerate(named):
        for other_words, other in named[:number]:
            assert not box.overlaps(other), f"{words!r} over {other_words!r}"


@pytest.mark.parametrize("draw", [distributions_figure, comparisons_figure])
@pytest.mark.parametrize("spread", [0.1, 1, 4])
def test_numbers_below_a_logarithmic_scale_can_be_read(draw, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = RNG.lognormal
    monkeypatch.setattr(f"{__name__}.RNG", SimpleNamespace(lognormal=lambda mean, _, n: drawn(mean, spread, n)))
    with in_style():
        figure = draw()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axes in figure.axes:
            low, high = axes.get_xlim()
            shown = [
                label for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= at <= high
            ]
            boxes = [label.get_window_extent(canvas.get_renderer()) for label in shown]
            for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
                assert float(label.get_text().replace("\N{MINUS SIGN}", "-")) == pytest.approx(at)
            assert len(shown) >= 2
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize("draw", FIGURES)
def test_equal_data_give_equal_bytes_whatever_the_users_style(draw, tmp_path: Path) -> None:
    global RNG
    written = []
    for number, size in enumerate((8.0, 30.0)):
        RNG = np.random.default_rng(4)
        with matplotlib.rc_context({"font.size": size, "axes.facecolor": "red", "pdf.fonttype": 3}):
            written.append([path.read_bytes() for path in write_figure(tmp_path / f"{number}", draw)])
    assert written[0] == written[1]
    assert written[0][1].startswith(b"%PDF")
    assert b"CreationDate" not in written[0][1]
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".pdf"}


def maps_of(figure: Figure) -> list:
    return [axes.images[-1] for axes in figure.axes if axes.images and axes.get_title()]


def test_signed_maps_are_centred_on_zero_and_saliency_begins_there() -> None:
    figure = draw_panels([panel()], "t", "s")
    saliency, gradcam, deeplift = (image.norm for image in maps_of(figure))
    assert saliency.vmin == 0 < saliency.vmax
    assert gradcam.vmin == -gradcam.vmax < 0
    assert deeplift.vmin == -deeplift.vmax < 0


def test_each_heading_gives_the_maps_sensitivity() -> None:
    figure = draw_panels([panel(0.5), panel(0.03125)], "t", "s")
    headings = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert headings == ["max sens. 0.500"] * 3 + ["max sens. 0.0312"] * 3


def test_a_zero_map_says_so_and_an_unmeasured_one_says_nothing() -> None:
    figure = draw_panels([panel(np.nan, gradcam=np.zeros((4, 4)))], "t", "s")
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["all zero"]


@pytest.mark.parametrize("values", [np.full((4, 4), np.nan), np.full((4, 4), np.inf), np.eye(4) * 1e-30])
def test_odd_maps_are_drawn(values: np.ndarray) -> None:
    figure = draw_panels([panel(0.1, gradcam=values, saliency=np.abs(values))], "t", "s")
    FigureCanvasAgg(figure).draw()


def test_without_pixels_there_is_no_image_column() -> None:
    whole = panel()
    bare = Panel(whole.heading, whole.lines, None, whole.maps, whole.sensitivity)
    pictures = [len([axes for axes in draw_panels([each], "t", "s").axes if axes.images]) for each in (whole, bare)]
    assert pictures == [4, 3]


@pytest.mark.parametrize(("channels", "count"), [(1, 3), (3, 1), (3, MOST + 4)])
def test_reconstructions_show_the_images_as_they_are(channels: int, count: int) -> None:
    given = reconstructions(channels, count)
    figure = draw_reconstructions(given, "t")
    shown = np.array([np.asarray(axes.images[0].get_array()) for axes in figure.axes])
    expected = np.concatenate([part[:MOST] for part in (given.original, given.masked, given.reconstructed)])
    np.testing.assert_array_equal(shown.reshape(expected.shape), expected)


def test_curves_show_the_numbers_and_only_panels_that_have_some() -> None:
    epochs = np.array([1.0, 2.0])
    curves = Curves({}, {"auc": {"train": Curve(epochs, epochs / 4), "val": Curve(epochs, epochs / 5)}}, 16)
    (axes,) = draw_curves({"Finetuning": curves}, "t").axes
    assert axes.get_ylabel() == "Finetuning AUC"
    drawn = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert drawn == {"train, an epoch": [0.25, 0.5], "val, an epoch": [0.2, 0.4]}


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500])
def test_thinning_equals_means_over_runs(count: int) -> None:
    curve = Curve(np.arange(count, dtype=np.float64), RNG.random(count))
    thin = thinned(curve)
    assert len(thin.values) <= 1000
    run = 1 if count <= 1000 else 2 if count <= 2000 else 3
    expected = [curve.values[start : start + run].mean() for start in range(0, count, run)]
    np.testing.assert_allclose(thin.values, expected)
    if count <= 1000:
        assert thin is curve


@pytest.mark.parametrize(
    "values",
    [np.array([0.5]), np.full(5, 0.25), np.array([0.0, 0.0]), np.array([0.0, 1.0]), np.array([1e-6, 1e3])],
)
def test_distributions_of_few_equal_and_zero_scores(values: np.ndarray) -> None:
    row = Distribution("one", {"saliency": [values], "gradcam": [values[:0]]}, {"saliency": (np.nan, np.nan)}, "s")
    figure = draw_distributions([row])
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_xscale() == ("log" if values.min() > 0 else "linear")
    counts = figure.axes[0].patches[0].get_data().values
    assert counts.max() == pytest.approx(0.62)
    assert np.round((counts > 0).sum()) == len(np.unique(values))


def test_distributions_sampled_in_two_ways_say_so() -> None:
    rows = [Distribution("a", {"saliency": [np.ones(2)]}, {"saliency": (1, 1)}, sampling) for sampling in ("x", "y")]
    assert "not all sampled alike" in draw_distributions(rows).get_supxlabel()
    assert "(x)" in draw_distributions(rows[:1]).get_supxlabel()


def test_chance_and_the_worst_found_are_on_one_scale() -> None:
    random, searched = np.full(5, 0.01), np.full(5, 1.0)
    figure = draw_comparisons([Comparison("a", {"saliency": [random]}, {"saliency": [searched]}, "x")])
    (axes,) = figure.axes
    low, high = (patch.get_data() for patch in axes.patches)
    np.testing.assert_array_equal(low.edges, high.edges)
    assert low.edges[low.values.argmax()] <= 0.01 < low.edges[low.values.argmax() + 1]
    assert high.edges[high.values.argmax()] <= 1.0 < high.edges[high.values.argmax() + 1]
    assert axes.get_xscale() == "log"
    assert "(x)" in figure.get_supxlabel()


def test_comparisons_in_two_balls_say_so_and_methods_may_be_absent() -> None:
    ones = {"saliency": [np.ones(2)]}
    rows = [Comparison("a", ones, ones, "x"), Comparison("b", {"rise": [np.zeros(1)]}, {"rise": [np.ones(1)]}, "y")]
    figure = draw_comparisons(rows)
    FigureCanvasAgg(figure).draw()
    assert "not all in one ball" in figure.get_supxlabel()
    assert [len(axes.patches) for axes in figure.axes] == [2, 2]
    assert figure.axes[0].get_xscale() == "linear"
