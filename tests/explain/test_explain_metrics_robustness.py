"""Local Lipschitz estimate against captum and naive loops; model randomisation against scipy and scikit-image."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.metrics import sensitivity_max
from explain_metric_cases import KEY, given_of, metric, toy, with_maps
from explain_references import (
    captum_deeplift,
    captum_gradcam,
    captum_saliency,
    images,
    linear_classifier,
    preprocess,
    quadratic_classifier,
    vit,
)
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from maehpc.explain.metrics.shared.first_weights import drawn_anew, parts, randomised
from maehpc.explain.metrics.shared.ssim import ssim
from maehpc.explain.noise import uniform
from maehpc.explain.sensitivity import perturbed
from maehpc.models.positions import sincos_positions

METHODS = ("saliency", "gradcam", "deeplift-captum")


@pytest.fixture(scope="module")
def given():
    return toy(*METHODS)


def moved(given, sample):
    """Normalised image under the noise that sensitivity draws."""
    settings = given.settings.sensitivity
    noise = uniform(KEY, given.indices, sample, given.pixels.shape[1:], settings.radius, "cpu")
    return perturbed(given.pixels, noise, settings, given.preprocess)


# Local Lipschitz estimate


def by_captum(given, explain, other):
    """captum's max sensitivity with one perturbed input made beforehand."""

    def explained(inputs):
        (x,) = inputs if isinstance(inputs, tuple) else (inputs,)
        return (explain(x, given.targets),)

    return sensitivity_max(explained, given.x, perturb_func=lambda inputs, radius: (other,), n_perturb_samples=1)


@pytest.mark.parametrize("space", [{}, {"space": "pixel", "clip": True, "radius": 0.1}])
def test_lipschitz_equals_captums_sensitivity_in_other_units(space):
    """max ||change|| / ||d|| for one sample is captum's max ||change|| / ||map|| times ||map|| / ||d||."""
    classifier = vit()
    given = given_of(classifier, *METHODS, sensitivity=space)
    ours = metric(given, "lipschitz", samples=2)
    explainers = {
        "saliency": captum_saliency(classifier),
        "gradcam": captum_gradcam(classifier, "blocks.-1.norm1"),
        "deeplift-captum": captum_deeplift(classifier),
    }
    for method, explain in explainers.items():
        measured = ours.measure(given, method)
        for sample in range(2):
            other = moved(given, sample)
            change = by_captum(given, explain, other)
            expected = change * given.maps[method].flatten(1).norm(dim=1) / (other - given.x).flatten(1).norm(dim=1)
            torch.testing.assert_close(measured["samples"][:, sample], expected, rtol=1e-3, atol=1e-5)
        assert torch.equal(measured[""], measured["samples"].amax(dim=1))


def test_lipschitz_in_closed_form():
    matrix = torch.randn(48, 48, generator=torch.Generator().manual_seed(2))
    matrix = matrix + matrix.T
    processing = preprocess(4, mean=0.0)
    given = given_of(quadratic_classifier(matrix, 4), "saliency", pixels=images(3, 4), processing=processing)
    expected = []
    for sample in range(4):
        other = moved(given, sample)
        change = (other.flatten(1) @ matrix).abs() - (given.x.flatten(1) @ matrix).abs()
        expected.append(change.norm(dim=1) / (other - given.x).flatten(1).norm(dim=1))
    measured = metric(given, "lipschitz", samples=4).measure(given, "saliency")
    torch.testing.assert_close(measured["samples"], torch.stack(expected, dim=1), rtol=1e-3, atol=0)


def test_lipschitz_of_a_linear_model():
    weight = torch.rand(3, 3 * 8 * 8, generator=torch.Generator().manual_seed(5)) + 0.1
    given = given_of(linear_classifier(weight, 8), "saliency", "input-x-gradient", pixels=images(3, 8))
    ours = metric(given, "lipschitz", samples=3)
    assert (ours.measure(given, "saliency")[""] < 1e-5).all()
    for sample in range(3):
        d = (moved(given, sample) - given.x).flatten(1)
        expected = (weight[given.targets] * d).norm(dim=1) / d.norm(dim=1)
        measured = ours.measure(given, "input-x-gradient")["samples"][:, sample]
        torch.testing.assert_close(measured, expected, rtol=1e-4, atol=0)


def test_changes_that_sensitivity_measured_are_not_computed_again(given, monkeypatch):
    ours = metric(given, "lipschitz", samples=2)
    changes = {}
    for method in METHODS:
        others = [given.engine.attribute(moved(given, sample), given.targets).maps[method] for sample in range(3)]
        lengths = [(other - given.maps[method]).flatten(1).norm(dim=1) for other in others]
        changes[method] = torch.stack(lengths, dim=1) / given.maps[method].flatten(1).norm(dim=1)[:, None]
    expected = {method: ours.measure(given, method) for method in METHODS}
    known = replace(given, changes=changes)
    monkeypatch.setattr(type(given.engine), "attribute", lambda *_: pytest.fail("computed again"))
    for method in METHODS:
        for part, values in ours.measure(known, method).items():
            torch.testing.assert_close(values, expected[method][part], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("why", ["too few", "another norm"])
def test_other_changes_do_not_serve(given, why):
    ours = metric(given, "lipschitz", samples=2)
    wrong = {method: torch.full((4, 1 if why == "too few" else 2), 99.0) for method in METHODS}
    batch = replace(given, changes=wrong)
    if why == "another norm":
        sensitivity = given.settings.sensitivity.model_copy(update={"norm": "l1"})
        batch = replace(batch, settings=given.settings.model_copy(update={"sensitivity": sensitivity}))
    assert torch.equal(ours.measure(batch, "saliency")[""], ours.measure(given, "saliency")[""])


# Model randomisation


def test_parts_go_from_the_output_to_the_input():
    assert parts(vit()) == ("head", "blocks.1", "blocks.0", "embedding")
    assert parts(linear_classifier(torch.ones(2, 48), 4)) == ("head",)


def test_first_weights_are_those_of_an_untrained_model():
    classifier = vit()
    fresh = drawn_anew(classifier, 3)
    assert set(fresh) == {name for name, _ in classifier.named_parameters()}
    for name, value in fresh.items():
        trained = classifier.get_parameter(name)
        assert value.shape == trained.shape
        assert value.dtype == trained.dtype
        if name.startswith("head"):
            bound = classifier.get_parameter(name.rpartition(".")[0] + ".weight").shape[1] ** -0.5
            assert 0.6 * bound < value.abs().max() <= bound
        elif name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        elif value.ndim == 3:
            assert 0.01 < value.std() < 0.03
        else:
            bound = (6 / (value.shape[0] + value[0].numel())) ** 0.5
            assert 0.95 * bound < value.abs().max() <= bound
    for layer in ("attn.qkv", "mlp.fc1"):
        one, two = (fresh[f"encoder.blocks.{block}.{layer}.weight"] for block in (0, 1))
        assert not torch.equal(one, two)
    again, other = drawn_anew(vit(seed=9), 3), drawn_anew(classifier, 4)
    for name, value in fresh.items():
        assert torch.equal(again[name], value), "the trained weights decide nothing"
        if value.unique().numel() > 1:
            assert not torch.equal(other[name], value)


def test_fixed_positions_stay():
    classifier = vit()
    with torch.no_grad():
        classifier.encoder.pos_embed.copy_(sincos_positions(32, (4, 4)))
    fresh = drawn_anew(classifier, 3)
    torch.testing.assert_close(fresh["encoder.pos_embed"], sincos_positions(32, (4, 4)))
    assert not torch.equal(fresh["encoder.cls_token"], classifier.encoder.cls_token)


def test_only_the_chosen_parts_are_random_and_nothing_is_copied_twice():
    classifier = vit()
    before = copy.deepcopy(classifier.state_dict())
    fresh = drawn_anew(classifier, 3)
    some = randomised(classifier, fresh, {"head", "blocks.0"})
    for name, value in some.named_parameters():
        chosen = name.startswith(("head", "encoder.norm", "encoder.blocks.0"))
        assert value.data_ptr() == (fresh[name] if chosen else classifier.get_parameter(name)).data_ptr()
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, before[name])
    assert some.head is not classifier.head


def reference_maps(given, chosen):
    """captum's maps of a copy whose chosen weights are loaded one by one."""
    trained = given.engine.network.classifier
    fresh = drawn_anew(trained, KEY.seed)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        for name, value in other.named_parameters():
            if name.startswith(chosen):
                value.copy_(fresh[name])
    return {
        "saliency": captum_saliency(other)(given.x, given.targets),
        "gradcam": captum_gradcam(other, "blocks.-1.norm1")(given.x, given.targets),
        "deeplift-captum": captum_deeplift(other)(given.x, given.targets),
    }


def pixel_values(method, full):
    if method == "gradcam":
        return full
    return full.amax(dim=1) if method == "saliency" else full.sum(dim=1)


def compared(method, full, other):
    """Spearman, of magnitudes, and SSIM of two maps by scipy and scikit-image."""
    one, two = pixel_values(method, full[None])[0], pixel_values(method, other[None])[0]
    correlation = spearmanr(one.flatten(), two.flatten()).statistic
    absolute = spearmanr(one.abs().flatten(), two.abs().flatten()).statistic
    planes = []
    for values in (one, two):
        if method == "gradcam":
            values = torch.nn.functional.interpolate(values[None, None], size=(16, 16), mode="bilinear")[0, 0]
        planes.append((values / values.abs().max()).double().numpy())
    span = 1.0 if method == "saliency" else 2.0
    return correlation, absolute, structural_similarity(*planes, data_range=span)


def test_whole_randomisation_equals_scipy_and_scikit_image(given):
    ours = metric(given, "randomisation")
    others = reference_maps(given, ("encoder", "head"))
    for method in METHODS:
        measured = ours.measure(given, method)
        assert set(measured) == {"", "absolute", "ssim"}
        for row in range(4):
            expected = compared(method, given.maps[method][row], others[method][row])
            got = [measured[part][row] for part in ("", "absolute", "ssim")]
            np.testing.assert_allclose(got, expected, atol=2e-3)


STEPS = {
    "cascading": [
        ("head", "encoder.norm"),
        ("head", "encoder.norm", "encoder.blocks.1"),
        ("head", "encoder.norm", "encoder.blocks"),
        ("head", "encoder"),
    ],
    "independent": [
        ("head", "encoder.norm"),
        ("encoder.blocks.1",),
        ("encoder.blocks.0",),
        ("encoder.patch_embed", "encoder.cls_token", "encoder.pos_embed"),
    ],
}


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_layer_by_layer(given, order):
    ours = metric(given, "randomisation", order=order)
    steps = [reference_maps(given, chosen) for chosen in STEPS[order]]
    for method in METHODS:
        measured = ours.measure(given, method)
        by_part = torch.stack([measured[part] for part in ("by_part", "absolute_by_part", "ssim_by_part")], dim=-1)
        for row in range(4):
            expected = [compared(method, given.maps[method][row], maps[method][row]) for maps in steps]
            np.testing.assert_allclose(by_part[row], expected, atol=2e-3)
        own = measured["by_part"][:, -1] if order == "cascading" else measured["by_part"].mean(dim=1)
        torch.testing.assert_close(measured[""], own)
    assert ours.coordinates() == {"randomisation_part": ("head", "blocks.1", "blocks.0", "embedding")}


def test_networks_are_made_once_and_late(given):
    ours = metric(given, "randomisation")
    assert not ours._engines
    ours.measure(replace(given), "saliency")
    (engine,) = ours._engines.values()
    ours.measure(replace(given), "saliency")
    assert list(ours._engines.values()) == [engine]


def test_a_map_that_ignores_the_classifier_is_found_out(given):
    """The random network's own maps: correlation 1, as for a method that looks at the image alone."""
    other = reference_maps(given, ("encoder", "head"))
    measured = metric(given, "randomisation").measure(with_maps(given, **other), "deeplift-captum")
    torch.testing.assert_close(measured[""], torch.ones(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(measured["ssim"], torch.ones(4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", [4, 7, 16])
def test_ssim_equals_scikit_image(side):
    generator = torch.Generator().manual_seed(4)
    one, noise = (torch.rand(3, side, side, generator=generator) for _ in range(2))
    other = 0.6 * one + 0.4 * noise
    window = min(7, side - 1 + side % 2)
    for span in (1.0, 2.0):
        for row in range(3):
            expected = structural_similarity(
                one[row].double().numpy(), other[row].double().numpy(), data_range=span, win_size=window
            )
            assert ssim(one, other, span)[row].item() == pytest.approx(expected, abs=1e-7)
    assert torch.allclose(ssim(one, one, 1.0), torch.ones(3, dtype=torch.float64))
