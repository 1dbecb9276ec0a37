"""Reading recipes: YAML files that may include others, and overrides from the command line.

A recipe file holds any part of a `Recipe` and is laid over the defaults. The key `include` names recipes to start from,
merged in order, the file's own keys last. Names without a suffix are looked up in jobs/ (`pretrain/vit-base`), anything
else is a path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from maehpc import files
from maehpc.errors import InputError
from maehpc.places import is_remote
from maehpc.recipes.settings import Recipe
from maehpc.shipped import shipped_folder

SUFFIXES = (".yaml", ".yml")
RIVALS = {"lr": "base_lr", "base_lr": "lr"}
"""Settings of which one alone may be given: a later one takes the place of the earlier."""

SECTIONS = frozenset(Recipe.model_fields)


def list_recipes() -> list[str]:
    """Names of the shipped recipes, such as `pretrain/vit-base`."""
    jobs = shipped_folder("jobs")
    return sorted(path.relative_to(jobs).with_suffix("").as_posix() for path in jobs.rglob("*.yaml"))


def _locate(name: str, beside: Path | None) -> Path:
    if name.endswith(SUFFIXES):
        path = files.user_path(name)
        if not path.is_absolute() and beside is not None:
            path = beside.parent / path
        if not path.is_file():
            raise InputError(f"recipe {path} does not exist; give a YAML file or one of {', '.join(list_recipes())}")
        return path
    if name not in list_recipes():
        raise InputError(f"there is no recipe '{name}'; choose one of {', '.join(list_recipes())} or give a .yaml file")
    return shipped_folder("jobs") / f"{name}.yaml"


def _merged(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, rival in RIVALS.items():
        if update.get(key) is not None and rival not in update:
            result[rival] = None
    for key, value in update.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def parse_yaml(text: str, origin: str) -> Any:
    """A YAML value; nothing in it is executed.

    Raises:
        InputError: the text is not YAML, or holds a value that YAML's own types refuse (a 13th month).
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{origin} is not YAML: {' '.join(str(error).split())}; mend that value") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror or error}; make it readable") from error
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {path} is not text in UTF-8 ({error}); write it anew") from error
    value = parse_yaml(text, f"recipe {path}")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"recipe {path} must hold a mapping of settings, not {type(value).__name__}")
    return value


def _resolve_includes(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve()
    if path in chain:
        raise InputError(f"recipe {path} includes itself; remove it from include")
    mapping = _read_mapping(path)
    includes = mapping.pop("include", [])
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise InputError(f"recipe {path}: include must be a list of recipe names")
    result: dict[str, Any] = {}
    for name in includes:
        result = _merged(result, _resolve_includes(_locate(name, path), (*chain, path)))
    return _merged(result, mapping)


def _override_path(key: str, stage: str | None) -> list[str]:
    words = key.split(".")
    if words[0] in SECTIONS:
        return words
    if stage in SECTIONS:
        return [stage, *words]
    raise InputError(f"--set {key}: begin with one of {', '.join(sorted(SECTIONS))}, for example finetune.optim.lr")


def _parse_overrides(overrides: Iterable[str], stage: str | None) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set {text}: write KEY=VALUE, for example optim.lr=1e-3")
        value = parse_yaml(raw, f"--set {key}")
        for word in reversed(_override_path(key, stage)):
            value = {word: value}
        result = _merged(result, value)
    return result


def _sets(layer: Mapping[str, Any], field: Sequence[int | str]) -> bool:
    """Whether a value stands in a layer itself; of a whole section nobody can tell who set it."""
    value: Any = layer
    for part in field:
        if not isinstance(value, Mapping):
            return True  # within a list
        if part not in value:
            return False
        value = value[part]
    return not isinstance(value, Mapping)


def _validated(
    mapping: Mapping[str, Any], origin: str, layers: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """The recipe of a mapping.

    Args:
        mapping: all settings.
        origin: where they are from, for the sentence of an error.
        layers: where some are from that were laid over it, in the order of which the last wins.

    Raises:
        InputError: a key or a value is wrong.
    """
    try:
        return Recipe.model_validate(mapping)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        places = list((layers or {}).items())[::-1]
        blamed = [(each, name) for each in wrong for name, layer in places if _sets(layer, each["loc"])]
        first, origin = blamed[0] if blamed else (wrong[0], origin)
        field = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "extra_forbidden":
            problem = f"there is no setting {field}; see `maehpc recipe schema` for those that exist"
        else:
            message = first["msg"].removeprefix("Value error, ")
            given = "" if isinstance(first["input"], (dict, Recipe)) else f", not {first['input']!r}"
            problem = f"{field}: {message[:1].lower() + message[1:]}{given}"
        raise InputError(f"{origin}: {problem}") from error


def load_recipe(
    name: str | None = None,
    overrides: Iterable[str] = (),
    stage: str | None = None,
    settings: Mapping[str, Any] | None = None,
    base: Recipe | None = None,
) -> Recipe:
    """A recipe by name or path, laid over a base, with overrides applied.

    Args:
        name: a shipped recipe (`pipeline/demo`), a path that ends in .yaml, or None for the base alone.
        overrides: `key=value` texts; a key is looked up in the whole recipe, or else within `stage`. They win.
        stage: the stage being run, if one.
        settings: nested settings that come after the file and before the overrides.
        base: what the file is laid over; the defaults where None.

    Raises:
        InputError: the file, a key or a value is wrong.
    """
    mapping: dict[str, Any] = (base or Recipe()).model_dump()
    if name is not None:
        mapping = _merged(mapping, _resolve_includes(_locate(name, None)))
    own = "recipe (defaults)" if base is None else "the experiment's recipe"
    typed = {"the command line": settings or {}, "--set": _parse_overrides(overrides, stage)}
    for layer in typed.values():
        mapping = _merged(mapping, layer)
    return _validated(mapping, own if name is None else f"recipe {name}", typed)


def read_recipe(path: Path) -> Recipe:
    """The resolved recipe an experiment wrote.

    Args:
        path: here, or remote (`maehpc.places`), where it may include no others.

    Raises:
        InputError: the file is missing or does not hold a recipe.
    """
    mapping = _read_mapping(path) if is_remote(path) else _resolve_includes(_locate(str(path), None))
    return _validated(mapping, f"recipe {path}")


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
