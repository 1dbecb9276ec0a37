"""The network of a mini cluster: a bridge on this side, and a cable from it into each host's network namespace."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mini_processes import Processes, ProcessId
from mini_settings import Settings

HOSTS = Path("/etc/hosts")
NOBODY = "02:00:00:00:00:00"
"""A hardware address that no host has."""


@dataclass(frozen=True)
class Network:
    """What `ip` makes and removes for one cluster, and the names in /etc/hosts."""

    settings: Settings
    processes: Processes

    def stands(self) -> bool:
        """Whether the bridge is there: after a boot of the machine it is not."""
        return Path("/sys/class/net", self.settings.bridge).exists()

    def make(self) -> None:
        """The bridge and the names; hosts come by `connect`."""
        given = self.settings
        self.processes.run("ip", "link", "add", given.bridge, "type", "bridge")
        self.processes.run("ip", "addr", "add", f"{given.address}/24", "dev", given.bridge)
        self.processes.run("ip", "link", "set", given.bridge, "up")
        self._write_names(given.hosts)

    def remove(self) -> None:
        """Everything that `make` and `connect` made, as far as it is there."""
        for host in self.settings.hosts:
            self.disconnect(host)
        self.processes.run("ip", "link", "del", self.settings.bridge, check=False)
        self._write_names(())

    def connect(self, host: str) -> None:
        """A new network for a host."""
        given, space = self.settings, self.settings.space_of(host)
        self.processes.run("ip", "netns", "add", space)
        inner = ("peer", "name", "eth0", "address", given.hardware_address_of(host), "netns", space)
        self.processes.run("ip", "link", "add", space, "type", "veth", *inner)
        self.processes.run("ip", "link", "set", space, "master", given.bridge, "up")
        self._inside(host, "addr", "add", f"{given.address_of(host)}/24", "dev", "eth0")
        self._inside(host, "link", "set", "eth0", "up")
        self._inside(host, "link", "set", "lo", "up")

    def disconnect(self, host: str) -> None:
        """Removes a host's network. Its peers are told nothing: the cable goes before the host's connections do."""
        self.processes.run("ip", "link", "del", self.settings.space_of(host), check=False)
        self.processes.run("ip", "netns", "del", self.settings.space_of(host), check=False)

    def silence(self, host: str) -> None:
        """Nothing that the host sends arrives any more."""
        self.processes.run("ip", "link", "set", self.settings.space_of(host), "down", check=False)

    def cut(self, one: str, other: str) -> None:
        """Packets between two hosts go to an address that nobody has; neither is told, as on a broken line."""
        for here, there in ((one, other), (other, one)):
            neighbour = (self.settings.address_of(there), "lladdr", NOBODY, "nud", "permanent")
            self._inside(here, "neigh", "replace", *neighbour, "dev", "eth0")

    def inhabitants(self, host: str) -> list[ProcessId]:
        """Every process in the host's network."""
        told = self.processes.run("ip", "netns", "pids", self.settings.space_of(host), check=False).stdout
        found = [ProcessId.of(int(pid)) for pid in told.split()]
        return [one for one in found if one is not None]

    def heal(self) -> None:
        """Mends all cuts."""
        for host in self.settings.hosts:
            if Path("/run/netns", self.settings.space_of(host)).exists():
                self._inside(host, "neigh", "flush", "dev", "eth0", "nud", "permanent")

    def _inside(self, host: str, *words: str) -> None:
        self.processes.run("ip", "-n", self.settings.space_of(host), *words)

    def _write_names(self, hosts: Sequence[str]) -> None:
        """Puts the hosts into /etc/hosts in place of what an earlier start wrote there."""
        sign = f"# maehpc-mini {self.settings.state}"
        # The lock is on the folder, because the file is replaced; another cluster may be starting.
        folder = os.open(HOSTS.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            old = HOSTS.read_text().splitlines(keepends=True)
            new = [line for line in old if not line.rstrip("\n").endswith(sign)]
            new += [f"{self.settings.address_of(host)} {host} {sign}\n" for host in hosts]
            if new != old:
                _replace(HOSTS, "".join(new))
        finally:
            os.close(folder)


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.maehpc-mini")
    fresh.write_text(text)
    shutil.copystat(path, fresh)
    try:
        fresh.rename(path)
    except OSError:
        # In a container /etc/hosts is a mount of its own, which cannot be replaced.
        path.write_text(text)
        fresh.unlink()
