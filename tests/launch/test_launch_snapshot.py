"""The snapshot of the code: whole, shared, checked, and enough to run from."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import maehpc
from maehpc.errors import RunError
from maehpc.launch.snapshot import (
    Snapshot,
    current_snapshot,
    discard_snapshot,
    take_snapshot,
    verify_snapshot,
)
from maehpc.launch.worker import main as worker_main
from maehpc.shipped import SNAPSHOT_MANIFEST


def test_what_is_in_it(tmp_path: Path) -> None:
    expected = current_snapshot(tmp_path)
    assert list(tmp_path.iterdir()) == []
    snapshot = take_snapshot(tmp_path)
    assert (snapshot.path, snapshot.digest, snapshot.new) == (expected.path, expected.digest, True)
    assert snapshot.path == tmp_path / ".code" / snapshot.digest[:16]
    names = {path.relative_to(snapshot.path).as_posix() for path in snapshot.path.rglob("*") if path.is_file()}
    expected_names = {"maehpc/launch/worker.py", "cluster/mini.yaml", "cluster/profile.schema.json"}
    assert names >= {*expected_names, "jobs/pipeline/demo.yaml", "maehpc/report/templates/index.html"}
    assert not any("__pycache__" in name or name.startswith(("tests/", "cluster/mini/")) for name in names)
    assert all(not os.access(path, os.W_OK) or os.getuid() == 0 for path in snapshot.path.rglob("*"))
    assert {path.stat().st_mode & 0o222 for path in (snapshot.path, *snapshot.path.rglob("*"))} == {0}


def test_a_program_runs_from_it_with_its_recipes_and_profiles(tmp_path: Path) -> None:
    """Also where a checkout lies in the working folder and on PYTHONPATH behind it."""
    snapshot = take_snapshot(tmp_path)
    program = (
        "import maehpc, maehpc.launch.script; from maehpc.recipes import list_recipes; "
        "from maehpc.launch.profile import list_profiles; "
        "print(maehpc.__file__, 'pipeline/demo' in list_recipes(), 'mini' in list_profiles())"
    )
    checkout = Path(maehpc.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{snapshot.path}:{checkout}", "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, cwd=checkout, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(snapshot.path / "maehpc" / "__init__.py"), "True", "True"]
    verify_snapshot(snapshot.path, snapshot.digest)  # byte code of that run does not count as a change


def test_the_same_code_is_kept_once_and_quickly(tmp_path: Path) -> None:
    first = take_snapshot(tmp_path)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert take_snapshot(tmp_path) == Snapshot(first.path, first.digest, new=False)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.2
    assert [path.name for path in (tmp_path / ".code").iterdir()] == [first.digest[:16]]


def _take(results: str) -> str:
    return str(take_snapshot(Path(results)).path)


def test_clients_that_take_it_at_the_same_time_leave_one(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        paths = set(pool.map(_take, [str(tmp_path)] * 12))
    assert len(paths) == 1
    assert [str(path) for path in (tmp_path / ".code").iterdir()] == list(paths)
    snapshot = current_snapshot(tmp_path)
    verify_snapshot(snapshot.path, snapshot.digest)


def _rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "add", "manifest", "no manifest", "other digest"])
def test_damage_is_named_and_mended_by_the_next_submission(damage: str, tmp_path: Path) -> None:
    snapshot = take_snapshot(tmp_path)
    victim = snapshot.path / "maehpc" / "launch" / "worker.py"
    digest = snapshot.digest
    victim.parent.chmod(0o755)
    snapshot.path.chmod(0o755)
    if damage == "change":
        _rewrite(victim, victim.read_bytes().replace(b"signal", b"Signal", 1))
    elif damage == "truncate":
        _rewrite(victim, b"")
    elif damage == "remove":
        victim.unlink()
    elif damage == "add":
        victim = victim.with_name("torch.py")
        victim.write_text("")
    elif damage == "manifest":
        victim = snapshot.path / SNAPSHOT_MANIFEST
        _rewrite(victim, victim.read_bytes().replace(b"worker", b"Worker"))
    elif damage == "no manifest":
        victim = snapshot.path / SNAPSHOT_MANIFEST
        victim.unlink()
    else:
        digest, victim = "0" * 64, snapshot.path / SNAPSHOT_MANIFEST
    with pytest.raises(RunError) as caught:
        verify_snapshot(snapshot.path, digest)
    assert str(victim) in str(caught.value)
    assert "submit the job again" in str(caught.value)
    if damage != "other digest":
        assert take_snapshot(tmp_path).new
        verify_snapshot(snapshot.path, snapshot.digest)


def test_only_what_this_process_made_is_taken_back(tmp_path: Path) -> None:
    first = take_snapshot(tmp_path)
    discard_snapshot(take_snapshot(tmp_path))
    assert first.path.is_dir()
    discard_snapshot(first)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / ".code").write_text("a file")
    with pytest.raises(RunError, match="cannot write"):
        take_snapshot(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".code"]


def test_the_worker_that_is_imported_here_is_the_one_in_it(tmp_path: Path) -> None:
    """What a job starts by name must be in the snapshot."""
    names = take_snapshot(tmp_path).path / worker_main.__module__.replace(".", "/")
    assert names.with_suffix(".py").is_file()
    assert names.with_name("after.py").is_file()
    assert names.with_name("local.py").is_file()
