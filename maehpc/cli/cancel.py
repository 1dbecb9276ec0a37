"""`maehpc cancel`: end jobs."""

from __future__ import annotations

from pathlib import Path

import click

from maehpc.cli.options import results_option


@click.command("cancel")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@results_option
def command(jobs: tuple[str, ...], results: Path) -> None:
    """End jobs, waiting or running, and those that wait for them.

    JOB is EXPERIMENT (all of its jobs), EXPERIMENT/NUMBER, EXPERIMENT/STAGE, a job's folder or the scheduler's id. A
    pool that explains several experiments is a job of each, and ends for all of them. A running job finishes its step
    and saves, if the site's grace allows; `maehpc resume` goes on from there.
    """
    from maehpc.launch.control import cancel
    from maehpc.launch.named import find_jobs

    found = list(dict.fromkeys(job for word in jobs for job in find_jobs(word, results)))
    cancel(found, results, click.echo)
