"""The recipe that an experiment was begun with; read here, so that a client can tell it without any heavy library."""

from __future__ import annotations

from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.recipes.load import read_recipe
from maehpc.recipes.settings import Recipe

_RESULTS = ("pretrain", "finetune", "probe", "ledger", "maps")
"""Folders of an experiment that hold results."""


def begun_recipe(experiment: Experiment) -> Recipe | None:
    """The recipe an experiment was begun with, or None where it is new.

    Raises:
        InputError: it cannot be read, or there are results without one.
    """
    if experiment.recipe.is_file():
        return read_recipe(experiment.recipe)
    for folder in _RESULTS:
        if (experiment.root / folder).is_dir():
            raise InputError(f"{experiment.root} holds results but no recipe.yaml; restore it, or give another --name")
    return None
