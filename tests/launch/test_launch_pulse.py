"""What an attempt tells of its progress: one piece of work, several at once, one after the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from launch_jobs import new_job

from maehpc.launch.pulse import Pulse, PulsingProgress
from maehpc.launch.record import Heartbeat, JobFolder
from maehpc.launch.states import State
from maehpc.launch.status import Row
from maehpc.launch.words import parts
from maehpc.progress import LineProgress


def told(job: JobFolder, pulse: Pulse) -> Heartbeat:
    pulse.write()
    beat = job.heartbeat(1)
    assert beat is not None
    return beat


def test_several_data_sets_at_once(tmp_path: Path) -> None:
    job = new_job(tmp_path, "study", "explain")
    pulse = Pulse(partial(job.beat, 1))
    progress = PulsingProgress(LineProgress(quiet=True), pulse)
    with progress.bar("explain digits", 10, 4) as digits, progress.bar("explain retina", 20) as retina:
        retina.advance(3)
        digits.advance(1)
        beat = told(job, pulse)
        assert beat.parts == {"digits": (5, 10), "retina": (3, 20)}
        assert (beat.phase, beat.done, beat.total, beat.unit) == ("explain", 8, 30, "image")
        assert beat.dataset == "digits, retina"
        assert beat.seconds_left is not None and beat.images_per_second is not None
    assert told(job, pulse).done == 8  # what was told last stands


def test_one_after_the_other(tmp_path: Path) -> None:
    job = new_job(tmp_path, "study", "pretrain")
    pulse = Pulse(partial(job.beat, 1))
    progress = PulsingProgress(LineProgress(quiet=True), pulse)
    for dataset in ("digits", "retina"):
        with progress.bar(f"pretrain {dataset}", 10, images=32) as bar:
            bar.advance(2, loss=0.5)
            beat = told(job, pulse)
            assert (beat.dataset, beat.parts, beat.done, beat.total, beat.loss) == (dataset, {}, 2, 10, 0.5)


def test_rates_and_failures_of_each_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("maehpc.launch.pulse.time.monotonic", lambda: now)
    job = new_job(tmp_path, "study", "explain")
    pulse = Pulse(partial(job.beat, 1))
    progress = PulsingProgress(LineProgress(quiet=True), pulse)
    with progress.bar("explain digits", 100) as digits, progress.bar("explain retina", 200) as retina:
        now += 1
        retina.advance(0, failures=1)
        assert told(job, pulse).first_step_s is None, "a failure is no finished unit"
        now += 3
        digits.advance(20)
        retina.advance(40)
        beat = told(job, pulse)
        assert beat.rates == {"digits": 5, "retina": 10}
        assert beat.failures == {"retina": 1} and beat.images_per_second == 15
        row = Row(job, None, "slurm", "1", State.RUNNING, attempt=1, heartbeat=beat)
        assert parts(row) == [
            "digits 20/100, 5 images/s, 0:00:16 left",
            "retina 40/200, 10 images/s, 0:00:16 left, 1 failure",
        ]
        now += 100
        retina.advance(10)
        assert told(job, pulse).rates == {"retina": 0.1}, "digits has stood still for longer than rates look back"
    with progress.bar("explain digits", 100, 60) as digits:
        assert told(job, pulse).failures == {}
        digits.advance(4, failures=2)
        beat = told(job, pulse)
        assert (beat.parts, beat.rates, beat.failures) == ({}, {}, {"digits": 2})
        row = Row(job, None, "slurm", "1", State.RUNNING, attempt=1, heartbeat=beat)
        assert parts(row) == ["digits, 2 failures"]
