"""One owner of a folder: a lock against a live rival, and attempts that fence a dead one.

    FOLDER/lock                 held (flock) while an owner lives; the kernel frees it when the owner dies
    FOLDER/attempts/0001.json   one file an attempt, created exclusively; the highest number owns the folder

The lock refuses a second run. The attempts serve where no lock reaches (a file system without flock, a process
that outlived its node's failure): a writer asks `still_owner` before it records anything, and an older one is told
to stop. Neither depends on a clock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maehpc import files
from maehpc.errors import InputError, RunError

_ATTEMPT = re.compile(r"([0-9]+)\.json")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Owner:
    """A running attempt's claim on a folder."""

    folder: Path
    attempt: int

    def still_owner(self) -> None:
        """Checks that no newer attempt has begun.

        Raises:
            RunError: a newer attempt owns the folder; this one must not record anything more.
        """
        newest = newest_attempt(self.folder)
        if newest != self.attempt:
            reason = f"attempt {newest} has begun" if newest > self.attempt else "its record is gone"
            raise RunError(f"attempt {self.attempt} no longer owns {self.folder}: {reason}; this process stops")


def newest_attempt(folder: Path) -> int:
    """The highest attempt number recorded in `folder`, 0 where there is none."""
    attempts = folder / "attempts"
    names = [_ATTEMPT.fullmatch(path.name) for path in attempts.iterdir()] if attempts.is_dir() else []
    return max((int(name[1]) for name in names if name), default=0)


def _begin_attempt(folder: Path) -> int:
    attempts = files.make_folder(folder / "attempts")
    record = {"pid": os.getpid(), "host": platform.node(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
    while True:
        number = newest_attempt(folder) + 1
        try:
            with files.writing(attempts), (attempts / f"{number:04d}.json").open("x") as handle:
                json.dump(record, handle)
                handle.flush()
                os.fsync(handle.fileno())
        except RunError as error:
            if isinstance(error.__cause__, FileExistsError):
                continue
            raise
        files.fsync_path(attempts)
        return number


def _flock(path: Path, descriptor: int, operation: int) -> bool:
    """False where another process holds the lock. A file system without locks grants all; the attempts serve there."""
    with files.writing(path):
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return True


@contextmanager
def own(folder: Path) -> Iterator[Owner]:
    """Owns `folder` for the length of the block.

    Raises:
        InputError: another live process owns it.
        RunError: the folder cannot be written.
    """
    files.make_folder(folder)
    path = folder / "lock"
    with _opened(path) as descriptor:
        if not _flock(path, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise InputError(
                f"{folder} is being written by {holder}; wait until it ends, or give this run another --name"
            )
        owner = Owner(folder, _begin_attempt(folder))
        with files.writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield owner


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Waits for the file's lock and holds it for the length of the block, which must be short."""
    with _opened(path) as descriptor:
        _flock(path, descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def shared_use(path: Path, refusal: str, alone: bool) -> Iterator[Callable[[], None]]:
    """Uses what `path` stands for together with others for the length of the block, or alone until the caller shares.

    Args:
        path: the lock's file.
        refusal: the sentence where the use is not granted.
        alone: whether nobody else may use it for now.

    Yields:
        A function that lets others in.

    Raises:
        InputError: others use it and this process wants to be alone, or another is alone with it.
    """
    with _opened(path) as descriptor:
        if not _flock(path, descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB):
            raise InputError(refusal)
        yield lambda: _share(path, descriptor)


def _share(path: Path, descriptor: int) -> None:
    _flock(path, descriptor, fcntl.LOCK_SH)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    with files.writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
