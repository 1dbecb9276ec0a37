from __future__ import annotations

import errno
import fcntl
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from maehpc import ownership
from maehpc.errors import InputError, RunError
from maehpc.ownership import newest_attempt, own, shared_use, turn

SPAWN = multiprocessing.get_context("spawn")


def _hold(folder: Path, pipe: Connection) -> None:
    with own(folder) as owner:
        pipe.send(owner.attempt)
        pipe.recv()


def _race(folder: Path, pipe: Connection) -> None:
    pipe.recv()
    try:
        with own(folder) as owner:
            pipe.send(owner.attempt)
            pipe.recv()
    except InputError:
        pipe.send(None)


def test_attempts_count_up_and_the_newest_owns(tmp_path: Path) -> None:
    folder = tmp_path / "new/ledger"
    assert newest_attempt(folder) == 0
    for attempt in (1, 2, 3):
        with own(folder) as owner:
            assert owner.attempt == newest_attempt(folder) == attempt
            owner.still_owner()


def test_an_older_attempt_is_told_to_stop(tmp_path: Path) -> None:
    with own(tmp_path) as old:
        (tmp_path / "lock").unlink()
        with own(tmp_path) as new:
            new.still_owner()
            with pytest.raises(RunError, match=f"attempt 1 no longer owns {tmp_path}: attempt 2 has begun"):
                old.still_owner()
        with pytest.raises(RunError):
            old.still_owner()


def test_an_attempt_whose_folder_is_gone_is_told_to_stop(tmp_path: Path) -> None:
    with own(tmp_path) as owner:
        (tmp_path / "attempts/0001.json").unlink()
        with pytest.raises(RunError, match="its record is gone"):
            owner.still_owner()


def test_numbers_not_names_are_ordered(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    for name in ("0009.json", "9999.json", "10000.json", "2x.json", "20000.json.old", "30000"):
        (tmp_path / "attempts" / name).touch()
    assert newest_attempt(tmp_path) == 10000
    with own(tmp_path) as owner:
        assert owner.attempt == 10001


def test_a_second_owner_is_refused_until_the_first_ends_or_dies(tmp_path: Path) -> None:
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=_hold, args=(tmp_path, theirs))
    child.start()
    assert ours.recv() == 1
    with pytest.raises(InputError) as error, own(tmp_path):
        raise AssertionError("two owners")
    assert f"process {child.pid} on " in str(error.value) and "another --name" in str(error.value)
    assert newest_attempt(tmp_path) == 1
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with own(tmp_path) as owner:
        assert owner.attempt == 2


def test_a_refusal_in_the_same_process(tmp_path: Path) -> None:
    with own(tmp_path) as owner, pytest.raises(InputError), own(tmp_path):
        raise AssertionError("two owners")
    assert owner.attempt == newest_attempt(tmp_path) == 1


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    pipes, children = [], []
    for _ in range(4):
        ours, theirs = SPAWN.Pipe()
        children.append(SPAWN.Process(target=_race, args=(tmp_path, theirs)))
        children[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.send("go")
    attempts = [pipe.recv() for pipe in pipes]
    assert sorted(attempts, key=str) == [1, None, None, None]
    pipes[attempts.index(1)].send("end")
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="a file stands where a folder is needed"), own(tmp_path / "file/ledger"):
        raise AssertionError("owned")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_attempts_alone_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(number, "no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with own(tmp_path) as old, own(tmp_path) as new:
        new.still_owner()
        with pytest.raises(RunError, match="attempt 2 has begun"):
            old.still_owner()


def test_a_lock_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(RunError, match="input/output error"), own(tmp_path):
        raise AssertionError("owned")


def _hold_as(folder: Path, identity: str, pipe: Connection) -> None:
    with own(folder, identity) as owner:
        pipe.send(owner.attempt)
        pipe.recv()
        try:
            owner.still_owner()
        except RunError as error:
            pipe.send(str(error))
        pipe.recv()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[SpawnProcess, Connection]]:
    """A live process that owns the folder as the job `one`."""
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=_hold_as, args=(tmp_path, "one", theirs))
    child.start()
    assert ours.recv() == 1
    yield child, ours
    child.kill()
    child.join()


def test_a_later_start_of_the_same_job_fences_the_earlier_and_goes_on(
    tmp_path: Path, holder: tuple[SpawnProcess, Connection]
) -> None:
    _, pipe = holder
    begun = time.monotonic()
    with own(tmp_path, "one", patience_s=0.3) as owner:
        assert 0.3 <= time.monotonic() - begun < ownership.PATIENCE_S
        assert owner.attempt == 2
        pipe.send("look")
        assert "attempt 1 no longer owns" in pipe.recv()
        with pytest.raises(InputError, match="is being written by"), own(tmp_path, "another"):
            raise AssertionError("two owners")
        owner.still_owner()


def test_a_later_start_takes_the_lock_as_soon_as_the_earlier_lets_go(
    tmp_path: Path, holder: tuple[SpawnProcess, Connection]
) -> None:
    child, _ = holder
    threading.Timer(0.5, child.kill).start()
    begun = time.monotonic()
    with own(tmp_path, "one", patience_s=30) as owner:
        assert time.monotonic() - begun < 20
        with pytest.raises(InputError), own(tmp_path):
            raise AssertionError("the lock is not held")
        owner.still_owner()


@pytest.mark.parametrize("identity", [None, "another"])
def test_another_run_is_refused_and_fences_nobody(
    tmp_path: Path, holder: tuple[SpawnProcess, Connection], identity: str | None
) -> None:
    with pytest.raises(InputError, match="is being written by"), own(tmp_path, identity, patience_s=0):
        raise AssertionError("two owners")
    assert newest_attempt(tmp_path) == 1


def test_a_turn_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    refused = pytest.raises(RunError, match=r"turn has been held by another process for 0 s; end that process")
    with turn(tmp_path / "turn"), refused, turn(tmp_path / "turn", patience_s=0.2):
        raise AssertionError("two at once")


def test_a_shared_use_is_waited_for_where_there_is_patience(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with shared_use(path, "in use", alone=False):
        with pytest.raises(InputError, match="in use"), shared_use(path, "in use", alone=True, patience_s=0.1):
            raise AssertionError("alone beside another")
        with shared_use(path, "in use", alone=False):
            pass
    with ExitStack() as held:
        held.enter_context(shared_use(path, "in use", alone=True))
        threading.Timer(0.2, held.pop_all().close).start()
        with shared_use(path, "in use", alone=False, patience_s=30):
            pass
