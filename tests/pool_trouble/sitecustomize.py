"""Ends every process that begins to write shard CRASHING_SHARD; Python runs this where the folder is on its path.

So a test crashes a worker at a chosen moment, and maehpc needs no hook for that.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

_SHARD = os.environ.get("CRASHING_SHARD")


def _crash(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], (str, Path)):
        name = os.path.basename(arguments[0])  # noqa: PTH119 - a Path made here would be heard of again
        if name.startswith(f".c.{_SHARD}.") and ".partial-" in name:
            os.kill(os.getpid(), signal.SIGKILL)


if _SHARD is not None:
    sys.addaudithook(_crash)
