"""Jobs on the real cluster that only record what workers record: `real_jobs.py FOLDER begin | beat STEP | end WORD`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maehpc.launch import slurm
from maehpc.launch.record import Accepted, Attempt, Heartbeat, JobFolder, Outcome
from maehpc.launch.seat import restarts, slurm_job_id
from maehpc.launch.status import Row, read

if TYPE_CHECKING:
    import pytest


def accept(job: JobFolder, job_id: str, scheduler: str = "slurm", token: str | None = None) -> str:
    token = token or uuid.uuid4().hex
    accepted = Accepted.model_validate({"job_id": job_id, "scheduler": scheduler, "logs": str(job.logs)})
    job.accept(job.intend(token), accepted)
    return token


def ended(job: JobFolder, outcome: str, reason: str = "because") -> None:
    job.write_outcome(job.newest_attempt(), Outcome.model_validate({"outcome": outcome, "reason": reason}))


class Real:
    """Jobs of a few seconds on the four hosts; what they record is what workers record."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.ids: list[str] = []

    def submit(self, job: JobFolder, work: str, *options: str, lost: bool = False) -> str:
        """Hands a job to Slurm; its work is shell, with `record begin`, `record beat STEP` and `record end WORD`."""
        script = self.results / f"{uuid.uuid4().hex}.sh"
        python = f"{sys.executable} {Path(__file__)} {job.path}"
        script.write_text(f'#!/bin/bash\nrecord() {{ {python} "$@"; }}\n{work}\n')
        token = uuid.uuid4().hex
        intent = job.intend(token)
        words = ["sbatch", "--parsable", "-J", "maehpc-test", "--comment", f"maehpc:{token}", "-o", f"{script}.log"]
        done = subprocess.run([*words, *options, str(script)], capture_output=True, text=True, check=True)
        job_id = done.stdout.strip()
        self.ids.append(job_id)
        if not lost:
            job.accept(intent, Accepted(job_id=job_id, scheduler="slurm", logs=str(job.logs)))
        return job_id

    def until(self, job: JobFolder, *states: str, seconds: float = 60) -> Row:
        """Waits for a state, and holds what is seen on the way to be nothing that the job never was."""
        deadline = time.monotonic() + seconds
        seen: list[str] = []
        while time.monotonic() < deadline:
            found = read([job]).rows[0]
            seen += [str(found.state)] if seen[-1:] != [str(found.state)] else []
            if found.state in states:
                self.seen = seen
                return found
            time.sleep(0.1)
        raise AssertionError(f"not {states} within {seconds} s: {seen}, {found.sentence}, {found.said}")


def real_jobs(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Real]:
    """Body of a fixture: a results folder that all hosts see; what was submitted is ended afterwards."""
    for name, value in mini.environment.items():
        monkeypatch.setenv(name, value)
    folder = Path(mini.shared) / f"status-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    made = Real(folder)
    yield made
    slurm.cancel(made.ids)
    shutil.rmtree(folder, ignore_errors=True)


def record(job: JobFolder, word: str, rest: list[str]) -> None:
    """What a rank writes, by the environment of a Slurm job."""
    if word == "begin":
        job_id = slurm_job_id(os.environ)
        assert job_id is not None
        hosts = (os.uname().nodename,)
        job.begin_attempt(Attempt(job_id=job_id, restart=restarts(os.environ), hosts=hosts, ranks=1, pid=os.getpid()))
    elif word == "beat":
        done = int(rest[0])
        beat = Heartbeat(sequence=done, phase="pretrain", dataset="digits", done=done, total=100, unit="step")
        job.beat(job.newest_attempt(), beat)
    else:
        ended(job, rest[0], f"it is {rest[0]}")


if __name__ == "__main__":
    record(JobFolder(Path(sys.argv[1])), sys.argv[2], sys.argv[3:])
