"""`maehpc aggregate RESULTS`: tables, figures and a report over every experiment below."""

from __future__ import annotations

from pathlib import Path

import click

from maehpc.cli.options import json_option, set_verbosity, verbosity_options


@click.command("aggregate")
@click.argument("results", type=click.Path(path_type=Path), default=Path("results"))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.  [default: RESULTS/report]")
@json_option
@verbosity_options
def command(results: Path, out: Path | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Aggregate all experiments at or below RESULTS. Only shards that the ledger records count."""
    from maehpc.cli.summary import print_summary
    from maehpc.cli.terminal import reporter
    from maehpc.errors import InputError
    from maehpc.report import aggregate

    set_verbosity(verbose)
    if not results.is_dir():
        raise InputError(f"{results} is not a folder; give the folder of experiments")
    print_summary(aggregate(results, out, reporter(quiet)), as_json)
