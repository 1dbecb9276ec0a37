"""A job is handed over once, whatever happens to the client; on the real Slurm."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch_jobs import new_job
from submit_jobs import Sbatch, dependency, everything, jobs_in, place, queued, request, until
from tiny import in_child

from maehpc.errors import InputError, RunError
from maehpc.launch import slurm, submission
from maehpc.launch.chain import carry_out
from maehpc.launch.plan import Request
from maehpc.launch.record import Attempt, JobFolder, Outcome
from maehpc.launch.submission import recover, repoint_dependents, resubmit, still_going


@pytest.fixture
def folder(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with place(mini, monkeypatch) as path:
        yield path


@pytest.fixture
def sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    return Sbatch(folder / "bin", monkeypatch)


def killed(wanted: Request, sign: Path | None = None) -> None:
    """A client that is killed (SIGKILL) as soon as `sign` exists, or that sbatch itself kills."""
    pid = in_child(lambda: carry_out(wanted))
    try:
        if sign is not None:
            until(sign.exists)
            os.kill(pid, signal.SIGKILL)
    finally:
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def only_job(results: Path) -> JobFolder:
    (job,) = jobs_in(results)
    return job


def test_a_client_killed_after_sbatch_finds_its_job_again(folder: Path, sbatch: Sbatch) -> None:
    wanted = request(folder / "results")
    sbatch.does('real "$@"; kill -KILL $PPID')
    killed(wanted)
    job = only_job(folder / "results")
    assert job.submissions()[-1].accepted is None
    (waiting,) = queued(folder)
    (handed,) = carry_out(wanted)
    assert (handed.job, handed.accepted.job_id, handed.found) == (job, waiting.job_id, True)
    assert job.submissions()[-1].accepted == handed.accepted
    assert sbatch.called() == 1
    assert [one.job_id for one in queued(folder)] == [waiting.job_id]


@pytest.mark.slow
def test_an_sbatch_that_outlives_its_client_is_waited_for(folder: Path, sbatch: Sbatch) -> None:
    """It has not asked Slurm yet when the second client comes: a look alone would find nothing."""
    wanted = request(folder / "results")
    go = folder / "go"
    sbatch.does(f'touch {sbatch.took}; until [ -e {go} ]; do sleep 0.1; done; sleep 2; real "$@"')
    killed(wanted, sbatch.took)
    assert queued(folder) == []
    go.touch()
    (handed,) = carry_out(wanted)
    assert handed.found
    assert [one.job_id for one in queued(folder)] == [handed.accepted.job_id]
    assert sbatch.called() == 1


def test_a_client_killed_before_sbatch_leaves_what_the_next_one_uses(folder: Path, sbatch: Sbatch) -> None:
    wanted = request(folder / "results")
    sbatch.does(f"touch {sbatch.took}; sleep 1; exit 1")
    killed(wanted, sbatch.took)
    sbatch.does('real "$@"')
    (handed,) = carry_out(wanted)
    assert (handed.job, handed.found) == (only_job(folder / "results"), False)
    assert [one.number for one in handed.job.submissions()] == [1, 2]
    assert [one.job_id for one in queued(folder)] == [handed.accepted.job_id]


def test_an_array_whose_client_was_killed_is_found_whole(folder: Path, sbatch: Sbatch) -> None:
    wanted = request(folder / "results", names=("a", "b", "c"))
    sbatch.does(f'real "$@"; touch {sbatch.took}; sleep 2')
    killed(wanted, sbatch.took)
    handed = carry_out(wanted)
    (array,) = {one.accepted.job_id.partition("_")[0] for one in handed}
    assert [one.accepted.job_id for one in handed] == [f"{array}_{number}" for number in range(3)]
    assert all(one.found for one in handed)
    assert sbatch.called() == 1
    assert sorted(one.job_id for one in queued(folder)) == [f"{array}_{number}" for number in range(3)]
    member = handed[1].job
    (member.path / "submissions" / "0001" / "accepted.json").unlink()
    found = recover(member)
    assert found is not None and found.accepted == handed[1].accepted


@pytest.mark.parametrize(
    "said", ["Socket timed out on send/recv operation", "Unable to contact slurm controller (receive failure)"]
)
def test_an_answer_that_is_lost_after_slurm_took_the_job_is_no_failure(said: str, folder: Path, sbatch: Sbatch) -> None:
    sbatch.does(f'real "$@" > /dev/null; echo "sbatch: error: Batch job submission failed: {said}" >&2; exit 1')
    (handed,) = carry_out(request(folder / "results"))
    assert [one.job_id for one in queued(folder)] == [handed.accepted.job_id]


def test_an_sbatch_without_an_answer_is_ended_and_its_job_looked_for(
    folder: Path, sbatch: Sbatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maehpc.launch import sbatch as sbatch_module

    monkeypatch.setattr(sbatch_module, "SBATCH_TIMEOUT_S", 2.0)
    sbatch.does('real "$@" > /dev/null; exec sleep 30')
    (handed,) = carry_out(request(folder / "results"))
    assert [one.job_id for one in queued(folder)] == [handed.accepted.job_id]


def test_a_timeout_before_slurm_took_the_job_is_told_and_tried_again(
    folder: Path, sbatch: Sbatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "LOOK_AGAIN_S", (0.0, 0.1))
    wanted = request(folder / "results")
    sbatch.does('echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1')
    with pytest.raises(RunError, match="run the same command again") as caught:
        carry_out(wanted)
    assert not isinstance(caught.value, InputError)
    job = only_job(folder / "results")
    sbatch.does('real "$@"')
    (handed,) = carry_out(wanted)
    assert (handed.job, handed.found) == (job, False)
    assert [one.job_id for one in queued(folder)] == [handed.accepted.job_id]


@pytest.mark.parametrize("before", ["nothing", "results", "experiment"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"partition": "absent"}, "--partition absent"),
        ({"nodes": 5}, "--nodes 5"),
        ({"time_min": 2000}, "--time 2000"),
        ({"gpus_per_node": 9}, "--gpus-per-node 9"),
        ({"constraint": "absent"}, "constraint"),
        ({"reservation": "absent"}, "reservation"),
        ({"mem_gb": 10000}, "mem"),
    ],
)
def test_a_refusal_leaves_nothing_behind(settings: dict[str, Any], expected: str, before: str, folder: Path) -> None:
    if before != "nothing":
        (folder / "results").mkdir()
    if before == "experiment":
        (folder / "results" / "study").mkdir()
        (folder / "results" / "study" / "note").write_text("mine")
    there = everything(folder)
    with pytest.raises(InputError) as caught:
        carry_out(request(folder / "results", profile={"sbatch": {}, **settings}))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(folder) == there


def test_no_sbatch_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(InputError, match="there is no sbatch on the PATH"):
        carry_out(request(folder / "results"))
    monkeypatch.undo()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("when", ["before", "at sbatch"])
def test_slurm_that_is_down(
    when: str, folder: Path, sbatch: Sbatch, mini: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = folder / "slurm.conf"
    text = Path(mini.environment["SLURM_CONF"]).read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("SlurmctldPort", "MessageTimeout"))]
    dead.write_text("\n".join([*lines, "SlurmctldPort=1", "MessageTimeout=2"]))
    if when == "before":
        monkeypatch.setenv("SLURM_CONF", str(dead))
    else:
        sbatch.does(f'SLURM_CONF={dead} real "$@"')
    there = everything(folder)
    with pytest.raises(InputError) as caught:
        carry_out(request(folder / "results"))
    assert "nothing was submitted" in str(caught.value)
    assert {name: data for name, data in everything(folder).items() if name != "bin/calls"} == there


def test_a_chain_that_is_refused_halfway_is_taken_back(folder: Path, sbatch: Sbatch) -> None:
    told = "sbatch: error: AssocMaxSubmitJobLimit\\nsbatch: error: Batch job submission failed: Job violates policy"
    note = f"grep -o 'maehpc:[0-9a-f]*' \"$1\" >> {sbatch.took}"
    sbatch.does(f'{note}; if [ "$calls" -lt 3 ]; then real "$@"; else printf "{told}\\n" >&2; exit 1; fi')
    with pytest.raises(InputError, match="quota of submitted jobs"):
        carry_out(request(folder / "results", stage="pipeline"))
    assert sbatch.called() == 3
    assert not (folder / "results").exists()
    comments = set(sbatch.took.read_text().split())
    assert len(comments) == 3
    assert [job for job in slurm.queue() if job.comment in comments] == []


def test_what_comes_after_a_job_follows_it_to_its_new_number(folder: Path) -> None:
    results = folder / "results"
    first, second, *_ = carry_out(request(results, stage="pipeline"))
    assert dependency(second.accepted.job_id).startswith(f"afterok:{first.accepted.job_id}")
    slurm.cancel([first.accepted.job_id])
    until(lambda: not still_going(first.job))
    again = resubmit(first.job)
    assert again.accepted is not None and again.accepted.job_id != first.accepted.job_id
    assert again.number == 2
    assert dependency(second.accepted.job_id).startswith(f"afterok:{again.accepted.job_id}")
    script = (again.folder / "script.sh").read_text()
    assert first.job.submissions()[0].intent.token not in script and again.intent.token in script
    assert f"#SBATCH --chdir={results.parent}" in script
    assert repoint_dependents(second.job, "1") != []  # explain waits for it


def test_a_member_of_an_array_is_submitted_again_alone(folder: Path) -> None:
    handed = carry_out(request(folder / "results", stage="pipeline", names=("a", "b")))
    first, of_second = handed[1], handed[3]
    assert dependency(of_second.accepted.job_id).startswith("aftercorr:")
    slurm.cancel([first.accepted.job_id])
    until(lambda: not still_going(first.job))
    again = resubmit(first.job)
    assert again.accepted is not None and "_" not in again.accepted.job_id
    script = (again.folder / "script.sh").read_text()
    assert "--array" not in script and str(first.job.path) in script
    assert dependency(of_second.accepted.job_id).startswith(f"afterok:{again.accepted.job_id}")
    assert still_going(handed[0].job) and still_going(first.job)


def test_a_job_that_slurm_has_forgotten_is_known_by_its_start(folder: Path) -> None:
    (handed,) = carry_out(request(folder / "results"))
    job = handed.job
    forgotten = job.intend("0" * 32)
    assert recover(job) == job.submissions()[0]  # never taken: the one before counts
    job.begin_attempt(Attempt(job_id="999999", restart=0, hosts=("n1",), ranks=1, pid=1))
    found = recover(job)
    assert found is not None and found.number == forgotten.number
    assert found.accepted is not None and found.accepted.job_id == "999999"
    assert not still_going(job)


def test_what_has_succeeded_is_waited_for_no_more(folder: Path) -> None:
    first, second, *_ = carry_out(request(folder / "results", stage="pipeline"))
    number = first.job.begin_attempt(Attempt(job_id=first.accepted.job_id, restart=0, hosts=("n1",), ranks=1, pid=1))
    assert submission.open_dependency(second.job.record()) == f"afterok:{first.accepted.job_id}"
    first.job.write_outcome(number, Outcome(outcome="done"))
    assert submission.open_dependency(second.job.record()) is None


def test_code_that_was_changed_is_not_submitted_again(folder: Path) -> None:
    (handed,) = carry_out(request(folder / "results"))
    victim = Path(handed.job.record().code) / "maehpc" / "errors.py"
    victim.chmod(0o644)
    victim.write_text("")
    with pytest.raises(RunError, match=r"errors\.py was changed"):
        resubmit(handed.job)
    assert len(handed.job.submissions()) == 1


@pytest.mark.slow
def test_two_who_submit_a_job_again_at_once_submit_it_once(folder: Path, sbatch: Sbatch) -> None:
    (handed,) = carry_out(request(folder / "results"))
    job = handed.job
    slurm.cancel([handed.accepted.job_id])
    until(lambda: not still_going(job))
    sbatch.does(f'touch {sbatch.took}; sleep 3; real "$@"')
    other = in_child(lambda: resubmit(job) and None)
    until(sbatch.took.exists)  # it has not asked Slurm yet
    ours = resubmit(job)
    _, status = os.waitpid(other, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert ours == job.submissions()[-1] and len(job.submissions()) == 2
    assert ours.accepted is not None
    assert [one.job_id for one in queued(folder)] == [ours.accepted.job_id]
    # What runs asks for the one after it.
    following = resubmit(job, dependency=f"afterany:{ours.accepted.job_id}")
    assert following.accepted is not None and following.accepted.job_id != ours.accepted.job_id


def test_a_job_that_is_cancelled_while_it_is_submitted_again_does_not_live(folder: Path, sbatch: Sbatch) -> None:
    (handed,) = carry_out(request(folder / "results"))
    job = handed.job
    slurm.cancel([handed.accepted.job_id])
    until(lambda: not still_going(job))
    sbatch.does(f'touch {job.path}/cancelled; real "$@"')
    with pytest.raises(RunError, match="was cancelled while it was submitted again"):
        resubmit(job)
    assert queued(folder) == []


def test_a_folder_that_is_gone_is_told_where_no_process_can_be_started(tmp_path: Path) -> None:
    job = new_job(tmp_path, profile={"kind": "local"}, directory=str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"no process can be started in .*gone \(No such file or directory\)"):
        submission.submit([job])
    assert job.submissions() == []
