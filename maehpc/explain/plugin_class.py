"""From a method's or metric's name to its class: a file's name is the plugin's."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from maehpc.recipes.plugins import Folder


def plugin_class(folder: Folder, name: str, base: type) -> Any:
    """The one class in a plugin's file that derives from `base` and is not abstract.

    Args:
        folder: of the plugin.
        name: one that `maehpc.recipes.plugins.names` lists.
        base: of all plugins in the folder.
    """
    module = importlib.import_module(f"maehpc.explain.{folder}.{name.replace('-', '_')}")
    (found,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    )
    return found
