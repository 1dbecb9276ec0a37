"""Where the files that ship with maehpc lie: jobs/ and cluster/, in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

SNAPSHOT_MANIFEST = "files.json"
"""Stands beside the package in a copy of the code that jobs run: the SHA-256 of every file."""

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder `jobs` or `cluster`: inside the package when installed, beside it in a checkout."""
    installed = _PACKAGE / "_shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
