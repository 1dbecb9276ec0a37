"""The report as one HTML page: no script, no network, figures by relative links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jinja2
import pandas as pd


@dataclass(frozen=True)
class Section:
    """A table on the page.

    Attributes:
        stem: of its files' names.
        heading: above it.
        caption: what it holds, and what it must not be taken for.
        text: its rows, for people.
        columns: what each column of its files means.
        terms: what else its cells speak of.
        images: name of the file that has the same image by image; empty for none.
    """

    stem: str
    heading: str
    caption: str
    text: pd.DataFrame
    columns: Mapping[str, str]
    terms: Mapping[str, str] = field(default_factory=dict)
    images: str = ""


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
    sections: Sequence[Section],
    pictures: Sequence[Picture],
    missing: Sequence[str],
    recipes: Sequence[RecipeText],
    version: str,
) -> str:
    """The page's HTML. Everything that comes from a file is escaped.

    Args:
        sections: tables in the order they are shown; those without rows are left out.
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
        sections=[section for section in sections if len(section.text)],
        pictures=pictures,
        missing=missing,
        recipes=recipes,
        version=version,
    )
