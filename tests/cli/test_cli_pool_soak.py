"""A short soak of a pool; `make soak` has the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

SOAK = Path(__file__).parents[1] / "soak" / "soak.py"


# The driver is killed, then a worker in a store of which a shard was cut off, then Ray's head.
def test_a_minute_of_random_faults(finished: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(SOAK), "--minutes", "0.4", "--seed", "3321", "--place", str(tmp_path / "soak")]
    words += ["--study", str(finished)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as soak:
        try:
            told, _ = soak.communicate(timeout=500)
        finally:
            if soak.poll() is None:
                for process in [*psutil.Process(soak.pid).children(recursive=True), soak]:
                    process.kill()
    assert soak.returncode == 0, told
    summary = told.splitlines()[-1]
    assert "stores finished" in summary and not summary.startswith("0 rounds"), told
