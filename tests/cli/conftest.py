"""Runs the command line in this process, as `maehpc` would."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from command_line import Outcome, Run
from pool_runs import finished, place
from tiny import SETTINGS

from maehpc.cli.main import main
from maehpc.recipes import load_recipe, recipe_yaml

__all__ = ["finished", "place"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`run("data", "list")` in an empty working folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("MAEHPC_CLUSTER", "MAEHPC_PACKS"):  # a person's own
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["maehpc", *words])
        capsys.readouterr()
        code, threads = 0, torch.get_num_threads()
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        finally:
            torch.set_num_threads(threads)  # the command sets its own; here it shares the process with other tests
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A recipe that is computed in seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_yaml(load_recipe(None, settings=SETTINGS)))
    return str(path)
