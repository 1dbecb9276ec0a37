import pytest
import torch
from captum.metrics import sensitivity_max
from explain_references import (
    CLASSES,
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

from maehpc.errors import InputError, RunError
from maehpc.explain import Explainer, NoiseKey
from maehpc.explain.engine import Engine
from maehpc.explain.explainer import stored
from maehpc.explain.noise import uniform
from maehpc.recipes import MapSettings

KEY = NoiseKey(0, "digits")
PREPROCESS = preprocess()
UNIT = preprocess(side=2, mean=0.0)
PIXELS = images(6)
INDICES = torch.tensor([3, 14, 15, 92, 65, 35])
LABELS = torch.tensor([4, 3, 2, 1, 0, 4])
SAMPLES = 4
METHODS = Engine(vit(), explain_settings(), PREPROCESS.normalise(PIXELS[:1])).methods


def explain(classifier, pixels=PIXELS, indices=INDICES, labels=LABELS, preprocess=PREPROCESS, methods=(), **settings):
    settings = {"sensitivity": {"samples": SAMPLES}} | settings
    explainer = Explainer(classifier, explain_settings(*methods, **settings), preprocess, KEY)
    return explainer.explain(pixels, indices, labels)


@pytest.mark.parametrize("representation", ["cls", "mean"])
def test_sensitivity_equals_captum_with_the_same_noise(representation):
    classifier = vit(representation).double()
    x = PREPROCESS.normalise(PIXELS.double())
    explanation = explain(classifier, PIXELS.double(), sensitivity={"samples": SAMPLES, "radius": 0.1})
    noise = [uniform(KEY, INDICES, sample, x.shape[1:], 0.1, "cpu") for sample in range(SAMPLES)]
    references = {
        "saliency": captum_saliency(classifier),
        "gradcam": captum_gradcam(classifier, "blocks.1.norm1"),
        "deeplift-captum": captum_deeplift(classifier),
    }
    for method, reference in references.items():
        theirs = sensitivity_max(
            lambda inputs, target, reference=reference: (
                reference(inputs[0] if isinstance(inputs, tuple) else inputs, target),
            ),
            x,
            perturb_func=lambda repeated: repeated + torch.stack(noise, dim=1).flatten(0, 1),
            n_perturb_samples=SAMPLES,
            target=explanation.target,
        )
        assert theirs.min() > 0
        torch.testing.assert_close(explanation.sensitivity[method].amax(dim=1), theirs, rtol=1e-9, atol=0)


def test_linear_model():
    """Saliency does not move; DeepLIFT moves by ||w * delta|| / ||w * x||."""
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    pixels = images(6, side=2)
    explanation = explain(linear_classifier(weight, 2), pixels, preprocess=UNIT, methods=("saliency", "deeplift"))
    assert not explanation.sensitivity["saliency"].any()
    explained = weight[explanation.target].reshape(6, 3, 2, 2)
    for sample in range(SAMPLES):
        noise = uniform(KEY, INDICES, sample, (3, 2, 2), 0.02, "cpu")
        expected = (explained * noise).flatten(1).norm(dim=1) / (explained * pixels).flatten(1).norm(dim=1)
        torch.testing.assert_close(explanation.sensitivity["deeplift"][:, sample], expected, rtol=1e-4, atol=1e-7)


def test_quadratic_model():
    """The gradient of x'Ax/2 moves by ||A delta|| / ||A x||; it is positive here, so its magnitude does too."""
    root = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)).double()
    matrix, pixels = root @ root.T, 0.5 + images(6, side=2).double()
    explanation = explain(quadratic_classifier(matrix, 2), pixels, preprocess=UNIT, methods=("saliency",))
    for sample in range(SAMPLES):
        noise = uniform(KEY, INDICES, sample, (3, 2, 2), 0.02, "cpu").double().flatten(1)
        expected = (noise @ matrix).norm(dim=1) / (pixels.flatten(1) @ matrix).norm(dim=1)
        torch.testing.assert_close(explanation.sensitivity["saliency"][:, sample], expected)


def test_order_and_batch_do_not_matter():
    classifier = vit().double()
    together = explain(classifier, PIXELS.double())
    for rows in (torch.tensor([5, 0, 3, 1, 4, 2]), torch.tensor([4]), torch.tensor([1, 2])):
        part = explain(classifier, PIXELS[rows].double(), INDICES[rows], LABELS[rows])
        assert torch.equal(part.target, together.target[rows])
        assert torch.equal(part.flipped, together.flipped[rows])
        for method in together.maps:
            torch.testing.assert_close(part.maps[method], together.maps[method][rows], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(part.sensitivity[method], together.sensitivity[method][rows], rtol=1e-9, atol=0)


def test_scaling_the_logits_leaves_sensitivity_unchanged():
    classifier = vit("mean", layers=1).double()
    before = explain(classifier, PIXELS.double())
    with torch.no_grad():
        classifier.head.output.weight.mul_(1000)
        classifier.head.output.bias.mul_(1000)
    after = explain(classifier, PIXELS.double())
    for method in before.maps:
        torch.testing.assert_close(after.maps[method], 1000 * before.maps[method], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(after.sensitivity[method], before.sensitivity[method], rtol=1e-9, atol=0)


def test_more_samples_keep_the_first_ones():
    classifier = vit()
    few, many = (explain(classifier, sensitivity={"samples": samples}) for samples in (2, 5))
    for method in few.maps:
        assert torch.equal(many.sensitivity[method][:, :2], few.sensitivity[method])
        assert (many.sensitivity[method].amax(dim=1) >= few.sensitivity[method].amax(dim=1)).all()
    assert torch.equal(many.flipped[:, :2], few.flipped)


def test_flips_are_counted_and_the_target_stays():
    classifier = vit()
    settings = {"samples": SAMPLES, "radius": 1.0}
    explanation = explain(classifier, sensitivity=settings, methods=("saliency",))
    assert 0 < explanation.flipped.float().mean() < 1
    x = PREPROCESS.normalise(PIXELS)
    engine = Engine(classifier, explain_settings("saliency"), x[:1] * 0)
    for sample in range(SAMPLES):
        moved = x + uniform(KEY, INDICES, sample, x.shape[1:], 1.0, "cpu")
        assert torch.equal(explanation.flipped[:, sample], classifier(moved).argmax(dim=1) != explanation.prediction)
        change = (engine.attribute(moved, explanation.target).maps["saliency"] - explanation_map(engine, x)).flatten(1)
        expected = change.norm(dim=1) / explanation_map(engine, x).flatten(1).norm(dim=1)
        torch.testing.assert_close(explanation.sensitivity["saliency"][:, sample], expected)


def explanation_map(engine, x):
    return engine.attribute(x).maps["saliency"]


def test_label_as_target():
    classifier = vit()
    by_label, by_prediction = explain(classifier, target="label"), explain(classifier)
    assert torch.equal(by_label.target, LABELS)
    assert torch.equal(by_prediction.target, by_prediction.prediction)
    assert torch.equal(by_label.prediction, by_prediction.prediction)
    assert not torch.equal(by_label.target, by_prediction.target)
    assert torch.equal(by_label.flipped, by_prediction.flipped)


def test_several_labels_cannot_be_the_target():
    labels = torch.zeros(6, CLASSES, dtype=torch.int64)
    with pytest.raises(InputError, match=r"explain\.target: label.*target: prediction"):
        explain(vit(), labels=labels, target="label")
    assert explain(vit(), labels=labels).target.shape == (6,)


def test_dead_classifier_gives_zero_maps_and_no_numbers():
    classifier = vit()
    with torch.no_grad():
        classifier.head.hidden.bias.fill_(-1e6)
    explanation = explain(classifier, methods=("saliency", "gradcam"))
    for method, changes in explanation.sensitivity.items():
        assert not explanation.maps[method].any()
        assert changes.isnan().all()


def test_black_baseline_is_pixel_zero():
    classifier = vit()
    black = explain(classifier, deeplift={"baseline": "black"}, maps={"channels": "full"})
    x = PREPROCESS.normalise(PIXELS)
    theirs = captum_deeplift(classifier, PREPROCESS.normalise(torch.zeros_like(x[:1])))(x, black.target)
    torch.testing.assert_close(black.maps["deeplift-captum"], theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())
    assert not torch.equal(black.maps["deeplift-captum"], explain(classifier).maps["deeplift-captum"])


def test_reduction_touches_what_is_stored_and_not_the_scores():
    classifier = vit()
    reduced, full = explain(classifier), explain(classifier, maps={"channels": "full"})
    torch.testing.assert_close(reduced.maps["saliency"], full.maps["saliency"].max(dim=1).values)
    torch.testing.assert_close(reduced.maps["deeplift-captum"], full.maps["deeplift-captum"].sum(dim=1))
    assert torch.equal(reduced.maps["gradcam"], full.maps["gradcam"])
    assert reduced.maps["gradcam"].shape == (6, 4, 4)
    for method, changes in reduced.sensitivity.items():
        assert torch.equal(changes, full.sensitivity[method])


def test_half_precision_is_stored_or_refused():
    maps, settings = images(2) - 0.5, MapSettings(dtype="float16", channels="full")
    assert torch.equal(stored(METHODS["deeplift-captum"], maps, settings), maps.half())
    with pytest.raises(RunError, match=r"explain\.maps\.dtype: float16.*saliency.*float32"):
        stored(METHODS["saliency"], 1e6 * maps, settings)


@pytest.mark.parametrize("rows", [1, 4, 5, 12])
def test_fewer_rows_than_images_change_nothing(rows):
    """Where memory holds less than one row of each image of a group."""
    wanted = {"sensitivity": {"samples": SAMPLES, "kinds": ["random", "pgd"], "search": {"steps": 2}}, "batch_size": 6}
    whole = explain(vit().double(), PIXELS.double(), **wanted)
    explainer = Explainer(vit().double(), explain_settings(**wanted), PREPROCESS, KEY)
    explainer._rows = rows
    parts = explainer.explain(PIXELS.double(), INDICES, LABELS)
    assert not explainer.take_warnings()
    for method in METHODS:
        torch.testing.assert_close(parts.maps[method], whole.maps[method], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(parts.sensitivity[method], whole.sensitivity[method], rtol=1e-6, atol=1e-9)
        found = f"{method}_pgd"
        torch.testing.assert_close(parts.searched[found].change, whole.searched[found].change, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(parts.logits, whole.logits)
    assert torch.equal(parts.target, whole.target) and torch.equal(parts.flipped, whole.flipped)


def test_half_precision_that_would_lose_a_whole_map_is_refused():
    settings = MapSettings(dtype="float16", channels="full")
    faint = torch.cat([images(1), 1e-9 * images(1)])
    with pytest.raises(RunError, match=r"float16 turns a saliency map.*zeros.*float32"):
        stored(METHODS["saliency"], faint, settings)
    assert not stored(
        METHODS["saliency"], torch.zeros_like(faint), settings
    ).any()  # a map that is zero is stored as it is


def test_a_perturbation_without_finite_numbers_is_no_zero_map():
    with pytest.raises(RunError, match=r"of image 3, perturbation 0, are not finite"):
        explain(vit(), sensitivity={"samples": 1, "radius": 1e38})


def test_no_samples_leave_sensitivity_empty():
    explanation = explain(vit(), sensitivity={"samples": 0})
    assert explanation.flipped.shape == (6, 0)
    assert all(changes.shape == (6, 0) for changes in explanation.sensitivity.values())


def test_logits_that_are_not_finite_name_the_image():
    pixels = PIXELS.clone()
    pixels[2] = torch.nan
    with pytest.raises(RunError, match="image 15 "):
        explain(vit(), pixels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    here, there = (
        uniform(KEY, INDICES, 1, (3, 16, 16), 0.02, "cpu"),
        uniform(KEY, INDICES, 1, (3, 16, 16), 0.02, "cuda"),
    )
    assert torch.equal(here, there.cpu())
    cpu = explain(vit().double(), PIXELS.double())
    cuda = explain(vit().double().cuda(), PIXELS.double().cuda(), labels=LABELS.cuda())
    for method, maps in cpu.maps.items():
        torch.testing.assert_close(cuda.maps[method].cpu(), maps, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(cuda.sensitivity[method].cpu(), cpu.sensitivity[method], rtol=1e-7, atol=0)
