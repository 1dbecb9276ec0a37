"""Ray's own dashboard, if asked: where it can listen, whether it does, and how a person gets to see it.

It shows its page to whoever reaches 127.0.0.1 of the head's host, and nothing of the cluster without the token.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from maehpc.errors import InputError
from maehpc.pool.host import DASHBOARD_HOST, free_port, marked

_LOADS = "import ray.dashboard.optional_deps"
"""Succeeds where Ray itself would start its dashboard."""


def check(port: int) -> None:
    """Refuses a dashboard that could not be served here.

    Args:
        port: to listen on; 0 for any that is free.

    Raises:
        InputError: the port cannot be listened on, or what the dashboard needs is not installed.
    """
    settled(port)
    check_installed(port)


def check_installed(port: int) -> None:
    """Refuses where this Python has Ray without its dashboard.

    Args:
        port: as it was asked for.

    Raises:
        InputError: what the dashboard needs is not installed.
    """
    # In a process of its own: this one shall not hold what it imports.
    tried = subprocess.run([sys.executable, "-c", _LOADS], capture_output=True, text=True, check=False, env=_apart())
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
        raise InputError(
            f"--dashboard-port {port}: Ray is installed without its dashboard ({said}); pip install 'ray[default]', "
            "or leave the option out"
        )


def _apart() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def settled(port: int) -> int:
    """The port that a dashboard is to listen on.

    Args:
        port: as it was asked for; 0 for any that is free.

    Raises:
        InputError: it cannot be listened on.
    """
    if not port:
        return free_port(DASHBOARD_HOST)
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray: an earlier run's port may be had
            tried.bind((DASHBOARD_HOST, port))
    except OSError as error:
        raise InputError(
            f"--dashboard-port {port}: {DASHBOARD_HOST}:{port} cannot be listened on ({error.strerror or error}); give "
            "another port, or 0 for one that is free"
        ) from error
    return port


def listens(port: int, mark: str) -> bool:
    """Whether it is a process of this cluster that listens there: nobody else shall be shown the token."""
    for pid in marked(mark):
        with suppress(psutil.Error):  # it has ended meanwhile
            for one in psutil.Process(pid).net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN and tuple(one.laddr) == (DASHBOARD_HOST, port):
                    return True
    return False


def url(port: int) -> str:
    """Of the dashboard, on the head's host."""
    return f"http://{DASHBOARD_HOST}:{port}"


def told(port: int, host: str, token: Path) -> str:
    """Where a person has to look.

    Args:
        port: of the dashboard.
        host: of the head, as others know it; empty where that is the reader's.
        token: file with the cluster's token.
    """
    where = f" of {host} (elsewhere after ssh -L {port}:{DASHBOARD_HOST}:{port} {host})" if host else ""
    return f"Ray's dashboard at {url(port)}{where}; it asks for the token in {token}"
