"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from maehpc.errors import RunError

PARTIAL = ".partial-"
"""Every temporary name carries this mark; a leftover with it was never published and may be deleted."""

FLUSHES = 8
"""Files or folders that are flushed side by side, at most."""

_PARTS = 1024
"""Parts of a file that POSIX systems write in one call."""

_PIECE = 1 << 21
"""Bytes of a file that are written, and then hashed while they are in the processor's cache."""

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose a writable folder",
    errno.EACCES: "permission is denied; choose a folder you may write to",
    errno.EPERM: "permission is denied; choose a folder you may write to",
    errno.ENOTDIR: "a file stands where a folder is needed; move it away, or choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; move it away, or choose another folder",
    errno.EISDIR: "a folder stands where a file is needed; move it away and run the same command again",
    errno.EIO: "the device reported an input/output error; check the disk and run the same command again",
}


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def write_error(path: Path, error: OSError) -> RunError:
    """The sentence for an `OSError` met while writing `path`, or what was to become it."""
    if is_partial(path):
        path = path.with_name(path.name[1:].partition(PARTIAL)[0])
    return RunError(f"cannot write {path}: {_reason(error)}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block into a `RunError` about `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block into a `RunError` about `path`, but lets an absent file be told apart.

    Of a remote path whatever went wrong is turned into one: each file system has its own kinds of error.

    Raises:
        FileNotFoundError: the file, or a folder above it, is not there.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, "no such file", str(path)) from error
    except PermissionError as error:
        raise RunError(f"cannot read {path}: permission is denied; make it readable") from error
    except OSError as error:
        raise RunError(f"cannot read {path}: {_reason(error)}") from error
    except Exception as error:
        if isinstance(path, Path):
            raise
        raise RunError(f"cannot read {path}: {type(error).__name__}: {error}") from error


def read_if_there(folder: Path, name: str) -> bytes | None:
    """The bytes of a file in a folder; None where it, or a folder above it, is not there.

    Raises:
        RunError: it cannot be read.
    """
    try:
        if isinstance(folder, Path):  # and no remote place: a store has so many files that making Paths would be felt
            with suppress(OSError), FileIO(f"{folder}/{name}") as handle:
                return handle.read()
        path = folder / name
        with reading(path):
            return path.read_bytes()
    except FileNotFoundError:
        return None


def user_path(text: str) -> Path:
    """The path a user typed, `~` resolved where it names somebody."""
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # no such user, nor can be one: then the folder is called so
        return Path(text)


def partial_name(path: Path) -> Path:
    """A temporary name beside `path`, unique to this call."""
    return path.with_name(f".{path.name}{PARTIAL}{uuid.uuid4().hex}")


def is_partial(path: Path) -> bool:
    """Whether `path` is an unpublished leftover, by its name."""
    return path.name.startswith(".") and PARTIAL in path.name


def remove_partials(folder: Path, below: bool = False) -> None:
    """Deletes unpublished leftovers directly inside `folder`. The caller owns the folder.

    Args:
        folder: nothing is done where there is none.
        below: also inside the folders in it, however deep.

    Raises:
        RunError: one cannot be deleted.
    """
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:  # a store has a hundred thousand files: no Path is made for those that stay
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if PARTIAL in name and is_partial(path := folder / name):
            with writing(path):
                shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
        elif below and is_folder:
            remove_partials(folder / name, below)


def fsync_path(path: Path) -> None:
    """Flushes one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Creates a folder and its parents, durably.

    Raises:
        RunError: it cannot be created.
    """
    with writing(path):
        absent = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in absent:
            fsync_path(folder.parent)
    return path


def publish(partial: Path, path: Path) -> None:
    """Renames a finished, fsynced file or folder to its final name and makes the rename durable.

    A folder cannot replace a folder that holds anything; a file replaces a file.
    """
    with writing(path):
        partial.replace(path)
        fsync_path(path.parent)


def discard_folder(path: Path) -> None:
    """Removes a published folder: at any instant it is whole or gone.

    Raises:
        RunError: it cannot be removed.
    """
    with writing(path):
        gone = partial_name(path)
        path.replace(gone)
        fsync_path(path.parent)
        shutil.rmtree(gone)


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Gives a temporary path to write a file at; publishes it when the block ends well, removes it otherwise.

    Args:
        path: of the file.
        durable: flush it to the disk; without that it may be anything after a loss of power.

    Raises:
        RunError: the disk refused (full, read-only, no permission).
    """
    make_folder(path.parent)
    partial = partial_name(path)
    try:
        with writing(path):
            yield partial
            if durable:
                fsync_path(partial)
            else:
                partial.replace(path)
        if durable:
            publish(partial, path)
    finally:
        with suppress(OSError):  # on a disk that takes no writes; what went wrong first is what the user must hear
            partial.unlink(missing_ok=True)


def write_passing(path: Path, text: str) -> None:
    """Replaces a file whose loss costs nothing, as a heartbeat's: whole, but not flushed to the disk.

    Makes the folder that the file is in and none above, so that what was moved away meanwhile is not begun anew.

    Raises:
        RunError: the disk refused, or there is no folder for that folder.
    """
    partial = partial_name(path)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        try:
            partial.write_text(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_paths(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Gives temporary paths to write files at that belong together; publishes all when the block ends well.

    The block writes each with `write_synced`. All are renamed before any folder is flushed, and the folders are flushed
    side by side: a file system then takes their renames to its journal together.

    Raises:
        RunError: the disk refused (full, read-only, no permission).
    """
    for path in paths:
        make_folder(path.parent)
    partials = [partial_name(path) for path in paths]
    try:
        yield partials
        for partial, path in zip(partials, paths, strict=True):
            with writing(path):
                partial.replace(path)
        with ThreadPoolExecutor(FLUSHES) as pool:
            list(pool.map(_flush_folder, dict.fromkeys(path.parent for path in paths)))
    finally:
        for partial in partials:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    with writing(folder):
        fsync_path(folder)


def write_synced(partial: Path, parts: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """Writes a temporary file from its parts, as they are made, and flushes it to the disk.

    The disk begins with what there is while the rest is made, written and hashed: without being asked, a file system
    begins when the file is flushed.

    Returns:
        The file's SHA-256 (hex), and its bytes.

    Raises:
        RunError: the disk refused.
    """
    digest, size = hashlib.sha256(), 0
    with writing(partial), partial.open("wb", buffering=0) as handle:
        for piece, length in _pieces(parts):
            _write_parts(handle.fileno(), piece)
            os.posix_fadvise(handle.fileno(), size, length, os.POSIX_FADV_DONTNEED)  # begin; this waits for none
            for part in piece:
                digest.update(part)
            size += length
        os.fsync(handle.fileno())
    return digest.hexdigest(), size


def _pieces(parts: Iterable[bytes | memoryview]) -> Iterator[tuple[list[bytes | memoryview], int]]:
    """Parts that one call of the system takes, and their bytes: few, and so long that the call is worth it."""
    piece: list[bytes | memoryview] = []
    size = 0
    for part in parts:
        piece.append(part)
        size += len(part)
        if size >= _PIECE or len(piece) == _PARTS:
            yield piece, size
            piece, size = [], 0
    if piece:
        yield piece, size


def _write_parts(descriptor: int, parts: Sequence[bytes | memoryview]) -> None:
    left = list(parts)
    while left:
        written = os.writev(descriptor, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = memoryview(left[0])[written:]  # a disk that fills up, or more than a call takes


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 text file or nothing."""
    write_bytes(path, text.encode())


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spare blanks: equal values give equal bytes.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_json(path: Path, value: Any) -> None:
    """Writes an indented JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value's canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_bytes(*parts: bytes | memoryview) -> str:
    """SHA-256 (hex) of bytes, given in one or more parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def require_writable(folder: Path) -> None:
    """Fails before any work where `folder` cannot be written.

    Raises:
        RunError: the folder cannot be made or written.
    """
    make_folder(folder)
    probe = folder / f".probe{PARTIAL}{uuid.uuid4().hex}"
    with writing(folder):
        probe.touch()
        probe.unlink(missing_ok=True)  # an owner may tidy it away first
