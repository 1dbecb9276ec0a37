"""`maehpc aggregate RESULTS`: tables, figures and a report over every experiment below."""

from __future__ import annotations

from pathlib import Path

import click

from maehpc.cli.options import json_option, set_verbosity, verbosity_options
from maehpc.cli.paths import GivenPath


@click.command("aggregate")
@click.argument("results", type=GivenPath(), default="results")
@click.option(
    "--out",
    type=GivenPath(path_type=Path),
    help="Folder of the report.  [default: RESULTS/report; needed where RESULTS is remote]",
)
@json_option
@verbosity_options
def command(results: str, out: Path | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Aggregate all experiments at or below RESULTS, a folder or a place that fsspec reaches (s3://…, https://…).

    Only shards that the ledger records count. What was read is kept in the report's folder, so that the next report
    reads new shards alone.
    """
    from maehpc.cli.summary import print_summary
    from maehpc.cli.terminal import reporter
    from maehpc.errors import InputError
    from maehpc.files import reading
    from maehpc.places import is_remote, place
    from maehpc.report import aggregate

    set_verbosity(verbose)
    folder = place(results)
    if is_remote(folder) and out is None:
        raise InputError(f"{results} is remote, and the report is written here; give its folder with --out")
    with reading(folder):
        found = folder.is_dir()
    if not found:
        raise InputError(f"{results} is not a folder; give the folder of experiments")
    print_summary(aggregate(folder, out, reporter(quiet)), as_json)
