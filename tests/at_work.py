"""Processes that are at work in the foreground, as `maehpc run` is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORKING = """
import sys, time
from pathlib import Path
from maehpc.experiment import Experiment
from maehpc.launch.foreground import Foreground
from maehpc.launch.pulse import Pulse, PulsingProgress
from maehpc.progress import Silent
work = Foreground([Experiment(Path(root)) for root in sys.argv[1:]], "explain")
pulse = Pulse(work.tell)
with work.visible(pulse), PulsingProgress(Silent(), pulse).bar("explain digits", 56, 4) as bar:
    bar.advance(8)
    pulse.write()
    print("at work", flush=True)
    time.sleep(100)
"""


@contextmanager
def working(*experiments: Path) -> Iterator[subprocess.Popen[str]]:
    for root in experiments:
        root.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", WORKING, *map(str, experiments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "at work\n"
            yield process
        finally:
            process.kill()
