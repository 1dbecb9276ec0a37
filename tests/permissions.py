"""Permissions that hold: a superuser passes over those of files unless two of its capabilities rest."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_VERSION_3 = 0x20080522
_PASSES_OVER = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def closed(path: Path) -> Iterator[None]:
    """Nobody may read, write or enter `path` for the length of the block, this thread and those it starts included."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        pytest.skip(f"capabilities cannot be asked for here: {os.strerror(ctypes.get_errno())}")
    before, mode = sets[0].effective, path.stat().st_mode
    try:
        path.chmod(0)
        sets[0].effective = before & ~_PASSES_OVER
        assert not libc.capset(ctypes.byref(header), sets)
        yield
    finally:
        sets[0].effective = before
        assert not libc.capset(ctypes.byref(header), sets)
        path.chmod(mode)
