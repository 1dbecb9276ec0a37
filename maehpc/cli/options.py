"""Options that several commands share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from maehpc.cli.paths import GivenPath

Function = TypeVar("Function", bound=Callable[..., Any])


def results_option(function: Function) -> Function:
    """Where experiments lie."""
    return click.option(
        "--results",
        type=GivenPath(path_type=Path),
        default=Path("results"),
        show_default=True,
        help="Folder of experiments.",
    )(function)


def packs_option(function: Function) -> Function:
    """Where packed data sets lie."""
    return click.option(
        "--packs",
        type=GivenPath(path_type=Path),
        envvar="MAEHPC_PACKS",
        help="Folder of packed data sets.  [default: RESULTS/packs]",
    )(function)


def metrics_port_option(function: Function) -> Function:
    """Whether Prometheus can see how far explaining is."""
    return click.option(
        "--metrics-port",
        type=click.IntRange(0, 65535),
        help="Serve metrics of explaining to Prometheus on this port; 0: on one that is free.  [default: none]",
    )(function)


def dashboard_port_option(function: Function) -> Function:
    """Whether Ray shows its dashboard."""
    return click.option(
        "--dashboard-port",
        type=click.IntRange(0, 65535),
        help="Let a pool's Ray show its dashboard on this port of its host's 127.0.0.1; 0: on one that is free.  "
        "[default: none]",
    )(function)


def verbosity_options(function: Function) -> Function:
    """How much is said."""
    function = click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and results.")(function)
    return click.option("-v", "--verbose", is_flag=True, help="Also show the libraries' log messages.")(function)


def json_option(function: Function) -> Function:
    """Results for scripts."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(function)


def set_verbosity(verbose: bool) -> None:
    """Lets the libraries speak, or not."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")


def separated(text: str) -> tuple[str, ...]:
    """Words with commas between."""
    return tuple(word.strip() for word in text.split(","))


def complete_recipe(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of shipped recipes that begin with what is typed."""
    from maehpc.recipes import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


def _last_word(words: list[str], incomplete: str) -> list[str]:
    """Completions of the last of several words with commas between."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + word for word in words if word.startswith(last)]


def complete_profile(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of shipped profiles."""
    from maehpc.launch.profile import list_profiles

    return [name for name in list_profiles() if name.startswith(incomplete)]


def complete_method(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Attribution methods."""
    from maehpc.recipes.plugins import METHODS

    return _last_word(list(METHODS), incomplete)


def complete_metric(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Measures of trust."""
    from maehpc.recipes.plugins import METRICS

    return _last_word(list(METRICS), incomplete)


def complete_kind(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Kinds of sensitivity."""
    from maehpc.recipes.settings import SEARCHES

    return _last_word(["random", *SEARCHES], incomplete)


def complete_dataset(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of the catalogue."""
    from maehpc.catalogue import catalogue

    return _last_word([*catalogue(), "all"], incomplete)


def complete_mapped(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Data sets that are explained in the experiment at PATH, where that is typed already."""
    from maehpc.experiment import Experiment

    # click leaves the words it has not yet given a meaning to where the last option still lacks its value
    path = next(iter([*filter(None, [ctx.params.get("path")]), *ctx.args]), None)
    return _last_word(Experiment(Path(path)).mapped_datasets() if path else [], incomplete)
