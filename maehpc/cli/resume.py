"""`maehpc resume`: let ended or held jobs go on."""

from __future__ import annotations

from pathlib import Path

import click

from maehpc.cli.options import results_option


@click.command("resume")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@results_option
def command(jobs: tuple[str, ...], results: Path) -> None:
    """Submit jobs again that failed, were cancelled or are unknown, and release held ones.

    JOB is EXPERIMENT (all of its jobs that need it), EXPERIMENT/NUMBER, EXPERIMENT/STAGE, a job's folder or the
    scheduler's id. A job goes on from its newest whole checkpoint, with the code that was submitted first; to use the
    present code, submit anew: finished stages and checkpoints are taken over.
    """
    from maehpc.launch.control import resume
    from maehpc.launch.named import find_jobs

    for word in jobs:
        found = find_jobs(word, results)
        resume(found, results, click.echo, every=len(found) > 1)
