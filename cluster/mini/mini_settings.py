"""Names and numbers of a mini cluster, and the errors it gives."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


class MiniError(Exception):
    """A part of the cluster failed; the text says which."""

    exit_code = 1


class RefusedError(MiniError):
    """What was asked cannot be done as things are; nothing was changed."""

    exit_code = 2


class UnfitError(RefusedError):
    """This machine or account cannot have a mini cluster at all."""


@dataclass(frozen=True)
class Settings:
    """Names and numbers of one mini cluster; two clusters on one machine differ in all of the first five."""

    state: Path = Path("/tmp/maehpc-mini")
    bridge: str = "maehpc-b0"
    network: str = "10.77.0"
    """First three numbers of the addresses: .1 is this machine, .11 the first host."""
    letter: str = "n"
    """Hosts are called letter and number: n1, n2, ..."""
    port: int = 6817
    """Slurm's controller; the hosts' daemons take the next port, accounting the one after."""
    count: int = 4
    """How many hosts."""
    accounting: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        """The defaults, or what MAEHPC_MINI_STATE, _BRIDGE, _NETWORK, _LETTER and _PORT say."""

        def told(name: str, default: object) -> str:
            return os.environ.get(f"MAEHPC_MINI_{name}") or str(default)

        return cls(
            state=Path(told("STATE", cls.state)).absolute(),
            bridge=told("BRIDGE", cls.bridge),
            network=told("NETWORK", cls.network),
            letter=told("LETTER", cls.letter),
            port=int(told("PORT", cls.port)),
        )

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of all hosts in order."""
        return tuple(f"{self.letter}{number}" for number in range(1, self.count + 1))

    @property
    def address(self) -> str:
        """This machine on the cluster's network, where the controller listens."""
        return f"{self.network}.1"

    def address_of(self, host: str) -> str:
        """The address of a host."""
        return f"{self.network}.{11 + self.hosts.index(host)}"

    def hardware_address_of(self, host: str) -> str:
        """The host's MAC address: the same after a power cycle, so that neighbours need not learn it anew."""
        numbers = [int(part) for part in self.address_of(host).split(".")]
        return ":".join(f"{number:02x}" for number in [2, 0, *numbers])

    def space_of(self, host: str) -> str:
        """Name of the host's network namespace, and of this side's end of its cable (at most 15 characters)."""
        return f"{self.bridge}-{host}"

    def save(self, path: Path) -> None:
        """Writes the settings as JSON, whole or not at all."""
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self) | {"state": str(self.state)}))
        fresh.rename(path)

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Reads what `save` wrote."""
        values = json.loads(path.read_text())
        return cls(**(values | {"state": Path(values["state"])}))
