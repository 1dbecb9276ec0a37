"""Lower precision of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRODUCTS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of the products with weights, by the recipe's word; all else stays in float32."""


@contextmanager
def in_precision(name: str) -> Iterator[None]:
    """Lets CUDA's matrix products use TF32 inside the block, where that is what the recipe says."""
    if name != "tf32":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
