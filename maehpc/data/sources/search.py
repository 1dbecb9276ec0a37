"""Where source files are looked for."""

from __future__ import annotations

import os
from pathlib import Path

from maehpc import files
from maehpc.errors import InputError

VARIABLE = "MAEHPC_DATA"


def cache_folder() -> Path:
    """MedMNIST's own cache, which also takes what `fetch` downloads."""
    return Path.home() / ".medmnist"


def search_folders() -> list[Path]:
    """$MAEHPC_DATA, its subfolders by name, then MedMNIST's cache.

    Raises:
        InputError: MAEHPC_DATA names no folder.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return [cache_folder()]
    root = files.user_path(given)
    if not root.is_dir():
        raise InputError(f"{VARIABLE} names {root}, which is not a folder; set it to the folder of your data")
    return [root, *sorted(path for path in root.iterdir() if path.is_dir()), cache_folder()]


def find(name: str) -> Path | None:
    """The first file or folder called `name` in the search folders, None where there is none."""
    return next((path for folder in search_folders() if (path := folder / name).exists()), None)


def absent(name: str, dataset: str, size: int) -> InputError:
    """The sentence for a catalogue set whose file is nowhere."""
    given = os.environ.get(VARIABLE)
    folder = Path(given) if given else cache_folder()
    alternative = "" if given else f", or set {VARIABLE} to the folder that holds it"
    option = "" if size in (28, 32) else f" --size {size}"
    return InputError(
        f"{dataset} needs {name}, which was not found: put it into {folder}{alternative}, or run "
        f"`maehpc data fetch {dataset}{option}` where there is network"
    )
