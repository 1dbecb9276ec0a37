"""Attribution methods and metrics by name, and what their files say of them.

A file `smoothgrad.py` in `maehpc/explain/methods` is the method `smoothgrad`. Nothing is imported, since recipes,
estimates and reports are read where PyTorch would take seconds: the literal class attributes are read from the text.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any, Literal

Folder = Literal["methods", "metrics"]

_INFRASTRUCTURE = {"__init__", "base", "registry"}


def _folder(folder: Folder) -> Path:
    return Path(__file__).parents[1] / "explain" / folder


def names(folder: Folder) -> tuple[str, ...]:
    """Names of the plugins in a folder of `maehpc/explain`, sorted."""
    stems = (file.stem for file in _folder(folder).glob("*.py"))
    return tuple(sorted(stem.replace("_", "-") for stem in stems if stem not in _INFRASTRUCTURE))


@cache
def facts(folder: Folder, name: str) -> dict[str, Any]:
    """The literal class attributes of a plugin, by name; what a base class says is not among them.

    Args:
        folder: of the plugin.
        name: of the plugin; one that is not there has no facts.
    """
    path = _folder(folder) / f"{name.replace('-', '_')}.py"
    if name not in names(folder):
        return {}
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found.update(_literals(node))
    return found


def _literals(node: ast.ClassDef) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for statement in node.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        value: ast.expr = statement.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "frozenset":
            value = value.args[0] if value.args else ast.Set(elts=[])
        try:
            found[statement.targets[0].id] = ast.literal_eval(value)
        except ValueError:
            continue
    return found


METHODS = names("methods")
"""Every attribution method."""

METRICS = names("metrics")
"""Every measure of trust beside sensitivity."""
