"""A pool that is at work, found by whoever wants to help: its address and token lie in the experiment's folder.

results/NAME/.pool/head.json    address and mark
results/NAME/.pool/token        of mode 0600; there as long as the cluster is wanted
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from maehpc import files
from maehpc.addresses import route_to
from maehpc.errors import InputError, RunError
from maehpc.experiment import Experiment
from maehpc.interruption import Stop

if TYPE_CHECKING:
    from maehpc.pool.cluster import Head


@contextmanager
def announced(experiment: Experiment, head: Head) -> Iterator[None]:
    """Lets others find a cluster for the length of the block; what a killed pool left is replaced.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = experiment.pool
    token = folder / "token"
    with files.writing(folder):
        folder.mkdir(exist_ok=True)
        token.unlink(missing_ok=True)
    files.write_json(folder / "head.json", {"address": head.address, "mark": head.mark})
    with files.writing(token), os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(head.token)
    try:
        yield
    finally:
        with suppress(OSError):  # a disk that takes no writes; what went wrong first is what the user must hear
            token.unlink(missing_ok=True)
            (folder / "head.json").unlink(missing_ok=True)
            folder.rmdir()


def join_pool(experiment: Experiment, workers: int, gpus: int, stop: Stop, say: Callable[[str], object]) -> None:
    """Brings workers of this machine to the pool that explains an experiment, until it is over.

    Args:
        experiment: being explained.
        workers: to bring.
        gpus: of each.
        stop: ends it.
        say: told where it has joined.

    Raises:
        InputError: no pool is at work.
        RunError: Ray does not come up here, or ended by itself.
    """
    from maehpc.pool.cluster import join

    head = _found(experiment)
    token = experiment.pool / "token"
    host = head.address.rpartition(":")[0]

    def over() -> bool:
        with suppress(OSError):  # a file system that stumbles: the next look tells
            return stop.reason is not None or token.read_text() != head.token
        return not token.exists()

    address = host if ipaddress.ip_address(host).is_loopback else route_to(host)
    say(f"{workers} more workers for the pool at {head.address}; they leave with it, or with Ctrl-C")
    said = join(head, workers, workers * gpus, address, over)
    if said is not None and not over():
        raise RunError(f"Ray ended on this machine ({said}); the same command joins again")


def _found(experiment: Experiment) -> Head:
    from maehpc.pool.cluster import Head

    try:
        facts = json.loads((experiment.pool / "head.json").read_bytes())
        return Head(str(facts["address"]), str(facts["mark"]), (experiment.pool / "token").read_text())
    except PermissionError as error:
        raise InputError(f"--join: the pool of {experiment.root} is another user's; ask them") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--join: no pool is explaining {experiment.root}; leave the option out to begin one"
        ) from error
