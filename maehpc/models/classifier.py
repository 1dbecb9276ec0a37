"""A classifier: an encoder, one representation of the image, and an adapter that turns it into logits."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maehpc.errors import InputError
from maehpc.models.encoder import build_encoder, has_class_token, num_prefix_tokens, width
from maehpc.models.initialisation import drawing
from maehpc.recipes import AdapterSettings, EncoderSettings

Representation = Literal["cls", "mean"]


class Adapter(nn.Sequential):
    """The head on a representation: `output`, or `hidden`, `activation`, `output`.

    Weights begin as those of PyTorch's own linear layers: uniform within 1 / sqrt(inputs).

    Args:
        width: dimension of the representation.
        classes: number of logits.
        settings: depth, hidden width, activation.
        seed: of the first weights.
    """

    def __init__(self, width: int, classes: int, settings: AdapterSettings, seed: int = 0) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        with drawing(seed, "adapter"):
            if settings.layers == 2:
                hidden = settings.hidden or width
                layers["hidden"] = nn.Linear(width, hidden)
                layers["activation"] = nn.ReLU() if settings.activation == "relu" else nn.GELU()
                width = hidden
            layers["output"] = nn.Linear(width, classes)
        super().__init__(layers)


class Classifier(nn.Module):
    """`head(represent(x))`. The explained function; its modules are each used once a forward pass.

    Args:
        encoder: without a classifier head.
        head: from representation `[B, D]` to logits `[B, K]`.
        representation: `cls`, the CLS token; or `mean`, the mean of the patch tokens.

    Raises:
        InputError: `cls` is asked of an encoder without a class token.
    """

    def __init__(self, encoder: VisionTransformer, head: nn.Module, representation: Representation) -> None:
        super().__init__()
        if representation == "cls" and not has_class_token(encoder):
            raise InputError(
                "finetune.representation: cls needs a class token, which this encoder does not have; set it to mean"
            )
        self.encoder = encoder
        self.head = head
        self.representation: Representation = representation

    def represent(self, x: Tensor) -> Tensor:
        """The image's representation, after the encoder's last norm.

        Args:
            x: normalised images `[B, C, S, S]`.

        Returns:
            `[B, D]`.
        """
        tokens: Tensor = self.encoder.forward_features(x)
        if self.representation == "cls":
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, num_prefix_tokens(self.encoder) :].mean(dim=1)
        # timm norms either all tokens (`norm`, applied above) or the pooled one (`fc_norm`); the other is an identity.
        normed: Tensor = self.encoder.fc_norm(pooled)
        return normed

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of normalised images `[B, C, S, S]`."""
        logits: Tensor = self.head(self.represent(x))
        return logits


def build_classifier(
    encoder_settings: EncoderSettings,
    adapter_settings: AdapterSettings,
    representation: Representation,
    image_size: int,
    channels: int,
    classes: int,
    drop_path: float = 0.0,
    seed: int = 0,
) -> Classifier:
    """A classifier with its first weights. Its positions can be trained, as in MAE's finetuning.

    Args:
        encoder_settings: the encoder (see `build_encoder`).
        adapter_settings: the head.
        representation: what the head sees.
        image_size: side of the square input, pixels.
        channels: of the input.
        classes: number of logits.
        drop_path: stochastic depth rate at the last block.
        seed: of all random weights.

    Raises:
        InputError: the encoder cannot be built, or has no class token where one is needed.
    """
    encoder = build_encoder(encoder_settings, image_size, channels, drop_path, seed)
    if encoder.pos_embed is not None:
        encoder.pos_embed.requires_grad_(True)
    return Classifier(encoder, Adapter(width(encoder), classes, adapter_settings, seed), representation)
