"""A job's row as people read it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from launch_jobs import new_job, row

from maehpc.launch.record import Heartbeat
from maehpc.launch.words import cells, duration, progress


def test_cells_of_a_running_and_of_a_finished_job(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    beat = Heartbeat(
        sequence=4,
        phase="pretrain",
        dataset="digits",
        done=12,
        total=800,
        unit="step",
        images_per_second=512.34,
        seconds_left=3723,
        loss=0.41234,
    )
    running = cells(row(job, "running", beat))
    assert running == ("tiny/0001-pretrain", "1", "running", "2", "1", "digits 12/800", "512", "1:02:03", "0.4123")
    done = cells(row(job, "done", beat.model_copy(update={"phase": "ending"})))
    assert done[2:] == ("done", "2", "1", "digits 12/800", "", "", "0.4123")
    saving = row(job, "running", beat.model_copy(update={"phase": "saving", "unit": "image"}))
    assert progress(saving) == "saving digits 12/800 images"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90000, "1 d 01:00"), (math.inf, "for ever")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
