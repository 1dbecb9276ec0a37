"""From folders of results to tables, figures and a page. What is not there is told; the rest is reported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maehpc import __version__, files, keys
from maehpc.errors import InputError, RunError
from maehpc.experiment import Experiment, find_experiments
from maehpc.maps import MapStore
from maehpc.overlooked import overlooked
from maehpc.ownership import turn
from maehpc.progress import Progress, Silent
from maehpc.recipes import Recipe, read_recipe
from maehpc.report import page, tables
from maehpc.report.collected import Collected
from maehpc.report.columns import Column, Floats, count, mapped
from maehpc.report.earlier import settle_earlier
from maehpc.report.explanations import Explained, choose, read_explained, read_panel
from maehpc.report.figures.adversarial import Comparison, draw_comparisons
from maehpc.report.figures.curves import draw_curves
from maehpc.report.figures.distributions import Distribution, draw_distributions
from maehpc.report.figures.panels import draw_panels
from maehpc.report.figures.reconstructions import draw_reconstructions
from maehpc.report.gathered import UnwritableError, remove_others
from maehpc.report.per_image import Append, per_image_tables
from maehpc.report.records import SPLITS, Scored, Scores, read_curves, read_reconstructions, read_scored
from maehpc.report.statistics import finite_values, summarise, summarise_metric, summarise_search
from maehpc.report.tables import Table

_PLAIN_NAME = re.compile(r"[a-z0-9_-]+")
"""A catalogue's data set is kept under its own name; one given by path under a name that only `maehpc.data` knows."""


MANY_SHARDS = 256
"""Of a store whose reading takes long enough to have a bar of its own."""
IMAGES, IMAGE_METRICS = "images.parquet", "image_metrics.parquet"


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
        told = progress.bar("aggregate", len(experiments), images=0)
        with per_image_tables(out / IMAGES, out / IMAGE_METRICS) as append, told as bar:
            for experiment in experiments:
                relative = experiment.root.relative_to(results)
                name = relative.as_posix() if relative.parts else experiment.root.resolve().name
                try:
                    _add_experiment(collected, name, experiment, append, progress)
                except UnwritableError as error:
                    raise RunError(str(error)) from error
                bar.advance()
        for folder, sentence in overlooked(results).items():
            collected.lacks(folder.relative_to(results).as_posix(), sentence)
            collected.unread = True
        if not collected.unread:
            remove_others(collected.gathered, collected.blocks)
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


def _add_experiment(
    collected: Collected, name: str, experiment: Experiment, append: Append, progress: Progress
) -> None:
    recipe: Recipe | None = None
    with collected.tolerating(name):
        recipe = read_recipe(experiment.recipe)
        collected.add_recipe(name, recipe)
    begun: dict[str, list[str]] = {}
    for folder in ("pretrain", "finetune", "probe", "ledger"):
        with collected.tolerating(name):
            begun[folder] = experiment.datasets_of(folder)
    datasets = {dataset for found in begun.values() for dataset in found}
    for text in recipe.datasets if recipe else ():
        if _PLAIN_NAME.fullmatch(text) and text not in datasets:
            collected.lacks(f"{name}/{text}", "not begun")
    for dataset in sorted(datasets):
        identity = Identity(name, dataset)
        finetuned = _add_scores(collected, identity, experiment, "finetune")
        if dataset in begun.get("probe", ()):
            _add_scores(collected, identity, experiment, "probe")
        _add_curves(collected, identity, experiment, recipe)
        _add_reconstructions(collected, identity, experiment, recipe)
        explained = None
        with collected.tolerating(identity.place):
            explained = _read_maps(collected, identity, experiment, progress)
        older = (collected.gathered / identity.place).glob("block-*")  # what could not be read now may be tomorrow
        collected.blocks += [path for path, _ in explained.gathered.blocks] if explained else older
        if explained:
            append(name, dataset, explained)
            _add_sensitivity(collected, identity, explained, finetuned)
            _add_adversarial(collected, identity, explained)
            _add_metrics(collected, identity, explained)
            _add_panels(collected, identity, explained)


_CLASSIFIERS = {
    "finetune": ("finetuned", "finetuning is not finished, so accuracy and AUC are unknown"),
    "probe": ("probe", "the probe is not finished"),
}
"""Stages that make a classifier: its name in the table of scores, and what is said where there is none."""


def _add_scores(collected: Collected, identity: Identity, experiment: Experiment, stage: str) -> Scored | None:
    classifier, otherwise = _CLASSIFIERS[stage]
    found = None
    with collected.tolerating(identity.place):
        found = read_scored(experiment.stage(stage, identity.dataset) / "done.json")
        if found is None:
            collected.lacks(identity.place, otherwise)
    if found is None:
        return None
    about = {**identity.columns, "title": found.dataset.title, "classifier": classifier}
    for split in SPLITS:
        if split in found.scores:
            row = {**about, "split": split, "images": found.images.get(split)}
            collected.scores.append({**row, **found.scores[split].model_dump()})
    return found


def _add_curves(collected: Collected, identity: Identity, experiment: Experiment, recipe: Recipe | None) -> None:
    stages = {}
    for stage, title in (("pretrain", "Pretraining"), ("finetune", "Finetuning"), ("probe", "Probe")):
        with collected.tolerating(identity.place):
            curves = read_curves(experiment.stage(stage, identity.dataset) / "metrics.jsonl")
            if curves:
                stages[title] = curves
            elif stage == "finetune" or (stage == "pretrain" and _pretrains(recipe)):
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


def _read_maps(
    collected: Collected, identity: Identity, experiment: Experiment, progress: Progress
) -> Explained | None:
    ledger = experiment.ledger(identity.dataset)
    with files.reading(ledger):
        begun = ledger.is_dir()
    if not begun:
        collected.lacks(identity.place, "not explained")
        return None
    store = MapStore.open(experiment.maps(identity.dataset), ledger)
    folder = collected.gathered / identity.place
    shards = store.layout.shards
    told = progress if shards >= MANY_SHARDS else Silent()
    with told.bar(f"reading {identity.place}", shards, images=0) as bar:
        return read_explained(store, folder, collected.reader, partial(collected.lacks, identity.place), bar.advance)


def _generator(identity: Identity, explained: Explained, *words: str) -> np.random.Generator:
    """Draws of one bootstrap."""
    seed = keys.derive(explained.attributes.seed, "report", "bootstrap", identity.dataset, *words)
    return np.random.default_rng(seed)


def _about(identity: Identity, explained: Explained, method: str) -> dict[str, Any]:
    """The columns that begin a row of every table of explanations."""
    attributes = explained.attributes
    return {**identity.columns, "title": attributes.title, "split": attributes.split, "method": method}


def _label(identity: Identity, explained: Explained) -> str:
    """What is said left of a row of a figure."""
    return f"{explained.attributes.title}\n{identity.experiment}"


def _add_sensitivity(collected: Collected, identity: Identity, explained: Explained, finetuned: Scored | None) -> None:
    attributes = explained.attributes
    if finetuned and attributes.classifier and attributes.classifier not in finetuned.files.values():
        collected.lacks(identity.place, "accuracy and AUC: another classifier was explained than is finetuned now")
        finetuned = None
    test = finetuned.scores.get("test", Scores()) if finetuned else Scores()
    finite: dict[str, Column] = {}
    intervals = {}
    for method, scores in explained.scores.items():
        statistics = summarise(scores, explained.flipped, _generator(identity, explained, method))
        row = {
            **_about(identity, explained, method),
            "images": explained.images,
            "of_images": explained.store.layout.images,
            "accuracy": test.accuracy,
            "auc": test.auc,
            **statistics,
        }
        collected.sensitivity.append(row)
        finite[method] = mapped(finite_values, scores.maximum)
        intervals[method] = (statistics["sensitivity_max_ci_low"], statistics["sensitivity_max_ci_high"])
    settings = attributes.explain.sensitivity
    if not settings.drawn:
        field = "samples is 0" if "random" in settings.kinds else "kinds leaves random out"
        collected.lacks(identity.place, f"no sensitivity to random perturbations: explain.sensitivity.{field}")
    elif any(map(count, finite.values())):
        collected.distributions.append(
            Distribution(_label(identity, explained), finite, intervals, attributes.sampling)
        )


def _add_adversarial(collected: Collected, identity: Identity, explained: Explained) -> None:
    for method, scores in explained.scores.items():
        for kind, found in scores.searched.items():
            rng = _generator(identity, explained, method, kind)
            statistics = summarise_search(found, scores, explained.flipped, rng)
            collected.adversarial.append({**_about(identity, explained, method), "kind": kind, **statistics})
    random: dict[str, Column] = {}
    searched: dict[str, Column] = {}
    for method, scores in explained.scores.items():
        if "pgd" not in scores.searched:
            continue
        chance, worst = scores.maximum, scores.searched["pgd"].change
        of_chance, of_worst = mapped(_in_both, chance, worst), mapped(_in_both, worst, chance)
        if count(of_worst):
            random[method], searched[method] = of_chance, of_worst
    if searched:
        label = _label(identity, explained)
        collected.comparisons.append(Comparison(label, random, searched, explained.attributes.ball))


def _in_both(one: Floats, other: Floats) -> Floats:
    """Of the one, where both are finite."""
    return one[np.isfinite(one) & np.isfinite(other)]


def _add_metrics(collected: Collected, identity: Identity, explained: Explained) -> None:
    for metric, part in dict.fromkeys(name for scores in explained.scores.values() for name in scores.metrics):
        for method, scores in explained.scores.items():
            if (metric, part) not in scores.metrics:
                continue
            row = {**_about(identity, explained, method), "metric": metric, "part": part}
            values = scores.metrics[metric, part]
            elements = scores.elements.get((metric, part))
            if elements is None:
                rng = _generator(identity, explained, method, metric, part)
                collected.metrics.append({**row, **summarise_metric(values, rng)})
                continue
            for element in range(elements):
                column = mapped(partial(_element, element), values)
                collected.metrics.append({**row, "element": element, **summarise_metric(column, None)})


def _element(element: int, values: Floats) -> Floats:
    return values[:, element]


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
            "Max sensitivity to random perturbations over images, by method and data set. Data sets compare only at "
            "one image size and one preprocessing: the perturbation's norm grows with the side of the image."
        )
        collected.add_figure("sensitivity", "", caption, lambda: draw_distributions(collected.distributions))
    if collected.comparisons:
        caption = (
            "Random is not adversarial: the largest relative change of the map among random perturbations, and the "
            "largest that projected gradient ascent found in the same ball with the prediction unchanged."
        )
        collected.add_figure("adversarial", "", caption, lambda: draw_comparisons(collected.comparisons))
    sensitivity = tables.sensitivity_table(collected.sensitivity)
    by_image = _add_tables(collected, sensitivity)
    index = out / "index.html"
    html = page.render(collected.sections, collected.pictures, collected.missing, collected.recipes, __version__)
    files.write_text(index, html)
    written = [*collected.tables, *by_image, *collected.files, index]
    settle_earlier(out, written, keep=collected.unread)
    return Summary(rows=sensitivity.data, text=sensitivity.text, files=written, missing=collected.missing)


def _add_tables(collected: Collected, sensitivity: Table) -> list[Path]:
    """Writes the tables; returns those of single images, which are written already."""
    by_image = [IMAGES]
    collected.add_table(
        sensitivity,
        stem="table",
        heading="Sensitivity of explanations",
        caption="How far explanations move under random perturbations: what chance does, not the worst case.",
        columns=tables.SENSITIVITY,
        images=IMAGES,
    )
    if collected.adversarial:
        collected.add_table(
            tables.adversarial_table(collected.adversarial),
            stem="adversarial",
            heading="Adversarial sensitivity",
            caption="How far explanations move under perturbations that were searched for in the same ball, the "
            "prediction unchanged. What is found is a lower bound of the worst case; random perturbations are in the "
            "table above.",
            columns=tables.ADVERSARIAL,
            images=IMAGES,
        )
    if collected.metrics:
        single = any("element" not in row for row in collected.metrics)
        by_image += [IMAGE_METRICS] * single
        collected.add_table(
            tables.metrics_table(collected.metrics),
            stem="metrics",
            heading="Further measures of trust",
            caption="Means over images.",
            columns=tables.METRICS,
            terms=tables.metric_meanings(list(dict.fromkeys(row["metric"] for row in collected.metrics))),
            images=IMAGE_METRICS if single else "",
        )
    collected.add_table(
        tables.scores_table(collected.scores),
        stem="scores",
        heading="Scores of classifiers",
        caption="Of the finetuned classifiers, and of probes.",
        columns=tables.SCORES,
    )
    return [collected.out / name for name in by_image]
