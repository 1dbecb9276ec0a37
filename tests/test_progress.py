"""What a person reads while work goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from maehpc import progress
from maehpc.cli.terminal import TerminalProgress
from maehpc.progress import LineProgress, in_words, rate_in_words


def test_numbers_in_words() -> None:
    assert in_words({"loss": 0.41, "accuracy": 1.0}) == "loss 0.4100, accuracy 1.0000"
    assert rate_in_words(300, 2.0) == "150 images/s"
    assert rate_in_words(3, 2.0) == "1.5 images/s"
    assert rate_in_words(0, 2.0) == rate_in_words(5, 0.0) == ""


def test_lines_tell_of_the_last_values_and_of_images_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 1.0, 20.0, 25.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with LineProgress().bar("pretrain digits", 40, done=10, images=8) as bar:
        bar.advance()
        bar.advance(0, loss=0.5)
        assert capsys.readouterr().err == ""
        bar.advance(19)
        bar.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "pretrain digits: 30/40, 20 s, about 10 s left, 8 images/s, loss 0.5000",
        "pretrain digits: 40/40, 25 s, 9.6 images/s, loss 0.5000",
    ]


def test_what_begins_late_is_timed_from_its_first_unit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 900.0, 1000.0, 1005.0, 1010.0, 1020.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with LineProgress().bar("explain retina", 100) as bar:
        bar.advance(0, failures=1)
        for count in (20, 10, 20, 50):
            bar.advance(count)
    assert capsys.readouterr().err.splitlines() == [
        "explain retina: 0/100, 900 s, failures 1",
        "explain retina: 20/100, 1000 s, failures 1",
        "explain retina: 50/100, 1010 s, about 17 s left, 3 images/s, failures 1",
        "explain retina: 100/100, 1020 s, 4 images/s, failures 1",
    ]


def test_a_quiet_reporter_warns_alone(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = LineProgress(quiet=True)
    quiet.say("nobody hears this")
    quiet.warn("but this")
    with quiet.bar("pretrain digits", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == "warning: but this\n"


def test_a_terminal_shows_values_and_a_rate_where_units_are_images() -> None:
    shown = []
    for images in (8, 0):
        console = Console(file=io.StringIO(), force_terminal=True, width=160)
        with TerminalProgress(console).bar("pretrain digits", 20, images=images) as bar:
            for _ in range(20):
                bar.advance()
            bar.advance(0, loss=0.25)
        shown.append(console.file.getvalue())
    assert all("20/20" in text and "loss 0.2500" in text for text in shown)
    assert "images/s" in shown[0] and "images/s" not in shown[1]


def test_counts_are_told_as_counts() -> None:
    assert in_words({"loss": 0.5, "failures": 2}) == "loss 0.5000, failures 2"
