"""A report while it grows: rows, figures, recipes, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maehpc import files
from maehpc.errors import MaehpcError, RunError
from maehpc.recipes import Recipe, recipe_yaml
from maehpc.report.figures.adversarial import Comparison
from maehpc.report.figures.distributions import Distribution
from maehpc.report.figures.style import Draw, write_figure
from maehpc.report.gathered import Reader
from maehpc.report.page import Picture, RecipeText, Section
from maehpc.report.tables import Table, write_table

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


GATHERED = ".gathered"
"""Folder of a report in which it keeps what it has read, for the next one; see `maehpc.report.gathered`."""


class Collected:
    """What has been gathered for a report in the folder `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.gathered = out / GATHERED
        self.reader = Reader()
        self.blocks: list[Path] = []
        self.files: list[Path] = []
        self.missing: list[str] = []
        self.unread = False
        """Whether something that may be read another time was not: then what is not in the report is not gone."""
        self.sensitivity: list[Mapping[str, Any]] = []
        self.adversarial: list[Mapping[str, Any]] = []
        self.metrics: list[Mapping[str, Any]] = []
        self.scores: list[Mapping[str, Any]] = []
        self.distributions: list[Distribution] = []
        self.comparisons: list[Comparison] = []
        self.tables: list[Path] = []
        self.sections: list[Section] = []
        self.pictures: list[Picture] = []
        self.recipes: list[RecipeText] = []

    def lacks(self, place: str, sentence: str) -> None:
        """Notes that something of `place` is not in the report."""
        self.missing.append(f"{place}: {sentence}")

    @contextmanager
    def tolerating(self, place: str) -> Iterator[None]:
        """Runs a block that reads files of `place`; where one turns out wrong, notes that and goes on after the block.

        Nothing may be written inside: a full disk is no gap in the results.
        """
        try:
            yield
        except MaehpcError as error:
            self.lacks(place, str(error))
            self.unread |= isinstance(error, RunError)

    def add_recipe(self, experiment: str, recipe: Recipe) -> None:
        """Adds an experiment's recipe and its digest."""
        digest = files.digest(recipe.model_dump(mode="json"))
        self.recipes.append(RecipeText(experiment, digest, recipe_yaml(recipe)))

    def add_table(
        self,
        table: Table,
        *,
        stem: str,
        heading: str,
        caption: str,
        columns: Mapping[str, str],
        terms: Mapping[str, str] | None = None,
        images: str = "",
    ) -> None:
        """Writes a table, and shows it on the page; see `Section`.

        Raises:
            RunError: the disk refused.
        """
        self.tables += write_table(self.out / stem, table)
        self.sections.append(Section(stem, heading, caption, table.text, columns, terms or {}, images))

    def add_figure(self, kind: str, place: str, caption: str, draw: Draw) -> None:
        """Draws and writes a figure called after its kind and place, and no other.

        Raises:
            RunError: the disk refused.
        """
        name = _UNSAFE.sub("-", f"{kind}-{place}" if place else kind)
        taken = {path.stem for path in self.files}
        number = 1
        while (stem := name if number == 1 else f"{name}-{number}") in taken:
            number += 1
        png, pdf = write_figure(self.out / stem, draw)
        self.files += [png, pdf]
        self.pictures.append(Picture(place, caption, png.name, pdf.name))
