"""Trouble in a worker at a moment that a test chooses; Python runs this where the folder is on its path.

CRASHING_SHARD=NUMBER: whoever begins to write that shard is killed.
POOR_WORKER=FILE: the worker that is the first to prepare a data set gets no more memory than it has, once FILE tells of
two workers.

maehpc needs no hooks for that: an audit hook hears of each file that is opened.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

LEFT_BYTES = 24 << 20
"""What a poor worker may still take: a shard that is the first needs four times that."""

_SHARD = os.environ.get("CRASHING_SHARD")
_LOG = os.environ.get("POOR_WORKER")


def _crash(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], (str, Path)):
        name = os.path.basename(arguments[0])  # noqa: PTH119 - a Path made here would be heard of again
        if name.startswith(f".c.{_SHARD}.") and ".partial-" in name:
            os.kill(os.getpid(), signal.SIGKILL)


def _impoverish(event: str, arguments: tuple[Any, ...]) -> None:
    global _LOG
    if _LOG is None or event != "open" or not str(arguments[0]).endswith("finetune/digits/stage.json"):
        return
    log, _LOG = Path(_LOG), None
    try:
        Path(f"{log}.poor").touch(exist_ok=False)
    except FileExistsError:
        return  # another is the first
    deadline = time.monotonic() + 60
    while log.read_text().count('"joined"') < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LEFT_BYTES, used + LEFT_BYTES))


if _SHARD is not None:
    sys.addaudithook(_crash)
if _LOG is not None and any("default_worker.py" in word for word in sys.orig_argv):
    sys.addaudithook(_impoverish)
