"""What runs in terminals, as `status` finds it: written by real processes, alive, killed, or on another host."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from at_work import working

from maehpc import files
from maehpc.errors import InputError
from maehpc.experiment import Experiment
from maehpc.launch.foreground import Foreground, at_work, at_work_below, find_runs
from maehpc.launch.named import find_jobs
from maehpc.launch.pulse import Pulse, PulsingProgress
from maehpc.launch.states import State
from maehpc.launch.words import cells, parts
from maehpc.progress import Silent


def told(experiment: Path) -> list[Path]:
    return sorted((experiment / ".runs").glob("*")) if (experiment / ".runs").is_dir() else []


def settled(experiment: Path) -> list[Path]:
    """Without what is just being written anew."""
    return [path for path in told(experiment) if not files.is_partial(path)]


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
        assert row.as_json()["total"] == 56 and row.as_json()["folder"] == str(tmp_path / "study")
        before = row.heartbeat
        assert at_work([Experiment(tmp_path / "study")]) == [row] and before is not None
    assert at_work_below(tmp_path) == []


def test_what_a_killed_one_left_is_told_of_by_nobody_and_goes(tmp_path: Path) -> None:
    study = tmp_path / "study"
    with working(study) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(settled(study)) == 1 and at_work_below(tmp_path) == []
    work = Foreground([Experiment(study)], "pipeline")
    with work.visible(Pulse(work.tell)):
        assert [path.name for path in told(study)] == [f"{os.getpid()}-pipeline.json"]
    assert not (study / ".runs").exists()


def test_a_number_that_another_process_has_by_now_is_not_taken_for_it(tmp_path: Path) -> None:
    work = Foreground([Experiment(tmp_path / "study")], "explain")
    (tmp_path / "study").mkdir()
    with work.visible(Pulse(work.tell)):
        (path,) = settled(tmp_path / "study")
        facts = json.loads(path.read_text())
        assert len(at_work_below(tmp_path)) == 1
    path.parent.mkdir()
    boot, ticks = facts["born"].split()
    for born in (f"{boot} {int(ticks) - 1}", f"another-boot {ticks}", ""):
        path.write_text(json.dumps({**facts, "born": born}))
        assert at_work_below(tmp_path) == []


def test_only_its_own_host_knows_whether_it_lives(tmp_path: Path) -> None:
    with working(tmp_path / "study"):
        (path,) = settled(tmp_path / "study")
        facts = json.loads(path.read_text())
    other = path.with_name("7-explain.json")
    other.write_text(json.dumps({**facts, "host": "elsewhere", "pid": 7}))
    (row,) = at_work_below(tmp_path)
    assert row.nodes == ("elsewhere",) and "only elsewhere knows" in row.sentence
    assert (row.state, row.active, row.as_json()["state"]) == (State.UNKNOWN, False, "unknown")
    work = Foreground([Experiment(tmp_path / "study")], "explain")
    with work.visible(Pulse(work.tell)):
        assert other.exists() and len(at_work_below(tmp_path)) == 2
    assert told(tmp_path / "study") == [other]


def test_one_pool_of_several_experiments_is_one_row_and_found_by_each(tmp_path: Path) -> None:
    with working(tmp_path / "a", tmp_path / "b") as process:
        assert [row.job_id for row in at_work_below(tmp_path)] == [str(process.pid)]
        (row,) = at_work([Experiment(tmp_path / "b")])
        assert row.job.experiment == "b"


BEAT = b'{"sequence": 1, "phase": "explain"'


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[1]", b"\xff", b'{"host": 1}', b"[" * 100_000),
        *(b'{"host": "h", "pid": %b, "born": "", "heartbeat": %b}}' % (pid, BEAT) for pid in (b"-1", b"0", b"1e400")),
        *(
            b'{"host": "h", "pid": 7, "born": "", "heartbeat": %b, "seconds_left": %b}}' % (BEAT, seconds)
            for seconds in (b"1e400", b"Infinity", b"NaN", b'"Infinity"')
        ),
    ],
)
def test_a_damaged_file_is_nothing(tmp_path: Path, content: bytes) -> None:
    runs = tmp_path / "study" / ".runs"
    runs.mkdir(parents=True)
    (runs / "1-explain.json").write_bytes(content)
    (runs / "2-explain.json").mkdir()
    assert at_work_below(tmp_path) == []
    work = Foreground([Experiment(tmp_path / "study")], "explain")
    with work.visible(Pulse(work.tell)):
        assert {path.name for path in told(tmp_path / "study")} == {"2-explain.json", f"{os.getpid()}-explain.json"}


def test_what_a_killed_one_was_about_to_tell_goes(tmp_path: Path) -> None:
    runs = tmp_path / "study" / ".runs"
    runs.mkdir(parents=True)
    files.partial_name(runs / "1-explain.json").write_text("{")
    work = Foreground([Experiment(tmp_path / "study")], "explain")
    with work.visible(Pulse(work.tell)):
        assert [path.name for path in told(tmp_path / "study")] == [f"{os.getpid()}-explain.json"]
    assert not runs.exists()


def test_an_experiment_that_is_moved_away_is_not_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    work = Foreground([Experiment(tmp_path / "study")], "explain")
    pulse = Pulse(work.tell)
    with work.visible(pulse):
        (tmp_path / "study").rename(tmp_path / "old")
        pulse.write()
        assert not (tmp_path / "study").exists()
    assert not (tmp_path / "study").exists()


def test_the_words_that_name_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    monkeypatch.chdir(tmp_path)
    with working(results / "a"), working(results / "b") as process:
        pid = process.pid
        for word in ("b", "b/", "b/explain", f"b/{pid}-explain", str(pid), str(results / "b"), "results/b"):
            assert [row.job_id for row in find_runs(word, results)] == [str(pid)], word
        for word in ("c", "b/pretrain", f"b/{pid}", "1", "", "..", "nosuch/b", "x" * 300):
            assert find_runs(word, results) == [], word
        assert {row.job.experiment for row in find_runs("results", results)} == {"a", "b"}
        with pytest.raises(InputError, match=f"'b' is no job: it runs in a terminal .process {pid} of .*Ctrl-C"):
            find_jobs("b", results)
    assert find_runs("b", results) == []


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
