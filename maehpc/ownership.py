"""One owner of a folder: a lock against a live rival, and attempts that fence a dead one.

    FOLDER/lock                 held (flock) while an owner lives; the kernel frees it when the owner dies
    FOLDER/attempts/0001.json   one file an attempt, created exclusively; the highest number owns the folder

The lock refuses a second run. The attempts serve where no lock reaches (a file system without flock, a process
that outlived its node's failure): a writer asks `still_owner` before it records anything, and an older one is told
to stop. Neither depends on a clock.

A job that the scheduler starts again may find its own earlier start still alive, on a host that was given up. Both
carry the job's identity, so the later one fences the earlier one and goes on instead of being refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maehpc import files
from maehpc.errors import InputError, RunError

PATIENCE_S = 60.0
"""Seconds that a lock is waited for whose holder is about to let go."""
_LOOK_EVERY_S = 0.1
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


def _identity_of_newest(folder: Path) -> str | None:
    path = folder / "attempts" / f"{newest_attempt(folder):04d}.json"
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):  # not there, or not whole: nobody can be said to be the same
        return None
    identity = record.get("identity") if isinstance(record, dict) else None
    return identity if isinstance(identity, str) else None


def _begin_attempt(folder: Path, identity: str | None) -> int:
    attempts = files.make_folder(folder / "attempts")
    record = {
        "pid": os.getpid(),
        "host": platform.node(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "identity": identity,
    }
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


def _flock_soon(path: Path, descriptor: int, operation: int, patience_s: float) -> bool:
    """Waits for a lock, but not for ever: its holder may be a process that nobody can reach any more."""
    deadline = time.monotonic() + patience_s
    while not _flock(path, descriptor, operation | fcntl.LOCK_NB):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


@contextmanager
def own(folder: Path, identity: str | None = None, patience_s: float = PATIENCE_S) -> Iterator[Owner]:
    """Owns `folder` for the length of the block.

    Args:
        folder: made where it does not exist.
        identity: names a job that may be started several times. Where an earlier start of it still holds the folder,
            this one takes over: it fences that one, waits for its lock, and goes on without it in the end.
        patience_s: seconds of that wait.

    Raises:
        InputError: another live process owns it.
        RunError: the folder cannot be written.
    """
    files.make_folder(folder)
    path = folder / "lock"
    with _opened(path) as descriptor:
        if _flock(path, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            owner = Owner(folder, _begin_attempt(folder, identity))
        elif identity is not None and _identity_of_newest(folder) == identity:
            owner = Owner(folder, _begin_attempt(folder, identity))
            _flock_soon(path, descriptor, fcntl.LOCK_EX, patience_s)
            owner.still_owner()
        else:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise InputError(
                f"{folder} is being written by {holder}; wait until it ends, or give this run another --name"
            )
        with files.writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield owner


@contextmanager
def turn(path: Path, patience_s: float = 10 * PATIENCE_S) -> Iterator[None]:
    """Waits for the file's lock and holds it for the length of the block, which must be short.

    Args:
        path: the lock's file.
        patience_s: seconds of the wait.

    Raises:
        RunError: another process held it all the time.
    """
    with _opened(path) as descriptor:
        if not _flock_soon(path, descriptor, fcntl.LOCK_EX, patience_s):
            raise RunError(
                f"{path} has been held by another process for {patience_s:.0f} s; end that process, then run the same "
                f"command again"
            )
        yield


@contextmanager
def shared_use(path: Path, refusal: str, alone: bool, patience_s: float = 0.0) -> Iterator[Callable[[], None]]:
    """Uses what `path` stands for together with others for the length of the block, or alone until the caller shares.

    Args:
        path: the lock's file.
        refusal: the sentence where the use is not granted.
        alone: whether nobody else may use it for now.
        patience_s: seconds to wait for others who may be about to end.

    Yields:
        A function that lets others in.

    Raises:
        InputError: others use it and this process wants to be alone, or another is alone with it.
    """
    with _opened(path) as descriptor:
        if not _flock_soon(path, descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, patience_s):
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
