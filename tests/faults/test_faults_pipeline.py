"""The whole study on four hosts while an urgent job takes them away twice and one of them loses power."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_jobs import Study, until
from test_faults_interruptions import urgent

from maehpc.launch.record import JobFolder, jobs_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SETTINGS = {
    "datasets": ["retinamnist"],
    "data": {"source_size": 28, "image_size": 28, "normalization": "dataset"},
    "encoder": {"name": "vit-tiny", "patch_size": 7, "width": 32, "depth": 2, "heads": 2},
    "explain": {"images": 200, "sensitivity": {"samples": 60}, "batch_size": 8, "maps": {"shard_images": 8}},
}
AT_WORK = {"starting", "running", "stopping"}
TO_COME = {"waiting", "continuing", "held"}
TRUE_OF = {
    "PENDING": TO_COME,
    "RUNNING": AT_WORK | TO_COME,  # a requeued job starts: its new attempt has not yet begun
    "COMPLETING": AT_WORK | TO_COME | {"done"},
    "COMPLETED": {"done"},
    "": {"done"},  # Slurm forgets a job some minutes after its end
}
"""What `status` may say while Slurm says so, before and after it was asked."""


class Witness(threading.Thread):
    """Asks `maehpc status` again and again, and holds what it says to Slurm's own word."""

    def __init__(self, study: Study) -> None:
        super().__init__(daemon=True)
        self._study = study
        self._ended = threading.Event()
        self.looks = 0
        self.seen: set[str] = set()
        self.untrue: list[str] = []

    def slurm(self) -> dict[str, str]:
        """Slurm's word for each job of the study, "" where it has forgotten one; earlier tests' jobs it still knows."""
        words = self._study.slurm("squeue", "--noheader", "--states=all", "--format=%i %T")
        told = dict(line.split() for line in words.splitlines())
        return {job: told.get(job, "") for job in self._study.job_ids()}

    def run(self) -> None:
        try:
            while not self._ended.wait(2.0):
                self._look()
        except Exception as error:  # a thread that ended in silence would have seen nothing untrue
            self.untrue.append(f"the witness was ended by {error!r}")

    def _look(self) -> None:
        before = self.slurm()
        told = self._study.maehpc("status", str(self._study.results), "--all", "--json")
        after = self.slurm()
        jobs = json.loads(told.stdout)["jobs"]
        assert {job["job_id"] for job in jobs} == before.keys()
        for job in jobs:
            state, word = job["state"], before[job["job_id"]]
            self.looks += 1
            self.seen.add(state)
            if word == after[job["job_id"]] and state not in TRUE_OF.get(word, set()):
                self.untrue.append(f"{job['job']}: {state} while Slurm says {word} ({job['sentence']})")

    def end(self) -> None:
        self._ended.set()
        self.join()


def begun(study: Study, stage: str, attempt: int) -> JobFolder | None:
    """The stage's job, once that attempt of it has finished something."""
    for job in jobs_of(study.experiment):
        beat = job.heartbeat(attempt) if job.record().stage == stage else None
        if beat is not None and beat.phase == stage and (beat.done or 0) > 0:
            return job
    return None


def test_a_pipeline_that_is_preempted_twice_and_loses_a_host(
    study: Callable[..., Study], mini: Any, real_data: Path
) -> None:
    one = study(profile={"nodes": 4}, settings=SETTINGS, pretrain={"epochs": 16})
    one.submit("--nodes", "4", stage="pipeline")
    jobs = jobs_of(one.experiment)
    assert [job.record().stage for job in jobs] == ["pretrain", "finetune", "explain", "report"]
    witness = Witness(one)
    witness.start()
    try:
        pretraining = until(lambda: begun(one, "pretrain", 1), 300, one.told)
        urgent(one, nodes=4)
        until(lambda: begun(one, "pretrain", 2), 300, one.told)
        victim = pretraining.attempt(2).hosts[-1]
        mini.power_off(victim)
        until(lambda: mini.slurm_states()[victim].startswith("down"), 90, one.told)
        mini.power_on(victim)
        explaining = until(lambda: begun(one, "explain", 1), 400, one.told)
        urgent(one, nodes=4)
        until(lambda: explaining.newest_attempt() == 2, 200, one.told)
        until(lambda: all(job.outcome(job.newest_attempt()) for job in jobs), 400, one.told)
        until(lambda: set(witness.slurm().values()) <= {"COMPLETED", ""}, 60, one.told)
    finally:
        witness.end()
    assert not witness.untrue, "\n".join(witness.untrue)
    assert witness.looks > 20 and {"running", "waiting", "done"} <= witness.seen
    assert [job.outcome(job.newest_attempt()).outcome for job in jobs] == ["done"] * 4
    assert pretraining.newest_attempt() >= 3
    assert explaining.outcome(1).outcome == "interrupted"
    log = one.maehpc("logs", f"{one.name}/pretrain", "--results", str(one.results)).stdout
    # A start that met the host coming back may have ended before any rank had begun.
    began = [number for number, attempt in pretraining.attempts().items() if attempt.ranks]
    whole = {1, 2, pretraining.newest_attempt()}
    assert whole <= set(began)
    for attempt in whole:
        assert f"attempt {attempt}, 4 ranks" in log
    assert (one.experiment.root / "report" / "index.html").is_file()
    assert one.maehpc("verify", str(one.results)).returncode == 0
