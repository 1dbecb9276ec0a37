"""From a method's name to its class: a file's name is the method's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from maehpc.errors import InputError
from maehpc.explain.methods.base import Method, Options, Setup
from maehpc.explain.plugin_class import plugin_class


def method_class(name: str) -> type[Method]:
    """The class of the method of that name.

    Args:
        name: one of `maehpc.recipes.METHODS`.
    """
    found: type[Method] = plugin_class("methods", name, Method)
    found.name = name
    return found


def make_methods(setup: Setup) -> dict[str, Method]:
    """The settings' methods, in their order.

    Raises:
        InputError: a method's options are wrong, or it does not fit the classifier.
    """
    settings = setup.settings
    for name in settings.options:
        if name not in (*settings.methods, *settings.metrics):
            raise InputError(
                f"explain.options.{name}: {name} is none of explain.methods and explain.metrics; add it there, or "
                f"leave this out"
            )
    methods = {}
    for name in settings.methods:
        kind = method_class(name)
        methods[name] = kind(setup, read_options(kind.Options, name, settings.options))
    return methods


def read_options(kind: type[Options], name: str, given: Mapping[str, Mapping[str, Any]]) -> Options:
    """What `explain.options` says of one method or metric.

    Args:
        kind: the class of its options.
        name: of the method or metric.
        given: all of `explain.options`.

    Raises:
        InputError: an option is unknown or out of range.
    """
    try:
        return kind(**given.get(name, {}))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        known = ", ".join(kind.model_fields) or "none"
        raise InputError(
            f"explain.options.{name}.{field}: {first['msg'].lower()} (options of {name}: {known})"
        ) from error
