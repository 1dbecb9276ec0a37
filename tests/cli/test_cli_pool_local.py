"""`maehpc submit explain` with a local profile of several tasks: a pool in the background, and the bytes of one process
whatever was killed, cancelled and resumed."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from command_line import Run
from pool_runs import bury, events, recorded, whole
from submit_jobs import jobs_in, until

from maehpc.launch.submission import still_going, succeeded


@pytest.fixture
def two(tmp_path: Path) -> str:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"kind": "local", "tasks": 2, "device": "cpu", "threads": 1}))
    return str(path)


def test_a_dry_run_tells_which_job_is_a_pool(run: Run, tiny: str, two: str) -> None:
    shown = run("submit", "pipeline", "--recipe", tiny, "--cluster", two, "--dry-run", "--json", "-q")
    assert shown.code == 0, shown.err
    told = json.loads(shown.out)
    begun = {job["job"].rpartition("-")[2]: re.findall(r"machine: (.*),", job["script"]) for job in told["jobs"]}
    assert begun == {
        "pretrain": ["2 ranks"],
        "finetune": ["2 ranks"],
        "explain": ["a pool of 2 workers"],
        "report": ["1 ranks"],
    }
    assert told["estimate"]["ranks"] == 2


def test_a_sweep_is_one_pool_where_several_workers_explain(run: Run, tiny: str, two: str) -> None:
    words = ("submit", "explain", "--recipe", tiny, "--name", "one,two", "--dry-run", "-q", "--cluster")
    together, apart = run(*words, two), run(*words, "local")
    assert together.out.count("==> ") == 1 and "One pool for 2 experiments: two too" in together.out
    assert apart.out.count("==> ") == 2 and "One pool" not in apart.out


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_background_pool_is_killed_cancelled_and_resumed(run: Run, place: Path, finished: Path, two: str) -> None:
    others = set(psutil.Process().children(recursive=True))  # of tests before this one
    submitted = run("submit", "explain", "--name", "tiny", "--cluster", two, "--metrics-port", "0", "-q")
    assert submitted.code == 0, submitted.err
    (job,) = jobs_in(place)
    until(lambda: len(recorded(place)) >= 3, 120)
    (row,) = json.loads(run("status", "--json").out)["jobs"]
    assert (row["state"], row["phase"], row["total"], row["unit"]) == ("running", "explain", 240, "image")
    log = run("logs", "tiny").out
    found = re.search(r"metrics for Prometheus at (http://127\.0\.0\.1:\d+/metrics)", log)
    assert found is not None and "attempt 1, 2 workers on" in log, log
    assert b"maehpc_images_done_total{" in urllib.request.urlopen(found[1], timeout=10).read()

    driver = job.attempt(1)
    assert driver is not None and driver.ranks == 1
    psutil.Process(driver.pid).kill()
    until(lambda: job.newest_attempt() == 2, 60)
    earlier = len(recorded(place))
    until(lambda: len(recorded(place)) > earlier, 120)

    below = set(psutil.Process().children(recursive=True)) - others
    cancelled = run("cancel", "tiny")
    assert cancelled.code == 0 and "it was running" in cancelled.out, cancelled.out + cancelled.err
    _, alive = psutil.wait_procs(below, timeout=60)
    bury()
    assert not [process.name() for process in alive if process.is_running()]
    assert not list((place / "results" / "tiny").glob(".pool/*"))
    (row,) = json.loads(run("status", "--json", "tiny").out)["jobs"]
    assert (row["state"], row["attempt"]) == ("cancelled", 2)
    ended = job.outcome(2)
    assert ended is not None and ended.outcome == "interrupted" and not ended.requeue

    missing = 60 - len(recorded(place))
    assert missing > 0
    resumed = run("resume", "tiny")
    assert resumed.code == 0, resumed.err
    until(lambda: succeeded(job), 120)
    until(lambda: not still_going(job), 30)
    told = events(place)
    latest = max(number for number, event in enumerate(told) if event["event"] == "begun")
    assert sum(event["event"] == "done" for event in told[latest:]) == missing
    assert len({event["worker"] for event in told[latest:] if event["event"] == "done"}) == 2
    whole(place, finished)
