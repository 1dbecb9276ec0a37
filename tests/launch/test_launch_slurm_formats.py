"""Answers of the scheduler's commands are read whatever stands in them."""

from __future__ import annotations

import pytest

from maehpc.launch import slurm_formats
from maehpc.launch.slurm_formats import (
    Partition,
    SlurmJob,
    expand_nodes,
    parse_details,
    parse_partitions,
    parse_queue,
    parse_sacct,
    parse_show,
    parse_time_left,
    seconds_in,
    signal_name,
)

# Printed by Slurm 22.05.8 on the four-host cluster; \x1e and \x1f as `QUEUE` asks for them.
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
RESTARTS = (("9_0", "2", "9"), ("12", "0", "768"), ("13", "N/A", "N/A"))
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
    assert seconds_in(text) == seconds


@pytest.mark.parametrize(
    ("text", "code"), [("0:0", 0), ("3:0", 3), ("0:9", 137), ("768", 3), ("15", 143), ("0", 0), ("N/A", None)]
)
def test_exit_codes(text: str, code: int | None) -> None:
    assert slurm_formats._exit_code(text) == code


def test_squeue_with_odd_names() -> None:
    odd, member, running, waiting = parse_queue("CLUSTER: a\n" + SQUEUE)
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
    assert parse_queue("") == []


def test_restarts_and_exit_codes_of_members() -> None:
    lines = [f"{job_id:40}\x1f{restarts:12}\x1f{code:12}\x1f" for job_id, restarts, code in RESTARTS]
    assert parse_details("\n".join(["CLUSTER: a", *lines, ""])) == {"9_0": (2, 137), "12": (0, 3), "13": (None, None)}


@pytest.mark.parametrize(
    ("text", "seconds"), [("\x1e1:00\x1f\n", 60), ("\x1eUNLIMITED\x1f\n", None), ("CLUSTER: a\n", None)]
)
def test_time_left(text: str, seconds: int | None) -> None:
    assert parse_time_left(text) == seconds


def test_scontrol_is_read_where_fields_begin() -> None:
    job = parse_show("9_1", SCONTROL)
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
    assert parse_show("9", "") is None


def test_sacct_with_lines_in_names() -> None:
    cancelled, member, memory = parse_sacct(SACCT)
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
    gpu, long = parse_partitions(text)
    assert gpu == Partition("gpu", True, "up", 6, 1440, "gpu:2 gpu:a100:8(S:0-1)", 4, 3000)
    assert long == Partition("long", False, "down", 1, None, "", 4, 4000)


def test_signals_have_names() -> None:
    assert signal_name(137) == "SIGKILL"
    assert signal_name(1) is None
    assert signal_name(255) is None
