"""Fixtures that several packages share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from mini_cluster import breakable_mini, mini, on_mini
from pool_runs import nothing_left

settings.register_profile("maehpc", deadline=None)  # nor is anything else here timed: a busy disk is no defect
settings.load_profile("maehpc")

__all__ = ["breakable_mini", "mini", "nothing_left", "on_mini"]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; the test is skipped where there is none."""
    folder = os.environ.get("MAEHPC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MAEHPC_DATA is not set to a folder of real images")
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """Small models run slower on several threads, and two runs must have as many."""
    torch.set_num_threads(1)
