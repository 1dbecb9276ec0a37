"""Infidelity against captum; deletion, insertion and ROAD against naive versions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import infidelity_perturb_func_decorator
from explain_metric_cases import KEY, given_of, metric, toy, with_maps
from explain_references import images, linear_classifier, preprocess, vit
from scipy.ndimage import gaussian_filter
from sklearn.metrics import auc

from maehpc.explain.metrics.shared.draws import fractions, normal, stream
from maehpc.explain.metrics.shared.imputation import imputed
from maehpc.explain.metrics.shared.removal import blurred, probability, ranks

METHODS = ("saliency", "gradcam", "deeplift", "input-x-gradient")
SAMPLES = 6


@pytest.fixture(scope="module")
def given():
    return toy(*METHODS)


# Infidelity


def squares(given, size):
    """Where each sample's square lies, [n, B, 1, S, S], from two keyed draws an image."""
    side = given.x.shape[-1]
    where = torch.zeros(SAMPLES, len(given.x), 1, side, side)
    for sample in range(SAMPLES):
        drawn = fractions(stream(KEY, "infidelity"), given.indices, sample, (2,), torch.device("cpu"))
        for row, (down, across) in enumerate((drawn * (side - size + 1)).floor().int().tolist()):
            where[sample, row, 0, down : down + size, across : across + size] = 1
    return where


def noises(given, deviation):
    key, shape = stream(KEY, "infidelity"), given.x.shape[1:]
    return torch.stack(
        [deviation * normal(key, given.indices, sample, shape, torch.device("cpu")) for sample in range(SAMPLES)]
    )


def by_captum(given, attributions, moved, multiply, normalize):
    """captum's infidelity with perturbed inputs [n, B, ...] made beforehand."""

    def perturb(inputs, baselines=None):
        assert len(inputs) == SAMPLES * len(given.x)  # repeated: all samples of the first image come first
        return moved.transpose(0, 1).flatten(0, 1)

    classifier = given.engine.network.classifier
    return captum_infidelity(
        classifier,
        infidelity_perturb_func_decorator(multiply)(perturb),
        given.x,
        attributions,
        target=given.targets,
        n_perturb_samples=SAMPLES,
        normalize=normalize,
    )


@pytest.mark.parametrize("perturbation", ["square", "gaussian"])
@pytest.mark.parametrize("part", ["", "scaled"])
def test_infidelity_equals_captum(given, perturbation, part):
    ours = metric(given, "infidelity", samples=SAMPLES, perturbation=perturbation, size=0.3, deviation=0.3)
    change = squares(given, 5) * given.x if perturbation == "square" else noises(given, 0.3)
    for method in ("saliency", "deeplift", "input-x-gradient"):
        expected = by_captum(given, given.maps[method], given.x - change, method != "saliency", part == "scaled")
        torch.testing.assert_close(ours.measure(given, method)[part], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("perturbation", ["square", "gaussian"])
def test_infidelity_of_a_grid_map_equals_captum(given, perturbation):
    ours = metric(given, "infidelity", samples=SAMPLES, perturbation=perturbation, size=0.3)
    plane = torch.nn.functional.interpolate(given.maps["gradcam"][:, None], size=(16, 16), mode="bilinear")
    if perturbation == "square":  # a pixel's share is spread over its three channels
        expected = by_captum(given, plane.expand(-1, 3, -1, -1) / 3, given.x * (1 - squares(given, 5)), True, False)
    else:
        expected = by_captum(given, plane.expand(-1, 3, -1, -1), given.x - noises(given, 0.2), False, False)
    torch.testing.assert_close(ours.measure(given, "gradcam")[""], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("perturbation", ["square", "gaussian"])
def test_infidelity_of_a_linear_model_is_zero(perturbation):
    weight = torch.rand(3, 3 * 8 * 8, generator=torch.Generator().manual_seed(5))
    given = given_of(linear_classifier(weight, 8), "saliency", "input-x-gradient", "deeplift", pixels=images(3, 8))
    ours = metric(given, "infidelity", samples=4, perturbation=perturbation)
    for method in given.maps:
        size = given.maps[method].square().flatten(1).sum(dim=1)
        assert (ours.measure(given, method)[""] < 1e-6 * size).all()
    assert (ours.measure(with_maps(given, saliency=2 * given.maps["saliency"]), "saliency")[""] > 1e-3).all()


def test_square_over_the_whole_image_asks_for_completeness(given):
    ours = metric(given, "infidelity", samples=1, size=1.0)
    baseline = given.engine.logits(given.engine.baseline)[0]
    rise = given.logits.gather(1, given.targets[:, None])[:, 0] - baseline[given.targets]
    assert (ours.measure(given, "deeplift")[""] < 1e-6 * rise.square()).all()
    missing = given.maps["input-x-gradient"].flatten(1).sum(dim=1) - rise
    torch.testing.assert_close(ours.measure(given, "input-x-gradient")[""], missing.square(), rtol=1e-3, atol=1e-6)


def test_scaled_infidelity_knows_no_unit_and_is_the_least(given):
    ours = metric(given, "infidelity", samples=SAMPLES)
    plain, other = given, with_maps(given, deeplift=-300 * given.maps["deeplift"])
    expected = ours.measure(plain, "deeplift")
    torch.testing.assert_close(ours.measure(replace(other), "deeplift")["scaled"], expected["scaled"])
    for factor in (0.5, 1.0, 1.5):
        scaled = with_maps(given, deeplift=factor * given.maps["deeplift"])
        assert (ours.measure(scaled, "deeplift")[""] >= expected["scaled"] * (1 - 1e-6)).all()


def test_baseline_is_the_engines():
    classifier = vit()
    given = given_of(classifier, "deeplift", deeplift={"baseline": "black"})
    black = preprocess().normalise(torch.zeros(1, 3, 16, 16))
    given.engine.baseline = black
    ours = metric(given, "infidelity", samples=SAMPLES, size=0.3)
    where, full = squares(given, 5), given.maps["deeplift"]
    errors = []
    for part in where:
        moved = torch.where(part > 0, black, given.x)
        change = (given.logits - classifier(moved)).gather(1, given.targets[:, None])[:, 0]
        errors.append(((full * part).flatten(1).sum(dim=1) - change).square())
    torch.testing.assert_close(ours.measure(given, "deeplift")[""], torch.stack(errors).mean(dim=0), rtol=1e-3, atol=0)


# Deletion and insertion


def one_value(given, method):
    """One value a pixel, [B, S, S]."""
    full = given.maps[method]
    if method == "saliency":
        return full.amax(dim=1)
    if method == "gradcam":
        centres, places = np.arange(4) * 4 + 1.5, np.arange(16)
        across = np.apply_along_axis(lambda line: np.interp(places, centres, line), 2, full.double().numpy())
        return torch.from_numpy(np.apply_along_axis(lambda line: np.interp(places, centres, line), 1, across))
    return full.sum(dim=1)


def naive_order(given, method, row):
    """Pixels from the largest value on; equal ones, as at a grid map's edges, by the image's own draws."""
    value = one_value(given, method)[row].flatten().tolist()
    drawn = fractions(stream(KEY, "order"), given.indices, 0, (256,), torch.device("cpu"))[row].tolist()
    return sorted(range(256), key=lambda pixel: (-value[pixel], drawn[pixel]))


def chance(classifier, x, target):
    return torch.softmax(classifier(x[None]), dim=1)[0, target].item()


@pytest.mark.parametrize("name", ["deletion", "insertion"])
@pytest.mark.parametrize("fill", ["mean", "black", "blur"])
def test_pixels_go_one_after_the_other(given, name, fill):
    classifier, steps = given.engine.network.classifier, 5
    ours = metric(given, name, steps=steps, fill=fill, sigma=1.5)
    measured = {method: ours.measure(given, method) for method in METHODS}
    for row, (x, target) in enumerate(zip(given.x, given.targets.tolist(), strict=True)):
        fills = {
            "mean": torch.zeros_like(x),
            "black": preprocess().normalise(torch.zeros(1, 3, 16, 16))[0],
            "blur": torch.from_numpy(gaussian_filter(x.numpy(), (0, 1.5, 1.5), mode="nearest", truncate=10 / 3)),
        }
        for method in METHODS:
            order = naive_order(given, method, row)
            curve = []
            for step in range(steps + 1):
                image, other = (x, fills[fill]) if name == "deletion" else (fills[fill], x)
                image = image.clone()
                for pixel in order[: round(step * 256 / steps)]:
                    image[:, pixel // 16, pixel % 16] = other[:, pixel // 16, pixel % 16]
                curve.append(chance(classifier, image, target))
            shares = [round(step * 256 / steps) / 256 for step in range(steps + 1)]
            np.testing.assert_allclose(measured[method]["curve"][row], curve, atol=2e-5)
            np.testing.assert_allclose(measured[method][""][row], auc(shares, curve), atol=2e-5)


def test_insertion_ends_where_deletion_begins(given):
    deleted = metric(given, "deletion", steps=4, fill="blur").measure(given, "saliency")["curve"]
    inserted = metric(given, "insertion", steps=4).measure(given, "saliency")["curve"]
    own = torch.softmax(given.logits, dim=1).gather(1, given.targets[:, None])[:, 0]
    torch.testing.assert_close(deleted[:, 0], own)
    torch.testing.assert_close(inserted[:, -1], own)
    torch.testing.assert_close(inserted[:, 0], deleted[:, -1])
    apart = metric(given, "deletion", steps=4, score="sigmoid").measure(given, "saliency")["curve"]
    torch.testing.assert_close(apart[:, 0], given.logits.gather(1, given.targets[:, None])[:, 0].sigmoid())
    road = metric(given, "road", percentiles=(0.1,), score="sigmoid").measure(given, "saliency")["morf"]
    torch.testing.assert_close(road[:, 0], apart[:, 0])  # no whole pixel is removed


@pytest.mark.parametrize("sigma", [0.4, 2.0, 5.0])
def test_blur_equals_scipy(sigma):
    x = images(2, 12) * 3 - 1
    reach = int(np.ceil(3 * sigma))
    expected = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", radius=(0, 0, reach, reach))
    np.testing.assert_allclose(blurred(x, sigma), expected, atol=1e-5)


def test_equal_values_come_in_an_order_of_the_images_own(given):
    flat = torch.zeros(4, 3, 16, 16)
    flat[:, :, 8:] = 1.0
    place = ranks(with_maps(given, deeplift=flat), "deeplift").flatten(1)
    assert torch.equal(place.sort(dim=1).values, torch.arange(256).expand(4, -1))
    assert (place[:, 128:] < 128).all() and (place[:, :128] >= 128).all()
    assert len({tuple(row) for row in place.tolist()}) == 4
    natural = torch.arange(128)
    for row in place[:, 128:]:
        assert abs(torch.corrcoef(torch.stack([row, natural]).double())[0, 1]) < 0.4
    # The same images elsewhere in a batch keep their order.
    turned = replace(given, indices=given.indices.flip(0))
    assert torch.equal(ranks(with_maps(turned, deeplift=flat), "deeplift").flatten(1), place.flip(0))


def test_best_order_gives_the_least_area():
    """For a linear model of one class against nothing the map w x ranks pixels perfectly."""
    weight = torch.zeros(2, 3 * 8 * 8)
    weight[0] = torch.rand(192, generator=torch.Generator().manual_seed(6)) - 0.5
    given = given_of(linear_classifier(weight, 8), "input-x-gradient", pixels=images(6, 8))
    given = replace(given, targets=torch.zeros(6, dtype=torch.int64))
    right = given.x * weight[0].view(3, 8, 8)
    for name, sign in (("deletion", 1), ("insertion", -1)):
        ours = metric(given, name, steps=64, fill="mean")
        best = ours.measure(with_maps(given, **{"input-x-gradient": right}), "input-x-gradient")[""]
        for seed in range(3):
            other = torch.randn(right.shape, generator=torch.Generator().manual_seed(seed))
            worse = ours.measure(with_maps(given, **{"input-x-gradient": other}), "input-x-gradient")[""]
            assert (sign * best < sign * worse).all()


def test_probability_by_softmax_and_by_sigmoid():
    logits, targets = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]), torch.tensor([1, 0])
    expected = [np.exp(2) / (np.exp(1) + np.exp(2) + np.exp(0.5)), 1 / (1 + np.exp(-1) + np.exp(3))]
    np.testing.assert_allclose(probability(logits, targets, "softmax"), expected, rtol=1e-6)
    np.testing.assert_allclose(probability(logits, targets, "sigmoid"), [1 / (1 + np.exp(-2)), 0.5], rtol=1e-6)


# ROAD


def dense_imputation(image, removed):
    """Each removed pixel is the weighted mean of its neighbours; solved as it stands, [C, S, S] and [S, S]."""
    side = image.shape[-1]
    system, right = np.eye(side * side), np.zeros((side * side, len(image)))
    for y in range(side):
        for x in range(side):
            if not removed[y, x]:
                right[y * side + x] = image[:, y, x]
                continue
            near = {
                (y + down, x + across): 1 / 6 if down * across == 0 else 1 / 12
                for down in (-1, 0, 1)
                for across in (-1, 0, 1)
                if (down or across) and 0 <= y + down < side and 0 <= x + across < side
            }
            for (ny, nx), weight in near.items():
                system[y * side + x, ny * side + nx] -= weight / sum(near.values())
    return np.linalg.solve(system, right).T.reshape(image.shape)


@pytest.mark.parametrize("share", [0.2, 0.7, 0.97])
def test_imputation_solves_its_equations(share):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 12, 12, generator=generator)
    removed = torch.rand(3, 12, 12, generator=generator) < share
    removed[2] = True
    removed[2, 5, 7] = False  # the one pixel that stays says what all others are
    ours = imputed(x, removed)
    for row in range(3):
        expected = dense_imputation(x[row].double().numpy(), removed[row].numpy())
        np.testing.assert_allclose(ours[row], expected, atol=2e-5)
    assert torch.equal(ours[~removed[:, None].expand_as(x)], x.double()[~removed[:, None].expand_as(x)])
    torch.testing.assert_close(ours[2], x[2, :, 5, 7].double()[:, None, None].expand(2, 12, 12), rtol=0, atol=2e-5)


def test_imputation_of_nothing_and_of_large_holes():
    x = images(2, 48)
    assert torch.equal(imputed(x, torch.zeros(2, 48, 48, dtype=torch.bool)), x.double())
    hole = torch.zeros(2, 48, 48, dtype=torch.bool)
    hole[0, 1:-1, 1:-1] = True
    filled = imputed(x, hole)
    assert torch.equal(filled[1], x[1].double())
    # What is imputed lies between what surrounds it.
    border = x[0].flatten(1)[:, ~hole[0].flatten()]
    assert (filled[0].flatten(1) <= border.amax(1, keepdim=True)).all()
    assert (filled[0].flatten(1) >= border.amin(1, keepdim=True)).all()
    # A plane is its own mean.
    ramp = torch.arange(48.0).expand(1, 1, 48, 48)
    torch.testing.assert_close(imputed(ramp, hole[:1]), ramp.double(), rtol=0, atol=1e-3)


def test_imputation_knows_no_neighbours_in_the_batch():
    x = images(3, 24)
    removed = (
        torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(1))
        < torch.tensor([0.1, 0.5, 0.95])[:, None, None]
    )
    whole = imputed(x, removed)
    for row in range(3):
        torch.testing.assert_close(imputed(x[row : row + 1], removed[row : row + 1])[0], whole[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_road_equals_a_naive_version(given, noise):
    classifier, percentiles = given.engine.network.classifier, (25, 60)
    ours = metric(given, "road", percentiles=percentiles, noise=noise)
    drawn = [
        noise * normal(stream(KEY, "road"), given.indices, number, (3, 16, 16), torch.device("cpu"))
        for number in range(2)
    ]
    for method in ("gradcam", "deeplift"):
        measured = ours.measure(given, method)
        for row in (0, 3):
            x, target = given.x[row], int(given.targets[row])
            order = naive_order(given, method, row)
            expected = {"morf": [], "lerf": [], "morf_kept": [], "lerf_kept": []}
            for number, percentile in enumerate(percentiles):
                for which, sequence in (("morf", order), ("lerf", order[::-1])):
                    removed = np.zeros(256, dtype=bool)
                    removed[sequence[: round(percentile * 2.56)]] = True
                    image = torch.from_numpy(dense_imputation(x.double().numpy(), removed.reshape(16, 16))).float()
                    image = image + drawn[number][row] * torch.from_numpy(removed.reshape(16, 16))
                    expected[which].append(chance(classifier, image, target))
                    expected[f"{which}_kept"].append(float(classifier(image[None]).argmax() == target))
            for part, numbers in expected.items():
                np.testing.assert_allclose(measured[part][row], numbers, atol=5e-5)
            difference = np.mean(np.subtract(expected["lerf"], expected["morf"]))
            np.testing.assert_allclose(measured[""][row], difference, atol=5e-5)


def test_turning_the_map_round_turns_road_round(given):
    ours = metric(given, "road", percentiles=(50,), noise=0.0)
    one = ours.measure(given, "deeplift")
    other = ours.measure(with_maps(given, deeplift=-given.maps["deeplift"]), "deeplift")
    torch.testing.assert_close(one["morf"], other["lerf"])
    torch.testing.assert_close(one[""], -other[""])


def test_one_pixel_always_stays():
    """With more than 255 of 256 pixels to remove, the image becomes the one pixel that is left."""
    given = toy("saliency")
    measured = metric(given, "road", percentiles=(99.9,), noise=0.0).measure(given, "saliency")
    for row in range(4):
        value = one_value(given, "saliency")[row].flatten()
        for part, pixel in (("morf", int(value.argmin())), ("lerf", int(value.argmax()))):
            image = given.x[row, :, pixel // 16, pixel % 16][:, None, None].expand(3, 16, 16)
            expected = chance(given.engine.network.classifier, image, int(given.targets[row]))
            np.testing.assert_allclose(measured[part][row, 0], expected, atol=1e-4)
