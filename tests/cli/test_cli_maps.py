"""`maehpc maps export` as a user meets it: what is said where, exit codes, completion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import Run
from report_experiments import Study, write_explanations

from maehpc.cli.maps import FORMATS
from maehpc.report import export

DEMO = "results/demo"


@pytest.fixture(scope="module")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    write_explanations(root, Study())
    return root


@pytest.fixture
def demo(_pristine: Path, tmp_path: Path) -> Path:
    """An experiment that explains `digits`: ten images in shards of four; to be damaged."""
    return Path(shutil.copytree(_pristine, tmp_path / DEMO))


def test_files_are_announced_and_then_told(run: Run, demo: Path) -> None:
    outcome = run("maps", "export", DEMO, "--to", "png", "--images", "0,5-7", "--methods", "saliency, gradcam")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{DEMO}/export/digits: 4 images, 8 files\n"
    assert outcome.err.splitlines()[0] == f"digits: 4 images to 8 files in {DEMO}/export/digits"
    assert "export digits: 4/4" in outcome.err
    assert len(list((demo / "export/digits").glob("*.png"))) == 8


def test_a_store_by_its_path_from_its_own_folder(run: Run, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo / "maps")
    outcome = run("maps", "export", "digits.zarr", "--to", "npy", "--out", "../../out", "--json", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    methods = ["saliency", "gradcam", "deeplift-captum"]
    count = len(list((demo / "../out/digits").glob("*.npy")))
    assert json.loads(outcome.out) == {
        "exported": [
            {"dataset": "digits", "folder": "../../out/digits", "methods": methods, "images": 10, "files": count}
        ],
        "missing": [],
    }
    assert np.load(demo / "../out/digits/image.npy").tolist() == list(range(10))


def test_what_is_not_whole_is_exit_1_and_a_sentence_each(run: Run, demo: Path) -> None:
    (demo / "ledger/digits/shard-00001.json").unlink()
    (victim,) = (demo / "maps/digits.zarr/gradcam").glob("c.2*")
    victim.write_bytes(victim.read_bytes()[:-1])
    outcome = run("maps", "export", DEMO, "--to", "nifti", "-q", "--json")
    assert outcome.code == 1
    store = f"{DEMO}/maps/digits.zarr"
    sentences = [
        f"shard 1 of {store} is not recorded; run explain to compute it",
        f"{store}/gradcam/{victim.name} is not what its ledger recorded; run explain again to compute shard 2 anew",
    ]
    assert outcome.err.splitlines() == [f"warning: {sentence}" for sentence in sentences]
    result = json.loads(outcome.out)
    assert (result["missing"], result["exported"][0]["images"]) == (sentences, 4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--to", "tiff"], "Invalid value for '--to': 'tiff' is not one of 'npy', 'png', 'nifti'."),
        ([], "Missing option '--to'. Choose from: npy, png, nifti"),
        (["--to", "npy", "--images", "3-1"], "--images 3-1: '3-1' is neither an index nor a range"),
        (["--to", "npy", "--methods", "saliency,rise"], "--methods rise:"),
        (["--to", "npy", "--datasets", "retinamnist"], "--datasets retinamnist: results/demo holds digits"),
    ],
)
def test_wrong_words_are_exit_2_and_nothing_is_written(run: Run, demo: Path, words: list[str], sentence: str) -> None:
    before = sorted(demo.rglob("*"))
    outcome = run("maps", "export", DEMO, *words)
    assert (outcome.code, outcome.err.count("\n"), outcome.out) == (2, 1, "")
    assert sentence in outcome.err
    assert sorted(demo.rglob("*")) == before


def test_formats_are_those_that_can_be_written() -> None:
    assert tuple(export.FORMATS) == FORMATS


def test_completion_knows_the_experiments_data_sets_and_the_methods(demo: Path, tmp_path: Path) -> None:
    def completed(text: str) -> set[str]:
        words = {"_MAEHPC_COMPLETE": "bash_complete", "COMP_WORDS": text, "COMP_CWORD": str(text.count(" "))}
        done = subprocess.run(
            [sys.executable, "-m", "maehpc"],
            capture_output=True, text=True, timeout=60, cwd=tmp_path, env={**os.environ, **words},
        )  # fmt: skip
        return {line.split(",", 1)[1] for line in done.stdout.splitlines()}

    assert completed("maehpc maps ") == {"export"}
    assert completed(f"maehpc maps export {DEMO} --datasets d") == {"digits"}
    assert completed("maehpc maps export nowhere --to ") == {"npy", "png", "nifti"}
    assert completed(f"maehpc maps export {DEMO} --methods saliency,gradcam-") == {"saliency,gradcam-plus-plus"}
