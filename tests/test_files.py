from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_disks import Mount, small_disk

from maehpc import files
from maehpc.errors import RunError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    with small_disk(tmp_path / "disk") as mount:
        yield mount


def test_a_file_appears_whole_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a/b/file"
    with files.atomic_path(path) as partial:
        partial.write_bytes(b"new")
        assert not path.exists() and partial.parent == path.parent and files.is_partial(partial)
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), files.atomic_path(path) as partial:
        partial.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_replaced_file_is_another_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    os.link(path, tmp_path / "held")
    files.write_bytes(path, b"new")
    assert (tmp_path / "held").read_bytes() == b"old" and path.read_bytes() == b"new"


def _write_for_ever(path: Path) -> None:
    number = 0
    while True:
        number += 1
        files.write_bytes(path, bytes([number % 256]) * 300_000)


def test_a_file_killed_while_written_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=_write_for_ever, args=(path,))
    writer.start()
    seen = set()
    while len(seen) < 20:
        if path.exists():
            data = path.read_bytes()
            assert data == data[:1] * 300_000
            seen.add(data[0])
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    data = path.read_bytes()
    assert data == data[:1] * 300_000
    files.remove_partials(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_leftovers_go_and_all_else_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    (tmp_path / "name.partial-1").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/.x.partial-2").touch()
    files.partial_name(tmp_path / "file").touch()
    folder = files.partial_name(tmp_path / "folder")
    (folder / "inner").mkdir(parents=True)
    files.partial_name(tmp_path / "link").symlink_to(tmp_path / "outside")
    files.remove_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "kept", "name.partial-1", "outside"]
    assert (tmp_path / "outside/.x.partial-2").exists()
    files.remove_partials(tmp_path / "absent")


def test_a_folder_is_published_whole_and_never_over_another(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    files.publish(tmp_path / "first", tmp_path / "final")
    with pytest.raises(RunError, match="cannot write"):
        files.publish(tmp_path / "second", tmp_path / "final")
    assert (tmp_path / "final/file").read_text() == "first"


@given(JSON)
def test_json_and_its_digest_survive_the_disk(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.digest(json.loads(path.read_bytes())) == files.digest(value)


def test_digests_know_order_of_lists_but_not_of_keys() -> None:
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1})
    assert files.digest([1, 2]) != files.digest([2, 1])
    assert files.canonical_json({"b": [1, 2.5, "é"], "a": None}) == b'{"a":null,"b":[1,2.5,"\\u00e9"]}'
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            files.digest({"loss": number})


def test_a_failed_json_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_bytes()) == {"a": 1} and os.listdir(tmp_path) == ["file.json"]


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "abc") == files.sha256_bytes(b"abc") == abc


@given(
    lengths=st.lists(st.integers(0, 40) | st.sampled_from([0, 1 << 20, (1 << 21) + 3]), max_size=12),
    many=st.sampled_from([0, 1023, 1024, 2500]),
)
def test_parts_are_written_one_after_the_other(lengths: list[int], many: int) -> None:
    parts = [bytes([place % 251]) * length for place, length in enumerate([*lengths, *[3] * many])]
    expected = b"".join(parts)
    made = (memoryview(part) if len(part) % 2 else part for part in parts)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        assert files.write_synced(path, made) == (hashlib.sha256(expected).hexdigest(), len(expected))
        assert path.read_bytes() == expected


def test_parts_that_cannot_be_made_are_heard_of(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"first"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        files.write_synced(tmp_path / "file", parts())


def test_parts_beyond_the_disk_are_said(disk: Mount) -> None:
    with pytest.raises(RunError, match="the disk is full"):
        files.write_synced(disk("size=4m") / "file", (bytes(1 << 20) for _ in range(1000)))


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(RunError, match="a file stands where a folder is needed"):
            files.make_folder(folder)
        with pytest.raises(RunError, match="a file stands where a folder is needed"):
            files.require_writable(folder)


def test_a_folder_in_the_place_of_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(RunError, match="a folder stands where a file is needed"):
        files.write_bytes(tmp_path / "file", b"")
    assert os.listdir(tmp_path) == ["file"]


def test_absent_and_unreadable_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file/below"):
        with pytest.raises(FileNotFoundError), files.reading(path):
            path.read_bytes()
    with pytest.raises(RunError, match=f"cannot read {tmp_path}"), files.reading(tmp_path):
        tmp_path.read_bytes()


def test_a_full_disk_is_said_and_leaves_the_old_file(disk: Mount) -> None:
    path = disk("size=64k") / "file"
    files.write_bytes(path, b"old")
    with pytest.raises(RunError, match=f"cannot write {path}: the disk is full"):
        files.write_bytes(path, bytes(1 << 20))
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_a_read_only_disk_is_said(disk: Mount) -> None:
    folder = disk("size=64k")
    leftover = files.partial_name(folder / "file")
    leftover.touch()
    files.require_writable(folder)
    disk("ro")
    for attempt in (
        lambda: files.require_writable(folder),
        lambda: files.write_bytes(folder / "file", b""),
        lambda: files.make_folder(folder / "new"),
        lambda: files.remove_partials(folder),
    ):
        with pytest.raises(RunError, match="the file system is read-only; choose a writable folder"):
            attempt()
