"""Every fault a store can have after it was written: named, refused by readers, mended by running again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import maps_writer
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from maehpc.errors import InputError, RunError
from maehpc.maps import MapStore, Problem, discard, verify

Harm = Callable[[Path], None]


def found(root: Path) -> list[Problem]:
    return verify(root / "maps", root / "ledger")


def told(root: Path) -> list[tuple[str, int | None, str]]:
    """Kind, shard and file of every problem."""
    return [(problem.kind, problem.shard, str(problem.path.relative_to(root))) for problem in found(root)]


def cut(keep: Callable[[int], int]) -> Harm:
    return lambda path: path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])


def flip(path: Path, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


HARMS: dict[str, tuple[Harm, str]] = {
    "absent": (Path.unlink, "missing"),
    "zero": (cut(lambda size: 0), "truncated"),
    "half": (cut(lambda size: size // 2), "truncated"),
    "minus ten": (cut(lambda size: size - 10), "truncated"),
    "flipped": (flip, "flipped"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "flipped"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "flipped"),
}

SAME_SIZE = ("flipped", "zeros")


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["saliency/c.1.0.0", "scores/c.2.0"])
def test_a_harmed_shard_is_named_refused_and_mended(
    whole: Path, reference: dict[str, bytes], name: str, harm: str
) -> None:
    assert found(whole) == []
    action, kind = HARMS[harm]
    array, shard = name.split("/")[0].replace("scores", "label"), int(name.split("c.")[1][0])
    action(whole / "maps" / name)

    [problem] = found(whole)
    assert (problem.kind, problem.shard, problem.path) == (kind, shard, whole / "maps" / name)
    assert str(problem.path) in problem.sentence and "run explain again" in problem.sentence
    assert "\n" not in problem.sentence
    store = MapStore.open(whole / "maps", whole / "ledger")
    assert store.missing(deep=True) == [shard]
    assert store.missing() == ([] if harm in SAME_SIZE else [shard])
    with pytest.raises(RunError, match=f"run explain again to compute shard {shard} anew"):
        store.read(array, shard)

    assert maps_writer.explain(whole) == [shard]
    assert maps_writer.contents(whole / "maps") == reference and found(whole) == []


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["zarr.json", "scores/zarr.json", "image/zarr.json", "image/c.0", "score/c.0"])
def test_harmed_metadata_is_named_refused_and_mended(
    whole: Path, reference: dict[str, bytes], name: str, harm: str
) -> None:
    action, kind = HARMS[harm]
    action(whole / "maps" / name)
    assert told(whole) == [(kind, None, f"maps/{name}")]
    with pytest.raises(InputError, match="run explain again to write it anew"):
        MapStore.open(whole / "maps", whole / "ledger")
    assert maps_writer.explain(whole) == []
    assert maps_writer.contents(whole / "maps") == reference and found(whole) == []


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["saliency/c.0.0.0", "scores/c.1.0", "scores/zarr.json", "score/c.0"]),
    bit=st.integers(0, 8 * 2000),
)
def test_no_flipped_bit_goes_unseen(tmp_path_factory: pytest.TempPathFactory, name: str, bit: int) -> None:
    root = tmp_path_factory.getbasetemp() / "bits"
    if not root.exists():
        maps_writer.explain(root)
    path = root / "maps" / name
    data = path.read_bytes()
    try:
        flip(path, bit)
        assert [(kind, file) for kind, _, file in told(root)] == [("flipped", f"maps/{name}")]
    finally:
        path.write_bytes(data)


def test_any_zarr_reader_notices_a_flipped_bit_of_a_map(whole: Path) -> None:
    path = whole / "maps/saliency/c.0.0.0"
    flip(path, 8 * 30)
    with pytest.raises(ValueError, match=r"[Cc]hecksum"):
        zarr.open_group(whole / "maps", mode="r", zarr_format=3)["saliency"][0:4]


def test_swapped_shards_are_both_named(whole: Path, reference: dict[str, bytes]) -> None:
    folder = whole / "maps/scores"
    (folder / "c.0.0").rename(folder / "kept")
    (folder / "c.1.0").rename(folder / "c.0.0")
    (folder / "kept").rename(folder / "c.1.0")
    assert [(shard, file) for _, shard, file in told(whole)] == [
        (0, "maps/scores/c.0.0"),
        (1, "maps/scores/c.1.0"),
    ]
    assert maps_writer.explain(whole) == [0, 1]
    assert maps_writer.contents(whole / "maps") == reference


def test_swapped_records_are_both_named(whole: Path) -> None:
    zero, one = (whole / f"ledger/shard-0000{shard}.json" for shard in (0, 1))
    first, second = zero.read_bytes(), one.read_bytes()
    zero.write_bytes(second)
    one.write_bytes(first)
    assert [(kind, shard) for kind, shard, _ in told(whole)] == [("foreign", 0), ("foreign", 1)]
    assert maps_writer.explain(whole) == [0, 1] and found(whole) == []


def test_an_absent_shard_that_reads_as_fill_values_is_named(whole: Path) -> None:
    for name in maps_writer.LAYOUT.shard_files(1):
        (whole / "maps" / name).unlink()
    group = zarr.open_group(whole / "maps", mode="r", zarr_format=3)
    assert np.isnan(np.asarray(group["saliency"][4:8])).all()
    assert [(kind, shard) for kind, shard, _ in told(whole)] == [("missing", 1)] * 2


@pytest.mark.parametrize("harm", ["absent", "zero", "half", "minus ten", "zeros", "not an object", "field gone"])
def test_a_record_that_cannot_be_read_records_nothing(whole: Path, reference: dict[str, bytes], harm: str) -> None:
    path = whole / "ledger/shard-00002.json"
    if harm in HARMS:
        HARMS[harm][0](path)
    else:
        record = json.loads(path.read_bytes())
        del record["attempt"]
        path.write_text(json.dumps([1] if harm == "not an object" else record))
    [problem] = found(whole)
    assert (problem.kind, problem.shard, problem.path) == ("unrecorded", 2, path)
    assert "shard 2 (images 8 to 9)" in problem.sentence and "run explain to compute it" in problem.sentence
    assert MapStore.open(whole / "maps", whole / "ledger").shards() == [0, 1]
    assert maps_writer.explain(whole) == [2]
    assert maps_writer.contents(whole / "maps") == reference and found(whole) == []


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "0" * 64},
        {"images": [4, 7]},
        {"shard": 0},
        {"files": {}},
        {"files": {"../../elsewhere": {"sha256": "0" * 64, "bytes": 1}}},
    ],
)
def test_a_record_of_another_store_is_foreign_and_not_believed(whole: Path, change: dict[str, object]) -> None:
    path = whole / "ledger/shard-00001.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    assert told(whole) == [("foreign", 1, "ledger/shard-00001.json")]
    assert MapStore.open(whole / "maps", whole / "ledger").missing() == [1]
    assert maps_writer.explain(whole) == [1] and found(whole) == []


def test_foreign_files_are_named_and_left_alone(whole: Path) -> None:
    strange = ["maps/note.txt", "maps/other/zarr.json", "maps/saliency/c.3.0.0", "maps/saliency/c/0/0/0"]
    records = ["ledger/shard-00003.json", "ledger/shard-1.json", "ledger/shard-00001.json.old"]
    for name in [*strange, *records]:
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_bytes(b"{}")
    assert sorted(told(whole), key=str) == sorted([("foreign", None, name) for name in strange + records], key=str)
    assert all("move it away" in problem.sentence for problem in found(whole))
    assert maps_writer.explain(whole) == []
    assert all((whole / name).exists() for name in [*strange, *records])


def test_leftovers_are_no_fault_and_go_with_the_next_run(whole: Path, reference: dict[str, bytes]) -> None:
    leftovers = [
        whole / "maps/.zarr.json.partial-0",
        whole / "maps/saliency/.c.1.0.0.partial-0",
        whole / "ledger/.shard-00001.json.partial-0",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    assert found(whole) == []
    maps_writer.explain(whole)
    assert not any(path.exists() for path in leftovers)
    assert maps_writer.contents(whole / "maps") == reference


def test_an_unreadable_store_record_is_made_anew_and_the_shards_stay(whole: Path, reference: dict[str, bytes]) -> None:
    path = whole / "ledger/store.json"
    good = path.read_bytes()
    for harm in ("zero", "half", "flipped"):
        HARMS[harm][0](path)
        with pytest.raises(InputError, match="absent or unreadable; run explain"):
            verify(whole / "maps", whole / "ledger")
        assert maps_writer.explain(whole) == []
        assert path.read_bytes() == good and maps_writer.contents(whole / "maps") == reference


def test_a_store_record_that_contradicts_itself_is_unreadable(whole: Path) -> None:
    path = whole / "ledger/store.json"
    record = json.loads(path.read_bytes())
    record["inputs"]["seed"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="absent or unreadable"):
        MapStore.open(whole / "maps", whole / "ledger")


def test_a_store_record_that_leaves_out_a_file_is_unreadable(whole: Path, reference: dict[str, bytes]) -> None:
    path = whole / "ledger/store.json"
    good = path.read_bytes()
    for name in json.loads(good)["files"]:
        record = json.loads(good)
        del record["files"][name]
        path.write_text(json.dumps(record))
        with pytest.raises(InputError, match="absent or unreadable; run explain"):
            MapStore.open(whole / "maps", whole / "ledger")
    assert maps_writer.explain(whole) == []
    assert path.read_bytes() == good and maps_writer.contents(whole / "maps") == reference


def test_the_whole_store_gone_is_named_and_mended(whole: Path, reference: dict[str, bytes]) -> None:
    shutil.rmtree(whole / "maps")
    assert {kind for kind, _, _ in told(whole)} == {"missing"}
    assert {file.removeprefix("maps/") for _, _, file in told(whole)} == set(reference)
    assert maps_writer.explain(whole) == [0, 1, 2]
    assert maps_writer.contents(whole / "maps") == reference


def test_discarded_shards_count_as_missing(whole: Path) -> None:
    flip(whole / "maps/saliency/c.0.0.0")
    (whole / "maps/scores/c.2.0").unlink()
    (whole / "maps/note.txt").touch()
    assert discard(whole / "ledger", found(whole)) == [0, 2]
    assert MapStore.open(whole / "maps", whole / "ledger").missing() == [0, 2]
    assert discard(whole / "ledger", found(whole)) == [0, 2]


def test_a_file_that_cannot_be_read_is_named_not_raised(whole: Path) -> None:
    path = whole / "maps/scores/c.1.0"
    path.unlink()
    path.symlink_to(path)
    assert told(whole) == [("unreadable", 1, "maps/scores/c.1.0")]
    assert maps_writer.explain(whole) == [1] and found(whole) == []


def test_a_folder_in_the_place_of_a_shard_is_said_in_one_sentence(whole: Path) -> None:
    path = whole / "maps/scores/c.1.0"
    path.unlink()
    path.mkdir()
    assert [(shard, file) for _, shard, file in told(whole)] == [(1, "maps/scores/c.1.0")]
    with pytest.raises(RunError, match="a folder stands where a file is needed; move it away"):
        maps_writer.explain(whole)
    path.rmdir()
    assert maps_writer.explain(whole) == [1] and found(whole) == []
