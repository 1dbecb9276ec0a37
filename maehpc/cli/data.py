"""`maehpc data`: which data sets are here, and how to get and keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maehpc.cli.options import json_option, packs_option, results_option
from maehpc.cli.paths import GivenPath

if TYPE_CHECKING:
    from maehpc.data import Pack


SIDE = click.IntRange(1, 4096)


@click.group("data")
def command() -> None:
    """List, fetch, pack and verify data sets."""


def _packs(packs: Path | None, results: Path) -> Path:
    return packs or results / "packs"


@command.command("list")
@results_option
@packs_option
@json_option
def list_command(results: Path, packs: Path | None, as_json: bool) -> None:
    """The catalogue, and which of its files are here."""
    from rich.table import Table

    from maehpc.cli.terminal import stdout
    from maehpc.data import available

    statuses = available(_packs(packs, results))
    if as_json:
        rows = [
            {
                "name": status.entry.name,
                "size": status.size,
                "task": status.entry.task,
                "classes": list(status.entry.classes),
                "images": dict(status.entry.counts),
                "state": status.state,
                "where": status.where,
            }
            for status in statuses
        ]
        click.echo(json.dumps(rows))
        return
    table = Table(caption="Any .npz in MedMNIST's layout and any image folder can be used by its path as well.")
    for column in ("data set", "pixels", "task", "classes", "train/val/test", "here"):
        table.add_column(column)
    for status in statuses:
        entry = status.entry
        counts = "/".join(str(entry.counts[split]) for split in ("train", "val", "test"))
        here = "–" if status.state == "missing" else f"{status.state}: {status.where}"
        table.add_row(entry.name, str(status.size), entry.task, str(len(entry.classes)), counts, here)
    stdout().print(table)


@command.command("fetch")
@click.argument("name")
@click.option("--size", type=SIDE, default=28, show_default=True, help="Side in pixels, where there is a choice.")
@click.option("--root", type=GivenPath(path_type=Path), help="Where to put it.  [default: ~/.medmnist]")
def fetch_command(name: str, size: int, root: Path | None) -> None:
    """Download the data set NAME from its publisher."""
    from maehpc.data import fetch

    click.echo(fetch(name, size, root))


@command.command("pack")
@click.argument("datasets", nargs=-1, required=True)
@click.option("--size", type=SIDE, default=28, show_default=True, help="Side in pixels, where there is a choice.")
@results_option
@packs_option
@json_option
def pack_command(datasets: tuple[str, ...], size: int, results: Path, packs: Path | None, as_json: bool) -> None:
    """Pack DATASETS (names, .npz files, image folders) to HDF5."""
    from maehpc.data import prepare

    facts = []
    for dataset in datasets:
        with prepare(dataset, size, _packs(packs, results)) as pack:
            facts.append(_facts(pack))
    _print(facts, as_json)


@command.command("verify")
@click.argument("paths", nargs=-1, type=GivenPath(path_type=Path))
@results_option
@packs_option
@json_option
def verify_command(paths: tuple[Path, ...], results: Path, packs: Path | None, as_json: bool) -> None:
    """Check packs (PATHS, or all that are here) against their digests."""
    from maehpc.data import Pack
    from maehpc.errors import InputError

    chosen = list(paths) or sorted(_packs(packs, results).glob("*.h5"))
    if not chosen:
        raise InputError(f"there is no pack in {_packs(packs, results)}; make one with `maehpc data pack NAME`")
    facts, problems = [], []
    for path in chosen:
        try:
            with Pack(path) as pack:
                pack.verify()
                facts.append(_facts(pack))
        except InputError as error:
            problems.append(str(error))
    _print(facts, as_json)
    if problems:
        raise InputError("; ".join(problems))


def _facts(pack: Pack) -> dict[str, object]:
    return {
        "name": pack.info.name,
        "path": str(pack.path),
        "images": dict(pack.info.counts),
        "shape": list(pack.info.shape),
        "task": pack.info.task,
        "digest": pack.info.digest,
    }


def _print(facts: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
        return
    for fact in facts:
        click.echo(f"{fact['path']}: {fact['name']}, images {fact['images']}, shape {fact['shape']}, whole")
