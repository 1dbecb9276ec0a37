"""What jobs do, from their folders and from the scheduler's word; on the real cluster where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launch_jobs import new_job, row, start
from real_jobs import Real, accept, ended, real_jobs

from maehpc.errors import InputError
from maehpc.launch import slurm
from maehpc.launch.named import find_jobs, jobs_below, newest_job
from maehpc.launch.record import ArrayMember, JobFolder
from maehpc.launch.status import read
from maehpc.launch.words import cells


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def state(job: JobFolder) -> str:
    return str(read([job]).rows[0].state)


# Names


def test_a_job_is_found_by_each_of_its_names(tmp_path: Path) -> None:
    first, second, third = new_job(tmp_path), new_job(tmp_path, stage="finetune"), new_job(tmp_path)
    other = new_job(tmp_path, name="other")
    accept(first, "12")
    accept(first, "31")
    accept(other, "40_2")
    assert find_jobs("tiny", tmp_path) == [first, second, third]
    for word in ("tiny/1", "tiny/0001", "tiny/0001-pretrain", str(first.path), "12", "31"):
        assert find_jobs(word, tmp_path) == [first], word
    assert find_jobs("tiny/pretrain", tmp_path) == [third]
    assert find_jobs("tiny/finetune/", tmp_path) == [second]
    assert find_jobs("40_2", tmp_path) == find_jobs("40", tmp_path) == [other]
    assert find_jobs(str(tmp_path / "other"), tmp_path / "elsewhere") == [other]
    assert find_jobs(str(tmp_path), tmp_path) == jobs_below(tmp_path) == [other, first, second, third]
    assert newest_job("tiny", tmp_path) == third


@pytest.mark.parametrize("word", ["tony", "tiny/9", "tiny/explain", "99", "tiny/0001-finetune", "", "."])
def test_a_job_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, word: str) -> None:
    new_job(tmp_path)
    with pytest.raises(InputError, match="tiny"):
        find_jobs(word, tmp_path)


def test_a_folder_without_jobs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nor any other"):
        find_jobs("tiny", tmp_path)


# Without Slurm


def test_without_slurm_it_is_told_once_and_states_are_as_recorded(tmp_path: Path, no_slurm: None) -> None:
    jobs = [new_job(tmp_path) for _ in range(4)]
    for number, job in enumerate(jobs):
        accept(job, str(number))
    start(jobs[0], "0")
    ended(jobs[0], "done")
    start(jobs[1], "1")
    ended(jobs[1], "failed", "the disk is\nfull")
    start(jobs[2], "2", done=7)
    reading = read(jobs)
    assert [row.state for row in reading.rows] == ["done", "failed", "unknown", "unknown"]
    assert reading.silence is not None
    assert "no squeue on the PATH" in reading.silence
    assert reading.rows[1].sentence == "the disk is full"
    assert reading.rows[2].heartbeat is not None
    assert reading.rows[2].nodes == ("n1", "n2")


def test_slurm_is_not_asked_where_no_job_is_slurms(tmp_path: Path, no_slurm: None) -> None:
    job = new_job(tmp_path)
    assert read([job]).silence is None
    assert "never submitted" in read([job]).rows[0].sentence


def test_an_older_submissions_outcome_is_not_the_newest_ones(tmp_path: Path, no_slurm: None) -> None:
    job = new_job(tmp_path)
    accept(job, "5")
    start(job, "5")
    ended(job, "done")
    accept(job, "6")
    assert state(job) == "unknown"


def test_a_damaged_record_is_told_in_its_own_row(tmp_path: Path, no_slurm: None) -> None:
    good, bad, worse = new_job(tmp_path), new_job(tmp_path), new_job(tmp_path)
    for job in (good, bad, worse):
        accept(job, "5")
        start(job, "5", done=3)
        ended(job, "done")
    (bad.path / "job.json").write_text("{")
    (worse.path / "heartbeats" / "0001.json").write_text("")
    rows = read([good, bad, worse]).rows
    assert [row.state for row in rows] == ["done", "unknown", "unknown"]
    assert "job.json cannot be read" in rows[1].sentence
    assert "heartbeats/0001.json cannot be read" in rows[2].sentence
    assert [cells(row)[0] for row in rows] == [job.label for job in (good, bad, worse)]
    assert rows[1].as_json()["nodes_asked"] is None


def test_two_hundred_jobs_are_read_quickly(tmp_path: Path, no_slurm: None) -> None:
    for outcome in ("done", "failed"):
        job = new_job(tmp_path, name="e0")
        accept(job, "12")
        start(job, "12", done=5)
        ended(job, outcome)
    for number in range(3, 201):
        template = f"{2 - number % 2:04d}-pretrain"
        shutil.copytree(
            tmp_path / "e0" / "jobs" / template, tmp_path / f"e{number % 20}" / "jobs" / f"{number:04d}-pretrain"
        )

    def seconds() -> float:
        began = time.process_time()
        assert len(read(jobs_below(tmp_path)).rows) == 200
        return time.process_time() - began

    assert min(seconds() for _ in range(3)) < 0.4


def test_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys, maehpc.cli.status, maehpc.cli.logs, maehpc.launch.status, maehpc.launch.control; "
        "print(sorted({'torch', 'h5py', 'pandas', 'timm', 'submitit', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Rows


KEYS = """
    job folder experiment also stage scheduler job_id state sentence slurm_state slurm_reason nodes_asked nodes attempt
    phase dataset parts rates failures done total unit images_per_second seconds_left wall_seconds_left loss
    first_step_seconds sequence
"""


def test_keys_for_scripts(tmp_path: Path) -> None:
    from maehpc.cli.status import command

    job = new_job(tmp_path)
    told = row(job, "running").as_json()
    assert set(told) == set(KEYS.split())
    assert command.help is not None
    listed = command.help.partition("for each job its ")[2].partition("(null")[0]
    assert listed.replace(",", " ").split() == KEYS.split() == list(told)


# Local jobs


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


def test_a_local_job_from_wait_to_end(
    tmp_path: Path, no_slurm: None, controller: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    earlier = new_job(tmp_path)
    job = new_job(tmp_path, stage="finetune", after=(str(earlier.path),))
    token = uuid.uuid4().hex
    process = controller(token)
    job_id = str(process.pid)
    accept(job, job_id, "local", token)
    reading = read([job])
    assert (reading.rows[0].state, reading.rows[0].sentence) == ("waiting", "waits for tiny/0001-pretrain")
    assert reading.silence is None
    start(earlier)
    ended(earlier, "done")
    assert "turn" in read([job]).rows[0].sentence
    job.logs.mkdir()
    (job.logs / f"{job_id}_0_log.out").touch()
    assert state(job) == "starting"
    number = start(job, job_id, done=3)
    assert state(job) == "running"
    process.kill()
    process.wait()
    # The attempt ran on hosts n1 and n2, and this is neither.
    assert (state(job), read([job]).rows[0].sentence) == (
        "unknown",
        f"only n1 n2 could say; this is {os.uname().nodename}",
    )
    path = job.path / "attempts" / f"{number:04d}.json"
    path.write_text(path.read_text().replace('"n1"', f'"{os.uname().nodename}"'))
    assert state(job) == "failed"
    ended(job, "done")
    assert state(job) == "done"


def test_a_process_id_that_another_process_got_is_not_the_controller(
    tmp_path: Path, controller: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    job = new_job(tmp_path)
    process = controller("another-token")
    accept(job, str(process.pid), "local")
    assert state(job) == "unknown"


# On the real cluster


@pytest.fixture
def real(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Real]:
    yield from real_jobs(mini, monkeypatch)


@pytest.mark.slow
def test_real_job_from_wait_to_done(real: Real) -> None:
    job = new_job(real.results)
    seen = real.results / "seen"
    work = f"record begin; record beat 5; until [ -e {seen} ]; do sleep 0.2; done; record end done"
    job_id = real.submit(job, work, "--hold")
    held = real.until(job, "held")
    assert held.sentence == "held by its owner; `maehpc resume` lets it go"
    assert slurm.release(job_id)
    running = real.until(job, "running")
    assert (running.attempt, running.job_id, len(running.nodes)) == (1, job_id, 1)
    assert cells(running)[5] == "digits 5/100"
    seen.touch()
    real.until(job, "done")
    assert "unknown" not in real.seen
    assert "failed" not in real.seen


@pytest.mark.slow
def test_real_job_that_fails_with_and_without_a_word(real: Real) -> None:
    told, killed, silent = (new_job(real.results) for _ in range(3))
    real.submit(told, "record begin; record end failed; exit 1")
    real.submit(killed, "record begin; kill -9 $$")
    real.submit(silent, "record begin; exit 0")
    assert real.until(told, "failed").sentence == "it is failed"
    assert real.until(killed, "failed").sentence == "Slurm says FAILED (exit code 137, SIGKILL)"
    row = real.until(silent, "unknown")
    assert row.sentence == "Slurm says COMPLETED, but attempt 1 left no word of its end"


@pytest.mark.slow
def test_real_requeue_of_a_failed_job_hides_its_stale_result(real: Real) -> None:
    job = new_job(real.results)
    job_id = real.submit(
        job, 'record begin; [ "$SLURM_RESTART_COUNT" ] && sleep 2 && record end done && exit; record end failed; exit 1'
    )
    real.until(job, "failed")
    assert slurm.requeue(job_id)
    # Before its new attempt has begun, what the old one left must not be seen again.
    deadline = time.monotonic() + 60
    seen = set()
    while time.monotonic() < deadline and job.newest_attempt() < 2:
        seen.add(str(read([job]).rows[0].state))
        time.sleep(0.1)
    assert seen <= {"continuing", "starting", "running", "stopping"}, seen
    assert "continuing" in seen
    real.until(job, "done")
    assert not {"failed", "unknown"} & set(real.seen)


@pytest.mark.slow
def test_real_cancel_by_another_and_a_dependency_that_can_never_be(real: Real) -> None:
    first, second = new_job(real.results), new_job(real.results, stage="finetune")
    job_id = real.submit(first, "record begin; sleep 60")
    real.submit(second, "record begin", "-d", f"afterok:{job_id}", "--kill-on-invalid-dep=no")
    real.until(first, "running", "starting")
    assert real.until(second, "waiting").sentence == "waits for an earlier job"
    slurm.cancel([job_id])
    assert real.until(first, "cancelled").sentence == "cancelled through Slurm"
    deadline = time.monotonic() + 60
    while not (row := read([second]).rows[0]).never:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert row.state == "waiting"
    assert "can never start" in row.sentence


@pytest.mark.slow
def test_real_submission_whose_answer_was_lost(real: Real) -> None:
    job = new_job(real.results)
    lost = new_job(real.results)
    job_id = real.submit(job, "record begin; record beat 1; sleep 60", lost=True)
    lost.intend(uuid.uuid4().hex)
    found = real.until(job, "running")
    assert found.job_id == job_id
    assert "Slurm knows nothing of it" in read([lost]).rows[0].sentence


@pytest.mark.slow
def test_real_members_of_an_array(real: Real) -> None:
    folders = [new_job(real.results, name=f"s{index}").path for index in range(2)]
    members = [JobFolder(path) for path in folders]
    for index, job in enumerate(members):
        member = ArrayMember(index=index, folders=tuple(map(str, folders)))
        job.write_record(job.record().model_copy(update={"array": member}))
    token = f"array-{uuid.uuid4().hex}"
    words = ["sbatch", "--parsable", "--array", "0-1", "--comment", f"maehpc:{token}", "--hold", "-o", "/dev/null"]
    done = subprocess.run([*words, "--wrap", "exit 3"], capture_output=True, text=True, check=True)
    array = done.stdout.strip()
    real.ids.append(array)
    for job in members:  # nobody recorded the answer
        job.intend(token)
    rows = read(members).rows
    assert [(row.job_id, row.state) for row in rows] == [(f"{array}_0", "held"), (f"{array}_1", "held")]
    slurm.release(array)
    for job in members:
        assert real.until(job, "failed").sentence == "Slurm says FAILED (exit code 3), before any rank had begun"


@pytest.mark.slow
def test_another_clusters_job_with_the_same_id_is_not_ours(real: Real) -> None:
    job, other = new_job(real.results), new_job(real.results)
    job_id = real.submit(other, "sleep 60")
    accept(job, job_id)
    row = read([job]).rows[0]
    assert (row.state, row.sentence) == ("unknown", "Slurm no longer knows it, and no rank ever began")


@pytest.mark.slow
def test_a_controller_that_does_not_answer(real: Real, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = new_job(real.results)
    real.submit(job, "record begin; record beat 5; sleep 60")
    real.until(job, "running")
    lines = Path(os.environ["SLURM_CONF"]).read_text().splitlines()
    away = {"SlurmctldHost": "SlurmctldHost=localhost(127.0.0.1)", "SlurmctldPort": "SlurmctldPort=1"}
    dead = tmp_path / "slurm.conf"
    dead.write_text("\n".join(away.get(line.partition("=")[0], line) for line in lines))
    with monkeypatch.context() as patched:
        patched.setenv("SLURM_CONF", str(dead))
        reading = read([job])
    assert reading.silence is not None
    assert "no answer" in reading.silence
    assert (reading.rows[0].state, reading.rows[0].sentence) == ("unknown", "only Slurm could say")
