"""Paths on the command line."""

from __future__ import annotations

import os
from typing import Any

import click


class GivenPath(click.Path):
    """A path that is not empty: of a shell's variable that is not set, the working folder would be made."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, as click has it."""
        if not os.fspath(value):
            self.fail("the path is empty; give one.", param, ctx)
        return super().convert(value, param, ctx)
