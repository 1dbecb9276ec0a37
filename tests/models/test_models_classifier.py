"""Classifiers: which tokens they read, what stands in their head, how they begin."""

from __future__ import annotations

import pytest
import torch
from models_tiny import TINY, draw, scrambled
from torch import nn

from maehpc.errors import InputError
from maehpc.models import Adapter, Classifier, Representation, build_classifier, build_encoder
from maehpc.recipes import AdapterSettings, EncoderSettings


@pytest.mark.parametrize("representation", ["cls", "mean"])
def test_representation_is_the_normed_token(representation: Representation) -> None:
    classifier = build_classifier(TINY, AdapterSettings(), representation, 16, 3, 5).eval()
    scrambled(classifier)
    images = draw(2, 3, 16, 16)
    encoder = classifier.encoder
    tokens = encoder.norm(encoder.blocks(encoder._pos_embed(encoder.patch_embed(images))))
    expected = tokens[:, 0] if representation == "cls" else torch.stack([row[1:].mean(dim=0) for row in tokens])
    torch.testing.assert_close(classifier.represent(images), expected)
    head = classifier.head
    logits = head.output(torch.relu(head.hidden(expected)))
    torch.testing.assert_close(classifier(images), logits)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 32),
        # Norms the pooled token; timm's own pooling is the mean.
        pytest.param("beit_base_patch16_224", 32, marks=pytest.mark.slow),
        ("vit_wee_patch16_reg1_gap_256", 32),
        ("eva02_tiny_patch14_224", 28),
        ("deit3_small_patch16_224", 32),
    ],
)
def test_representation_is_timms_own_pooling(name: str, size: int) -> None:
    """For the pooling a timm model was trained with, `represent` is timm's forward pass without a head."""
    encoder = build_encoder(EncoderSettings(name=f"timm:{name}", weights="scratch"), size, 3).eval()
    scrambled(encoder)
    representation: Representation = "mean" if encoder.global_pool == "avg" else "cls"
    classifier = Classifier(encoder, nn.Identity(), representation)
    images = draw(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), encoder(images))


@pytest.mark.parametrize("size", ["vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256"])
def test_mean_leaves_prefix_tokens_out(size: str) -> None:
    encoder = build_encoder(EncoderSettings(name=f"timm:{size}", weights="scratch"), 32, 3).eval()
    classifier = Classifier(encoder, nn.Identity(), "mean")
    images = draw(2, 3, 32, 32)
    pooled = encoder.forward_features(images)[:, 1:].mean(dim=1)
    torch.testing.assert_close(classifier(images), encoder.fc_norm(pooled))


def test_cls_without_a_class_token_is_refused() -> None:
    settings = EncoderSettings(name="timm:vit_wee_patch16_reg1_gap_256", weights="scratch")
    with pytest.raises(InputError, match=r"finetune\.representation: cls needs a class token.*set it to mean"):
        build_classifier(settings, AdapterSettings(), "cls", 32, 3, 5)


@pytest.mark.parametrize(
    ("settings", "kinds", "shapes"),
    [
        (AdapterSettings(layers=1), [nn.Linear], [(5, 24)]),
        (AdapterSettings(), [nn.Linear, nn.ReLU, nn.Linear], [(24, 24), (5, 24)]),
        (AdapterSettings(hidden=7, activation="gelu"), [nn.Linear, nn.GELU, nn.Linear], [(7, 24), (5, 7)]),
    ],
)
def test_adapter_is_made_as_set(
    settings: AdapterSettings, kinds: list[type[nn.Module]], shapes: list[tuple[int, ...]]
) -> None:
    adapter = Adapter(24, 5, settings)
    assert [type(layer) for layer in adapter] == kinds
    assert [tuple(layer.weight.shape) for layer in adapter if isinstance(layer, nn.Linear)] == shapes


def test_adapter_begins_as_torchs_own_layers_do() -> None:
    adapter = Adapter(768, 10, AdapterSettings())
    bound = 768**-0.5  # Kaiming uniform with a = sqrt(5)
    for tensor in (adapter.hidden.weight, adapter.hidden.bias):
        assert tensor.abs().max() <= bound
    assert adapter.hidden.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_adapter_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Adapter(8, 3, AdapterSettings(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first.output.weight, Adapter(8, 3, AdapterSettings(), seed=1).output.weight)
    assert not torch.equal(first.output.weight, Adapter(8, 3, AdapterSettings(), seed=2).output.weight)


def test_no_module_is_used_twice() -> None:
    """DeepLIFT needs each nonlinearity to stand in one place."""
    classifier = build_classifier(TINY, AdapterSettings(), "cls", 16, 3, 5)
    calls: dict[str, int] = {}

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    for name, module in classifier.named_modules(remove_duplicate=False):
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: count(name))
    classifier(draw(1, 3, 16, 16))
    assert set(calls.values()) == {1}
    assert calls["head.activation"] == 1


def test_everything_can_be_finetuned() -> None:
    classifier = build_classifier(TINY, AdapterSettings(), "cls", 16, 3, 5, drop_path=0.1)
    assert all(value.requires_grad for value in classifier.parameters())
    classifier(draw(2, 3, 16, 16)).sum().backward()
    assert all(value.grad is not None for value in classifier.parameters())
    assert classifier.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
