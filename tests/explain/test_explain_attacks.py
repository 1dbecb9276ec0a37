import gc
import itertools
from dataclasses import fields

import numpy as np
import pytest
import torch
from explain_references import (
    ToyEncoder,
    explain_settings,
    images,
    linear,
    linear_classifier,
    preprocess,
    quadratic_classifier,
    vit,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.function import BackwardCFunction

from maehpc.errors import InputError, RunError
from maehpc.explain import attacks
from maehpc.explain.engine import Engine
from maehpc.explain.methods import method_class
from maehpc.explain.noise import NoiseKey, uniform
from maehpc.explain.sensitivity import perturbed, relative_change
from maehpc.explain.similarity import importance
from maehpc.models import Classifier
from maehpc.recipes import SensitivitySettings
from maehpc.recipes.plugins import METHODS

KEY = NoiseKey(3, "toy")
KINDS = ("pgd", "topk", "centre", "targeted")
THREE = ("saliency", "gradcam", "deeplift")
SEARCHABLE = [name for name in METHODS if method_class(name).differentiable]
UNCHANGED = preprocess(2, mean=0.0)
"""The preprocessing of the 2 x 2 toys, which normalises nothing."""
BITS = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=12)), dtype=torch.float64).reshape(-1, 3, 2, 2)
"""Every corner of a ball around a 2 x 2 image, as signs."""


def sensitivity(*kinds, **values):
    return SensitivitySettings(kinds=kinds or KINDS, **values)


class Case:
    """An engine and images, ready to be searched."""

    def __init__(self, classifier, pixels, prepared, *methods, indices=None):
        self.pixels, self.preprocess = pixels, prepared
        self.x = prepared.normalise(pixels)
        self.engine = Engine(classifier, explain_settings(*methods), torch.zeros_like(self.x[:1]))
        self.original = self.engine.attribute(self.x)
        self.indices = torch.arange(len(pixels)) if indices is None else indices

    def sought(self, method, settings, key=KEY):
        return attacks.Sought(
            self.engine, method, self.pixels, self.indices, self.original, settings, self.preprocess, key
        )

    def search(self, method, kind, settings, key=KEY, rows=None):
        return attacks.search(self.sought(method, settings, key), kind, rows)

    def objective(self, method, kind, settings):
        over = self.engine.methods[method].over_channels
        return attacks.make_objective(kind, self.original.maps[method], over, settings)

    def ascend(self, method, kind, settings):
        return attacks.ascend(self.sought(method, settings), self.objective(method, kind, settings))


def tiny_vit(count, *methods, dtype=torch.float32, indices=None):
    return Case(vit().to(dtype), images(count).to(dtype), preprocess(), *methods, indices=indices)


def quadratic(matrix, count, *methods):
    return Case(quadratic_classifier(matrix, 2), 0.3 + 0.7 * images(count, 2).double(), UNCHANGED, *methods)


def symmetric(seed=0):
    """Of positive elements, so that with positive pixels the gradient A x and its magnitude are the same."""
    root = torch.rand(12, 12, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T


def visits(monkeypatch, case):
    """Every input that a search shows the engine from now on, and whether for a differentiable pass."""
    shown, really = [], case.engine.seen

    def seen(x, *arguments, **options):
        if "differentiable" in options:
            shown.append((x.detach().clone(), options["differentiable"]))
        return really(x, *arguments, **options)

    monkeypatch.setattr(case.engine, "seen", seen)
    return shown


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_quadratic_model_is_changed_as_much_as_any_corner_does(norm):
    """f = x'Ax/2: the map is A x, so the change ||A d|| / ||A x|| is convex in d and largest at a corner."""
    matrix, settings = symmetric(), sensitivity("pgd", norm=norm, radius=0.05)
    case = quadratic(matrix, 3, "saliency")
    found = case.search("saliency", "pgd", settings)
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    kept = case.ascend("saliency", "pgd", settings)
    torch.testing.assert_close(kept.objective, found.change, rtol=1e-12, atol=0)
    moved = (0.05 * BITS.flatten(1) @ matrix).numpy()
    most = np.linalg.norm(moved, order, axis=1).max()
    for row, x in enumerate(case.x.flatten(1)):
        assert found.change[row].item() == pytest.approx(most / np.linalg.norm((matrix @ x).numpy(), order), rel=1e-9)


def of_mass(maps, original, kind, top=0.25):
    """What a search of that kind maximises, of many maps [N, 2, 2] of one image, written out; larger is worse."""
    share = maps / maps.sum((1, 2), keepdims=True)
    if kind == "topk":
        return -share.reshape(len(maps), -1)[:, original.ravel().argsort()[::-1][: round(top * 4)]].sum(1)
    if kind == "targeted":
        return share[:, 0, 0]
    before = original / original.sum()

    def centre(of):
        return np.stack([of[..., 0, :].sum(-1) * 0.25 + of[..., 1, :].sum(-1) * 0.75,
                         of[..., :, 0].sum(-1) * 0.25 + of[..., :, 1].sum(-1) * 0.75], -1)  # fmt: skip

    return np.linalg.norm(centre(share) - centre(before), axis=-1)


@pytest.mark.parametrize("kind", ["topk", "centre", "targeted"])
def test_diagonal_model_is_moved_as_far_as_any_corner_does(kind):
    """f = sum a x^2 / 2: each value of the map has its own pixels, and the worst case is at a corner of the ball."""
    diagonal = 0.5 + torch.rand(12, generator=torch.Generator().manual_seed(1)).double()
    settings = sensitivity(kind, radius=0.05, search={"top": 0.25})
    case = quadratic(torch.diag(diagonal), 6, "saliency")
    found = case.ascend("saliency", kind, settings)
    for row, x in enumerate(case.x):
        maps = (diagonal.reshape(3, 2, 2) * (x + 0.05 * BITS)).amax(1).numpy()
        original = (diagonal.reshape(3, 2, 2) * x).amax(0).numpy()
        worst = of_mass(maps, original, kind).max()
        assert worst > of_mass(original[None], original, kind)[0] + 0.005
        # A centre may be pushed to a side that is nearly, not quite, the farthest.
        assert found.objective[row].item() == pytest.approx(
            worst, **({"rel": 0.15} if kind == "centre" else {"abs": 1e-9})
        )


def test_linear_model_has_a_saliency_that_nothing_moves():
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).double()
    case = Case(linear_classifier(weight, 2), images(4, 2).double(), UNCHANGED, "saliency")
    for kind in KINDS:
        found = case.search("saliency", kind, sensitivity(kind))
        for values, expected in zip((found.change, found.top, found.spearman, found.centre), (0, 1, 1, 0), strict=True):
            torch.testing.assert_close(values, torch.full((4,), float(expected)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", THREE)
def test_finds_more_than_chance(method):
    case, settings = tiny_vit(12, method), sensitivity("pgd")
    changes = []
    for sample in range(10):
        noise = uniform(KEY, case.indices, sample, case.pixels.shape[1:], settings.radius, "cpu")
        moved = case.engine.attribute(perturbed(case.pixels, noise, settings, case.preprocess), case.original.targets)
        changes.append(relative_change(case.original.maps[method], moved.maps[method], "l2"))
    ratio = case.search(method, "pgd", settings).change / torch.stack(changes).amax(dim=0)
    assert (ratio > 1).sum() >= 11
    assert ratio.median() > 2


def test_each_kind_is_best_at_its_own():
    case, settings = tiny_vit(8, "saliency"), sensitivity()
    kept = {kind: case.ascend("saliency", kind, settings) for kind in KINDS}
    for kind in KINDS:
        reached = {other: case.objective("saliency", kind, settings)(kept[other].maps).mean().item() for other in KINDS}
        torch.testing.assert_close(kept[kind].objective.mean().item(), reached[kind])
        assert max(reached, key=reached.get) == kind, reached


@pytest.mark.parametrize(
    ("method", "kind"),
    [*itertools.product(THREE, KINDS), *((name, "pgd") for name in SEARCHABLE if name not in THREE)],
)
def test_gradient_of_what_is_climbed_by_finite_differences(method, kind):
    case, settings = tiny_vit(3, method, dtype=torch.float64), sensitivity(kind)
    objective = case.objective(method, kind, settings)
    generator = torch.Generator().manual_seed(5)
    start = case.x + 0.02 * torch.randn(case.x.shape, generator=generator, dtype=torch.float64)
    way, step = torch.randn(case.x.shape, generator=generator, dtype=torch.float64), 1e-6

    def value(x):
        return objective(case.engine.attribute(x, case.original.targets).maps[method])

    looked = attacks._look(case.sought(method, settings), objective, start.clone(), climbs=True)
    assert looked.same.all()
    slope = (value(start + step * way) - value(start - step * way)) / (2 * step)
    torch.testing.assert_close((looked.gradient * way).flatten(1).sum(dim=1), slope, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(looked.objective, value(start), rtol=1e-9, atol=0)


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    radius=st.floats(1e-3, 0.5),
    space=st.sampled_from(["normalised", "pixel"]),
    clip=st.booleans(),
    step_size=st.none() | st.floats(1e-3, 2.0),
    kind=st.sampled_from(KINDS),
)
def test_never_leaves_the_ball_nor_valid_pixels(radius, space, clip, step_size, kind):
    prepared = preprocess(2)
    case = Case(quadratic_classifier(symmetric(), 2), images(3, 2).double().round(decimals=1), prepared, "saliency")
    settings = sensitivity(kind, radius=radius, space=space, clip=clip, search={"steps": 4, "step_size": step_size})
    with pytest.MonkeyPatch.context() as monkeypatch:
        shown = visits(monkeypatch, case)
        kept = case.ascend("saliency", kind, settings)
    points = [x for x, _ in shown]
    assert len(points) == 5
    assert kept.noise.abs().max() <= radius
    for x in [*points, perturbed(case.pixels, kept.noise, settings, prepared)]:
        apart = x - case.x if space == "normalised" else prepared.denormalise(x) - case.pixels
        assert apart.abs().max() <= radius + 1e-6
        if clip:
            assert prepared.denormalise(x).min() >= -1e-6
            assert prepared.denormalise(x).max() <= 1 + 1e-6


def test_a_clipped_pixel_comes_back_with_the_first_step_that_wants_it():
    """At black, noise below 0 counts for nothing; a search that let it grow would climb out of a hole."""
    case = Case(quadratic_classifier(symmetric(), 2), torch.zeros(1, 3, 2, 2).double() + 0.01, UNCHANGED, "saliency")
    settings = sensitivity("pgd", radius=0.5, clip=True, search={"steps": 2, "step_size": 0.1})
    with pytest.MonkeyPatch.context() as monkeypatch:
        shown = visits(monkeypatch, case)
        case.ascend("saliency", "pgd", settings)
    before, after = shown[0][0], shown[1][0]
    assert (before == 0).any()
    moved = (after - before).abs()
    torch.testing.assert_close(moved[before == 0], torch.full_like(moved[before == 0], 0.1))


def test_steps_are_of_the_size_asked_for_and_the_last_point_needs_no_gradient(monkeypatch):
    case = tiny_vit(2, "saliency")
    shown = visits(monkeypatch, case)
    case.ascend("saliency", "pgd", sensitivity("pgd", radius=0.5, search={"steps": 3, "step_size": 1e-3}))
    assert [differentiable for _, differentiable in shown] == [True, True, True, False]
    for (before, _), (after, _) in itertools.pairwise(shown):
        steps = (after - before).abs()
        assert (steps > 5e-4).float().mean() > 0.99
        assert steps.max() < 1.01e-3


def test_start_is_keyed_and_no_random_sample(monkeypatch):
    settings = sensitivity("pgd", search={"steps": 1})
    case = tiny_vit(2, "saliency", indices=torch.tensor([4, 9]))
    shown = visits(monkeypatch, case)
    case.ascend("saliency", "pgd", settings)
    start = shown[0][0] - case.x
    assert 0.019 < start.abs().max() <= 0.02 + 1e-6
    for sample in range(20):
        noise = uniform(KEY, case.indices, sample, case.pixels.shape[1:], 0.02, "cpu")
        assert (start - noise).abs().mean() > 0.01
    for key in (NoiseKey(4, "toy"), NoiseKey(3, "other")):
        case.search("saliency", "pgd", settings, key)
        assert (shown[-2][0] - case.x - start).abs().mean() > 0.01


@pytest.mark.parametrize("method", THREE)
def test_kept_perturbation_keeps_the_prediction(method, monkeypatch):
    """In a ball that flips many predictions."""
    case, settings = tiny_vit(16, method), sensitivity("pgd", radius=0.3)
    prediction = case.original.logits.argmax(dim=1)
    shown = visits(monkeypatch, case)
    kept = case.ascend(method, "pgd", settings)
    flips = torch.stack([case.engine.logits(x).argmax(dim=1) != prediction for x, _ in shown])
    assert 0.05 < flips.float().mean() < 0.9
    assert flips.any(dim=0).sum() >= 5

    again = case.engine.attribute(perturbed(case.pixels, kept.noise, settings, case.preprocess), case.original.targets)
    assert torch.equal(again.logits.argmax(dim=1), prediction)
    scale = kept.maps.abs().max().item()
    torch.testing.assert_close(again.maps[method], kept.maps, rtol=0, atol=1e-4 * scale)

    values = torch.stack([
        relative_change(case.original.maps[method], case.engine.attribute(x, case.original.targets).maps[method], "l2")
        for x, _ in shown
    ])  # fmt: skip
    best = values.masked_fill(flips, 0).amax(dim=0)
    torch.testing.assert_close(kept.objective, best, rtol=1e-3, atol=1e-4)


def test_where_every_point_flips_the_image_itself_counts():
    """One logit is x'x/2, the other that and |x - x0|^2: they tie at x0 alone, where the first is predicted."""
    pixels = 0.3 + 0.7 * images(1, 2).double()
    x0 = pixels.flatten(1)

    def features(x):
        flat = x.flatten(1)
        return torch.cat([flat * flat / 2, (flat - x0) * (flat - x0)], dim=1)[:, None]

    head = torch.cat([torch.ones(2, 12), torch.tensor([[0.0], [1.0]]).expand(2, 12)], dim=1).double()
    classifier = Classifier(ToyEncoder(features, (1, 1), 2), nn.Sequential(linear(head)), "mean")
    case = Case(classifier, pixels, UNCHANGED, "saliency")
    assert case.original.targets.tolist() == [0]
    for kind in KINDS:
        found = case.search("saliency", kind, sensitivity(kind))
        assert [getattr(found, field.name).item() for field in fields(found)] == pytest.approx([0, 1, 1, 0], abs=1e-12)
        assert not case.ascend("saliency", kind, sensitivity(kind)).noise.any()


def test_a_search_that_flips_comes_back():
    """Half of this ball predicts otherwise, and the map grows towards it: the best lies at the border."""
    weight = torch.ones(12).double()

    def features(x):
        flat = x.flatten(1)
        return torch.cat([flat * flat / 2, flat], dim=1)[:, None]

    head = torch.stack([torch.cat([weight, 0 * weight]), torch.cat([weight, weight])])
    layer = linear(head, torch.tensor([0.0, -(12 * 0.5 + 0.12)]).double())  # the second from a mean of 0.51 on
    case = Case(
        Classifier(ToyEncoder(features, (1, 1), 2), nn.Sequential(layer), "mean"),
        torch.full((4, 3, 2, 2), 0.5).double(), UNCHANGED, "saliency",
    )  # fmt: skip
    assert case.original.targets.tolist() == [0] * 4
    sought = case.sought("saliency", sensitivity("pgd", radius=0.1))
    kept = attacks.ascend(sought, lambda maps: maps.flatten(1).mean(dim=1))
    reached = (case.pixels + kept.noise).flatten(1).mean(dim=1)
    assert (reached <= 0.51 + 1e-9).all()
    assert (reached > 0.50).all()


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_and_order_do_not_matter(kind):
    indices = torch.tensor([7, 1, 5, 3])
    case = tiny_vit(4, *THREE, dtype=torch.float64, indices=indices)
    order = torch.tensor([2, 0])
    fewer = Case(vit().double(), case.pixels[order], preprocess(), *THREE, indices=indices[order])
    settings = sensitivity(kind, search={"steps": 5})
    for method in THREE:
        together, apart = case.search(method, kind, settings), fewer.search(method, kind, settings)
        for field in fields(together):
            torch.testing.assert_close(
                getattr(apart, field.name), getattr(together, field.name)[order], rtol=1e-6, atol=1e-9
            )


def test_takes_as_many_at_a_time_as_memory_holds(monkeypatch):
    case, settings = tiny_vit(5, "saliency", dtype=torch.float64), sensitivity("topk", search={"steps": 2})
    whole = case.search("saliency", "topk", settings)
    shown = visits(monkeypatch, case)
    for rows, sizes in ((8, [2, 2, 1]), (3, [1] * 5), (100, [5])):
        shown.clear()
        pieces = case.search("saliency", "topk", settings, rows=rows)
        assert [len(x) for x, _ in shown] == [size for size in sizes for _ in range(3)]
        for field in fields(whole):
            torch.testing.assert_close(getattr(pieces, field.name), getattr(whole, field.name), rtol=1e-6, atol=1e-9)


def test_same_bits_again_with_or_without_grad_mode_and_inputs_stay(monkeypatch):
    case, settings = tiny_vit(3, "deeplift"), sensitivity("pgd", search={"steps": 3})
    pixels, maps = case.pixels.clone(), case.original.maps["deeplift"].clone()
    first = case.search("deeplift", "pgd", settings)
    with torch.no_grad():
        second = case.search("deeplift", "pgd", settings)
    for field in fields(first):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name))
        assert not getattr(first, field.name).requires_grad
    assert torch.equal(case.pixels, pixels)
    assert torch.equal(case.original.maps["deeplift"], maps)
    assert not any(weight.requires_grad for weight in case.engine.network.classifier.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_maps_are_not_numbers(kind):
    """Of f = x'Ax/2 with a black image the gradient is zero; its neighbours are as they would be alone."""
    case = quadratic(symmetric(), 3, "saliency")
    black = Case(
        quadratic_classifier(symmetric(), 2), case.pixels.index_fill(0, torch.tensor([1]), 0), UNCHANGED, "saliency"
    )
    found, other = (each.search("saliency", kind, sensitivity(kind)) for each in (black, case))
    for field in fields(found):
        values = getattr(found, field.name)
        assert values.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(values[[0, 2]], getattr(other, field.name)[[0, 2]])


@pytest.mark.parametrize("kind", ["topk", "centre", "targeted"])
def test_a_map_that_is_driven_to_zero_is_not_kept_by_objectives_of_mass(kind):
    case = quadratic(symmetric(), 2, "saliency")
    objective = case.objective("saliency", kind, sensitivity(kind))
    maps = case.original.maps["saliency"].clone().requires_grad_()
    values = objective(maps * torch.tensor([0.0, 1.0]).double().reshape(2, 1, 1, 1))
    assert values.isnan().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(values.sum(), maps)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 7), (1, 1)])
def test_target_is_a_quarter_of_the_image(height, width):
    values = torch.rand(5, height, width, generator=torch.Generator().manual_seed(0)).double()
    for target in ("corner", "opposite"):
        region = attacks.target_region(values, target)
        assert region.shape == values.shape
        torch.testing.assert_close(region.sum(dim=(1, 2)), torch.full((5,), height * width / 4).double())
    fine = torch.ones(2 * height, 2 * width)  # of halves, each of which is inside or outside
    fine[height:], fine[:, width:] = 0, 0
    expected = fine.reshape(height, 2, width, 2).mean(dim=(1, 3)).double()
    torch.testing.assert_close(attacks.target_region(values, "corner"), expected.expand(5, -1, -1))


@pytest.mark.parametrize(("place", "opposite"), [((0, 0), 3), ((0, 3), 2), ((3, 0), 1), ((3, 3), 0)])
def test_opposite_is_the_quarter_of_least_mass(place, opposite):
    values = torch.full((1, 4, 4), 2.0)
    values[0, opposite // 2 * 2 : opposite // 2 * 2 + 2, opposite % 2 * 2 : opposite % 2 * 2 + 2] = 1
    values[0, place[0], place[1]] = 9
    region = attacks.target_region(values, "opposite")[0]
    assert torch.equal(region, (values[0] == 1).float())


def test_opposite_is_chosen_an_image(monkeypatch):
    case, settings = tiny_vit(6, "saliency"), sensitivity("targeted", search={"target": "opposite"})
    before = importance(case.original.maps["saliency"], "largest")
    quarters = before.unflatten(2, (2, 8)).unflatten(1, (2, 8)).sum(dim=(2, 4)) / before.sum(dim=(1, 2))[:, None, None]
    least = quarters.flatten(1).min(dim=1)
    assert len(least.indices.unique()) > 1
    kept = case.ascend("saliency", "targeted", settings)
    after = importance(kept.maps, "largest")
    share = after.unflatten(2, (2, 8)).unflatten(1, (2, 8)).sum(dim=(2, 4)) / after.sum(dim=(1, 2))[:, None, None]
    raised = share.flatten(1).gather(1, least.indices[:, None])[:, 0]
    torch.testing.assert_close(raised, kept.objective)
    assert (raised > least.values + 0.02).all()


def test_refuses_methods_that_cannot_be_differentiated(monkeypatch):
    monkeypatch.setattr(method_class("gradcam"), "differentiable", False)
    with pytest.raises(
        InputError, match=r"explain\.sensitivity\.kinds: pgd, topk cannot .* gradcam, .* saliency"
    ) as told:
        attacks.check(("saliency", "gradcam"), sensitivity("random", "pgd", "topk"))
    searchable = str(told.value).rpartition(":")[2]
    assert "gradcam," not in searchable
    assert "deeplift" in searchable
    assert str(told.value).count(". ") == 0
    attacks.check(("saliency", "gradcam"), sensitivity("random"))
    attacks.check(("saliency", "deeplift"), sensitivity("pgd"))


def test_a_map_that_is_not_finite_is_told():
    diagonal = torch.full((12,), 1e-3)
    diagonal[0] = torch.finfo(torch.float32).max
    pixels = torch.ones(2, 3, 2, 2)
    pixels[0] = 0.5
    case = Case(
        quadratic_classifier(torch.diag(diagonal), 2), pixels, UNCHANGED, "saliency", indices=torch.tensor([8, 6])
    )
    assert case.original.maps["saliency"].isfinite().all()
    with pytest.raises(RunError, match=r"saliency of image 6, .* not finite"):
        case.search("saliency", "pgd", sensitivity("pgd", norm="linf"))


@pytest.mark.parametrize("method", [*THREE, "deeplift-captum", "input-x-gradient"])
def test_nothing_is_held_from_step_to_step(method):
    """Without the collector of cycles, so that every graph must go by itself."""
    case = tiny_vit(2, method)

    def held(steps):
        case.search(method, "pgd", sensitivity("pgd", search={"steps": steps}))
        objects = gc.get_objects()
        return sum(issubclass(type(one), (torch.Tensor, BackwardCFunction)) for one in objects)

    gc.collect()
    gc.disable()
    try:
        counts = [held(steps) for steps in (1, 5)]
    finally:
        gc.enable()
    assert counts[0] == counts[1]
