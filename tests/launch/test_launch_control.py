"""Ending jobs and letting them go on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launch_jobs import new_job, start
from real_jobs import Real, accept, ended, real_jobs

from maehpc.errors import InputError, RunError
from maehpc.launch import slurm
from maehpc.launch.control import cancel, dependents, resume
from maehpc.launch.named import jobs_below
from maehpc.launch.record import JobFolder
from maehpc.launch.slurm import SlurmError
from maehpc.launch.snapshot import take_snapshot
from maehpc.launch.status import read


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def told() -> list[str]:
    return []


def finished(root: Path, outcome: str, **more: Any) -> JobFolder:
    """A job that a local controller ran on this host, and that ended so."""
    job = new_job(root, profile={"kind": "local"}, **more)
    accept(job, "1", "local")
    number = start(job, "1")
    path = job.path / "attempts" / f"{number:04d}.json"
    path.write_text(path.read_text().replace('"n1"', f'"{os.uname().nodename}"'))
    ended(job, outcome)
    return job


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process that carries a token, as a local job's controller does."""
    made: list[subprocess.Popen[bytes]] = []

    def begin(token: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", "import time; time.sleep(60)", "maehpc.launch.local", str(tmp_path), token]
        made.append(subprocess.Popen(words))
        return made[-1]

    yield begin
    for process in made:
        process.kill()
        process.wait()


def test_cancelling_what_has_ended_says_so(tmp_path: Path, told: list[str]) -> None:
    jobs = [finished(tmp_path, "done"), finished(tmp_path, "failed"), new_job(tmp_path)]
    assert cancel(jobs, tmp_path, told.append) == []
    assert told[:2] == [
        "tiny/0001-pretrain: it has ended already (done)",
        "tiny/0002-pretrain: it has ended already (failed)",
    ]
    assert told[2].startswith("tiny/0003-pretrain: nothing to end; it was never submitted")
    assert not any(job.cancelled for job in jobs)


def test_cancelling_a_local_job_ends_its_controller_and_what_waits_for_it(
    tmp_path: Path, told: list[str], controller: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    job = new_job(tmp_path)
    after = new_job(tmp_path, stage="finetune", after=(str(job.path),))
    last = new_job(tmp_path, stage="explain", after=(str(after.path),))
    apart = new_job(tmp_path, name="other")
    processes = {}
    for one in (job, after, last, apart):
        token = uuid.uuid4().hex
        processes[one] = controller(token)
        accept(one, str(processes[one].pid), "local", token)
    asked = cancel([job], tmp_path, told.append)
    assert [row.job for row in asked] == [job, after, last]
    assert [processes[one].wait(10) for one in (job, after, last)] == [-15, -15, -15]
    assert processes[apart].poll() is None
    assert [one.cancelled for one in (job, after, last, apart)] == [True, True, True, False]
    assert told == [
        "tiny/0001-pretrain: asked to end (it was waiting)",
        "tiny/0002-finetune: asked to end, since it waits for a job that will not succeed",
        "tiny/0003-explain: asked to end, since it waits for a job that will not succeed",
    ]
    assert [row.state for row in read([job, after, last]).rows] == ["cancelled"] * 3


def test_a_process_that_got_the_id_of_a_controller_is_left_alone(
    tmp_path: Path, told: list[str], controller: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    mine, token = controller("mine"), uuid.uuid4().hex
    job = new_job(tmp_path)
    accept(job, str(controller("foreign").pid), "local")
    accept(job, str(mine.pid), "local", "mine")
    job.mark_cancelled()
    assert token
    cancel([job], tmp_path, told.append)
    assert mine.wait(10) == -15
    time.sleep(0.2)
    foreign = job.submissions()[0].accepted
    assert foreign is not None
    assert Path(f"/proc/{foreign.job_id}/cmdline").read_bytes().count(b"foreign") == 1


def test_a_local_job_of_another_host(tmp_path: Path, told: list[str]) -> None:
    job = new_job(tmp_path)
    accept(job, "1", "local")
    start(job, "1")
    with pytest.raises(RunError, match="only n1 n2 could say"):
        cancel([job], tmp_path, told.append)
    with pytest.raises(InputError, match="resume it there"):
        resume([job], tmp_path, told.append)
    assert not job.cancelled
    assert told == []


def test_without_slurm_nothing_is_marked(tmp_path: Path, told: list[str], no_slurm: None) -> None:
    job = new_job(tmp_path)
    accept(job, "5")
    with pytest.raises(SlurmError, match="no squeue on the PATH"):
        cancel([job], tmp_path, told.append)
    with pytest.raises(SlurmError, match="no squeue on the PATH"):
        resume([job], tmp_path, told.append)
    assert not job.cancelled


def test_who_waits_for_whom(tmp_path: Path) -> None:
    first, apart = new_job(tmp_path), new_job(tmp_path)
    second = new_job(tmp_path, after=(str(first.path),))
    third = new_job(tmp_path, after=(str(second.path), str(apart.path)))
    rows = {row.job: row for row in read([first, apart, second, third]).rows}
    found = dependents([rows[first]], list(rows.values()))
    assert [row.job for row in found] == [second, third]
    assert [row.job for row in dependents([rows[apart]], list(rows.values()))] == [third]
    assert dependents([rows[third]], list(rows.values())) == []


def test_what_cannot_be_resumed(
    tmp_path: Path, told: list[str], controller: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    done = finished(tmp_path, "done")
    failed = finished(tmp_path, "failed", stage="finetune")
    after = finished(tmp_path, "failed", stage="explain", after=(str(done.path), str(failed.path)))
    running = new_job(tmp_path)
    accept(running, str(controller("t").pid), "local", "t")
    for job, why in (
        (done, "is done; submit it anew"),
        (running, "it goes on by itself"),
        (after, "0003-explain needs tiny/0002-finetune, which is failed; resume that one first"),
    ):
        with pytest.raises(InputError, match=why):
            resume([job], tmp_path, told.append)
    assert resume([done, running], tmp_path, told.append, every=True) == []
    assert told == ["there is nothing to resume: no job has failed, was cancelled, is held or unknown"]


@pytest.fixture
def real(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Real]:
    yield from real_jobs(mini, monkeypatch)


@pytest.mark.slow
def test_real_cancel_of_a_chain(real: Real, told: list[str]) -> None:
    first, second = new_job(real.results), new_job(real.results, stage="finetune")
    second.write_record(second.record().model_copy(update={"after": (str(first.path),)}))
    # What a rank does when it is told to end: it saves, looks whether a person asked for it, and leaves word.
    saved = "record end interrupted; exit 0"
    work = f'trap "{saved}" TERM; record begin; record beat 5; while sleep 0.2; do :; done'
    job_id = real.submit(first, work, "--signal=B:TERM@10")
    real.submit(second, "record begin", "-d", f"afterok:{job_id}", "--kill-on-invalid-dep=no")
    real.until(first, "running")
    cancel([first], real.results, told.append)
    assert first.cancelled and second.cancelled
    assert told == [
        "tiny/0001-pretrain: asked to end (it was running)",
        "tiny/0002-finetune: asked to end, since it waits for a job that will not succeed",
    ]
    real.until(first, "cancelled")
    assert set(real.seen) <= {"stopping", "cancelled"}
    real.until(second, "cancelled")
    told.clear()
    assert cancel([first], real.results, told.append) == []
    assert told == ["tiny/0001-pretrain: it has ended already (cancelled)"]


@pytest.mark.slow
def test_real_held_job_is_released(real: Real, told: list[str]) -> None:
    job = new_job(real.results)
    real.submit(job, "record begin; record beat 1; sleep 60", "--hold")
    real.until(job, "held")
    assert resume([job], real.results, told.append) == [job]
    assert "was released" in told[0]
    real.until(job, "running")
    with pytest.raises(InputError, match="is running; it goes on by itself"):
        resume([job], real.results, told.append)


@pytest.mark.slow
def test_real_resume_submits_again_and_what_waits_for_it_waits_anew(real: Real, told: list[str]) -> None:
    code = take_snapshot(real.results)
    changes = {"code": str(code.path), "code_digest": code.digest, "nodes": 1}
    first, second = new_job(real.results, **changes), new_job(real.results, stage="finetune", **changes)
    second.write_record(second.record().model_copy(update={"after": (str(first.path),)}))
    before = first.record()
    old = real.submit(first, "record begin; record end failed; exit 1")
    waiting = real.submit(second, "record begin", "-d", f"afterok:{old}", "--kill-on-invalid-dep=no")
    real.until(first, "failed")
    deadline = time.monotonic() + 30
    while not read([second]).rows[0].never:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert resume([first, second], real.results, told.append, every=True) == [first, second]
    new = first.submissions()[-1].accepted
    assert new is not None
    real.ids.append(new.job_id)
    assert new.job_id != old
    assert told[0] == f"tiny/0001-pretrain: submitted again as job {new.job_id} (it was failed)"
    assert told[1] == f"tiny/0002-finetune: job {waiting} waits for job {new.job_id} now"
    row = read([second]).rows[0]
    assert (row.state, row.job_id, row.never) == ("waiting", waiting, False)
    shown = subprocess.run(["scontrol", "show", "job", waiting], capture_output=True, text=True, check=True).stdout
    assert f"afterok:{new.job_id}" in shown
    assert first.record() == before
    assert read([first]).rows[0].state in ("continuing", "starting", "running")
    # Cancelled and resumed together, they wait for each other as before.
    told.clear()
    cancel([first], real.results, told.append)
    real.until(first, "cancelled")
    real.until(second, "cancelled")
    slurm.cancel([new.job_id])
    assert resume([first, second], real.results, told.append, every=True) == [first, second]
    last = [job.submissions()[-1].accepted for job in (first, second)]
    ids = [one.job_id for one in last if one is not None]
    real.ids += ids
    assert not first.cancelled and not second.cancelled
    shown = subprocess.run(["scontrol", "show", "job", ids[1]], capture_output=True, text=True, check=True).stdout
    assert f"afterok:{ids[0]}" in shown


def test_a_relative_results_folder_names_the_same_jobs(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records name other jobs by absolute paths, and --results is `results` unless it is given."""
    monkeypatch.chdir(tmp_path)
    first = finished(tmp_path / "results", "done")
    after = finished(tmp_path / "results", "failed", stage="finetune", after=(str(first.path),))
    assert [job.path for job in jobs_below(Path("results"))] == [first.path, after.path]
    with pytest.raises(RunError, match="snapshot"):  # it is not refused for want of the first, and gets that far
        resume([after], Path("results"), told.append)
    waiting = new_job(tmp_path / "results", stage="explain", after=(str(after.path),))
    cancel([after, waiting], Path("results"), told.append)
    assert len(told) == 2
