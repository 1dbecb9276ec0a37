"""How many workers a machine takes, and what each of them gets."""

from __future__ import annotations

import os

import pytest
import torch

from maehpc.errors import InputError
from maehpc.stages.fleet import MOST_A_CORE, gpus_each, local_fleet

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize("workers", [1, CORES, MOST_A_CORE * CORES])
def test_cores_may_be_shared(workers: int) -> None:
    assert gpus_each(torch.device("cpu"), workers) == 0
    fleet = local_fleet(torch.device("cpu"), workers)
    assert (fleet.workers, fleet.gpus) == (workers, 0) and fleet.threads >= 1


@pytest.mark.parametrize("workers", [MOST_A_CORE * CORES + 1, 500_000])
def test_more_workers_than_the_cores_bear_are_refused(workers: int) -> None:
    with pytest.raises(InputError, match=f"--workers {workers}: .* there are {CORES}; ask for {CORES},"):
        local_fleet(torch.device("cpu"), workers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_a_worker_takes_a_gpu() -> None:
    with pytest.raises(InputError, match="--workers 1: each takes a GPU, and PyTorch sees 0; ask for 0 or fewer"):
        gpus_each(torch.device("cuda"), 1)
