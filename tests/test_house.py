"""The house of ARCHITECTURE.md holds: nothing below imports what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import maehpc

PACKAGE = Path(maehpc.__file__).parent
FOUNDATION = {
    *("errors", "files", "keys", "ownership", "interruption", "experiment", "overlooked", "memory"),
    *("shipped", "progress", "devices", "addresses", "places", "catalogue", "upstream"),
}
MAY_IMPORT = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "recipes": FOUNDATION,
    "data": FOUNDATION | {"recipes"},
    "models": FOUNDATION | {"recipes"},
    "training": FOUNDATION | {"recipes", "data", "models"},
    "explain": FOUNDATION | {"recipes", "data", "models"},
    "maps": FOUNDATION | {"recipes"},
    "pool": FOUNDATION,
    "report": FOUNDATION | {"recipes", "maps"},
    "stages": FOUNDATION | {"recipes", "data", "models", "training", "explain", "maps", "pool"},
    "launch": FOUNDATION | {"recipes", "training", "pool", "stages", "report"},
    "bench": FOUNDATION
    | {"recipes", "data", "models", "training", "explain", "maps", "pool", "report", "stages", "launch"},
    "cli": FOUNDATION
    | {"recipes", "data", "models", "training", "explain", "maps", "pool", "report", "stages", "launch", "bench"},
}


def imported(path: Path) -> set[str]:
    """Parts of maehpc that a module imports anywhere in its text, `if TYPE_CHECKING` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "maehpc" else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("maehpc.")}
    return found - {"__version__"}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_what_stands_below(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported(path) - {part} <= MAY_IMPORT[part]


def test_the_foundation_has_no_circle() -> None:
    graph = {name: imported(PACKAGE / f"{name}.py") & FOUNDATION for name in FOUNDATION}
    while graph:
        leaves = {name for name, below in graph.items() if not below & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}
