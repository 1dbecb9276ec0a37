"""What a process settles before it computes."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from maehpc.devices import settle
if sys.argv[1] == "settled":
    settle(torch.device("cpu"))
torch.set_num_threads(1)

def batch():
    return torch.ones(10_000_000).sum()  # 40 MB, which glibc by itself takes from the kernel each time

for _ in range(20):
    batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by a switch of glibc's")
def test_the_next_batch_takes_the_last_ones_memory() -> None:
    def faults(how: str) -> int:
        words = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    pages = 10 * 10_000_000 * 4 // 4096
    assert faults("settled") < pages / 3 < pages * 0.9 < faults("unsettled")
