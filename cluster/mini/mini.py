#!/usr/bin/env python3
"""A real Slurm of four hosts on one Linux machine: every host has its own network, processes and memory disk.

    mini.py start [--accounting] [--hosts 4]       stop       status       env
    mini.py power-off HOST | power-on HOST         the host falls silent, as without power; it boots again
    mini.py kill-slurmd HOST | start-slurmd HOST   the host's daemon alone; its jobs live on
    mini.py stop-controller | start-controller | restart-controller
    mini.py cut HOST HOST | heal                   no packet passes between two hosts; all cuts are mended

Everything lives below one state folder: configuration, logs, and under run/ a record of each process that was started
here. A process is ended only while its start time is still the recorded one. A second cluster beside the first one
needs other MAEHPC_MINI_* variables: see Settings.

Exit codes: 0 done, 1 a part failed (for status: down), 2 it cannot be as asked, and nothing was changed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import stat
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mini_network import Network
from mini_processes import PATH, Processes, ProcessId, until
from mini_settings import MiniError, RefusedError, Settings, UnfitError

HERE = Path(__file__).resolve().parent
GPUS_PER_HOST = 2
# What a start needs: command -> Debian package.
NEEDED = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setsid": "util-linux",
    "mount": "mount",
}
NEEDED_BY_ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}

# What makes networks, and mounts and namespaces: root in a container may lack them. Bits as in capabilities(7).
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27}

# First process of a host: it adopts what daemons leave behind, as any init does.
INIT = """
set -e
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs -o mode=1777 tmpfs /tmp/ray
echo >"$2"
set +e
while :; do sleep infinity & wait; done
"""


@dataclass
class Mini:
    """One mini cluster. Every method that changes something holds the lock of the state folder meanwhile."""

    settings: Settings = field(default_factory=Settings.from_environment)
    processes: Processes = field(init=False)

    def __post_init__(self) -> None:
        self.processes = Processes(self.settings.state, self.environment)
        # What is up knows better than the caller how many hosts it has.
        if self._marker.exists():
            self.settings = Settings.load(self._marker)

    @property
    def state(self) -> Path:
        """The folder that holds everything of this cluster."""
        return self.settings.state

    @property
    def shared(self) -> Path:
        """A folder below which later mounts show up on every host."""
        return self.state / "shared"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of all hosts in order."""
        return self.settings.hosts

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point Slurm's commands at this cluster."""
        return {"SLURM_CONF": str(self.state / "slurm.conf")}

    @property
    def network(self) -> Network:
        """The cables between the hosts."""
        return Network(self.settings, self.processes)

    @property
    def _marker(self) -> Path:
        """The settings; their presence says that the state folder is a cluster's and may be removed."""
        return self.state / "maehpc-mini.json"

    @property
    def _whole(self) -> Path:
        """Present from the end of a start to the beginning of a stop."""
        return self.state / "whole"

    # ---- start and stop

    def start(self, count: int | None = None, accounting: bool = False) -> bool:
        """Brings the cluster up and waits until every host can take jobs.

        What is up already stays; what is down of it is started, and cuts are mended.

        Args:
            count: how many hosts; as many as are up, or four, when not given.
            accounting: with a database; one that is up with it stays so.

        Returns:
            Whether it had to be made: False where it was up.

        Raises:
            UnfitError: not root, missing packages, or another Slurm.
            RefusedError: up with other hosts or without accounting, or a name or number is taken.
            MiniError: a part did not start; what was made is removed.
        """
        wanted = replace(self.settings, count=count or Settings.count, accounting=accounting)
        self._refuse(wanted)
        with self._locked(make=True):
            if self._whole.exists() and Network(Settings.load(self._marker), self.processes).stands():
                self.settings = up = Settings.load(self._marker)
                if up.count != (count or up.count) or up.accounting < accounting:
                    has = f"{up.count} hosts, {'with' if up.accounting else 'without'} accounting"
                    raise RefusedError(f"the mini cluster is up with {has}: stop it first")
                self.network.heal()
                self._start_all()
                return False
            if self._marker.exists():
                self._clean()
            self.settings = wanted
            try:
                self._refuse_taken()
                self._make()
            except BaseException:
                self._remove()
                raise
            return True

    def stop(self) -> bool:
        """Ends and removes everything that was made, also by a start that was killed.

        Returns:
            Whether there was anything.
        """
        if not self.state.exists():
            return False
        self._refuse_all_but_root()
        self._refuse_foreign_folder()
        with contextlib.suppress(FileNotFoundError), self._locked():
            self._remove()
            return True
        return False

    def up(self) -> bool:
        """Whether a start has come to its end and no stop came after it."""
        return self._whole.exists() and self.network.stands()

    # ---- faults

    def power_off(self, host: str) -> None:
        """The host loses power: its processes end at once, and its network says nothing more, not even goodbye."""
        with self._changing(host):
            # First the cable: what the kernel sends for dying connections must not arrive.
            self.network.silence(host)
            self.processes.end(f"host-{host}")
            self.network.disconnect(host)

    def power_on(self, host: str) -> None:
        """The host boots, with an empty memory disk, and its slurmd starts. Slurm knows a few seconds later."""
        with self._changing(host):
            self._boot([host])
            self._start_slurmd(host)

    def kill_slurmd(self, host: str) -> None:
        """kill -9 of the host's slurmd alone: the steps of its jobs live on."""
        with self._changing(host):
            outer = self.processes.alive(f"slurmd-{host}")
            if outer is not None:
                for child in outer.children():
                    child.send(signal.SIGKILL)
                until(lambda: not outer.alive(), 10, lambda: f"slurmd on {host} does not end")

    def start_slurmd(self, host: str) -> None:
        """Starts the host's slurmd unless it runs."""
        with self._changing(host):
            self._start_slurmd(host)

    def stop_controller(self) -> None:
        """Ends slurmctld as an administrator does: it saves its state. Jobs run on."""
        with self._changing():
            self.processes.end("slurmctld", signal.SIGTERM, 15)

    def start_controller(self) -> None:
        """Starts slurmctld unless it runs, and waits until it answers."""
        with self._changing():
            self._start_controller()

    def restart_controller(self) -> None:
        """Stops and starts slurmctld; jobs run on."""
        with self._changing():
            self.processes.end("slurmctld", signal.SIGTERM, 15)
            self._start_controller()

    def cut(self, one: str, other: str) -> None:
        """No packet passes between two hosts any more; both still reach the controller and all others."""
        with self._changing(one, other):
            self.network.cut(one, other)

    def heal(self) -> None:
        """Mends all cuts."""
        with self._changing():
            self.network.heal()

    # ---- questions

    def run(self, *command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command on this side with Slurm's commands pointed at the cluster; any exit code.

        Raises:
            MiniError: it takes longer than `seconds`.
        """
        given = os.environ | self.environment
        try:
            return subprocess.run(command, capture_output=True, text=True, env=given, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise MiniError(f"`{shlex.join(command)}` took longer than {seconds:g} s") from None

    def on(self, host: str, *command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host, as over ssh; any exit code."""
        return self.run(*self.entry(host), *command, seconds=seconds)

    def entry(self, host: str) -> list[str]:
        """The words before a command that make it run on a host.

        Raises:
            RefusedError: the host has no power.
        """
        first = self._first(host)
        if first is None:
            raise RefusedError(f"{host} has no power: power-on {host}")
        return ["nsenter", f"--target={first.pid}", "--mount", "--uts", "--ipc", "--net", "--pid"]

    def slurm_states(self) -> dict[str, str]:
        """What Slurm says of each host: idle, mixed, allocated, down, down*, ...; empty without a controller."""
        told = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout
        return dict(line.split() for line in told.splitlines())

    def process_ids(self, host: str) -> list[int]:
        """Ids, as this side counts, of all processes on a host but its first."""
        first = self._first(host)
        if first is None:
            return []
        try:
            space = Path(f"/proc/{first.pid}/ns/pid").stat().st_ino
        except OSError:  # the host has just lost its power
            return []
        found = set()
        for path in Path("/proc").glob("[0-9]*/ns/pid"):
            with contextlib.suppress(OSError):
                if path.stat().st_ino == space:
                    found.add(int(path.parts[2]))
        return sorted(found - {first.pid})

    # ---- what a start makes

    def _make(self) -> None:
        self.settings.save(self._marker)
        for folder in ("controller", "spool", "log", "run", "gpus", "munge", "shared"):
            (self.state / folder).mkdir(exist_ok=True)
        self._write_configuration()
        # Mounts below a shared folder pass on to the hosts; those that a host makes stay there.
        self.processes.run("mount", "--bind", str(self.shared), str(self.shared))
        self.processes.run("mount", "--make-shared", str(self.shared))
        self.network.make()
        self._start_all()
        self._whole.touch()

    def _start_all(self) -> None:
        """Starts what does not run, and waits until every host can take jobs."""
        self._start_munge()
        if self.settings.accounting:
            self._start_accounting()
        self._start_controller()
        self._boot(self.hosts)
        for host in self.hosts:
            self._start_slurmd(host)
        names = [f"slurmd-{host}" for host in self.hosts]
        until(self._ready, 60, self._why_not_ready, lambda: all(self.processes.alive(name) for name in names))
        self._check_network()

    def _write_configuration(self) -> None:
        given = self.settings
        place = (
            f"AccountingStorageHost={given.address}\nAccountingStoragePort={given.port + 2}\n"
            f"AccountingStoragePass={given.state}/munge/socket"
        )
        values = {
            "state": given.state,
            "controller": socket.gethostname().split(".")[0],
            "address": given.address,
            "controller_port": given.port,
            "slurmd_port": given.port + 1,
            "accounting_port": given.port + 2,
            "accounting": f"accounting_storage/{'slurmdbd' if given.accounting else 'none'}",
            "accounting_place": f"{place}\nAccountingStorageTRES=gres/gpu" if given.accounting else "",
            "all_hosts": ",".join(given.hosts),
            "nodes": "\n".join(
                f"NodeName={host} NodeHostname={host} NodeAddr={given.address_of(host)}" for host in given.hosts
            ),
            "gpus": GPUS_PER_HOST,
            "last_gpu": GPUS_PER_HOST - 1,
        }
        for name in ("slurm.conf", "gres.conf", "cgroup.conf", "slurmdbd.conf"):
            path = given.state / name
            # slurmdbd refuses to read a file that others may read.
            path.touch(mode=0o600 if name == "slurmdbd.conf" else 0o644)
            path.write_text(string.Template((HERE / name).read_text()).substitute(values))
        for number in range(GPUS_PER_HOST):
            # Opens like a GPU and is none: the same device as /dev/null.
            device = given.state / "gpus" / f"nvidia{number}"
            os.mknod(device, stat.S_IFCHR, os.makedev(1, 3))
            device.chmod(0o666)

    def _start_munge(self) -> None:
        """The cluster's own munge with its own key: one that the machine has is left alone."""
        folder = self.state / "munge"
        places = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        if not self.processes.alive("munged"):
            key = folder / "key"
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
            options = [f"--{option}={folder / name}" for option, name in places.items()]
            self.processes.launch("munged", "munged", "--foreground", *options)
        ask = ("munge", "--no-input", f"--socket={folder / 'socket'}")
        self.processes.wait("munged", lambda: self.processes.run(*ask, check=False).returncode == 0, 10)

    def _start_accounting(self) -> None:
        """A database that is reached through its socket alone, and Slurm's daemon before it."""
        folder = self.state / "database"
        door = self.state / "run" / "database.socket"
        if not folder.exists():
            fresh = folder.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            made = ("--no-defaults", "--user=root", f"--datadir={fresh}", "--skip-test-db", "--skip-name-resolve")
            self.processes.run("mariadb-install-db", "--auth-root-authentication-method=socket", *made)
            fresh.rename(folder)
        if not self.processes.alive("mariadbd"):
            door.unlink(missing_ok=True)
            small = (
                "--innodb-buffer-pool-size=64M",
                "--innodb-log-file-size=16M",
                "--innodb-flush-log-at-trx-commit=0",
            )
            place = (f"--datadir={folder}", f"--socket={door}", f"--pid-file={door.with_suffix('.pid')}")
            self.processes.launch(
                "mariadbd",
                *("mariadbd", "--no-defaults", "--user=root", "--skip-networking", "--innodb-lock-wait-timeout=900"),
                *(*place, *small),
            )
        self.processes.wait("mariadbd", lambda: _listens(door), 30)
        if not self.processes.alive("slurmdbd"):
            self.processes.launch("slurmdbd", "slurmdbd", "-D", environment={"MYSQL_UNIX_PORT": str(door)})
        ask = ("sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster")
        self.processes.wait("slurmdbd", lambda: self.run(*ask).returncode == 0, 60)
        if "mini" not in self.run(*ask).stdout.split():
            added = self.run("sacctmgr", "--immediate", "add", "cluster", "mini")
            if added.returncode != 0:
                raise MiniError(f"sacctmgr cannot add the cluster: {added.stdout.strip()} {added.stderr.strip()}")

    def _start_controller(self) -> None:
        if not self.processes.alive("slurmctld"):
            self.processes.launch("slurmctld", "slurmctld", "-D")
        self.processes.wait("slurmctld", lambda: self.run("scontrol", "ping").returncode == 0, 30)

    def _boot(self, hosts: Sequence[str]) -> None:
        """Starts those hosts that have no first process."""
        ready = {
            host: self.state / "run" / f"ready-{host}" for host in hosts if not self.processes.alive(f"host-{host}")
        }
        for host, sign in ready.items():
            sign.unlink(missing_ok=True)
            self.network.disconnect(host)
            self.network.connect(host)
            self.processes.launch(
                f"host-{host}",
                *("nsenter", f"--net=/run/netns/{self.settings.space_of(host)}"),
                *("unshare", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("--propagation", "slave"),
                *("sh", "-c", INIT, "init", host, str(sign)),
            )
        for host, sign in ready.items():
            self.processes.wait(f"host-{host}", sign.exists, 10)

    def _start_slurmd(self, host: str) -> None:
        if not self.processes.alive(f"slurmd-{host}"):
            self.processes.launch(f"slurmd-{host}", *self.entry(host), "slurmd", "-D", "-N", host)

    def _ready(self) -> bool:
        """Whether every host can take jobs or has some; asks Slurm to take back those that it gave up."""
        states = self.slurm_states()
        for host, told in states.items():
            if told.startswith(("down", "drain", "fail")) and not told.endswith("*"):
                self.run("scontrol", "update", f"nodename={host}", "state=resume")
        fine = ("idle", "mixed", "allocated", "completing", "planned")
        return bool(states) and all(told in fine for told in states.values())

    def _why_not_ready(self) -> str:
        states = self.slurm_states()
        if not states:
            return self.processes.trouble("slurmctld", "does not answer")
        # Any of them tells the reason: they are all alike.
        host = next((host for host in self.hosts if states.get(host) != "idle"), self.hosts[0])
        return self.processes.trouble(f"slurmd-{host}", f"is {states.get(host)}, not idle")

    def _check_network(self) -> None:
        """Hosts must reach each other.

        Raises:
            MiniError: a firewall of this machine drops what passes the bridge.
        """
        one, other = self.hosts[0], self.hosts[-1]
        door = f"/dev/tcp/{self.settings.address_of(other)}/{self.settings.port + 1}"
        if self.on(one, "timeout", "5", "bash", "-c", f"exec 3<>{door}").returncode != 0:
            bridge = self.settings.bridge
            raise MiniError(
                f"{one} cannot reach {other}: a firewall drops what passes the bridge; "
                f"`iptables -I FORWARD -i {bridge} -o {bridge} -j ACCEPT` lets it pass"
            )

    def _first(self, host: str) -> ProcessId | None:
        """The host's first process: all others there end with it."""
        outer = self.processes.alive(f"host-{host}")
        return next(iter(outer.children()), None) if outer else None

    # ---- what a stop removes

    def _clean(self) -> None:
        """Ends and removes whatever of the cluster there is but the state folder's marker and lock."""
        self._whole.unlink(missing_ok=True)
        self.settings = Settings.load(self._marker)
        for host in self.hosts:
            self.processes.end(f"host-{host}")
            self.processes.end(f"slurmd-{host}")
            for left in self.network.inhabitants(host):
                left.send(signal.SIGKILL)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self.processes.end(name)
        self.network.remove()
        self._unmount()
        for path in self.state.iterdir():
            if path.name not in (self._marker.name, "lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._forget_ray()

    def _remove(self) -> None:
        """The same, and the state folder: first what a later stop needs least."""
        if self._marker.exists():
            self._clean()
            self._marker.unlink()
        self._marker.with_suffix(".new").unlink(missing_ok=True)
        (self.state / "lock").unlink()
        self.state.rmdir()

    def _unmount(self) -> None:
        """Removes every mount below the state folder, the newest first."""
        below = f"{self.state.resolve()}/"
        while True:
            lines = Path("/proc/self/mountinfo").read_text().splitlines()
            mounted = [place for place in (line.split()[4] for line in lines) if place.startswith(below)]
            if not mounted:
                return
            # The kernel writes blanks and the like as \040.
            self.processes.run("umount", "--lazy", mounted[-1].encode().decode("unicode_escape"))

    @staticmethod
    def _forget_ray() -> None:
        """Removes /tmp/ray, over which hosts mount their own, if it is empty and no other cluster's host uses it."""
        for path in Path("/proc").glob("[0-9]*/mountinfo"):
            with contextlib.suppress(OSError):
                if " /tmp/ray " in path.read_text():
                    return
        with contextlib.suppress(OSError):
            Path("/tmp/ray").rmdir()

    # ---- refusals

    @staticmethod
    def _refuse_all_but_root() -> None:
        if os.geteuid() != 0:
            raise UnfitError("the mini cluster needs root: it makes networks, mounts and hosts")
        lines = Path("/proc/self/status").read_text().splitlines()
        mine = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
        lacking = [name for name, bit in CAPABILITIES.items() if not mine >> bit & 1]
        if lacking:
            raise UnfitError(f"the mini cluster needs {' and '.join(lacking)}, which this container's root has not")

    def _refuse_foreign_folder(self) -> None:
        """A folder without a marker is ours only when it holds no more than the first moment of a start makes."""
        if self.state.exists() and not self._marker.exists():
            first = {"lock", self._marker.with_suffix(".new").name}
            foreign = not self.state.is_dir() or not {path.name for path in self.state.iterdir()} <= first
            if foreign and not self._marker.exists():  # another start makes the marker before anything else
                raise RefusedError(f"{self.state} is no mini cluster's folder: set MAEHPC_MINI_STATE to another")

    def _refuse(self, wanted: Settings) -> None:
        needed = NEEDED | (NEEDED_BY_ACCOUNTING if wanted.accounting else {})
        missing = sorted({package for command, package in needed.items() if shutil.which(command, path=PATH) is None})
        if missing:
            raise UnfitError(f"missing Debian packages: apt-get install {' '.join(missing)}")
        self._refuse_all_but_root()
        if Path("/etc/slurm/slurm.conf").exists():
            raise UnfitError("/etc/slurm/slurm.conf: this machine has a Slurm already; use another machine")
        self._refuse_foreign_folder()

    def _refuse_taken(self) -> None:
        """The names and numbers that the cluster would take must be free.

        Raises:
            RefusedError: which one is taken, and the variable that chooses another.
        """
        given = self.settings
        if self.network.stands():
            raise RefusedError(
                f"there is a network link {given.bridge} already: set MAEHPC_MINI_BRIDGE to another name"
            )
        if self.processes.run("ip", "-o", "addr", "show", "to", f"{given.network}.0/24").stdout:
            raise RefusedError(f"this machine is in {given.network}.0/24 already: set MAEHPC_MINI_NETWORK to another")
        for port in (given.port, given.port + 2) if given.accounting else (given.port,):
            if not _free(port):
                raise RefusedError(f"port {port} is in use: set MAEHPC_MINI_PORT to another")

    # ---- the lock

    @contextlib.contextmanager
    def _locked(self, make: bool = False) -> Iterator[None]:
        """Holds the lock of the state folder.

        Args:
            make: make the folder where there is none.

        Raises:
            FileNotFoundError: there is no folder.
        """
        path = self.state / "lock"
        while True:
            if make:
                self.state.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:
                if make:
                    continue
                raise
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever held it may have removed it: then this lock is on a file that nobody else can find.
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                break
            os.close(lock)
        self.processes.lock = lock
        try:
            yield
        finally:
            self.processes.lock = None
            os.close(lock)

    @contextlib.contextmanager
    def _changing(self, *hosts: str) -> Iterator[None]:
        """Holds the lock of a cluster that is up and has these hosts."""
        self._refuse_all_but_root()
        try:
            with self._locked():
                if not self.up():
                    raise FileNotFoundError
                self.settings = Settings.load(self._marker)
                for host in hosts:
                    if host not in self.hosts:
                        raise RefusedError(f"{host} is no host of the mini cluster: it has {', '.join(self.hosts)}")
                yield
        except FileNotFoundError:
            raise RefusedError(f"the mini cluster in {self.state} is not up: start it") from None


def _listens(door: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as caller, contextlib.suppress(OSError):
        caller.connect(str(door))
        return True
    return False


def _free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
        return True
    return False


def exports(mini: Mini) -> str:
    """Lines for a shell that point Slurm's commands at the cluster."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in mini.environment.items())


def status(mini: Mini) -> int:
    """Prints what is up; exit code 1 where the cluster is not."""
    if not mini.up():
        print(f"down: {mini.state}")
        return 1
    print(f"up: {mini.state}")
    states = mini.slurm_states()
    for host in mini.hosts:
        print(f"{host}  {mini.settings.address_of(host)}  {states.get(host, 'unknown: the controller is silent')}")
    print(exports(mini))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    start = commands.add_parser("start", help="bring the cluster up, or start what is down of it")
    start.add_argument("--hosts", type=int, choices=range(1, 10), metavar="N", help="1 to 9 (default 4)")
    start.add_argument("--accounting", action="store_true", help="with a database: sacct answers")
    for name, text in {
        "stop": "end and remove everything",
        "status": "what is up; exit code 1 where nothing is",
        "env": "the exports that point Slurm's commands at it",
        "stop-controller": "end slurmctld",
        "start-controller": "start slurmctld",
        "restart-controller": "both",
        "heal": "mend all cuts",
    }.items():
        commands.add_parser(name, help=text)
    for name, text in {
        "power-off": "the host falls silent at once",
        "power-on": "the host boots",
        "kill-slurmd": "kill -9 of the host's slurmd alone",
        "start-slurmd": "start the host's slurmd again",
    }.items():
        commands.add_parser(name, help=text).add_argument("host", metavar="HOST")
    cut = commands.add_parser("cut", help="no packet passes between two hosts")
    cut.add_argument("host", metavar="HOST")
    cut.add_argument("other", metavar="HOST")
    return made


def do(asked: argparse.Namespace, mini: Mini) -> int:
    """Carries one command out and gives its exit code."""
    match asked.command:
        case "start":
            began = time.monotonic()
            made = mini.start(asked.hosts, asked.accounting)
            print(f"# {'started in' if made else 'already up: checked in'} {time.monotonic() - began:.0f} s")
            print(exports(mini))
        case "stop":
            print("stopped" if mini.stop() else "already down")
        case "status":
            return status(mini)
        case "env":
            print(exports(mini))
        case "power-off":
            mini.power_off(asked.host)
        case "power-on":
            mini.power_on(asked.host)
        case "kill-slurmd":
            mini.kill_slurmd(asked.host)
        case "start-slurmd":
            mini.start_slurmd(asked.host)
        case "stop-controller":
            mini.stop_controller()
        case "start-controller":
            mini.start_controller()
        case "restart-controller":
            mini.restart_controller()
        case "cut":
            mini.cut(asked.host, asked.other)
        case "heal":
            mini.heal()
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line and gives the exit code."""
    asked = parser().parse_args(words)
    try:
        return do(asked, Mini())
    except MiniError as error:
        print(f"mini: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
