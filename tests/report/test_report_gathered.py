"""Scores are gathered once, whatever becomes of the shards and of what was gathered; and a piece at a time."""

from __future__ import annotations

import gc
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from report_experiments import Study, explanations, write_explanations, write_maps

from maehpc.errors import RunError
from maehpc.experiment import Experiment
from maehpc.maps import MapStore
from maehpc.ownership import own
from maehpc.report import aggregate, gathered
from maehpc.report.explanations import Explained, read_explained
from maehpc.report.gathered import Reader, gather
from maehpc.report.statistics import summarise

NAMES = ["label", "saliency_sensitivity", "saliency_sensitivity_max"]
SCORES = "demo/maps/digits.zarr/scores"


def flip_a_bit(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def open_store(results: Path) -> MapStore:
    experiment = Experiment(results / "demo")
    return MapStore.open(experiment.maps("digits"), experiment.ledger("digits"))


def told(results: Path) -> list[str]:
    return [sentence for sentence in aggregate(results).missing if "shard" in sentence or "c." in sentence]


def refused(sentence: str) -> None:
    raise AssertionError(sentence)


@pytest.mark.slow
def test_a_shard_is_read_once(tmp_path: Path) -> None:
    write_explanations(tmp_path / "demo", Study())
    aggregate(tmp_path)
    first = contents(tmp_path / "report")
    flip_a_bit(tmp_path / SCORES / "c.1.0")
    assert told(tmp_path) == []
    assert contents(tmp_path / "report") == first
    shutil.rmtree(tmp_path / "report" / ".gathered")
    (sentence,) = told(tmp_path)
    assert "c.1" in sentence


@pytest.mark.slow
def test_the_system_is_asked_for_new_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("maehpc.report.readers._fetch_file", lambda path: asked.append(Path(path).name))
    write_explanations(tmp_path / "demo", Study())
    aggregate(tmp_path)
    records = [f"shard-0000{shard}.json" for shard in range(3)]
    assert sorted(asked) == ["c.0.0", "c.1.0", "c.2.0", *records]
    asked.clear()
    aggregate(tmp_path)
    assert asked == records


@pytest.mark.slow
def test_new_shards_are_read_and_no_others(tmp_path: Path) -> None:
    arrays = write_explanations(tmp_path / "demo", Study(written=(0, 2)))
    assert told(tmp_path) == ["demo/digits: 1 of 3 shards not explained: 1"]
    flip_a_bit(tmp_path / SCORES / "c.2.0")  # would be told if it were read again
    experiment = Experiment(tmp_path / "demo")
    with own(experiment.ledger("digits")) as owner:
        store = MapStore.open(experiment.maps("digits"), experiment.ledger("digits"), owner)
        store.write_shard(1, {name: values[4:8] for name, values in arrays.items()})
    assert told(tmp_path) == []
    images = pd.read_parquet(tmp_path / "report" / "images.parquet").query("method == 'saliency'")
    assert images["image"].tolist() == list(range(10))
    np.testing.assert_array_equal(images["sensitivity_max"], arrays["saliency_sensitivity_max"])


@pytest.mark.slow
def test_a_shard_that_is_gone_or_cut_off_counts_no_more(tmp_path: Path) -> None:
    write_explanations(tmp_path / "demo", Study())
    assert told(tmp_path) == []
    path = tmp_path / SCORES / "c.1.0"
    path.write_bytes(path.read_bytes()[:-1])
    assert told(tmp_path) == ["demo/digits: 1 of 3 shards not explained: 1"]
    assert aggregate(tmp_path).rows["images"].tolist() == [6] * 3


@pytest.mark.slow
def test_a_store_made_anew_is_read_anew(tmp_path: Path) -> None:
    write_explanations(tmp_path / "demo", Study())
    aggregate(tmp_path)
    for folder in ("maps", "ledger"):
        shutil.rmtree(tmp_path / "demo" / folder)
    arrays = write_maps(Experiment(tmp_path / "demo"), Study(shard_images=3), seed=1)
    row = aggregate(tmp_path).rows.iloc[0]
    assert row["sensitivity_max_mean"] == pytest.approx(arrays["saliency_sensitivity_max"].mean(dtype=np.float64))


@pytest.mark.slow
def test_what_was_gathered_of_stores_that_are_gone_is_deleted(tmp_path: Path) -> None:
    for name in ("demo", "other"):
        write_explanations(tmp_path / name, Study())
    aggregate(tmp_path)
    shutil.rmtree(tmp_path / "other")
    aggregate(tmp_path)
    assert list(contents(tmp_path / "report" / ".gathered")) == ["demo/digits/block-00000.safetensors"]


@pytest.mark.parametrize("cut", [False, True], ids=["flipped", "cut off"])
def test_a_damaged_block_is_gathered_again(tmp_path: Path, cut: bool) -> None:
    arrays = write_explanations(tmp_path / "demo", Study())
    store, path = open_store(tmp_path), tmp_path / "gathered" / "block-00000.safetensors"
    gather(store, NAMES, path.parent, Reader(), refused)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        if cut:
            path.write_bytes(whole[:place])
        else:
            flip_a_bit(path, place)
        found = gather(store, NAMES, path.parent, Reader(), refused)
        for name in NAMES:
            (values,) = found.column(name)
            np.testing.assert_array_equal(values, arrays[name])
        path.write_bytes(whole)


def test_a_full_disk_is_no_gap_in_the_results(tmp_path: Path) -> None:
    write_explanations(tmp_path / "demo", Study())
    blocked = tmp_path / "report" / ".gathered" / "demo" / "digits"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder belongs")
    with pytest.raises(RunError, match="digits"):
        aggregate(tmp_path)


def test_what_was_gathered_outlives_a_store_that_cannot_be_read_for_once(tmp_path: Path) -> None:
    write_explanations(tmp_path / "demo", Study())
    aggregate(tmp_path)
    record = tmp_path / "demo/ledger/digits/store.json"
    text = record.read_text()
    record.write_text("{")
    aggregate(tmp_path)
    record.write_text(text)
    flip_a_bit(tmp_path / SCORES / "c.1.0")  # would be told if it were read again
    assert told(tmp_path) == []


@pytest.mark.slow
def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(searches=("pgd",), floors=4, metrics=("sparseness", "deletion"), written=(0, 2))
    write_explanations(tmp_path / "demo", study)
    one = aggregate(tmp_path, tmp_path / "one").rows
    monkeypatch.setattr(gathered, "BLOCK_IMAGES", 4)
    several = aggregate(tmp_path, tmp_path / "several").rows
    assert len(list((tmp_path / "several" / ".gathered").rglob("*.safetensors"))) == 2
    pd.testing.assert_frame_equal(one, several, rtol=1e-12)
    for name in ("images.parquet", "image_metrics.parquet"):
        tables = [pd.read_parquet(tmp_path / out / name).sort_values(["method", "image"]) for out in ("one", "several")]
        if "metric" in tables[0]:
            tables = [table.sort_values(["method", "metric", "part", "image"]) for table in tables]
        pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "BLOCK_IMAGES", 256)
    monkeypatch.setattr("maehpc.report.columns.HELD", 64)
    monkeypatch.setattr("maehpc.report.columns._DIGIT", 4)  # tallies, whose number is bounded, are next to nothing
    monkeypatch.setattr("maehpc.report.statistics.RESAMPLED", 100)
    gc.collect()
    gc.freeze()  # so that looking for garbage looks at what is new alone
    peaks = []
    for number in (512, 512, 4096):  # what is made once is made by the first
        study = Study(images=np.zeros((number, 4, 4, 1), np.uint8), shard_images=256)
        place = tmp_path / str(len(peaks))
        write_explanations(place / "demo", study)
        store = open_store(place)
        tracemalloc.start()
        explained = read_explained(store, place / "gathered", Tidy(), refused, lambda shards: tidy())
        assert explained is not None
        rows(explained)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    gc.unfreeze()
    assert (peaks[2] - peaks[1]) / (4096 - 512) < 32  # bytes an image; its scores in float64 are 150


def tidy() -> None:
    """What is in memory for want of a collector's turn is not held."""
    gc.collect()


class Tidy(Reader):
    def read(self, path: Path, name: str) -> NDArray[Any]:
        tidy()
        return super().read(path, name)


def rows(explained: Explained) -> list[dict[str, float]]:
    return [summarise(scores, explained.flipped, np.random.default_rng(0)) for scores in explained.scores.values()]


@pytest.mark.slow
def test_statistics_of_many_blocks_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "BLOCK_IMAGES", 64)
    monkeypatch.setattr("maehpc.report.columns.HELD", 16)
    study = Study(images=np.zeros((700, 4, 4, 1), np.uint8), shard_images=32)
    write_explanations(tmp_path / "demo", study)
    explained = read_explained(open_store(tmp_path), tmp_path / "gathered", Reader(), refused)
    assert explained is not None and len(explained.gathered.blocks) == 11
    row = rows(explained)[0]
    values = explanations(study, 0)["saliency_sensitivity_max"].astype(np.float64)
    assert row["sensitivity_max_median"] == np.median(values)
    assert (row["sensitivity_max_q25"], row["sensitivity_max_q75"]) == tuple(np.quantile(values, [0.25, 0.75]))
    assert row["sensitivity_max_std"] == pytest.approx(values.std(ddof=1), rel=1e-12)
