"""A host's part of a pool, as far as it needs no cluster; tests/faults/test_faults_pool.py has the whole."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_jobs import new_job, start
from tiny import tiny_context

from maehpc.errors import InputError, LostRanksError, RunError
from maehpc.explain.explainer import passes_that_fit
from maehpc.interruption import Stop
from maehpc.launch import allocation
from maehpc.launch.record import JobFolder, Outcome
from maehpc.launch.seat import Seat
from maehpc.stages.fleet import Fleet

SIDE_BY_SIDE = min(len(os.sched_getaffinity(0)), passes_that_fit())
HERE = Seat("local", "7", 0, 0, 1, 0, 1, ("here",), None, None)
SEAT = Seat("slurm", "7", 0, 1, 2, 0, 1, ("n1", "n2"), None, 1)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFolder:
    monkeypatch.setattr(allocation, "LOOK_S", 0.02)
    monkeypatch.setattr(allocation, "AGAIN_S", 0.1)
    monkeypatch.setattr(allocation, "PARTING_S", 0.2)
    made = new_job(tmp_path, stage="explain", workers_per_node=1)
    start(made)
    return made


def serve(job: JobFolder, stop: Stop | None = None) -> None:
    allocation.serve(job, job.record(), SEAT, 1, stop or Stop())


def announced(job: JobFolder) -> Path:
    job.publish_rendezvous(1, {"address": "127.0.0.1:9", "mark": "m"})
    secret = job.path / "rendezvous" / "0001.token"
    secret.write_text("secret")
    return secret


def joins(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> list[tuple[Any, ...]]:
    """What `join` was asked, while it answers one after the other; the last one for ever."""
    asked: list[tuple[Any, ...]] = []

    def join(head: Any, cpus: int, gpus: int, address: str, over: Any, name: str) -> str | None:
        asked.append((head.address, head.mark, head.token, cpus, gpus, address, name))
        answer = answers[min(len(asked), len(answers)) - 1]
        return answer(over) if callable(answer) else answer

    monkeypatch.setattr("maehpc.pool.cluster.join", join)
    return asked


@pytest.mark.parametrize(("threads", "expected"), [(3, 3), (None, max(1, SIDE_BY_SIDE // 2))])
def test_a_job_of_this_machine_gives_each_worker_its_threads(
    threads: int | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = {"kind": "local", "tasks": 2, "threads": threads}
    job = new_job(tmp_path / "results", stage="explain", workers_per_node=2, nodes=1, profile=profile)
    context = tiny_context(tmp_path / "results")

    def fleet(device: str) -> Fleet:
        given = replace(context, device=torch.device(device))
        return allocation.fleet(job, job.record(), HERE, 1, given, lambda: None, set())

    made = fleet("cpu")
    assert (made.workers, made.threads, made.gpus) == (2, expected, 0)
    assert made.host == "", "who reads its log is on this machine"
    monkeypatch.setattr(allocation, "_visible_gpus", lambda: 1)
    with pytest.raises(InputError, match=r"2 workers .* PyTorch sees 1 GPUs"):
        fleet("cuda")
    monkeypatch.setattr(allocation, "_visible_gpus", lambda: 2)
    assert fleet("cuda").gpus == 1


def test_the_log_of_a_job_of_slurm_is_read_elsewhere(job: JobFolder, tmp_path: Path) -> None:
    first = replace(SEAT, rank=0)
    assert allocation.fleet(job, job.record(), first, 1, tiny_context(tmp_path), lambda: None, set()).host == "n1"


def test_a_dashboard_that_this_host_cannot_serve_is_refused_before_the_work(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        profile = {"kind": "local", "tasks": 2}
        job = new_job(tmp_path, stage="explain", workers_per_node=2, nodes=1, profile=profile, dashboard_port=port)
        with pytest.raises(InputError, match=f"--dashboard-port {port}: 127.0.0.1:{port} cannot be listened on"):
            allocation.fleet(job, job.record(), HERE, 1, tiny_context(tmp_path), lambda: None, set())


def test_an_attempt_that_had_nothing_to_do_needs_no_hosts(job: JobFolder) -> None:
    job.write_outcome(1, Outcome(outcome="done"))
    serve(job)


def test_rank_0_that_left_before_it_began_a_cluster(job: JobFolder) -> None:
    allocation.leave(job, 1)
    serve(job)


def test_a_cluster_that_was_over_before_this_host_came(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = joins(monkeypatch, None)
    announced(job).unlink()
    serve(job)
    assert asked == []


def test_rank_0_that_announces_nothing(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "ANNOUNCED_WITHIN_S", 0.1)
    with pytest.raises(RunError, match="rank 0 began no cluster"):
        serve(job)


def test_a_host_that_is_asked_to_end_does(job: JobFolder) -> None:
    stop = Stop()
    stop.request("SIGTERM")
    begun = time.monotonic()
    serve(job, stop)
    assert time.monotonic() - begun < 10


def test_ray_that_ends_here_is_begun_anew_until_all_is_over(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = announced(job)

    def until_over(over: Any) -> None:
        threading.Timer(0.1, secret.unlink).start()
        while not over():
            time.sleep(0.02)

    asked = joins(monkeypatch, "the raylet was killed", until_over)
    serve(job)
    assert asked == [("127.0.0.1:9", "m", "secret", 1, 0, "127.0.0.1", "n2")] * 2


def test_a_head_that_nobody_can_join_any_more(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    announced(job)
    asked = joins(monkeypatch, "no answer")
    with pytest.raises(LostRanksError, match=r"cannot be joined any more \(no answer\)"):
        serve(job)
    assert len(asked) == allocation.FUTILE
    assert job.said(1, "n2") == "Ray ended: no answer"


def test_a_host_says_where_it_stands(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    announced(job)
    said = []

    def full(over: Any) -> None:
        said.append(job.said(1, "n2"))
        raise OSError("no writable folder for Ray's sockets")

    joins(monkeypatch, full)
    with pytest.raises(LostRanksError, match="no writable folder"):
        serve(job)
    why = "Ray ended: no writable folder for Ray's sockets"
    assert said == ["Ray is begun at 127.0.0.1 to join 127.0.0.1:9, and has not come up", why, why]
    assert job.said(1, "n2") == why
