"""One host of a Ray cluster: `python -m maehpc.pool.host`, which starts Ray here and ends all of it when it ends.

Ray's processes outlive the one that started them in too many ways: agents stay for a while after a raylet was killed,
and `ray stop` ends every Ray of the host, other people's included. Here each process inherits a mark in its
environment, and whoever carries this cluster's mark is ended by its id: when standard input closes (the program that
wanted the cluster has ended, however), on SIGTERM, and when Ray itself ends.

Ray listens on every interface of the host, so that a token is asked of everybody who connects: made by the
driver, in a file that only its user reads.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from maehpc.errors import RunError

MARK = "MAEHPC_POOL"
"""The variable that all processes of a cluster inherit."""
LONGEST_FOLDER = 43
"""Bytes of the path of Ray's folder: the sockets in it get names that end at 107."""
ROOM_BYTES = 16 << 20
"""What must be free where Ray's logs and sockets go."""
REACHED_WITHIN_S = 10.0
"""Seconds in which a host reaches itself."""
TOKEN_BYTES = 32
OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing large goes through Ray's object store."""
_PR_SET_CHILD_SUBREAPER = 36
_UNKILLABLE_S = 30.0
"""Seconds that a killed process may take to go; one that waits for a file system that hangs takes for ever."""
_GRACE_S = 1.0
"""Seconds that Ray's processes have to end by themselves."""
_GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""First and last port that the kernel gives to who asks for any, of either version of IP."""
_LEAST_PORT = 20_000
"""Of those tried: programs with a port of their own mostly have a lower one."""
DASHBOARD_HOST = "127.0.0.1"
"""Where Ray's dashboard listens, if asked: on the head's host alone."""
_TITLES = (b"ray::", b"ray-dashboard-")
"""What processes of Ray that give themselves a title begin it with."""


@dataclass(frozen=True)
class HostSettings:
    """What Ray is told of this host.

    Attributes:
        mark: of the cluster: who inherits it belongs to it.
        address: of this host, as a number, by which the others reach it.
        head: HOST:PORT of the head.
        is_head: whether that is this one.
        cpus: that Ray may give away.
        gpus: that Ray may give away.
        token: file with the cluster's token.
        folder: see `short_folder`; removed when the host ends.
        name: of this host in the cluster; its address where empty.
        dashboard: port of Ray's dashboard, which the head alone has; None: there is none.
    """

    mark: str
    address: str
    head: str
    is_head: bool
    cpus: int
    gpus: int
    token: str
    folder: str
    name: str = ""
    dashboard: int | None = None

    def words(self, folder: Path) -> list[str]:
        """The command that starts Ray and stays."""
        return [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--log-style=record"),
            # The monitor would ask clouds for machines, and serve its metrics to everybody.
            *("--disable-usage-stats", "--include-log-monitor=false", "--no-monitor"),
            f"--node-ip-address={self.address}",
            f"--num-cpus={self.cpus}",
            f"--num-gpus={self.gpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            # Zero: any that is free. The defaults are fixed numbers, over which two clusters of one host would fight.
            *("--min-worker-port=0", "--max-worker-port=0", "--node-manager-port=0", "--object-manager-port=0"),
            *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--runtime-env-agent-port=0"),
            "--metrics-export-port=0",
            f"--temp-dir={folder}",
            *([f"--node-name={self.name}"] if self.name else []),
            *(self._as_head() if self.is_head else [f"--address={self.head}"]),
        ]

    def _as_head(self) -> list[str]:
        port = self.head.rpartition(":")[2]
        shown = ["--include-dashboard=false"]
        if self.dashboard is not None:
            shown = [
                "--include-dashboard=true",
                f"--dashboard-host={DASHBOARD_HOST}",
                f"--dashboard-port={self.dashboard}",
            ]
        return ["--head", f"--port={port}", *shown, f"--ray-client-server-port={free_port(self.address)}"]


def environment(mark: str, token: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables of every process of the cluster, those that connect to it included."""
    without = {name: value for name, value in inherited.items() if not name.startswith("RAY_")}
    return {
        **without,
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        # Ray would kill workers where a host is 95 % full, whoever filled it; the kernel and Slurm have limits of ours.
        "RAY_memory_monitor_refresh_ms": "0",
        # Everybody would be served metrics, on every interface, by each host's agent and by the dashboard's process,
        # which is there in any case; without a port that one logs that it cannot.
        "RAY_enable_metrics_collection": "0",
        "DASHBOARD_METRIC_PORT": "-1",
    }


@cache
def token() -> str:
    """This process's token. Ray reads a process's token once and for all, so that a second cluster has the same."""
    return secrets.token_hex(TOKEN_BYTES)


def write_token(folder: Path, text: str | None = None) -> Path:
    """Writes a token, this process's own where None, to a new file that only this user can read."""
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text or token())
    return path


def _ports(tried: int = 20) -> Iterator[int]:
    """Ports to try: some below those that the kernel gives to connections and to who asks for any; then any."""
    with suppress(OSError, ValueError, IndexError):
        first_given = int(_GIVEN.read_text().split()[0])
        below = range(_LEAST_PORT, first_given)
        yield from secrets.SystemRandom().sample(below, min(tried, len(below)))
    yield 0


def free_port(address: str) -> int:
    """A port of this host that nobody listens on, and that the kernel gives nobody before Ray has come up.

    Raises:
        RunError: this host does not reach itself there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as found, socket.socket(family) as caller:
            for port in _ports():
                try:
                    found.bind((address, port))
                    break
                except OSError:  # somebody listens there
                    if not port:
                        raise
            found.listen()
            caller.settimeout(REACHED_WITHIN_S)
            caller.connect(found.getsockname())  # Ray would wait for minutes
            return int(found.getsockname()[1])
    except OSError as error:
        raise RunError(
            f"Ray cannot start: this host does not reach itself at {address} ({error.strerror or error}); bring up the "
            "network interface of that address"
        ) from error


def short_folder() -> Path:
    """A new folder of this user alone on this host's own disk, with a path short enough for Ray's sockets.

    Raises:
        RunError: there is no place for it.
    """
    for root in (tempfile.gettempdir(), "/tmp", "/dev/shm"):
        with suppress(OSError):
            if shutil.disk_usage(root).free < ROOM_BYTES:
                continue
            folder = Path(tempfile.mkdtemp(prefix="mr", dir=root))
            if str(folder).isascii() and len(str(folder)) <= LONGEST_FOLDER:  # Ray takes no other characters
                return folder
            folder.rmdir()
    raise RunError(
        f"Ray cannot start: neither TMPDIR nor /tmp nor /dev/shm can be written, has {ROOM_BYTES >> 20} MiB left and a "
        f"path of at most {LONGEST_FOLDER} ASCII characters; make room there, or set TMPDIR to such a folder"
    )


def adopt() -> None:
    """Makes this process the parent of whatever its descendants leave behind when they end (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def marked(mark: str) -> Iterator[int]:
    """Process ids of a cluster on this host, but for this process.

    Those that carry its mark, and those that this process has adopted and that call themselves Ray's: a process that
    gives itself a title writes it over its environment.
    """
    sign = f"{MARK}={mark}".encode()
    found = set()
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        with suppress(OSError):  # it has ended, or is somebody else's
            if sign in (path / "environ").read_bytes().split(b"\0"):
                found.add(int(path.name))
    adopted = psutil.Process().children()
    yield from found | {child.pid for child in adopted if _title(child.pid).startswith(_TITLES)}


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def sweep(mark: str, spare: frozenset[int] = frozenset(), grace_s: float = _GRACE_S) -> None:
    """Ends every process of a cluster on this host: asked first, then killed.

    Args:
        mark: the cluster's.
        spare: process ids to leave alone.
        grace_s: seconds between the two.
    """
    deadline = time.monotonic() + grace_s
    patience = deadline + _UNKILLABLE_S
    asked: set[int] = set()
    while alive := {pid for pid in marked(mark) if pid not in spare and not _gone(pid)}:
        if time.monotonic() >= patience:
            print(
                f"maehpc: of Ray's processes {sorted(alive)} cannot be ended; see what they wait for", file=sys.stderr
            )
            return
        late = time.monotonic() >= deadline
        for pid in alive if late else alive - asked:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked |= alive
        time.sleep(0.05)


def _gone(pid: int) -> bool:
    """Whether a process has ended; one that this process has adopted is buried."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return _zombie(pid)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (OSError, IndexError):
        return True


def run(settings: HostSettings) -> int:
    """Starts Ray and stays until it or standard input ends, or SIGTERM comes.

    Returns:
        Ray's exit code where it ended by itself, else 0.
    """
    adopt()
    folder = Path(settings.folder)
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    # A terminal's ^C is for the program that wanted the cluster, and Slurm's warnings, which reach every process of a
    # job and would end Ray's, are for the ranks.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    told = environment(settings.mark, settings.token, os.environ)
    if settings.dashboard is not None:
        told["TMPDIR"] = str(folder)  # the dashboard's processes leave a folder there whenever they end
    log = folder / "start.log"
    (folder / "r").mkdir()  # Ray opens its folder to everybody; the one around it stays closed
    ray = None
    try:
        with log.open("wb") as output:
            ray = subprocess.Popen(
                settings.words(folder / "r"), env=told, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        while not asked and ray.poll() is None:
            readable, _, _ = select.select([sys.stdin], [], [], 0.2)
            if readable and not os.read(sys.stdin.fileno(), 4096):
                break
    finally:
        code = ray.poll() if ray is not None else 1
        if code not in (None, 0) and not asked:
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr, flush=True)
        sweep(settings.mark, spare=frozenset({os.getppid()}))
        shutil.rmtree(folder, ignore_errors=True)
    return code or 0


def start(settings: HostSettings) -> subprocess.Popen[bytes]:
    """Starts this module in a process of its own; it ends with Ray as soon as its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "maehpc.pool.host"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(settings.mark, settings.token, os.environ),
        start_new_session=True,  # what ends a terminal's or a launcher's process group must leave it time to tidy up
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, and says why
        # Everybody on this host can read command lines, and Ray's port is free for some seconds more.
        process.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
        process.stdin.flush()
    return process


if __name__ == "__main__":
    sys.exit(run(HostSettings(**json.loads(sys.stdin.buffer.readline()))))
