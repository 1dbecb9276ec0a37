"""What an attempt tells of its progress: one piece of work, several at once, one after the other."""

from __future__ import annotations

from pathlib import Path

from launch_jobs import new_job

from maehpc.launch.pulse import JobProgress, Pulse
from maehpc.launch.record import Heartbeat, JobFolder


def told(job: JobFolder, pulse: Pulse) -> Heartbeat:
    pulse.write()
    beat = job.heartbeat(1)
    assert beat is not None
    return beat


def test_several_data_sets_at_once(tmp_path: Path) -> None:
    job = new_job(tmp_path, "study", "explain")
    pulse = Pulse(job, 1)
    progress = JobProgress(pulse, quiet=True)
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
    pulse = Pulse(job, 1)
    progress = JobProgress(pulse, quiet=True)
    for dataset in ("digits", "retina"):
        with progress.bar(f"pretrain {dataset}", 10, images=32) as bar:
            bar.advance(2, loss=0.5)
            beat = told(job, pulse)
            assert (beat.dataset, beat.parts, beat.done, beat.total, beat.loss) == (dataset, {}, 2, 10, 0.5)
