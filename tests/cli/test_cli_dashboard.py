"""`--dashboard-port` as a user meets it: shown to who has the token, and refused before anything is written."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from command_line import Run
from pool_runs import POOLED, named

WHOLE = importlib.util.find_spec("aiohttp_cors") is not None
"""Whether all of Ray is installed; maehpc itself asks for what workers need."""


@pytest.fixture
def two(tmp_path: Path) -> str:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"kind": "local", "tasks": 2, "device": "cpu"}))
    return str(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "pretrain"], "leave it out of pretrain"),
        (["run", "explain"], "give --workers too"),
        (["run", "pipeline"], "give --workers too"),
        (["run", "explain", "--join"], "leave it out"),
        (["submit", "finetune", "--cluster", "two.yaml", "--dry-run"], "leave it out of finetune"),
        (["submit", "explain", "--cluster", "local", "--dry-run"], "ask for more --nodes"),
        (["submit", "pipeline", "--cluster", "two.yaml", "--array", "seed=0,1", "--dry-run"], "give 0"),
    ],
)
def test_wrong_words(words: list[str], expected: str, run: Run, tiny: str, two: str, tmp_path: Path) -> None:
    outcome = run(*words, "--recipe", tiny, "-q", "--dashboard-port", "8265")
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    assert "--dashboard-port 8265: " in outcome.err and expected in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "two.yaml"}


@pytest.mark.parametrize("port", ["65536", "-1"])
def test_numbers_that_are_no_port(port: str, run: Run, tiny: str) -> None:
    outcome = run("run", "explain", "--recipe", tiny, "--workers", "2", "--dashboard-port", port)
    assert outcome.code == 2 and port in outcome.err


def test_a_port_that_is_taken_is_refused_before_any_work(run: Run, tiny: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = run("run", "pipeline", "--recipe", tiny, "--workers", "2", "--dashboard-port", str(port), "-q")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"--dashboard-port {port}: 127.0.0.1:{port} cannot be listened on" in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


@pytest.mark.parametrize(
    "words", [["run", "pipeline", "--workers", "2"], ["submit", "pipeline", "--cluster", "two.yaml"]]
)
def test_ray_without_its_dashboard_is_told_before_any_work(
    words: list[str], run: Run, tiny: str, two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "aiohttp_cors.py").write_text("raise ImportError('half of it')\n")
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    outcome = run(*words, "--recipe", tiny, "--dashboard-port", "0", "-q")
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    assert "Ray is installed without its dashboard" in outcome.err and "pip install 'ray[default]'" in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "two.yaml", "broken"}


def status(url: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Addresses and ports on which any of them listens."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):  # it has ended meanwhile
            found |= {(*one.laddr,) for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE, reason="Ray is installed without its dashboard (ray[default])")
@pytest.mark.usefixtures("nothing_left")
def test_a_dashboard_for_who_has_the_token_as_long_as_the_pool_is_there(place: Path) -> None:
    log = place / "log"
    words = [sys.executable, "-m", "maehpc", *POOLED, "--dashboard-port", "0"]
    with log.open("w") as output, subprocess.Popen(words, cwd=place, stderr=output) as process:
        try:
            deadline = time.monotonic() + 90
            while not (
                line := re.search(
                    r"^Ray's dashboard at (http://(\S+):(\d+)); .* token in (\S+)$", log.read_text(), re.M
                )
            ):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            below = psutil.Process(process.pid).children(recursive=True)
            url, host, port, file = line[1], line[2], int(line[3]), place / line[4]
            assert host == "127.0.0.1" and file.stat().st_mode & 0o777 == 0o600
            token = file.read_text()

            assert status(url, None) == 200, "the page, which asks for the token"
            for path in ("/api/v0/nodes", "/nodes?view=summary", "/api/jobs/"):
                told = status(url + path, None), status(url + path, "f" * len(token)), status(url + path, token)
                assert told == (401, 403, 200), path
            assert {address for address, number in listening(below) if number == port} == {"127.0.0.1"}
            (server,) = [one for one in below if named("dashboard/dashboard.py")(one)]
            parts = [server, *server.children(recursive=True)]
            assert len(parts) > 5 and listening(parts) == {("127.0.0.1", port)}

            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75, log.read_text()
        finally:
            process.kill()
    assert token not in log.read_text() and not file.exists()
    with pytest.raises(OSError, match="refused"):
        status(url, None)
    _, alive = psutil.wait_procs({*below, *parts}, timeout=20)
    assert not [one.pid for one in alive if one.status() != psutil.STATUS_ZOMBIE]
