"""`submit explain` over several hosts: a pool of workers on Ray, of which any may die, and the bytes of one process."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cluster_jobs import Study, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXPLAIN = {"images": 600, "sensitivity": {"samples": 40}, "batch_size": 4, "maps": {"shard_images": 4}}
"""150 shards: seconds of work for each of four workers on two cores."""


@pytest.fixture(scope="module")
def alone(mini: Any, place: Path) -> Study:
    """What one process on this machine makes of it."""
    study = Study(mini, place / "alone" / "results", settings={"explain": EXPLAIN})
    study.results.parent.mkdir()
    study.run("pipeline")
    return study


@pytest.fixture
def pooled(alone: Study, study: Callable[..., Study]) -> Callable[..., Study]:
    """Makes a study of two hosts in which all but the explanations is there."""

    def make(also: str | None = None, **profile: Any) -> Study:
        one = study(settings=alone.settings, profile=profile)
        shutil.copytree(alone.results, one.results)
        for folder in ("maps", "ledger", "report"):
            shutil.rmtree(one.experiment.root / folder)
        if also is None:
            one.submit(stage="explain")
        else:
            shutil.copytree(one.experiment.root, one.results / also)
            one.submit("--name", f"{one.name},{also}", stage="explain")
        return one

    return make


def stored(study: Study, experiment: str) -> dict[str, bytes]:
    root = study.results / experiment / "maps"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def whole(found: Study, alone: Study, *also: str) -> None:
    """Every byte is that of one process, and nothing is left running or lying about."""
    for experiment in (found.name, *also):
        ours, wanted = stored(found, experiment), stored(alone, alone.name)
        assert sorted(ours) == sorted(wanted)
        assert [name for name in wanted if ours[name] != wanted[name]] == [], found.told()
    assert found.maehpc("verify", str(found.results)).returncode == 0
    until(lambda: not processes(found), 30, lambda: f"left: {processes(found)}")
    assert not list(found.job.path.glob("rendezvous/*.token"))


def processes(study: Study) -> dict[int, str]:
    """Of Ray, on any host: command lines by process id."""
    found = {}
    for host in study.mini.hosts:
        for pid in study.mini.process_ids(host):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                if "ray::" in words or "ray/" in words or "maehpc.pool" in words:
                    found[int(pid)] = words[:300]
    return found


def shards(study: Study, dataset: str = "digits") -> int:
    """Recorded shards of a data set, or of all ("*")."""
    return len(list((study.experiment.root / "ledger").glob(f"{dataset}/shard-*.json")))


def aggregated(study: Study) -> Path:
    """The report over the results folder."""
    study.maehpc("aggregate", str(study.results))
    return study.results / "report"


def kill_one(study: Study, title: str) -> None:
    pid = next(pid for pid, words in processes(study).items() if title in words)
    os.kill(pid, signal.SIGKILL)


def test_a_host_loses_power(pooled: Callable[..., Study], alone: Study, mini: Any) -> None:
    one = pooled()
    until(lambda: shards(one) >= 10, 200, one.told)
    attempt = one.job.attempt(1)
    assert attempt is not None
    mini.power_off(attempt.hosts[1])
    one.completed()
    assert one.job.newest_attempt() == 1, one.told()
    whole(one, alone)


def test_the_raylets_of_a_host_and_of_the_head_die_while_two_experiments_are_explained(
    pooled: Callable[..., Study], alone: Study
) -> None:
    one = pooled(also="together")

    def raylets() -> list[int]:
        return [pid for pid, words in processes(one).items() if "raylet/raylet" in words]

    until(lambda: shards(one) >= 5 and len(raylets()) == 2, 200, one.told)
    both = raylets()
    os.kill(max(both), signal.SIGKILL)  # which of the two it is does not matter: either way the job goes on
    os.kill(min(both), signal.SIGKILL)
    one.completed()
    assert one.job.newest_attempt() == 2, one.told()
    whole(one, alone, "together")


def test_sigterm_and_a_cancel(pooled: Callable[..., Study], alone: Study) -> None:
    one = pooled()
    until(lambda: shards(one) >= 5, 200, one.told)
    one.slurm("scancel", "--signal=TERM", one.job_id)
    until(lambda: one.job.newest_attempt() == 2, 120, one.told)
    first = one.job.outcome(1)
    assert first is not None and first.outcome == "interrupted", one.told()
    until(lambda: (beat := one.beat()) is not None and beat.phase == "explain", 120, one.told)
    until(lambda: processes(one), 120, one.told)
    one.maehpc("cancel", f"{one.name}/explain", "--results", str(one.results))
    until(lambda: not processes(one), 60, lambda: f"left: {processes(one)}\n{one.told()}")
    one.maehpc("resume", f"{one.name}/explain", "--results", str(one.results))
    one.completed()
    whole(one, alone)


@contextmanager
def without_ray(mini: Any, host: str, place: Path) -> Iterator[None]:
    """A host on which Ray's folder is empty, as where a host lacks a mount; nobody else sees that."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    ray, empty = str(Path(spec.origin).parent), place / "empty"
    empty.mkdir()
    mini.on(host, "mount", "--bind", str(empty), ray)
    try:
        yield
    finally:
        mini.on(host, "umount", "--lazy", ray)


@contextmanager
def drained(study: Callable[..., Study], host: str) -> Iterator[None]:
    """A host that Slurm gives to no job."""
    slurm = study().slurm
    slurm("scontrol", "update", f"nodename={host}", "state=drain", "reason=test")
    try:
        yield
    finally:
        slurm("scontrol", "update", f"nodename={host}", "state=resume")


def test_a_host_that_does_not_come_up_ends_the_attempt_or_is_done_without(
    pooled: Callable[..., Study], study: Callable[..., Study], alone: Study, mini: Any, place: Path
) -> None:
    with without_ray(mini, "n2", place), drained(study, "n4"):
        one = pooled(host_timeout_s=6)
        one.ended("FAILED")
        first, outcome = one.job.attempt(1), one.outcome()
        assert first is not None and first.hosts == ("n1", "n2") and one.job.newest_attempt() == 1, one.told()
        assert outcome is not None and outcome.outcome == "failed", one.told()
        assert outcome.reason.startswith("1 of 2 hosts did not come up within 6 s: n2 (Ray ended: "), one.told()
        assert "ray.scripts" in outcome.reason and f"log {one.job.logs}/" in outcome.reason
        assert "--min-nodes 1 goes on" in outcome.reason
        until(lambda: not processes(one), 30, lambda: f"left: {processes(one)}")

        one.profile["host_timeout_s"] = 30
        one.submit("--nodes", "4", "--min-nodes", "2", "--metrics-port", "0", stage="explain")
        url = until(lambda: re.search(r"http://10\.77\.0\.11:\d+/metrics", one.log()), 120, one.told)[0]
        with urllib.request.urlopen(url, timeout=10) as scrape:  # from this side, as Prometheus would
            assert b"maehpc_build_info{version=" in scrape.read()
        one.completed()
    second = one.job.attempt(1)
    assert second is not None and second.hosts == ("n1", "n2", "n3"), one.told()
    # A fast machine is done before the time is over.
    told = re.findall(
        r"warning: 1 of 3 hosts (did not come up within 30|had not come up when .*, after \d+) s: n2 \(", one.log()
    )
    assert len(told) == 1, one.told()
    whole(one, alone)


REAL = {
    "data": {"source_size": 28, "image_size": 28, "normalization": "dataset"},
    "encoder": {"name": "vit-tiny", "patch_size": 7, "width": 32, "depth": 2, "heads": 2},
    "explain": {"images": 120, "sensitivity": {"samples": 40}, "batch_size": 4, "maps": {"shard_images": 4}},
}


def test_all_data_sets_on_four_hosts_while_a_worker_and_a_host_are_killed(
    study: Callable[..., Study], mini: Any, place: Path, real_data: Path
) -> None:
    paths = [real_data / "ham10000/ham10000_7class_lesionsplit_28.npz", real_data / "cifar10/cifar10_subset.npz"]
    datasets = ["retinamnist", "breastmnist", *(str(path.resolve()) for path in paths)]
    how = {"settings": {**REAL, "datasets": datasets}, "pretrain": {"epochs": 2, "images": 200}}
    alone = Study(mini, place / "all-alone" / "results", **how)
    alone.results.parent.mkdir()
    alone.run("pipeline")

    one = study(profile={"nodes": 4}, **how)
    shutil.copytree(alone.results, one.results)
    for folder in ("maps", "ledger", "report"):
        shutil.rmtree(one.experiment.root / folder)
    one.submit("--datasets", "all", "--nodes", "4", stage="explain")
    until(lambda: shards(one, "*") >= 8, 300, one.told)
    attempt = one.job.attempt(1)
    assert attempt is not None and len(attempt.hosts) == 4
    status = one.maehpc("status", str(one.results)).stdout
    assert "4 data sets" in status and "retinamnist " in status, status
    kill_one(one, "ray::Actor")
    until(lambda: shards(one, "*") >= 24, 300, one.told)
    mini.power_off(attempt.hosts[2])
    one.completed()
    assert one.job.newest_attempt() == 1, one.told()
    assert "4 workers on" in one.log() and "died" in one.log()
    whole(one, alone)
    tables = [{path.name: path.read_text() for path in aggregated(it).rglob("*.csv")} for it in (one, alone)]
    assert tables[0] and tables[0] == tables[1]
