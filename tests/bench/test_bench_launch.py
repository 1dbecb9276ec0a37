"""The benchmark measures what it says, and leaves nothing but its record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SETTINGS, tiny_recipe

from maehpc.bench import launch
from maehpc.bench.figures import Figure, Part, Ratio, Report
from maehpc.errors import RunError
from maehpc.progress import Silent
from maehpc.recipes import load_recipe


def test_figures_are_told_with_their_spread() -> None:
    figure = Figure("stall", "s", (0.3, 0.1, 0.2004))
    assert figure.median == 0.2004
    assert figure.text() == "0.2 s (0.1 – 0.3)"
    assert Figure("speed", "images/s", (12345.6,)).text() == "12346 images/s"
    assert figure.as_json()["values"] == [0.3, 0.1, 0.2004]
    part = Part("p", "c", (figure,), (Ratio("to x", 0.5, "half"),))
    report = Report("launch", {"machine": {"cores": 2}}, (part,))
    assert report.lines() == ["p: c", "  stall  0.2 s (0.1 – 0.3)", "  to x   0.5 (half)"]
    assert json.loads(json.dumps(report.as_json()))["parts"][0]["ratios"][0]["value"] == 0.5


def test_the_default_training_has_whole_batches_for_two_ranks() -> None:
    for quick in (False, True):
        settings = launch.default_recipe(quick).pretrain
        assert settings.images is not None and settings.images % settings.batch_size == 0
        assert settings.batch_size % 2 == 0 and settings.epochs > 1


@pytest.mark.slow
def test_ranks_are_measured_beside_a_bare_loop(tmp_path: Path) -> None:
    recipe = load_recipe(
        None, ("pretrain.crop_scale=null", "pretrain.images=192", "pretrain.reconstructions=0"), settings=SETTINGS
    )
    part = launch.ddp(tmp_path, recipe, 1, Silent())
    figures = {figure.name: figure for figure in part.figures}
    for name in ("maehpc, 1 rank", "maehpc, 2 ranks", "bare loop, 1 rank", "bare loop, 2 ranks"):
        assert figures[name].unit == "images/s" and figures[name].median > 0
    ratios = {ratio.name: ratio.value for ratio in part.ratios}
    expected = figures["maehpc, 2 ranks"].median / figures["maehpc, 1 rank"].median / 2
    assert ratios["efficiency"] == pytest.approx(expected)
    first = figures["maehpc, 2 ranks, start to first step"].median
    assert 0 < figures["meeting of 2 ranks"].median < first


@pytest.mark.slow
def test_a_training_that_fails_is_told(tmp_path: Path) -> None:
    recipe = tiny_recipe("datasets=[no-such-file.npz]")
    with pytest.raises(RunError, match=r"no-such-file\.npz does not exist"):
        launch._ranks(tmp_path / "run", "ours", 1, recipe, tmp_path / "packs")


@pytest.mark.slow
def test_checkpoints_are_measured_beside_torch_save(tmp_path: Path) -> None:
    part = launch.checkpoint(tmp_path, "vit-tiny", 2)
    medians = {figure.name: figure.median for figure in part.figures}
    assert len(part.figures[0].values) == 2
    assert 0 < medians["stall"] < medians["writing there and then"]
    assert part.ratios[0].value == pytest.approx(medians["stall"] / medians["torch.save and fsync"])


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "maehpc", "bench", "launch", *words], capture_output=True, text=True)


def test_wrong_words_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for words, told in (
        (("--parts", "ddp,speed"), "choose from dry-run, first-step, checkpoint, ddp"),
        (("--cluster", "nowhere"), "there is no profile 'nowhere'"),
        (("--recipe", "nothing"), "there is no recipe 'nothing'"),
    ):
        done = bench(*words, "--results", str(tmp_path / "results"))
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_way_to_the_first_step_and_the_dry_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(SETTINGS))
    done = bench("--parts", "dry-run,first-step", "--repeats", "1", "--quick", "--results", str(tmp_path / "results"),
                 "--recipe", str(recipe), "--out", str(tmp_path / "figures.json"), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "figures.json").read_text())
    medians = {figure["name"]: figure["median"] for part in record["parts"] for figure in part["figures"]}
    assert medians["starting Python alone"] < medians["wall time"]
    assert medians["attempt begun to first step"] > 0
    assert record["machine"]["cores"] > 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == []
