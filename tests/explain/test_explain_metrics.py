"""What holds for every metric: facts, layout, keyed draws, neighbours, zero maps, options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from explain_metric_cases import KEY, given_of, mask_file, metric, rows, toy, with_maps
from explain_references import images, vit

from maehpc.errors import InputError
from maehpc.explain.methods import method_class
from maehpc.explain.methods.registry import make_methods
from maehpc.explain.metrics import make_metrics, metric_class
from maehpc.explain.metrics.shared.draws import fractions, normal, stream
from maehpc.explain.metrics.shared.maps import at_pixels, by_channel, values
from maehpc.explain.noise import NoiseKey, uniform
from maehpc.recipes.plugins import METHODS as METHODS_KNOWN
from maehpc.recipes.plugins import METRICS, facts

QUICK = {
    "deletion": {"steps": 6},
    "insertion": {"steps": 6, "sigma": 1.5},
    "infidelity": {"samples": 5},
    "lipschitz": {"samples": 2},
    "mass": {},
    "pointing": {"tolerance": 1},
    "randomisation": {"order": "cascading"},
    "road": {"percentiles": (20, 60)},
    "sparseness": {},
}
METHODS = ("saliency", "gradcam", "deeplift")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def given():
    return toy(*METHODS)


def made(given, name, tmp_path, **options):
    options = {**QUICK[name], **options}
    if name in ("mass", "pointing"):
        options["masks"] = mask_file(tmp_path)
    return metric(given, name, **options)


def test_every_metric_is_tested_here():
    assert set(QUICK) == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_says_what_it_is_without_pytorch(name):
    kind, read = metric_class(name), facts("metrics", name)
    assert kind.name == name
    for fact in ("title", "source", "unit", "meaning", "better"):
        assert read[fact] == getattr(kind, fact)
    for cost in ("forwards", "forwards_each", "attributions"):
        assert read.get(cost, 0) == getattr(kind, cost)
    assert kind.better in ("higher", "lower", "neither")


@pytest.mark.parametrize("upsample", ["none", "bilinear"])
@pytest.mark.parametrize("name", METRICS)
def test_gives_what_its_layout_says(name, upsample, tmp_path):
    given = toy(*METHODS, gradcam={"upsample": upsample})
    ours = made(given, name, tmp_path)
    layout = ours.arrays()
    assert layout[""] == ((), ())
    assert set(ours.coordinates()) <= {dimension for dimensions, _ in layout.values() for dimension in dimensions}
    for method in METHODS:
        measured = ours.measure(given, method)
        assert set(measured) == set(layout)
        for part, (dimensions, shape) in layout.items():
            assert len(dimensions) == len(shape)
            assert measured[part].shape == (4, *shape)
            assert measured[part].dtype == torch.float32
            assert measured[part].isfinite().all(), part
            for dimension, length in zip(dimensions, shape, strict=True):
                assert len(ours.coordinates().get(dimension, range(length))) == length


@pytest.mark.parametrize("name", METRICS)
def test_neighbours_and_order_do_not_matter(name, given, tmp_path):
    ours = made(given, name, tmp_path)
    pixels = given.x.shape[-1] ** 2
    # Rounding may exchange two neighbours in a ranking, which moves the correlation by 12 / (n (n + 1)) at most.
    atol = 2 * 12 / (pixels * (pixels + 1)) if name == "randomisation" else 2e-5
    whole = {method: ours.measure(given, method) for method in METHODS}
    for chosen in ([2, 0], [3]):
        some = rows(given, chosen)
        for method in METHODS:
            for part, measured in ours.measure(some, method).items():
                torch.testing.assert_close(
                    measured, whole[method][part][chosen], rtol=2e-4, atol=atol, msg=f"{method} {part} {chosen}"
                )


@pytest.mark.parametrize("name", METRICS)
def test_twice_is_the_same(name, given, tmp_path):
    one, other = (made(given, name, tmp_path).measure(replace(given), "deeplift") for _ in range(2))
    for part in one:
        assert torch.equal(one[part], other[part])


@pytest.mark.parametrize("name", ["infidelity", "lipschitz", "road"])
@pytest.mark.parametrize("change", [{"key": NoiseKey(8, "toy")}, {"key": NoiseKey(7, "other")}, {"indices": "moved"}])
def test_draws_belong_to_seed_data_set_and_image(name, change, given, tmp_path):
    if "indices" in change:
        change = {"indices": given.indices + 2**33}
    options = {"noise": 1.0} if name == "road" else {}
    ours = made(given, name, tmp_path, **options)
    one, other = ours.measure(given, "saliency")[""], ours.measure(replace(given, **change), "saliency")[""]
    assert (one != other).all()


@pytest.mark.parametrize("name", METRICS)
def test_zero_maps_are_not_a_number(name, given, tmp_path):
    maps = {method: full.clone() for method, full in given.maps.items()}
    for full in maps.values():
        full[1] = 0
    blank = with_maps(given, **maps)
    ours = made(given, name, tmp_path)
    for method in METHODS:
        for part, measured in ours.measure(blank, method).items():
            assert measured[1].isnan().all(), part
            assert measured[[0, 2, 3]].isfinite().all(), part


def test_metrics_come_in_the_settings_order():
    given = toy("saliency", metrics=("sparseness", "deletion"), options={"deletion": {"steps": 3}})
    metrics = make_metrics(given.engine.setup)
    assert list(metrics) == ["sparseness", "deletion"]
    assert metrics["deletion"].options.steps == 3


def test_options_of_what_is_not_asked_for_are_refused():
    with pytest.raises(InputError, match=r"explain\.options\.road: road is none of explain\.methods and explain\.met"):
        toy("saliency", metrics=("deletion",), options={"road": {}})


def test_wrong_options_are_named():
    given = toy("saliency")
    with pytest.raises(InputError, match=r"explain\.options\.deletion\.steps: .*greater than 0 \(options of deletion:"):
        metric(given, "deletion", steps=0)
    with pytest.raises(InputError, match=r"explain\.options\.sparseness\.bins: .*\(options of sparseness: none\)"):
        metric(given, "sparseness", bins=3)
    with pytest.raises(InputError, match=r"explain\.options\.road\.percentiles: .*each larger than the one before"):
        metric(given, "road", percentiles=(30, 20))


def test_methods_take_no_notice_of_metrics_options():
    given = toy("saliency", metrics=("deletion",), options={"deletion": {"steps": 3}})
    assert list(make_methods(given.engine.setup)) == ["saliency"]


def test_shared_work_is_done_once_a_batch(given):
    calls = []
    batch = replace(given)
    assert [batch.once("it", lambda: calls.append(1) or 5) for _ in range(3)] == [5, 5, 5]
    assert len(calls) == 1
    replace(batch).once("it", lambda: calls.append(1))
    assert len(calls) == 2


def test_one_value_a_pixel(given):
    saliency, gradcam, deeplift = (given.engine.methods[name] for name in METHODS)
    full = torch.tensor([[[[1.0, -2.0]], [[-3.0, 1.5]]]]).expand(1, 2, 2, 2)
    assert values(full, saliency)[0, 0].tolist() == [3.0, 2.0]
    assert values(full, deeplift)[0, 0].tolist() == [-2.0, -0.5]
    assert at_pixels(full, saliency, 2) is not None and torch.equal(
        at_pixels(full, saliency, 2), values(full, saliency)
    )
    grid = torch.tensor([[[0.0, 4.0], [8.0, 12.0]]])
    assert values(grid, gradcam) is grid
    # Half-pixel centres: 0, 1/4, 3/4, 1 of the way between the two patches.
    across = torch.tensor([0.0, 1.0, 3.0, 4.0])
    torch.testing.assert_close(at_pixels(grid, gradcam, 4)[0], across + 2 * across[:, None])
    random = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(random[:, None], size=(30, 30), mode="bilinear")[:, 0]
    torch.testing.assert_close(at_pixels(random, gradcam, 30), expected, rtol=0, atol=1e-6)
    assert by_channel(full, 2) is full
    assert by_channel(grid, 4).shape == (1, 1, 4, 4)


def test_pixels_beyond_the_outer_patches_centres_are_equal(given):
    grid = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = at_pixels(grid, given.engine.methods["gradcam"], 20)
    for row, column, patch in ((slice(18, 20), slice(18, 20), (3, 3)), (slice(0, 2), slice(18, 20), (0, 3))):
        assert torch.equal(pixels[:, row, column], grid[:, patch[0], patch[1], None, None].expand(3, 2, 2))
    assert torch.equal(pixels[:, 18], pixels[:, 19])


def test_slopes_and_shares_are_told_apart():
    assert all(method_class(name).local for name in ("saliency", "smoothgrad"))
    complete = [name for name in METHODS_KNOWN if method_class(name).complete]
    assert not any(method_class(name).local for name in (*complete, "input-x-gradient", "attnlrp", "gradcam"))


def test_normal_draws_are_normal_and_keyed():
    indices = torch.arange(64)
    drawn = normal(stream(KEY, "a"), indices, 0, (3, 40, 40), CPU)
    assert drawn.dtype == torch.float32
    flat = drawn.double().flatten()
    assert abs(flat.mean()) < 4 / len(flat) ** 0.5
    assert abs(flat.var() - 1) < 4 * (2 / len(flat)) ** 0.5
    for bound, share in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        assert abs((flat.abs() < bound).double().mean() - share) < 4 * (share * (1 - share) / len(flat)) ** 0.5
    correlation = torch.corrcoef(drawn.flatten(1).double())
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / (3 * 40 * 40) ** 0.5
    assert torch.equal(normal(stream(KEY, "a"), indices[5:6], 0, (3, 40, 40), CPU), drawn[5:6])
    assert not torch.equal(normal(stream(KEY, "a"), indices, 1, (3, 40, 40), CPU), drawn)


def test_streams_are_apart_from_each_other_and_from_sensitivitys():
    indices = torch.arange(2)
    one, other = (fractions(stream(KEY, name), indices, 0, (5,), CPU) for name in ("a", "b"))
    own = (uniform(KEY, indices, 0, (5,), 1.0, CPU) + 1) / 2
    assert (one != other).all() and (one != own).all()
    assert (one >= 0).all() and (one < 1).all()


@pytest.mark.parametrize("name", ["infidelity", "deletion", "road", "randomisation"])
def test_double_precision_serves(name, tmp_path):
    single, double = (given_of(kind, *METHODS, pixels=images(4)) for kind in (vit(), vit().double()))
    double = replace(double, targets=single.targets)
    for method in METHODS:
        one = made(single, name, tmp_path).measure(single, method)[""]
        other = made(double, name, tmp_path).measure(double, method)[""]
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
