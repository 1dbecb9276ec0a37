"""What a person, or a script, is shown of an aggregation."""

from __future__ import annotations

import json
import math
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from maehpc.report import Summary


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:.{digits}f}"


def print_summary(summary: Summary, as_json: bool) -> None:
    """Prints the table, what is missing and the files on stdout; or all of it as JSON."""
    if as_json:
        rows = json.loads(summary.rows.to_json(orient="records"))
        click.echo(
            json.dumps({"rows": rows, "files": [str(path) for path in summary.files], "missing": summary.missing})
        )
        return
    console = Console()
    table = Table(
        title="Test scores and max explanation sensitivity", caption="max sensitivity: mean ± standard deviation"
    )
    for column in ("experiment", "data set", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("images", "accuracy", "AUC", "max sensitivity", "median", "flips"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in summary.rows.to_dict(orient="records"):
        spread = f"{_number(row['sensitivity_max_mean'])} ± {_number(row['sensitivity_max_std'])}"
        table.add_row(
            str(row["experiment"]),
            str(row["dataset"]),
            str(row["method"]),
            str(row["images"]),
            _number(row["accuracy"]),
            _number(row["auc"]),
            spread,
            _number(row["sensitivity_max_median"]),
            _number(row["flipped_fraction"], 4),
        )
    console.print(table)
    for sentence in summary.missing:
        console.print(f"missing: {sentence}", markup=False, highlight=False)
    for path in summary.files:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
