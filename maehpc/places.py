"""Where results are read from: a folder here, or any that fsspec reaches (`s3://bucket/results`, `https://…`)."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from maehpc.errors import InputError


def place(text: str) -> Path:
    """A path, or what reads like one of a remote file system.

    Args:
        text: a path, or PROTOCOL://…; what the protocol needs to be told (keys, endpoints) is taken from fsspec's own
            settings and variables.

    Raises:
        InputError: the protocol is unknown, or a package that it needs is not installed.
    """
    if "://" not in text:
        return Path(text)
    from fsspec import get_filesystem_class
    from upath import UPath

    protocol = text.partition("://")[0]
    try:
        get_filesystem_class(protocol)  # imports the package that it needs
        found = UPath(text)
    except ImportError as error:
        raise InputError(f"{text}: {protocol} needs a package that is not installed ({error})") from error
    except ValueError as error:
        raise InputError(f"{text}: fsspec knows no {protocol}:// ({error}); check the address") from error
    return cast(Path, found)  # the same methods, though no subclass


def is_remote(path: Path) -> bool:
    """Whether a path of `place` is reached through fsspec, where each look at a file is a request."""
    return not isinstance(path, Path)
