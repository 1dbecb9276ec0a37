"""Logs are read as they grow: cut, replaced, appearing late, with bytes that are no text."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_jobs import new_job, start

from maehpc.launch.logs import Follower, LogFile, Tail, log_files, start_of_last_lines
from maehpc.launch.record import Accepted, JobFolder


def submitted(root: Path, job_id: str = "12", logs: Path | None = None, scheduler: str = "slurm") -> JobFolder:
    job = new_job(root)
    accept(job, job_id, logs, scheduler)
    return job


def accept(job: JobFolder, job_id: str, logs: Path | None = None, scheduler: str = "slurm") -> None:
    place = logs or job.logs
    place.mkdir(exist_ok=True)
    accepted = Accepted.model_validate({"job_id": job_id, "scheduler": scheduler, "logs": str(place)})
    job.accept(job.intend("token"), accepted)


def texts(follower: Follower) -> list[str]:
    return [f"{line.log.rank}{line.log.stream[0]} {line.text}" for line in follower.lines()]


def test_files_are_those_of_this_jobs_submissions(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    accept(job, "31")
    names = (
        "12_0_log.out 12_0_log.err 12_10_log.out 12_2_log.out 31_0_log.out 120_0_log.out 12_3_0_log.out x.out script.sh"
    )
    for name in names.split():
        (job.logs / name).touch()
    expected = ["12_0_log.out", "12_0_log.err", "12_2_log.out", "12_10_log.out", "31_0_log.out"]
    assert [log.path.name for log in log_files(job)] == expected
    assert [log.rank for log in log_files(job)] == [0, 0, 2, 10, 0]


def test_a_member_of_an_array_has_the_files_of_its_own_id(tmp_path: Path) -> None:
    first = submitted(tmp_path, "12_0")
    second = new_job(tmp_path)
    accept(second, "12_1", first.logs)
    for name in ("12_0_0_log.out", "12_1_0_log.out", "12_1_1_log.err", "12_10_0_log.out"):
        (first.logs / name).touch()
    assert [(log.path.name, log.rank, log.stream) for log in log_files(second)] == [
        ("12_1_0_log.out", 0, "out"),
        ("12_1_1_log.err", 1, "err"),
    ]


def test_a_local_jobs_controller_is_heard_too(tmp_path: Path) -> None:
    job = submitted(tmp_path, "4711", scheduler="local")
    (job.logs / "controller.log").write_text("it does not begin\n")
    (job.logs / "4711_0_log.out").write_text("hello\n")
    assert texts(Follower(job)) == ["0e it does not begin", "0o hello"]


def test_a_job_whose_acceptance_nobody_recorded(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    job.logs.mkdir()
    start(job, "99")
    (job.logs / "99_0_log.out").write_text("hello\n")
    assert texts(Follower(job)) == ["0o hello"]


def test_no_files_yet(tmp_path: Path) -> None:
    assert log_files(new_job(tmp_path)) == []
    assert texts(Follower(submitted(tmp_path))) == []


def test_what_is_appended_comes_once_and_line_by_line(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    follower = Follower(job)
    path = job.logs / "12_0_log.out"
    path.write_text("one\ntw")
    assert texts(follower) == ["0o one"]
    assert texts(follower) == []
    with path.open("a") as handle:
        handle.write("o\nthree")
    late = job.logs / "12_1_log.err"
    late.write_text("late\n")
    assert texts(follower) == ["0o two", "1e late"]
    assert [line.text for line in follower.last()] == ["three"]
    assert [line.text for line in follower.last()] == []


def test_a_later_submission_is_followed(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    follower = Follower(job)
    (job.logs / "12_0_log.out").write_text("first\n")
    assert texts(follower) == ["0o first"]
    accept(job, "40")
    (job.logs / "40_0_log.out").write_text("second\n")
    assert texts(follower) == ["0o second"]


def test_a_file_that_is_cut_begins_again(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    follower = Follower(job)
    path = job.logs / "12_0_log.out"
    path.write_text("a long first text\nunfinished")
    assert texts(follower) == ["0o a long first text"]
    path.write_text("new\n")
    assert texts(follower) == ["0o new"]
    path.unlink()
    assert texts(follower) == []
    path.write_text("again\n")
    assert texts(follower) == ["0o again"]


def test_a_file_that_is_replaced_by_a_longer_one_begins_again(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    follower = Follower(job)
    path = job.logs / "12_0_log.out"
    path.write_text("old\n")
    assert texts(follower) == ["0o old"]
    other = job.logs / "other"
    other.write_text("new and longer\n")
    other.replace(path)
    assert texts(follower) == ["0o new and longer"]


def test_rubbish_is_shown_as_such(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    follower = Follower(job)
    path = job.logs / "12_0_log.out"
    path.write_bytes(b"\xff\xfe\x00ab\n\xc3")
    assert texts(follower) == ["0o \ufffd\ufffd\x00ab"]
    with path.open("ab") as handle:  # the other half of a letter
        handle.write(b"\xa4\n")
    assert texts(follower) == ["0o ä"]
    with path.open("ab") as handle:
        handle.write(b"\xc3")
    assert texts(follower) == []
    assert [line.text for line in follower.last()] == ["\ufffd"]


def test_rank_and_stream_are_chosen(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    for rank in (0, 1):
        for stream in ("out", "err"):
            (job.logs / f"12_{rank}_log.{stream}").write_text("x\n")
    assert texts(Follower(job, rank=1)) == ["1o x", "1e x"]
    assert texts(Follower(job, streams=["err"])) == ["0e x", "1e x"]
    assert texts(Follower(job, rank=0, streams=["out"])) == ["0o x"]


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 9])
def test_the_last_lines(tmp_path: Path, count: int, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maehpc.launch.logs._BLOCK", 7)  # so that lines lie across blocks
    path = tmp_path / "12_0_log.out"
    lines = ["", "second", "a rather long third line", "", "last"]
    path.write_text("\n".join(lines) + end)
    position = start_of_last_lines(path, count)
    tail = Tail(LogFile(path, "12", 0, "out"), position)
    found = [*tail.lines(), *tail.last()]
    assert found == (lines[-count:] if count else [])


def test_the_last_lines_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert start_of_last_lines(path, 3) == 0


def test_tail_is_of_the_files_that_are_there_and_later_ones_come_whole(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    (job.logs / "12_0_log.out").write_text("1\n2\n3\n")
    follower = Follower(job, tail=1)
    assert texts(follower) == ["0o 3"]
    (job.logs / "12_1_log.out").write_text("1\n2\n")
    assert texts(follower) == ["1o 1", "1o 2"]
