from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import maps_writer
import numpy as np
import pytest
import xarray
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_disks import Mount

from maehpc.errors import InputError, RunError
from maehpc.maps import ArrayLayout, MapStore, StoreLayout, verify
from maehpc.ownership import Owner, own

LAYOUT = maps_writer.LAYOUT


def opened(root: Path) -> MapStore:
    return MapStore.open(root / "maps", root / "ledger")


def expected(name: str) -> np.ndarray[Any, Any]:
    return np.concatenate([maps_writer.values(LAYOUT, shard)[name] for shard in range(LAYOUT.shards)])


def same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_reads_what_was_written(whole: Path) -> None:
    store = opened(whole)
    assert store.complete and store.missing(deep=True) == [] and store.shards() == [0, 1, 2]
    assert store.attributes == LAYOUT.attributes
    assert store.images(2) == range(8, 10)
    for name in LAYOUT.arrays:
        assert same_bits(np.concatenate([store.read(name, shard) for shard in store.shards()]), expected(name))


def test_zarr_reads_it_as_it_is(whole: Path) -> None:
    group = zarr.open_group(whole / "maps", mode="r", zarr_format=3, use_consolidated=False)
    assert sorted(group.array_keys()) == ["image", "saliency", "score", "scores"]
    assert dict(group.attrs) == LAYOUT.attributes
    assert same_bits(np.asarray(group["saliency"][...]), expected("saliency"))
    names, table = group["score"][...].tolist(), np.asarray(group["scores"][...])
    assert table.dtype == np.float32 and len(names) == 7
    for name in ("label", "saliency_sensitivity", "flipped"):
        columns = [place for place, column in enumerate(names) if column.partition("[")[0] == name]
        assert same_bits(table[:, columns].reshape(expected(name).shape), expected(name).astype(np.float32))
    metadata = json.loads((whole / "maps/saliency/zarr.json").read_bytes())
    assert metadata["dimension_names"] == ["image", "y", "x"]
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [4, 6, 5]
    sharding = metadata["codecs"][0]["configuration"]
    assert sharding["chunk_shape"] == [1, 6, 5]
    assert [codec["name"] for codec in sharding["codecs"]] == ["bytes", "crc32c"]
    assert [codec["name"] for codec in sharding["index_codecs"]] == ["bytes", "crc32c"]
    assert "consolidated_metadata" not in json.loads((whole / "maps/zarr.json").read_bytes())


def test_xarray_shows_it_with_names(whole: Path) -> None:
    with xarray.open_zarr(whole / "maps", consolidated=False) as data:
        assert dict(data.sizes) == {"image": 10, "y": 6, "x": 5, "score": 7}
        assert sorted(data.coords) == ["image", "score"]
        assert data.image.values.tolist() == list(range(10))
        assert data.saliency.dims == ("image", "y", "x")
        assert data.saliency.dtype == "float32" and data.scores.dims == ("image", "score")
        assert data.scores.sel(score="label").values.tolist() == expected("label").tolist()
        places = [f"saliency_sensitivity[{place}]" for place in range(3)]
        assert same_bits(data.scores.sel(score=places).values, expected("saliency_sensitivity"))
        assert data.attrs["classes"] == ["left", "right"]
        assert same_bits(data.sel(image=9).saliency.values, expected("saliency")[9])


def test_unwritten_values_are_not_mistaken_for_results(tmp_path: Path) -> None:
    with own(tmp_path / "ledger") as owner:
        maps_writer.begin(tmp_path, owner).write_shard(1, maps_writer.values(LAYOUT, 1))
    with xarray.open_zarr(tmp_path / "maps", consolidated=False) as data:
        assert np.isnan(data.saliency[:4]).all() and np.isnan(data.saliency[8:]).all()
        assert np.isnan(data.scores[:4]).all() and not np.isnan(data.scores[4:8]).any()
    store = opened(tmp_path)
    assert store.missing() == [0, 2] and store.shards(deep=True) == [1] and not store.complete
    with pytest.raises(RunError, match=r"shard 0 of .* is not recorded; run explain"):
        store.read("label", 0)


@pytest.mark.parametrize("shard", [0, 2])
def test_a_shard_of_nothing_but_fill_values_is_written(tmp_path: Path, shard: int) -> None:
    fills = {"f": np.nan, "i": -1, "b": False}
    arrays = maps_writer.values(LAYOUT, shard)
    arrays = {name: np.full_like(array, fills[array.dtype.kind]) for name, array in arrays.items()}
    with own(tmp_path / "ledger") as owner:
        store = maps_writer.begin(tmp_path, owner)
        store.write_shard(shard, arrays)
    assert all((tmp_path / "maps" / name).is_file() for name in LAYOUT.shard_files(shard))
    assert all(same_bits(store.read(name, shard), array) for name, array in arrays.items())


@st.composite
def stores(draw: st.DrawFn) -> tuple[StoreLayout, dict[str, np.ndarray[Any, Any]]]:
    images, shard_images = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    layouts, arrays = {}, {}
    for index in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(1, 4), max_size=3).map(tuple))
        dtype = draw(st.sampled_from(["float16", "float32", "float64", "int32", "int64", "uint8", "bool"]))
        layouts[f"a{index}"] = ArrayLayout(tuple(f"d{index}{axis}" for axis in range(len(shape))), shape, dtype)
        exact = st.integers(-(2**24), 2**24) if dtype in ("int32", "int64") else None  # what a table of scores takes
        arrays[f"a{index}"] = draw(hnp.arrays(dtype, (images, *shape), elements=exact))
    attributes = draw(
        st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3)
    )
    return StoreLayout(images, shard_images, layouts, attributes), arrays


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=stores(), random=st.randoms(use_true_random=False))
def test_any_store_comes_back_bit_for_bit_in_any_order(
    memory: Path, case: tuple[StoreLayout, dict[str, np.ndarray[Any, Any]]], random: Any
) -> None:
    layout, arrays = case
    folders = []
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for name in ("a", "b"):
            root = Path(folder) / name
            with own(root / "ledger") as owner:
                store = maps_writer.begin(root, owner, layout)
                shards = list(range(layout.shards))
                random.shuffle(shards)
                for shard in shards:
                    part = slice(*layout.span(shard))
                    store.write_shard(shard, {key: array[part] for key, array in arrays.items()})
            assert verify(root / "maps", root / "ledger") == []
            folders.append(maps_writer.contents(root / "maps"))
        assert folders[0] == folders[1]
        group = zarr.open_group(root / "maps", mode="r", zarr_format=3)
        again = opened(root)
        assert again.layout == layout
        for key, array in arrays.items():
            assert same_bits(np.concatenate([again.read(key, shard) for shard in again.shards()]), array)
            if layout.arrays[key].is_map:
                assert same_bits(np.asarray(group[key][...]), array)
            else:
                table = np.asarray(group["scores"][...])[:, layout.columns[key]]
                assert same_bits(table.astype(array.dtype).reshape(array.shape), array)


def test_a_second_run_computes_nothing_and_changes_nothing(whole: Path, reference: dict[str, bytes]) -> None:
    records = {name: data for name, data in maps_writer.contents(whole / "ledger").items() if "shard" in name}
    assert maps_writer.explain(whole) == []
    assert maps_writer.contents(whole / "maps") == reference
    again = maps_writer.contents(whole / "ledger")
    assert {name: again[name] for name in records} == records


def test_workers_of_one_owner_write_the_same_bytes(tmp_path: Path, reference: dict[str, bytes]) -> None:
    with own(tmp_path / "ledger") as owner:
        maps_writer.begin(tmp_path, owner)
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=maps_writer.explain_part, args=(tmp_path, owner, shards)) for shards in ([2, 0], [1])
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
    assert maps_writer.contents(tmp_path / "maps") == reference


def test_a_damaged_file_is_replaced_never_written_into(whole: Path, reference: dict[str, bytes]) -> None:
    path = whole / "maps/saliency/c.1.0.0"
    path.write_bytes(b"damaged")
    os.link(path, whole / "held")
    assert maps_writer.explain(whole) == [1]
    assert (whole / "held").read_bytes() == b"damaged"
    assert maps_writer.contents(whole / "maps") == reference


def test_no_decision_rests_on_file_times(whole: Path) -> None:
    for path in whole.rglob("*"):
        os.utime(path, (0, 0))
    assert opened(whole).missing(deep=True) == [] and verify(whole / "maps", whole / "ledger") == []


def test_wrong_arrays_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    good = maps_writer.values(LAYOUT, 0)
    with own(tmp_path / "ledger") as owner:
        store = maps_writer.begin(tmp_path, owner)
        before = maps_writer.contents(tmp_path)
        for shard, arrays, words in [
            (3, good, "shard 3 is none of the 3"),
            (-1, good, "shard -1 is none of the 3"),
            (2, good, r"label is int64\[4\] for int64\[2\] in shard 2"),
            (0, {**good, "saliency": good["saliency"].astype("f8")}, "saliency is float64"),
            (0, {**good, "saliency": good["saliency"].astype(">f4")}, "saliency is >f4"),
            (0, {**good, "other": good["label"]}, "'other'"),
            (0, {"label": good["label"]}, "were given for"),
        ]:
            with pytest.raises(ValueError, match=words):
                store.write_shard(shard, arrays)
        assert maps_writer.contents(tmp_path) == before
    with pytest.raises(ValueError, match="without an owner"):
        opened(tmp_path).write_shard(0, good)


def changed_inputs(**changes: Any) -> dict[str, Any]:
    return {**maps_writer.INPUTS, **changes}


@pytest.mark.parametrize(
    ("inputs", "layout", "words"),
    [
        (changed_inputs(seed=4), LAYOUT, "(seed was 3 and is 4)"),
        (
            changed_inputs(explain={"radius": 0.05, "methods": ["saliency"]}),
            dataclasses.replace(LAYOUT, attributes={}),
            "(explain.radius was 0.02 and is 0.05)",
        ),
        (changed_inputs(more=1), LAYOUT, "(more was null and is 1)"),
        (maps_writer.INPUTS, dataclasses.replace(LAYOUT, shard_images=5), "(shard_images was 4 and is 5)"),
        (
            {"seed": 4},
            LAYOUT,
            'explain.methods was ["saliency"] and is null, explain.radius was 0.02 and is null, and 1 more)',
        ),
    ],
)
def test_another_store_is_not_written_over(
    whole: Path, inputs: dict[str, Any], layout: StoreLayout, words: str
) -> None:
    with own(whole / "ledger") as owner:
        before = maps_writer.contents(whole)
        with pytest.raises(InputError) as error:
            MapStore.create(whole / "maps", whole / "ledger", layout, inputs, owner)
        assert maps_writer.contents(whole) == before
    assert words in str(error.value) and "another --name" in str(error.value) and "\n" not in str(error.value)


def test_inputs_are_compared_as_json(whole: Path) -> None:
    inputs = changed_inputs(explain={"methods": ("saliency",), "radius": 0.02})
    with own(whole / "ledger") as owner:
        assert MapStore.create(whole / "maps", whole / "ledger", LAYOUT, inputs, owner).complete


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "maps")
    before = maps_writer.contents(tmp_path / "maps")
    with own(tmp_path / "ledger") as owner, pytest.raises(InputError, match="knows nothing of; move it away"):
        maps_writer.begin(tmp_path, owner)
    assert maps_writer.contents(tmp_path / "maps") == before


def test_opening_says_what_is_absent(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(InputError, match=r"store\.json is absent or unreadable; run explain"):
        opened(tmp_path)
    with pytest.raises(InputError, match="is absent or unreadable"):
        verify(tmp_path / "maps", tmp_path / "ledger")
    (whole / "maps/scores/zarr.json").unlink()
    with pytest.raises(InputError, match=r"scores/zarr\.json is absent; run explain again"):
        opened(whole)


def test_a_store_in_another_format_is_left_alone(whole: Path) -> None:
    path = whole / "ledger/store.json"
    record = json.loads(path.read_bytes())
    assert record["format"] == 2
    for other in ({**record, "format": 3}, {key: value for key, value in record.items() if key != "format"}):
        path.write_text(json.dumps(other))
        before = maps_writer.contents(whole)
        for act in (lambda: opened(whole), lambda: maps_writer.explain(whole)):
            with pytest.raises(InputError, match=r"in another format .*another --name"):
                act()
        attempts = [name for name in maps_writer.contents(whole) if name not in before]
        assert {name: maps_writer.contents(whole)[name] for name in before} == before and len(attempts) <= 1


@pytest.mark.parametrize("number", [2**24 + 1, -(2**24) - 1, 2**53 + 1, 2**63 - 1, -(2**63)])
def test_an_integer_that_the_table_does_not_hold_is_refused(tmp_path: Path, number: int) -> None:
    arrays = maps_writer.values(LAYOUT, 0)
    arrays["label"][:] = number
    with (
        own(tmp_path / "ledger") as owner,
        pytest.raises(ValueError, match="label holds an integer beyond 16777216"),
    ):
        maps_writer.begin(tmp_path, owner).write_shard(0, arrays)
    assert opened(tmp_path).missing() == [0, 1, 2]


def test_a_stale_attempt_records_nothing_more(tmp_path: Path) -> None:
    with own(tmp_path / "ledger") as old:
        store = maps_writer.begin(tmp_path, old)
        store.write_shard(0, maps_writer.values(LAYOUT, 0))
        (tmp_path / "ledger/lock").unlink()  # as on a file system whose locks do not reach the other node
        with own(tmp_path / "ledger") as new:
            rerun = maps_writer.begin(tmp_path, new)
            rerun.write_shard(1, maps_writer.values(LAYOUT, 1))
            before = maps_writer.contents(tmp_path)
            for shard in (0, 1, 2):
                with pytest.raises(RunError, match=r"attempt 1 no longer owns .*: attempt 2 has begun"):
                    store.write_shard(shard, maps_writer.values(LAYOUT, shard))
            with pytest.raises(RunError, match="attempt 1 no longer owns"):
                maps_writer.begin(tmp_path, old)
            assert maps_writer.contents(tmp_path) == before
            assert rerun.missing(deep=True) == [2]


class SoonSuperseded(Owner):
    """Owns the folder when first asked; the moment after, another attempt begins."""

    def still_owner(self) -> None:
        super().still_owner()
        (self.folder / "attempts" / f"{self.attempt + 1:04d}.json").touch()


def test_an_attempt_fenced_while_it_renames_records_nothing(whole: Path) -> None:
    with own(whole / "ledger") as owner:
        store = MapStore.open(whole / "maps", whole / "ledger", SoonSuperseded(owner.folder, owner.attempt))
        with pytest.raises(RunError, match="attempt 2 no longer owns"):
            store.write_shard(1, maps_writer.values(LAYOUT, 0))
    assert store.shards() == [0, 2]
    assert [(problem.kind, problem.shard) for problem in verify(whole / "maps", whole / "ledger")] == [
        ("unrecorded", 1)
    ]


def test_a_full_disk_costs_the_shard_alone(disk: Mount, tmp_path: Path) -> None:
    root = disk("size=1536k")
    with pytest.raises(RunError, match=r"cannot write .*: the disk is full; free some space"):
        maps_writer.explain(root, maps_writer.LARGE)
    store = opened(root)
    done = store.shards(deep=True)
    assert 0 < len(done) < maps_writer.LARGE.shards
    problems = verify(root / "maps", root / "ledger")
    assert {problem.kind for problem in problems} == {"unrecorded"}
    assert [problem.shard for problem in problems] == store.missing()
    assert not [name for name in maps_writer.contents(root) if ".partial-" in name]

    disk("size=32m")
    assert maps_writer.explain(root, maps_writer.LARGE) == [problem.shard for problem in problems]
    maps_writer.explain(tmp_path / "other", maps_writer.LARGE)
    assert maps_writer.contents(root / "maps") == maps_writer.contents(tmp_path / "other/maps")


def test_a_read_only_disk_fails_before_computing_and_can_be_read(disk: Mount, tmp_path: Path) -> None:
    root = disk("size=4m")
    maps_writer.explain(root)
    disk("ro")
    assert opened(root).missing(deep=True) == [] and verify(root / "maps", root / "ledger") == []
    assert opened(root).read("label", 2).tolist() == expected("label")[8:].tolist()
    with pytest.raises(RunError, match="read-only; choose a writable folder"):
        maps_writer.explain(root)
    with own(tmp_path / "ledger") as owner, pytest.raises(RunError, match="read-only; choose a writable folder"):
        MapStore.create(root / "new", tmp_path / "ledger", LAYOUT, {}, owner)
    assert not (tmp_path / "ledger/store.json").exists()
