"""Rollout, Chefer's relevance and GradCAM++ against whole matrices and plain loops over timm's own modules."""

import pytest
import torch
from explain_families import CASES, SIDE, family
from explain_references import explain_settings, images, preprocess, vit

from maehpc.explain.engine import Engine
from maehpc.models import num_prefix_tokens

X = preprocess().normalise(images(4)).double()
TARGETS = torch.tensor([0, 1, 2, 3])


def close(ours, theirs, relative):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * theirs.abs().max().item())


def maps_of(classifier, x, targets, *names, **values):
    settings = explain_settings(*names, **values)
    return Engine(classifier, settings, torch.zeros_like(x[:1])).attribute(x, targets).maps


def attention_of(classifier, x, targets):
    """Weights of every block and the explained logits' gradients there, [B, H, N, N], by timm's unfused attention."""
    weights = []

    def keep(module, inputs, output):
        output.requires_grad_()
        output.retain_grad()
        weights.append(output)

    handles = []
    for block in classifier.encoder.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(keep))
    classifier(x.clone().requires_grad_()).gather(1, targets[:, None]).sum().backward()
    for handle, block in zip(handles, classifier.encoder.blocks, strict=True):
        handle.remove()
        block.attn.fused_attn = True
    return [weight.detach() for weight in weights], [weight.grad for weight in weights]


def represented_rows(classifier, relevance):
    """[B, N, N] to [B, patches]: what the representation takes from each patch."""
    prefix = num_prefix_tokens(classifier.encoder)
    if classifier.representation == "cls":
        return relevance[:, 0, prefix:]
    return relevance[:, prefix:, prefix:].mean(dim=1)


def naive_rollout(classifier, x, targets):
    weights, _ = attention_of(classifier, x, targets)
    tokens = weights[0].shape[-1]
    rolled = torch.eye(tokens, dtype=x.dtype).expand(len(x), -1, -1)
    for weight in weights:
        rolled = (0.5 * weight.mean(dim=1) + 0.5 * torch.eye(tokens, dtype=x.dtype)) @ rolled
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(rolled.shape[:2], dtype=x.dtype))
    return represented_rows(classifier, rolled)


def naive_chefer(classifier, x, targets):
    weights, gradients = attention_of(classifier, x, targets)
    identity = torch.eye(weights[0].shape[-1], dtype=x.dtype).expand(len(x), -1, -1)
    relevance = identity
    for weight, gradient in zip(weights, gradients, strict=True):
        relevance = relevance + (weight * gradient).clamp(min=0).mean(dim=1) @ relevance
    return represented_rows(classifier, relevance - identity)


@pytest.mark.parametrize("representation", ["cls", "mean"])
def test_rollout_and_chefer_equal_whole_matrices(representation):
    classifier = vit(representation).double()
    rollout, chefer = naive_rollout(classifier, X, TARGETS), naive_chefer(classifier, X, TARGETS)
    ours = maps_of(classifier, X, TARGETS, "rollout", "chefer")
    close(ours["rollout"].flatten(1), rollout, 1e-12)
    close(ours["chefer"].flatten(1), chefer, 1e-12)


@pytest.mark.parametrize(("name", "representation"), CASES)
def test_rollout_and_chefer_on_every_family(name, representation):
    classifier = family(name, representation).double()
    x, targets = preprocess(SIDE).normalise(images(2, SIDE)).double(), torch.tensor([3, 1])
    rollout, chefer = naive_rollout(classifier, x, targets), naive_chefer(classifier, x, targets)
    ours = maps_of(classifier, x, targets, "rollout", "chefer")
    close(ours["rollout"].flatten(1), rollout, 1e-11)
    close(ours["chefer"].flatten(1), chefer, 1e-11)


def test_chefer_depends_on_the_class_and_rollout_does_not():
    classifier = vit().double()
    first, second = (maps_of(classifier, X, targets, "rollout", "chefer") for targets in (TARGETS, TARGETS + 1))
    assert torch.equal(first["rollout"], second["rollout"])
    assert (first["chefer"] - second["chefer"]).abs().max() > 0.1 * first["chefer"].max()


def test_a_classifier_that_ignores_the_image_has_no_relevance():
    classifier = vit("mean").double()
    with torch.no_grad():
        classifier.head[-1].weight.zero_()
    assert not maps_of(classifier, X, TARGETS, "chefer")["chefer"].any()


def naive_gradcam_plus_plus(classifier, x, targets, norm):
    """The paper's formulas, one number after another."""
    kept = []
    handle = norm.register_forward_hook(lambda module, inputs, output: (output.retain_grad(), kept.append(output))[1])
    classifier(x.clone().requires_grad_()).gather(1, targets[:, None]).sum().backward()
    handle.remove()
    prefix = num_prefix_tokens(classifier.encoder)
    tokens, gradients = kept[0].detach()[:, prefix:], kept[0].grad[:, prefix:]
    result = torch.zeros(tokens.shape[:2], dtype=x.dtype)
    for image in range(len(x)):
        for channel in range(tokens.shape[2]):
            a, g = tokens[image, :, channel].tolist(), gradients[image, :, channel].tolist()
            weight = 0.0
            for g_ij in g:
                alpha = g_ij**2 / (2 * g_ij**2 + sum(a_ab * g_ij**3 for a_ab in a))
                weight += alpha * max(g_ij, 0.0)
            result[image] += weight * tokens[image, :, channel]
    return result


@pytest.mark.parametrize("representation", ["cls", "mean"])
def test_gradcam_plus_plus_by_the_formulas(representation):
    classifier = vit(representation).double()
    theirs = naive_gradcam_plus_plus(classifier, X, TARGETS, classifier.encoder.blocks[1].norm1).reshape(4, 4, 4)
    layer = {"layer": "blocks.-1.norm1"}
    ours = maps_of(classifier, X, TARGETS, "gradcam-plus-plus", "gradcam", gradcam=layer)
    close(ours["gradcam-plus-plus"], theirs, 1e-12)
    assert (ours["gradcam-plus-plus"] / ours["gradcam"]).std() > 0.1  # not merely another scale
    settings = {**layer, "upsample": "nearest", "relu": True}
    upsampled = maps_of(classifier, X, TARGETS, "gradcam-plus-plus", gradcam=settings)
    close(upsampled["gradcam-plus-plus"][:, ::4, ::4], theirs.clamp(min=0), 1e-12)


def test_gradcam_plus_plus_where_gradients_vanish():
    """0 / 0 of the formula is a weight of 0."""
    classifier = vit().double()
    with torch.no_grad():
        classifier.head[-1].weight.zero_()
    assert not maps_of(classifier, X, TARGETS, "gradcam-plus-plus")["gradcam-plus-plus"].any()
