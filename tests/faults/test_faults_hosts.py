"""A host, one of Slurm's daemons, or the network between two hosts fails; a host's clock is wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_jobs import Study, same_result, until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
def test_the_power_of_a_host_fails(rank: int, study: Callable[..., Study], undisturbed: Study, mini: Any) -> None:
    one = study()
    one.submit()
    one.reached()
    attempt = one.job.attempt(1)
    assert attempt is not None
    mini.power_off(attempt.hosts[rank])
    until(lambda: one.job.newest_attempt() == 2, 150, one.told)
    second = one.job.attempt(2)
    assert second is not None and attempt.hosts[rank] not in second.hosts
    one.completed()
    same_result(one, undisturbed)


def test_slurmd_dies_and_its_step_lives_on(study: Callable[..., Study], undisturbed: Study, mini: Any) -> None:
    one = study(profile={"nodes": 1, "tasks_per_node": 2, "gpus_per_node": 2})
    one.submit()
    one.reached()
    attempt = one.job.attempt(1)
    assert attempt is not None
    stale = [one.rank_pid(rank) for rank in (0, 1)]
    mini.kill_slurmd(attempt.hosts[0])
    for pid in stale:  # it holds the lock and hangs, until the next attempt is at work
        send(pid, signal.SIGSTOP)
    until(lambda: one.job.newest_attempt() == 2, 150, one.told)
    time.sleep(3)
    for pid in stale:
        send(pid, signal.SIGCONT)
    until(lambda: not any(alive(pid) for pid in stale), 60, one.told)
    one.completed()
    outcome = one.job.outcome(1)
    assert outcome is not None and outcome.outcome == "fenced"
    assert "a newer one has begun" in one.log()
    same_result(one, undisturbed)


def send(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:  # it has ended
        return False


def test_the_controller_is_restarted(study: Callable[..., Study], undisturbed: Study, mini: Any) -> None:
    one = study()
    one.submit()
    one.reached()
    one.kill(1, signal.SIGSTOP)  # it shall not be over before it was asked for
    mini.stop_controller()
    status = one.maehpc("status", str(one.results))
    one.kill(1, signal.SIGCONT)
    assert "unknown" in status.stdout, status.stdout
    assert not re.search(r"\bdone\b", status.stdout), status.stdout
    mini.start_controller()
    one.completed()
    assert one.job.newest_attempt() == 1
    same_result(one, undisturbed)


def test_the_network_between_two_hosts_is_cut_for_a_while(
    study: Callable[..., Study], undisturbed: Study, mini: Any
) -> None:
    one = study()
    one.submit()
    one.reached()
    attempt = one.job.attempt(1)
    assert attempt is not None
    mini.cut(*attempt.hosts)
    time.sleep(2)
    before = one.beat()
    time.sleep(6)
    assert one.beat() == before, "with the network cut no step can end"
    mini.heal()
    one.completed()
    assert one.job.newest_attempt() == 1
    same_result(one, undisturbed)


def test_the_network_is_cut_for_longer_than_ranks_wait(
    study: Callable[..., Study], undisturbed: Study, mini: Any
) -> None:
    one = study(profile={"collective_timeout_s": 15})
    one.submit()
    one.reached()
    attempt = one.job.attempt(1)
    assert attempt is not None
    mini.cut(*attempt.hosts)
    until(lambda: one.log().count("lost the other ranks") == 2, 60, one.told)
    mini.heal()  # srun hears of a rank's end over the same network
    until(lambda: one.job.newest_attempt() >= 2, 120, one.told)
    one.completed()
    same_result(one, undisturbed)


def test_a_clock_is_an_hour_off(study: Callable[..., Study], undisturbed: Study, mini: Any, place: Path) -> None:
    """One host lives an hour ahead: no decision rests on a clock, so nothing changes, also over a requeue."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler to build the wrong clock with")
    library = place / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-O", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    mini.on(mini.hosts[0], "touch", "/dev/shm/clock")
    setup = [f"export LD_PRELOAD={library}", "date -u +clock-of-the-batch-host:%s"]
    one = study(profile={"setup": setup})
    one.submit()
    one.reached()
    told = int(re.findall(r"clock-of-the-batch-host:(\d+)", one.log())[0])
    assert abs(told - time.time() - 3600) < 600, "the clock was not wrong"
    one.slurm("scontrol", "requeue", one.job_id)
    until(lambda: one.job.newest_attempt() == 2, 120, one.told)
    one.completed()
    same_result(one, undisturbed)
    mini.on(mini.hosts[0], "rm", "/dev/shm/clock")
