"""`maehpc run explain --workers 2`: real commands, real Ray, and the bytes of one process whatever was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import Run
from pool_runs import ALONE, POOLED, command, events, kill_one, named, running, stored, whole

from maehpc.files import partial_name
from maehpc.stages.verify import verify_results

pytestmark = pytest.mark.slow


def test_two_workers_write_the_bytes_of_one_process(place: Path, finished: Path) -> None:
    done = command(place, *POOLED)
    assert done.returncode == 0, done.stderr
    whole(place, finished)
    seen = events(place)
    assert (seen[0]["event"], seen[-1]["event"]) == ("begun", "over")
    assert seen[-1].items() >= {"reason": None, "unfinished": 0, "quarantined": 0}.items()
    done = [event for event in seen if event["event"] == "done"]
    assert sorted(event["shard"] for event in done) == list(range(60))
    assert {event["worker"] for event in done} <= {event["worker"] for event in seen if event["event"] == "joined"}
    again = command(place, *POOLED)
    assert again.returncode == 0 and "already done" in again.stderr


def test_a_killed_worker_costs_its_shard_alone(place: Path, finished: Path) -> None:
    with running(place, shards=3) as process:
        until_joined(place, 2)  # a worker that has not yet joined has no shard to lose
        # What a worker leaves that is killed while it writes, which this one may or may not be doing.
        partial_name(place / "results/tiny/maps/digits.zarr/scores/c.48.0").write_bytes(b"half")
        kill_one(psutil.Process(process.pid), named("ray::Actor"))
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert "died" in told and "240/240" in told and "failures 1" in told
    whole(place, finished)


def test_a_killed_head_ends_the_run_and_the_same_command_goes_on(place: Path, finished: Path) -> None:
    with running(place, shards=3) as process:
        kill_one(psutil.Process(process.pid), named("raylet/raylet"))
        _, told = process.communicate(timeout=60)
        assert process.returncode == 1, told
    assert "head has ended" in told and "Traceback" not in told
    assert 3 <= len(list((place / "results/tiny/ledger/digits").glob("shard-*.json"))) < 60
    assert command(place, *POOLED).returncode == 0
    whole(place, finished)


def test_a_wish_to_stop_and_a_kill_of_the_driver(place: Path, finished: Path) -> None:
    with running(place, shards=3) as process:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 75, told
    assert "everything finished is saved" in told
    with running(place, shards=3) as process:
        for worker in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if named("ray::Actor")(worker):
                    worker.suspend()  # so that the run is still there when the other has been refused
        (row,) = json.loads(command(place, "status", "--json").stdout)["jobs"]
        assert row["job"] == f"tiny/{process.pid}-explain" and (row["scheduler"], row["state"]) == ("run", "running")
        assert (row["dataset"], row["total"], row["unit"]) == ("digits", 240, "image") and row["done"] >= 12
        assert "digits" in command(place, "status", "tiny").stdout
        refused = command(place, *ALONE)
        assert refused.returncode == 2 and "is being written by" in refused.stderr, refused.stderr
        process.kill()
    done = command(place, *ALONE, "--threads", "1")  # one process goes on where several were
    assert done.returncode == 0, done.stderr
    whole(place, finished)


def test_a_shard_that_the_disk_refuses_ends_the_run(place: Path, finished: Path) -> None:
    store = place / "results" / "tiny" / "maps" / "digits.zarr"
    with running(place, shards=3) as process:
        # A folder where a later shard's file belongs.
        obstacle = store / "scores" / "c.48.0"
        obstacle.mkdir()
        _, told = process.communicate(timeout=120)
        assert process.returncode == 1, told
    assert "c.48" in told and "Traceback" not in told
    obstacle.rmdir()
    assert command(place, *POOLED).returncode == 0
    whole(place, finished)


def joined(place: Path) -> list[dict[str, Any]]:
    return [event for event in events(place) if event["event"] == "joined"]


def until_joined(place: Path, workers: int) -> None:
    deadline = time.monotonic() + 60
    while len(joined(place)) < workers:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_more_workers_join_a_run_and_leave_with_it(place: Path, finished: Path) -> None:
    alone = command(place, *ALONE, "--join")
    assert alone.returncode == 2 and "no pool is explaining" in alone.stderr
    elsewhere = command(place, *POOLED, "--pool-address", "192.0.2.1")
    assert elsewhere.returncode == 2 and "this host has" in elsewhere.stderr
    with running(place, shards=1) as process:
        token = place / "results" / "tiny" / ".pool" / "token"
        assert token.stat().st_mode & 0o777 == 0o600
        until_joined(place, 2)
        workers = [one for one in psutil.Process(process.pid).children(recursive=True) if named("ray::Actor")(one)]
        for worker in workers:
            worker.suspend()  # until the other has come
        words = [sys.executable, "-m", "maehpc", *ALONE, "--join", "--workers", "1"]
        with subprocess.Popen(words, cwd=place, stderr=subprocess.PIPE, text=True) as helper:
            deadline = time.monotonic() + 90
            while len(joined(place)) < 3:
                assert helper.poll() is None and time.monotonic() < deadline, helper.stderr and helper.stderr.read()
                time.sleep(0.1)
            for worker in workers:
                worker.resume()
            _, told = process.communicate(timeout=120)
            _, said = helper.communicate(timeout=60)
    assert process.returncode == 0, told
    assert helper.returncode == 0 and "the pool is over" in said, said
    seen = events(place)
    done = {event["worker"] for event in seen if event["event"] == "done"}
    assert len(done) == 3, "the one that joined late computes too"
    assert not token.parent.exists()
    whole(place, finished)


def test_several_experiments_are_one_pool(place: Path, finished: Path) -> None:
    shutil.copytree(place / "results" / "tiny", place / "results" / "other")
    done = command(place, "run", "explain", "--name", "tiny,other", "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert [records[name]["digits"]["computed"] for name in ("tiny", "other")] == [60, 60]
    wanted = stored(finished)
    for name in ("tiny", "other"):
        found = stored(place, name)
        assert sorted(found) == sorted(wanted) and all(found[path] == wanted[path] for path in wanted)
        seen = events(place, name)
        assert {event["store"] for event in seen if event["event"] == "done"} == {f"{name}/digits"}
        assert {event["worker"] for event in seen if event["event"] == "joined"} == {"worker1", "worker2"}
    assert verify_results(place / "results").problems == []
    refused = command(place, "run", "finetune", "--name", "tiny,other")
    assert refused.returncode == 2 and "one name" in refused.stderr


def test_words_that_contradict_each_other_are_refused(run: Run, tmp_path: Path) -> None:
    refused = run("run", "explain", "--workers", "2", "--pdb")
    assert refused.code == 2 and "--pdb" in refused.err
    assert os.listdir(tmp_path) == []
