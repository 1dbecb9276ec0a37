"""kill -9 at any instant, in processes of their own: the ledger never vouches for what is not there, and running
again ends with the bytes of a run that was never killed."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import shutil
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import maps_writer
import pytest

from maehpc.errors import InputError
from maehpc.maps import StoreLayout, verify
from maehpc.ownership import own


@pytest.fixture(scope="session")
def start() -> Callable[..., ForkServerProcess]:
    """Starts a function in a fresh process, quickly: the imports are done once, in the server it is forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maehpc.maps"])

    def process(target: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
        child = context.Process(target=target, args=arguments)
        child.start()
        return child

    return process


def assert_ledger_is_true(root: Path) -> None:
    """What is recorded is whole; at most the metadata of a store that was never begun is absent."""
    try:
        problems = verify(root / "maps", root / "ledger")
    except InputError:
        assert not (root / "ledger/store.json").exists()
        return
    unbegun = [problem for problem in problems if problem.kind != "unrecorded"]
    assert all(problem.kind == "missing" and problem.shard is None for problem in unbegun), problems
    assert not (unbegun and list((root / "ledger").glob("shard-*.json"))), problems


def assert_finishes(root: Path, layout: StoreLayout, reference: dict[str, bytes]) -> None:
    maps_writer.explain(root, layout)
    assert maps_writer.contents(root / "maps") == reference
    assert verify(root / "maps", root / "ledger") == []
    assert not [name for name in maps_writer.contents(root) if ".partial-" in name]


@pytest.mark.slow
def test_killed_before_each_touch_of_the_disk(memory: Path, start: Callable[..., ForkServerProcess]) -> None:
    maps_writer.explain(memory / "whole", maps_writer.SMALL)
    reference = maps_writer.contents(memory / "whole/maps")
    for moment in itertools.count(1):
        root = memory / str(moment)
        child = start(maps_writer.die_at, root, moment, maps_writer.explain, root, maps_writer.SMALL)
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        assert_ledger_is_true(root)
        assert_finishes(root, maps_writer.SMALL, reference)
        shutil.rmtree(root)
    assert moment > 50


@pytest.mark.slow
def test_killed_while_other_bytes_replace_a_shard(
    whole: Path, memory: Path, start: Callable[..., ForkServerProcess]
) -> None:
    """Between the old files and the new ones the ledger vouches for neither."""
    between = 0
    for moment in itertools.count(1):
        root = memory / str(moment)
        shutil.copytree(whole, root)
        child = start(maps_writer.die_at, root, moment, maps_writer.rewrite, root)
        child.join()
        problems = verify(root / "maps", root / "ledger")
        assert [(problem.kind, problem.shard) for problem in problems] in ([], [("unrecorded", 0)])
        between += len(problems)
        shutil.rmtree(root)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert problems == [] and between > len(maps_writer.LAYOUT.arrays)


def test_killed_again_and_again_while_it_mends(
    whole: Path, reference: dict[str, bytes], start: Callable[..., ForkServerProcess]
) -> None:
    """Each attempt dies a few steps further on; one damaged shard and one damaged metadata file stand at the start."""
    (whole / "maps/saliency/c.1.0.0").write_bytes(b"damaged")
    (whole / "maps/scores/zarr.json").unlink()
    for moment in range(2, 60, 4):
        child = start(maps_writer.die_at, whole, moment, maps_writer.explain, whole)
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert_finishes(whole, maps_writer.LAYOUT, reference)


@pytest.mark.slow
def test_killed_at_random_times(tmp_path: Path, start: Callable[..., ForkServerProcess]) -> None:
    maps_writer.explain(tmp_path / "whole", maps_writer.LARGE)
    reference = maps_writer.contents(tmp_path / "whole/maps")
    draw = random.Random(0)
    root = tmp_path / "killed"
    killed = finished = 0
    while killed < 12:
        child = start(maps_writer.explain, root, maps_writer.LARGE)
        child.join(draw.uniform(0.02, 0.3))
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            killed += 1
            assert_ledger_is_true(root)
        else:
            assert child.exitcode == 0
            finished += 1
            assert maps_writer.contents(root / "maps") == reference
            shutil.rmtree(root)
    assert_finishes(root, maps_writer.LARGE, reference)


def refused(root: Path) -> None:
    try:
        maps_writer.explain(root)
    except InputError as error:
        (root / "refused").write_text(str(error))


def test_a_second_process_is_refused_while_the_first_lives(
    tmp_path: Path, start: Callable[..., ForkServerProcess], reference: dict[str, bytes]
) -> None:
    with own(tmp_path / "ledger") as owner:
        maps_writer.begin(tmp_path, owner)
        before = maps_writer.contents(tmp_path)
        child = start(refused, tmp_path)
        child.join()
        sentence = (tmp_path / "refused").read_text()
        assert "is being written by process" in sentence and "another --name" in sentence
        (tmp_path / "refused").unlink()
        assert maps_writer.contents(tmp_path) == before
    assert_finishes(tmp_path, maps_writer.LAYOUT, reference)
