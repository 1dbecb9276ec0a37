"""Answers of the scheduler's commands are read whatever stands in them."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maehpc.launch import slurm
from maehpc.launch.slurm import SlurmError, SlurmJob, expand_nodes

# Printed by Slurm 22.05.8 on the four-host cluster; \x1e and \x1f as `_QUEUE` asks for them.
SQUEUE = (
    "\x1e7\x1fCANCELLED\x1fBeginTime\x1f\x1fmaehpc:x y\x1f1:00:00\x1fgpu\x1fod|d na\nJobState=DONE\x1f\n"
    "\x1e9_0\x1fCANCELLED\x1fNone\x1fn1\x1fmaehpc:arr\x1f59:57\x1fgpu\x1fwrap\x1f\n"
    "\x1e14\x1fRUNNING\x1fNone\x1fn[1-2]\x1fmaehpc:t\x1f1-00:00:00\x1fgpu\x1fmaehpc-toy\x1f\n"
    "\x1e15\x1fPENDING\x1fReqNodeNotAvail, UnavailableNodes:n[3-4]\x1f\x1f(null)\x1fUNLIMITED\x1fgpu\x1fw\x1f\n"
)
SCONTROL = """JobId=12 ArrayJobId=9 ArrayTaskId=1 JobName=wrap UserId=x JobState=DONE
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901750 Nice=0 Account=(null) QOS=(null)
   JobState=CANCELLED Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:15
   RunTime=00:00:03 TimeLimit=01:00:00 TimeMin=N/A
   SubmitTime=2026-11-22T02:38:39 EligibleTime=2026-11-22T02:38:43
   Partition=gpu AllocNode:Sid=localhost:23768
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n[1,3]
   BatchHost=n1
   NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Command=/tmp/ Comment=no
   WorkDir=/work/main
   Comment=maehpc:arr = 7; Restarts=9
   StdErr=/dev/null
   Power=
"""
SACCT = (
    "12\x1fCANCELLED by 1000\x1fn[1-2]\x1fgpu\x1fmaehpc:a\x1fmaehpc-toy-pretrain\x1f0:15\n"
    "13_4\x1fFAILED\x1fNone assigned\x1fgpu\x1f\x1ftwo\nlines\x1f1:0\n"
    "14\x1fOUT_OF_MEMORY\x1fn4\x1fgpu\x1f\x1fw\x1f0:125\n"
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-4]", ["n1", "n2", "n3", "n4"]),
        ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
        ("n[1,3],gpu[01-02]x", ["n1", "n3", "gpu01x", "gpu02x"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
        ("login-a.site.org,b", ["login-a.site.org", "b"]),
        ("", []),
    ],
)
def test_host_lists(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == tuple(names)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("59:57", 3597),
        ("1:00:00", 3600),
        ("2-03:04:05", 183845),
        ("3-00", 259200),
        ("0:00", 0),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_time_spans(text: str, seconds: int | None) -> None:
    assert slurm._seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "code"), [("0:0", 0), ("3:0", 3), ("0:9", 137), ("768", 3), ("15", 143), ("0", 0), ("N/A", None)]
)
def test_exit_codes(text: str, code: int | None) -> None:
    assert slurm._exit_code(text) == code


def test_squeue_with_odd_names() -> None:
    odd, member, running, waiting = slurm._parse_queue("CLUSTER: a\n" + SQUEUE)
    assert odd == SlurmJob(
        "7",
        "CANCELLED",
        "BeginTime",
        comment="maehpc:x y",
        time_left_s=3600,
        partition="gpu",
        name="od|d na\nJobState=DONE",
    )
    assert (member.job_id, member.reason, member.nodes) == ("9_0", "", ("n1",))
    assert (running.nodes, running.time_left_s) == (("n1", "n2"), 86400)
    assert (waiting.reason, waiting.comment, waiting.time_left_s) == (
        "ReqNodeNotAvail, UnavailableNodes:n[3-4]",
        "",
        None,
    )


def test_squeue_says_nothing() -> None:
    assert slurm._parse_queue("") == []


def test_scontrol_is_read_where_fields_begin() -> None:
    job = slurm._parse_show("9_1", SCONTROL)
    assert job == SlurmJob(
        job_id="9_1",
        state="CANCELLED",
        nodes=("n1", "n3"),
        restarts=2,
        comment="maehpc:arr = 7; Restarts=9",
        time_left_s=3597,
        partition="gpu",
        exit_code=143,
        name="wrap UserId=x JobState=DONE",
        source="scontrol",
    )
    assert slurm._parse_show("9", "") is None


def test_sacct_with_lines_in_names() -> None:
    cancelled, member, memory = slurm._parse_sacct(SACCT)
    assert (cancelled.state, cancelled.reason, cancelled.nodes, cancelled.exit_code) == (
        "CANCELLED",
        "by 1000",
        ("n1", "n2"),
        143,
    )
    assert (member.job_id, member.name, member.nodes, member.exit_code) == ("13_4", "two\nlines", (), 1)
    assert (memory.state, memory.name) == ("OUT_OF_MEMORY", "w")


def test_partitions_with_hosts_of_several_kinds() -> None:
    text = (
        "\x1egpu*\x1fup\x1f4\x1f1-00:00:00\x1fgpu:2\x1f4\x1f4000\x1f\n\x1egpu*\x1fup\x1f2\x1f1-00:00:00\x1fgpu:a100:8(S:0-1)\x1f64+\x1f3000+\x1f\n"
        "\x1elong\x1fdown\x1f1\x1finfinite\x1f(null)\x1f4\x1f4000\x1f\n"
    )
    gpu, long = slurm._parse_partitions(text)
    assert gpu == slurm.Partition("gpu", True, "up", 6, 1440, "gpu:2 gpu:a100:8(S:0-1)", 4, 3000)
    assert long == slurm.Partition("long", False, "down", 1, None, "", 4, 4000)


def test_signals_have_names() -> None:
    assert slurm.signal_name(137) == "SIGKILL"
    assert slurm.signal_name(1) is None
    assert slurm.signal_name(255) is None


def test_no_slurm_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.available()
    with pytest.raises(SlurmError, match="no squeue on the PATH"):
        slurm.queue()
    with pytest.raises(SlurmError, match="no scontrol on the PATH"):
        slurm.show("1")
    assert slurm.accounting(["1"]) is None


def test_a_command_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nexec sleep 60\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.3)
    with pytest.raises(SlurmError, match="no answer from Slurm's controller"):
        slurm.queue()


def test_a_persons_own_settings_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ -z "$SQUEUE_STATES$SQUEUE_FORMAT" ] && [ "$LC_ALL" = C ] || exit 7\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SQUEUE_STATES", "FAILED")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    assert slurm.queue() == []


@pytest.mark.slow
def test_a_controller_that_is_away(mini: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = Path(mini.environment["SLURM_CONF"]).read_text()
    dead = tmp_path / "slurm.conf"
    dead.write_text(
        "\n".join(
            "SlurmctldPort=1"
            if line.startswith("SlurmctldPort")
            else "SlurmctldHost=localhost(127.0.0.1)"
            if line.startswith("SlurmctldHost")
            else line
            for line in text.splitlines()
        )
    )
    monkeypatch.setenv("SLURM_CONF", str(dead))
    with pytest.raises(SlurmError, match="got no answer from Slurm's controller while listing the queue"):
        slurm.queue()


@pytest.fixture
def real(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`real(options…)` submits a job that does nothing of note, and returns its id."""
    for name, value in mini.environment.items():
        monkeypatch.setenv(name, value)
    made: list[str] = []

    def submit(*options: str, work: str = "sleep 60") -> str:
        words = ["sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", work]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        made.append(done.stdout.strip())
        return made[-1]

    yield submit
    slurm.cancel(made)


@pytest.mark.slow
def test_real_answers(real: Any) -> None:
    token = uuid.uuid4().hex
    name = "od|d;na'me\n   JobState=DONE"
    plain = real("-J", name, "--comment", f"maehpc:{token} job", "--hold", "-N", "2")
    array = real("--array", "0-2", "--comment", f"maehpc:array-{token}", "--hold")
    mine = {job.job_id: job for job in slurm.queue() if job.job_id.partition("_")[0] in (plain, array)}
    assert sorted(mine) == sorted([plain, f"{array}_0", f"{array}_1", f"{array}_2"])
    assert mine[plain].name == name
    assert (mine[plain].state, mine[plain].reason, mine[plain].comment) == (
        "PENDING",
        "JobHeldUser",
        f"maehpc:{token} job",
    )
    shown = slurm.show(plain)
    assert shown is not None
    assert (shown.state, shown.comment, shown.restarts, shown.reason) == (
        "PENDING",
        f"maehpc:{token} job",
        0,
        "JobHeldUser",
    )
    assert slurm.show("99999999") is None
    assert slurm.show(f"{array}_9") is None
    assert slurm.known(["99999999"]) == []
    assert [job.job_id for job in slurm.known(["99999999", plain])] == [plain]
    assert slurm.find_comment(f"maehpc:array-{token}") == array
    assert slurm.find_comment(f"maehpc:{token} job") == plain
    assert slurm.find_comment(f"maehpc:{token}") is None
    assert slurm.time_left_s("99999999") is None
    assert not slurm.requeue("99999999")
    assert slurm.requeue(plain)  # it waits already: nothing else has to be submitted in its stead
    slurm.set_dependency(plain, f"afterok:{array}")
    slurm.set_dependency(plain, "")
    with pytest.raises(SlurmError, match="99999999"):
        slurm.set_dependency("99999999", "")
    slurm.cancel([plain, "99999999"])
    slurm.cancel([plain])
    assert plain not in {job.job_id for job in slurm.queue()}
    (ended,) = slurm.with_details([job for job in slurm.queue(ended=True) if job.job_id == plain])
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)


@pytest.mark.slow
def test_real_partitions(real: Any) -> None:
    found = {partition.name: partition for partition in slurm.partitions()}
    assert found["gpu"] == slurm.Partition("gpu", True, "up", 4, 1440, "gpu:2", 4, 4000)
    assert found["urgent"].nodes == 4
