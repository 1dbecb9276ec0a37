"""`maehpc doctor` as a person and as a script see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH on which there is nothing."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


def test_a_machine_without_a_cluster(run: Run, no_slurm: None, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = run("doctor")
    assert done.code == 0, done.out
    assert "PyTorch" in done.out and "no Slurm on the PATH" in done.out
    assert done.out.splitlines()[-1].startswith("0 problems, ")
    assert sorted(tmp_path.iterdir()) == before


def test_json(run: Run, no_slurm: None) -> None:
    done = run("doctor", "--json")
    record = json.loads(done.out)
    assert done.code == 0 and record["profile"] is None
    assert {"topic", "name", "state", "text", "fix"} == set(record["findings"][0])
    assert {finding["state"] for finding in record["findings"]} <= {"ok", "warning"}


def test_a_draft_needs_a_cluster(run: Run, no_slurm: None, tmp_path: Path) -> None:
    for words in (("--draft",), ("--profile-out", "site.yaml")):
        done = run("doctor", *words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("maehpc: a profile is drafted from Slurm, which is not on the PATH")
    assert not (tmp_path / "site.yaml").exists()


def test_nothing_is_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: debug\n")
    done = run("doctor", "--profile-out", "mine.yaml")
    assert done.code == 2 and "mine.yaml exists" in done.err
    assert (tmp_path / "mine.yaml").read_text() == "kind: debug\n"
    assert run("doctor", "--profile-out", "mine.txt").code == 2


def test_what_blocks_gives_exit_code_1(
    run: Run, no_slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise ImportError('no libcudart')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    done = run("doctor")
    assert done.code == 1
    assert "PROBLEM" in done.out and "no libcudart" in done.out
    assert "CPU" in done.out  # what is broken keeps nothing else from being told
