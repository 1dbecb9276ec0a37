"""`maehpc submit` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import Run
from submit_jobs import HELD, jobs_in, place, queued, until

from maehpc.launch import local


@pytest.fixture
def folder(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with place(mini, monkeypatch) as path:
        yield path


@pytest.fixture
def held(tmp_path: Path) -> str:
    path = tmp_path / "held.yaml"
    path.write_text(yaml.safe_dump({"extends": "mini", **HELD}))
    return str(path)


def maehpc(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maehpc", *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def test_a_dry_run_prints_the_scripts_and_the_cost_and_writes_nothing(run: Run, tiny: str, tmp_path: Path) -> None:
    outcome = run("submit", "pipeline", "--recipe", tiny, "--cluster", "mini", "--nodes", "2", "--dry-run", "-q")
    assert outcome.code == 0, outcome.err
    for stage in ("0001-pretrain", "0002-finetune", "0003-explain", "0004-report"):
        assert f"==> tiny/{stage} <==" in outcome.out
    assert outcome.out.count("#SBATCH --nodes=2") == 3
    for word in ("images", "FLOPs", "hours", "files", "total"):
        assert word in outcome.out
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


def test_a_dry_run_for_scripts(run: Run, tiny: str) -> None:
    words = ("--recipe", tiny, "--cluster", "jean-zay", "--account", "abc@a100", "--array", "seed=0,1")
    outcome = run("submit", "pretrain", *words, "--dry-run", "--json", "-q")
    told = json.loads(outcome.out)
    assert (told["members"], [job["members"] for job in told["jobs"]]) == (2, [2])
    assert "#SBATCH --account=abc@a100" in told["jobs"][0]["script"]
    assert "tiny-seed-0" in told["jobs"][0]["script"]
    assert told["estimate"]


def test_experiments_that_are_explained_by_several_workers_are_one_job(run: Run, tiny: str) -> None:
    words = ("explain", "--recipe", tiny, "--name", "one,two", "--array", "seed=0,1", "--cluster", "mini", "--dry-run")
    several = run("submit", *words, "--nodes", "2", "-q")
    assert several.code == 0, several.err
    assert several.out.count("==> ") == 1 and "==> one-seed-0/0001-explain <==" in several.out
    assert "One pool for 4 experiments: one-seed-1, two-seed-0, two-seed-1 too" in several.out
    assert "4 workers of 2 hosts" in several.out and "rank" not in several.out.partition("\nEstimate")[2]
    assert "#SBATCH --array" not in several.out
    alone = run("submit", *words, "--nodes", "1", "--gpus-per-node", "1", "-q")
    assert "#SBATCH --array=0-3" in alone.out
    refused = run("submit", "finetune", "--recipe", tiny, "--name", "one,two", "--cluster", "mini", "--dry-run")
    assert refused.code == 2 and "one experiment at a time" in refused.err
    twice = run("submit", *words[:3], "--name", "one,one", "--cluster", "mini", "--dry-run")
    assert twice.code == 2 and "named twice" in twice.err


def test_a_dry_run_needs_no_slurm_no_heavy_library_and_less_than_a_second(tiny: str, tmp_path: Path) -> None:
    program = (
        "import sys, time; began = time.perf_counter()\n"
        "from maehpc.cli.main import main\n"
        f"sys.argv = ['maehpc', 'submit', 'pipeline', '--recipe', {tiny!r}, '--cluster', 'mini', '--dry-run', '-q']\n"
        "main()\n"
        "heavy = {'torch', 'timm', 'h5py', 'pandas', 'ray', 'numpy', 'medmnist', 'zarr'} & set(sys.modules)\n"
        "print(time.perf_counter() - began, sorted(heavy), file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PATH": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        took, _, heavy = done.stderr.strip().partition(" ")
        assert heavy == "[]"
        seconds.append(float(took))
    assert min(seconds) < 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cluster", "absent"], ["absent", "mini"]),
        (["--cluster", "debug"], ["debug", "maehpc run"]),
        (["--cluster", "local", "--nodes", "2"], ["--nodes 2"]),
        (["--cluster", "local", "--partition", "x"], ["--partition"]),
        (["--cluster", "local", "--after", "12"], ["--after 12"]),
        (["--cluster", "mini", "--time", "soon"], ["--time", "'soon'"]),
        (["--cluster", "mini", "--array", "seed"], ["--array seed"]),
        (["--cluster", "mini", "--array", "finetune.nope=1,2"], ["finetune.nope"]),
        (["--cluster", "mini", "--array", "encoder.weights=scratch,pretrain"], ["--array", "stages"]),
        (["--cluster", "mini", "--after", "nobody"], ["nobody"]),
        (["--cluster", "mini", "--name", "a%j"], ["%"]),
        (["--cluster", "mini", "--min-nodes", "5"], ["--min-nodes 5", "4 hosts"]),
        (["--cluster", "local", "--min-nodes", "1"], ["--min-nodes 1", "--cluster"]),
        (["--cluster", "mini", "--min-nodes", "0"], ["--min-nodes"]),
        (["--cluster", "mini", "--name", "benchmarks"], ["benchmarks"]),
        (["--set", "finetune.epoch=3"], ["finetune.epoch"]),
        (["--nosuchoption"], ["--nosuchoption"]),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_wrong_words_are_one_sentence_exit_2_and_nothing_written(
    dry: bool, words: list[str], expected: list[str], run: Run, tiny: str, tmp_path: Path
) -> None:
    outcome = run("submit", "pipeline", "--recipe", tiny, *words, "-q", *(["--dry-run"] if dry else []))
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1
    for word in expected:
        assert word in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


@pytest.mark.parametrize(
    ("stage", "words", "expected"),
    [
        ("finetune", [], ["no finished pretrain"]),
        ("explain", ["--set", "encoder.weights=scratch"], ["no finished finetune"]),
        ("pretrain", ["--set", "encoder.weights=scratch"], ["encoder.weights"]),
        ("pipeline", ["--set", "explain.gradcam.layer=blocks.7.norm1"], ["blocks.7"]),
        ("pipeline", ["--datasets", "nosuchset"], ["nosuchset", "digits"]),
        ("pipeline", ["--datasets", "absent.npz"], ["absent.npz"]),
        ("pipeline", ["--datasets", "pathmnist"], ["pathmnist", "maehpc data"]),
        ("pipeline", ["--array", "explain.gradcam.layer=blocks.-1.norm1,blocks.7.norm1"], ["blocks.7"]),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused_here(
    stage: str,
    words: list[str],
    expected: list[str],
    run: Run,
    tiny: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("MAEHPC_DATA", raising=False)
    outcome = run("submit", stage, "--recipe", tiny, *words, "-q")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    for word in expected:
        assert word in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


def test_no_sbatch_is_told(run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = run("submit", "pretrain", "--recipe", tiny, "--cluster", "mini", "-q")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "sbatch" in outcome.err and "--cluster local" in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


def test_the_same_again_is_the_same_job_and_another_is_refused(run: Run, tiny: str, held: str, folder: Path) -> None:
    words = (
        "submit",
        "pretrain",
        "--recipe",
        tiny,
        "--cluster",
        held,
        "--results",
        str(folder / "results"),
        "--name",
        "x",
    )
    first, again = run(*words), run(*words)
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert again.out == first.out.rstrip("\n") + "  submitted already\n"
    told = json.loads(run(*words, "--json").out)
    assert [(row["job"], row["already"]) for row in told] == [("x/0001-pretrain", True)]
    other = run(*words, "--set", "pretrain.epochs=7")
    assert other.code == 2
    assert "recipe.pretrain.epochs is 3 there and 7 here" in other.err
    (job,) = queued(folder)
    assert f"job {job.job_id}" in first.out
    behind = run(*words, "--set", "pretrain.epochs=7", "--after", "x/1")
    assert behind.code == 0, behind.err


def test_a_stage_may_be_submitted_behind_the_one_that_makes_what_it_needs(
    run: Run, tiny: str, held: str, folder: Path
) -> None:
    shared = ("--cluster", held, "--results", str(folder / "results"), "--name", "x", "-q")
    assert run("submit", "pretrain", "--recipe", tiny, *shared).code == 0
    assert "no finished pretrain" in run("submit", "finetune", *shared).err
    # The experiment has no recipe.yaml yet: its waiting job's recipe is the experiment's.
    outcome = run("submit", "finetune", "--after", "x", *shared)
    assert outcome.code == 0, outcome.err
    second = jobs_in(folder)[1].record()
    assert second.after == (str(jobs_in(folder)[0].path),)
    assert second.recipe["encoder"]["width"] == 16
    assert second.directory == str(Path.cwd())


@pytest.mark.slow
def test_a_client_killed_at_any_instant_leaves_one_job_that_the_next_one_finds(
    tiny: str, held: str, folder: Path
) -> None:
    """The instants are spread over the client's whole life, again and again."""
    words = ("submit", "pretrain", "--recipe", tiny, "--cluster", held, "--results", str(folder / "results"), "-q")
    began = time.monotonic()
    assert maehpc(*words, "--name", "whole", cwd=folder).returncode == 0
    whole = time.monotonic() - began
    for number in range(6):
        name = f"killed-{number}"
        client = subprocess.Popen([sys.executable, "-m", "maehpc", *words, "--name", name], cwd=folder)
        if number < 5:
            until((folder / "results" / name).exists, 120)
            time.sleep(0.012 * number)
        else:
            time.sleep(whole * 0.9)
        client.send_signal(signal.SIGKILL)
        client.wait()
        done = maehpc(*words, "--name", name, cwd=folder)
        assert done.returncode == 0, done.stderr
        mine = [job for job in queued(folder) if job.name == f"maehpc-{name}-pretrain"]
        assert len(mine) == 1
        assert f"job {mine[0].job_id}" in done.stdout


@pytest.mark.slow
def test_waiting_for_a_job_tells_its_end(tiny: str, tmp_path: Path) -> None:
    done = maehpc("submit", "pretrain", "--recipe", tiny, "--wait", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny/0001-pretrain: done" in done.stderr
    job = jobs_in(tmp_path)[0]
    bad = np.zeros((3, 3))
    np.savez(tmp_path / "bad.npz", train_images=bad)
    failed = maehpc(
        "submit", "pretrain", "--recipe", tiny, "--name", "y", "--datasets", "bad.npz", "--wait", cwd=tmp_path
    )
    assert failed.returncode == 1
    assert "y/0001-pretrain: failed" in failed.stderr and "bad.npz" in failed.stderr
    assert job.outcome(1) is not None


@pytest.mark.slow
def test_ctrl_c_ends_the_wait_and_not_the_job(tiny: str, tmp_path: Path) -> None:
    words = ("submit", "pretrain", "--recipe", tiny, "--set", "pretrain.epochs=4000", "--wait")
    command = [sys.executable, "-m", "maehpc", *words]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as client:
        assert client.stderr is not None
        assert any("tiny/0001-pretrain: " in line for line in client.stderr), "it waits from then on"
        until(lambda: any(job.newest_attempt() for job in jobs_in(tmp_path)), 90)
        client.send_signal(signal.SIGINT)
        told = client.stderr.read()
        assert client.wait(timeout=30) == 130, told
        assert "the jobs go on" in told
    (submission,) = jobs_in(tmp_path)[0].submissions()
    pid = local.controller_of(submission.intent.token)
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    until(lambda: local.controller_of(submission.intent.token) is None, 60)


def test_where_the_results_go_when_nobody_says(run: Run, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"extends": "mini", "results": str(tmp_path / "shared"), "packs": "/data/packs"}))
    words = ("submit", "pretrain", "--recipe", tiny, "--cluster", str(path), "--dry-run", "-q")
    assert f"{tmp_path}/shared/tiny/jobs" in run(*words).out
    assert f"{tmp_path}/mine/tiny/jobs" in run(*words, "--results", "mine").out


def test_the_default_cluster_is_what_the_environment_says(run: Run, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("submit", "pretrain", "--recipe", tiny, "--dry-run", "-q")
    assert "maehpc.launch.local" in run(*words).out
    monkeypatch.setenv("MAEHPC_CLUSTER", "leonardo")
    out = run(*words).out
    assert "#SBATCH --partition=boost_usr_prod" in out
