"""What may befall a pool beside kills: Ray that does not start, shards that crash, too little memory, a full disk, and
damaged stores. The same command then goes on to the bytes of one undisturbed process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pool_runs import (
    POOLED,
    SHARDS,
    command,
    events,
    files_of,
    forget,
    ledger_of,
    maps_of,
    record_of,
    recorded,
    whole,
)
from small_disks import small_disk

from maehpc.files import is_partial
from maehpc.maps import MapStore
from maehpc.maps.ledger import Ledger
from maehpc.ownership import own
from maehpc.stages.verify import verify_results

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]

TROUBLE = Path(__file__).parents[1] / "pool_trouble"


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the finished study in which some shards are not computed yet."""

    def make(*shards: int, name: str = "study") -> Path:
        place = tmp_path / name
        shutil.copytree(finished / "results", place / "results")
        forget(place, shards)
        return place

    return make


def troubled(**trouble: str) -> dict[str, str]:
    """What a command has to be told so that its workers get into trouble; see `pool_trouble/sitecustomize.py`."""
    return {**trouble, "PYTHONPATH": f"{TROUBLE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def done(place: Path) -> list[int]:
    """Shards of the latest pool, in rising order."""
    told = events(place)
    latest = max(number for number, event in enumerate(told) if event["event"] == "begun")
    return sorted(event["shard"] for event in told[latest:] if event["event"] == "done")


def goes_on(place: Path, finished: Path, shards: list[int]) -> None:
    """The same command computes just those shards, and the store is whole."""
    again = command(place, *POOLED)
    assert again.returncode == 0, again.stderr
    assert done(place) == shards
    whole(place, finished)


def partials(place: Path) -> list[Path]:
    return [path for path in (place / "results").rglob("*") if is_partial(path)]


# A network without its loopback, a machine where nothing but the study can be written, and a program called ray.
NO_LOOPBACK = ("unshare", "--net")
NO_ROOM = (
    *("unshare", "--mount", "sh", "-ec"),
    'mount --bind "$0" "$0"; mount --rbind /tmp /tmp; mount -o remount,bind,ro /tmp; '
    "for place in /dev/shm /var/tmp; do mount -t tmpfs -o ro none $place; done; "
    'cd "$0"; exec "$@"',
)


def test_ray_that_does_not_start(unfinished: Callable[..., Path], finished: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces of one's own are not permitted here")
    stranger = tmp_path / "ray"
    stranger.mkdir()
    (tmp_path / "inductor").mkdir()  # PyTorch wants it, and would not get it where nothing can be written
    (stranger / "__init__.py").write_text("raise ImportError('this is not Ray')\n")
    cases = {
        "loopback": (NO_LOOPBACK, "this host does not reach itself at 127.0.0.2"),
        "room-with-a-path-that-is-too-long-for-sockets": (NO_ROOM, "neither TMPDIR nor /tmp nor /dev/shm"),
        "stranger": (
            ("env", f"PYTHONPATH={os.pathsep.join(filter(None, (str(tmp_path), os.environ.get('PYTHONPATH'))))}"),
            "this is not Ray",
        ),
    }
    runs = {}
    for name, (before, _) in cases.items():
        place = unfinished(3, 4, name=name)
        words = [*before, *([str(place)] if before is NO_ROOM else []), sys.executable, "-m", "maehpc", *POOLED]
        runs[name] = subprocess.Popen(words, cwd=place, stderr=subprocess.PIPE, text=True)
    told = {name: process.communicate(timeout=120)[1] for name, process in runs.items()}
    for name, (_, sentence) in cases.items():
        assert runs[name].returncode == 1, told[name]
        said = [line for line in told[name].splitlines() if not line.startswith("explain digits: ")]
        assert len(said) == 1 and said[0].startswith("maehpc: Ray "), told[name]
        assert sentence in told[name]
        place = tmp_path / name
        assert recorded(place) == set(range(SHARDS)) - {3, 4} and not partials(place)
        assert sorted(path.name for path in place.iterdir()) == ["results"]
    goes_on(tmp_path / "loopback", finished, [3, 4])


def test_a_shard_that_always_ends_its_worker(unfinished: Callable[..., Path], finished: Path) -> None:
    missing = [7, 20, 21, 22, 23, 24]
    place = unfinished(*missing)
    crashed = command(place, *POOLED, environment=troubled(CRASHING_SHARD="20"))
    assert crashed.returncode == 1, crashed.stderr
    assert "1 of the shards failed" in crashed.stderr and "shard 20 of digits" in crashed.stderr
    assert "Traceback" not in crashed.stderr and crashed.stdout == "", "Ray says nothing of its own"
    assert recorded(place) == set(range(SHARDS)) - {20} and not partials(place)
    assert done(place) == [shard for shard in missing if shard != 20]
    assert sum(event["event"] == "left" for event in events(place)) >= 3
    assert [(found["kind"], found["shard"]) for found in verify_results(place / "results").problems] == [
        ("unrecorded", 20)
    ]
    goes_on(place, finished, [20])


def test_a_worker_without_memory(unfinished: Callable[..., Path], finished: Path) -> None:
    """What it gives back is computed elsewhere, in passes as long as ever."""
    missing = list(range(30, 40))
    place = unfinished(*missing)
    log = place / "results" / "tiny" / "pool.jsonl"
    poor = command(place, *POOLED, environment=troubled(POOR_WORKER=str(log)))
    assert poor.returncode == 0, poor.stderr
    failed = [event for event in events(place) if event["event"] == "failed"]
    assert failed and len({event["worker"] for event in failed}) == 1, "one had no memory, the other enough"
    assert done(place) == missing
    whole(place, finished)


def test_the_disk_fills_in_the_middle_of_a_shard(
    unfinished: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    missing = list(range(40, 60))
    place = unfinished(*missing)
    maps = place / "results" / "tiny" / "maps"
    maps.rename(tmp_path / "aside")
    with small_disk(maps) as mount:
        mount("size=64m")
        shutil.copytree(tmp_path / "aside", maps, dirs_exist_ok=True)
        used = shutil.disk_usage(maps).used
        mount(f"size={used + (200 << 10)}")  # some shards of five files, each of a page
        full = command(place, *POOLED)
        assert full.returncode == 1, full.stderr
        last = full.stderr.splitlines()[-1]
        assert last.startswith(f"maehpc: cannot write {maps / 'digits.zarr'}/"), full.stderr
        assert ".partial-" not in last
        assert "the disk is full; free some space" in last and "Traceback" not in full.stderr
        computed = recorded(place) - set(range(40))
        assert 0 < len(computed) < 20 and not partials(place)
        problems = verify_results(place / "results").problems
        assert {found["kind"] for found in problems} == {"unrecorded"}
        assert {found["shard"] for found in problems} == set(missing) - computed
        mount("size=64m")
        goes_on(place, finished, sorted(set(missing) - computed))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def another_store(place: Path, folder: Path, shard: int) -> Path:
    """A store of another seed that holds one shard of noise; its ledger lies beside it."""
    record = Ledger(ledger_of(place)).store()
    assert record is not None
    layout, draw = record.layout, np.random.default_rng(0)
    count = len(range(*layout.span(shard)))
    arrays = {
        name: draw.integers(0, 2, (count, *array.shape)).astype(array.dtype) for name, array in layout.arrays.items()
    }
    with own(folder / "ledger") as owner:
        other = replace(layout, attributes={**layout.attributes, "seed": 1})
        MapStore.create(folder / "maps", folder / "ledger", other, {**record.inputs, "seed": 1}, owner).write_shard(
            shard, arrays
        )
    return folder


def test_whatever_is_damaged_is_computed_again_and_nothing_else(
    unfinished: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    place = unfinished(0, 1)
    maps, ledger = maps_of(place), ledger_of(place)
    other = another_store(place, tmp_path / "other", shard=16)
    expected: dict[int, tuple[str, Path]] = {0: ("unrecorded", record_of(place, 0))}
    expected[1] = ("unrecorded", record_of(place, 1))

    def harm(shard: int, kind: str, path: Path, do: Callable[[Path], object]) -> None:
        do(path)
        expected[shard] = (kind, path)

    def replace_by(shard: int, path: Path, foreign: Path) -> None:
        kind = "truncated" if foreign.stat().st_size < path.stat().st_size else "flipped"
        harm(shard, kind, path, lambda path: shutil.copy(foreign, path))

    harm(10, "flipped", files_of(place, 10)[0], flip)
    harm(11, "truncated", files_of(place, 11)[1], lambda path: cut(path, 0.5))
    harm(12, "truncated", files_of(place, 12)[2], lambda path: cut(path, 0.0))
    harm(13, "missing", files_of(place, 13)[3], Path.unlink)
    neighbour, theirs = maps / "deeplift" / "c.15.0.0", other / "maps" / "scores" / "c.16.0"
    replace_by(14, maps / "deeplift" / "c.14.0.0", neighbour)
    replace_by(16, maps / "scores" / "c.16.0", theirs)
    harm(17, "unrecorded", record_of(place, 17), lambda path: cut(path, 0.5))
    harm(18, "unrecorded", record_of(place, 18), lambda path: cut(path, 0.0))
    harm(19, "foreign", record_of(place, 19), lambda path: shutil.copy(record_of(place, 20), path))
    shutil.copy(other / "ledger" / "shard-00016.json", ledger / "shard-00021.json")
    expected[21] = ("foreign", record_of(place, 21))
    strangers = [maps / "deeplift" / f"c.{SHARDS}.0.0", ledger / f"shard-{SHARDS:05d}.json"]
    shutil.copy(neighbour, strangers[0])
    shutil.copy(record_of(place, 20), strangers[1])

    def found() -> set[tuple[str, int | None, str]]:
        return {(one["kind"], one["shard"], one["path"]) for one in verify_results(place / "results").problems}

    outside = {("foreign", None, str(path)) for path in strangers}
    assert found() == outside | {(kind, shard, str(path)) for shard, (kind, path) in expected.items()}

    cut(ledger / "store.json", 0.5)
    mended = command(place, *POOLED)
    assert mended.returncode == 0, mended.stderr
    assert done(place) == sorted(expected)
    assert found() == outside, "what is not ours is named and left alone"
    told = command(place, "verify", "results")
    assert told.returncode == 1 and all(path.name in told.stdout + told.stderr for path in strangers)
    for path in strangers:
        path.rename(tmp_path / path.name)
    told = command(place, "verify", "results")
    assert told.returncode == 0, told.stdout
    whole(place, finished)
    assert json.loads((ledger / "store.json").read_bytes())["digest"] in record_of(place, 10).read_text()
