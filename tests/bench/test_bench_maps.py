"""The benchmark of stores: it measures real maps and real stores, and leaves nothing behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maehpc.bench.maps import METHODS, Load, explained_shard, finished_store, layout_of, run, stored_of
from maehpc.cli.main import main
from maehpc.maps import MapStore, verify
from maehpc.maps.metadata import COMPRESSIONS
from maehpc.progress import Silent

SMALL = Load(images=100, shard_images=8, image_size=32, explained=4, repeats=2)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return explained_shard(SMALL)


def test_a_shard_is_of_real_maps_of_images(arrays: dict[str, np.ndarray]) -> None:
    assert {array.shape[0] for array in arrays.values()} == {8}
    assert arrays["pixels"].shape == (8, 32, 32, 3) and arrays["pixels"].dtype == np.uint8
    assert (arrays["pixels"][0] == arrays["pixels"][4]).all() and arrays["pixels"][0].std() > 5
    for method in METHODS:
        assert arrays[method].dtype == np.float16 and np.isfinite(arrays[method]).all()
        assert (arrays[method][:4].reshape(4, -1).std(1) > 0).all()
        assert (arrays[f"{method}_sensitivity"] > 0).all()


def test_the_finished_store_is_finished(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    layout = layout_of(arrays, 100, 8)
    finished_store(tmp_path, layout)
    store = MapStore.open(tmp_path / "maps", tmp_path / "ledger")
    assert layout.shards == 13 and store.missing(deep=True) == []
    assert verify(tmp_path / "maps", tmp_path / "ledger") == []
    (tmp_path / "maps" / layout.shard_file("saliency", 12)).unlink()
    assert store.missing() == [12]


def test_the_report_has_its_keys_and_nothing_stays(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    record = run(Silent(), tmp_path, SMALL).as_json()
    assert list(tmp_path.iterdir()) == []
    size = sum(array.nbytes for array in stored_of(arrays).values())
    assert record["shard_bytes"] == size and record["arrays"] == len(arrays) and record["shards"] == 13
    assert record["files_a_shard"] == 5  # of three methods, of the pixels, of the scores
    assert record["files"] == 13 * 5 + record["files_beside_shards"]
    assert record["files_beside_shards"] == 1 + 2 * 2 + 5  # the group, two coordinates' two, a description an array
    rates = ["write_bytes_per_second", "read_bytes_per_second", "read_over_raw", "deep_over_raw", "resume_s"]
    ratios = ["write_over_numpy", "write_over_numpy_each_array", "write_over_numpy_one_array", "write_over_zarr"]
    ratios += ["aggregate_over_raw", "aggregate_over_raw_cached"]
    rates += ["aggregate_images_per_second", "aggregate_again_images_per_second"]
    assert all(record[key] > 0 for key in rates + ratios)
    assert record["compression"] == COMPRESSIONS[0] and list(record["compressions"]) == list(COMPRESSIONS)
    assert record["compression_ratio"] == record["compressions"][COMPRESSIONS[0]]["ratio"] <= 1
    assert record["compressions"]["lz4"]["ratio"] > record["compression_ratio"]
    assert record["codecs"]["lz4, bits shuffled"]["maps"]["ratio"] > 1
    assert record["load"]["images"] == 100 and "cores" in record["machine"]
    json.dumps(record, allow_nan=False)


def test_the_command_writes_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    sizes = ["--images", "50", "--shard-images", "8", "--image-size", "32"]
    results = str(tmp_path / "results")
    words = ["maehpc", "bench", "maps", "--quick", *sizes, "--json", "-q", "--results", results]
    monkeypatch.setattr(sys, "argv", words)
    main()
    [path] = (tmp_path / "results/benchmarks").iterdir()
    assert json.loads(path.read_text()) == json.loads(capsys.readouterr().out)
    sys.argv[3:] = ["--image-size", "40", "--results", str(tmp_path / "no")]
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and not (tmp_path / "no").exists()
