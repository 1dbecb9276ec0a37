"""A Ray cluster for the length of a block: brought up, connected to, and gone afterwards, however the block ended."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from maehpc.errors import RunError
from maehpc.pool.dashboard import listens, settled, url
from maehpc.pool.host import (
    HostSettings,
    adopt,
    environment,
    free_port,
    short_folder,
    start,
    sweep,
    token,
    write_token,
)

LOOPBACK = "127.0.0.2"
"""This host, by an address that no other reaches. Ray takes the usual 127.0.0.1 for a wish to be told the outside one,
and listens on all of them whatever it is told; hence the token."""
UP_WITHIN_S = 120.0
"""Seconds that Ray has to come up; a shared file system that is slow to give its libraries takes most of it."""
END_WITHIN_S = 30.0
LOOK_S = 1.0
"""Seconds between two looks at whether a cluster that this host has joined is over."""


@dataclass(frozen=True)
class Head:
    """What another host has to know to join.

    Attributes:
        address: HOST:PORT.
        mark: of the cluster.
        token: of the cluster; a secret.
        dashboard: port of Ray's dashboard, on the head's host alone; None: there is none.
    """

    address: str
    mark: str
    token: str
    dashboard: int | None = None


@contextmanager
def cluster(
    cpus: int,
    gpus: int = 0,
    address: str = LOOPBACK,
    announce: Callable[[Head], object] = lambda head: None,
    name: str = "",
    dashboard: int | None = None,
) -> Iterator[Callable[[], str | None]]:
    """Ray on this machine, connected to for the length of the block; others may `join` it.

    Args:
        cpus: workers that it may start here at once.
        gpus: of this machine that they may use.
        address: of this host, as a number; the default keeps all others out.
        announce: told of the head once it is known where it will listen.
        name: of this host, for `joined`; its address where empty.
        dashboard: port for Ray's dashboard; 0: a free one, which the head tells; None: no dashboard.

    Yields:
        A function that tells why the cluster is gone; None while it is there.

    Raises:
        InputError: the dashboard's port cannot be listened on.
        RunError: Ray did not come up.
    """
    adopt()  # what the host's own process leaves behind where it is killed
    port = None if dashboard is None else settled(dashboard)
    head = Head(f"{address}:{free_port(address)}", uuid.uuid4().hex, token(), port)
    folder = short_folder()
    try:
        path, mark = str(write_token(folder)), head.mark
        process = start(HostSettings(mark, address, head.address, True, cpus, gpus, path, str(folder), name, port))
        try:
            announce(head)
            if port is not None:
                _await_dashboard(port, mark, process)
            with connected(head.address, mark, path, process):
                yield lambda: None if process.poll() is None else "Ray's head has ended"
        finally:
            end(process, mark)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def join(head: Head, cpus: int, gpus: int, address: str, over: Callable[[], bool], name: str = "") -> str | None:
    """This host's part of a cluster that another began, until that is over or Ray ends here.

    Args:
        head: as announced.
        cpus: workers that may be started here.
        gpus: of this host that they may use.
        address: of this host, as a number.
        over: asked every second.
        name: of this host, for `joined`; its address where empty.

    Returns:
        What Ray said as it ended by itself; None where the cluster was over.
    """
    adopt()
    folder = short_folder()
    try:
        path = str(write_token(folder, head.token))
        process = start(HostSettings(head.mark, address, head.address, False, cpus, gpus, path, str(folder), name))
        try:
            while process.poll() is None:
                if over():
                    return None
                time.sleep(LOOK_S)
            return _last_words(process)
        finally:
            end(process, head.mark)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def joined() -> frozenset[str]:
    """Names of the hosts that have ever joined the cluster that this process is connected to.

    Empty where the cluster does not answer: its end is told elsewhere.
    """
    import ray

    nodes: Any = ray.nodes
    try:
        return frozenset(str(node["NodeName"]) for node in nodes())
    except (RuntimeError, OSError, ray.exceptions.RayError):
        return frozenset()


def _last_words(process: subprocess.Popen[bytes]) -> str:
    said = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
    return said.splitlines()[-1] if said else f"exit code {process.returncode}"


@contextmanager
def connected(address: str, mark: str, token: str, head: subprocess.Popen[bytes]) -> Iterator[None]:
    """Connects this process to a cluster as its driver.

    Args:
        address: HOST:PORT of the head.
        mark: of the cluster.
        token: file with its token.
        head: the process that keeps the head.

    Raises:
        RunError: it did not come up.
    """
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({**environment(mark, token, before), "GRPC_VERBOSITY": "ERROR"})
    try:
        try:
            with _own_signals():
                import ray
        except ImportError as error:
            raise RunError(f"Ray did not start: {error}; install the package ray again") from error
        _await_head(address, head)
        logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that it leaves signals alone, which it shall
        begin = partial(ray.init, address=address, log_to_driver=False, configure_logging=False)
        try:
            with _own_signals():
                _beside(begin)
        except (RuntimeError, OSError, ray.exceptions.RayError) as error:
            raise RunError(f"Ray did not come up at {address}: {' '.join(str(error).split())[:300]}") from error
        try:
            yield
        finally:
            with _own_signals():
                _beside(ray.shutdown)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _beside(work: Callable[[], object]) -> None:
    """Does something in another thread: in the main one Ray takes SIGTERM for itself, and ends the process with it."""
    with ThreadPoolExecutor(1, "ray") as one:
        one.submit(work).result()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Gives this process its signal handlers back, whatever Ray has done with them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # one that comes meanwhile waits for its own handler
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _await_head(address: str, head: subprocess.Popen[bytes]) -> None:
    """Waits until the head's port answers; Ray's own wait takes minutes where nobody will ever answer."""
    import socket

    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise RunError(f"Ray did not start: {_last_words(head)}")
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1.0):
            return
        time.sleep(0.05)
    raise RunError(f"Ray did not come up within {UP_WITHIN_S:.0f} s at {address}")


def _await_dashboard(port: int, mark: str, head: subprocess.Popen[bytes]) -> None:
    """Waits until the dashboard listens: where it cannot, Ray ends, and a minute later would end its driver too."""
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise RunError(f"Ray did not start with its dashboard: {_last_words(head)}")
        if listens(port, mark):
            return
        time.sleep(0.1)
    raise RunError(f"Ray's dashboard did not come up within {UP_WITHIN_S:.0f} s at {url(port)}")


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ends a host of a cluster and all that it started."""
    if process.stdin is not None:
        with suppress(OSError):  # it has ended before it read all that it was told
            process.stdin.close()
    try:
        process.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        sweep(mark)  # nothing is left to do where the host's own process did it
        if process.stderr is not None:
            process.stderr.close()
