from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_experiments import Study, write_experiment, write_explanations

from maehpc.report import Summary, aggregate


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("pristine") / "results"
    write_experiment(results / "demo", Study())
    return results


@pytest.fixture
def results(_pristine: Path, tmp_path: Path) -> Path:
    """A folder with one whole experiment, `demo` on `digits`, to be damaged; not reported on yet."""
    return Path(shutil.copytree(_pristine, tmp_path / "results"))


@pytest.fixture
def explained(tmp_path: Path) -> Path:
    """A folder with one experiment, `demo` on `digits`, that holds explanations alone."""
    write_explanations(tmp_path / "explained" / "demo", Study())
    return tmp_path / "explained"


@pytest.fixture(scope="session")
def reported(_pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A report on that experiment, to be read."""
    out = tmp_path_factory.mktemp("reported") / "report"
    return out, aggregate(_pristine, out)
