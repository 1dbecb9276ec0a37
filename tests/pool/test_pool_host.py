"""Where Ray's files go on a host, and which ports it is given."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from maehpc.errors import RunError
from maehpc.pool import host
from maehpc.pool.host import LONGEST_FOLDER, free_port, short_folder


@pytest.mark.parametrize("root", ["é", "x" * LONGEST_FOLDER, "absent", "a file"])
def test_a_folder_that_ray_cannot_have_is_not_taken(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        if root == "a file":
            (Path(place) / root).touch()
        elif root != "absent":
            (Path(place) / root).mkdir()
        monkeypatch.setattr("tempfile.tempdir", f"{place}/{root}")
        folder = short_folder()
        try:
            assert folder.parent == Path("/tmp") and folder.stat().st_mode & 0o777 == 0o700
        finally:
            folder.rmdir()
        assert not [*Path(place).glob("*/*")]


def test_a_folder_of_the_users_choice_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        monkeypatch.setattr("tempfile.tempdir", place)
        folder = short_folder()
        assert folder.parent == Path(place)


def test_no_place_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maehpc.pool.host.ROOM_BYTES", 1 << 60)
    with pytest.raises(RunError, match="neither TMPDIR nor /tmp nor /dev/shm"):
        short_folder()


def test_a_free_port_is_none_that_the_kernel_gives_to_others() -> None:
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = [free_port("127.0.0.1") for _ in range(30)]
    assert all(20_000 <= port < first_given for port in found) and len(set(found)) > 20


def test_ports_that_somebody_has_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(host, "_ports", lambda: iter([number, number, 0]))
        assert free_port("127.0.0.1") not in (0, number)
    monkeypatch.setattr(host, "_ports", lambda: iter([number, 0]))
    with pytest.raises(RunError, match=r"does not reach itself at 192\.0\.2\.1"):
        free_port("192.0.2.1")
