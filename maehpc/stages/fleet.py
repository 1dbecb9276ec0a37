"""Where a pool's workers are, and how many threads and GPUs each has."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from maehpc.addresses import own_addresses
from maehpc.errors import InputError
from maehpc.explain.explainer import passes_that_fit

if TYPE_CHECKING:
    from maehpc.pool.cluster import Head

Lost = Callable[[], str | None]
"""Why a cluster is gone; None while it is there."""
Announce = Callable[["Head"], object]
"""Told of a cluster's head once it is known where it will listen."""


@dataclass(frozen=True)
class Fleet:
    """Where a pool's workers are.

    Attributes:
        workers: how many there are at first.
        threads: CPU threads of each.
        gpus: of each; 0 or 1.
        cluster: begins a cluster of Ray on which they all fit, for the length of a block.
        seconds_left: until it has to be given back; None while nobody knows of an end.
        host: of its head, as people elsewhere know it; empty where that is this machine.
    """

    workers: int
    threads: int
    gpus: int
    cluster: Callable[[Announce], AbstractContextManager[Lost]]
    seconds_left: Callable[[], float | None] = lambda: None
    host: str = ""


def local_fleet(device: torch.device, workers: int, address: str | None = None, dashboard: int | None = None) -> Fleet:
    """Workers of this machine, each on a GPU or a part of the cores.

    Args:
        device: that they compute on.
        workers: how many.
        address: of this host, as a number, by which workers of other hosts may join; None keeps all others out.
        dashboard: port for Ray's dashboard; 0: a free one; None: no dashboard.

    Raises:
        InputError: more workers than GPUs, or the address is none of this host's.
    """
    from maehpc.pool.cluster import LOOPBACK, cluster

    if address is not None and address not in own_addresses():
        raise InputError(
            f"--pool-address {address}: this host has {', '.join(own_addresses())}; give the one that others reach"
        )

    gpus = gpus_each(device, workers)
    threads = threads_each(torch.get_num_threads(), workers)
    return Fleet(
        workers,
        threads,
        gpus,
        lambda announce: cluster(workers, gpus * workers, address or LOOPBACK, announce, dashboard=dashboard),
    )


MOST_A_CORE = 8
"""Workers that share a CPU core at most: each has a model of its own, and Ray begins a process for each at once."""


def threads_each(cpus: int, workers: int) -> int:
    """CPU threads of each of a host's workers: each thread computes a pass of its own, and all share its memory.

    Args:
        cpus: of the host.
        workers: on it.
    """
    return max(1, min(cpus, passes_that_fit()) // workers)


def gpus_each(device: torch.device, workers: int) -> int:
    """GPUs that each worker takes.

    Raises:
        InputError: there are fewer than workers, or far fewer cores where they compute on the CPU.
    """
    if device.type != "cuda":
        cores = len(os.sched_getaffinity(0))
        if workers > MOST_A_CORE * cores:
            raise InputError(
                f"--workers {workers}: a core serves {MOST_A_CORE} at most, and there are {cores}; ask for {cores}, "
                "which is as fast as it gets"
            )
        return 0
    seen = torch.cuda.device_count()
    if workers > seen:
        raise InputError(f"--workers {workers}: each takes a GPU, and PyTorch sees {seen}; ask for {seen} or fewer")
    return 1
