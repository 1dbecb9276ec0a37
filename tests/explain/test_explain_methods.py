"""What holds for every method: its file, its options, its neighbours, its graph."""

import ast
import gc
from pathlib import Path

import pytest
import torch
from explain_families import CASES, family
from explain_references import ToyEncoder, explain_settings, images, linear, preprocess, vit
from torch import nn

from maehpc.errors import InputError
from maehpc.explain import methods
from maehpc.explain.engine import Engine
from maehpc.explain.methods import method_class
from maehpc.explain.rules.tape import AttentionSeen
from maehpc.models import Classifier, grid_size
from maehpc.recipes import EncoderSettings
from maehpc.recipes.plugins import METHODS

X = preprocess().normalise(images(6)).double()
ZERO = torch.zeros_like(X[:1])
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])
FAST = {
    "integrated-gradients": {"steps": 3},
    "smoothgrad": {"samples": 3},
    "occlusion": {"size": 8, "stride": 4},
    "rise": {"masks": 12, "grid": 3},
}
DIFFERENTIABLE = [name for name in METHODS if method_class(name).differentiable]


def engine(*names, representation="cls", dtype=torch.float64, classifier=None, seed=0):
    options = {name: FAST[name] for name in names if name in FAST}
    classifier = vit(representation) if classifier is None else classifier
    settings = explain_settings(*names, options=options)
    return Engine(classifier.to(dtype), settings, ZERO.to(dtype), seed)


def close(ours, theirs, relative):
    """Every element within `relative` of the largest."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * theirs.abs().max().item())


def test_the_methods_users_expect_are_there():
    assert set(METHODS) >= {
        *("saliency", "input-x-gradient", "gradcam", "gradcam-plus-plus", "deeplift", "deeplift-captum"),
        *("integrated-gradients", "smoothgrad", "rollout", "chefer", "attnlrp", "occlusion", "rise"),
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_file_is_a_method_that_says_what_it_is(name):
    kind = method_class(name)
    assert kind.name == name
    assert kind.title
    assert kind.source
    assert kind.kind in ("pixels", "plane", "grid")
    assert kind.over_channels in ("largest", "sum")
    assert kind.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_facts_are_literals_which_can_be_read_without_pytorch(name):
    path = Path(methods.__file__).parent / f"{name.replace('-', '_')}.py"
    (found,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
    facts = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in found.body
        if isinstance(statement, ast.Assign) and statement.targets[0].id not in ("needs",)
    }
    kind = method_class(name)
    assert {"title", "source"} <= set(facts)
    assert facts == {fact: getattr(kind, fact) for fact in facts}
    inherited = {"kind": "pixels", "signed": True, "over_channels": "sum", "complete": False, "differentiable": False}
    assert {**inherited, **facts}.items() >= {fact: getattr(kind, fact) for fact in inherited}.items()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"smoothgrad": {"sigma": 1}}, r"explain\.options\.smoothgrad\.sigma: .*options of smoothgrad: samples, noise"),
        ({"smoothgrad": {"samples": 0}}, r"explain\.options\.smoothgrad\.samples: input should be greater than 0"),
        ({"rollout": {"discard": 0.9}}, r"explain\.options\.rollout\.discard: .*options of rollout: none"),
        ({"rise": {"keep": 1.0}}, r"explain\.options\.rise\.keep: input should be less than 1"),
        ({"rise": {"grid": 17}}, r"explain\.options\.rise\.grid: .*17 cells.*16 pixels"),
        ({"occlusion": {"size": 17}}, r"explain\.options\.occlusion\.size: .*17 pixels.*image of 16"),
        ({"occlusion": {"size": 2, "stride": 3}}, r"explain\.options\.occlusion\.stride: 3 pixels.*at most 2"),
        ({"occlusion": {"stride": 5}}, r"explain\.options\.occlusion\.stride: 5 pixels.*window of 4.*at most 4"),
        ({"integrated-gradients": {"rule": "simpson"}}, r"explain\.options\.integrated-gradients\.rule: .*'midpoint'"),
    ],
)
def test_wrong_options_are_told_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence) as told:
        Engine(vit(), explain_settings(*options, options=options), ZERO.float())
    assert "\n" not in str(told.value)


def test_options_of_a_method_that_is_not_asked_for():
    with pytest.raises(InputError, match=r"explain\.options\.smoothgrad: .*none of explain\.methods"):
        Engine(vit(), explain_settings("saliency", options={"smoothgrad": {}}), ZERO.float())


@pytest.mark.parametrize("representation", ["cls", "mean"])
def test_shapes_signs_and_independence_of_neighbours(representation):
    everything = engine(*METHODS, representation=representation)
    together = everything.attribute(X, TARGETS)
    order = torch.tensor([4, 2])
    pair = everything.attribute(X[order], TARGETS[order])
    for name, maps in together.maps.items():
        assert (
            maps.shape == {"pixels": (6, 3, 16, 16), "plane": (6, 16, 16), "grid": (6, 4, 4)}[method_class(name).kind]
        )
        assert not maps.requires_grad
        assert maps.flatten(1).any(dim=1).all(), name
        assert method_class(name).signed or (maps >= 0).all(), name
        close(pair.maps[name], maps[order], 1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_same_batch_gives_the_same_bits_alone(name):
    """Also after the global generator was used, which nothing may draw from."""
    first = engine(name, dtype=torch.float32).attribute(X.float(), TARGETS)
    torch.rand(7)
    state = torch.get_rng_state()
    second = engine(name, dtype=torch.float32).attribute(X.float(), TARGETS)
    assert torch.equal(first.maps[name], second.maps[name])
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture(scope="module")
def alone():
    """Each method's map from an engine of its own."""
    return {name: engine(name).attribute(X, TARGETS).maps[name] for name in METHODS}


@pytest.mark.parametrize(
    "names",
    [
        METHODS,
        METHODS[::-1],
        ("saliency", "attnlrp", "deeplift-captum", "deeplift", "chefer", "rollout"),
        ("chefer", "gradcam", "saliency"),
    ],
)
def test_company_does_not_matter(names, alone):
    """The pullbacks of a pass share its graph and its attentions; none may leave anything behind for another."""
    company = engine(*names).attribute(X, TARGETS)
    assert tuple(company.maps) == names
    for name in names:
        close(company.maps[name], alone[name], 1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_single_precision(name, alone):
    """float32 gives the map of float64 within rounding; in particular the same random draws."""
    single = engine(name, dtype=torch.float32).attribute(X.float(), TARGETS)
    close(single.maps[name].double(), alone[name], 1e-4)


@pytest.mark.parametrize("name", ["smoothgrad", "rise"])
def test_draws_belong_to_the_seed(name):
    first, second = (engine(name, seed=seed).attribute(X, TARGETS).maps[name] for seed in (0, 1))
    assert (first - second).abs().max() > 0.01 * first.abs().max()


@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivative_of_a_map_by_finite_differences(name, representation):
    generator = torch.Generator().manual_seed(3)
    made = engine(name, representation=representation)
    x, targets = X[:2].clone().requires_grad_(), TARGETS[:2]
    with made.seen(x, targets, methods=[name], differentiable=True) as seen:
        maps = made.methods[name].attribute(seen)
        weights = torch.randn(maps.shape, generator=generator, dtype=maps.dtype)
        (derivative,) = torch.autograd.grad((maps * weights).sum(), x)
    close(maps.detach(), made.attribute(X[:2], targets).maps[name], 1e-11)
    direction = torch.randn(X[:2].shape, generator=generator, dtype=X.dtype)

    def value(distance):
        return (made.attribute(X[:2] + distance * direction, targets).maps[name] * weights).sum()

    step = 1e-6
    numeric = (value(step) - value(-step)) / (2 * step)
    scale = derivative.abs().sum() * direction.abs().mean()
    assert scale > 0
    assert abs((derivative * direction).sum() - numeric) < 1e-6 * scale


def test_differentiable_passes_leave_no_graph_behind():
    """A graph that refers to itself through Python and C++ would never be freed, least of all one never pulled back."""
    made = engine(*DIFFERENTIABLE)

    def once():
        x = X[:1].clone().requires_grad_()
        with made.seen(x, TARGETS[:1], methods=DIFFERENTIABLE, differentiable=True) as seen:
            for name in DIFFERENTIABLE:
                assert made.methods[name].attribute(seen).requires_grad

    def held():
        gc.collect()
        return sum(type(thing) in (AttentionSeen, torch.Tensor) for thing in gc.get_objects())

    once()
    before = held()
    once()
    assert held() == before


@pytest.mark.parametrize("name", ["rollout", "chefer"])
def test_attention_is_followed_in_a_chain_of_blocks_alone(name):
    toy = Classifier(
        ToyEncoder(lambda x: x.flatten(1)[:, None], (1, 1), 16), nn.Sequential(linear(torch.ones(5, 768))), "mean"
    )
    with pytest.raises(InputError, match=rf"explain\.methods: {name} needs one softmax attention.*leave {name} out"):
        engine(name, classifier=toy)
    unfused = vit()
    unfused.encoder.blocks[0].attn.fused_attn = False
    with pytest.raises(InputError, match=r"17 x 17 tokens in each of the encoder's 2 blocks, and there are 1 in all"):
        engine(name, classifier=unfused)


def test_two_attentions_side_by_side_are_refused():
    classifier = family("registers", "mean")
    block = classifier.encoder.blocks[0]
    block.forward = lambda x: x + block.attn(x) + block.attn(block.norm1(x))
    with pytest.raises(InputError, match=r"14 x 14 tokens in each of the encoder's 2 blocks, and there are 3 in all"):
        Engine(classifier, explain_settings("rollout"), torch.zeros(1, 3, 12, 12))


def serves(classifier, x):
    """Every method gives finite maps, not all zero, each image's own."""
    settings = explain_settings(*METHODS, options={**FAST, "occlusion": {}}, gradcam={"layer": "blocks.-1.norm1"})
    made = Engine(classifier, settings, torch.zeros_like(x[:1]))
    together, second = made.attribute(x), made.attribute(x[1:])
    shapes = {"pixels": x.shape, "plane": (2, *x.shape[2:]), "grid": (2, *grid_size(classifier.encoder))}
    for method, maps in together.maps.items():
        assert maps.shape == shapes[method_class(method).kind]
        assert maps.isfinite().all()
        assert maps.flatten(1).any(dim=1).all(), method
        close(second.maps[method], maps[1:], 1e-9)


@pytest.mark.parametrize(("name", "representation"), CASES)
def test_every_method_serves_every_family(name, representation):
    serves(family(name, representation).double(), preprocess(12).normalise(images(2, 12)).double())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "representation"),
    [("eva02_tiny_patch14_224", 28, "cls"), ("vit_small_patch14_reg4_dinov2", 28, "mean")],
)
def test_every_method_serves_models_of_timm(name, side, representation):
    classifier = vit(representation, encoder=EncoderSettings(name=f"timm:{name}", weights="scratch"), side=side)
    serves(classifier.double(), preprocess(side).normalise(images(2, side)).double())
