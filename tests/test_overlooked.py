"""Results that no command finds are told of, and nothing that is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from permissions import closed

from maehpc import files
from maehpc.experiment import find_experiments
from maehpc.overlooked import overlooked

LEFT = [
    *("pretrain/digits/stage.json", "finetune/digits/done.json", "probe/digits/done.json"),
    *("ledger/digits/store.json", "maps/digits.zarr/zarr.json"),
]


def begun(root: Path, *left: str) -> Path:
    for name in left:
        files.write_text(root / name, "")
    return root


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("place", [".", "study", "group/study"])
def test_results_without_a_recipe(tmp_path: Path, place: str, left: str) -> None:
    root = begun(tmp_path / "results" / place, left)
    begun(tmp_path / "results" / "other", "recipe.yaml", *LEFT)
    assert overlooked(tmp_path / "results") == {
        root: f"{root} holds results but no recipe.yaml; restore it, or move the folder away"
    }
    begun(root, "recipe.yaml")
    assert overlooked(tmp_path / "results") == {}


@pytest.mark.parametrize("place", ["study", "group/study", "group"])
def test_what_may_not_be_looked_into(tmp_path: Path, place: str) -> None:
    begun(tmp_path / "group" / "study", "recipe.yaml", *LEFT)
    root = begun(tmp_path / "study", "recipe.yaml", *LEFT).parent / place
    with closed(root):
        assert overlooked(tmp_path) == {root: f"cannot read {root}: permission is denied; make it readable"}
    assert overlooked(tmp_path) == {} and len(find_experiments(tmp_path)) == 2


@pytest.mark.parametrize("name", ["finetune", "pretrain", "probe", "maps", "ledger"])
def test_folders_of_such_names_are_no_results(tmp_path: Path, name: str) -> None:
    begun(tmp_path / "results" / name, "recipe.yaml", *LEFT)
    begun(tmp_path / "results", f"report/.gathered/{name}/digits/block-1", f"packs/{name}.h5")
    begun(tmp_path / "jobs", f"{name}/demo.yaml")
    begun(tmp_path / "tests", f"{name}/test_it.py")
    begun(tmp_path / ".hidden", *LEFT)
    for place in ("results", "jobs", "tests", ".", "absent"):
        assert overlooked(tmp_path / place) == {}, place
