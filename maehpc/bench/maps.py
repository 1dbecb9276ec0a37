"""What a store of explanations costs: writing, reading and checking a shard beside numpy and zarr; finding it finished.

Turns of ours and of the peers alternate, each on files that are not there yet, and a ratio is the median over rounds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
import zarr
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from maehpc import files
from maehpc.bench.case import Case, make_subject
from maehpc.bench.figures import Figure, Part, Ratio, Report, figure, surroundings
from maehpc.explain import Explainer
from maehpc.maps import ArrayLayout, MapStore, StoreLayout
from maehpc.maps.layout import SCORES, DType
from maehpc.maps.ledger import Ledger, ShardRecord, file_record
from maehpc.maps.metadata import COMPRESSIONS, Compression
from maehpc.maps.table import packed
from maehpc.ownership import own
from maehpc.progress import Progress
from maehpc.recipes import ExplainSettings
from maehpc.report.gathered import Reader, gather
from maehpc.stages.explanations import stored_arrays

Arrays = dict[str, NDArray[Any]]

METHODS = ("saliency", "gradcam", "deeplift")
MAPS = ("saliency", "deeplift")
"""The arrays of a value a pixel, on which codecs are compared."""
ONE = "saliency"
SHARDS_READ = 3
"""Shards that are read in a turn."""

AGGREGATED = 200
"""Shards whose scores are gathered."""

CODECS: dict[str, Callable[[int], Any]] = {
    "zstd-1": lambda size: Zstd(1),
    "zstd-3": lambda size: Zstd(3),
    "lz4": lambda size: Blosc("lz4", 5, Blosc.NOSHUFFLE, typesize=size),
    "lz4, bytes shuffled": lambda size: Blosc("lz4", 5, Blosc.SHUFFLE, typesize=size),
    "lz4, bits shuffled": lambda size: Blosc("lz4", 5, Blosc.BITSHUFFLE, typesize=size),
    "zstd-1, bits shuffled": lambda size: Blosc("zstd", 1, Blosc.BITSHUFFLE, typesize=size),
}
"""That Zarr's specification knows, by the bytes of a value; images are compressed one by one, by one thread."""


@dataclass(frozen=True)
class Load:
    """What is stored.

    Attributes:
        images: of the finished store.
        shard_images: images a shard.
        image_size: pixels.
        dtype: of maps.
        explained: images that are explained; a shard repeats them.
        repeats: rounds.
    """

    images: int = 1_000_000
    shard_images: int = 256
    image_size: int = 224
    dtype: Literal["float16", "float32"] = "float16"
    explained: int = 16
    repeats: int = 7


def run(progress: Progress, folder: Path, load: Load) -> Report:
    """Measures on the file system of a folder; what is written there is removed.

    Returns:
        A report whose `results` has `write_over_numpy`, `write_over_numpy_each_array`,
        `write_over_numpy_one_array`, `write_over_zarr`,
        `write_bytes_per_second`, `compression`, `compression_ratio`, `compressions`, `codecs`,
        `read_bytes_per_second`, `read_over_raw`, `deep_over_raw`, `aggregate_over_raw` (files not in memory),
        `aggregate_over_raw_cached`, `aggregate_images_per_second`, `aggregate_again_images_per_second`, `resume_s`,
        `files`, `files_a_shard`, `files_beside_shards`, `shards`, `arrays`, `shard_bytes` and `load`.
    """
    around = surroundings(torch.device("cpu"))
    files.make_folder(folder)
    with TemporaryDirectory(prefix=".maps-", dir=folder) as scratch, progress.bar("maps", 6, images=0) as bar:
        root = Path(scratch)
        arrays = explained_shard(load)
        bar.advance()
        parts: list[Part] = []
        results: dict[str, Any] = {}
        for measure in (write_part, codec_part, read_part, aggregate_part, resume_part):
            part, found = measure(root, arrays, load)
            parts.append(part)
            results |= found
            bar.advance()
    return Report("maps", around, tuple(parts), {**results, "load": asdict(load)})


def explained_shard(load: Load) -> Arrays:
    """A shard's arrays as the explain stage makes them, of photographs that scikit-learn brings."""
    from sklearn.datasets import load_sample_images

    subject = make_subject(Case(image_size=load.image_size, images=load.explained, samples=2))
    photos = load_sample_images().images
    side, draw = load.image_size, np.random.default_rng(0)
    crops = []
    for index in range(load.explained):
        photo = photos[index % len(photos)]
        y, x = (int(draw.integers(0, extent - side + 1)) for extent in photo.shape[:2])
        crops.append(torch.from_numpy(photo[y : y + side, x : x + side].copy()).permute(2, 0, 1) / 255)
    subject = replace(subject, pixels=torch.stack(crops))
    settings = ExplainSettings.model_validate(
        {"methods": METHODS, "sensitivity": {"samples": 2}, "noise_floor_images": 1, "maps": {"dtype": load.dtype}}
    )
    explainer = Explainer(subject.classifier, settings, subject.preprocess, subject.key)
    labels = torch.zeros(load.explained, dtype=torch.int64)
    tensors = stored_arrays(explainer.explain(subject.pixels, subject.indices, labels), labels)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    arrays["pixels"] = (subject.pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    repeated = np.arange(load.shard_images) % load.explained
    return {name: np.ascontiguousarray(array[repeated]) for name, array in arrays.items()}


def layout_of(arrays: Mapping[str, NDArray[Any]], images: int, shard_images: int) -> StoreLayout:
    """A store of such arrays; each has dimensions of its own."""
    layouts = {
        name: ArrayLayout(
            tuple(f"{name}_{axis}" for axis in range(1, array.ndim)),
            array.shape[1:],
            cast(DType, array.dtype.name),
        )
        for name, array in arrays.items()
    }
    return StoreLayout(images, shard_images, layouts, {})


def stored_of(arrays: Arrays) -> Arrays:
    """A shard's arrays as they are on the disk: maps, and one table of scores."""
    layout = layout_of(arrays, len(arrays[ONE]), len(arrays[ONE]))
    maps = {name: array for name, array in arrays.items() if layout.arrays[name].is_map}
    return {**maps, SCORES: packed(layout, arrays)}


def write_part(root: Path, arrays: Arrays, load: Load) -> tuple[Part, dict[str, Any]]:
    """Writes shards: ours, whole and recorded; `np.save` and fsync of each array; zarr's own way with its defaults.

    All three write as many files, of which one holds the scores; numpy also a file a score.
    """
    stored, single = stored_of(arrays), {ONE: arrays[ONE]}
    size = sum(array.nbytes for array in stored.values())
    with ExitStack() as until_end:

        def begun(place: str, content: Arrays, compression: Compression) -> _Ours:
            return _Ours(until_end.enter_context(_store(root / place, content, load, compression)), content)

        ours: dict[str, _Ours] = {name: begun(name, arrays, name) for name in COMPRESSIONS}
        turns: dict[str, _Turn] = {
            "numpy": _Peer(root / "numpy", stored, _numpy),
            **ours,
            "zarr": _Peer(root / "zarr", stored, _zarr),
            "numpy, each": _Peer(root / "each", arrays, _numpy),
            "numpy, one": _Peer(root / "numpy", single, _numpy),
            "one": begun("one", single, COMPRESSIONS[0]),
        }
        times: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(load.repeats + 1):
            for name in [*turns] if turn % 2 else reversed(turns):
                seconds = _seconds(partial(turns[name].write, turn))
                turns[name].drop(turn)  # at once: the next one's pages then come from as warm a memory
                times[name] += [seconds] if turn else []  # the first warms up
    ratios = {name: size / turn.stored for name, turn in ours.items()}
    first, *others = COMPRESSIONS
    over = {name: _over(times["numpy"], times[name]) for name in COMPRESSIONS}
    each = _over(times["numpy, each"], times[first])
    one = _over(times["numpy, one"], times["one"])
    results = {
        "write_over_numpy": over[first],
        "write_over_numpy_each_array": each,
        "write_over_numpy_one_array": one,
        "write_over_zarr": _over(times["zarr"], times[first]),
        "write_bytes_per_second": size / statistics.median(times[first]),
        "compression": first,
        "compression_ratio": ratios[first],
        "compressions": {name: {"ratio": ratios[name], "write_over_numpy": over[name]} for name in COMPRESSIONS},
        "shard_bytes": size,
    }
    figures = (
        _rate("shard written", size, times[first]),
        *(_rate(f"shard written, {name}", size, times[name]) for name in others),
        _rate("np.save and fsync", size, times["numpy"]),
        _rate("zarr's defaults, no fsync", size, times["zarr"]),
        _rate("shard of one array written", arrays[ONE].nbytes, times["one"]),
        _rate("np.save and fsync of it", arrays[ONE].nbytes, times["numpy, one"]),
    )
    told = (
        Ratio("write over numpy", over[first], "1 is the rate of np.save and fsync of as few files"),
        Ratio("write over numpy, each array", each, "the same for a file a score, which we put into one"),
        *(Ratio(f"write over numpy, {name}", over[name], f"{ratios[name]:.3g} times smaller") for name in others),
        Ratio("write over numpy, one array", one, "the same for a shard of one array"),
    )
    conditions = f"shards of {load.shard_images} images, {len(stored)} files, {size / 1e6:.0f} MB"
    return Part("write", conditions, figures, told), results


def codec_part(root: Path, arrays: Arrays, load: Load) -> tuple[Part, dict[str, Any]]:
    """Compresses maps and images one by one: how much smaller they become, and how fast."""
    found: dict[str, Any] = {}
    figures: list[Figure] = []
    for kind, names in {"maps": MAPS, "pixels": ("pixels",)}.items():
        chunks = [image for name in names for image in arrays[name][: load.explained]]
        size = sum(chunk.nbytes for chunk in chunks)
        for codec_name, make in CODECS.items():
            ratio, write, read = _codec_times(make(chunks[0].itemsize), chunks, load.repeats)
            figures.append(figure(f"{codec_name} on {kind}", "times smaller", [ratio]))
            figures += [_rate("  compressed", size, write), _rate("  decompressed", size, read)]
            found.setdefault(codec_name, {})[kind] = {
                "ratio": ratio,
                "write_bytes_per_second": size / statistics.median(write),
                "read_bytes_per_second": size / statistics.median(read),
            }
    return Part("codecs", "one thread, an image at a time", tuple(figures)), {"codecs": found}


def read_part(root: Path, arrays: Arrays, load: Load) -> tuple[Part, dict[str, Any]]:
    """Reads shards: every array checked and decoded; every byte checked; every byte read."""
    shards = range(min(SHARDS_READ, load.repeats))
    with _store(root / "read", arrays, load, COMPRESSIONS[0]) as store:
        for shard in shards:
            store.write_shard(shard, arrays)
    paths = [store.path / name for shard in shards for name in store.layout.shard_files(shard)]
    size = sum(path.stat().st_size for path in paths)
    ours, deep, raw = [], [], []
    for _ in range(load.repeats):
        raw.append(_seconds(lambda: [path.read_bytes() for path in paths]))
        ours.append(_seconds(lambda: [store.read_arrays(arrays, shard) for shard in shards]))
        deep.append(_seconds(partial(store.damaged, shards)))
    results = {
        "read_bytes_per_second": size / statistics.median(ours),
        "read_over_raw": _over(raw, ours),
        "deep_over_raw": _over(raw, deep),
    }
    figures = (
        _rate("arrays read and checked", size, ours),
        _rate("every byte checked", size, deep),
        _rate("files read", size, raw),
    )
    told = (
        Ratio("read over raw", results["read_over_raw"], "1 is the rate of reading the files, which memory keeps"),
        Ratio("check over raw", results["deep_over_raw"], "what explain does before it goes on with a store"),
    )
    return Part("read", f"{len(shards)} shards, {size / 1e6:.0f} MB", figures, told), results


def aggregate_part(root: Path, arrays: Arrays, load: Load) -> tuple[Part, dict[str, Any]]:
    """Gathers the scores of shards for a report, beside reading their files one after the other, as they are."""
    arrays = {name: array[:, :1, :1] if array.ndim > 2 else array for name, array in arrays.items()}  # maps stay unread
    for name in [name for name in arrays if name.endswith("_sensitivity") or name == "flipped"]:
        arrays[name] = np.tile(arrays[name], (1, ExplainSettings().sensitivity.samples // arrays[name].shape[1]))
    scores = [name for name, array in arrays.items() if array.ndim < 3]
    count = AGGREGATED if load.images >= AGGREGATED * load.shard_images else 2 * load.repeats
    layout = layout_of(arrays, count * load.shard_images, load.shard_images)
    with own(root / "scores-ledger") as owner:
        store = MapStore.create(root / "scores", root / "scores-ledger", layout, {}, owner)
        for shard in range(count):
            store.write_shard(shard, arrays)
    records = sorted((root / "scores-ledger").glob("shard-*"))
    paths = [*records, *(store.path / layout.shard_file(scores[0], shard) for shard in range(count))]
    place = root / "gathered"
    os.sync()  # what earlier parts wrote is not to be written meanwhile
    raw: dict[str, list[float]] = {"cold": [], "cached": []}
    ours: dict[str, list[float]] = {"cold": [], "cached": []}
    again = []
    for _ in range(load.repeats):
        for state in raw:
            if state == "cold":
                _forget(paths)
            raw[state].append(_seconds(lambda: [path.read_bytes() for path in paths]))
            shutil.rmtree(place, ignore_errors=True)
            if state == "cold":
                _forget(paths)
            ours[state].append(_seconds(lambda: gather(store, scores, place, Reader(), _refuse)))
        again.append(_seconds(lambda: gather(store, scores, place, Reader(), _refuse)))
    images = layout.images
    results = {
        "aggregate_over_raw": _over(raw["cold"], ours["cold"]),
        "aggregate_over_raw_cached": _over(raw["cached"], ours["cached"]),
        "aggregate_images_per_second": images / statistics.median(ours["cold"]),
        "aggregate_again_images_per_second": images / statistics.median(again),
    }
    figures = (
        figure("scores gathered", "images/s", [images / seconds for seconds in ours["cold"]]),
        figure("scores gathered, files in memory", "images/s", [images / seconds for seconds in ours["cached"]]),
        figure("nothing new", "images/s", [images / seconds for seconds in again]),
        figure("files read", "images/s", [images / seconds for seconds in raw["cold"]]),
    )
    told = (
        Ratio("aggregate over raw", results["aggregate_over_raw"], "1 is the rate of reading the same files from disk"),
        Ratio("the same, files in memory", results["aggregate_over_raw_cached"], "what checking and decoding costs"),
    )
    size = sum(path.stat().st_size for path in paths)
    conditions = f"{images} images, {count} records and {count} tables of scores, {size / 1e6:.0f} MB"
    return Part("aggregate", conditions, figures, told), results


def _forget(paths: Sequence[Path]) -> None:
    """Takes files out of the system's memory, as far as it lets go of them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _refuse(sentence: str) -> None:
    raise AssertionError(sentence)


def resume_part(root: Path, arrays: Arrays, load: Load) -> tuple[Part, dict[str, Any]]:
    """Takes up a store of many images that is finished: its records are real, its shards a few bytes each."""
    place, layout = root / "finished", layout_of(arrays, load.images, load.shard_images)
    finished_store(place, layout)
    times = []
    for _ in range(load.repeats):
        begun = time.perf_counter()
        with own(place / "ledger") as owner:
            missing = MapStore.create(place / "maps", place / "ledger", layout, {}, owner).missing()
        times.append(time.perf_counter() - begun)
        assert not missing, "the store is finished"
    count = sum(len(names) for _, _, names in os.walk(place / "maps"))
    told = figure("found finished", "s", times)
    results = {
        "resume_s": told.median,
        "files": count,
        "files_beside_shards": count - layout.shards * len(layout.stored),
        "shards": layout.shards,
        "files_a_shard": len(layout.stored),
        "arrays": len(arrays),
    }
    figures = (told, figure("files", "", [count]))
    return Part("resume", f"{load.images} images in {layout.shards} shards", figures), results


def finished_store(root: Path, layout: StoreLayout) -> None:
    """A store that is finished by its records, in `root`/maps and `root`/ledger; nothing is flushed."""
    data = bytes(64)
    record, book = file_record(data), Ledger(root / "ledger")
    with own(root / "ledger") as owner:
        store = MapStore.create(root / "maps", root / "ledger", layout, {}, owner)
        for shard in range(layout.shards):
            names = layout.shard_files(shard)
            for name in names:
                (root / "maps" / name).write_bytes(data)
            written = ShardRecord(
                shard=shard,
                images=layout.span(shard),
                files=dict.fromkeys(names, record),
                digest=store.digest,
                attempt=owner.attempt,
            )
            book.shard_path(shard).write_bytes(files.canonical_json(written.model_dump(mode="json")))


@contextmanager
def _store(root: Path, arrays: Arrays, load: Load, compression: Compression) -> Iterator[MapStore]:
    layout = layout_of(arrays, (load.repeats + 1) * load.shard_images, load.shard_images)
    with own(root / "ledger") as owner:
        yield MapStore.create(root / "maps", root / "ledger", layout, {}, owner, compression)


def _codec_times(codec: Any, chunks: list[NDArray[Any]], repeats: int) -> tuple[float, list[float], list[float]]:
    """Bytes to those compressed; seconds of compressing and of decompressing, a round."""
    encoded = [codec.encode(chunk) for chunk in chunks]
    write = [_seconds(lambda: [codec.encode(chunk) for chunk in chunks]) for _ in range(repeats)]
    read = [_seconds(lambda: [codec.decode(one) for one in encoded]) for _ in range(repeats)]
    return sum(chunk.nbytes for chunk in chunks) / sum(map(len, encoded)), write, read


class _Turn(Protocol):
    """Writes a shard, and removes what it wrote."""

    stored: int

    def write(self, turn: int) -> None: ...

    def drop(self, turn: int) -> None: ...


class _Ours:
    """A shard of a store, whole and recorded; `stored` is the size of its files."""

    def __init__(self, store: MapStore, arrays: Arrays) -> None:
        self._store, self._arrays, self.stored = store, arrays, 0

    def write(self, turn: int) -> None:
        self._store.write_shard(turn, self._arrays)

    def drop(self, turn: int) -> None:
        paths = [self._store.path / name for name in self._store.layout.shard_files(turn)]
        self.stored = sum(path.stat().st_size for path in paths)
        for path in paths:
            path.unlink()


class _Peer:
    """A folder that is written."""

    stored = 0

    def __init__(self, folder: Path, arrays: Arrays, save: Callable[[Path, Arrays], None]) -> None:
        self._folder, self._arrays, self._save = folder, arrays, save

    def write(self, turn: int) -> None:
        self._save(self._folder, self._arrays)

    def drop(self, turn: int) -> None:
        shutil.rmtree(self._folder)


def _numpy(folder: Path, arrays: Arrays) -> None:
    folder.mkdir()
    for name, array in arrays.items():
        with (folder / f"{name}.npy").open("wb") as handle:
            np.save(handle, array)
            handle.flush()
            os.fsync(handle.fileno())


def _zarr(folder: Path, arrays: Arrays) -> None:
    group = zarr.create_group(folder, zarr_format=3)
    for name, array in arrays.items():
        chunks = (1 if array.ndim > 2 else len(array), *array.shape[1:])
        group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks, shards=array.shape)[...] = array


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _over(peer: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of the peer's seconds to ours: how many times the peer's rate ours is."""
    return statistics.median(a / b for a, b in zip(peer, ours, strict=True))


def _rate(name: str, size: int, seconds: Sequence[float]) -> Figure:
    return figure(name, "MB/s", [size / 1e6 / one for one in seconds])
