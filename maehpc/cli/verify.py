"""`maehpc verify PATH`: stores, checkpoints and results against their digests."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from maehpc.cli.options import json_option
from maehpc.cli.paths import GivenPath


@click.command("verify")
@click.argument("path", type=GivenPath(path_type=Path))
@click.option("--repair", is_flag=True, help="Forget damaged shards, so that explain computes just those again.")
@json_option
def command(path: Path, repair: bool, as_json: bool) -> None:
    """Read every byte of the experiments at or below PATH and name what is missing, cut off, changed or foreign.

    Exit code 1 where anything is.
    """
    from maehpc.stages.verify import verify_results

    findings = verify_results(path, repair)
    if as_json:
        click.echo(json.dumps(asdict(findings)))
    else:
        for problem in findings.problems:
            click.echo(problem["sentence"])
        for store, shards in findings.forgotten.items():
            click.echo(f"{store}: {len(shards)} of its shards forgotten; run explain to compute them")
        click.echo(f"{findings.checked} things checked, {len(findings.problems)} problems")
    if findings.problems:
        sys.exit(1)
