"""A small study on the four-host Slurm: submitted by the real command line, disturbed, held to an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tiny import SETTINGS

from maehpc.experiment import Experiment
from maehpc.launch.record import Heartbeat, JobFolder, Outcome, jobs_of

PROFILE = {
    "kind": "slurm",
    "extends": "mini",
    "nodes": 2,
    "gpus_per_node": 1,
    "tasks_per_node": 1,
    "time_min": 20,
    "signal_lead_s": 10,
    "collective_timeout_s": 90,
}
PRETRAIN = {
    **SETTINGS["pretrain"],
    "epochs": 24,
    "images": 1000,
    "batch_size": 32,
    "checkpoint": {"every_steps": 50},
}
"""31 steps an epoch, 744 in all: some fifteen seconds for two ranks on two cores."""

MIDDLE = 160
"""A step with checkpoints behind it, and seconds of work before it: there it is that most tests disturb the run."""

RESULT = ["encoder.safetensors", "mae.safetensors", "reconstructions.safetensors", "metrics.jsonl", "done.json"]


def until(true: Callable[[], Any], seconds: float, what: Callable[[], str] | str) -> Any:
    """Waits until something holds and returns it; fails with what is told otherwise.

    The seconds are those of a quiet machine; a loaded one gets twice as many, for the limit is there to end a hang.
    """
    deadline = time.monotonic() + 2 * seconds
    while time.monotonic() < deadline:
        found = true()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {2 * seconds} s: {what if isinstance(what, str) else what()}")


@dataclass
class Study:
    """A results folder on the cluster and what is done with it."""

    mini: Any
    results: Path
    name: str = "study"
    profile: dict[str, Any] = field(default_factory=dict)
    pretrain: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def experiment(self) -> Experiment:
        return Experiment(self.results / self.name)

    @property
    def folder(self) -> Path:
        """Of the pretraining."""
        return self.experiment.stage("pretrain", "digits")

    def maehpc(self, *words: str, check: bool = True, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """The real command, in a process of its own."""
        command = [sys.executable, "-m", "maehpc.cli.main", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=seconds, cwd=self.results.parent
        )
        if check:
            assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.mini.environment, "OMP_NUM_THREADS": "1"}

    def submit(self, *words: str, stage: str = "pretrain", check: bool = True) -> subprocess.CompletedProcess[str]:
        """`maehpc submit STAGE`, with the study's recipe and profile."""
        recipe = self.recipe()
        profile = self.results.parent / f"{self.name}-profile.yaml"
        profile.write_text(yaml.safe_dump({**PROFILE, **self.profile}))
        options = ("--recipe", str(recipe), "--cluster", str(profile), "--name", self.name)
        return self.maehpc("submit", stage, *options, "--results", str(self.results), *words, check=check)

    def run(self, stage: str) -> None:
        """`maehpc run STAGE` on this machine, by one thread."""
        options = ("--recipe", str(self.recipe()), "--name", self.name, "--results", str(self.results))
        self.maehpc("run", stage, *options, "--threads", "1", seconds=300)

    def recipe(self) -> Path:
        """The study's recipe, written to a file."""
        self.results.mkdir(parents=True, exist_ok=True)
        settings = {**SETTINGS, "datasets": ["digits"], "pretrain": {**PRETRAIN, **self.pretrain}, **self.settings}
        path = self.results.parent / f"{self.name}-recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    @property
    def job(self) -> JobFolder:
        """The newest job."""
        return jobs_of(self.experiment)[-1]

    @property
    def job_id(self) -> str:
        """Slurm's id of the newest submission that it has accepted."""
        accepted = [one.accepted for one in self.job.submissions() if one.accepted]
        return accepted[-1].job_id

    def slurm(self, *words: str) -> str:
        """One of Slurm's own commands."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    @contextmanager
    def queue_held(self) -> Iterator[None]:
        """Jobs that run go on, and none starts: what is queued meanwhile can be changed before it begins."""
        partition = f"partitionname={self.profile.get('partition', 'gpu')}"
        self.slurm("scontrol", "update", partition, "state=DOWN")
        try:
            yield
        finally:
            self.slurm("scontrol", "update", partition, "state=UP")

    def state(self) -> str:
        """Slurm's word for the newest submission."""
        shown = self.slurm("scontrol", "show", "job", self.job_id)
        return shown.split("JobState=")[1].split()[0]

    def beat(self) -> Heartbeat | None:
        newest = self.job.newest_attempt()
        return self.job.heartbeat(newest) if newest else None

    def reached(self, step: int = MIDDLE, attempt: int = 1, seconds: float = 90) -> None:
        """Waits until an attempt has finished so many steps of the pretraining, with a checkpoint behind it."""

        def there() -> bool:
            if self.job.newest_attempt() < attempt:
                return False
            beat = self.beat()
            saved = any((self.folder / "checkpoints").glob("step-*"))
            return beat is not None and beat.phase == "pretrain" and (beat.done or 0) >= step and saved

        until(there, seconds, self.told)

    def outcome(self) -> Outcome | None:
        newest = self.job.newest_attempt()
        return self.job.outcome(newest) if newest else None

    def ended(self, *states: str, seconds: float = 180) -> str:
        """Waits until Slurm has ended the job, in one of these states."""
        found = until(lambda: self.state() in (*states, "FAILED") and self.state(), seconds, self.told)
        assert found in states, self.told()
        return str(found)

    def completed(self, seconds: float = 240) -> None:
        """Waits for the end, and holds every word about it to every other."""
        self.ended("COMPLETED", seconds=seconds)
        outcome = self.outcome()
        assert outcome is not None and outcome.outcome == "done", self.told()

    def rank_pid(self, rank: int) -> int:
        """The process of one rank of the newest submission, as this side of the hosts' walls numbers it."""
        wanted = {f"SLURM_PROCID={rank}", f"SLURM_JOB_ID={self.job_id}"}
        for host in self.mini.hosts:
            for pid in self.mini.process_ids(host):
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                    environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                # srun, too, has those words and variables: of the batch step, whose task is number 0.
                if "maehpc.launch.worker" in words and Path(words[0]).name != "srun" and wanted <= set(environment):
                    return int(pid)
        raise AssertionError(f"rank {rank} of job {self.job_id} is not there\n{self.told()}")

    def at_work(self) -> bool:
        """Whether a rank of the newest submission lives."""
        for rank in (0, 1):
            with suppress(AssertionError):
                return bool(self.rank_pid(rank))
        return False

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to one rank."""
        os.kill(self.rank_pid(rank), number)

    def end(self) -> None:
        """Cancels all jobs of the study, and waits until Slurm has let go of them."""
        words = ("squeue", "--noheader", "--format=%i", f"--jobs={','.join(self.job_ids())}")
        if not self.job_ids():
            return
        subprocess.run(["scancel", *self.job_ids()], env=self.environment, check=False, timeout=60)

        def gone() -> bool:
            return not subprocess.run(words, capture_output=True, env=self.environment, timeout=60).stdout

        until(gone, 60, self.told)

    def job_ids(self) -> list[str]:
        """Slurm's ids of all submissions."""
        submissions = [one for job in jobs_of(self.experiment) for one in job.submissions()]
        return [one.accepted.job_id for one in submissions if one.accepted]

    def told(self) -> str:
        """Everything that helps to see why a test fails."""
        words = [f"squeue: {self.slurm('squeue', '-a')}"]
        for job in jobs_of(self.experiment):
            newest = job.newest_attempt()
            words.append(f"{job.label}: attempts {job.attempts()}")
            words.append(f"outcomes {[job.outcome(number) for number in range(1, newest + 1)]}")
            words.append(f"heartbeat {job.heartbeat(newest) if newest else None}")
            words += [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(job.logs.glob("*"))]
        return "\n".join(words)

    def log(self) -> str:
        """All that the ranks and the batch script printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.job.logs.glob("*")))


def same_result(found: Study, expected: Study) -> None:
    """The final weights and the log of losses are those of the undisturbed run, bit by bit."""
    for name in RESULT:
        assert (found.folder / name).read_bytes() == (expected.folder / name).read_bytes(), f"{name}\n{found.told()}"
