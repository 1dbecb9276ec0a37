import itertools

import pytest
import torch
from explain_references import (
    captum_deeplift,
    captum_gradcam,
    captum_saliency,
    explain_settings,
    images,
    linear_classifier,
    preprocess,
    quadratic_classifier,
    vit,
)
from torch import nn

from maehpc.errors import InputError
from maehpc.explain.engine import Engine
from maehpc.recipes import EncoderSettings

X = preprocess().normalise(images(6))
METHODS = ("saliency", "gradcam", "deeplift", "deeplift-captum")
ZERO = torch.zeros_like(X[:1])
BLACK = preprocess().normalise(ZERO)
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])


def close(ours, theirs, relative):
    """Every element within `relative` of the largest."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * theirs.abs().max().item())


@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize(("layers", "activation"), [(2, "relu"), (2, "gelu"), (1, "relu")])
@pytest.mark.parametrize("baseline", [ZERO, BLACK], ids=["mean", "black"])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_equals_captum(representation, layers, activation, baseline, dtype, relative):
    classifier = vit(representation, activation, layers).to(dtype)
    x, baseline = X.to(dtype), baseline.to(dtype)
    attribution = Engine(classifier, explain_settings(), baseline).attribute(x, TARGETS)
    close(attribution.maps["saliency"], captum_saliency(classifier)(x, TARGETS), relative)
    close(attribution.maps["gradcam"], captum_gradcam(classifier, "blocks.1.norm1")(x, TARGETS), relative)
    close(attribution.maps["deeplift-captum"], captum_deeplift(classifier, baseline)(x, TARGETS), relative)
    close(attribution.logits, classifier(x).detach(), relative)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "representation"),
    [
        ("vit_tiny_patch16_224", 32, "cls"),
        ("eva02_tiny_patch14_224", 28, "mean"),
        ("beit_base_patch16_224", 32, "mean"),
        ("vit_small_patch14_reg4_dinov2", 28, "cls"),
    ],
)
def test_equals_captum_on_timm_families(name, side, representation):
    classifier = vit(
        representation, encoder=EncoderSettings(name=f"timm:{name}", weights="scratch"), side=side
    ).double()
    x, targets = preprocess().normalise(images(2, side)).double(), torch.tensor([3, 1])
    settings = explain_settings(gradcam={"layer": "blocks.-1.norm1"})
    attribution = Engine(classifier, settings, torch.zeros_like(x[:1])).attribute(x, targets)
    assert attribution.completeness["deeplift"].max() < 1e-9
    close(attribution.maps["saliency"], captum_saliency(classifier)(x, targets), 1e-10)
    close(attribution.maps["gradcam"], captum_gradcam(classifier, "blocks.11.norm1")(x, targets), 1e-10)
    close(attribution.maps["deeplift-captum"], captum_deeplift(classifier)(x, targets), 1e-10)


def test_relu_rule_matters_here():
    """The classifiers above tell the rescale rule from the gradient, so equality with captum says something."""
    attribution = Engine(vit(), explain_settings(), ZERO).attribute(X, TARGETS)
    product = attribution.maps["saliency"] * X.abs()
    assert (attribution.maps["deeplift-captum"].abs() - product).abs().max() > 0.1 * product.max()


def test_linear_model():
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    x, targets = images(4, side=2), torch.tensor([2, 0, 1, 1])
    settings = explain_settings("saliency", "input-x-gradient", "deeplift", "deeplift-captum")
    attribution = Engine(linear_classifier(weight, 2), settings, ZERO[..., :2, :2]).attribute(x, targets)
    explained = weight[targets].reshape(4, 3, 2, 2)
    torch.testing.assert_close(attribution.maps["saliency"], explained.abs())
    for method in ("input-x-gradient", "deeplift", "deeplift-captum"):
        torch.testing.assert_close(attribution.maps[method], explained * x)
    for method in ("deeplift", "deeplift-captum"):
        assert attribution.completeness[method].max() < 1e-5
    assert set(attribution.completeness) == {"deeplift", "deeplift-captum"}


def test_quadratic_model():
    """f = x'Ax/2: the gradient is Ax, and gradient times input counts every product twice: error 1.

    By the midpoints of both factors every product is shared out, half of it to either factor's pixel.
    """
    root = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)).double()
    matrix, x = root @ root.T, images(4, side=2).double()
    engine = Engine(
        quadratic_classifier(matrix, 2), explain_settings("saliency", "deeplift", "deeplift-captum"), x[:1] * 0
    )
    attribution = engine.attribute(x, torch.zeros(4, dtype=torch.int64))
    gradient = (x.flatten(1) @ matrix).reshape(x.shape)
    torch.testing.assert_close(attribution.maps["saliency"], gradient)
    torch.testing.assert_close(attribution.maps["deeplift-captum"], gradient * x)
    torch.testing.assert_close(attribution.completeness["deeplift-captum"], torch.ones(4).double())
    torch.testing.assert_close(attribution.maps["deeplift"], gradient * x / 2)
    assert attribution.completeness["deeplift"].max() < 1e-12


def test_inputs_are_measured_from_the_baseline():
    classifier, x, baseline = vit().double(), X.double(), BLACK.double()
    settings = explain_settings("saliency", "input-x-gradient")
    attribution = Engine(classifier, settings, baseline).attribute(x, TARGETS)
    plain = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(plain).gather(1, TARGETS[:, None]).sum(), plain)
    close(attribution.maps["input-x-gradient"], (x - baseline) * gradient, 1e-12)


def test_completeness_by_its_definition():
    classifier = vit().double()
    x = X.double()
    settings = explain_settings("deeplift", "deeplift-captum")
    attribution = Engine(classifier, settings, BLACK.double()).attribute(x, TARGETS)
    for row, target in enumerate(TARGETS):
        change = classifier(x[row : row + 1])[0, target] - classifier(BLACK.double())[0, target]
        error = (attribution.maps["deeplift-captum"][row].sum() - change).abs() / change.abs()
        torch.testing.assert_close(attribution.completeness["deeplift-captum"][row], error.detach())
        assert abs(attribution.maps["deeplift"][row].sum() - change) < 1e-12
        assert attribution.completeness["deeplift"][row] < 1e-9


@pytest.mark.parametrize("methods", [m for n in (1, 2, 4) for m in itertools.permutations(METHODS, n)])
def test_each_method_alone_or_in_any_company(methods):
    classifier = vit()
    everything = Engine(classifier, explain_settings(), ZERO).attribute(X, TARGETS)
    attribution = Engine(classifier, explain_settings(*methods), ZERO).attribute(X, TARGETS)
    assert tuple(attribution.maps) == methods
    for method in methods:
        close(attribution.maps[method], everything.maps[method], 1e-5)
        assert not attribution.maps[method].requires_grad


def test_prediction_is_the_default_target():
    engine = Engine(vit(), explain_settings("saliency"), ZERO)
    default = engine.attribute(X)
    assert torch.equal(default.targets, default.logits.argmax(dim=1))
    assert torch.equal(default.maps["saliency"], engine.attribute(X, default.targets).maps["saliency"])


def test_neighbours_do_not_matter():
    engine = Engine(vit().double(), explain_settings(), ZERO.double())
    together = engine.attribute(X.double(), TARGETS)
    order = torch.tensor([4, 2])
    pair = engine.attribute(X[order].double(), TARGETS[order])
    for method, maps in together.maps.items():
        close(pair.maps[method], maps[order], 1e-12)


def test_rows_of_one_image_share_its_prediction():
    engine = Engine(vit(), explain_settings("saliency"), ZERO)
    alone = engine.attribute(X[::3])
    together = engine.attribute(X, rows=3)
    assert not torch.equal(engine.attribute(X).targets, alone.targets.repeat_interleave(3))
    assert torch.equal(together.targets, alone.targets.repeat_interleave(3))
    close(together.maps["saliency"], engine.attribute(X, together.targets).maps["saliency"], 1e-6)


def test_same_batch_gives_the_same_bits():
    first, second = (Engine(vit(), explain_settings(), ZERO).attribute(X, TARGETS) for _ in range(2))
    for method, maps in first.maps.items():
        assert torch.equal(maps, second.maps[method])


def test_works_without_grad_mode_and_leaves_inputs_alone():
    x = X.clone()
    engine = Engine(vit().train(), explain_settings(), ZERO)
    with torch.no_grad():
        attribution = engine.attribute(x, TARGETS)
    assert not x.requires_grad
    assert torch.equal(x, X)
    assert torch.equal(attribution.maps["saliency"], engine.attribute(X, TARGETS).maps["saliency"])


def test_freezes_the_classifier():
    classifier = vit().train()
    Engine(classifier, explain_settings(), ZERO)
    assert not classifier.training
    assert not any(weight.requires_grad for weight in classifier.parameters())


def test_refuses_an_encoder_that_captum_treats_by_rules():
    classifier = vit()
    classifier.encoder.blocks[1].mlp.act = nn.ReLU()
    with pytest.raises(InputError, match=r"deeplift-captum.*blocks\.1\.mlp\.act"):
        Engine(classifier, explain_settings(), ZERO)
    attribution = Engine(classifier, explain_settings("saliency", "gradcam", "deeplift"), ZERO).attribute(X)
    assert attribution.completeness["deeplift"].max() < 1e-4


def test_refuses_a_head_that_captum_treats_by_a_rule_over_the_batch():
    classifier = vit()
    classifier.head.activation = nn.Softmax(-1)
    with pytest.raises(
        InputError, match=r"deeplift-captum.*captum's rule for Softmax mixes.*leave deeplift-captum out"
    ):
        Engine(classifier, explain_settings("deeplift-captum"), ZERO)
    attribution = Engine(classifier, explain_settings("deeplift"), ZERO).attribute(X)
    assert attribution.completeness["deeplift"].max() < 1e-4


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_baseline_is_the_same_on_any_number_of_threads(threads):
    """A worker with a part of the cores computes what a process with all of them does."""
    encoder = EncoderSettings(name="vit-tiny", patch_size=4, width=64, depth=2, heads=4, weights="scratch")
    classifier, settings = vit(encoder=encoder), explain_settings("deeplift")
    baseline, before = torch.zeros(1, 3, 16, 16), torch.get_num_threads()

    def kept():
        values = Engine(classifier, settings, baseline)._references.tape.baseline
        return [value.clone() for one in values for value in one.values()]

    ours = kept()
    try:
        torch.set_num_threads(threads)
        theirs = kept()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
