"""Daemons that outlive the command which started them, and are ended only while they are surely the same processes."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mini_settings import MiniError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The daemon-to-be writes its own line of /proc first, so that no kill of the starter leaves a process without a record.
# Its standard input is the lock until then: the next command waits until the record is there.
LAUNCH = 'read -r line </proc/self/stat; echo "$line" >"$1"; shift; exec "$@" </dev/null'


@dataclass(frozen=True)
class ProcessId:
    """A process that is never mistaken for a later one with the same number."""

    pid: int
    start: int
    """Clock ticks from boot to the start of the process: field 22 of /proc/PID/stat."""

    @classmethod
    def parse(cls, line: str) -> tuple[ProcessId, str, int] | None:
        """Id, state letter and parent in a line of /proc/PID/stat; None for half a line."""
        head, _, tail = line.rpartition(")")
        values = tail.split()
        if len(values) < 20:
            return None
        return cls(int(head.split(" ", 1)[0]), int(values[19])), values[0], int(values[1])

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this number now; None where there is none or it has ended."""
        with contextlib.suppress(OSError):
            found = cls.parse(Path(f"/proc/{pid}/stat").read_text())
            if found is not None and found[1] not in "ZX":
                return found[0]
        return None

    def alive(self) -> bool:
        """Whether it still runs."""
        return ProcessId.of(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(self.pid)
            try:
                # Asked after the handle was opened: from here on it cannot come to mean another process.
                if self.alive():
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)

    def children(self) -> list[ProcessId]:
        """The processes whose parent it is."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parsed = ProcessId.parse(path.read_text())
                if parsed is not None and parsed[2] == self.pid and parsed[1] not in "ZX":
                    found.append(parsed[0])
        return found


def until(
    true: Callable[[], object],
    seconds: float,
    trouble: Callable[[], str],
    hope: Callable[[], object] = lambda: True,
) -> None:
    """Waits until a question is answered with yes.

    Raises:
        MiniError: the trouble, when the seconds are over or hope is lost.
    """
    end = time.monotonic() + seconds
    while not true():
        if not hope():
            raise MiniError(trouble())
        if time.monotonic() > end:
            raise MiniError(f"{trouble()} (waited {seconds:g} s)")
        time.sleep(0.05)


def boot() -> str:
    """A text that changes when the machine boots: process numbers mean nothing after that."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass
class Processes:
    """One cluster's processes by name; below `state`, run/NAME.process is the record and log/NAME.out the output."""

    state: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    lock: int | None = None
    """File descriptor of the lock; every child holds it as its standard input while it changes something."""

    def log(self, name: str) -> Path:
        """The log that a daemon writes itself."""
        return self.state / "log" / f"{name}.log"

    def record(self, name: str) -> Path:
        """Where the process' line of /proc stands."""
        return self.state / "run" / f"{name}.process"

    def alive(self, name: str) -> ProcessId | None:
        """The process that was launched under this name, if it still runs."""
        with contextlib.suppress(FileNotFoundError):
            if (self.state / "run" / "boot").read_text() != boot():
                return None
            parsed = ProcessId.parse(self.record(name).read_text())
            if parsed is not None and parsed[0].alive():
                return parsed[0]
        return None

    def launch(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> None:
        """Starts a process that outlives this one, and waits until its record is written."""
        record = self.record(name)
        record.unlink(missing_ok=True)
        (self.state / "run" / "boot").write_text(boot())
        given = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C"} | dict(self.environment) | dict(environment or {})
        with self.log(name).with_suffix(".out").open("a") as output:
            subprocess.run(
                ["setsid", "--fork", "sh", "-c", LAUNCH, "sh", str(record), *command],
                stdin=self.lock,
                stdout=output,
                stderr=output,
                env=given,
                cwd="/",
                check=True,
            )
        until(
            lambda: record.exists() and record.read_text().endswith("\n"),
            10,
            lambda: self.trouble(name, "was not started"),
        )

    def end(self, name: str, number: signal.Signals = signal.SIGKILL, patience_s: float = 10) -> None:
        """Ends a process by a signal, and by SIGKILL when it takes too long."""
        found = self.alive(name)
        if found is None:
            return
        found.send(number)
        with contextlib.suppress(MiniError):
            until(lambda: not found.alive(), patience_s, lambda: name)
        found.send(signal.SIGKILL)
        until(lambda: not found.alive(), 10, lambda: f"{name} (process {found.pid}) does not end")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a tool to its end.

        Raises:
            MiniError: it failed and `check` is set.
        """
        given = {"PATH": PATH, "LC_ALL": "C"}
        done = subprocess.run(command, stdin=self.lock, capture_output=True, text=True, env=given, check=False)
        if check and done.returncode != 0:
            raise MiniError(f"`{shlex.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def wait(self, name: str, true: Callable[[], object], seconds: float) -> None:
        """Waits until a process answers.

        Raises:
            MiniError: it does not in time, or has ended; with the end of its logs.
        """
        until(true, seconds, lambda: self.trouble(name, "does not answer"), lambda: self.alive(name))

    def trouble(self, name: str, what: str) -> str:
        """A sentence with the end of the process' logs, because a start that fails removes them."""
        lines: list[str] = []
        for path in (self.log(name), self.log(name).with_suffix(".out")):
            if path.exists():
                lines += path.read_text(errors="replace").splitlines()[-5:]
        return f"{name} {what}: {' | '.join(lines) or 'it wrote no log'}"
