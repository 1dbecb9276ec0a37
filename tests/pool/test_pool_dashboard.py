"""Ray's dashboard as far as it needs none: what Ray is told, what is refused, what a person hears, and who listens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from submit_jobs import until

from maehpc.errors import InputError, RunError
from maehpc.pool.cluster import Head, cluster
from maehpc.pool.dashboard import check, check_installed, listens, settled, told, url
from maehpc.pool.host import HostSettings, marked


def words(head: bool, dashboard: int | None) -> list[str]:
    settings = HostSettings("m", "127.0.0.2", "127.0.0.2:7", head, 1, 0, "token", "/f", dashboard=dashboard)
    # A free port, another each time.
    return [word for word in settings.words(Path("/f/r")) if not word.startswith("--ray-client-server-port=")]


def test_ray_is_told_of_a_dashboard_where_one_is_asked_for_and_of_nothing_else() -> None:
    without, asked = words(True, None), words(True, 8265)
    assert [word for word in without if "--include-dashboard" in word or "dashboard-host" in word] == [
        "--include-dashboard=false"
    ]
    assert set(asked) - set(without) == {
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=8265",
    }
    assert set(without) - set(asked) == {"--include-dashboard=false"}
    assert words(False, 8265) == words(False, None), "the head alone has it"


@contextmanager
def taken(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listening:
        listening.bind((address, port))
        listening.listen()
        yield int(listening.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_somebody_listens_on_is_refused(address: str) -> None:
    with taken(address) as port:
        for refuses in (settled, check):
            with pytest.raises(InputError, match=f"--dashboard-port {port}: 127.0.0.1:{port} .*in use.* give another"):
                refuses(port)
    assert settled(port) == port


def test_zero_is_a_port_that_can_be_had() -> None:
    with taken(port=settled(0)):
        pass


def test_a_port_that_is_root_s_is_refused_to_others() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if os.geteuid() == 0 or first <= 80:
        pytest.skip("this user may listen anywhere")
    with pytest.raises(InputError, match="--dashboard-port 80: "):
        settled(80)


def test_ray_without_its_dashboard_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aiohttp_cors.py").write_text("raise ImportError('there is half of it')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for refuses in (check, check_installed):
        with pytest.raises(
            InputError, match=r"--dashboard-port 0: Ray .*\(ImportError: there is half of it\); pip install 'ray\[def"
        ):
            refuses(0)


LISTENING = """
import socket, sys
with socket.socket() as one:
    one.bind((sys.argv[1], 0))
    one.listen()
    print(one.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("address", "mark", "expected"),
    [
        ("127.0.0.1", "ours", True),
        ("127.0.0.1", "another", False),
        ("127.0.0.2", "ours", False),
    ],
)
def test_only_a_process_of_the_cluster_counts_as_its_dashboard(address: str, mark: str, expected: bool) -> None:
    ours = f"ours-{os.getpid()}"
    environment = {**os.environ, "MAEHPC_POOL": ours if mark == "ours" else mark}
    command = [sys.executable, "-c", LISTENING, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        port = int(other.stdout.readline())
        assert listens(port, ours) is expected
        assert not listens(port + 1 if port < 65535 else 1, ours)
        other.communicate()


@pytest.mark.parametrize(
    ("title", "expected"), [("ray-dashboard-JobHead-0 (python)", True), ("a-ray-dashboard", False)]
)
def test_a_part_of_a_dashboard_that_is_orphaned_is_the_cluster_s(title: str, expected: bool) -> None:
    """It has written its title over the mark."""
    environment = {name: value for name, value in os.environ.items() if name != "MAEHPC_POOL"}
    with subprocess.Popen(["bash", "-c", 'exec -a "$0" sleep 60', title], env=environment) as orphan:
        try:
            words = Path(f"/proc/{orphan.pid}/cmdline")
            until(lambda: words.read_bytes().split(b"\0")[0] == title.encode())
            assert (orphan.pid in set(marked("whatever"))) is expected
        finally:
            orphan.kill()


def test_where_to_look(tmp_path: Path) -> None:
    token = tmp_path / "token"
    assert told(8265, "", token) == f"Ray's dashboard at {url(8265)}; it asks for the token in {token}"
    assert url(8265) == "http://127.0.0.1:8265"
    assert told(8265, "n1", token) == (
        "Ray's dashboard at http://127.0.0.1:8265 of n1 (elsewhere after ssh -L 8265:127.0.0.1:8265 n1); "
        f"it asks for the token in {token}"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_port_that_is_taken_meanwhile_is_told_before_ray_would_end_this_process() -> None:
    with socket.socket() as other:

        def take(head: Head) -> None:
            assert head.dashboard is not None
            other.bind(("127.0.0.1", head.dashboard))  # Ray has begun and does not listen there yet
            other.listen()

        told = r"Ray did not start with its dashboard: .*already occupied"
        with pytest.raises(RunError, match=told), cluster(1, announce=take, dashboard=0):
            pass
