"""`--metrics-port` as a user meets it: served while a run lasts, refused before anything is written."""

from __future__ import annotations

import random
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import Run


@pytest.fixture
def port() -> Iterator[int]:
    """One that was free a moment ago, and that no connection out of this machine is given meanwhile."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for number in random.sample(range(10_000, ephemeral), 100):
        with suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", number))
            break
    yield number


@pytest.mark.slow
def test_a_run_serves_its_metrics_and_nothing_afterwards(run: Run, tiny: str, port: int) -> None:
    url = f"http://127.0.0.1:{port}/metrics"
    over, seen = threading.Event(), list[str]()

    def scrape() -> None:
        while not over.wait(0.02):
            with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                seen.append(answer.read().decode())

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        outcome = run("run", "pipeline", "--recipe", tiny, "--name", "tiny", "--metrics-port", str(port))
    finally:
        over.set()
        thread.join()
    assert outcome.code == 0 and outcome.err.count(f"metrics for Prometheus at {url}\n") == 1, outcome.err
    assert 'maehpc_images{dataset="digits",experiment="tiny"} 20.0' in seen[-1]
    with pytest.raises(OSError, match="refused"), urllib.request.urlopen(url, timeout=5):
        pass


def test_a_port_that_is_taken_is_refused_before_any_work(run: Run, tiny: str, port: int, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        outcome = run("run", "pipeline", "--recipe", tiny, "--metrics-port", str(port), "-q")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"--metrics-port {port}: 127.0.0.1:{port}" in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "pretrain", "--metrics-port", "0"], "--metrics-port 0"),
        (["run", "pipeline", "--metrics-address", "0.0.0.0"], "--metrics-port"),
        (["run", "pipeline", "--metrics-port", "70000"], "70000"),
        (["submit", "probe", "--cluster", "mini", "--metrics-port", "9400", "--dry-run"], "--metrics-port 9400"),
    ],
)
def test_wrong_words(words: list[str], expected: str, run: Run, tiny: str, tmp_path: Path) -> None:
    outcome = run(*words, "--recipe", tiny, "-q")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert expected in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}
