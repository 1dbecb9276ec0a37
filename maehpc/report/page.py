"""The report as one HTML page: no script, no network, figures by relative links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from maehpc.report.tables import SENSITIVITY, Table


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        place: the experiment and data set it shows; empty for one of them all.
        caption: what it shows.
        png: file name.
        pdf: file name.
    """

    place: str
    caption: str
    png: str
    pdf: str


@dataclass(frozen=True)
class RecipeText:
    """An experiment's recipe: SHA-256 of its resolved settings, and their YAML."""

    experiment: str
    digest: str
    yaml: str


def render(
    sensitivity: Table,
    scores: Table,
    pictures: Sequence[Picture],
    missing: Sequence[str],
    recipes: Sequence[RecipeText],
    version: str,
) -> str:
    """The page's HTML. Everything that comes from a file is escaped.

    Args:
        sensitivity: one row an experiment, data set and method.
        scores: one row an experiment, data set and split.
        pictures: in the order they are shown.
        missing: sentences.
        recipes: one an experiment.
        version: of maehpc.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("maehpc.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html").render(
        tables=[
            ("Explanations", "Sensitivity of explanations", "table", sensitivity.text),
            ("Classifiers", "Scores of classifiers", "scores", scores.text),
        ],
        columns=SENSITIVITY,
        pictures=pictures,
        missing=missing,
        recipes=recipes,
        version=version,
    )
