"""`maehpc resume`: let ended or held jobs go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from maehpc.cli.options import results_option

if TYPE_CHECKING:
    from maehpc.launch.record import JobFolder


@click.command("resume")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@results_option
def command(jobs: tuple[str, ...], results: Path) -> None:
    """Submit jobs again that failed, were cancelled or are unknown, and release held ones.

    JOB is EXPERIMENT (all of its jobs that need it), EXPERIMENT/NUMBER, EXPERIMENT/STAGE, a job's folder or the
    scheduler's id. A pool that explains several experiments is a job of each. A job goes on from its newest whole
    checkpoint, with the code that was submitted first; to use the present code, submit anew: finished stages and
    checkpoints are taken over. Nothing is submitted beside another job that is at work on the same stage of a data set.
    """
    from maehpc.launch.control import resume
    from maehpc.launch.named import find

    resumed: set[JobFolder] = set()
    for word in jobs:
        meant = find(word, results)
        found = [job for job in meant.jobs if job not in resumed]  # a pool answers to several names
        if found:
            resumed |= set(resume(found, results, click.echo, len(meant.jobs) > 1, meant.experiment))
