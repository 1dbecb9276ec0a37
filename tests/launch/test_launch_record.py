"""The job's folder: numbers are taken once, records are whole, an old attempt's word stays its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_jobs import new_job, start
from tiny import in_child

from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.launch.record import Accepted, Attempt, Heartbeat, JobFolder, Outcome, jobs_of


def test_folders_count_up_over_all_stages(tmp_path: Path) -> None:
    names = [new_job(tmp_path, stage=stage).path.name for stage in ("pretrain", "finetune", "explain")]
    assert names == ["0001-pretrain", "0002-finetune", "0003-explain"]
    assert [job.path.name for job in jobs_of(Experiment(tmp_path / "tiny"))] == names


def test_a_folder_without_a_record_is_no_job_and_its_number_is_not_reused(tmp_path: Path) -> None:
    JobFolder.create(Experiment(tmp_path / "tiny"), "pretrain")
    assert jobs_of(Experiment(tmp_path / "tiny")) == []
    assert new_job(tmp_path).path.name == "0002-pretrain"


def test_processes_that_begin_at_once_get_different_attempts(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    children = [in_child(lambda: [start(job, job_id=str(os.getpid())) for _ in range(20)]) for _ in range(4)]
    for pid in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    attempts = job.attempts()
    assert sorted(attempts) == list(range(1, 81))
    owners = [attempt.job_id for attempt in attempts.values()]
    assert {owners.count(str(pid)) for pid in children} == {20}
    assert not [path for path in (job.path / "attempts").iterdir() if path.name.startswith(".")]


def test_a_submission_is_an_intent_until_the_scheduler_has_answered(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    submission = job.intend("ab12")
    assert submission.intent.comment == "maehpc:ab12"
    assert [one.accepted for one in job.submissions()] == [None]
    job.accept(submission, Accepted(job_id="12", scheduler="slurm", logs=str(job.logs)))
    again = job.intend("cd34")
    assert again.number == 2
    assert [one.accepted and one.accepted.job_id for one in job.submissions()] == ["12", None]


def test_outcomes_belong_to_their_attempt(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    job.write_outcome(start(job), Outcome(outcome="failed", reason="x"))
    assert job.outcome(start(job, restart=1)) is None
    assert job.newest_attempt() == 2


def test_cancelled_is_a_mark(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    assert not job.cancelled
    job.mark_cancelled()
    assert job.cancelled
    job.unmark_cancelled()
    assert not job.cancelled


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": 1}', b"\xff\xfe"])
def test_a_damaged_record_is_named(tmp_path: Path, damage: bytes) -> None:
    job = new_job(tmp_path)
    (job.path / "job.json").write_bytes(damage)
    with pytest.raises(InputError, match=r"job\.json cannot be read"):
        job.record()


@pytest.mark.parametrize("datasets", [3, "digits", [3], {"a": 1}, None])
def test_a_recipe_whose_datasets_are_none_is_named(tmp_path: Path, datasets: object) -> None:
    job = new_job(tmp_path)
    facts = json.loads((job.path / "job.json").read_bytes())
    (job.path / "job.json").write_text(json.dumps({**facts, "recipe": {"datasets": datasets}}))
    with pytest.raises(InputError, match=r"job\.json cannot be read .*datasets are no list of names"):
        job.record()


beats = st.builds(
    Heartbeat,
    sequence=st.integers(0, 2**40),
    phase=st.text(max_size=20),
    dataset=st.none() | st.text(max_size=20),
    done=st.none() | st.integers(0, 2**40),
    total=st.none() | st.integers(0, 2**40),
    images_per_second=st.none() | st.floats(0, 1e9),
    loss=st.none() | st.floats(-1e6, 1e6),
)


@settings(max_examples=50, deadline=None)
@given(beat=beats, hosts=st.lists(st.text(min_size=1, max_size=8), min_size=1).map(tuple))
def test_records_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, beat: Heartbeat, hosts: tuple[str, ...]
) -> None:
    job = new_job(tmp_path_factory.mktemp("records"))
    attempt = Attempt(job_id="3_1", restart=2, hosts=hosts, ranks=len(hosts), pid=9)
    number = job.begin_attempt(attempt)
    job.beat(number, beat)
    assert job.attempt(number) == attempt
    assert job.heartbeat(number) == beat
