"""A report says what is on disk, says what is not, and says it in the same bytes every time."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from permissions import closed
from report_experiments import (
    METHODS,
    UNTRAINED,
    Study,
    explanations,
    write_explanations,
    write_maps,
    write_recipe,
    write_training,
)

from maehpc import files
from maehpc.errors import InputError, RunError
from maehpc.experiment import Experiment
from maehpc.maps import ArrayLayout, MapStore, StoreLayout
from maehpc.ownership import own
from maehpc.recipes import plugins
from maehpc.report import Summary, aggregate
from maehpc.report.earlier import WRITTEN, settle_earlier
from maehpc.report.explanations import choose, read_explained, read_panel
from maehpc.report.gathered import Reader


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


MEASURED = Study(searches=("pgd", "centre"), floors=4, metrics=("sparseness", "deletion"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary, dict[str, np.ndarray]]:
    """A report on an experiment with all that may be measured, and its arrays in float64."""
    results = tmp_path_factory.mktemp("measured")
    arrays = write_explanations(results / "demo", MEASURED)
    return results / "report", aggregate(results), {name: np.asarray(a, np.float64) for name, a in arrays.items()}


def test_floors_and_the_worst_found_stand_beside_chance(measured: tuple[Path, Summary, dict[str, Any]]) -> None:
    _, summary, arrays = measured
    rows = summary.rows.set_index("method")
    for method in METHODS:
        floors = arrays[f"{method}_floor"][:4]
        known = floors[~np.isnan(floors)]
        assert rows.loc[method, "noise_floor"] == np.median(known)
        assert rows.loc[method, "noise_floor_images"] == len(known) == (3 if method == "gradcam" else 4)
        change = pd.Series(arrays[f"{method}_pgd_change"])
        assert rows.loc[method, "pgd_change_mean"] == pytest.approx(change.mean())
        above, counted = 0, 0
        for image, found in enumerate(change):
            kept = arrays[f"{method}_sensitivity"][image][arrays["flipped"][image] == 0]
            if len(kept) and not np.isnan(kept).any() and not np.isnan(found):
                above, counted = above + (found > kept.max()), counted + 1
        assert 0 < counted < 10 or method != "gradcam"
        assert rows.loc[method, "pgd_above_flip_free"] == pytest.approx(above / counted)
    assert {"Noise floor", "PGD change (adversarial)", "PGD above random"} <= set(summary.text.columns)


def test_the_adversarial_table_equals_statistics_of_the_arrays(measured: tuple[Path, Summary, dict[str, Any]]) -> None:
    out, summary, arrays = measured
    rows = pd.read_parquet(out / "adversarial.parquet").set_index(["method", "kind"])
    assert rows.index.tolist() == [(method, kind) for method in METHODS for kind in ("pgd", "centre")]
    for (method, kind), row in rows.iterrows():
        frame = pd.DataFrame(
            {part: arrays[f"{method}_{kind}_{part}"] for part in ("change", "top", "spearman", "centre")}
        )
        random = pd.Series(arrays[f"{method}_sensitivity_max"])
        assert row["images"] == frame["change"].count() == (9 if method == "gradcam" else 10)
        for part in frame:
            assert row[f"{part}_mean"] == pytest.approx(frame[part].mean())
        assert row["change_median"] == frame["change"].median()
        assert row["change_ci_low"] < row["change_mean"] < row["change_ci_high"]
        assert row["random_max_mean"] == pytest.approx(random.mean())
        assert row["ratio_to_random_max"] == pytest.approx(frame["change"].mean() / random.mean())
        samples = np.where(arrays["flipped"] > 0, -np.inf, arrays[f"{method}_sensitivity"]).max(1)
        both = np.isfinite(samples) & frame["change"].notna()
        expected = frame["change"][both].mean() / samples[both].mean()
        assert row["ratio_to_flip_free_max"] == pytest.approx(expected)
    assert {out / f"adversarial.{end}" for end in ("csv", "parquet", "md", "tex", "png", "pdf")} <= set(summary.files)


def test_the_table_of_metrics_is_long_and_series_are_in_its_data_alone(
    measured: tuple[Path, Summary, dict[str, Any]],
) -> None:
    out, summary, arrays = measured
    rows = pd.read_parquet(out / "metrics.parquet")
    assert len(rows) == len(METHODS) * (1 + 1 + 4)
    for _, row in rows.iterrows():
        array = "_".join(filter(None, (row["method"], row["metric"], row["part"])))
        values = arrays[array] if pd.isna(row["element"]) else arrays[array][:, int(row["element"])]
        values = pd.Series(values)
        assert row["images"] == values.count()
        np.testing.assert_allclose([row["mean"], row["std"]], [values.mean(), values.std()])
        assert pd.isna(row["element"]) == (row["part"] == "")
        if row["part"] == "":
            assert row["ci_low"] < row["mean"] < row["ci_high"]
    text = (out / "metrics.md").read_text()
    assert len(text.splitlines()) == 2 + 2 * len(METHODS) and "Sparseness" in text
    page = (out / "index.html").read_text()
    assert plugins.facts("metrics", "deletion")["meaning"] in page
    assert out / "metrics.tex" in summary.files


def test_images_have_what_was_measured_of_them(measured: tuple[Path, Summary, dict[str, Any]]) -> None:
    out, summary, arrays = measured
    assert summary.files.count(out / "image_metrics.parquet") == 1
    images = pd.read_parquet(out / "images.parquet")
    long = pd.read_parquet(out / "image_metrics.parquet")
    for method, rows in images.groupby("method"):
        for column, array in {
            "noise_floor": "floor",
            **{f"{kind}_{part}": f"{kind}_{part}" for kind in MEASURED.searches for part in ("change", "spearman")},
        }.items():
            np.testing.assert_array_equal(rows[column], arrays[f"{method}_{array}"])
        assert rows["topk_change"].isna().all()
        for metric in MEASURED.metrics:
            values = long[(long["method"] == method) & (long["metric"] == metric)]
            assert values["image"].tolist() == list(range(10))
            np.testing.assert_array_equal(values["value"], arrays[f"{method}_{metric}"])
    assert set(long["part"]) == {""}


def test_nothing_is_written_or_shown_of_what_was_not_measured(reported: tuple[Path, Summary]) -> None:
    out, summary = reported
    assert not [path for path in out.iterdir() if re.match("adversarial|metrics|image_metrics", path.name)]
    page = (out / "index.html").read_text().lower()
    assert "adversarial sensitivity" not in page and "measures of trust" not in page
    assert {"Noise floor", "PGD change (adversarial)", "PGD above random"}.isdisjoint(summary.text.columns)
    unknown = ["noise_floor", "noise_floor_images", "pgd_change_mean", "pgd_above_flip_free"]
    assert summary.rows[unknown].isna().all().all()


def test_searches_without_random_perturbations(tmp_path: Path) -> None:
    arrays = write_explanations(tmp_path / "demo", Study(samples=0, searches=("pgd",)))
    summary = aggregate(tmp_path)
    sentence = "no sensitivity to random perturbations: explain.sensitivity.samples is 0"
    assert lacking(summary, "demo/digits") == [sentence]
    rows = pd.read_csv(tmp_path / "report" / "adversarial.csv")
    assert rows["ratio_to_random_max"].isna().all() and rows["random_max_mean"].isna().all()
    assert rows["change_mean"].tolist() == pytest.approx(
        [float(np.nanmean(arrays[f"{method}_pgd_change"].astype(np.float64))) for method in METHODS]
    )
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"panels-demo-digits"}
    assert "Lowest, median and highest PGD change" in (tmp_path / "report" / "index.html").read_text()
    assert summary.rows.set_index("method")["zero_maps"].to_dict() == {name: int(name == "gradcam") for name in METHODS}


def test_a_whole_experiment_lacks_nothing_and_every_file_is_listed(reported: tuple[Path, Summary]) -> None:
    out, summary = reported
    assert summary.missing == []
    shown = [path for path in out.rglob("*") if not path.relative_to(out).parts[0].startswith(".")]
    assert sorted(summary.files) == sorted(shown)
    assert summary.files[-1] == out / "index.html"
    figures = {"sensitivity", *(f"{kind}-demo-digits" for kind in ("panels", "curves", "reconstructions"))}
    assert {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.pdf")} == figures
    assert (out / "scores.csv").read_text().splitlines()[1:] == [
        "demo,digits,Digits,finetuned,train,1000,0.5,0.75,0.875",
        "demo,digits,Digits,finetuned,val,78,0.75,0.625,0.75",
        "demo,digits,Digits,finetuned,test,156,1.25,0.5625,0.6875",
    ]


@pytest.mark.slow
def test_a_probe_has_rows_and_curves_of_its_own_and_explains_nothing(explained: Path) -> None:
    training = Study()
    experiment = Experiment(explained / "demo")
    write_training(experiment, training)
    experiment.stage("finetune", "digits").rename(experiment.root / "kept")
    experiment.stage("finetune", "digits").parent.rename(experiment.root / "probe")
    (experiment.root / "kept").rename(experiment.stage("probe", "digits"))
    summary = aggregate(explained)
    out = explained / "report"
    assert [line.split(",")[3:5] for line in (out / "scores.csv").read_text().splitlines()[1:]] == [
        ["probe", split] for split in ("train", "val", "test")
    ]
    assert summary.rows["accuracy"].isna().all()
    assert summary.missing == [f"demo/digits: {sentence}" for sentence in UNTRAINED]
    assert out / "curves-demo-digits.png" in summary.files
    (experiment.stage("probe", "digits") / "done.json").unlink()
    assert "the probe is not finished" in lacking(aggregate(explained), "demo/digits")


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(results: Path, reported: tuple[Path, Summary], tmp_path: Path) -> None:
    out = tmp_path / "again"
    code = "import sys, pathlib, maehpc.report as r; r.aggregate(*map(pathlib.Path, sys.argv[1:]))"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", code, str(results), str(out)], check=True, env=environment)
    assert contents(out) == contents(reported[0])


@pytest.mark.slow
def test_written_twice_it_is_the_same(explained: Path) -> None:
    first = aggregate(explained)
    before = contents(explained / "report")
    second = aggregate(explained)
    assert contents(explained / "report") == before
    assert first.missing == second.missing
    assert first.files == second.files


def test_nothing_stays_of_experiments_that_are_gone(tmp_path: Path) -> None:
    for name, study in (("demo", Study()), ("gone", Study(searches=("pgd",), metrics=("sparseness",)))):
        write_explanations(tmp_path / "results" / name, study)
    out = tmp_path / "out"
    before = {path.name for path in aggregate(tmp_path / "results", out).files}
    (out / "mine.txt").write_text("kept")
    (out / "panels-mine.png").write_text("kept")
    shutil.rmtree(tmp_path / "results" / "gone")
    after = {path.name for path in aggregate(tmp_path / "results", out).files}
    assert {"panels-gone-digits.png", "adversarial.csv", "metrics.csv", "image_metrics.parquet"} <= before - after
    shown = {path.name for path in out.iterdir() if path.name[0] != "."}
    assert shown == after | {"mine.txt", "panels-mine.png"}


@pytest.mark.parametrize("place", ["gone", "gone/ledger", "gone/recipe.yaml"])
def test_what_cannot_be_read_for_once_loses_nothing(tmp_path: Path, place: str) -> None:
    for name in ("demo", "gone"):
        write_explanations(tmp_path / "results" / name, Study())
    out = tmp_path / "out"
    aggregate(tmp_path / "results", out)
    before = contents(out)
    with closed(tmp_path / "results" / place):
        assert "ermission" in " ".join(aggregate(tmp_path / "results", out).missing)
    between = contents(out)
    assert before.keys() <= between.keys() and any("gone/digits/block-" in str(name) for name in between)
    aggregate(tmp_path / "results", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    "record",
    [
        *("", "[[[", "{}", "[" * 100_000, '["../outside", "/etc/passwd", "", ".", "..", 3, "folder/file", "folder"]'),
        *('["a\\u0000b"]', '["\\ud800"]', f'["{"x" * 300}"]'),
    ],
)
def test_a_damaged_list_of_files_deletes_nothing(tmp_path: Path, record: str) -> None:
    (tmp_path / "outside").touch()
    out = tmp_path / "out"
    (out / "folder").mkdir(parents=True)
    (out / "folder" / "file").touch()
    (out / WRITTEN).write_text(record)
    settle_earlier(out, [out / "index.html"])
    assert (tmp_path / "outside").exists() and (out / "folder" / "file").exists()
    assert json.loads((out / WRITTEN).read_bytes()) == ["index.html"]


def test_one_experiment_is_reported_in_its_own_folder(explained: Path) -> None:
    summary = aggregate(explained / "demo")
    assert set(summary.rows["experiment"]) == {"demo"}
    assert summary.files[-1] == explained / "demo" / "report" / "index.html"


def lacking(summary: Summary, place: str) -> list[str]:
    """What is missing of a place, but for the training that no experiment of maps alone has."""
    told = [sentence.removeprefix(f"{place}: ") for sentence in summary.missing if sentence.startswith(f"{place}: ")]
    return [sentence for sentence in told if sentence not in UNTRAINED]


@pytest.mark.slow
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
    path = explained / "demo" / "maps" / "digits.zarr" / "scores" / "c.1.0"
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


@pytest.mark.parametrize(("folder", "reported"), [("ledger", 0), ("finetune", 3)])
def test_what_may_not_be_read_is_told_by_its_name(explained: Path, folder: str, reported: int) -> None:
    (explained / "demo" / "finetune").mkdir()
    with closed(explained / "demo" / folder):
        summary = aggregate(explained)
    told = [sentence for sentence in summary.missing if "permission is denied" in sentence]
    assert told and all(f"cannot read {explained / 'demo' / folder}" in sentence for sentence in told)
    assert len(summary.rows) == reported


def test_results_that_no_recipe_names_are_told(explained: Path) -> None:
    for name in ("lost", "closed"):
        shutil.copytree(explained / "demo", explained / name)
    (explained / "lost" / "recipe.yaml").unlink()
    files.write_text(explained / "archive" / "deeper" / "ledger" / "digits" / "store.json", "{}")
    (explained / "demo" / "export" / "maps").mkdir(parents=True)  # of a data set of that name
    with closed(explained / "closed"):
        summary = aggregate(explained)
    assert [sentence for sentence in summary.missing if not sentence.startswith("demo/")] == [
        f"archive/deeper: {explained}/archive/deeper holds results but no recipe.yaml; restore it, or move the folder "
        "away",
        f"closed: cannot read {explained}/closed: permission is denied; make it readable",
        f"lost: {explained}/lost holds results but no recipe.yaml; restore it, or move the folder away",
    ]
    assert set(summary.rows["experiment"]) == {"demo"}


@pytest.mark.slow
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


@pytest.mark.slow
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
    told = {"unmeasured": ["no sensitivity to random perturbations: explain.sensitivity.samples is 0"]}
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
    explained = read_explained(store, tmp_path / "gathered", Reader(), lambda sentence: None)
    assert explained is not None
    _, chosen = choose(explained)
    ranked = sorted([0, 1, 2, 3, 8, 9], key=lambda image: arrays["saliency_sensitivity_max"][image])
    expected = {"Lowest": ranked[0], "Median": ranked[2], "Highest": ranked[-1]}
    assert {reason: explained.gathered.row("image", place) for place, reason in chosen.items()} == expected
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
