"""`maehpc maps`: stored explanations for other programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from maehpc.cli.options import (
    complete_mapped,
    complete_method,
    json_option,
    separated,
    set_verbosity,
    verbosity_options,
)
from maehpc.cli.paths import GivenPath

FORMATS = ("npy", "png", "nifti")


@click.group("maps")
def command() -> None:
    """Stored explanations for other programs."""


@command.command("export")
@click.argument("path", type=GivenPath(path_type=Path))
@click.option("--to", type=click.Choice(FORMATS), required=True, help="Arrays, pictures, or volumes (.nii.gz).")
@click.option(
    "--out",
    type=GivenPath(path_type=Path),
    help="Folder; a data set has one in it.  [default: the experiment's export]",
)
@click.option("--datasets", shell_complete=complete_mapped, help="Names, with commas between.  [default: all]")
@click.option("--methods", shell_complete=complete_method, help="Names, with commas between.  [default: all]")
@click.option("--images", help="Indices and ranges of the split, such as 0,5,10-19.  [default: all explained]")
@json_option
@verbosity_options
def export_command(
    path: Path,
    to: str,
    out: Path | None,
    datasets: str | None,
    methods: str | None,
    images: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the explanations of PATH, an experiment's folder or one of its stores (maps/DATASET.zarr), as other files.

    npy: one array a method and score, a row an image. png: maps over their images. nifti: a volume an image and method.
    Only shards that the ledger records count. Exit code 1 where any that was asked for is missing or damaged.
    """
    from maehpc.cli.terminal import reporter
    from maehpc.report.export import export, parse_images

    set_verbosity(verbose)
    summary = export(
        path,
        to,
        out,
        datasets=None if datasets is None else separated(datasets),
        methods=None if methods is None else separated(methods),
        images=None if images is None else parse_images(images),
        progress=reporter(quiet),
    )
    if as_json:
        exported = [
            {
                "dataset": each.dataset,
                "folder": str(each.folder),
                "methods": list(each.methods),
                "images": each.images,
                "files": each.files,
            }
            for each in summary.exported
        ]
        click.echo(json.dumps({"exported": exported, "missing": summary.missing}))
    else:
        for each in summary.exported:
            click.echo(f"{each.folder}: {each.images} images, {each.files} files")
    if summary.missing:
        sys.exit(1)
