"""A pool that is at work, found by whoever wants to help: its address and token lie in the experiment's folder.

results/NAME/.pool/head.json    address and mark
results/NAME/.pool/token        of mode 0600; there as long as the cluster is wanted
"""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel

import maehpc
from maehpc import files
from maehpc.addresses import route_to
from maehpc.errors import InputError, RunError
from maehpc.experiment import Experiment
from maehpc.interruption import Stop

if TYPE_CHECKING:
    from maehpc.pool.cluster import Head

HELPER = "helper-"
REACHED_WITHIN_S = 10.0


@contextmanager
def announced(experiment: Experiment, head: Head, device: str) -> Iterator[Path]:
    """Lets others find a cluster for the length of the block; what a killed pool left is replaced.

    Args:
        experiment: being explained.
        head: of the cluster.
        device: that its workers compute on.

    Yields:
        The file with its token.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = experiment.pool
    token, facts = folder / "token", folder / "head.json"
    with files.writing(folder):
        folder.mkdir(exist_ok=True)
        token.unlink(missing_ok=True)
    told = _Pool(
        address=head.address,
        mark=head.mark,
        host=platform.node(),
        folder=str(Path.cwd()),
        root=str(experiment.root.absolute()),
        device=device,
        versions=_versions(),
    )
    files.write_json(facts, told.model_dump(mode="json"))
    with files.writing(token), os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(head.token)
    try:
        yield token
    finally:
        with suppress(OSError, ValueError):  # what went wrong first is what the user must hear
            if _Pool.model_validate_json(facts.read_bytes()).mark == head.mark:  # and not a newer attempt's
                token.unlink(missing_ok=True)
                facts.unlink(missing_ok=True)
                for left in folder.glob(f"{HELPER}*"):
                    left.unlink(missing_ok=True)
                folder.rmdir()


def brought(experiments: Iterable[Experiment]) -> int:
    """Workers that others have brought to the pool of these experiments."""
    found = 0
    for experiment in experiments:
        with suppress(OSError, ValueError):  # a file system that stumbles: the next look tells
            found += sum(int(path.read_text()) for path in experiment.pool.glob(f"{HELPER}*"))
    return found


class _Pool(BaseModel):
    """What another host has to know.

    Attributes:
        address: HOST:PORT of the cluster's head.
        mark: of the cluster.
        host: name of the head's host.
        folder: in which the run was begun: paths of data sets are relative to it.
        root: absolute path of the experiment's folder.
        device: cpu or cuda.
        versions: of what decides a result's bytes.
    """

    address: str
    mark: str
    host: str
    folder: str
    root: str
    device: str
    versions: dict[str, str]


def _versions() -> dict[str, str]:
    return {"maehpc": maehpc.__version__, "torch": str(torch.__version__)}


def join_pool(
    experiment: Experiment, workers: int, gpus: int, device: str, stop: Stop, say: Callable[[str], object]
) -> None:
    """Brings workers of this machine to the pool that explains an experiment, until it is over.

    This process goes to the folder in which that run was begun, since its workers inherit it.

    Args:
        experiment: being explained.
        workers: to bring.
        gpus: of each.
        device: that they compute on.
        stop: ends it.
        say: told where it has joined.

    Raises:
        InputError: no pool is at work, or this machine cannot help it.
        RunError: Ray does not come up here, or ended by itself.
    """
    from maehpc.pool.cluster import Head, join

    pool, token = _found(experiment)
    secret = experiment.pool.absolute() / "token"
    host, _, port = pool.address.rpartition(":")
    alone = ipaddress.ip_address(host).is_loopback
    _check(experiment, pool, device, alone)
    try:
        socket.create_connection((host, int(port)), REACHED_WITHIN_S).close()
    except OSError as error:
        raise InputError(
            f"--join: the pool of {experiment.root} does not answer at {pool.address} ({error.strerror or error}); it "
            "was killed, or this host does not reach it"
        ) from error
    address = host if alone else route_to(host)
    os.chdir(pool.folder)

    def over() -> bool:
        if stop.reason is not None:
            return True
        try:
            return secret.read_text() != token
        except FileNotFoundError:
            return True
        except OSError:  # a file system that stumbles: the next look tells
            return False

    say(f"{workers} more workers for the pool at {pool.address}; they leave with it, or with Ctrl-C")
    ours = secret.with_name(f"{HELPER}{uuid.uuid4().hex}")
    try:
        files.write_text(ours, f"{workers}\n")
        said = join(Head(pool.address, pool.mark, token), workers, workers * gpus, address, over)
    finally:
        with suppress(OSError):  # gone with the pool
            ours.unlink(missing_ok=True)
    if said is not None and not over():
        raise RunError(f"Ray ended on this machine ({said}); the same command joins again")


def _found(experiment: Experiment) -> tuple[_Pool, str]:
    try:
        told = (experiment.pool / "head.json").read_bytes()
        return _Pool.model_validate_json(told), (experiment.pool / "token").read_text()
    except PermissionError as error:
        raise InputError(f"--join: the pool of {experiment.root} is another user's; ask them") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"--join: no pool is explaining {experiment.root}; leave the option out to begin one"
        ) from error


def _check(experiment: Experiment, pool: _Pool, device: str, alone: bool) -> None:
    where = f"--join: the pool of {experiment.root}"
    if alone and pool.host != platform.node():
        raise InputError(f"{where} is {pool.host}'s alone; begin it with --pool-address for other hosts to join")
    if device != pool.device:
        raise InputError(f"{where} computes on {pool.device} and this machine would on {device}; see --device")
    other = next((name for name, version in _versions().items() if pool.versions.get(name) != version), None)
    if other is not None:
        raise InputError(
            f"{where} has {other} {pool.versions.get(other)} and this machine {_versions()[other]}; install the same"
        )
    for path in (pool.folder, pool.root):
        if not Path(path).is_dir():
            raise InputError(f"{where} works in {path}, which is not here; hosts must see folders by the same paths")
