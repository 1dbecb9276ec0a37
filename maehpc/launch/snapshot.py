"""The code that was submitted is the code that runs: copies of it by content, shared by all jobs of the same code.

    results/.code/1f0c…/            named after the digest of its files; read-only
      maehpc/ jobs/ cluster/        so that recipes and profiles are found as in a checkout
      files.json                    SHA-256 of every file

A job's record names the folder and the whole digest; every rank compares them before it imports anything that counts.
"""

from __future__ import annotations

import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import maehpc
from maehpc import files
from maehpc.errors import RunError
from maehpc.shipped import SNAPSHOT_MANIFEST, shipped_folder

FOLDER = ".code"
_PACKAGE = Path(maehpc.__file__).resolve().parent
_SUFFIXES = (".yaml", ".yml", ".json")
_FLUSHERS = 16
"""Files that are flushed at once: a disk answers many flushes together in the time of a few."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code.

    Attributes:
        path: its folder, absolute.
        digest: SHA-256 over names and contents.
        new: whether this call made it.
    """

    path: Path
    digest: str
    new: bool = False


def _sources() -> dict[str, Path]:
    """What a job may import or read, by its name in the snapshot."""
    found = {
        f"maehpc/{path.relative_to(_PACKAGE).as_posix()}": path
        for path in _PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not files.is_partial(path)
    }
    for name in ("jobs", "cluster"):
        folder = shipped_folder(name)
        if folder.is_relative_to(_PACKAGE):
            continue  # an installed wheel: they are in the package
        pattern = "**/*" if name == "jobs" else "*"  # below cluster/ stands the mini cluster, no part of a job
        for path in folder.glob(pattern):
            if path.is_file() and path.suffix in _SUFFIXES:
                found[f"{name}/{path.relative_to(folder).as_posix()}"] = path
    return found


def _contents() -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in sorted(_sources().items())}


def _manifest(contents: dict[str, bytes]) -> dict[str, str]:
    return {name: files.sha256_bytes(data) for name, data in contents.items()}


def _folder(results: Path, digest: str) -> Path:
    return results.absolute() / FOLDER / digest[:16]


def current_snapshot(results: Path) -> Snapshot:
    """The snapshot that the code of this process would have in a results folder; nothing is written."""
    digest = files.digest(_manifest(_contents()))
    return Snapshot(_folder(results, digest), digest)


def take_snapshot(results: Path) -> Snapshot:
    """Copies the code of this process into a results folder, unless the same code lies there already.

    Raises:
        RunError: it cannot be written.
    """
    contents = _contents()
    manifest = _manifest(contents)
    digest = files.digest(manifest)
    path = _folder(results, digest)
    if path.is_dir():
        try:
            verify_snapshot(path, digest)
            return Snapshot(path, digest)
        except RunError:
            _remove(path)  # damaged; what runs from it has loaded its code, and what starts gets a whole one
    partial = files.partial_name(path)
    files.make_folder(path.parent)
    try:
        with files.writing(path):
            _write(partial, contents | {SNAPSHOT_MANIFEST: json.dumps(manifest, indent=1).encode()})
        files.publish(partial, path)
    except RunError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        verify_snapshot(path, digest)  # another client was faster
        return Snapshot(path, digest)
    finally:
        if partial.exists():
            with suppress(OSError):
                _delete(partial)
    return Snapshot(path, digest, new=True)


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes and flushes a folder that nobody may change; the folder itself stays writable until it has its name."""
    folders = {folder}
    for name in contents:
        parents = [folder / parent for parent in Path(name).parents]
        folders.update(parents)
    for path in sorted(folders):
        path.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        target = folder / name
        target.write_bytes(data)
        target.chmod(0o444)
    with ThreadPoolExecutor(_FLUSHERS) as pool:
        for _ in pool.map(files.fsync_path, [*(folder / name for name in contents), *folders]):
            pass
    for path in folders:
        path.chmod(0o555)


def _delete(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def _remove(path: Path) -> None:
    with files.writing(path):
        gone = files.partial_name(path)
        path.replace(gone)
        _delete(gone)


def discard_snapshot(snapshot: Snapshot) -> None:
    """Takes back a snapshot that this process made and nobody uses.

    Raises:
        RunError: it cannot be removed.
    """
    if snapshot.new and snapshot.path.is_dir():
        _remove(snapshot.path)
        with suppress(OSError):
            snapshot.path.parent.rmdir()


def verify_snapshot(path: Path, digest: str) -> None:
    """Compares a snapshot with the digest that a job's record holds.

    Args:
        path: its folder.
        digest: SHA-256 over names and contents.

    Raises:
        RunError: a file is missing, changed or added; the sentence names the first.
    """
    advice = "submit the job again"
    try:
        manifest = json.loads((path / SNAPSHOT_MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path / SNAPSHOT_MANIFEST} cannot be read: the snapshot of the code is damaged; {advice}"
        ) from error
    if not isinstance(manifest, dict) or files.digest(manifest) != digest:
        raise RunError(f"{path / SNAPSHOT_MANIFEST} was changed since the job was submitted; {advice}")
    for name, expected in manifest.items():
        try:
            found = files.sha256_file(path / name)
        except OSError as error:
            raise RunError(f"{path / name} cannot be read: the snapshot of the code is damaged; {advice}") from error
        if found != expected:
            raise RunError(f"{path / name} was changed since the job was submitted; {advice}")
    for found_path in sorted(path.rglob("*.py")):
        if found_path.relative_to(path).as_posix() not in manifest:
            raise RunError(f"{found_path} was added since the job was submitted; remove it, or {advice}")
