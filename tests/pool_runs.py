"""`maehpc run explain --workers 2` for tests: a study, real commands on real Ray, and what they may leave."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import SETTINGS

from maehpc.pool.host import adopt
from maehpc.recipes import load_recipe, recipe_yaml
from maehpc.stages.verify import verify_results

ALONE = ("run", "explain", "--name", "tiny")
POOLED = (*ALONE, "--workers", "2")
SHARDS = 60
_PR_SET_CHILD_SUBREAPER = 36


def command(place: Path, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "maehpc", *words],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=place,
        check=False,
        env={**os.environ, **(environment or {})},
    )


def make_study(place: Path) -> Path:
    """A folder in which one process has computed everything: 60 shards, long enough to be killed within."""
    explain = {**SETTINGS["explain"], "images": 240, "sensitivity": {"samples": 40}, "maps": {"shard_images": 4}}
    recipe = place / "tiny.yaml"
    recipe.write_text(recipe_yaml(load_recipe(None, settings={**SETTINGS, "explain": explain})))
    done = command(place, "run", "pipeline", "--recipe", str(recipe), "--name", "tiny", "--threads", "1")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy in which nothing is explained yet."""
    shutil.copytree(finished / "results", tmp_path / "results")
    for folder in ("maps", "ledger", "report"):
        shutil.rmtree(tmp_path / "results" / "tiny" / folder)
    return tmp_path


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every process that a test began has ended, also where its parent was killed, and Ray's folder is gone."""
    root = Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))  # short, for the sockets in it; other tests' lie beside
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    monkeypatch.setenv("TMPDIR", str(root))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

    def below() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True))

    before = below()
    adopt()
    try:
        yield
        deadline = time.monotonic() + 20
        while (left := below() - before) and time.monotonic() < deadline:
            bury()
            time.sleep(0.1)
        titles = []
        for process in left:
            with suppress(psutil.NoSuchProcess):
                titles.append(process.name())
        files = sorted(path.name for path in root.iterdir())
    finally:
        for process in below() - before:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        shutil.rmtree(root)
    assert not titles and not files


def bury() -> None:
    """Reaps every child of this process that has ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def maps_of(place: Path) -> Path:
    return place / "results" / "tiny" / "maps" / "digits.zarr"


def ledger_of(place: Path) -> Path:
    return place / "results" / "tiny" / "ledger" / "digits"


def record_of(place: Path, shard: int) -> Path:
    return ledger_of(place) / f"shard-{shard:05d}.json"


def files_of(place: Path, shard: int) -> list[Path]:
    """Those that a shard's record vouches for."""
    return [maps_of(place) / name for name in json.loads(record_of(place, shard).read_bytes())["files"]]


def forget(place: Path, shards: Iterable[int]) -> None:
    """Leaves nothing of some shards, as if they had not been computed yet."""
    for shard in shards:
        for path in files_of(place, shard):
            path.unlink()
        record_of(place, shard).unlink()


def recorded(place: Path) -> set[int]:
    return {int(path.stem.removeprefix("shard-")) for path in ledger_of(place).glob("shard-*.json")}


def events(place: Path, experiment: str = "tiny") -> list[dict[str, Any]]:
    """Of all pools so far; a line that is being written is left out."""
    path = place / "results" / experiment / "pool.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def stored(place: Path, experiment: str = "tiny") -> dict[str, bytes]:
    root = place / "results" / experiment / "maps"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def whole(place: Path, finished: Path) -> None:
    found, wanted = stored(place), stored(finished)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert verify_results(place / "results").problems == []


@contextmanager
def running(place: Path, shards: int, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A pooled run that has itself finished so many shards; whatever it started has ended when the block is left."""
    earlier = len(recorded(place))
    words = [sys.executable, "-m", "maehpc", *POOLED]
    told = {**os.environ, **(environment or {})}
    with subprocess.Popen(words, cwd=place, stderr=subprocess.PIPE, text=True, env=told) as process:
        below: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 120
            while len(recorded(place)) < earlier + shards:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            below = psutil.Process(process.pid).children(recursive=True)
            yield process
        finally:
            process.kill()
            process.wait()
            _, alive = psutil.wait_procs(below, timeout=30)
            left = [one.pid for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not left


def named(title: str) -> Callable[[psutil.Process], bool]:
    def found(process: psutil.Process) -> bool:
        with suppress(psutil.Error):  # it has ended meanwhile
            return any(title in word for word in process.cmdline()[:5])
        return False

    return found


def kill_one(below: psutil.Process, wanted: Callable[[psutil.Process], bool]) -> None:
    for process in below.children(recursive=True):
        if wanted(process):
            process.kill()
            return
    raise AssertionError("there is no such process")
