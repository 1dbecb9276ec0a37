"""Masked-autoencoder pretraining, finetuning and explanation of vision transformers as batch jobs."""

__version__ = "0.1.0"
