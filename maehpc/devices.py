"""Which device computes, and what it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psutil
import torch

from maehpc.errors import InputError
from maehpc.memory import keep_freed

MOST_THREADS = 1024
"""CPU threads of a process. Each computes a pass of its own, and memory has to hold them all."""

DeviceName = Literal["auto", "cpu", "cuda"]


def choose_device(name: DeviceName, local_rank: int = 0) -> torch.device:
    """The device of that name; `auto` is a CUDA device where there is one.

    Args:
        name: what is asked for.
        local_rank: of this process among those of its host. A process that sees one GPU takes it: its launcher chose;
            one that sees several takes that of its rank.

    Raises:
        InputError: CUDA is asked for and not there, or there are fewer GPUs than ranks.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    index = 0 if seen == 1 else local_rank
    if index >= seen:
        raise InputError(f"rank {local_rank} of this host finds {seen} GPUs; ask for as many GPUs a node as ranks")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def set_threads(threads: int | None) -> None:
    """Sets the number of CPU threads; PyTorch's own choice where None.

    Raises:
        InputError: no machine has as many cores, and memory would not hold a pass a thread.
    """
    if threads is not None and threads > MOST_THREADS:
        raise InputError(
            f"threads {threads}: {MOST_THREADS} is the most; give as many as this machine has cores (--threads, or "
            "threads in the profile)"
        )
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes the block by one CPU thread: products are rounded the same however many others there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle(device: torch.device) -> None:
    """Settles for this process how it computes on a device: full-precision products, deterministic kernels, and memory
    that is kept for the next batch on a CPU."""
    if device.type == "cpu":
        keep_freed()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        # Strictly: attention's backward stays nondeterministic where it may merely warn.
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU PyTorch and oneDNN raise a plain RuntimeError."""
    said = str(error)
    told = any(words in said for words in ("DefaultCPUAllocator", "could not create a primitive"))
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


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
