"""`maehpc status`, `logs`, `cancel` and `resume` as a person meets them."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from at_work import working
from command_line import Run
from launch_jobs import new_job, start
from real_jobs import Real, accept, ended, real_jobs

from maehpc.launch.record import Heartbeat, JobFolder

COMMAND = [sys.executable, "-m", "maehpc.cli.main"]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that is done, one that failed and one that only Slurm could tell of, where there is no Slurm."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for number, (stage, outcome) in enumerate([("pretrain", "done"), ("finetune", "failed"), ("explain", None)]):
        job = new_job(tmp_path / "results", "toy", stage, tasks_per_node=1 + number)
        accept(job, str(10 + number))
        start(job, str(10 + number), done=5 * number, phase=stage)
        if outcome:
            ended(job, outcome, f"it {outcome}")
        job.logs.mkdir()
        for rank in range(2):
            (job.logs / f"{10 + number}_{rank}_log.out").write_text(f"out of {stage} {rank}\nsecond line\n")
    (job.logs / "12_0_log.err").write_bytes(b"\xff wrong\n")
    return tmp_path / "results"


def test_status_of_a_folder(run: Run, study: Path) -> None:
    found = run("status")
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0].split() == ["job", "id", "state", "nodes", "attempt", "progress", "images/s", "left", "loss"]
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["toy/0002-finetune", "11", "failed"],
        ["toy/0003-explain", "12", "unknown"],
    ]
    assert lines[3:] == [
        "toy/0002-finetune: it failed",
        "toy/0003-explain: only Slurm could say",
        "1 job that has ended: --all shows it",
    ]
    assert found.err.count("no squeue on the PATH") == 1
    assert "states are as recorded, or unknown" in found.err


def test_status_of_all_and_of_some(run: Run, study: Path) -> None:
    assert "toy/0001-pretrain" in run("status", "--all").out
    assert "toy/0001-pretrain" in run("status", "toy").out
    one = run("status", "toy/1", "10", "--results", str(study))
    assert one.out.count("toy/0001-pretrain") == 1
    assert "ended" not in one.out
    assert "0003" not in one.out


def test_status_for_scripts(run: Run, study: Path) -> None:
    told = json.loads(run("status", "--json").out)
    assert [job["state"] for job in told["jobs"]] == ["failed", "unknown"]
    assert told["left_out"] == 1
    assert "no squeue" in told["silence"]
    assert (told["jobs"][0]["done"], told["jobs"][0]["total"], told["jobs"][0]["loss"]) == (5, 100, None)
    assert len(json.loads(run("status", "--json", "--all").out)["jobs"]) == 3


def test_status_of_nothing(run: Run, tmp_path: Path) -> None:
    assert (run("status").code, run("status").err) == (2, "maehpc: --results results: there is no such folder\n")
    (tmp_path / "results").mkdir()
    empty = run("status")
    assert (empty.code, empty.out) == (0, "there are no jobs below results\n")
    assert json.loads(run("status", "--json").out) == {"jobs": [], "left_out": 0, "silence": None}


@pytest.mark.parametrize("words", [("status",), ("logs",), ("cancel",), ("resume",)])
def test_a_job_that_is_not_there(run: Run, study: Path, words: tuple[str, ...]) -> None:
    found = run(*words, "toi/2")
    assert found.code == 2
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert "there is no job 'toi/2'" in found.err
    assert "toy" in found.err


def test_options_that_exclude_each_other(run: Run, study: Path) -> None:
    found = run("status", "--watch", "--json")
    assert found.code == 2
    assert "exclude each other" in found.err


def test_a_table_on_a_terminal(study: Path) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(
        [*COMMAND, "status", "--all", "--results", str(study)], stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    printed = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:
            break
        if not block:
            break
        printed += block
    os.close(leader)
    assert process.wait() == 0
    text = printed.decode()
    assert "toy/0001-pretrain" in text
    assert "\x1b[1;31mfailed" in text
    table = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines() if "toy/" in line and " 2 " in line]
    assert len(table) == 3
    assert all(len(line) <= 100 for line in table)


def test_logs_of_one_rank_and_of_several(run: Run, study: Path) -> None:
    assert run("logs", "toy/1", "--rank", "0").out == "out of pretrain 0\nsecond line\n"
    several = run("logs", "toy/explain")
    assert several.out == (
        "[0] out of explain 0\n[0] second line\n[0] \ufffd wrong\n[1] out of explain 1\n[1] second line\n"
    )
    assert run("logs", "toy").out == several.out
    assert run("logs", "12", "--err").out == "[0] \ufffd wrong\n"
    assert run("logs", "12", "--out", "--tail", "1").out == "[0] second line\n[1] second line\n"
    assert run("logs", "12", "--tail", "0").out == ""
    assert run("logs", "12", "--rank", "1").out == "out of explain 1\nsecond line\n"


def test_logs_of_a_rank_that_is_not_there(run: Run, study: Path) -> None:
    found = run("logs", "toy/1", "--rank", "2")
    assert found.code == 2
    assert found.err == "maehpc: --rank 2: toy/0001-pretrain has 2 ranks, counted from 0\n"


def test_logs_of_a_job_that_printed_nothing(run: Run, study: Path) -> None:
    new_job(study, "toy", "report")
    found = run("logs", "toy/report")
    assert (found.code, found.out) == (0, "")
    assert "nothing was printed yet; toy/0004-report is unknown: it was never submitted" in found.err


def test_whoever_reads_the_logs_may_stop(study: Path) -> None:
    path = study / "toy" / "jobs" / "0001-pretrain" / "logs" / "10_0_log.out"
    path.write_text("a line\n" * 200_000)
    process = subprocess.Popen(
        [*COMMAND, "logs", "toy/1", "--results", str(study)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"[0] a line\n"
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_cancel_without_slurm(run: Run, study: Path) -> None:
    found = run("cancel", "toy")
    assert found.code == 1
    assert found.err.startswith("maehpc: there is no squeue on the PATH")
    assert found.err.count("\n") == 1


@pytest.fixture
def controller() -> Iterator[Any]:
    """A process that carries the token "mine", as a local job's controller does."""
    words = [sys.executable, "-c", "import time; time.sleep(120)", "mine"]
    with subprocess.Popen(words) as process:
        yield process
        process.kill()


@pytest.mark.slow
def test_watching_a_local_job_to_its_end(tmp_path: Path, controller: Any) -> None:
    job = new_job(tmp_path, "toy", profile={"kind": "local"})
    accept(job, str(controller.pid), "local", "mine")
    job.logs.mkdir()
    log = job.logs / f"{controller.pid}_0_log.out"
    log.write_text("begins\n")
    number = start(job, str(controller.pid))
    job.beat(number, Heartbeat(sequence=1, phase="pretrain", done=1, total=4, unit="step"))
    watch, logs = (
        subprocess.Popen(
            [*COMMAND, *words, "--results", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for words in (["status", "--watch"], ["logs", "-f", "toy"])
    )
    assert logs.stdout is not None and watch.stdout is not None
    assert logs.stdout.readline() == "[0] begins\n"
    assert watch.stdout.readline().startswith("job")
    assert " 1/4" in watch.stdout.readline()
    with log.open("a") as handle:
        handle.write("goes on\n")
    assert logs.stdout.readline() == "[0] goes on\n"
    job.beat(number, Heartbeat(sequence=4, phase="ending", done=4, total=4, unit="step"))
    ended(job, "done")
    with log.open("a") as handle:
        handle.write("ends")
    controller.kill()
    out, err = logs.communicate(timeout=30)
    assert (logs.returncode, out) == (0, "[0] ends\n")
    assert err == "maehpc: toy/0001-pretrain is done\n"
    out, err = watch.communicate(timeout=30)
    assert (watch.returncode, err) == (0, "")
    assert "done" in out.splitlines()[-2]


@pytest.fixture
def pooled(tmp_path: Path, controller: Any) -> JobFolder:
    """A local job, at work, that explains a, b and c; b has a job of its own that is done, and c nothing else."""
    results = tmp_path / "results"
    done = new_job(results, "b", "finetune", profile={"kind": "local"})
    accept(done, "1", "local")
    start(done, "1")
    ended(done, "done")
    (results / "c").mkdir()
    also = dict.fromkeys(("b", "c"), done.record().recipe)
    job = new_job(results, "a", "explain", also=also, numbers={"b": 2, "c": 1}, profile={"kind": "local"})
    accept(job, str(controller.pid), "local", "mine")
    job.logs.mkdir()
    (job.logs / f"{controller.pid}_0_log.out").write_text("begins\n")
    number = start(job, str(controller.pid))
    counts = {"a/digits": (1, 10), "b/digits": (2, 10), "b/retina": (3, 30), "c/digits": (4, 10)}
    job.beat(number, Heartbeat(sequence=1, phase="explain", parts=counts, done=10, total=60, unit="image"))
    return job


def test_status_of_a_pool_by_each_of_its_experiments(run: Run, pooled: JobFolder) -> None:
    def told(*words: str) -> tuple[list[str], list[str]]:
        """First words of the table's lines, and the lines below it."""
        found = run("status", *words)
        assert (found.code, found.err) == (0, "")
        lines = found.out.splitlines()[1:]
        table = [line.split()[0] for line in lines if not re.match(r"\S+: ", line)]
        return table, [line for line in lines if re.match(r"\S+: ", line)]

    a = ["a/0001-explain: a/digits 1/10"]
    b = ["a/0001-explain: b/digits 2/10", "a/0001-explain: b/retina 3/30"]
    c = ["a/0001-explain: c/digits 4/10"]
    together = "a/0001-explain: one pool explains"
    assert told("--all") == (["a/0001-explain", "b/0001-finetune"], [f"{together} a, b and c", *a, *b, *c])
    assert told("a") == (["a/0001-explain"], [f"{together} a, b and c", *a])
    for word in ("b", "results/b"):
        assert told(word) == (["b/0001-finetune", "a/0001-explain"], [f"{together} b, a and c", *b])
    for word in ("b/explain", "b/2", "b/0002-explain"):
        assert told(word) == (["a/0001-explain"], [f"{together} b, a and c", *b])
    assert told("c/explain", "b/explain") == (["a/0001-explain"], [f"{together} b, c and a", *b, *c])
    assert told("c", "a/1") == (["a/0001-explain"], [f"{together} a, c and b", *a, *c])
    assert told("c", str(pooled.path)) == (["a/0001-explain"], [f"{together} a, b and c", *a, *b, *c])
    (job,) = json.loads(run("status", "--json", "c").out)["jobs"]
    assert (job["experiment"], job["also"], len(job["parts"])) == ("a", ["b", "c"], 4)


def test_logs_and_the_end_of_a_pool_by_another_experiment(run: Run, pooled: JobFolder, controller: Any) -> None:
    for word in ("b", "b/explain", "c", "results/c"):
        assert run("logs", word, "--rank", "0").out == "begins\n", word
    refused = run("resume", "c")
    assert (refused.code, refused.err) == (2, "maehpc: a/0001-explain is running; it goes on by itself\n")
    absent = run("cancel", "c/finetune")
    assert (absent.code, absent.out, absent.err.count("\n")) == (2, "", 1)
    assert not pooled.cancelled
    ending = run("cancel", "c", "a")
    assert ending.out == (
        "a/0001-explain: asked to end (it was running); one pool explains a, b and c, and ends for all of them\n"
    )
    assert (ending.code, ending.err) == (0, "")
    assert pooled.cancelled
    assert controller.wait(10) == -15


def test_a_job_that_stands_still_is_told_after_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maehpc.cli import status
    from maehpc.launch.states import State
    from maehpc.launch.status import Row

    job = new_job(tmp_path)
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    still = status._Standstill()

    def look(sequence: int, state: State = State.RUNNING, attempt: int = 1) -> list[str]:
        beat = Heartbeat(sequence=sequence, phase="pretrain")
        return status._sentences([Row(job, None, "slurm", "1", state, attempt=attempt, heartbeat=beat)], still)

    assert look(4) == []
    now += 29
    assert look(4) == []
    now += 12
    assert look(4) == ["tiny/0001-pretrain: nothing has moved for 41 s"]
    assert look(5) == []
    now += 100
    assert look(5, State.STOPPING) == []
    assert look(5) == []
    now += 100
    assert look(5, attempt=2) == []


@pytest.fixture
def real(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Real]:
    yield from real_jobs(mini, monkeypatch)


@pytest.mark.slow
def test_real_job_followed_over_a_requeue(run: Run, real: Real) -> None:
    from maehpc.launch import slurm

    job = new_job(real.results, "toy", tasks_per_node=1, nodes=1)
    job.logs.mkdir()
    work = "echo start $SLURM_RESTART_COUNT; record begin; record beat 3; "
    work += '[ "$SLURM_RESTART_COUNT" ] && sleep 2 || sleep 60; record end done'
    job_id = real.submit(job, work, "--open-mode=append", "--output", f"{job.logs}/%j_0_log.out")
    real.until(job, "running")
    table = run("status", "--results", str(real.results))
    assert table.out.splitlines()[1].split() == ["toy/0001-pretrain", job_id, "running", "1", "1", "digits", "3/100"]
    assert table.err == ""
    logs = subprocess.Popen(
        [*COMMAND, "logs", "-f", job_id, "--results", str(real.results)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert logs.stdout is not None
    assert logs.stdout.readline() == "start\n"
    assert slurm.requeue(job_id)
    out, err = logs.communicate(timeout=90)
    assert "start 1\n" in out
    assert err == "maehpc: toy/0001-pretrain is done\n"
    assert run("status", "--results", str(real.results)).out == "1 job that has ended: --all shows it\n"
    again = run("cancel", "toy", "--results", str(real.results))
    assert (again.code, again.out) == (0, "toy/0001-pretrain: it has ended already (done)\n")
    refused = run("resume", "toy", "--results", str(real.results))
    assert refused.code == 2
    assert "toy/0001-pretrain is done" in refused.err


@pytest.mark.slow
def test_a_run_in_another_terminal_is_shown_and_watched_to_its_end(tmp_path: Path, run: Run) -> None:
    results = tmp_path / "results"
    with working(results / "study") as process:
        label = f"study/{process.pid}-explain"
        for words in ((), ("study",), ("study/explain",), (label,), (str(process.pid),), (str(results),)):
            found = run("status", *words, "--results", str(results))
            assert (found.code, found.err) == (0, "") and f"{label}  " in found.out, words
        for name in ("cancel", "logs"):
            refused = run(name, "study", "--results", str(results))
            assert refused.code == 2 and f"runs in a terminal (process {process.pid} of" in refused.err
        words = [*COMMAND, "status", "study", "--watch", "--results", str(results)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
            assert watch.stdout is not None and watch.stdout.readline().startswith("job")
            assert label in watch.stdout.readline()
            process.kill()
            process.wait()
            out, err = watch.communicate(timeout=60)
            assert (watch.returncode, err) == (0, "") and "no job goes on" in out
    assert run("status", "study", "--results", str(results)).code == 2
