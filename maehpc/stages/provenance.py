"""What computed an experiment: code, packages, machine, data. Enough to run it again (with recipe.yaml)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import maehpc
from maehpc import files
from maehpc.devices import MOST_THREADS, machine
from maehpc.errors import InputError
from maehpc.shipped import SNAPSHOT_MANIFEST

PACKAGES = (
    *("torch", "torchvision", "timm", "captum", "medmnist", "zarr", "h5py", "numpy", "scipy", "scikit-learn"),
    *("pydantic", "safetensors", "matplotlib", "pandas"),
)


def code_version() -> dict[str, Any]:
    """maehpc's version, and what else tells which code it is.

    Returns:
        `maehpc`, and `commit` with `modified` in a checkout, or `snapshot` in a copy that a job runs (its digest).
    """
    version: dict[str, Any] = {"maehpc": maehpc.__version__}
    checkout = Path(maehpc.__file__).resolve().parent.parent
    manifest = checkout / SNAPSHOT_MANIFEST
    if manifest.is_file():
        return version | {"snapshot": files.digest(json.loads(manifest.read_bytes()))}
    if (checkout / ".git").exists():
        try:
            commit = _git(checkout, "rev-parse", "HEAD")
            version |= {"commit": commit, "modified": bool(_git(checkout, "status", "--porcelain", "maehpc"))}
        except (OSError, subprocess.CalledProcessError):
            pass  # no git here, or a checkout without a commit: the version number stands alone
    return version


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def provenance(command: list[str], device: torch.device, data: dict[str, str]) -> dict[str, Any]:
    """The facts of one run.

    Args:
        command: words after `maehpc`.
        device: what computes.
        data: digest of each data set's pack.
    """
    slurm = {name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if name in os.environ}
    return {
        "command": command,
        "code": code_version(),
        "python": sys.version.split()[0],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "machine": machine(device),
        "data": data,
        "slurm": slurm,
    }


def recorded_runs(path: Path) -> list[dict[str, Any]]:
    """The facts of earlier runs, oldest first.

    Raises:
        InputError: the file is damaged.
        RunError: it may not be read.
    """
    try:
        with files.reading(path):
            record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); restore it, or move it away") from error
    runs = record.get("runs") if isinstance(record, dict) else None
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise InputError(f"{path}: runs is no list of records; restore the file, or move it away")
    return runs


def recorded_threads(path: Path) -> int | None:
    """CPU threads of the experiment's first run: rounding depends on them, so later runs use as many."""
    runs = recorded_runs(path)
    about = runs[0].get("machine") if runs else None
    threads = about.get("threads") if isinstance(about, dict) else None
    return threads if type(threads) is int and 0 < threads <= MOST_THREADS else None


def record(path: Path, facts: dict[str, Any]) -> None:
    """Appends a run's facts to provenance.json. The same facts twice in a row are one entry."""
    runs = recorded_runs(path)
    if not runs or runs[-1] != facts:
        files.write_json(path, {"runs": [*runs, facts]})
