"""A report says what is on disk, says what is not, and says it in the same bytes every time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_experiments import METHODS, UNTRAINED, Study, explanations, write_explanations, write_maps, write_recipe

from maehpc import files
from maehpc.errors import InputError, RunError
from maehpc.experiment import Experiment
from maehpc.maps import ArrayLayout, MapStore, StoreLayout
from maehpc.ownership import own
from maehpc.report import Summary, aggregate
from maehpc.report.explanations import choose, read_explained, read_panel


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_equal_statistics_of_the_arrays(reported: tuple[Path, Summary]) -> None:
    rows = reported[1].rows.set_index("method")
    assert rows.index.tolist() == list(METHODS)
    arrays = explanations(Study(), 0)
    for method in METHODS:
        row, largest = rows.loc[method], pd.Series(arrays[f"{method}_sensitivity"].astype(np.float64).max(1))
        assert (row["experiment"], row["dataset"], row["title"], row["split"]) == ("demo", "digits", "Digits", "test")
        assert (row["images"], row["of_images"]) == (10, 10)
        assert (row["accuracy"], row["auc"]) == (0.5625, 0.6875)
        np.testing.assert_allclose(
            row[["sensitivity_max_mean", "sensitivity_max_std", "sensitivity_max_median"]].astype(float),
            [largest.mean(), largest.std(), largest.median()],
        )
        np.testing.assert_allclose(
            row[["sensitivity_max_q25", "sensitivity_max_q75"]].astype(float), largest.quantile([0.25, 0.75])
        )
        assert row["sensitivity_max_ci_low"] < largest.mean() < row["sensitivity_max_ci_high"]
        assert row["flips"] == arrays["flipped"].mean()
        assert row["zero_maps"] == (1 if method == "gradcam" else 0)
    completeness = np.median(arrays["deeplift-captum_completeness"].astype(np.float64))
    assert rows.loc["deeplift-captum", "completeness"] == pytest.approx(completeness)
    assert np.isnan(rows.loc["saliency", "completeness"])


def test_the_table_of_images_holds_every_score(reported: tuple[Path, Summary]) -> None:
    images = pd.read_parquet(reported[0] / "images.parquet")
    arrays = explanations(Study(), 0)
    assert len(images) == 10 * len(METHODS)
    for method, rows in images.groupby("method"):
        assert rows["image"].tolist() == list(range(10))
        assert rows["label"].tolist() == arrays["label"].tolist()
        assert rows["prediction"].tolist() == arrays["prediction"].tolist()
        np.testing.assert_array_equal(rows["sensitivity_max"], arrays[f"{method}_sensitivity_max"])
        np.testing.assert_array_equal(rows["sensitivity_mean"], arrays[f"{method}_sensitivity_mean"])
        assert rows["flips"].tolist() == arrays["flipped"].sum(1).tolist()


def test_a_whole_experiment_lacks_nothing_and_every_file_is_listed(reported: tuple[Path, Summary]) -> None:
    out, summary = reported
    assert summary.missing == []
    assert sorted(summary.files) == sorted(path for path in out.rglob("*") if path.name != ".lock")
    assert summary.files[-1] == out / "index.html"
    figures = {"sensitivity", *(f"{kind}-demo-digits" for kind in ("panels", "curves", "reconstructions"))}
    assert {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.pdf")} == figures
    assert (out / "scores.csv").read_text().splitlines()[1:] == [
        "demo,digits,Digits,train,1000,0.5,0.75,0.875",
        "demo,digits,Digits,val,78,0.75,0.625,0.75",
        "demo,digits,Digits,test,156,1.25,0.5625,0.6875",
    ]


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(results: Path, reported: tuple[Path, Summary], tmp_path: Path) -> None:
    out = tmp_path / "again"
    code = "import sys, pathlib, maehpc.report as r; r.aggregate(*map(pathlib.Path, sys.argv[1:]))"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", code, str(results), str(out)], check=True, env=environment)
    assert contents(out) == contents(reported[0])


def test_written_twice_it_is_the_same(explained: Path) -> None:
    first = aggregate(explained)
    before = contents(explained / "report")
    second = aggregate(explained)
    assert contents(explained / "report") == before
    assert first.missing == second.missing
    assert first.files == second.files


def test_one_experiment_is_reported_in_its_own_folder(explained: Path) -> None:
    summary = aggregate(explained / "demo")
    assert set(summary.rows["experiment"]) == {"demo"}
    assert summary.files[-1] == explained / "demo" / "report" / "index.html"


def lacking(summary: Summary, place: str) -> list[str]:
    """What is missing of a place, but for the training that no experiment of maps alone has."""
    told = [sentence.removeprefix(f"{place}: ") for sentence in summary.missing if sentence.startswith(f"{place}: ")]
    return [sentence for sentence in told if sentence not in UNTRAINED]


def test_only_recorded_shards_count(tmp_path: Path) -> None:
    arrays = write_explanations(tmp_path / "demo", Study(written=(0, 2)))
    write_explanations(tmp_path / "none", Study(written=()))
    summary = aggregate(tmp_path)
    assert lacking(summary, "demo/digits") == ["1 of 3 shards not explained: 1"]
    assert lacking(summary, "none/digits") == ["3 of 3 shards not explained: 0, 1, 2"]
    assert set(summary.rows["experiment"]) == {"demo"}
    kept = np.r_[0:4, 8:10]
    row = summary.rows.iloc[0]
    assert (row["images"], row["of_images"]) == (6, 10)
    assert row["sensitivity_max_mean"] == pytest.approx(arrays["saliency_sensitivity_max"][kept].mean(dtype=np.float64))
    images = pd.read_parquet(tmp_path / "report" / "images.parquet")
    assert images[images["method"] == "saliency"]["image"].tolist() == kept.tolist()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_scores_leaves_the_shard_out(explained: Path) -> None:
    path = explained / "demo" / "maps" / "digits.zarr" / "saliency_sensitivity_max" / "c.1"
    flip_a_bit(path)
    summary = aggregate(explained)
    (sentence,) = lacking(summary, "demo/digits")
    assert str(path) in sentence
    assert summary.rows["images"].tolist() == [6] * 3


def test_a_flipped_bit_in_a_map_costs_the_panels_alone(explained: Path) -> None:
    for path in (explained / "demo" / "maps" / "digits.zarr" / "deeplift-captum").glob("c.*"):
        flip_a_bit(path)
    summary = aggregate(explained)
    (sentence,) = lacking(summary, "demo/digits")
    assert "deeplift-captum" in sentence
    assert summary.rows["images"].tolist() == [10] * 3
    assert not list((explained / "report").glob("panels*"))


@pytest.mark.slow
def test_absent_parts_are_told_and_the_rest_is_reported(results: Path) -> None:
    shutil.copytree(results / "demo", results / "other")
    shutil.rmtree(results / "demo" / "finetune")
    shutil.rmtree(results / "demo" / "ledger")
    shutil.rmtree(results / "other" / "pretrain")
    (results / "other" / "finetune" / "digits" / "done.json").unlink()
    summary = aggregate(results)
    assert summary.missing == [
        "demo/digits: finetuning is not finished, so accuracy and AUC are unknown",
        "demo/digits: no learning curve of finetuning",
        "demo/digits: not explained",
        "other/digits: finetuning is not finished, so accuracy and AUC are unknown",
        "other/digits: no learning curve of pretraining",
        "other/digits: no reconstructions: pretraining is not finished",
    ]
    figures = {"curves-demo-digits", "reconstructions-demo-digits", "curves-other-digits", "panels-other-digits"}
    assert {path.stem for path in (results / "report").glob("*.png")} == {*figures, "sensitivity"}
    assert summary.rows["accuracy"].isna().all()


def test_damaged_parts_are_told_and_the_rest_is_reported(results: Path) -> None:
    for path in (
        "finetune/digits/done.json",
        "finetune/digits/metrics.jsonl",
        "pretrain/digits/reconstructions.safetensors",
        "ledger/digits/shard-00001.json",
    ):
        (results / "demo" / path).write_bytes(b"\x80 no such thing\n")
    summary = aggregate(results)
    told = [
        "done.json cannot be used",
        "metrics.jsonl, line 1, cannot be used",
        "reconstructions.safetensors does not hold reconstructions",
        "1 of 3 shards not explained: 1",
    ]
    assert len(summary.missing) == len(told)
    for sentence, part in zip(summary.missing, told, strict=True):
        assert sentence.startswith("demo/digits: ") and part in sentence and "\n" not in sentence
    assert "Not in this report" in (results / "report" / "index.html").read_text()
    figures = {"curves-demo-digits", "panels-demo-digits", "sensitivity"}
    assert {path.stem for path in (results / "report").glob("*.png")} == figures


def test_stores_that_cannot_be_opened_are_told(explained: Path) -> None:
    faults = ("ledger/digits/store.json", "maps/digits.zarr/zarr.json", "recipe.yaml")
    for number, path in enumerate(faults):
        shutil.copytree(explained / "demo", explained / f"bad{number}")
        (explained / f"bad{number}" / path).write_bytes(b"\x80 no such thing\n")
    shutil.rmtree(explained / "demo" / "maps")
    summary = aggregate(explained)
    for number in (0, 1):
        (sentence,) = lacking(summary, f"bad{number}/digits")
        assert Path(faults[number]).name in sentence
    assert len([sentence for sentence in summary.missing if sentence.startswith("bad2: recipe ")]) == 1
    assert "digits.zarr" in lacking(summary, "demo/digits")[0]
    assert set(summary.rows["experiment"]) == {"bad2"}


def test_a_store_of_something_else_is_told(explained: Path) -> None:
    experiment = Experiment(explained / "other")
    shutil.copy(explained / "demo" / "recipe.yaml", files.make_folder(experiment.root))
    layout = StoreLayout(4, 4, {"label": ArrayLayout((), (), "int64")}, {"title": "Digits"})
    with own(experiment.ledger("digits")) as owner:
        MapStore.create(experiment.maps("digits"), experiment.ledger("digits"), layout, {}, owner)
    (sentence,) = lacking(aggregate(explained), "other/digits")
    assert "was not written by explain" in sentence


def test_data_sets_not_begun_are_told(explained: Path) -> None:
    write_recipe(Experiment(explained / "demo"), "scratch", "digits", "retinamnist", "/some/where/Own.npz")
    summary = aggregate(explained)
    assert lacking(summary, "demo/retinamnist") == ["not begun"]
    assert len(summary.missing) == 1 + len(UNTRAINED)


@pytest.mark.slow
def test_experiments_stay_apart(tmp_path: Path) -> None:
    write_explanations(tmp_path / "a", Study(name="b-c"))
    write_explanations(tmp_path / "a-b", Study(name="c"), seed=1)
    write_explanations(tmp_path / "a" / "nested", Study(name="b-c"), seed=2)
    summary = aggregate(tmp_path)
    identities = list(dict.fromkeys(zip(summary.rows["experiment"], summary.rows["dataset"], strict=True)))
    assert identities == [("a", "b-c"), ("a-b", "c"), ("a/nested", "b-c")]
    assert len(set(summary.files)) == len(summary.files)
    panels = {path.name: path.read_bytes() for path in (tmp_path / "report").glob("panels*.png")}
    assert set(panels) == {"panels-a-b-c.png", "panels-a-b-c-2.png", "panels-a-nested-b-c.png"}
    assert len(set(panels.values())) == 3


@pytest.mark.slow
def test_every_kind_of_store_is_reported(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    kinds = {
        "unmeasured": Study(samples=0),
        "blind": Study(pixels=False),
        "sets": Study(multi_label=True),
        "channels": Study(full=True),
        "grey": Study(images=grey, samples=1),
    }
    for name, study in kinds.items():
        write_explanations(tmp_path / name, study)
    summary = aggregate(tmp_path)
    told = {"unmeasured": ["no sensitivity: explain.sensitivity.samples is 0"]}
    told["blind"] = ["panels without images: explain.maps.pixels is false"]
    images = pd.read_parquet(tmp_path / "report" / "images.parquet")
    for name, study in kinds.items():
        assert lacking(summary, f"{name}/digits") == told.get(name, [])
        rows, each = summary.rows[summary.rows["experiment"] == name], images[images["experiment"] == name]
        assert rows["images"].tolist() == [len(study.images)] * 3
        assert each["label"].isna().all() == study.multi_label
        assert each["flips"].isna().all() == rows["sensitivity_mean"].isna().all() == (study.samples == 0)
        assert (tmp_path / "report" / f"panels-{name}-digits.png").is_file()


def test_panels_show_the_maps_of_the_chosen_images(tmp_path: Path) -> None:
    study = Study(full=True, written=(0, 2))
    experiment = Experiment(tmp_path / "demo")
    arrays: dict[str, Any] = write_maps(experiment, study)
    store = MapStore.open(experiment.maps("digits"), experiment.ledger("digits"))
    explained = read_explained(store, lambda sentence: None)
    assert explained is not None
    _, chosen = choose(explained)
    ranked = sorted([0, 1, 2, 3, 8, 9], key=lambda image: arrays["saliency_sensitivity_max"][image])
    expected = {"Lowest": ranked[0], "Median": ranked[2], "Highest": ranked[-1]}
    assert {reason: explained.image[place] for place, reason in chosen.items()} == expected
    for place, reason in chosen.items():
        image, panel = expected[reason], read_panel(explained, place, reason)
        np.testing.assert_array_equal(panel.image, arrays["pixels"][image])
        np.testing.assert_array_equal(panel.maps["saliency"], np.abs(arrays["saliency"][image]).max(0))
        np.testing.assert_allclose(panel.maps["deeplift-captum"], arrays["deeplift-captum"][image].sum(0), rtol=1e-5)
        np.testing.assert_array_equal(panel.maps["gradcam"], arrays["gradcam"][image])
        for method in METHODS:
            np.testing.assert_equal(panel.sensitivity[method], float(arrays[f"{method}_sensitivity_max"][image]))
        assert f"image {image}" in panel.lines
        assert f"label: {study.classes[arrays['label'][image]]}" in panel.lines
        assert f"flips: {arrays['flipped'][image].sum()} of 3" in panel.lines


def test_no_experiment_is_a_wrong_input_and_nothing_is_written(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no experiment"):
            aggregate(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["table.csv", "panels-demo-digits.png", "images.parquet"])
def test_what_cannot_be_written_is_an_error_and_no_gap(explained: Path, taken: str) -> None:
    (explained / "report" / taken / "inside").mkdir(parents=True)
    with pytest.raises(RunError, match=f"cannot write .*{taken}"):
        aggregate(explained)
    assert not (explained / "report" / "index.html").exists()
    assert not [path for path in (explained / "report").iterdir() if "partial" in path.name]


def test_a_file_where_the_report_should_go(explained: Path) -> None:
    (explained / "report").write_text("mine")
    with pytest.raises(RunError, match="cannot write"):
        aggregate(explained)
    assert (explained / "report").read_text() == "mine"
