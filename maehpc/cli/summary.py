"""What a person, or a script, is shown of an aggregation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from maehpc.report import Summary


def print_summary(summary: Summary, as_json: bool) -> None:
    """Prints the table, what is missing and the files on stdout; or all of it as JSON."""
    if as_json:
        rows = json.loads(summary.rows.to_json(orient="records", double_precision=15))
        written = [str(path) for path in summary.files]
        click.echo(json.dumps({"rows": rows, "files": written, "missing": summary.missing}))
        return
    from maehpc.cli.terminal import stdout

    console = stdout()
    if len(summary.rows):
        console.print(_table(summary))
    for row in summary.rows[summary.rows["zero_maps"].fillna(0) > 0].to_dict("records"):
        maps = f"{row['zero_maps']} of {row['images']} {row['method']} maps"
        sentence = f"{row['experiment']}/{row['dataset']}: {maps} are zero everywhere and have no sensitivity"
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for sentence in summary.missing:
        console.print(f"missing: {sentence}", markup=False, highlight=False, soft_wrap=True)
    for path in summary.files:
        if path.suffix in (".png", ".md", ".html"):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _table(summary: Summary) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        title="Test scores, and max explanation sensitivity over images",
        caption="mean ± standard deviation over images; flips: perturbations that change the prediction",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("data set", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("images", "accuracy", "AUC", "max sensitivity", "flips"):
        table.add_column(column, justify="right", no_wrap=True)
    several = summary.rows["experiment"].nunique() > 1
    rows, texts = summary.rows.to_dict("records"), summary.text.to_dict("records")
    before = None
    for row, text in zip(rows, texts, strict=True):
        place = f"{row['experiment']}/{row['dataset']}" if several else str(row["dataset"])
        mean = str(text["Max sensitivity [95 % CI]"]).partition(" ")[0]
        if before not in (None, place):
            table.add_section()
        table.add_row(
            place if place != before else "",
            str(text["Method"]),
            str(row["images"]) if row["images"] == row["of_images"] else str(text["Images"]),
            str(text["Accuracy"]),
            str(text["AUC"]),
            f"{mean} ± {text['SD']}",
            str(text["Flips"]),
        )
        before = place
    return table
