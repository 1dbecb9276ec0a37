"""Memory of this process on a CPU: what was freed is kept for the next batch, as long as the host has enough of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

SHORT = 0.15
"""Share of the memory that this process may have, below which what is left of it counts as little."""

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
"""glibc's malloc.h."""

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def keep_freed() -> None:
    """Has glibc keep what is freed, in one arena for all threads, instead of giving it back to the kernel.

    Each batch frees and takes the same blocks again. Taken anew from the kernel they have to be cleared page by page: a
    tenth of the time that an explanation took. Other C libraries have no such switch and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most that glibc before 2.35 takes
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(_M_ARENA_MAX, 1)


def give_back_where_short() -> bool:
    """Gives what was freed back to the kernel where little memory is left; whether it did.

    glibc finds few of the aligned blocks that PyTorch frees when it takes others: explaining by passes of 0.5 GB, a
    process came to hold 3.2 GB, and eight of them on a host of 24 GB spent their time swapping.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not is_short():
        return False
    trim(ctypes.c_size_t(0))
    return True


def is_short() -> bool:
    """Whether the host, or a cgroup that this process is in (a Slurm job's, a container's), has little memory left."""
    memory = psutil.virtual_memory()
    return any(left < SHORT * limit for left, limit in [(memory.available, memory.total), *_cgroups()])


def _cgroups(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> Iterator[tuple[int, int]]:
    """Bytes left and limit of each limited cgroup (version 2) around this process."""
    words = ""
    with suppress(OSError):
        words = membership.read_text()
    own = next((line[3:] for line in words.splitlines() if line.startswith("0::/")), None)
    if own is None:
        return
    for group in (Path(own), *Path(own).parents):
        with suppress(OSError, ValueError, KeyError):  # the root has no limit, and "max" is none
            folder = root / group.relative_to("/")
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            yield limit - used + _cached(folder), limit


def _cached(folder: Path) -> int:
    """Bytes of a cgroup that are copies of files, which the kernel drops when they are wanted."""
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(facts["active_file"]) + int(facts["inactive_file"])
