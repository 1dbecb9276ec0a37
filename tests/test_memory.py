"""What is freed goes back where memory is short, and not where there is enough of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from maehpc import memory

GROWN = """
import sys
import psutil, torch
from maehpc import memory
memory.keep_freed()
memory.SHORT = float(sys.argv[1])
kept = []
for _ in range(8):
    taken = [torch.ones(1 << 18) for _ in range(100)]
    kept.append(taken[-1])  # so that the top of the heap is never free
    del taken
before = psutil.Process().memory_info().rss
gave = memory.give_back_where_short()
print(gave, before - psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize(("short", "gives"), [("1.0", True), ("0.0", False)])
def test_what_was_freed_goes_back_where_memory_is_short(short: str, gives: bool) -> None:
    found = subprocess.run([sys.executable, "-c", GROWN, short], check=True, capture_output=True, text=True)
    gave, fell = found.stdout.split()
    assert gave == str(gives)
    assert int(fell) > 50e6 if gives else abs(int(fell)) < 10e6


@pytest.fixture
def cgroup(tmp_path: Path) -> Callable[..., None]:
    """Writes files as those of a cgroup (version 2)."""

    def write(path: str, limit: str, current: int, cached: int = 0) -> None:
        folder = tmp_path / "fs" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 7\nactive_file {cached}\ninactive_file 1\n")

    return write


def limits(tmp_path: Path, membership: str) -> list[tuple[int, int]]:
    (tmp_path / "cgroup").write_text(membership)
    return list(memory._cgroups(tmp_path / "fs", tmp_path / "cgroup"))


def test_limits_of_all_groups_around_it(tmp_path: Path, cgroup: Callable[..., None]) -> None:
    cgroup("slurm/job_7", "1000", 900, 50)
    cgroup("slurm/job_7/step_0", "max", 900)
    cgroup("slurm", "5000", 1000)
    assert limits(tmp_path, "4:memory:/other\n0::/slurm/job_7/step_0\n") == [(151, 1000), (4001, 5000)]


@pytest.mark.parametrize("membership", ["", "4:memory:/other\n", "0::/absent/group\n", "0::\n", "no sense"])
def test_no_group_is_no_limit(tmp_path: Path, membership: str) -> None:
    assert limits(tmp_path, membership) == []


def test_a_damaged_file_of_a_group_is_no_limit(tmp_path: Path, cgroup: Callable[..., None]) -> None:
    cgroup("job", "1000", 900)
    (tmp_path / "fs" / "job" / "memory.stat").write_text("active_file 3\n")
    assert limits(tmp_path, "0::/job\n") == []


def test_memory_is_short_where_a_group_or_the_host_has_little(monkeypatch: pytest.MonkeyPatch) -> None:
    host = psutil.virtual_memory()
    monkeypatch.setattr(memory, "SHORT", 0.1)
    monkeypatch.setattr(memory, "_cgroups", lambda: [(99, 1000)])
    assert memory.is_short()
    monkeypatch.setattr(memory, "_cgroups", lambda: [(101, 1000)])
    for available, short in ((0.09, True), (0.11, False)):
        there = host._replace(available=int(available * host.total))
        monkeypatch.setattr(psutil, "virtual_memory", lambda there=there: there)
        assert memory.is_short() is short
