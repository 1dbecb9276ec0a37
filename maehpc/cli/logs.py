"""`maehpc logs`: what a job prints."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maehpc.cli.options import results_option
from maehpc.errors import InputError

if TYPE_CHECKING:
    from maehpc.launch.logs import Follower, Line
    from maehpc.launch.record import JobFolder

LOOK_S = 0.5
"""Seconds between two looks at the files."""
ASK_S = 5.0
"""Seconds between two questions whether the job goes on."""


@click.command("logs")
@click.argument("job")
@results_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended, over requeues.")
@click.option(
    "--rank", type=click.IntRange(min=0), help="One rank's alone; rank 0's hold the batch script's words too."
)
@click.option("--out", "streams", flag_value="out", help="Standard output alone.")
@click.option("--err", "streams", flag_value="err", help="Standard error alone.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Begin with the last N lines of each file.")
def command(job: str, results: Path, follow: bool, rank: int | None, streams: str | None, tail: int | None) -> None:
    """Print what the ranks of JOB printed, standard output and error, file by file.

    JOB is EXPERIMENT (its newest job that has begun, and with -f those that come after it), EXPERIMENT/NUMBER,
    EXPERIMENT/STAGE, a job's folder or the scheduler's id. A pool that explains several experiments is a job of each.
    Where the job has several ranks, each line begins with the number of its rank.
    """
    from maehpc.launch.named import find_jobs

    found = find_jobs(job, results)
    newest = max((place for place, one in enumerate(found) if one.newest_attempt()), default=0)
    try:
        for folder in found[newest:] if follow else found[newest : newest + 1]:
            if folder is found[newest] or rank is None or rank < folder.record().world_size:
                _show(folder, follow, rank, streams, tail)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this has seen enough; nothing more may be printed, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(folder: JobFolder, follow: bool, rank: int | None, streams: str | None, tail: int | None) -> None:
    from maehpc.launch.logs import Follower

    size = folder.record().world_size
    if rank is not None and rank >= size:
        ranks = "1 rank" if size == 1 else f"{size} ranks"
        raise InputError(f"--rank {rank}: {folder.label} has {ranks}, counted from 0")
    follower = Follower(
        folder, rank, ("out", "err") if streams is None else ("out" if streams == "out" else "err",), tail
    )
    prefixed = size > 1 and rank is None
    if follow:
        _follow(folder, follower, prefixed)
    else:
        _once(folder, follower, prefixed)


def _print(line: Line, prefixed: bool) -> None:
    sys.stdout.write(f"[{line.log.rank}] {line.text}\n" if prefixed else f"{line.text}\n")


def _state(folder: JobFolder) -> tuple[bool, str]:
    """Whether nothing more will come by itself, and the state in words."""
    from maehpc.launch.status import read

    reading = read([folder])
    row = reading.rows[0]
    words = f"{folder.label} is {row.state}" + (f": {row.sentence}" if row.sentence else "")
    return (not row.active or row.never) and reading.silence is None, words


def _once(folder: JobFolder, follower: Follower, prefixed: bool) -> None:
    for line in [*follower.lines(), *follower.last()]:
        _print(line, prefixed)
    if not follower.files():
        click.echo(f"maehpc: nothing was printed yet; {_state(folder)[1]}", err=True)


def _follow(folder: JobFolder, follower: Follower, prefixed: bool) -> None:
    asked, told = 0.0, ""
    over = False
    while True:
        now = time.monotonic()
        if not asked or now - asked >= ASK_S:
            asked = now
            over, words = _state(folder)
            if words != told and (over or not follower.files()):  # what is printed tells the rest
                click.echo(f"maehpc: {words}", err=True)
            told = words
        # Read after the question: what an ended job has printed is in its files by then.
        for line in follower.lines():
            _print(line, prefixed)
        if over:
            for line in follower.last():
                _print(line, prefixed)
            return
        sys.stdout.flush()
        time.sleep(LOOK_S)
