"""The undisturbed run that every disturbed one is held to, and a clean cluster for each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_jobs import Study


@pytest.fixture(scope="session")
def place(mini: Any) -> Iterator[Path]:
    """A folder that all hosts see."""
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=mini.shared))
    before = set(_clusters())
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    for cluster in set(_clusters()) - before:
        shutil.rmtree(cluster, ignore_errors=True)


def _clusters() -> list[Path]:
    """Node-local folders of Ray: a host that loses its power leaves one, which is no other host's business."""
    return [log.parent for log in Path("/tmp").glob("mr*/start.log")]


@pytest.fixture(scope="session")
def undisturbed(mini: Any, place: Path) -> Study:
    """Two ranks on two hosts, left alone."""
    study = Study(mini, place / "undisturbed" / "results")
    study.results.parent.mkdir()
    study.submit()
    study.completed()
    return study


@pytest.fixture
def study(mini: Any, place: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Study]]:
    """Makes the test's study; ends its jobs and mends the cluster when the test is over, however it went."""
    made: list[Study] = []

    def make(**how: Any) -> Study:
        folder = place / request.node.name / str(len(made))
        folder.mkdir(parents=True)
        made.append(Study(mini, how.pop("results", folder / "results"), **how))
        return made[-1]

    try:
        yield make
    finally:
        mini.start()  # mends what a test has broken
        for one in made:
            one.end()
