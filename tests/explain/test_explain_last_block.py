"""The last block as far as the class token needs it: the values and pullbacks of the whole block."""

import pytest
import torch
from explain_references import explain_settings, images, preprocess, vit
from timm.layers import RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from maehpc.errors import InputError
from maehpc.explain.engine import Engine
from maehpc.explain.last_block import LastBlock, replaced
from maehpc.explain.network import Network
from maehpc.explain.passes import Pass, References
from maehpc.models import Adapter, Classifier
from maehpc.recipes import AdapterSettings

X = preprocess().normalise(images(3)).double()
ZERO = torch.zeros_like(X[:1])
TARGETS = torch.tensor([0, 3, 4])
SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
NEEDS = ("gradient", "deeplift", "deeplift-captum", "attnlrp")

SERVED = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "norm of heads": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "registers": {"reg_tokens": 2, "pre_norm": True},
    "rms norm": {"norm_layer": RmsNorm},
    "packed gates": {"mlp_layer": SwiGLUPacked},
    "gates": {"mlp_layer": SwiGLU},
    "dropout": {"proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
    "one head": {"num_heads": 1},
    "no norm behind": {"final_norm": False},
}
NOT_SERVED = {
    "norms of queries and keys": {"qk_norm": True},
    "parallel scaling": {"block_fn": ParallelScalingBlock},
    "parallel scaling, differential": {"block_fn": DiffParallelScalingBlock},
    "parallel things": {"block_fn": ParallelThingsBlock},
    "norms behind": {"block_fn": ResPostBlock},
    "differential": {"attn_layer": "diff"},
    "gate": {"gated": True},
}


def classifier(options):
    options = dict(options)
    gated = options.pop("gated", False)
    torch.manual_seed(0)
    encoder = VisionTransformer(**SHAPE | options)
    if gated:
        for block in encoder.blocks:
            block.attn.gate = nn.Linear(32, 32)
    result = Classifier(encoder, Adapter(32, 5, AdapterSettings(layers=2, hidden=16)), "cls")
    with torch.no_grad():
        for weight in result.parameters():
            weight.mul_(3).add_(0.1 * torch.randn(weight.shape))
    return result.double()


def everything(network):
    """Logits and each need's pullback."""
    made = Pass(network, X, TARGETS, references=References(network, ZERO, "deeplift"), needs=NEEDS)
    return [
        made.logits,
        made.gradient(),
        made.modified_gradient("deeplift"),
        made.captum_multipliers(),
        made.modified_gradient("attnlrp"),
    ]


@pytest.mark.parametrize("options", [*SERVED.values(), *NOT_SERVED.values()], ids=[*SERVED, *NOT_SERVED])
def test_equals_the_whole_block(options):
    model = classifier(options)
    assert LastBlock.serves(model.encoder.blocks[-1]) == (options in SERVED.values())
    with torch.no_grad():
        logits = model.eval()(X)
    ours, theirs = everything(Network(model)), everything(Network(model, whole=True))
    torch.testing.assert_close(ours[0], logits, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(ours, theirs, strict=True):
        assert reference.any()
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12 * reference.abs().max().item())


def test_does_not_compute_what_nobody_reads():
    model = classifier({})
    computed = []
    model.encoder.blocks[-1].mlp.register_forward_hook(lambda _module, _inputs, output: computed.append(output.shape))
    everything(Network(model))
    assert set(computed) == {(1, 1, 32), (3, 1, 32)}


def test_a_mean_needs_the_whole_block():
    model = vit("mean").double()
    assert LastBlock.serves(model.encoder.blocks[-1])
    with torch.no_grad():
        logits = model(X)
    torch.testing.assert_close(everything(Network(model))[0], logits)


def test_a_block_of_another_class_is_not_served():
    """Such as a subclass that computes something else."""
    block = classifier({}).encoder.blocks[-1]
    block.__class__ = type("Other", (type(block),), {})
    assert not LastBlock.serves(block)


LAYERS = sorted(
    f"blocks.-1.{name}"
    for name, _ in classifier({"init_values": 0.3, "proj_drop_rate": 0.5, "drop_path_rate": 0.5})
    .encoder.blocks[-1]
    .named_modules()
    if name
)


@pytest.mark.parametrize("layer", ["blocks.-1", "blocks.-2", "norm", *LAYERS])
def test_tapping_any_layer_gives_what_the_whole_block_gives(layer, monkeypatch):
    """The same GradCAM, or the same sentence; a layer that is tapped inside the attention keeps the block whole."""
    model = classifier({"init_values": 0.3, "proj_drop_rate": 0.5, "drop_path_rate": 0.5})
    settings = explain_settings("gradcam", "saliency", gradcam={"layer": layer})

    def outcome():
        try:
            return Engine(model, settings, ZERO).attribute(X, TARGETS).maps["gradcam"]
        except InputError as error:
            return str(error)

    ours = outcome()
    monkeypatch.setattr(LastBlock, "serves", lambda block: False)
    theirs = outcome()
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        assert layer in ("blocks.-2", "blocks.-1.norm1", "blocks.-1.attn.qkv")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * theirs.abs().max().item())


def test_replaced_leaves_the_original_alone():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    outer = nn.Sequential(inner, nn.Linear(2, 2))
    new = replaced(outer, ["0", "1"], nn.Tanh())
    assert isinstance(outer[0][1], nn.ReLU)
    assert isinstance(new[0][1], nn.Tanh)
    assert new[0][0] is inner[0]
    assert new[1] is outer[1]
    x = torch.randn(3, 2)
    torch.testing.assert_close(new(x), outer[1](inner[0](x).tanh()))
