"""Weights of every known origin put into models; what does not fit is told in one sentence."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models_tiny import DECODER, TINY, draw, draw_noise, hf_mae, scrambled, tiny_mae
from torch import Tensor

from maehpc.errors import InputError
from maehpc.models import (
    MaskedAutoencoder,
    build_classifier,
    build_encoder,
    convert,
    head_counts,
    load_encoder,
    load_mae,
    load_weights,
    save_weights,
)
from maehpc.models.positions import resized_positions
from maehpc.recipes import AdapterSettings, DecoderSettings, EncoderSettings

# The names in Meta's mae_pretrain_vit_*_full.pth, for one block of each kind (models_mae.py of facebookresearch/mae).
META_NAMES = """cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias
blocks.0.norm1.weight blocks.0.norm1.bias blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias
blocks.0.attn.proj.weight blocks.0.attn.proj.bias blocks.0.norm2.weight blocks.0.norm2.bias
blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias
norm.weight norm.bias
mask_token decoder_pos_embed decoder_embed.weight decoder_embed.bias
decoder_blocks.0.norm1.weight decoder_blocks.0.norm1.bias decoder_blocks.0.attn.qkv.weight
decoder_blocks.0.attn.qkv.bias decoder_blocks.0.attn.proj.weight decoder_blocks.0.attn.proj.bias
decoder_blocks.0.norm2.weight decoder_blocks.0.norm2.bias decoder_blocks.0.mlp.fc1.weight
decoder_blocks.0.mlp.fc1.bias decoder_blocks.0.mlp.fc2.weight decoder_blocks.0.mlp.fc2.bias
decoder_norm.weight decoder_norm.bias decoder_pred.weight decoder_pred.bias"""

# The names in facebook/vit-mae-base on the hub, for one block of each kind.
HUB_PARTS = """attention.attention.query attention.attention.key attention.attention.value attention.output.dense
intermediate.dense output.dense layernorm_before layernorm_after"""
HUB_NAMES = {
    "vit.embeddings.cls_token",
    "vit.embeddings.position_embeddings",
    "decoder.mask_token",
    "decoder.decoder_pos_embed",
} | {
    f"{module}.{leaf}"
    for leaf in ("weight", "bias")
    for module in (
        "vit.embeddings.patch_embeddings.projection",
        "vit.layernorm",
        "decoder.decoder_embed",
        "decoder.decoder_norm",
        "decoder.decoder_pred",
        *(f"vit.encoder.layer.0.{part}" for part in HUB_PARTS.split()),
        *(f"decoder.decoder_layers.0.{part}" for part in HUB_PARTS.split()),
    )
}


def meta_state(mae: MaskedAutoencoder, decoder: bool) -> dict[str, Tensor]:
    """Meta's flat names, written from the module tree without the code under test."""
    state = dict(mae.encoder.state_dict())
    if decoder:
        for name, tensor in mae.decoder.state_dict().items():
            state[name if name == "mask_token" else f"decoder_{name}"] = tensor
    return state


def save_meta(path: Path, mae: MaskedAutoencoder, decoder: bool) -> None:
    torch.save({"model": meta_state(mae, decoder), "args": argparse.Namespace(model="mae_vit", mask_ratio=0.75)}, path)


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        assert torch.equal(state[name], expected[name]), name


@pytest.fixture
def source() -> MaskedAutoencoder:
    return scrambled(tiny_mae())


def test_meta_names_are_known() -> None:
    mae = MaskedAutoencoder(
        build_encoder(TINY.model_copy(update={"depth": 1}), 16, 3), DecoderSettings(width=16, depth=1, heads=2), True
    )
    assert meta_state(mae, decoder=True).keys() == set(META_NAMES.split())
    names = convert.to_ours(dict.fromkeys(META_NAMES.split(), torch.zeros(1)))
    assert names.keys() == mae.state_dict().keys()


@pytest.mark.parametrize("decoder", [True, False])
def test_meta_checkpoint_into_an_encoder(tmp_path: Path, source: MaskedAutoencoder, decoder: bool) -> None:
    save_meta(tmp_path / "mae_pretrain_vit.pth", source, decoder)
    encoder = build_encoder(TINY, 16, 3, seed=1)
    load_encoder(encoder, tmp_path / "mae_pretrain_vit.pth")
    assert_same(encoder, source.encoder)
    assert not encoder.pos_embed.requires_grad


def test_meta_checkpoint_into_an_autoencoder(tmp_path: Path, source: MaskedAutoencoder) -> None:
    save_meta(tmp_path / "mae_visualize_vit.pth", source, decoder=True)
    mae = tiny_mae(seed=1)
    load_mae(mae, tmp_path / "mae_visualize_vit.pth")
    assert_same(mae, source)


@pytest.mark.parametrize("kind", ["encoder", "mae", "classifier", "wrapped", "half"])
def test_our_own_files_into_an_encoder(tmp_path: Path, source: MaskedAutoencoder, kind: str) -> None:
    path = tmp_path / "w.safetensors"
    classifier = build_classifier(TINY, AdapterSettings(), "cls", 16, 3, 5)
    classifier.encoder.load_state_dict(source.encoder.state_dict())
    state: dict[str, Tensor] = {
        "encoder": source.encoder.state_dict(),
        "mae": source.state_dict(),
        "classifier": classifier.state_dict(),
        "wrapped": {f"module._orig_mod.{name}": tensor for name, tensor in source.state_dict().items()},
        "half": {name: tensor.half() for name, tensor in source.encoder.state_dict().items()},
    }[kind]
    save_weights(path, state)
    encoder = build_encoder(TINY, 16, 3, seed=1)
    load_encoder(encoder, path)
    assert_same(encoder, source.encoder.half().float() if kind == "half" else source.encoder)


def test_our_autoencoder_and_classifier_round_trip(tmp_path: Path, source: MaskedAutoencoder) -> None:
    save_weights(tmp_path / "mae.safetensors", source.state_dict())
    mae = tiny_mae(seed=1)
    load_mae(mae, tmp_path / "mae.safetensors")
    assert_same(mae, source)
    classifier = scrambled(build_classifier(TINY, AdapterSettings(), "cls", 16, 3, 5))
    save_weights(tmp_path / "classifier.safetensors", classifier.state_dict())
    other = build_classifier(TINY, AdapterSettings(), "cls", 16, 3, 5, seed=1)
    load_weights(other, tmp_path / "classifier.safetensors")
    assert_same(other, classifier)


def test_timm_loads_our_encoder(tmp_path: Path) -> None:
    encoder = scrambled(build_encoder(EncoderSettings(name="vit-tiny"), 224, 3)).eval()
    save_weights(tmp_path / "encoder.safetensors", encoder.state_dict(), {"kind": "encoder"})
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "encoder.safetensors")
    ).eval()
    images = draw(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(encoder(images), theirs(images))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_encoders_with_a_classifier_head_are_read(tmp_path: Path, suffix: str) -> None:
    theirs = scrambled(timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32)).eval()
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": theirs.state_dict()}, path)
    else:
        save_weights(path, theirs.state_dict())
    encoder = build_encoder(EncoderSettings(name="vit-tiny"), 32, 3).eval()
    load_encoder(encoder, path)
    images = draw(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(images), theirs.forward_head(theirs.forward_features(images), pre_logits=True))


@pytest.mark.parametrize(
    "name", [pytest.param("beit_base_patch16_224", marks=pytest.mark.slow), "eva02_tiny_patch14_224"]
)
def test_other_families_read_their_own_files(tmp_path: Path, name: str) -> None:
    size = 28 if "patch14" in name else 32
    settings = EncoderSettings(name=f"timm:{name}", weights="scratch")
    theirs = scrambled(build_encoder(settings, size, 3))
    save_weights(tmp_path / "w.safetensors", theirs.state_dict())
    encoder = build_encoder(settings, size, 3, seed=1)
    load_encoder(encoder, tmp_path / "w.safetensors")
    assert_same(encoder, theirs)


def published(theirs: Any) -> dict[str, Tensor]:
    """Tensors by the names of the published files, written here once more."""
    parts = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "vit.layers": "vit.encoder.layer",
    }
    state = {}
    for name, tensor in theirs.state_dict().items():
        for new, old in parts.items():
            name = name.replace(new, old)
        state[name] = tensor
    return state


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["module", "published"])
@pytest.mark.parametrize("whole", [True, False])
def test_transformers_states_are_read(tmp_path: Path, naming: str, whole: bool) -> None:
    theirs = scrambled(hf_mae())
    state = published(theirs) if naming == "published" else theirs.state_dict()
    if not whole:  # as ViTMAEModel saves itself
        state = {name.removeprefix("vit."): tensor for name, tensor in state.items() if name.startswith("vit.")}
    save_weights(tmp_path / "model.safetensors", state)
    mae = tiny_mae()
    if whole:
        load_mae(mae, tmp_path / "model.safetensors")
        images, noise = draw(2, 3, 16, 16), draw_noise(2, 16)
        torch.testing.assert_close(mae(images, noise, 0.75).loss, theirs(images, noise=noise).loss)
    else:
        load_encoder(mae.encoder, tmp_path / "model.safetensors")
        # With nothing hidden, the order the patches come in does not matter to the CLS token.
        theirs.vit.config.mask_ratio = theirs.vit.embeddings.config.mask_ratio = 0.0
        images = draw(2, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(mae.encoder(images), theirs.vit(images).last_hidden_state[:, 0])


@pytest.mark.parametrize("part", ["whole", "encoder"])
def test_transformers_saved_files_are_read(tmp_path: Path, part: str) -> None:
    """Whatever names the installed version writes."""
    theirs = scrambled(hf_mae())
    (theirs if part == "whole" else theirs.vit).save_pretrained(tmp_path)
    encoder = build_encoder(TINY, 16, 3)
    load_encoder(encoder, tmp_path / "model.safetensors")
    expected = convert.encoder_part(convert.to_ours(theirs.state_dict()))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())


def test_transformers_reads_what_we_write(tmp_path: Path, source: MaskedAutoencoder) -> None:
    theirs = hf_mae()
    theirs.config.save_pretrained(tmp_path)
    save_weights(tmp_path / "model.safetensors", convert.to_transformers(source.state_dict()), {"format": "pt"})
    loaded, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    images, noise = draw(2, 3, 16, 16), draw_noise(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images, noise=noise).loss, source(images, noise, 0.75).loss)


def test_names_for_transformers_are_those_on_the_hub() -> None:
    mae = MaskedAutoencoder(
        build_encoder(TINY.model_copy(update={"depth": 1}), 16, 3), DecoderSettings(width=16, depth=1, heads=2), True
    )
    assert convert.to_transformers(mae.state_dict()).keys() == HUB_NAMES
    back = convert.to_ours(convert.to_transformers(mae.state_dict()))
    assert back.keys() == mae.state_dict().keys()
    assert all(torch.equal(tensor, mae.state_dict()[name]) for name, tensor in back.items())


def test_tensors_without_a_place_in_transformers_are_refused() -> None:
    with pytest.raises(KeyError, match="reg_token"):
        convert.to_transformers({"encoder.reg_token": torch.zeros(1, 4, 24)})


def test_positions_follow_the_grid(tmp_path: Path, source: MaskedAutoencoder) -> None:
    """Weights of 16-pixel images in models for 32: only positions change, as timm would change them."""
    save_meta(tmp_path / "w.pth", source, decoder=True)
    mae = tiny_mae(image_size=32)
    load_mae(mae, tmp_path / "w.pth")
    for ours, theirs in (
        (mae.encoder.pos_embed, source.encoder.pos_embed),
        (mae.decoder.pos_embed, source.decoder.pos_embed),
    ):
        assert torch.equal(ours[:, :1], theirs[:, :1])
        assert torch.equal(ours, resized_positions(theirs, (4, 4), (8, 8)))
    encoder = build_encoder(TINY, 32, 3)
    load_encoder(encoder, tmp_path / "w.pth")
    assert_same(encoder, mae.encoder)


def test_timm_interpolates_positions_alike(tmp_path: Path) -> None:
    theirs = scrambled(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48))
    save_weights(tmp_path / "w.safetensors", theirs.state_dict())
    encoder = build_encoder(EncoderSettings(name="vit-tiny"), 80, 3)
    load_encoder(encoder, tmp_path / "w.safetensors")
    theirs.set_input_size((80, 80))
    torch.testing.assert_close(encoder.pos_embed.data, theirs.pos_embed.data)


def refusal(settings: EncoderSettings, path: Path, size: int = 16, channels: int = 3) -> str:
    encoder = build_encoder(settings, size, channels)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_encoder(encoder, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items()), "half-loaded"
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("change", "channels", "words"),
    [
        ({"width": 48}, 3, ["tensor cls_token is 1 x 1 x 24 in the file but 1 x 1 x 48", "width 24"]),
        ({"patch_size": 8}, 3, ["patch_embed.proj.weight is 24 x 3 x 4 x 4", "24 x 3 x 8 x 8", "patch_size 4"]),
        ({}, 1, ["patch_embed.proj.weight is 24 x 3 x 4 x 4", "24 x 1 x 4 x 4", "3 channels"]),
        ({"depth": 3}, 3, ["tensor blocks.2.norm1.weight of the model is missing", "depth 2"]),
        ({"depth": 1}, 3, ["no place for tensor blocks.1.norm1.weight", "depth 2"]),
    ],
)
def test_another_encoder_is_refused(
    tmp_path: Path, source: MaskedAutoencoder, change: dict[str, int], channels: int, words: list[str]
) -> None:
    save_meta(tmp_path / "w.pth", source, decoder=True)
    sentence = refusal(TINY.model_copy(update=change), tmp_path / "w.pth", channels=channels)
    assert all(word in sentence for word in words), sentence


def test_missing_and_foreign_tensors_are_named(tmp_path: Path, source: MaskedAutoencoder) -> None:
    state = source.encoder.state_dict()
    save_weights(tmp_path / "more.safetensors", state | {"ls1.gamma": torch.ones(24)})
    assert "no place for tensor ls1.gamma" in refusal(TINY, tmp_path / "more.safetensors")
    del state["norm.weight"]
    save_weights(tmp_path / "less.safetensors", state)
    assert "tensor norm.weight of the model is missing" in refusal(TINY, tmp_path / "less.safetensors")
    save_weights(tmp_path / "other.safetensors", {"conv1.weight": torch.ones(3)})
    assert "give a file of this model" in refusal(TINY, tmp_path / "other.safetensors")


def test_positions_of_no_square_are_refused(tmp_path: Path, source: MaskedAutoencoder) -> None:
    state = source.encoder.state_dict() | {"pos_embed": torch.zeros(1, 1 + 15, 24)}
    save_weights(tmp_path / "w.safetensors", state)
    assert "pos_embed is 1 x 16 x 24 in the file but 1 x 17 x 24" in refusal(TINY, tmp_path / "w.safetensors")


def test_another_decoder_is_refused(tmp_path: Path, source: MaskedAutoencoder) -> None:
    save_meta(tmp_path / "w.pth", source, decoder=True)
    encoder = build_encoder(TINY, 16, 3)
    mae = MaskedAutoencoder(encoder, DECODER.model_copy(update={"depth": 1}), True)
    with pytest.raises(InputError, match=r"no place for tensor decoder\.blocks\.1.*width 16 and depth 2"):
        load_mae(mae, tmp_path / "w.pth")
    save_meta(tmp_path / "encoder.pth", source, decoder=False)
    with pytest.raises(InputError, match=r"encoder\.pth hold an encoder without a decoder"):
        load_mae(tiny_mae(), tmp_path / "encoder.pth")


def test_classifier_of_other_classes_is_refused(tmp_path: Path) -> None:
    classifier = build_classifier(TINY, AdapterSettings(), "cls", 16, 3, 5)
    save_weights(tmp_path / "w.safetensors", classifier.state_dict())
    other = build_classifier(TINY, AdapterSettings(), "cls", 16, 3, 4)
    with pytest.raises(InputError, match=r"head\.output\.weight is 5 x 24 in the file but 4 x 24"):
        load_weights(other, tmp_path / "w.safetensors")


def test_files_of_other_heads_are_refused_where_they_say_so(tmp_path: Path) -> None:
    mae = tiny_mae()
    assert head_counts(mae) == {"heads": "3", "decoder_heads": "2"}
    assert head_counts(mae.encoder) == {"heads": "3"}
    save_weights(tmp_path / "mae.safetensors", mae.state_dict(), head_counts(mae))
    save_weights(tmp_path / "silent.safetensors", mae.state_dict())
    other_encoder = tiny_mae(heads=4)
    with pytest.raises(InputError, match=r"mae\.safetensors.* 3 attention heads .* has 4; set encoder\.heads to 3"):
        load_encoder(other_encoder.encoder, tmp_path / "mae.safetensors")
    one_head = DECODER.model_copy(update={"heads": 1})
    other_decoder = MaskedAutoencoder(build_encoder(TINY, 16, 3), one_head, True)
    with pytest.raises(InputError, match=r"set pretrain\.decoder\.heads to 2"):
        load_mae(other_decoder, tmp_path / "mae.safetensors")
    load_mae(tiny_mae(seed=1), tmp_path / "mae.safetensors")
    load_encoder(other_decoder.encoder, tmp_path / "mae.safetensors")
    load_encoder(other_encoder.encoder, tmp_path / "silent.safetensors")


def test_heads_are_known_in_every_family_of_encoders() -> None:
    names = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224")
    for name, heads in zip(names, ("3", "3", "12"), strict=True):
        with torch.device("meta"):
            assert head_counts(timm.create_model(name, num_classes=0)) == {"heads": heads}
