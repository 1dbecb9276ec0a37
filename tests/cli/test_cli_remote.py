"""`maehpc aggregate` over results that lie elsewhere: the report is the one that is made where they lie."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from command_line import Run
from report_experiments import Study, write_experiment


class Server(ThreadingHTTPServer):
    """Serves a folder, and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *words: object) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "results"
    write_experiment(folder / "demo", Study(written=(0, 2)))
    return folder


@pytest.fixture
def server(results: Path) -> Iterator[Server]:
    with Server(results.parent) as one:
        thread = Thread(target=one.serve_forever)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def shown(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.slow
def test_a_report_over_http_is_the_report_made_there(run: Run, results: Path, server: Server, tmp_path: Path) -> None:
    here = run("aggregate", str(results), "--out", "here")
    there = run("aggregate", f"{server.address}/results", "--out", "there")
    assert here.code == there.code == 0, there.err
    assert shown(tmp_path / "here") == shown(tmp_path / "there")
    assert "index.html" in shown(tmp_path / "there")
    assert "1 of 3 shards" in there.out

    scores = [path for path in server.asked if "/scores/c." in path]
    server.asked.clear()
    again = run("aggregate", f"{server.address}/results", "--out", "there")
    assert again.code == 0 and shown(tmp_path / "here") == shown(tmp_path / "there")
    assert len(set(scores)) == 2 and not any("/scores/c." in path for path in server.asked)
    assert any("/saliency/c." in path for path in server.asked), "panels are drawn anew"


def test_what_cannot_be_read_is_told(run: Run, server: Server, tmp_path: Path) -> None:
    address = f"{server.address}/results"
    missing = run("aggregate", address)
    assert missing.code == 2 and "--out" in missing.err
    unknown = run("aggregate", "nosuch://bucket/results", "--out", "report")
    assert unknown.code == 2 and "nosuch" in unknown.err
    absent = run("aggregate", f"{server.address}/nothing", "--out", "report")
    assert absent.code == 2 and "not a folder" in absent.err
    server.shutdown()
    server.server_close()
    gone = run("aggregate", address, "--out", "report")
    assert gone.code == 1 and address in gone.err and "Traceback" not in gone.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_protocol_whose_package_is_absent_is_told(run: Run) -> None:
    refused = run("aggregate", "s3://bucket/results", "--out", "report")
    assert refused.code == 2 and "s3fs" in refused.err
