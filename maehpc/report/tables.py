"""Tables: their columns, and the same rows as CSV, Parquet, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from maehpc import files
from maehpc.recipes import plugins
from maehpc.report.methods import method

_INTERVAL = "the 95 % interval of that mean, over images (percentile bootstrap; Student's t for more than 20,000)"

SENSITIVITY = {
    "experiment": "folder of results",
    "dataset": "name of the data set",
    "title": "the data set's name in print",
    "split": "split that was explained",
    "method": "explanation method",
    "images": "images explained in whole shards; every figure to the right is over these",
    "of_images": "images the experiment set out to explain",
    "accuracy": "accuracy of the classifier on the whole test split",
    "auc": "area under the ROC curve on the whole test split (one against the rest, macro average)",
    "sensitivity_max_mean": "mean over images of the max sensitivity: the map's largest relative change over random "
    "perturbations, which tells chance and not the worst case",
    "sensitivity_max_ci_low": f"low end of {_INTERVAL}",
    "sensitivity_max_ci_high": "its high end",
    "sensitivity_max_std": "standard deviation over images (n - 1)",
    "sensitivity_max_median": "median over images",
    "sensitivity_max_q25": "first quartile",
    "sensitivity_max_q75": "third quartile",
    "sensitivity_mean": "mean over images of the mean sensitivity over perturbations",
    "flips": "share of all perturbations that change the predicted class, in [0, 1]",
    "sensitivity_max_flip_free": "median over images of the max over the perturbations that do not",
    "zero_maps": "images whose map is all zero: without sensitivity, in none of the figures above",
    "completeness": "median over images of |sum of the map - (f(x) - f(b))| / |f(x) - f(b)|",
    "noise_floor": "median of the map's relative difference from the same map in float64: what rounding alone does",
    "noise_floor_images": "images for which that was measured",
    "pgd_change_mean": "adversarial: mean over images of the relative change at the perturbation that projected "
    "gradient ascent found in the same ball, the prediction unchanged",
    "pgd_above_flip_free": "share of images, in [0, 1], for which that is more than the largest change of the random "
    "perturbations that leave the prediction unchanged",
}
"""Columns of the table of sensitivity: one row an experiment, data set and method."""

ADVERSARIAL = {
    "experiment": "folder of results",
    "dataset": "name of the data set",
    "title": "the data set's name in print",
    "split": "split that was explained",
    "method": "explanation method",
    "kind": "what the search maximised: pgd, the map's relative change; topk, the loss of its top features; centre, "
    "the shift of its centre of mass; targeted, its share inside a region",
    "images": "images for which a change is known (a map that is all zero has none)",
    "change_mean": "mean over images of the map's relative change at the perturbation found, the prediction unchanged",
    "change_ci_low": f"low end of {_INTERVAL}",
    "change_ci_high": "its high end",
    "change_median": "median over images",
    "random_max_mean": "mean over the same images of the largest change among the random perturbations",
    "ratio_to_random_max": "change_mean over random_max_mean, both over the images that have both",
    "ratio_to_flip_free_max": "the same against the largest change among the random perturbations that, as the search "
    "must, leave the prediction unchanged",
    "top_mean": "mean over images of the share of the map's top features that are still on top, in [0, 1]",
    "spearman_mean": "mean over images of the rank correlation with the unperturbed map, in [-1, 1]",
    "centre_mean": "mean over images of the shift of the map's centre of mass, as a share of the image's side",
}
"""Columns of the table of adversarial sensitivity: one row an experiment, data set, method and kind of search."""

METRICS = {
    "experiment": "folder of results",
    "dataset": "name of the data set",
    "title": "the data set's name in print",
    "split": "split that was explained",
    "method": "explanation method",
    "metric": "measure of trust",
    "part": "what of it; empty for the metric's own value",
    "element": "place along a part that is a series, from 0 on; empty for one value an image",
    "images": "images with a value (a map that is all zero has none)",
    "mean": "mean over images",
    "ci_low": f"low end of {_INTERVAL}; not for series",
    "ci_high": "its high end",
    "std": "standard deviation over images (n - 1)",
}
"""Columns of the table of metrics: one row an experiment, data set, method, metric, part and element."""

SCORES = {
    "experiment": "folder of results",
    "dataset": "name of the data set",
    "title": "the data set's name in print",
    "classifier": "finetuned (the one that is explained), or probe (a linear layer on frozen features)",
    "split": "train (the images trained on), val or test",
    "images": "images scored",
    "loss": "cross entropy, nats",
    "accuracy": "accuracy",
    "auc": "area under the ROC curve (one against the rest, macro average)",
}
"""Columns of the table of classifier scores: one row an experiment, data set, classifier and split."""


@dataclass(frozen=True)
class Table:
    """One table twice.

    Attributes:
        data: every column in full precision; NaN where nothing is known.
        text: the same rows for people: few columns, few digits, `-` where nothing is known.
    """

    data: pd.DataFrame
    text: pd.DataFrame


def sensitivity_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `SENSITIVITY` from rows by column name."""
    data = _frame(rows, SENSITIVITY)
    spread = "{} [{}, {}]"
    mean = ("sensitivity_max_mean", "sensitivity_max_ci_low", "sensitivity_max_ci_high")
    median = ("sensitivity_max_median", "sensitivity_max_q25", "sensitivity_max_q75")
    text: dict[str, Any] = {
        "Experiment": data["experiment"],
        "Data set": data["title"],
        "Method": [method(name).title for name in data["method"]],
        "Images": _combined(data, ("images", "of_images"), str, "{} of {}"),
        "Accuracy": _texts(data, "accuracy", _three_decimals),
        "AUC": _texts(data, "auc", _three_decimals),
        "Max sensitivity [95 % CI]": _combined(data, mean, _three_digits, spread),
        "SD": _texts(data, "sensitivity_max_std", _three_digits),
        "Median [quartiles]": _combined(data, median, _three_digits, spread),
        "Mean sensitivity": _texts(data, "sensitivity_mean", _three_digits),
        "Flips": _texts(data, "flips", _percent),
        "Flip-free median": _texts(data, "sensitivity_max_flip_free", _three_digits),
        "Zero maps": _texts(data, "zero_maps", str),
        "Completeness error": _texts(data, "completeness", _three_digits),
        "Noise floor": _texts(data, "noise_floor", _two_digits),
        "PGD change (adversarial)": _texts(data, "pgd_change_mean", _three_digits),
        "PGD above random": _texts(data, "pgd_above_flip_free", _percent),
    }
    measured = ("Noise floor", "PGD change (adversarial)", "PGD above random")
    shown = {name: cells for name, cells in text.items() if name not in measured or set(cells) - {"-"}}
    return Table(data, pd.DataFrame(shown, dtype=object))


def adversarial_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `ADVERSARIAL` from rows by column name."""
    data = _frame(rows, ADVERSARIAL)
    text = {
        "Experiment": data["experiment"],
        "Data set": data["title"],
        "Method": [method(name).title for name in data["method"]],
        "Search": data["kind"],
        "Images": _texts(data, "images", str),
        "Mean change [95 % CI]": _combined(
            data, ("change_mean", "change_ci_low", "change_ci_high"), _three_digits, "{} [{}, {}]"
        ),
        "Median change": _texts(data, "change_median", _three_digits),
        "Random maximum": _texts(data, "random_max_mean", _three_digits),
        "Times random": _texts(data, "ratio_to_random_max", _three_digits),
        "Times flip-free random": _texts(data, "ratio_to_flip_free_max", _three_digits),
        "Top-k kept": _texts(data, "top_mean", _percent),
        "Rank correlation": _texts(data, "spearman_mean", _three_decimals),
        "Centre shift": _texts(data, "centre_mean", _three_digits),
    }
    return Table(data, pd.DataFrame(text, dtype=object))


def metrics_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `METRICS` from rows by column name; series are in its data alone."""
    data = _frame(rows, METRICS)
    single = data[data["element"].isna()]
    text = {
        "Experiment": single["experiment"],
        "Data set": single["title"],
        "Metric": [_metric_title(name, part) for name, part in zip(single["metric"], single["part"], strict=True)],
        "Better": [plugins.facts("metrics", name).get("better", "-") for name in single["metric"]],
        "Method": [method(name).title for name in single["method"]],
        "Images": _texts(single, "images", str),
        "Mean [95 % CI]": _combined(single, ("mean", "ci_low", "ci_high"), _three_digits, "{} [{}, {}]"),
        "SD": _texts(single, "std", _three_digits),
    }
    return Table(data, pd.DataFrame(text, dtype=object))


def _metric_title(name: str, part: str) -> str:
    title = str(plugins.facts("metrics", name).get("title", name))
    return f"{title}, {part.replace('_', ' ')}" if part else title


def metric_meanings(names: Sequence[str]) -> dict[str, str]:
    """A sentence a metric, by its title: what it says, its unit and its source, as far as its file says so."""
    meanings = {}
    for name in names:
        facts = plugins.facts("metrics", name)
        parts = [facts[fact] for fact in ("meaning", "unit", "source") if fact in facts]
        if parts:
            meanings[_metric_title(name, "")] = "; ".join(parts)
    return meanings


def scores_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `SCORES` from rows by column name."""
    data = _frame(rows, SCORES)
    text = {
        "Experiment": data["experiment"],
        "Data set": data["title"],
        "Classifier": data["classifier"],
        "Split": data["split"],
        "Images": _texts(data, "images", str),
        "Loss": _texts(data, "loss", _three_decimals),
        "Accuracy": _texts(data, "accuracy", _three_decimals),
        "AUC": _texts(data, "auc", _three_decimals),
    }
    return Table(data, pd.DataFrame(text, dtype=object))


_WHOLE = ("images", "of_images", "zero_maps", "noise_floor_images", "element")
_WORDS = ("experiment", "dataset", "title", "classifier", "split", "method", "kind", "metric", "part")


def _frame(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    types = {name: "Int64" if name in _WHOLE else "str" if name in _WORDS else "float64" for name in columns}
    return pd.DataFrame(list(rows), columns=list(columns)).astype(types)


def _three_decimals(value: float) -> str:
    return f"{value:.3f}"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _two_digits(value: float) -> str:
    return f"{value:.1e}" if value < 0.001 else f"{value:#.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _texts(table: pd.DataFrame, column: str, write: Callable[[Any], str]) -> list[str]:
    return ["-" if pd.isna(value) else write(value) for value in table[column]]


def _combined(table: pd.DataFrame, columns: Sequence[str], write: Callable[[Any], str], pattern: str) -> list[str]:
    """The columns in one; just the first where a later one is unknown."""
    first, *others = (_texts(table, column, write) for column in columns)
    rows = zip(first, *others, strict=True)
    return [pattern.format(*row) if "-" not in row else row[0] for row in rows]


def write_table(stem: Path, table: Table) -> list[Path]:
    """Writes a table four times: its data as CSV and Parquet, its text as Markdown and LaTeX.

    Args:
        stem: path without suffix.
        table: what to write.

    Raises:
        RunError: the disk refused.
    """
    csv, parquet, markdown, latex = (stem.with_name(stem.name + end) for end in (".csv", ".parquet", ".md", ".tex"))
    files.write_text(csv, table.data.to_csv(index=False, lineterminator="\n"))
    with files.atomic_path(parquet) as partial:
        table.data.to_parquet(partial, index=False)
    files.write_text(markdown, to_markdown(table.text))
    files.write_text(latex, to_latex(table.text))
    return [csv, parquet, markdown, latex]


def to_markdown(text: pd.DataFrame) -> str:
    """A table of text in GitHub's Markdown."""
    rows = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "".join("| " + " | ".join(_escaped(cell, _MARKDOWN) for cell in row) + " |\n" for row in rows)


def to_latex(text: pd.DataFrame) -> str:
    """A table of text as a LaTeX `tabular` that needs no package."""
    rows = [" & ".join(_escaped(cell, _LATEX) for cell in row) + r" \\" for row in text.to_numpy().tolist()]
    head = " & ".join(_escaped(cell, _LATEX) for cell in text.columns) + r" \\"
    lines = [rf"\begin{{tabular}}{{{'l' * len(text.columns)}}}", r"\hline", head, r"\hline", *rows, r"\hline"]
    return "\n".join([*lines, r"\end{tabular}", ""])


_MARKDOWN = {"\\": "\\\\", "|": "\\|", "\n": " ", "<": "&lt;", "*": "\\*", "_": "\\_"}
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # after a line's end a bare bracket would be read as a length
    "\n": " ",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _escaped(text: str, replacements: Mapping[str, str]) -> str:
    return "".join(replacements.get(character, character) for character in text)
