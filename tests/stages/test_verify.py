"""What `maehpc verify` looks at, and what it says of what it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from permissions import closed
from report_experiments import Study, write_explanations

from maehpc.errors import InputError
from maehpc.stages.verify import Findings, verify_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in ("demo", "other"):
        write_explanations(tmp_path / name, Study())
    return tmp_path


def sentences(findings: Findings) -> list[str]:
    return [problem["sentence"] for problem in findings.problems]


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("demo", "demo"),
        ("demo/ledger", "demo/ledger"),
        ("demo/ledger/digits", "demo/ledger/digits/store.json"),
        ("demo/maps", "demo/maps/digits.zarr"),
        ("demo/recipe.yaml", "demo/recipe.yaml"),
    ],
)
def test_what_may_not_be_read_is_named_and_the_rest_is_verified(results: Path, place: str, named: str) -> None:
    (victim,) = (results / "other/maps/digits.zarr/saliency").glob("c.1*")
    victim.write_bytes(victim.read_bytes()[:-1])
    with closed(results / place):
        *first, last = sentences(verify_results(results))
    assert str(victim) in last
    assert first and all(f"{results / named}" in sentence and "make it readable" in sentence for sentence in first)
    assert sentences(verify_results(results)) == [last]


def test_an_experiment_that_lost_its_recipe_is_named(results: Path) -> None:
    (results / "demo" / "recipe.yaml").unlink()
    (problem,) = verify_results(results).problems
    assert (problem["kind"], problem["path"]) == ("overlooked", str(results / "demo"))
    assert "holds results but no recipe.yaml; restore it" in problem["sentence"]
    (results / "other" / "recipe.yaml").unlink()
    assert len(verify_results(results).problems) == 2


def test_a_folder_without_experiments_is_refused(tmp_path: Path) -> None:
    (tmp_path / "packs").mkdir()
    with pytest.raises(InputError, match="holds no experiment"):
        verify_results(tmp_path)
