"""`maehpc run explain --workers 2`: real commands, real Ray, and the bytes of one process whatever was killed."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from command_line import Run
from pool_runs import ALONE, POOLED, command, kill_one, named, running, whole

from maehpc.files import partial_name

pytestmark = pytest.mark.slow


def test_two_workers_write_the_bytes_of_one_process(place: Path, finished: Path) -> None:
    done = command(place, *POOLED)
    assert done.returncode == 0, done.stderr
    whole(place, finished)
    events = [json.loads(line) for line in (place / "results/tiny/pool.jsonl").read_text().splitlines()]
    assert (events[0]["event"], events[-1]["event"]) == ("begun", "over")
    assert events[-1].items() >= {"reason": None, "unfinished": 0, "quarantined": 0}.items()
    done = [event for event in events if event["event"] == "done"]
    assert sorted(event["shard"] for event in done) == list(range(60))
    assert {event["worker"] for event in done} <= {event["worker"] for event in events if event["event"] == "joined"}
    again = command(place, *POOLED)
    assert again.returncode == 0 and "already done" in again.stderr


def test_a_killed_worker_costs_its_shard_alone(place: Path, finished: Path) -> None:
    with running(place, shards=3) as process:
        # What a worker leaves that is killed while it writes, which this one may or may not be doing.
        partial_name(place / "results/tiny/maps/digits.zarr/label/c.48").write_bytes(b"half")
        kill_one(psutil.Process(process.pid), named("ray::Actor"))
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert "died" in told
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
        obstacle = store / "label" / "c.48"
        obstacle.mkdir()
        _, told = process.communicate(timeout=120)
        assert process.returncode == 1, told
    assert "c.48" in told and "Traceback" not in told
    obstacle.rmdir()
    assert command(place, *POOLED).returncode == 0
    whole(place, finished)


def test_words_that_contradict_each_other_are_refused(run: Run, tmp_path: Path) -> None:
    refused = run("run", "explain", "--workers", "2", "--pdb")
    assert refused.code == 2 and "--pdb" in refused.err
    assert os.listdir(tmp_path) == []
