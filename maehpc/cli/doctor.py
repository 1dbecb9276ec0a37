"""`maehpc doctor`: what this machine and its cluster have, what is missing, and a first profile."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maehpc.cli.options import json_option, results_option
from maehpc.cli.paths import GivenPath

if TYPE_CHECKING:
    from maehpc.launch.probes import Finding

MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command("doctor")
@click.option(
    "--draft", "show_draft", is_flag=True, help="Print a profile for this cluster on stdout, and nothing else."
)
@click.option(
    "--profile-out",
    type=GivenPath(dir_okay=False, path_type=Path),
    metavar="FILE.yaml",
    help="Write that profile to a file, which must not exist yet.",
)
@results_option
@json_option
def command(show_draft: bool, profile_out: Path | None, results: Path, as_json: bool) -> None:
    """Look for what jobs need here: Python, GPUs, network, the results folder, Slurm; draft a profile.

    Exit code 1 where something was found that will make jobs fail.
    """
    from maehpc.launch.doctor import blocking, draft, examine

    if profile_out is not None:
        _refuse_existing(profile_out)
    text = draft(results) if show_draft or profile_out is not None else None
    if profile_out is not None and text is not None:
        _write(profile_out, text)
    if show_draft and not as_json:
        click.echo(text, nl=False)
        return
    findings = examine(results)
    if as_json:
        click.echo(json.dumps({"findings": [asdict(finding) for finding in findings], "profile": text}))
    else:
        _print(findings)
        if profile_out is not None:
            click.echo(f"profile written to {profile_out}: look through it, then use --cluster {profile_out}")
    if blocking(findings):
        sys.exit(1)


def _refuse_existing(path: Path) -> None:
    from maehpc.errors import InputError

    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--profile-out {path}: give a name that ends in .yaml")
    if path.exists():
        raise InputError(f"--profile-out {path} exists; give another name, or delete it")


def _write(path: Path, text: str) -> None:
    from maehpc import files

    files.write_text(path, text)


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            click.secho(topic, bold=True)
        mark = click.style(f"{MARKS[finding.state]:8}", fg=COLOURS[finding.state])
        click.echo(f"  {mark} {finding.name:{width}}  {finding.text}")
        if finding.fix:
            click.echo(f"  {'':8} {'':{width}}  -> {finding.fix}")
    count = {state: sum(finding.state == state for finding in findings) for state in MARKS}
    problems = f"{count['problem']} problem{'s' * (count['problem'] != 1)}"
    click.echo(f"{problems}, {count['warning']} warning{'s' * (count['warning'] != 1)}, {count['ok']} ok")
