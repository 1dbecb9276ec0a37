"""Passes: any set of needs in any order, several threads at once, nothing kept and nothing left behind."""

import gc
import itertools
import threading
import weakref
from contextlib import closing

import pytest
import torch
from explain_references import explain_settings, images, preprocess, vit

from maehpc.explain.engine import Engine
from maehpc.explain.layers import layer_path
from maehpc.explain.network import Network
from maehpc.explain.passes import Pass, References

X = preprocess().normalise(images(6))
ZERO = torch.zeros_like(X[:1])
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])
METHODS = ("saliency", "gradcam", "deeplift", "deeplift-captum", "input-x-gradient", "attnlrp", "rollout", "chefer")
ASKED = {
    "gradient": lambda made: [made.gradient()],
    "layer": lambda made: list(made.layer()),
    "deeplift": lambda made: [made.modified_gradient("deeplift")],
    "deeplift-captum": lambda made: [made.captum_multipliers()],
    "attnlrp": lambda made: [made.modified_gradient("attnlrp")],
    "attention": lambda made: [value for seen in made.attentions() for value in (seen.weights, seen.gradient)],
}
SUBSETS = [needs for size in range(1, len(ASKED) + 1) for needs in itertools.combinations(ASKED, size)]


class Made:
    """A network that is tapped, its baseline, and each need's answer by a pass that was told of that need alone."""

    def __init__(self):
        classifier = vit("cls").double()
        self.network = Network(classifier, layer_path(classifier.encoder, "blocks.-1.norm1"), whole=True)
        self.references = References(self.network, ZERO.double(), "deeplift")
        self.alone = {}
        for need, ask in ASKED.items():
            with closing(self.seen([need])) as made:
                self.alone[need] = [value.detach().clone() for value in ask(made)]

    def seen(self, needs, differentiable=False):
        x = X[:2].double().requires_grad_(differentiable)
        return Pass(
            self.network, x, TARGETS[:2], references=self.references, needs=needs, differentiable=differentiable
        )


@pytest.fixture(scope="module")
def made():
    return Made()


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_any_needs_in_any_order(needs, made):
    """Whatever comes first, and asked twice; a graph that is let go of too early raises."""
    orders = [needs, needs[::-1], needs[1:] + needs[:1]]
    for order, differentiable in [*((order, False) for order in orders), (needs, True)]:
        with closing(made.seen(needs, differentiable)) as seen:
            for need in [*order, *order]:
                for ours, theirs in zip(ASKED[need](seen), made.alone[need], strict=True):
                    assert ours.requires_grad == differentiable
                    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-12 * theirs.abs().max().item())


def test_the_alone_answers_differ(made):
    """Else the test above could not tell one rule's answer from another's."""
    pulled = [made.alone[need][0] for need in ("gradient", "deeplift", "deeplift-captum", "attnlrp")]
    for one, other in itertools.combinations(pulled, 2):
        assert (one - other).abs().max() > 1e-3 * one.abs().max()


class Kept:
    """What a graph holds in the place of a tensor that it saved."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def kept():
    """Tensors that graphs made in the test still hold; the garbage collector is off, so cycles would show."""
    alive = weakref.WeakSet()

    def pack(tensor):
        result = Kept(tensor.detach())
        alive.add(result)
        return result

    gc.collect()
    gc.disable()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield alive
    gc.enable()


def test_graph_is_let_go_of_after_the_last_pullback(kept, made):
    needs = ("gradient", "deeplift", "deeplift-captum")
    seen = made.seen(needs)
    assert len(kept) > 25
    for need in needs[:2]:
        ASKED[need](seen)
        assert len(kept) > 25
    ASKED["deeplift-captum"](seen)
    assert len(kept) < 10  # between logits and representation, which another pullback passed


@pytest.mark.parametrize("differentiable", [False, True])
def test_closing_lets_go_of_the_graph(kept, made, differentiable):
    seen = made.seen(ASKED, differentiable)
    for need in ("layer", "attention"):
        ASKED[need](seen)
    logits = seen.logits.detach().clone()
    assert len(kept) > 25
    seen.close()
    assert not kept
    assert torch.equal(seen.logits, logits)
    assert not seen.logits.requires_grad
    assert torch.equal(seen.scores, logits.gather(1, TARGETS[:2, None])[:, 0])
    seen.close()


def test_attributing_keeps_nothing(kept):
    engine = Engine(vit(), explain_settings(*METHODS), ZERO)
    assert not kept
    for _ in range(2):
        engine.attribute(X, TARGETS)
        assert not kept
    with pytest.raises(ZeroDivisionError), engine.seen(X, TARGETS) as seen:
        raise ZeroDivisionError
    assert not kept
    assert seen.targets.equal(TARGETS)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_many_passes_leave_no_more_than_one():
    engine = Engine(vit(), explain_settings(*METHODS), ZERO)

    def one():
        engine.attribute(X[:2], TARGETS[:2])
        x = X[:1].clone().requires_grad_()
        with engine.seen(x, TARGETS[:1], methods=["deeplift"], differentiable=True) as seen:
            torch.autograd.grad(engine.methods["deeplift"].attribute(seen).square().sum(), x)

    one()
    before = live_tensors()
    for _ in range(20):
        one()
    assert live_tensors() <= before


def test_threads_at_the_same_time_give_the_same_bits():
    """Two threads, each with its own images and needs, against one after the other."""
    engine = Engine(vit(), explain_settings(*METHODS), ZERO)

    def whole(part):
        return [engine.attribute(X[part], TARGETS[part]).maps[method] for method in METHODS]

    def climbing(part):
        x = X[part].clone().requires_grad_()
        maps = []
        for method in ("saliency", "deeplift", "deeplift-captum", "attnlrp", "chefer"):
            with engine.seen(x, TARGETS[part], methods=[method], differentiable=True) as seen:
                full = engine.methods[method].attribute(seen)
                maps += [full.detach(), *torch.autograd.grad(full.square().sum(), x)]
        return [*maps, engine.logits(X[part])]

    work = [(whole, slice(0, 3)), (climbing, slice(3, 6))]
    apart = [run(part) for run, part in work]
    results, start = [[], []], threading.Barrier(2)

    def thread(place):
        run, part = work[place]
        start.wait()
        results[place] += [run(part) for _ in range(4)]

    threads = [threading.Thread(target=thread, args=(place,)) for place in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for place, expected in enumerate(apart):
        assert len(results[place]) == 4
        for maps in results[place]:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))


def test_classifier_keeps_its_own_modules_and_values():
    classifier = vit()
    x = X.clone().requires_grad_()

    def state():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        modules = {
            name: (id(module), type(module), sorted(vars(module)), *(len(getattr(module, hook)) for hook in hooks))
            for name, module in classifier.named_modules()
        }
        return modules, {name: (value.data_ptr(), value.clone()) for name, value in classifier.state_dict().items()}

    logits, (modules, weights) = classifier(x), state()
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    engine = Engine(classifier, explain_settings(*METHODS), ZERO)
    engine.attribute(X, TARGETS)
    with engine.seen(x, TARGETS, differentiable=True) as seen:
        for method in engine.methods.values():
            method.attribute(seen)
    assert state()[0] == modules
    for name, (place, value) in state()[1].items():
        assert place == weights[name][0]
        assert torch.equal(value, weights[name][1])
    again = classifier(x)
    assert torch.equal(again, logits)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], gradient)
    assert x.grad is None
    assert all(weight.grad is None for weight in classifier.parameters())


def test_another_pass_with_the_same_targets(made):
    """`again` looks at other images, and has its own graph."""
    with closing(made.seen(["gradient"])) as seen, closing(seen.again(seen.x * 2, needs=["deeplift"])) as other:
        assert torch.equal(other.targets, seen.targets)
        with closing(Pass(made.network, seen.x * 2, seen.targets, references=made.references, needs=["deeplift"])) as p:
            assert torch.equal(other.modified_gradient("deeplift"), p.modified_gradient("deeplift"))
        assert torch.equal(seen.gradient(), made.alone["gradient"][0])
        torch.testing.assert_close(seen.scores_of(seen.x), seen.scores)
