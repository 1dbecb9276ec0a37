"""Which device computes, and what it is."""

from __future__ import annotations

import os
import platform
from typing import Any, Literal

import psutil
import torch

from maehpc.errors import InputError

DeviceName = Literal["auto", "cpu", "cuda"]


def choose_device(name: DeviceName) -> torch.device:
    """The device of that name; `auto` is a CUDA device where there is one.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def set_threads(threads: int | None) -> None:
    """Sets the number of CPU threads; PyTorch's own choice where None."""
    if threads is not None:
        torch.set_num_threads(threads)


def make_reproducible(device: torch.device) -> None:
    """Settles what could change a number on this device: full-precision products and deterministic kernels."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        # Strictly: attention's backward stays nondeterministic where it may merely warn.
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def machine(device: torch.device) -> dict[str, Any]:
    """The machine as provenance tells it; no host name, no path."""
    facts: dict[str, Any] = {
        "processor": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts
