"""The masked autoencoder against transformers' ViTMAEForPreTraining, and what must hold of it besides."""

from __future__ import annotations

import pytest
import torch
from models_tiny import DECODER, TINY, draw, draw_noise, hf_mae, scrambled, tiny_mae
from torch.nn import functional as F

from maehpc.errors import InputError
from maehpc.models import MaskedAutoencoder, build_encoder, convert, visible_patches
from maehpc.models.mae import Masking, patchify, random_masking, unpatchify
from maehpc.recipes import EncoderSettings


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(
    ("image_size", "channels", "patch", "ratio"), [(16, 3, 4, 0.75), (24, 1, 8, 0.5), (28, 3, 4, 0.9), (12, 2, 3, 0.4)]
)
def test_equals_transformers(image_size: int, channels: int, patch: int, ratio: float, norm_pix: bool) -> None:
    """Loss, prediction, mask and every gradient, in float64 to well below float32's rounding."""
    theirs = scrambled(hf_mae(image_size, channels, patch, norm_pix, ratio)).double()
    ours = tiny_mae(image_size, channels, norm_pix, patch_size=patch).double()
    ours.load_state_dict(convert.to_ours(theirs.state_dict()))
    images = draw(3, channels, image_size, image_size).double()
    noise = draw_noise(3, ours.patches).double()

    expected = theirs(images, noise=noise)
    output = ours(images, noise, ratio)
    torch.testing.assert_close(output.mask, expected.mask.double(), rtol=0, atol=0)
    torch.testing.assert_close(output.prediction, expected.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)

    expected.loss.backward()
    output.loss.backward()
    gradients = {
        name: value.grad for name, value in ours.named_parameters() if value.requires_grad and value.grad is not None
    }
    wanted = convert.to_ours({name: value.grad for name, value in theirs.named_parameters() if value.grad is not None})
    assert gradients.keys() == wanted.keys()
    assert gradients.keys() == {name for name, value in ours.named_parameters() if value.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_equals_transformers_in_float32() -> None:
    theirs, ours = scrambled(hf_mae()), tiny_mae()
    ours.load_state_dict(convert.to_ours(theirs.state_dict()))
    images, noise = draw(3, 3, 16, 16), draw_noise(3, 16)
    expected, output = theirs(images, noise=noise), ours(images, noise, 0.75)
    torch.testing.assert_close(output.prediction, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",  # positions for the class token too
        "deit3_small_patch16_224",  # positions for patches alone
        "vit_small_patch14_reg4_dinov2",  # registers
        "vit_xsmall_patch16_clip_224",  # norm before the blocks, no bias in the projection
    ],
)
def test_encoding_all_patches_is_timms_forward(name: str) -> None:
    size = 28 if "patch14" in name else 32
    encoder = build_encoder(EncoderSettings(name=f"timm:{name}", weights="scratch"), size, 3).eval()
    mae = MaskedAutoencoder(encoder, DECODER, True)
    images = draw(2, 3, size, size)
    everything = torch.arange(mae.patches).expand(2, -1)
    masking = Masking(everything, everything, torch.zeros(2, mae.patches))
    with torch.no_grad():
        tokens = mae._encode(patchify(images, mae.patch_size), masking)
        torch.testing.assert_close(tokens, encoder.forward_features(images), rtol=1e-4, atol=1e-4)
    mae(images, draw_noise(2, mae.patches), 0.5).loss.backward()
    assert all(value.grad is not None for value in encoder.parameters() if value.requires_grad)


def test_hidden_patches_are_never_seen() -> None:
    """Other pixels under the mask change the loss, not one bit of the prediction."""
    mae = tiny_mae()
    images, noise = draw(2, 3, 16, 16), draw_noise(2, 16)
    first = mae(images, noise, 0.75)
    hidden = first.mask.unsqueeze(-1) > 0
    others = unpatchify(torch.where(hidden, draw(2, 16, 48, seed=9), patchify(images, 4)), 4, (4, 4))
    second = mae(others, noise, 0.75)
    assert torch.equal(first.prediction, second.prediction)
    assert first.loss != second.loss


def test_only_hidden_patches_are_scored() -> None:
    mae = tiny_mae(norm_pix=False)
    images = draw(2, 3, 16, 16)
    output = mae(images, draw_noise(2, 16), 0.75)
    target = patchify(images, 4)
    errors = [
        F.mse_loss(output.prediction[image, patch], target[image, patch])
        for image in range(2)
        for patch in range(16)
        if output.mask[image, patch]
    ]
    assert len(errors) == 24
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())


def test_micro_batches_add_up_to_the_batch() -> None:
    mae = tiny_mae().double()
    images, noise = draw(5, 3, 16, 16).double(), draw_noise(5, 16).double()
    parts = [mae(images[part], noise[part], 0.6) for part in (slice(0, 2), slice(2, 5))]
    total = sum((part.per_patch * part.mask).sum() for part in parts) / sum(part.mask.sum() for part in parts)
    torch.testing.assert_close(total, mae(images, noise, 0.6).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("patches", "ratio", "keep"), [(196, 0.75, 49), (16, 0.9, 1), (49, 0.75, 12), (256, 0.5, 128)])
def test_as_many_patches_stay_as_in_the_reference(patches: int, ratio: float, keep: int) -> None:
    assert visible_patches(patches, ratio) == keep
    masking = random_masking(draw_noise(3, patches), ratio)
    assert (masking.mask.sum(dim=1) == patches - keep).all()
    assert masking.visible.shape == (3, keep)


def test_least_noise_stays() -> None:
    masking = random_masking(torch.tensor([[0.3, 0.1, 0.4, 0.2]]), 0.5)
    assert masking.visible.tolist() == [[1, 3]]
    assert masking.mask.tolist() == [[1, 0, 1, 0]]
    assert masking.restore.tolist() == [[2, 0, 3, 1]]


def test_equal_noise_keeps_the_order() -> None:
    assert random_masking(torch.zeros(1, 400), 0.5).visible.tolist() == [list(range(200))]


def test_patchify_puts_rows_first_and_channels_last() -> None:
    images = draw(2, 3, 6, 4)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for patch in range(6):
        row, column = divmod(patch, 2)
        square = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[:, patch], square.permute(0, 2, 3, 1).reshape(2, 12))
    assert torch.equal(unpatchify(patches, 2, (3, 2)), images)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_pastes_what_was_seen_and_restores_what_was_not(norm_pix: bool) -> None:
    mae = tiny_mae(norm_pix=norm_pix)
    images, noise = draw(2, 3, 16, 16), draw_noise(2, 16)
    masked, reconstructed = mae.reconstruct(images, noise, 0.75)
    output = mae(images, noise, 0.75)
    assert masked.shape == reconstructed.shape == images.shape
    target = patchify(images, 4)
    for image in range(2):
        for patch in range(16):
            seen = patchify(masked, 4)[image, patch], patchify(reconstructed, 4)[image, patch]
            pixels, predicted = target[image, patch], output.prediction[image, patch]
            if output.mask[image, patch]:
                if norm_pix:
                    predicted = predicted * (pixels.var(unbiased=True) + 1e-6) ** 0.5 + pixels.mean()
                assert not seen[0].any()
                torch.testing.assert_close(seen[1], predicted)
            else:
                assert torch.equal(seen[0], pixels)
                assert torch.equal(seen[1], pixels)


def test_perfect_prediction_of_normalised_patches_has_no_loss() -> None:
    """A decoder that can say one thing alone meets images made of that thing at any brightness and contrast."""
    mae = tiny_mae(norm_pix=True).double()
    pattern = draw(48).double()
    pattern = (pattern - pattern.mean()) / pattern.std()
    with torch.no_grad():
        mae.decoder.pred.weight.zero_()
        mae.decoder.pred.bias.copy_(pattern)
    gain, offset = 1 + draw_noise(2, 16, 1).double(), draw(2, 16, 1).double()
    images = unpatchify(pattern * gain + offset, 4, (4, 4))
    noise = draw_noise(2, 16)
    assert mae(images, noise, 0.75).loss < 1e-11
    _, reconstructed = mae.reconstruct(images, noise, 0.75)
    torch.testing.assert_close(reconstructed, images, rtol=0, atol=1e-5)


def test_runs_in_bfloat16() -> None:
    mae = tiny_mae()
    images, noise = draw(2, 3, 16, 16), draw_noise(2, 16)
    full = mae(images, noise, 0.75)
    with torch.autocast("cpu", torch.bfloat16):
        half = mae(images, noise, 0.75)
    half.loss.backward()
    assert half.prediction.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, full.loss, rtol=0.02, atol=0)


def test_positions_stay_fixed() -> None:
    mae = tiny_mae()
    fixed = {name for name, value in mae.named_parameters() if not value.requires_grad}
    assert fixed == {"encoder.pos_embed", "decoder.pos_embed"}


def test_decoder_weights_depend_on_the_seed_alone() -> None:
    first, again, other = tiny_mae(seed=3), tiny_mae(seed=3), tiny_mae(seed=4)
    name = "decoder.pred.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(("ratio", "keep"), [(0.95, 0), (0.0, 16)])
def test_a_ratio_that_hides_all_or_none_is_refused(ratio: float, keep: int) -> None:
    with pytest.raises(InputError, match=rf"pretrain\.mask_ratio: {ratio} leaves {keep} of 16 patches visible"):
        tiny_mae()(draw(1, 3, 16, 16), draw_noise(1, 16), ratio)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match="1 x 16 x 16 do not fit the autoencoder, which was built for 3 x 16 x 16"):
        tiny_mae()(draw(2, 1, 16, 16), draw_noise(2, 16), 0.75)


@pytest.mark.parametrize(
    ("name", "size", "problem"),
    [
        ("eva02_tiny_patch14_224", 28, "timm's Eva"),
        ("deit_tiny_distilled_patch16_224", 32, "VisionTransformerDistilled"),
        ("vit_wee_patch16_reg1_gap_256", 32, "no class token"),
        ("vit_tiny_r_s16_p8_224", 32, "HybridEmbed"),
    ],
)
def test_encoders_that_cannot_be_masked_are_refused(name: str, size: int, problem: str) -> None:
    encoder = build_encoder(EncoderSettings(name=f"timm:{name}", weights="scratch"), size, 3)
    with pytest.raises(InputError, match=rf"cannot be pretrained as a masked autoencoder because .*{problem}"):
        MaskedAutoencoder(encoder, DECODER, True)


def test_loss_falls_when_trained() -> None:
    mae = MaskedAutoencoder(build_encoder(TINY, 16, 3), DECODER, norm_pix=False)
    images, noise = draw(4, 3, 1, 1).expand(4, 3, 16, 16), draw_noise(4, 16)
    optimizer = torch.optim.AdamW(mae.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = mae(images, noise, 0.75).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
