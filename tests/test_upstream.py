"""Ctrl-C keeps its meaning while MedMNIST's package is imported, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SWALLOWS = """
import os, signal, threading
try:  # a thread of its own, as torch has several: it is there to take the signal
    sender = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
    sender.start()
    sender.join()
    sum(range(1000))
except:
    print("swallowed")
print("imported")
"""


def test_ctrl_c_waits_for_the_end_of_the_import_and_is_not_lost(tmp_path: Path) -> None:
    package = tmp_path / "medmnist"
    package.mkdir()
    (package / "__init__.py").write_text(SWALLOWS)
    (package / "evaluator.py").write_text("getACC = getAUC = None")
    (package / "info.py").write_text("INFO = {}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    code = "import maehpc.upstream; print('went on')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, cwd=tmp_path
    )
    assert done.stdout == "imported\n"
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr


def test_a_home_that_cannot_be_written_is_no_news(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file")
    code = "import maehpc.upstream"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HOME": str(home)}, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
