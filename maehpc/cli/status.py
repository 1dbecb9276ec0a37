"""`maehpc status`: what the jobs do."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maehpc.cli.options import json_option, results_option
from maehpc.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from maehpc.launch.record import JobFolder
    from maehpc.launch.status import Reading, Row

    Asked = Mapping[JobFolder, Collection[str]]
    """Jobs, each with the experiments by whose name it was asked for; none: for all that it works on."""

REDRAW_S = 2.0
"""Seconds between two looks at the jobs' folders."""
ASK_EVERY = 5
"""Looks for which one answer of Slurm's is good: its controller serves everybody."""
STILL_S = 30.0
"""Seconds without a finished unit after which a running job is said to stand still."""

_LEAST = ("id", "nodes", "attempt", "left", "loss")
"""Columns that a narrow terminal does without, in this order."""

_STYLES = {
    "running": "green",
    "starting": "green",
    "done": "bold green",
    "failed": "bold red",
    "unknown": "magenta",
    "cancelled": "dim",
    "held": "yellow",
    "suspended": "yellow",
    "continuing": "cyan",
    "stopping": "cyan",
}


@click.command("status")
@click.argument("jobs", nargs=-1, metavar="[PATH|EXPERIMENT[/JOB]]...")
@results_option
@click.option(
    "--all", "everything", is_flag=True, help="Also jobs that have ended well or were replaced by later ones."
)
@click.option("--watch", is_flag=True, help="Look again every 2 s until all have ended.")
@json_option
def command(jobs: tuple[str, ...], results: Path, everything: bool, watch: bool, as_json: bool) -> None:
    """Show what jobs do, and what `maehpc run` does in other terminals: those below --results, or those named.

    A job is named by EXPERIMENT (all of it), EXPERIMENT/NUMBER, EXPERIMENT/STAGE, its folder or the scheduler's id. A
    pool that explains several experiments is a job of each, and tells the data sets of the one that was named. Without
    a name, experiments that have ended are left out, except for failures that no later job has replaced.

    States: waiting, held, starting, running, suspended, stopping, continuing (requeued, before its next attempt), done,
    failed, cancelled, and unknown where neither the scheduler nor the job's own records tell.

    A run in a terminal is shown as EXPERIMENT/PROCESS-STAGE as long as it lasts; EXPERIMENT, EXPERIMENT/STAGE and the
    number of its process name it, too. Whether it still lasts, only its own host knows: on others it is unknown.

    With --json an object is printed: "jobs" holds for each job its job, folder, experiment, also, stage, scheduler,
    job_id, state, sentence, slurm_state, slurm_reason, nodes_asked, nodes, attempt, phase, dataset, parts, rates,
    failures, done, total, unit, images_per_second, seconds_left, wall_seconds_left, loss, first_step_seconds, sequence
    (null where not known); scheduler is slurm, local, debug, or run for one in a terminal, also holds further
    experiments that the same pool explains, parts done and total of each data set where several are worked on at once,
    rates their images a second, failures how many times a shard of a data set failed or ended its worker; "left_out" is
    the number of jobs not shown, "silence" says why Slurm could not be asked.
    """
    from maehpc.launch.status import read

    if not jobs and not results.is_dir():
        raise InputError(f"--results {results}: there is no such folder")
    if watch and as_json:
        raise InputError("--watch and --json exclude each other; call `maehpc status --json` again and again")
    find = _Asking(jobs, results)
    if watch:
        _watch(find, everything or bool(jobs))
        return
    asked, runs = find()
    reading = read(list(asked))
    rows = [*_chosen(reading, everything or bool(jobs)), *runs]
    if as_json:
        told = {"jobs": [row.as_json() for row in rows], "left_out": len(reading.rows) + len(runs) - len(rows)}
        click.echo(json.dumps({**told, "silence": reading.silence}))
        return
    if reading.silence:
        click.echo(f"maehpc: {reading.silence}; states are as recorded, or unknown", err=True)
    _print(rows, asked, len(reading.rows) + len(runs) - len(rows), results)


class _Asking:
    """The jobs that are meant, and what runs in terminals; looked up anew at every look, since new ones may appear.

    Args:
        words: of the command line; none: all that is below `results`.
        results: folder of experiments.
    """

    def __init__(self, words: tuple[str, ...], results: Path) -> None:
        self._words = words
        self._results = results
        self._seen: set[str] = set()

    def __call__(self) -> tuple[Asked, list[Row]]:
        """Looks.

        Raises:
            InputError: a word means neither, and never did.
        """
        from maehpc.launch.foreground import at_work_below, find_runs
        from maehpc.launch.named import jobs_below, look_up, no_such

        if not self._words:
            return dict.fromkeys(jobs_below(self._results), ()), at_work_below(self._results)
        names: dict[JobFolder, list[str | None]] = {}
        runs: dict[tuple[str, ...], Row] = {}
        for word in self._words:
            meant, running = look_up(word, self._results), find_runs(word, self._results)
            if not meant.jobs and not running and word not in self._seen:
                raise no_such(word, self._results)
            self._seen.add(word)
            for job in meant.jobs:
                names.setdefault(job, []).append(meant.experiment)
            for row in running:
                runs.setdefault((*row.nodes, str(row.job_id)), row)
        asked = {job: [one for one in found if one] if None not in found else () for job, found in names.items()}
        return asked, list(runs.values())


def _chosen(reading: Reading, everything: bool) -> list[Row]:
    from maehpc.launch.relations import worth_showing

    return reading.rows if everything else worth_showing(reading.rows)


def _left_out(shown: list[Row], left_out: int, results: Path) -> str | None:
    if left_out:
        number = "1 job that has" if left_out == 1 else f"{left_out} jobs that have"
        return f"{number} ended: --all shows {'it' if left_out == 1 else 'them'}"
    return None if shown else f"there are no jobs below {results}"


def _print(rows: list[Row], asked: Asked, left_out: int, results: Path) -> None:
    from maehpc.cli.terminal import stdout

    console = stdout()
    if console.is_terminal:
        console.print(_table(rows, console.width)) if rows else None
    else:
        for line in _lines(rows):
            click.echo(line)
    for line in _sentences(rows, _Standstill(), asked):
        click.echo(line)
    last = _left_out(rows, left_out, results)
    if last:
        click.echo(last)


def _lines(rows: list[Row]) -> list[str]:
    """The table without decoration, columns two blanks apart."""
    from maehpc.launch.words import COLUMNS, NUMBERS, cells

    table = [COLUMNS, *(cells(row) for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if name in NUMBERS else text.ljust(width)
            for name, text, width in zip(COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in table
    ]


def _table(rows: list[Row], width: int) -> Any:
    """The table for a terminal of so many columns; where it is too narrow, what matters least is left out."""
    from rich.table import Table
    from rich.text import Text

    from maehpc.launch.words import COLUMNS, NUMBERS, cells

    texts = [dict(zip(COLUMNS, cells(row), strict=True)) for row in rows]
    needs = {name: max([len(name), *(len(text[name]) for text in texts)]) for name in COLUMNS}
    for name in _LEAST:
        if sum(needs.values()) + 2 * (len(needs) - 1) > width:
            del needs[name]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in needs:
        justify: Any = "right" if name in NUMBERS else "left"
        table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")
    for row, text in zip(rows, texts, strict=True):
        table.add_row(*(Text(text[name], _STYLES.get(row.state, "") if name == "state" else "") for name in needs))
    return table


class _Standstill:
    """Two looks tell whether a job moves; this terminal's own clock measures between them."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}

    def seconds(self, row: Row) -> float:
        """How long nothing has been seen to move; 0 for a job that does not run."""
        now = time.monotonic()
        if row.heartbeat is None or row.state != "running":
            self._seen.pop(row.job.path, None)
            return 0.0
        mark = (row.attempt, row.heartbeat.sequence)
        before = self._seen.get(row.job.path)
        if before is None or before[0] != mark:
            self._seen[row.job.path] = (mark, now)
            return 0.0
        return now - before[1]


def _sentences(rows: list[Row], still: _Standstill, asked: Asked | None = None) -> list[str]:
    """What the table has no room for: what shares a pool, why a job waits or stands still, and a line a data set."""
    from maehpc.launch.words import parts, together

    found = []
    for row in rows:
        seconds = still.seconds(row)
        names = (asked or {}).get(row.job, ())
        words = [told for told in (together(row.record, names), row.sentence) if told]
        words += [f"nothing has moved for {seconds:.0f} s"] if seconds >= STILL_S else []
        if words:
            found.append(f"{row.job.label}: {'; '.join(words)}")
        found += [f"{row.job.label}: {told}" for told in parts(row, names)]
    return found


def _marks(reading: Reading) -> list[tuple[Path, int, str]]:
    """What changes when jobs begin or end."""
    return [(row.job.path, row.attempt, row.state) for row in reading.rows]


def _watch(find: _Asking, everything: bool) -> None:
    """Shows the jobs again and again until none can change by itself."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from maehpc.launch.relations import stuck
    from maehpc.launch.status import read

    console = Console()
    still = _Standstill()
    reading: Reading | None = None
    shown: list[Row] = []
    printed: list[str] = []
    age = 0

    def look() -> RenderableType:
        nonlocal reading, shown, printed, age
        asked, runs = find()
        jobs = list(asked)
        marks = None if reading is None else _marks(reading)
        fresh = reading is None or age + 1 >= ASK_EVERY
        reading = read(jobs, None if fresh or reading is None else reading.scheduler)
        if not fresh and _marks(reading) != marks:  # an answer from before that says nothing of it
            fresh, reading = True, read(jobs)
        age = 0 if fresh else age + 1
        # What is on the screen stays there when it ends.
        before = {row.job.path for row in shown}
        chosen = {row.job.path for row in _chosen(reading, everything)}
        shown = [*(row for row in reading.rows if row.job.path in before | chosen), *runs]
        told = _sentences(shown, still, asked)
        told += [f"{reading.silence}; states are as recorded, or unknown"] if reading.silence else []
        told += [] if shown else ["no job goes on"]
        lines = [*_lines(shown), *told]
        if not console.is_terminal and lines != printed:
            click.echo("\n".join([*lines, ""]))
        printed = lines
        return Group(_table(shown, console.width), Text("\n".join(told)))

    def over() -> bool:
        assert reading is not None
        # With an answer of Slurm's from just now, what is unknown stays unknown.
        if reading.silence is not None or age > 0:
            return False
        never = stuck(shown)
        return not any(row.active and row.job.path not in never for row in shown)

    if not console.is_terminal:
        look()
        while not over():
            time.sleep(REDRAW_S)
            look()
        return
    with Live(look(), console=console, auto_refresh=False) as live:
        while not over():
            time.sleep(REDRAW_S)
            live.update(look(), refresh=True)
