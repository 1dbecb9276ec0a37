"""A site with an accounting database: what Slurm itself has forgotten, the database still tells."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from launch_jobs import new_job
from mini_cluster import SPARE, Mini, running
from real_jobs import Real, real_jobs
from submit_jobs import place, queued, request

from maehpc.errors import InputError
from maehpc.launch import slurm
from maehpc.launch.chain import carry_out
from maehpc.launch.status import read

pytestmark = pytest.mark.slow


@pytest.fixture
def counted() -> Iterator[Mini]:
    """A cluster with accounting beside the one that has none."""
    with running(Mini(SPARE), accounting=True) as up:
        yield up


@pytest.fixture
def real(counted: Mini, monkeypatch: pytest.MonkeyPatch) -> Iterator[Real]:
    yield from real_jobs(counted, monkeypatch)


def until(true: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_quota_that_slurm_enforces_takes_the_chain_back(counted: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs may be submitted at once; a pipeline needs four."""
    with place(counted, monkeypatch) as folder:
        for words in (["account", "lab"], ["user", "root", "account=lab", "maxsubmitjobs=2"]):
            subprocess.run(["sacctmgr", "--immediate", "add", *words], check=True, capture_output=True, timeout=60)
        counted.stop_controller()
        configuration = counted.state / "slurm.conf"
        configuration.write_text(f"{configuration.read_text()}\nAccountingStorageEnforce=limits\n")
        counted.start_controller()
        profile = {"account": "lab"}
        with pytest.raises(InputError, match="quota of submitted jobs") as refused:
            carry_out(request(folder / "results", stage="pipeline", profile=profile))
        assert "AssocMaxSubmitJobLimit" in str(refused.value)
        assert not (folder / "results").exists() and slurm.queue() == []
        carry_out(request(folder / "results", profile=profile))
        assert len(queued(folder)) == 1, "one job is within the quota"


def test_an_end_that_slurm_has_forgotten_is_told_by_the_accounting(real: Real, counted: Mini) -> None:
    failed, done, silent = (new_job(real.results, name) for name in ("failed", "done", "silent"))
    ids = [
        real.submit(failed, "record begin; exit 3"),
        real.submit(done, "record begin; record end done"),
        real.submit(silent, "record begin"),
    ]

    def ends() -> list[tuple[str, str]]:
        known = slurm.accounting(ids) or {}
        return [(known[job_id].state, known[job_id].name) for job_id in ids if job_id in known]

    # The controller tells the names of short jobs seconds after their ends; until then they are called "allocation".
    until(lambda: ends() == [(end, "maehpc-test") for end in ("FAILED", "COMPLETED", "COMPLETED")], 60)
    # Minutes after a job's end Slurm forgets it; a controller whose memory is lost has forgotten all at once.
    counted.stop_controller()
    for path in (counted.state / "controller").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    counted.start_controller()
    until(lambda: not slurm.queue(ended=True), 30)

    rows = {row.job.path.parent.parent.name: row for row in read([failed, done, silent]).rows}
    assert (rows["failed"].state, rows["failed"].sentence) == ("failed", "Slurm says FAILED (exit code 3)")
    assert rows["done"].state == "done"
    # An exit without an error is no word of the job's own.
    assert rows["silent"].state == "unknown"
    assert rows["silent"].sentence == "Slurm says COMPLETED, but attempt 1 left no word of its end"
    assert rows["failed"].said is not None and rows["failed"].said.source == "sacct"
