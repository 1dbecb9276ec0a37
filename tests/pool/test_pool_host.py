"""Where Ray's files go on a host."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from maehpc.errors import RunError
from maehpc.pool.host import LONGEST_FOLDER, short_folder


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
