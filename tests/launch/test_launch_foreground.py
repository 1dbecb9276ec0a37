"""What runs in terminals, as `status` finds it: written by real processes, alive, killed, or on another host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from maehpc.experiment import Experiment
from maehpc.launch.foreground import Foreground, at_work, at_work_below
from maehpc.launch.pulse import Pulse, PulsingProgress
from maehpc.launch.words import cells, parts
from maehpc.progress import Silent

WORKING = """
import sys, time
from pathlib import Path
from maehpc.experiment import Experiment
from maehpc.launch.foreground import Foreground
from maehpc.launch.pulse import Pulse, PulsingProgress
from maehpc.progress import Silent
work = Foreground([Experiment(Path(root)) for root in sys.argv[1:]], "explain")
pulse = Pulse(work.tell)
with work.visible(pulse), PulsingProgress(Silent(), pulse).bar("explain digits", 56, 4) as bar:
    bar.advance(8)
    pulse.write()
    print("at work", flush=True)
    time.sleep(100)
"""


@contextmanager
def working(*experiments: Path) -> Iterator[subprocess.Popen[str]]:
    for root in experiments:
        root.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", WORKING, *map(str, experiments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "at work\n"
            yield process
        finally:
            process.kill()


def told(experiment: Path) -> list[Path]:
    return sorted((experiment / ".runs").glob("*")) if (experiment / ".runs").is_dir() else []


def test_another_process_sees_how_far_it_is(tmp_path: Path) -> None:
    with working(tmp_path / "study") as process:
        (row,) = at_work_below(tmp_path)
        assert (row.job.label, row.job.stage, row.job.experiment) == (
            f"study/{process.pid}-explain",
            "explain",
            "study",
        )
        assert (row.scheduler, row.job_id, row.active, row.moving) == ("run", str(process.pid), True, True)
        assert "digits 12/56 images" in cells(row) and row.sentence == "" and parts(row) == []
        assert row.as_json()["total"] == 56
        before = row.heartbeat
        assert at_work([Experiment(tmp_path / "study")]) == [row] and before is not None
    assert at_work_below(tmp_path) == []


def test_what_a_killed_one_left_is_told_of_by_nobody_and_goes(tmp_path: Path) -> None:
    study = tmp_path / "study"
    with working(study) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(told(study)) == 1 and at_work_below(tmp_path) == []
    work = Foreground([Experiment(study)], "pipeline")
    with work.visible(Pulse(work.tell)):
        assert [path.name for path in told(study)] == [f"{os.getpid()}-pipeline.json"]
    assert not (study / ".runs").exists()


def test_a_number_that_another_process_has_by_now_is_not_taken_for_it(tmp_path: Path) -> None:
    work = Foreground([Experiment(tmp_path / "study")], "explain")
    (tmp_path / "study").mkdir()
    with work.visible(Pulse(work.tell)):
        (path,) = told(tmp_path / "study")
        facts = json.loads(path.read_text())
        assert len(at_work_below(tmp_path)) == 1
    path.parent.mkdir()
    path.write_text(json.dumps({**facts, "born": facts["born"] - 1}))
    assert at_work_below(tmp_path) == []


def test_only_its_own_host_knows_whether_it_lives(tmp_path: Path) -> None:
    with working(tmp_path / "study"):
        (path,) = told(tmp_path / "study")
        facts = json.loads(path.read_text())
    other = path.with_name("7-explain.json")
    other.write_text(json.dumps({**facts, "host": "elsewhere", "pid": 7}))
    (row,) = at_work_below(tmp_path)
    assert row.nodes == ("elsewhere",) and "runs in a terminal of elsewhere" in row.sentence
    work = Foreground([Experiment(tmp_path / "study")], "explain")
    with work.visible(Pulse(work.tell)):
        assert other.exists() and len(at_work_below(tmp_path)) == 2
    assert told(tmp_path / "study") == [other]


def test_one_pool_of_several_experiments_is_one_row_and_found_by_each(tmp_path: Path) -> None:
    with working(tmp_path / "a", tmp_path / "b") as process:
        assert [row.job_id for row in at_work_below(tmp_path)] == [str(process.pid)]
        (row,) = at_work([Experiment(tmp_path / "b")])
        assert row.job.experiment == "b"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"host": 1}'])
def test_a_damaged_file_is_nothing(tmp_path: Path, content: bytes) -> None:
    runs = tmp_path / "study" / ".runs"
    runs.mkdir(parents=True)
    (runs / "1-explain.json").write_bytes(content)
    (runs / "2-explain.json").mkdir()
    assert at_work_below(tmp_path) == []


def test_a_folder_that_takes_nothing_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".runs").write_text("a file stands here")
    work = Foreground([Experiment(tmp_path / "study")], "explain")
    with work.visible(Pulse(work.tell)):
        assert at_work_below(tmp_path) == []
    assert (tmp_path / "study" / ".runs").read_text() == "a file stands here"


def test_what_a_person_sees_is_passed_on(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Shown(Silent):
        def say(self, sentence: str) -> None:
            seen.append(sentence)

        def warn(self, sentence: str) -> None:
            seen.append(f"warning: {sentence}")

    beats: list[Any] = []
    pulse = Pulse(beats.append)
    progress = PulsingProgress(Shown(), pulse)
    progress.say("one")
    progress.warn("two")
    with progress.bar("finetune digits", 10, images=4) as bar:
        time.sleep(0.01)
        bar.advance(2, loss=0.5)
        pulse.write()
    assert seen == ["one", "warning: two"]
    assert (beats[-1].dataset, beats[-1].done, beats[-1].total, beats[-1].unit, beats[-1].loss) == (
        *("digits", 2, 10, "step"),
        0.5,
    )
