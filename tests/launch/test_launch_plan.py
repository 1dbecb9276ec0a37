"""Chains, sweeps, what is in the way and what is the same; on the real Slurm where Slurm decides."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from submit_jobs import dependency, jobs_in, kill_with_ranks, place, queued, request, until
from tiny import in_child, tiny_recipe

from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.launch import chain, local, plan, slurm
from maehpc.launch.chain import carry_out
from maehpc.launch.plan import chain_of, check_request, overridden, preview, sweep
from maehpc.launch.profile import LocalProfile, SlurmProfile, load_profile, parse_profile
from maehpc.launch.record import Attempt, JobFolder, JobRecord, Outcome
from maehpc.launch.snapshot import Snapshot
from maehpc.launch.submission import still_going, succeeded


@pytest.fixture
def folder(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with place(mini, monkeypatch) as path:
        yield path


def done(job: JobFolder, job_id: str) -> None:
    number = job.begin_attempt(Attempt(job_id=job_id, restart=0, hosts=("n1",), ranks=1, pid=1))
    job.write_outcome(number, Outcome(outcome="done"))


@pytest.mark.parametrize(
    ("stage", "weights", "expected"),
    [
        ("pretrain", "pretrain", "pretrain"),
        ("probe", "scratch", "probe"),
        ("pipeline", "pretrain", "pretrain finetune explain report"),
        ("pipeline", "scratch", "finetune explain report"),
    ],
)
def test_what_a_stage_stands_for(stage: str, weights: str, expected: str) -> None:
    assert " ".join(chain_of(stage, tiny_recipe(f"encoder.weights={weights}"))) == expected


def test_a_grid_has_every_member_once() -> None:
    grid = sweep(["finetune.optim.lr=1e-3,0.01", "seed=0,1,2"])
    assert len(grid) == 6
    assert grid[0] == ("-lr-1e-3-seed-0", ("finetune.optim.lr=1e-3", "seed=0"))
    assert grid[-1] == ("-lr-0.01-seed-2", ("finetune.optim.lr=0.01", "seed=2"))
    assert sweep([]) == [("", ())]
    same_ends = sweep(["pretrain.optim.lr=1,2", "finetune.optim.lr=1,2"])
    assert same_ends[0][0] == "-pretrain.optim.lr-1-finetune.optim.lr-1"
    lists = sweep(["finetune.optim.betas=[0.9, 0.95],[0.9, 0.999]"])
    assert [words for _, (words,) in lists] == [
        "finetune.optim.betas=[0.9, 0.95]",
        "finetune.optim.betas=[0.9, 0.999]",
    ]


@pytest.mark.parametrize(
    "word", ["seed", "seed=", "=1", "seed=1,", "seed=1,1", "seed=" + ",".join(map(str, range(1001)))]
)
def test_sweeps_that_are_none(word: str) -> None:
    with pytest.raises(InputError, match="--array"):
        sweep([word])


VALUES = st.lists(st.from_regex(r"[a-z0-9.]{1,5}|\[[a-z0-9, ]{0,5}\]", fullmatch=True), min_size=1, unique=True)


@settings(deadline=None)
@given(values=VALUES)
def test_values_are_split_where_they_were_joined(values: list[str]) -> None:
    assert plan._split(",".join(values)) == [value.strip() for value in values]


@pytest.mark.parametrize(
    ("stage", "profile", "tasks", "workers", "cpus"),
    [
        ("explain", {"nodes": 4, "tasks_per_node": 2, "gpus_per_node": 2, "cpus_per_task": 3}, 1, 2, 6),
        ("explain", {"nodes": 2, "tasks_per_node": 1, "gpus_per_node": 1, "cpus_per_task": None}, 1, 1, None),
        ("explain", {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 1, "cpus_per_task": 3}, 1, 0, 3),
        ("pretrain", {"nodes": 4, "tasks_per_node": 2, "gpus_per_node": 2, "cpus_per_task": 3}, 2, 0, 3),
    ],
)
def test_several_ranks_explain_as_a_pool_with_one_task_a_host(
    stage: str, profile: dict[str, Any], tasks: int, workers: int, cpus: int | None, tmp_path: Path
) -> None:
    code = Snapshot(tmp_path, "0" * 64)
    (step,) = plan.steps_of(request(tmp_path, stage, profile=profile), code)
    (record,) = step.records
    assert (record.tasks_per_node, record.workers_per_node) == (tasks, workers)
    assert record.profile["cpus_per_task"] == cpus


@pytest.mark.parametrize(
    ("stage", "asked", "tasks", "workers"),
    [("explain", 2, 1, 2), ("explain", 1, 1, 0), ("pretrain", 2, 2, 0), ("report", 2, 1, 0)],
)
def test_several_tasks_of_this_machine_explain_as_a_pool(
    stage: str, asked: int, tasks: int, workers: int, tmp_path: Path
) -> None:
    wanted = here(tmp_path, stage="pipeline", profile={"tasks": asked})
    records = {step.stage: step.records[0] for step in plan.steps_of(wanted, Snapshot(tmp_path, "0" * 64))}
    assert (records[stage].tasks_per_node, records[stage].workers_per_node) == (tasks, workers)


POOL = {"nodes": 4, "tasks_per_node": 2, "gpus_per_node": 2}


@pytest.mark.parametrize(("least", "expected"), [(None, None), (1, 1), (3, 3), (4, None)])
def test_fewer_hosts_are_enough_for_explaining_alone(least: int | None, expected: int | None, tmp_path: Path) -> None:
    wanted = request(tmp_path, "pipeline", profile=POOL, min_nodes=least)
    check_request(wanted)
    records = {step.stage: step.records[0] for step in plan.steps_of(wanted, Snapshot(tmp_path, "0" * 64))}
    assert {stage: record.min_nodes for stage, record in records.items() if record.min_nodes is not None} == (
        {} if expected is None else {"explain": expected}
    )
    scripts = "".join(one.script for one in preview(wanted))
    assert scripts.count(f"#SBATCH --nodes={expected}-4\n") == (expected is not None)


@pytest.mark.parametrize(
    ("stage", "least", "expected"),
    [
        ("pretrain", 3, "--min-nodes 3: pretraining shares every batch among all ranks; leave it out"),
        ("finetune", 3, "--min-nodes 3: finetuning shares"),
        ("probe", 3, "--min-nodes 3: probing shares"),
        ("explain", 5, "--min-nodes 5: the job has 4 hosts"),
    ],
)
def test_stages_and_numbers_that_fewer_hosts_mean_nothing_to(
    stage: str, least: int, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        check_request(request(tmp_path, stage, profile=POOL, min_nodes=least))


def test_metrics_are_of_explaining_alone(tmp_path: Path) -> None:
    wanted = request(tmp_path, "pipeline", metrics_port=0)
    check_request(wanted)
    records = {step.stage: step.records[0] for step in plan.steps_of(wanted, Snapshot(tmp_path, "0" * 64))}
    assert {stage for stage, record in records.items() if record.metrics_port is not None} == {"explain"}
    assert records["explain"].metrics_port == 0
    with pytest.raises(InputError, match=r"--metrics-port 0: .* leave it out of finetune"):
        check_request(request(tmp_path, "finetune", metrics_port=0))
    check_request(request(tmp_path, "explain", names=("a", "b"), metrics_port=0))
    with pytest.raises(InputError, match="--metrics-port 9400: members of a sweep"):
        check_request(request(tmp_path, "explain", names=("a", "b"), metrics_port=9400))
    check_request(here(tmp_path, stage="explain", metrics_port=9400))
    check_request(here(tmp_path, stage="explain", metrics_port=9400, profile={"tasks": 2}))


def test_ray_has_a_dashboard_where_a_pool_explains(tmp_path: Path) -> None:
    wanted = request(tmp_path, "pipeline", profile=POOL, dashboard_port=0)
    check_request(wanted)
    records = {step.stage: step.records[0] for step in plan.steps_of(wanted, Snapshot(tmp_path, "0" * 64))}
    assert {stage: record.dashboard_port for stage, record in records.items() if record.dashboard_port is not None} == {
        "explain": 0
    }
    assert JobRecord.model_validate_json(records["explain"].model_dump_json()).dashboard_port == 0
    with pytest.raises(InputError, match=r"--dashboard-port 0: .* leave it out of finetune"):
        check_request(request(tmp_path, "finetune", profile=POOL, dashboard_port=0))
    for alone in (request(tmp_path, "explain", dashboard_port=0), here(tmp_path, stage="explain", dashboard_port=0)):
        with pytest.raises(InputError, match="--dashboard-port 0: one process would explain"):
            check_request(alone)
    check_request(request(tmp_path, "pipeline", names=("a", "b"), profile=POOL, dashboard_port=0))
    with pytest.raises(InputError, match="--dashboard-port 8265: members of a sweep"):
        check_request(request(tmp_path, "pipeline", names=("a", "b"), profile=POOL, dashboard_port=8265))
    check_request(here(tmp_path, stage="explain", dashboard_port=8265, profile={"tasks": 2}))


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ({}, True),
        ({"python": "/opt/bin/python"}, False),
        ({"container": {"kind": "apptainer", "image": "m.sif"}}, False),
    ],
)
def test_what_is_installed_here_is_known_to_be_there(profile: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    assert plan.runs_this_python(request(tmp_path, profile=profile).profile) is expected
    assert plan.runs_this_python(here(tmp_path).profile)


def test_wishes_of_the_command_line_are_checked_like_a_file() -> None:
    mini = load_profile("mini")
    wished = overridden(mini, {"nodes": 2, "gpus_per_node": 1, "time_min": "2-00:00", "account": None})
    assert isinstance(wished, SlurmProfile)
    assert (wished.nodes, wished.ranks_per_node, wished.time_min) == (2, 1, 2880)
    none = overridden(load_profile("dgx-pyxis"), {"gpus_per_node": 0})
    assert isinstance(none, SlurmProfile) and none.ranks_per_node == 1
    with pytest.raises(InputError, match=r"--time.*'soon'"):
        overridden(mini, {"time_min": "soon"})
    with pytest.raises(InputError, match=r"signal_lead_s 300 .* --time"):
        overridden(load_profile("jean-zay"), {"time_min": "0:05:00"})
    here = overridden(load_profile("local"), {"nodes": 1, "gpus_per_node": 2, "time_min": "10"})
    assert isinstance(here, LocalProfile) and (here.tasks, here.gpus, here.time_min) == (2, 2, 10)
    with pytest.raises(InputError, match="--nodes 2"):
        overridden(load_profile("local"), {"nodes": 2})
    with pytest.raises(InputError, match="--partition is Slurm's"):
        overridden(load_profile("local"), {"partition": "gpu"})


def test_paths_that_slurm_would_change_are_refused(tmp_path: Path) -> None:
    for name in ("a%j", "a\nb"):
        with pytest.raises(InputError, match="--name"):
            check_request(request(tmp_path, names=(name,)))
    check_request(request(tmp_path, names=("it's a name",)))


def test_a_preview_is_what_would_be_submitted_and_leaves_nothing(tmp_path: Path) -> None:
    shown = preview(request(tmp_path / "results", stage="pipeline", names=("a", "b")))
    assert [(one.label, one.members) for one in shown] == [
        ("a/0001-pretrain", 2),
        ("a/0002-finetune", 2),
        ("a/0003-explain", 2),
        ("a/0004-report", 2),
    ]
    assert "--array=0-1%2" in shown[0].script and "--dependency" not in shown[0].script
    assert "--dependency=aftercorr:JOB-0001-pretrain" in shown[1].script
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1" in shown[3].script
    assert list(tmp_path.iterdir()) == []


def test_members_with_other_stages_are_refused(tmp_path: Path) -> None:
    wanted = request(tmp_path, stage="pipeline", names=("a", "b"))
    scratch = replace(wanted.members[1], recipe=tiny_recipe("encoder.weights=scratch"))
    with pytest.raises(InputError, match="same stages"):
        preview(replace(wanted, members=(wanted.members[0], scratch)))


def test_a_chain_waits_link_by_link_and_is_the_same_chain_again(folder: Path) -> None:
    wanted = request(folder / "results", stage="pipeline")
    handed = carry_out(wanted)
    assert [one.job.path.name for one in handed] == ["0001-pretrain", "0002-finetune", "0003-explain", "0004-report"]
    assert not any(one.found for one in handed)
    for before, after in pairwise(handed):
        assert after.job.record().after == (str(before.job.path),)
        assert dependency(after.accepted.job_id).startswith(f"afterok:{before.accepted.job_id}")
    again = carry_out(wanted)
    assert [(one.job, one.accepted) for one in again] == [(one.job, one.accepted) for one in handed]
    assert all(one.found for one in again)
    assert len(queued(folder)) == 4


def test_a_chain_that_was_broken_off_goes_on_where_it_was(folder: Path) -> None:
    wanted = request(folder / "results", stage="pipeline")
    handed = carry_out(wanted)
    slurm.cancel([one.accepted.job_id for one in handed[2:]])
    for one in handed[2:]:
        until(lambda one=one: not still_going(one.job))
    done(handed[0].job, handed[0].accepted.job_id)
    again = carry_out(wanted)
    assert [one.found for one in again] == [True, True, False, False]
    assert [one.job.path.name for one in again[2:]] == ["0005-explain", "0006-report"]
    assert again[2].job.record().after == (str(handed[1].job.path),)
    assert dependency(again[2].accepted.job_id).startswith(f"afterok:{handed[1].accepted.job_id}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"overrides": ("pretrain.epochs=4",)}, "recipe.pretrain.epochs is 3 there and 4 here"),
        ({"profile": {"time_min": 30}}, "time_min is 60 there and 30 here"),
        ({"profile": {"nodes": 2}}, "nodes is 1 there and 2 here"),
    ],
)
def test_another_job_on_the_same_stage_is_in_the_way(changes: dict[str, Any], expected: str, folder: Path) -> None:
    (first,) = carry_out(request(folder / "results"))
    there = {path.name for path in folder.rglob("*")}
    with pytest.raises(InputError) as caught:
        carry_out(request(folder / "results", **changes))
    assert expected in str(caught.value)
    assert f"study/0001-pretrain (job {first.accepted.job_id})" in str(caught.value)
    assert {path.name for path in folder.rglob("*")} == there
    (behind,) = carry_out(request(folder / "results", after=(first.job,), **changes))
    assert dependency(behind.accepted.job_id).startswith(f"afterok:{first.accepted.job_id}")


def test_other_data_sets_and_other_stages_are_not_in_the_way(folder: Path) -> None:
    carry_out(request(folder / "results"))
    carry_out(request(folder / "results", overrides=("datasets=[breastmnist]",)))
    carry_out(request(folder / "results", stage="finetune"))
    assert len(queued(folder)) == 3


def test_an_experiment_that_a_pool_explains_is_not_submitted_again(folder: Path) -> None:
    results = folder / "results"
    study = request(results, stage="explain", profile={"nodes": 2})
    other = replace(study.members[0], experiment=Experiment(results / "other"))
    (pool,) = carry_out(replace(study, also=(other,)))
    assert list(pool.job.record().also) == ["other"]
    assert carry_out(replace(study, also=(other,)))[0].found
    with pytest.raises(InputError, match="study/0001-explain explains other already"):
        carry_out(replace(study, members=(other,)))
    with pytest.raises(InputError, match="it explains study, other"):
        carry_out(study)
    third = replace(other, experiment=Experiment(results / "third"))
    with pytest.raises(InputError, match="study/0001-explain explains other already"):
        carry_out(replace(study, members=(third,), also=(other,)))
    slurm.cancel([pool.accepted.job_id])
    until(lambda: not still_going(pool.job))
    assert not carry_out(replace(study, members=(other,)))[0].found


def test_a_finished_job_is_no_reason_not_to_submit(folder: Path) -> None:
    (first,) = carry_out(request(folder / "results"))
    done(first.job, first.accepted.job_id)
    slurm.cancel([first.accepted.job_id])
    (second,) = carry_out(request(folder / "results"))
    assert (second.found, second.job.path.name) == (False, "0002-pretrain")


def test_a_job_that_failed_can_be_submitted_anew(folder: Path) -> None:
    (first,) = carry_out(request(folder / "results"))
    slurm.cancel([first.accepted.job_id])
    until(lambda: not still_going(first.job))
    (second,) = carry_out(request(folder / "results", overrides=("pretrain.epochs=4",)))
    assert second.job.path.name == "0002-pretrain"


def test_a_job_waits_for_anothers(folder: Path) -> None:
    (other,) = carry_out(request(folder / "elsewhere"))
    (mine,) = carry_out(request(folder / "results", after_jobs=(other.accepted.job_id,)))
    assert dependency(mine.accepted.job_id).startswith(f"afterok:{other.accepted.job_id}")
    assert mine.job.record().after_jobs == (other.accepted.job_id,)


def test_clients_at_the_same_moment_submit_one_job(folder: Path) -> None:
    pids = [in_child(lambda: carry_out(request(folder / "results"))) for _ in range(4)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * 4
    assert len(queued(folder)) == len(jobs_in(folder)) == 1


def test_refused_clients_at_the_same_moment_leave_nothing(folder: Path) -> None:
    def refused() -> None:
        with pytest.raises(InputError, match="--partition absent"):
            carry_out(request(folder / "results", profile={"partition": "absent"}))

    pids = [in_child(refused) for _ in range(4)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * 4
    assert list(folder.iterdir()) == []


def here(results: Path, **changes: Any) -> plan.Request:
    profile = parse_profile({"kind": "local", "device": "cpu", "threads": 1, **changes.pop("profile", {})})
    return replace(request(results, **changes), profile=profile, profile_name="local")


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Path]:
    """A results folder of this machine's; its controllers and ranks are ended afterwards."""
    yield tmp_path / "results"
    for job in jobs_in(tmp_path):
        for one in job.submissions():
            pid = local.controller_of(one.intent.token)
            if pid is not None:
                kill_with_ranks(pid)


@pytest.mark.slow
def test_jobs_in_the_background_survive_their_client_and_come_one_after_another(background: Path) -> None:
    wanted = here(background, stage="pipeline", overrides=("pretrain.epochs=2",), profile={"tasks": 2})
    pid = in_child(lambda: carry_out(wanted))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    again = carry_out(wanted)
    assert [one.found for one in again] == [True] * 4
    for one in again:
        assert os.getsid(int(one.accepted.job_id)) == int(one.accepted.job_id)
    until(lambda: succeeded(again[-1].job), 240)
    assert (background / "study" / "report" / "index.html").is_file()
    for one, ranks in ((again[0], (0, 1)), (again[2], (0,))):  # pretraining has two ranks, explaining a pool
        assert {path.name for path in one.job.logs.iterdir()} == {
            f"{one.accepted.job_id}_{rank}_log.{kind}" for rank in ranks for kind in ("out", "err")
        } | {"controller.log"}
    assert '"workers": 2' in (background / "study" / "pool.jsonl").read_text()


@pytest.mark.slow
def test_a_background_job_behind_one_that_fails_does_not_begin(background: Path) -> None:
    wanted = here(background, stage="pipeline", overrides=("datasets=[absent.npz]",))
    handed = carry_out(wanted)
    until(lambda: not any(still_going(one.job) for one in handed), 90)
    assert handed[0].job.newest_attempt() == 1
    assert "absent.npz" in (handed[0].job.outcome(1) or Outcome(outcome="done")).reason
    assert [one.job.newest_attempt() for one in handed[1:]] == [0, 0, 0]
    told = (handed[1].job.logs / "controller.log").read_text()
    assert "study/0001-pretrain has not succeeded" in told


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a rank", "the other rank"])
def test_a_dead_rank_ends_the_others_and_all_start_again(victim: str, background: Path) -> None:
    (handed,) = carry_out(here(background, overrides=("pretrain.epochs=40",), profile={"tasks": 2}))
    job = handed.job

    def training() -> bool:
        beat = job.heartbeat(1)
        return beat is not None and (beat.done or 0) > 4

    until(training, 90)
    ranks = psutil.Process(int(handed.accepted.job_id)).children()
    first = job.attempt(1)
    assert first is not None
    chosen = next(rank for rank in ranks if (rank.pid == first.pid) == (victim == "a rank"))
    os.kill(chosen.pid, signal.SIGKILL)
    until(lambda: succeeded(job), 180)
    assert job.newest_attempt() == 2


def test_members_of_a_sweep_take_turns_here(background: Path) -> None:
    handed = carry_out(here(background, names=("a", "b")))
    assert [one.job.record().array for one in handed] == [None, None]
    running = [psutil.Process(int(one.accepted.job_id)) for one in handed]
    until(lambda: any(process.children() for process in running))
    (waiting,) = [one.job for one, process in zip(handed, running, strict=True) if not process.children()]
    told = waiting.logs / "controller.log"
    until(lambda: "waits for its turn" in told.read_text())
    for process in running:
        process.terminate()
    until(lambda: not any(still_going(one.job) for one in handed), 60)
    assert "before its ranks began" in told.read_text()


def test_the_newest_job_alone_is_compared(tmp_path: Path) -> None:
    old, new = (JobFolder.create(Experiment(tmp_path / "study"), "pretrain") for _ in range(2))
    for job in (old, new):
        job.write_record(
            plan._record(request(tmp_path), "pretrain", request(tmp_path).members[0], plan.current_snapshot(tmp_path))
        )
    assert chain._newest_like(Experiment(tmp_path / "study"), new.record()) == new
