"""The scheduler's commands are run as they should be, and give up where nobody answers."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maehpc.launch import slurm
from maehpc.launch.slurm import SlurmError
from maehpc.launch.slurm_formats import Partition


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
    assert found["gpu"] == Partition("gpu", True, "up", 4, 1440, "gpu:2", 4, 4000)
    assert found["urgent"].nodes == 4
