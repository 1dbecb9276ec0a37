"""Stages by name, and all of them in a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from maehpc.stages.context import Context
from maehpc.stages.explain import explain
from maehpc.stages.finetune import finetune
from maehpc.stages.fleet import Fleet
from maehpc.stages.pooled import Records, explain_pooled
from maehpc.stages.pretrain import pretrain
from maehpc.stages.probe import probe

Stage = Callable[[Context, str], dict[str, Any]]

STAGES: dict[str, Stage] = {"pretrain": pretrain, "finetune": finetune, "probe": probe, "explain": explain}


def stages_of(name: str, weights: str) -> list[str]:
    """The stages that `run NAME` goes through; pretraining only where the recipe starts from its weights."""
    if name != "pipeline":
        return [name]
    return ["pretrain", "finetune", "explain"] if weights == "pretrain" else ["finetune", "explain"]


def run_stages(contexts: Sequence[Context], names: list[str], fleet: Fleet | None = None) -> list[Records]:
    """Runs stages for each data set of each experiment in turn; what is done already is found, not computed again.

    Args:
        contexts: of the experiments.
        names: of the stages, in order.
        fleet: of workers that take the shards of all data sets at once, at the end; None where this process explains.

    Returns:
        The last stage's record for each data set, of each experiment.
    """
    results: list[Records] = []
    alone = [name for name in names if fleet is None or name != "explain"]
    for context in contexts:
        results.append({})
        for dataset in context.recipe.datasets:
            for name in alone:
                results[-1][dataset] = STAGES[name](context, dataset)
    return results if fleet is None or alone == names else explain_pooled(contexts, fleet)
