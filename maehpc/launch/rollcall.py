"""Which hosts of a pool have come up, and what to say of those that have not when the time for it is over.

Work begins with the hosts that are there. One that has come once counts as come, whatever befalls it later: its shards
are dealt to others, and it may come back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from maehpc.errors import RunError

NAMED = 5
"""Hosts that a sentence names."""
LOOK_S = 1.0
"""Seconds between two looks at who is there."""


@dataclass(frozen=True)
class Absent:
    """A host that has not come up.

    Attributes:
        host: its name.
        said: what it said last; None where it said nothing.
        log: what its part of the job printed into; None where there is no such file.
    """

    host: str
    said: str | None = None
    log: Path | None = None

    def __str__(self) -> str:
        return f"{self.host} ({self.said or 'it said nothing'}; {f'log {self.log}' if self.log else 'no log'})"


class RollCall:
    """Called again and again while a pool works, until all have come or the time is over.

    Args:
        label: of the job.
        hosts: names of all that the job has.
        wanted: how many of them must come.
        within_s: seconds from now in which they must.
        there: tells the names of those that are there.
        of: tells what is known of a host that did not come.
        warn: told once of hosts that are done without.
        clock: seconds.

    Attributes:
        missing: names of the hosts that have not come yet.
    """

    def __init__(
        self,
        label: str,
        hosts: Sequence[str],
        wanted: int,
        within_s: float,
        there: Callable[[], Iterable[str]],
        of: Callable[[str], Absent] = Absent,
        warn: Callable[[str], object] = lambda sentence: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._hosts, self._wanted, self._within_s = label, tuple(hosts), wanted, within_s
        self._there, self._of, self._warn, self._clock = there, of, warn, clock
        self.missing = set(hosts)
        self._begun = self._looked = clock()
        self._over = False

    def look(self) -> None:
        """Sees who has come since.

        Raises:
            RunError: the time is over, and fewer have come than must.
        """
        now = self._clock()
        late = now - self._begun >= self._within_s
        if self._over or (now - self._looked < LOOK_S and not late):
            return
        self._looked = now
        self.missing -= set(self._there())
        self._over = late or not self.missing
        if not self._over or not self.missing:
            return
        told = self._told(f"did not come up within {self._within_s:.0f} s")
        come = len(self._hosts) - len(self.missing)
        if come < self._wanted:
            raise RunError(
                f"{told}; everything computed is recorded: `maehpc resume {self._label}` tries all hosts again, and "
                f"the same submission with --min-nodes {max(come, 1)} goes on without"
            )
        self._warn(f"{told}; the pool goes on without, for {self._wanted} are enough")

    def close(self, there: Iterable[str]) -> None:
        """All work is done: hosts that have not come yet are told, for nobody has waited for them.

        Args:
            there: names of those that are there now.
        """
        if self._over:
            return
        self._over = True
        self.missing -= set(there)
        if self.missing:
            self._warn(self._told(f"had not come up when all was done, after {self._clock() - self._begun:.0f} s"))

    def _told(self, what: str) -> str:
        absent = [str(self._of(host)) for host in self._hosts if host in self.missing]
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        return f"{len(absent)} of {len(self._hosts)} hosts {what}: {', '.join(absent[:NAMED])}{more}"
