"""Tables keep every digit where machines read them, and stay tables whatever the names hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from maehpc.recipes import plugins
from maehpc.report.tables import (
    ADVERSARIAL,
    METRICS,
    SCORES,
    SENSITIVITY,
    adversarial_table,
    metric_meanings,
    metrics_table,
    scores_table,
    sensitivity_table,
    to_latex,
    to_markdown,
    write_table,
)

HOSTILE = r"a|b & c_d% #1 {x} \cmd $y$ ~^ <i> *b*"


def row(**changes: Any) -> dict[str, Any]:
    named = ("sensitivity", "flips", "completeness", "noise_floor", "pgd")
    numbers = {name: 0.1 + 0.2 for name in SENSITIVITY if name.startswith(named)} | {"noise_floor_images": 4}
    words = {"experiment": "demo", "dataset": "digits", "title": "Digits", "split": "test", "method": "saliency"}
    return {**words, "images": 7, "of_images": 9, "accuracy": 0.5, "auc": None, "zero_maps": 1.0, **numbers, **changes}


def test_every_column_is_there_in_order() -> None:
    assert list(sensitivity_table([row()]).data.columns) == list(SENSITIVITY)
    assert list(scores_table([]).data.columns) == list(SCORES)


def test_files_hold_the_same_rows(tmp_path: Path) -> None:
    table = sensitivity_table([row(), row(method="gradcam", accuracy=None, title=HOSTILE, zero_maps=np.nan)])
    csv, parquet, markdown, latex = write_table(tmp_path / "table", table)
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), table.data)
    read = pd.read_csv(csv).astype(table.data.dtypes)
    pd.testing.assert_frame_equal(read, table.data, check_exact=True)
    assert markdown.read_text() == to_markdown(table.text)
    assert latex.read_text() == to_latex(table.text)
    assert sorted(tmp_path.iterdir()) == sorted([csv, parquet, markdown, latex])


def test_text_for_people() -> None:
    text = sensitivity_table([row(method="deeplift-captum", sensitivity_max_ci_low=None, zero_maps=None)]).text.iloc[0]
    assert text["Method"] == "DeepLIFT (captum)"
    assert text["Images"] == "7 of 9"
    assert (text["Accuracy"], text["AUC"]) == ("0.500", "-")
    assert text["Max sensitivity [95 % CI]"] == "0.300"
    assert text["Median [quartiles]"] == "0.300 [0.300, 0.300]"
    assert text["Flips"] == "30.0 %"
    assert text["Zero maps"] == "-"


def test_columns_that_nobody_measured_are_not_shown() -> None:
    optional = ["Noise floor", "PGD change (adversarial)", "PGD above random"]
    text = sensitivity_table([row(noise_floor=1.26e-6)]).text
    assert text[optional].to_numpy().tolist() == [["1.3e-06", "0.300", "30.0 %"]]
    unmeasured = {"noise_floor": None, "pgd_change_mean": None, "pgd_above_flip_free": None}
    table = sensitivity_table([row(**unmeasured), row(**unmeasured)])
    assert set(optional).isdisjoint(table.text.columns)
    assert list(table.data.columns) == list(SENSITIVITY)
    one = sensitivity_table([row(**unmeasured), row()])
    assert one.text["Noise floor"].tolist() == ["-", "0.30"]


def test_metrics_are_named_and_explained_as_their_files_say() -> None:
    base = {"experiment": "demo", "dataset": "digits", "title": "Digits", "split": "test", "method": "saliency"}
    numbers = {"images": 5, "mean": 0.25, "ci_low": 0.125, "ci_high": 0.5, "std": 1.0}
    rows = [
        {**base, "metric": "sparseness", "part": "", **numbers},
        {**base, "metric": "infidelity", "part": "scaled", **numbers},
        {**base, "metric": "deletion", "part": "curve", "element": 3, **numbers, "ci_low": None},
        {**base, "metric": "of-tomorrow", "part": "", **numbers},
    ]
    table = metrics_table(rows)
    assert list(table.data.columns) == list(METRICS)
    assert table.data["element"].tolist() == [pd.NA, pd.NA, 3, pd.NA]
    assert table.text["Metric"].tolist() == ["Sparseness", "Infidelity, scaled", "of-tomorrow"]
    assert table.text["Better"].tolist() == ["higher", "lower", "-"]
    assert table.text["Mean [95 % CI]"].tolist() == ["0.250 [0.125, 0.500]"] * 3
    said = plugins.facts("metrics", "sparseness")
    meaning = f"{said['meaning']}; {said['unit']}; {said['source']}"
    assert metric_meanings(["sparseness", "of-tomorrow"]) == {"Sparseness": meaning}


def test_an_adversarial_row_for_people() -> None:
    numbers = dict.fromkeys([name for name in ADVERSARIAL if name.endswith(("mean", "median", "low", "high"))], 0.5)
    base = {"experiment": "demo", "dataset": "digits", "title": "Digits", "split": "test", "method": "deeplift"}
    table = adversarial_table([{**base, "kind": "pgd", "images": 5, "ratio_to_random_max": 12.5, **numbers}])
    assert list(table.data.columns) == list(ADVERSARIAL)
    text = table.text.iloc[0]
    assert (text["Method"], text["Search"], text["Times random"]) == ("DeepLIFT", "pgd", "12.5")
    assert (text["Top-k kept"], text["Rank correlation"]) == ("50.0 %", "0.500")
    assert text["Times flip-free random"] == "-"


def test_an_empty_table_is_its_head(tmp_path: Path) -> None:
    table = sensitivity_table([])
    csv, parquet, markdown, _ = write_table(tmp_path / "table", table)
    assert csv.read_text().splitlines() == [",".join(SENSITIVITY)]
    assert len(pd.read_parquet(parquet)) == 0
    assert len(markdown.read_text().splitlines()) == 2


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12) | st.just(HOSTILE)


@given(st.lists(names, min_size=1, max_size=4))
def test_markdown_has_as_many_cells_in_every_row(cells: list[str]) -> None:
    text = pd.DataFrame([cells], columns=[f"c{number}" for number in range(len(cells))], dtype=object)
    lines = to_markdown(text).removesuffix("\n").split("\n")
    assert len(lines) == 3
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == len(cells) + 1


@given(st.lists(names, min_size=1, max_size=4))
def test_latex_has_as_many_cells_in_every_row(cells: list[str]) -> None:
    text = pd.DataFrame([cells], columns=[f"c{number}" for number in range(len(cells))], dtype=object)
    lines = to_latex(text).removesuffix("\n").split("\n")
    assert len(lines) == 7
    body = lines[4].removesuffix(r" \\")
    assert len(re.findall(r"(?<!\\)&", body)) == len(cells) - 1
    for special in "%#$_":
        assert not re.search(rf"(?<!\\)\{special}", body)
