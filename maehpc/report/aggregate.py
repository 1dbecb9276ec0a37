"""From folders of results to tables, figures and a page. What is not there is told; the rest is reported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from maehpc import __version__, files, keys
from maehpc.errors import InputError
from maehpc.experiment import Experiment, find_experiments
from maehpc.maps import MapStore
from maehpc.ownership import turn
from maehpc.progress import Progress, Silent
from maehpc.recipes import Recipe, read_recipe
from maehpc.report import page, tables
from maehpc.report.collected import Collected
from maehpc.report.explanations import Explained, choose, read_explained, read_panel
from maehpc.report.figures.curves import draw_curves
from maehpc.report.figures.distributions import Distribution, draw_distributions
from maehpc.report.figures.panels import draw_panels
from maehpc.report.figures.reconstructions import draw_reconstructions
from maehpc.report.per_image import Append, per_image_table
from maehpc.report.records import SPLITS, Finetuned, Scores, read_curves, read_finetuned, read_reconstructions
from maehpc.report.statistics import summarise

_PLAIN_NAME = re.compile(r"[a-z0-9_-]+")
"""A catalogue's data set is kept under its own name; one given by path under a name that only `maehpc.data` knows."""


@dataclass(frozen=True)
class Summary:
    """What a report holds.

    Attributes:
        rows: one row an experiment, data set and method; columns as in `maehpc.report.tables.SENSITIVITY`.
        text: the same rows for people to read.
        files: everything that was written, index.html last.
        missing: sentences on what is not in the report.
    """

    rows: pd.DataFrame
    text: pd.DataFrame
    files: list[Path]
    missing: list[str]


def aggregate(results: Path, out: Path | None = None, progress: Progress | None = None) -> Summary:
    """Reports on every experiment at or below a folder. Equal results give equal files, byte for byte.

    Args:
        results: an experiment, or a folder of experiments.
        out: where the report goes; `results`/report where None.
        progress: where to tell how far it is.

    Raises:
        InputError: there is no experiment.
        RunError: `out` cannot be written.
    """
    experiments = find_experiments(results)
    if not experiments:
        raise InputError(
            f"{results} holds no experiment (a folder with recipe.yaml); give the folder of one or of many"
        )
    out = results / "report" if out is None else out
    files.require_writable(out)
    with turn(out / ".lock"):  # two at once write the same files one after the other
        files.remove_partials(out)
        collected = Collected(out)
        progress = progress or Silent()
        with per_image_table(out / "images.parquet") as append, progress.bar("aggregate", len(experiments)) as bar:
            for experiment in experiments:
                relative = experiment.root.relative_to(results)
                name = relative.as_posix() if relative.parts else experiment.root.resolve().name
                _add_experiment(collected, name, experiment, append)
                bar.advance(1, name)
        return _write(collected)


@dataclass(frozen=True)
class Identity:
    """One data set of one experiment, as tables and sentences call it."""

    experiment: str
    dataset: str

    @property
    def place(self) -> str:
        """Its name in sentences, captions and file names."""
        return f"{self.experiment}/{self.dataset}"

    @property
    def columns(self) -> dict[str, str]:
        """Its columns in a table."""
        return {"experiment": self.experiment, "dataset": self.dataset}


def _add_experiment(collected: Collected, name: str, experiment: Experiment, append: Append) -> None:
    recipe: Recipe | None = None
    with collected.tolerating(name):
        recipe = read_recipe(experiment.recipe)
        collected.add_recipe(name, recipe)
    datasets = {
        *experiment.datasets_of("pretrain"),
        *experiment.datasets_of("finetune"),
        *experiment.mapped_datasets(),
    }
    for text in recipe.datasets if recipe else ():
        if _PLAIN_NAME.fullmatch(text) and text not in datasets:
            collected.lacks(f"{name}/{text}", "not begun")
    for dataset in sorted(datasets):
        identity = Identity(name, dataset)
        finetuned = _add_scores(collected, identity, experiment)
        _add_curves(collected, identity, experiment, recipe)
        _add_reconstructions(collected, identity, experiment, recipe)
        explained = None
        with collected.tolerating(identity.place):
            explained = _read_maps(collected, identity, experiment)
        if explained:
            append(name, dataset, explained)
            _add_sensitivity(collected, identity, explained, finetuned)
            _add_panels(collected, identity, explained)


def _add_scores(collected: Collected, identity: Identity, experiment: Experiment) -> Finetuned | None:
    found = None
    with collected.tolerating(identity.place):
        found = read_finetuned(experiment.stage("finetune", identity.dataset) / "done.json")
        if found is None:
            collected.lacks(identity.place, "finetuning is not finished, so accuracy and AUC are unknown")
    if found is None:
        return None
    for split in SPLITS:
        if split not in found.scores:
            continue
        about = {**identity.columns, "title": found.dataset.title, "split": split, "images": found.images.get(split)}
        collected.scores.append({**about, **found.scores[split].model_dump()})
    return found


def _add_curves(collected: Collected, identity: Identity, experiment: Experiment, recipe: Recipe | None) -> None:
    stages = {}
    for stage, title in (("pretrain", "Pretraining"), ("finetune", "Finetuning")):
        with collected.tolerating(identity.place):
            curves = read_curves(experiment.stage(stage, identity.dataset) / "metrics.jsonl")
            if curves:
                stages[title] = curves
            elif stage == "finetune" or _pretrains(recipe):
                collected.lacks(identity.place, f"no learning curve of {title.lower()}")
    if stages:
        title = f"Learning curves, {identity.place}"
        collected.add_figure("curves", identity.place, f"{title}.", lambda: draw_curves(stages, title))


def _add_reconstructions(
    collected: Collected, identity: Identity, experiment: Experiment, recipe: Recipe | None
) -> None:
    pictures = None
    with collected.tolerating(identity.place):
        pictures = read_reconstructions(experiment.stage("pretrain", identity.dataset) / "reconstructions.safetensors")
        if pictures is None and recipe and _pretrains(recipe) and recipe.pretrain.reconstructions:
            collected.lacks(identity.place, "no reconstructions: pretraining is not finished")
    if pictures:
        title = f"Masked autoencoder on test images, {identity.place}"
        caption = f"{title}: what it was given, what it saw of it, what it made of that."
        collected.add_figure("reconstructions", identity.place, caption, lambda: draw_reconstructions(pictures, title))


def _pretrains(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.encoder.weights == "pretrain"


def _read_maps(collected: Collected, identity: Identity, experiment: Experiment) -> Explained | None:
    ledger = experiment.ledger(identity.dataset)
    if not ledger.is_dir():
        collected.lacks(identity.place, "not explained")
        return None
    store = MapStore.open(experiment.maps(identity.dataset), ledger)
    return read_explained(store, partial(collected.lacks, identity.place))


def _add_sensitivity(
    collected: Collected, identity: Identity, explained: Explained, finetuned: Finetuned | None
) -> None:
    attributes = explained.attributes
    if finetuned and attributes.classifier and attributes.classifier not in finetuned.files.values():
        collected.lacks(identity.place, "accuracy and AUC: another classifier was explained than is finetuned now")
        finetuned = None
    test = finetuned.scores.get("test", Scores()) if finetuned else Scores()
    finite, intervals = {}, {}
    for method, scores in explained.scores.items():
        seed = keys.derive(attributes.seed, "report", "bootstrap", identity.dataset, method)
        statistics = summarise(scores, explained.flipped, np.random.default_rng(seed))
        row = {
            **identity.columns,
            "title": attributes.title,
            "split": attributes.split,
            "method": method,
            "images": len(explained.image),
            "of_images": explained.store.layout.images,
            "accuracy": test.accuracy,
            "auc": test.auc,
            **statistics,
        }
        collected.sensitivity.append(row)
        finite[method] = scores.maximum[np.isfinite(scores.maximum)]
        intervals[method] = (statistics["sensitivity_max_ci_low"], statistics["sensitivity_max_ci_high"])
    if not attributes.explain.sensitivity.samples:
        collected.lacks(identity.place, "no sensitivity: explain.sensitivity.samples is 0")
    elif any(map(len, finite.values())):
        label = f"{attributes.title}\n{identity.experiment}"
        collected.distributions.append(Distribution(label, finite, intervals, attributes.sampling))


def _add_panels(collected: Collected, identity: Identity, explained: Explained) -> None:
    attributes = explained.attributes
    if not attributes.explain.maps.pixels:
        collected.lacks(identity.place, "panels without images: explain.maps.pixels is false")
    words, chosen = choose(explained)
    panels = []
    with collected.tolerating(identity.place):
        panels = [read_panel(explained, position, heading) for position, heading in chosen.items()]
    if panels:
        title = f"{attributes.title}, {attributes.split} split, {identity.place}"
        caption = f"{title}. {words}; each map in its own colour range."
        collected.add_figure("panels", identity.place, caption, lambda: draw_panels(panels, title, words))


def _write(collected: Collected) -> Summary:
    out = collected.out
    if collected.distributions:
        caption = (
            "Max sensitivity over images, by method and data set. Data sets compare only at one image size and one "
            "preprocessing: the perturbation's norm grows with the side of the image."
        )
        collected.add_figure("sensitivity", "", caption, lambda: draw_distributions(collected.distributions))
    sensitivity = tables.sensitivity_table(collected.sensitivity)
    scores = tables.scores_table(collected.scores)
    written = [*tables.write_table(out / "table", sensitivity), *tables.write_table(out / "scores", scores)]
    index = out / "index.html"
    html = page.render(sensitivity, scores, collected.pictures, collected.missing, collected.recipes, __version__)
    files.write_text(index, html)
    return Summary(
        rows=sensitivity.data,
        text=sensitivity.text,
        files=[*written, out / "images.parquet", *collected.files, index],
        missing=collected.missing,
    )
