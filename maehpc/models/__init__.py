"""Models: encoders, the masked autoencoder, classifiers, and weights from and to others' formats."""

from maehpc.models.classifier import Adapter, Classifier, Representation, build_classifier
from maehpc.models.encoder import (
    build_encoder,
    grid_size,
    has_class_token,
    num_prefix_tokens,
    patch_size,
    width,
)
from maehpc.models.loading import head_counts, load_encoder, load_mae, load_mae_or_encoder, load_weights
from maehpc.models.mae import MaeOutput, MaskedAutoencoder, visible_patches
from maehpc.models.weights import read_metadata, read_weights, save_weights

__all__ = [
    "Adapter",
    "Classifier",
    "MaeOutput",
    "MaskedAutoencoder",
    "Representation",
    "build_classifier",
    "build_encoder",
    "grid_size",
    "has_class_token",
    "head_counts",
    "load_encoder",
    "load_mae",
    "load_mae_or_encoder",
    "load_weights",
    "num_prefix_tokens",
    "patch_size",
    "read_metadata",
    "read_weights",
    "save_weights",
    "visible_patches",
    "width",
]
