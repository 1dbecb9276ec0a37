"""Exact DeepLIFT of whole classifiers: maps sum to the change of the logit, or a sentence says why not."""

import pytest
import timm
import torch
from explain_families import CASES, SIDE, family
from explain_references import captum_deeplift, explain_settings, images, preprocess, vit
from torch import nn

from maehpc.errors import InputError
from maehpc.explain.engine import Engine
from maehpc.models import Adapter, Classifier
from maehpc.recipes import AdapterSettings, EncoderSettings

X = preprocess().normalise(images(6))
ZERO = torch.zeros_like(X[:1])
BLACK = preprocess().normalise(ZERO)
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]


def completeness(classifier, x, baseline, dtype):
    """Errors of all classes' maps, [B * K], relative to the change of the logits of the classifier as it is.

    Where that change is less than a tenth of the largest, relative to that tenth: it is as accurate as the logits.
    """
    classifier, x, baseline = classifier.to(dtype), x.to(dtype), baseline.to(dtype)
    engine = Engine(classifier, explain_settings("deeplift"), baseline)
    with torch.no_grad():
        change = (classifier(x) - classifier(baseline)).flatten()
    targets = torch.arange(len(change) // len(x)).repeat(len(x))
    attribution = engine.attribute(x.repeat_interleave(len(change) // len(x), dim=0), targets)
    error = (attribution.maps["deeplift"].flatten(1).sum(dim=1) - change).abs()
    torch.testing.assert_close(attribution.completeness["deeplift"], error / change.abs(), rtol=0, atol=1e-2)
    return error / change.abs().clamp(min=change.abs().max() / 10)


@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize(("layers", "activation"), [(2, "relu"), (2, "gelu"), (1, "relu")])
@pytest.mark.parametrize("baseline", [ZERO, BLACK], ids=["mean", "black"])
@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
def test_our_classifiers(representation, layers, activation, baseline, dtype, bound):
    assert completeness(vit(representation, activation, layers), X, baseline, dtype).max() < bound


@pytest.mark.parametrize(("name", "representation"), CASES)
@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
def test_families(name, representation, dtype, bound):
    x = preprocess(SIDE).normalise(images(3, SIDE))
    assert completeness(family(name, representation), x, torch.zeros_like(x[:1]), dtype).max() < bound


def of_timm(name, side, representation, depth):
    """A timm model of that name, made shorter, with weights that are far from linear.

    Tokens differ at the baseline too, as they do after training: a norm that follows the embedding would else divide
    by next to nothing there, and contributions of a thousand times the logit's change would cancel in float32.
    """
    torch.manual_seed(0)  # positions and tokens keep something of what timm draws
    encoder = timm.create_model(name, img_size=side, num_classes=0, depth=depth)
    if getattr(encoder, "attn_pool", None) is not None:
        encoder.reset_classifier(0, "avg")
    classifier = Classifier(encoder, Adapter(encoder.embed_dim, 5, AdapterSettings(layers=2)), representation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in classifier.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            multiplies = weight.ndim > 1 and not name.endswith(("pos_embed", "_token"))
            weight.copy_(drawn * 1.25 / weight[0].numel() ** 0.5 if multiplies else weight + 0.2 * drawn)
    return classifier.eval()


TIMM = [
    ("vit_tiny_patch16_224", 32, "cls"),
    ("vit_small_patch14_reg4_dinov2", 28, "cls"),  # registers, LayerScale
    ("vit_small_patch14_reg4_dinov2", 28, "mean"),
    ("eva02_tiny_patch14_224", 28, "mean"),  # SwiGLU, rotary positions
    ("vit_small_patch16_dinov3", 32, "cls"),
    ("beit_base_patch16_224", 32, "mean"),
    ("vit_base_patch16_siglip_224", 32, "mean"),
    ("vit_base_patch32_clip_quickgelu_224", 64, "cls"),
    ("vit_small_patch16_18x2_224", 32, "mean"),  # parallel blocks
    ("vit_base_patch16_rpn_224", 32, "mean"),  # norms behind
    ("vit_dpwee_patch16_reg1_gap_256", 32, "mean"),  # differential attention
    ("aimv2_large_patch14_224", 28, "mean"),  # RMSNorm, SwiGLU without bias
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "representation"), TIMM)
def test_timm_models(name, side, representation):
    classifier = of_timm(name, side, representation, depth=2)
    x = preprocess(side).normalise(images(2, side))
    for dtype, bound in reversed(DTYPES):
        assert completeness(classifier, x, torch.zeros_like(x[:1]), dtype).max() < bound


@pytest.mark.slow
def test_all_blocks_of_a_timm_model():
    classifier = vit("cls", encoder=EncoderSettings(name="timm:vit_tiny_patch16_224", weights="scratch"), side=32)
    x = preprocess(32).normalise(images(2, 32))
    for dtype, bound in reversed(DTYPES):
        assert completeness(classifier, x, torch.zeros_like(x[:1]), dtype).max() < bound


def test_attention_that_is_not_fused():
    """Where timm's layers multiply, take the softmax and multiply themselves."""
    classifier = vit().double()
    fused = Engine(classifier, explain_settings("deeplift"), ZERO.double()).attribute(X.double())
    for block in classifier.encoder.blocks:
        block.attn.fused_attn = False
        block.attn.q_norm = nn.Sequential()  # keeps the last block whole
    engine = Engine(classifier, explain_settings("deeplift"), ZERO.double())
    torch.testing.assert_close(engine.attribute(X.double()).maps["deeplift"], fused.maps["deeplift"])


class Squared(nn.Module):
    def forward(self, x):
        return x.pow(2)


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


class Dynamic(nn.Module):
    """A linear layer whose weights come from the image."""

    def forward(self, x):
        return nn.functional.linear(x, x[0].softmax(-1).transpose(0, 1) @ x[0])


@pytest.mark.parametrize(
    ("module", "function"), [(Squared, "Tensor.pow"), (Exponential, "Tensor.exp"), (Dynamic, "functional.linear")]
)
def test_refuses_an_encoder_without_a_rule(module, function):
    classifier = vit().double()
    classifier.encoder.blocks[0].mlp.act = module()
    with pytest.raises(InputError) as caught:
        Engine(classifier, explain_settings("saliency", "deeplift", "deeplift-captum"), ZERO.double())
    message = str(caught.value)
    assert message.startswith("explain.methods: deeplift has no exact rule for torch.")
    assert function in message
    assert message.endswith("leave deeplift out, or take deeplift-captum")
    assert "\n" not in message
    with pytest.raises(InputError, match=r"attnlrp has no rule for .*leave attnlrp out$"):
        Engine(classifier, explain_settings("attnlrp"), ZERO.double())


@pytest.mark.parametrize("module", [Squared, Exponential])
def test_captums_variant_serves_such_an_encoder(module):
    classifier = vit().double()
    classifier.encoder.blocks[0].mlp.act = module()
    with torch.no_grad():
        classifier.encoder.blocks[0].mlp.fc1.weight *= 0.3
    engine = Engine(classifier, explain_settings("saliency", "gradcam", "deeplift-captum"), ZERO.double())
    attribution = engine.attribute(X.double())
    theirs = captum_deeplift(classifier)(X.double(), attribution.targets)
    torch.testing.assert_close(attribution.maps["deeplift-captum"], theirs, rtol=1e-9, atol=1e-12)


def test_an_image_equal_to_the_baseline():
    """Nothing changes, nothing is attributed, and multipliers are finite: they are the gradient."""
    classifier = vit(activation="gelu").double()
    engine = Engine(classifier, explain_settings("deeplift", "saliency"), X[:1].double())
    attribution = engine.attribute(X[:1].double())
    assert not attribution.maps["deeplift"].any()
    assert attribution.completeness["deeplift"].isnan().all()
    with engine.seen(X[:1].double()) as seen:
        torch.testing.assert_close(seen.modified_gradient("deeplift"), seen.gradient(), rtol=1e-8, atol=1e-12)


def test_an_image_that_differs_in_one_patch_is_attributed_there_alone():
    classifier = vit("mean")
    x = ZERO.clone()
    x[:, :, 4:8, 8:12] = X[:1, :, 4:8, 8:12]
    attribution = Engine(classifier, explain_settings("deeplift"), ZERO).attribute(x)
    outside = attribution.maps["deeplift"].clone()
    outside[:, :, 4:8, 8:12] = 0
    assert not outside.any()
    assert attribution.completeness["deeplift"].max() < 1e-4
