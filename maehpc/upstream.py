"""MedMNIST's package, imported such that Ctrl-C keeps its meaning.

Its `__init__` imports inside a bare `except`, which would swallow the interruption of a person and print about missing
packages instead. So the signal waits until the import is over. It takes seconds (pandas and scikit-learn come along):
whoever needs this module imports it where it is used.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """By its handler: a thread that does not block the signal would take it, and the handler run here all the same."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    came: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


with _ctrl_c_waits(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to setup default root", UserWarning)  # its cache; ours may be elsewhere
    import medmnist
    from medmnist.evaluator import getACC, getAUC
    from medmnist.info import INFO

__all__ = ["INFO", "getACC", "getAUC", "medmnist"]
