"""Integrated Gradients and SmoothGrad against captum, closed forms and naive loops."""

import pytest
import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from explain_references import (
    captum_saliency,
    explain_settings,
    images,
    linear_classifier,
    preprocess,
    quadratic_classifier,
    vit,
)

from maehpc import keys
from maehpc.explain.engine import Engine
from maehpc.explain.methods.integrated_gradients import quadrature

X = preprocess().normalise(images(4)).double()
ZERO = torch.zeros_like(X[:1])
BLACK = preprocess().normalise(torch.zeros(1, 3, 16, 16)).double()
TARGETS = torch.tensor([0, 1, 2, 3])


def close(ours, theirs, relative):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * theirs.abs().max().item())


def attribution(name, classifier, x=X, targets=TARGETS, baseline=ZERO, seed=0, **options):
    settings = explain_settings(name, options={name: options})
    return Engine(classifier, settings, baseline.to(x.dtype), seed).attribute(x, targets)


@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [("gauss-legendre", "gausslegendre"), ("midpoint", "riemann_middle"), ("right", "riemann_right")],
)
def test_integrated_gradients_equal_captum(representation, rule, theirs):
    classifier = vit(representation).double()
    ours = attribution("integrated-gradients", classifier, baseline=BLACK, rule=rule, steps=7)
    expected = IntegratedGradients(classifier).attribute(X, BLACK, TARGETS, n_steps=7, method=theirs).detach()
    close(ours.maps["integrated-gradients"], expected, 1e-6)  # captum rounds its nodes to float32


def test_more_steps_come_nearer_to_completeness():
    classifier = vit().double()
    few, many = (attribution("integrated-gradients", classifier, steps=n) for n in (2, 64))
    change = (classifier(X) - classifier(ZERO)).gather(1, TARGETS[:, None])[:, 0].detach()
    total = many.maps["integrated-gradients"].sum((1, 2, 3))
    name = "integrated-gradients"
    torch.testing.assert_close(many.completeness[name], ((total - change) / change).abs())
    assert many.completeness[name].max() < 0.02 < few.completeness[name].median()


def test_integrated_gradients_of_a_quadratic_model_are_exact_with_one_step():
    """f = x'Ax/2: the gradient is linear along the way, so its middle is its mean, A x/2."""
    root = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)).double()
    x = images(4, side=2).double()
    for rule in ("gauss-legendre", "midpoint"):
        ours = attribution(
            "integrated-gradients",
            quadratic_classifier(root @ root.T, 2),
            x,
            TARGETS * 0,
            x[:1] * 0,
            rule=rule,
            steps=1,
        )
        expected = x * (x.flatten(1) @ (root @ root.T) / 2).reshape(x.shape)
        torch.testing.assert_close(ours.maps["integrated-gradients"], expected)
        assert ours.completeness["integrated-gradients"].max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadrature_is_exact_for_polynomials_of_its_order(steps):
    for rule, degree in (("gauss-legendre", 2 * steps - 1), ("midpoint", 1), ("right", 0)):
        nodes, weights = quadrature(rule, steps)
        assert len(nodes) == len(weights) == steps
        for power in range(degree + 2):
            mean = sum(weight * node**power for node, weight in zip(nodes, weights, strict=True))
            assert (abs(mean - 1 / (power + 1)) < 1e-12) == (power <= degree)


def draw(seed, count):
    return [
        torch.randn(1, 3, 16, 16, generator=keys.generator(seed, "smoothgrad", sample), dtype=torch.float64)
        for sample in range(count)
    ]


@pytest.mark.parametrize("representation", ["cls", "mean"])
def test_smoothgrad_equals_captum_given_the_same_noise(representation, monkeypatch):
    classifier = vit(representation).double()
    ours = attribution("smoothgrad", classifier, seed=5, samples=4, noise=0.3).maps["smoothgrad"]
    monkeypatch.setattr(torch, "normal", lambda mean, deviation: mean + torch.cat(draw(5, 4)) * deviation)
    tunnel = NoiseTunnel(Saliency(classifier))
    for row in range(len(X)):
        image = X[row : row + 1]
        spread = (image.max() - image.min()).item()
        theirs = tunnel.attribute(image, nt_samples=4, stdevs=0.3 * spread, target=int(TARGETS[row]), abs=False)
        close(ours[row : row + 1], theirs.detach().abs(), 1e-6)  # captum's deviation is a float32


def test_smoothgrad_without_noise_is_saliency():
    classifier = vit().double()
    saliency = captum_saliency(classifier)(X, TARGETS)
    close(attribution("smoothgrad", classifier, samples=2, noise=0.0).maps["smoothgrad"], saliency, 1e-12)
    noisy = attribution("smoothgrad", classifier, samples=2).maps["smoothgrad"]
    assert (noisy - saliency).abs().max() > 0.05 * saliency.max()


def test_smoothgrad_of_a_quadratic_model():
    """The gradient A x is linear, so its mean moves by A times the mean noise."""
    root = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)).double()
    matrix, x = root @ root.T, images(4, side=2).double()
    ours = attribution("smoothgrad", quadratic_classifier(matrix, 2), x, TARGETS * 0, x[:1] * 0, samples=3, noise=0.2)
    noise = torch.stack(
        [
            torch.randn(1, 3, 2, 2, generator=keys.generator(0, "smoothgrad", sample), dtype=torch.float64)
            for sample in range(3)
        ]
    ).mean(dim=0)
    spread = (x.flatten(1).amax(1) - x.flatten(1).amin(1))[:, None, None, None]
    moved = x + 0.2 * spread * noise
    torch.testing.assert_close(ours.maps["smoothgrad"], (moved.flatten(1) @ matrix).abs().reshape(x.shape))


def test_a_constant_image_has_no_range_and_gets_no_noise():
    classifier = vit().double()
    x = torch.full((1, 3, 16, 16), 0.3).double()
    ours = attribution("smoothgrad", classifier, x, TARGETS[:1], samples=2).maps["smoothgrad"]
    close(ours, captum_saliency(classifier)(x, TARGETS[:1]), 1e-12)


def test_linear_model():
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).double()
    x, baseline = images(4, side=2).double(), images(1, side=2, seed=9).double()
    explained = weight[TARGETS].reshape(x.shape)
    classifier = linear_classifier(weight, 2)
    smooth = attribution("smoothgrad", classifier, x, baseline=baseline, samples=2)
    torch.testing.assert_close(smooth.maps["smoothgrad"], explained.abs())
    path = attribution("integrated-gradients", classifier, x, baseline=baseline, steps=2)
    torch.testing.assert_close(path.maps["integrated-gradients"], explained * (x - baseline))
