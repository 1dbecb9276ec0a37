"""The masked autoencoder (He et al. 2022): an encoder of the visible patches, a light decoder of all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from maehpc.errors import InputError
from maehpc.models.encoder import grid_size, has_class_token, layer_norm, num_prefix_tokens, patch_size, width
from maehpc.models.initialisation import TOKEN_STD, drawing, initialise_linear_and_norm
from maehpc.models.positions import sincos_positions
from maehpc.recipes import DecoderSettings

VARIANCE_EPS = 1e-6
"""Added to a patch's variance before the root, where targets are normalised."""


class MaeOutput(NamedTuple):
    """What one forward pass gives, for B images of L patches."""

    loss: Tensor
    """Scalar: mean of `per_patch` over the masked patches of the batch."""

    prediction: Tensor
    """`[B, L, p * p * C]`: every patch as predicted, in the space of the targets."""

    mask: Tensor
    """`[B, L]`: 1 where a patch was hidden from the encoder, 0 where it was seen."""

    per_patch: Tensor
    """`[B, L]`: mean squared error of every patch. `(per_patch * mask).sum()` over `mask.sum()`, each summed over
    micro-batches or ranks first, is the exact loss of the whole."""


class Masking(NamedTuple):
    """A random split of each image's L patches."""

    visible: Tensor
    """int64 `[B, keep]`: the patches kept, in the order the encoder sees them."""

    restore: Tensor
    """int64 `[B, L]`: where each patch stands in "visible, then masked"."""

    mask: Tensor
    """`[B, L]`, of the noise's dtype: 1 = masked."""


def visible_patches(patches: int, mask_ratio: float) -> int:
    """How many of an image's patches the encoder sees: `int(L * (1 - ratio))`, as in the reference.

    Raises:
        InputError: that is none or all of them.
    """
    keep = int(patches * (1 - mask_ratio))
    if not 0 < keep < patches:
        raise InputError(
            f"pretrain.mask_ratio: {mask_ratio} leaves {keep} of {patches} patches visible, where at least one must be "
            f"visible and one masked; change mask_ratio, or encoder.patch_size for more patches"
        )
    return keep


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Keeps the patches of least noise (He et al. 2022, section 3, "Simple implementation").

    Args:
        noise: `[B, L]`, uniform and independent.
        mask_ratio: fraction of patches to hide, in (0, 1).
    """
    keep = visible_patches(noise.shape[1], mask_ratio)
    shuffled = noise.argsort(dim=1, stable=True)
    restore = shuffled.argsort(dim=1)
    return Masking(shuffled[:, :keep], restore, (restore >= keep).to(noise.dtype))


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images into patches.

    Args:
        images: `[B, C, H, W]`, H and W divisible by `patch`.
        patch: side of a patch, pixels.

    Returns:
        `[B, L, patch * patch * C]`; within a patch row by row, channels innermost.
    """
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The images `[B, C, H, W]` that `patchify` cut into `[B, L, patch * patch * C]`."""
    batch, (rows, columns) = patches.shape[0], grid
    cut = patches.reshape(batch, rows, columns, patch, patch, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch, columns * patch)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[B, K]` of `tokens` `[B, L, D]`: `[B, K, D]`."""
    # By whole rows: the backward of `gather` handles every element by itself, which is slow where it is deterministic.
    first = torch.arange(len(tokens), device=index.device).unsqueeze(1) * tokens.shape[1]
    rows = tokens.flatten(0, 1).index_select(0, (index + first).flatten())
    return rows.reshape(*index.shape, -1)


class Decoder(nn.Module):
    """Blocks over all tokens, mask tokens in the place of the hidden patches, to pixels.

    Args:
        encoder_width: dimension of the encoder's tokens.
        grid: patches down and across.
        prefix: tokens before the patches.
        outputs: values a patch, `p * p * C`.
        settings: width, depth, heads.
    """

    def __init__(
        self, encoder_width: int, grid: tuple[int, int], prefix: int, outputs: int, settings: DecoderSettings
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(encoder_width, settings.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, settings.width))
        self.pos_embed = nn.Parameter(sincos_positions(settings.width, grid, prefix), requires_grad=False)
        self.blocks = nn.Sequential(
            *(
                Block(settings.width, settings.heads, qkv_bias=True, norm_layer=layer_norm)
                for _ in range(settings.depth)
            )
        )
        self.norm = layer_norm(settings.width)
        self.pred = nn.Linear(settings.width, outputs)
        initialise_linear_and_norm(self)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def forward(self, latent: Tensor, restore: Tensor) -> Tensor:
        """Predicts every patch.

        Args:
            latent: the encoder's tokens `[B, prefix + keep, D]`.
            restore: int64 `[B, L]` of `Masking`.

        Returns:
            `[B, L, outputs]`.
        """
        tokens = self.embed(latent)
        prefix, visible = tokens[:, : self.prefix], tokens[:, self.prefix :]
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), restore.shape[1] - visible.shape[1], -1)
        patches = _take(torch.cat([visible, hidden], dim=1), restore)
        tokens = torch.cat([prefix, patches], dim=1) + self.pos_embed
        prediction: Tensor = self.pred(self.norm(self.blocks(tokens)))
        return prediction[:, self.prefix :]


class MaskedAutoencoder(nn.Module):
    """An encoder to be pretrained, with a decoder that is thrown away afterwards.

    Args:
        encoder: a plain timm `VisionTransformer` with a class token and absolute positions, as `build_encoder` makes.
            It is kept, not copied.
        decoder: width, depth and heads of the decoder.
        norm_pix: predict patches normalised by their own mean and unbiased variance, instead of pixels.
        seed: of the decoder's first weights.

    Raises:
        InputError: the encoder is of another kind.
    """

    def __init__(self, encoder: VisionTransformer, decoder: DecoderSettings, norm_pix: bool, seed: int = 0) -> None:
        super().__init__()
        _require_maskable(encoder)
        self.encoder = encoder
        self.norm_pix = norm_pix
        self.patch_size = patch_size(encoder)
        self.grid = grid_size(encoder)
        self.channels = int(encoder.patch_embed.proj.in_channels)
        with drawing(seed, "decoder"):
            self.decoder = Decoder(
                width(encoder),
                self.grid,
                num_prefix_tokens(encoder),
                self.patch_size**2 * self.channels,
                decoder,
            )

    @property
    def patches(self) -> int:
        """L, the number of patches of an image."""
        return self.grid[0] * self.grid[1]

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float) -> MaeOutput:
        """Hides patches, predicts all of them, scores the hidden ones.

        Args:
            images: normalised `[B, C, S, S]`.
            noise: `[B, L]`, uniform; the patches of least noise stay visible.
            mask_ratio: fraction of patches to hide, in (0, 1).

        Raises:
            InputError: the images are not those the encoder was built for, or the ratio hides all or none.
        """
        patches = self._patches_of(images)
        assert noise.shape == patches.shape[:2], (noise.shape, patches.shape)
        masking = random_masking(noise, mask_ratio)
        prediction = self.decoder(self._encode(_take(patches, masking.visible), masking), masking.restore)
        mean, deviation = self._target_statistics(patches)
        per_patch = (prediction.to(patches.dtype) - (patches - mean) / deviation).square().mean(dim=-1)
        loss = (per_patch * masking.mask).sum() / masking.mask.sum()
        return MaeOutput(loss, prediction, masking.mask, per_patch)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
        """What the encoder saw and what the decoder made of it.

        Args:
            images: normalised `[B, C, S, S]`.
            noise: `[B, L]`, uniform.
            mask_ratio: fraction of patches to hide, in (0, 1).

        Returns:
            The images with hidden patches at 0 (the mean colour), and the images with hidden patches as predicted,
            brought back to pixels by the target's own mean and variance where `norm_pix`. Both normalised
            `[B, C, S, S]`.
        """
        output = self(images, noise, mask_ratio)
        patches = self._patches_of(images)
        mean, deviation = self._target_statistics(patches)
        hidden = output.mask.unsqueeze(-1) > 0
        predicted = output.prediction.to(patches.dtype) * deviation + mean
        masked = unpatchify(patches.masked_fill(hidden, 0.0), self.patch_size, self.grid)
        return masked, unpatchify(torch.where(hidden, predicted, patches), self.patch_size, self.grid)

    def _patches_of(self, images: Tensor) -> Tensor:
        expected = (self.channels, self.grid[0] * self.patch_size, self.grid[1] * self.patch_size)
        if images.shape[1:] != expected:
            raise InputError(
                f"images of shape {_shape(images.shape[1:])} do not fit the autoencoder, which was built for "
                f"{_shape(expected)}; set data.channels and data.image_size to its own"
            )
        return patchify(images, self.patch_size)

    def _encode(self, visible: Tensor, masking: Masking) -> Tensor:
        """Tokens `[B, prefix + keep, D]` of visible patches `[B, keep, p * p * C]`; nothing hidden is computed."""
        encoder = self.encoder
        projection = encoder.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # as patchify orders a patch
        tokens = encoder.patch_embed.norm(F.linear(visible, weight, projection.bias))

        rows = encoder.pos_embed.shape[1] - self.patches  # 0 where timm gives prefix tokens no position
        prefix_positions, positions = encoder.pos_embed[:, :rows], encoder.pos_embed[:, rows:]
        prefix = encoder.cls_token
        if encoder.reg_token is not None:
            prefix = torch.cat([prefix, encoder.reg_token], dim=1)
        if rows:
            prefix = prefix + prefix_positions
        tokens = tokens + positions[0].index_select(0, masking.visible.flatten()).reshape(tokens.shape)
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        latent: Tensor = encoder.norm(encoder.blocks(encoder.norm_pre(encoder.pos_drop(tokens))))
        return latent

    def _target_statistics(self, patches: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and deviation `[B, L, 1]` that normalise each target patch; 0 and 1 where targets are pixels."""
        if not self.norm_pix:
            return 0.0, 1.0
        mean = patches.mean(dim=-1, keepdim=True)
        return mean, (patches.var(dim=-1, keepdim=True) + VARIANCE_EPS).sqrt()


def _shape(shape: torch.Size | tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape)


def _require_maskable(encoder: VisionTransformer) -> None:
    # Not a subclass: each has its own way with positions or tokens, which `_encode` would pass over.
    if type(encoder) is not VisionTransformer:
        problem = f"it is timm's {type(encoder).__name__}"
    elif not has_class_token(encoder):
        problem = "it has no class token"
    elif encoder.pos_embed is None:
        problem = "it has no absolute positions"
    elif type(encoder.patch_embed) is not PatchEmbed:
        problem = f"its patches are embedded by {type(encoder.patch_embed).__name__}"
    else:
        return
    raise InputError(
        f"encoder.name: this encoder cannot be pretrained as a masked autoencoder because {problem}; choose vit-tiny … "
        f"vit-huge, or a plain timm ViT such as timm:vit_base_patch16_224"
    )
