import pytest
import torch
from captum.attr import LayerAttribution
from explain_references import ToyEncoder, captum_gradcam, explain_settings, images, linear, preprocess, vit
from torch import nn

from maehpc.errors import InputError
from maehpc.explain.engine import Engine
from maehpc.explain.layers import layer_path
from maehpc.models import Classifier
from maehpc.recipes import EncoderSettings

X = preprocess().normalise(images(6))
BASELINE = torch.zeros_like(X[:1])
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])


def gradcam(classifier, x=X, targets=TARGETS, **settings):
    engine = Engine(classifier, explain_settings("gradcam", gradcam=settings), torch.zeros_like(x[:1]))
    return engine.attribute(x, targets).maps["gradcam"]


@pytest.mark.parametrize(
    ("representation", "layer"),
    [
        ("cls", "blocks.-1.norm1"),
        ("cls", "blocks.1.attn.qkv"),
        ("cls", "blocks.0.mlp.fc2"),
        ("cls", "blocks.0"),
        ("mean", "blocks.-1.norm1"),
        ("mean", "blocks.-1"),
        ("mean", "norm"),
    ],
)
def test_equals_captum(representation, layer):
    classifier = vit(representation).double()
    theirs = captum_gradcam(classifier, layer.replace("-1", "1"))(X.double(), TARGETS)
    ours = gradcam(classifier, X.double(), layer=layer)
    assert ours.shape == (6, 4, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13 * theirs.abs().max().item())


def test_is_cam_over_pixels_for_pooled_linear_features():
    """Convolution, global average pooling, linear: GradCAM = CAM / (HW) (Selvaraju et al., section 3.1)."""
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(3, 7, 4, stride=4)
    weight = torch.randn(5, 7, generator=generator)
    encoder = ToyEncoder(lambda x: convolution(x).relu().flatten(2).transpose(1, 2), (4, 4), 4)
    classifier = Classifier(encoder, nn.Sequential(linear(weight)), "mean")
    cam = torch.einsum("bchw,bc->bhw", convolution(X).relu(), weight[TARGETS])
    torch.testing.assert_close(gradcam(classifier, layer="tokens"), cam.detach() / 16)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_positive_part_and_upsampling(mode):
    classifier = vit()
    grid = gradcam(classifier)
    assert grid.min() < 0
    torch.testing.assert_close(gradcam(classifier, relu=True), grid.clamp(min=0))
    upsampled = gradcam(classifier, relu=True, upsample=mode)
    theirs = LayerAttribution.interpolate(grid.clamp(min=0)[:, None], (16, 16), mode)
    torch.testing.assert_close(upsampled, theirs[:, 0])


def test_layers_by_name_and_number():
    encoder = vit().encoder
    assert layer_path(encoder, "blocks.-1.norm1") == ["blocks", "1", "norm1"]
    assert layer_path(encoder, "blocks.-2") == ["blocks", "0"]
    assert layer_path(encoder, "blocks.1.norm1") == ["blocks", "1", "norm1"]
    assert layer_path(encoder, "norm") == ["norm"]


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        ("blocks.2.norm1", "'2' is none of 0, 1"),
        ("blocks.-3.norm1", "'-3' is none of 0, 1"),
        ("layers.-1", "'layers' is none of patch_embed"),
        ("norm.weight", "'weight' is none of nothing"),
        ("", "has no module"),
        ("blocks.-1", "lies behind the last attention"),
        ("norm", "lies behind the last attention"),
        ("blocks.-1.attn.proj", "lies behind the last attention"),
        ("fc_norm", "gives (1, 32), not tokens of 16 patches"),
        ("patch_embed.proj", "gives (1, 32, 4, 4), not tokens"),
        ("head", "is run 0 times"),
    ],
)
def test_refuses_layers_that_cannot_serve(layer, part):
    with pytest.raises(InputError) as caught:
        gradcam(vit("cls"), layer=layer)
    message = str(caught.value)
    assert part in message
    assert message.startswith("explain.gradcam.layer")
    assert "blocks.-1.norm1" in message
    assert "\n" not in message


def test_patch_embedding_has_no_prefix_to_leave_out():
    assert gradcam(vit(), layer="patch_embed").shape == (6, 4, 4)


def test_a_dead_head_is_a_finding_and_no_wrong_layer():
    classifier = vit()
    with torch.no_grad():
        classifier.head.hidden.bias.fill_(-1e6)
    assert not gradcam(classifier).any()


@pytest.mark.parametrize("layer", ["blocks.-1.attn.qkv", "blocks.-1.attn"])
def test_layers_that_are_read_and_not_run(layer):
    """Eva's attention reads the weight of qkv and never runs it; a wrapper must not stand in the way."""
    encoder = EncoderSettings(name="timm:eva02_tiny_patch14_224", weights="scratch")
    classifier = vit("mean", encoder=encoder, side=28)
    x = preprocess().normalise(images(1, 28))
    if layer.endswith("qkv"):
        with pytest.raises(InputError, match="is run 0 times"):
            gradcam(classifier, x, TARGETS[:1], layer=layer)
    else:
        assert gradcam(classifier, x, TARGETS[:1], layer=layer).shape == (1, 2, 2)


def test_leaves_the_classifier_as_it_is():
    classifier = vit()
    before = {name: (type(module), id(module)) for name, module in classifier.named_modules()}
    gradcam(classifier)
    assert {name: (type(module), id(module)) for name, module in classifier.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())
