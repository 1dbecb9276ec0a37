"""Batches written as torchvision keeps them, and ones that mean harm."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from maehpc.data import catalogue, prepare
from maehpc.errors import InputError

FOLDER = "cifar-10-batches-py"


def write_batches(root: Path, count: int = 40, protocol: int = 2) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    (root / FOLDER).mkdir(parents=True)
    batches = {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        batch = {
            "batch_label": name,
            "labels": [int(label) for label in rng.permutation(np.arange(count) % 10)],
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "filenames": [f"{index}.png" for index in range(count)],
        }
        (root / FOLDER / name).write_bytes(pickle.dumps(batch, protocol=protocol))
        batches[name] = batch
    return batches


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAEHPC_DATA", str(tmp_path / "sources"))
    return tmp_path / "sources"


@pytest.mark.parametrize("protocol", range(6))
def test_splits(root: Path, tmp_path: Path, protocol: int):
    batches = write_batches(root, protocol=protocol)
    with prepare("cifar10", 28, tmp_path / "packs") as pack:
        assert pack.path.name == "cifar10-32.h5"
        assert pack.info.counts == {"train": 180, "val": 20, "test": 40}
        assert pack.info.classes == catalogue()["cifar10"].classes
        np.testing.assert_array_equal(np.bincount(pack.labels("val")), np.full(10, 2))
        test = batches["test_batch"]
        np.testing.assert_array_equal(pack.labels("test"), test["labels"])
        # The first image's second row, third column, blue: planes of 1024 in the file, channels last in the pack.
        assert pack.images("test")[0, 1, 2, 2] == test["data"][0, 2 * 1024 + 32 + 2]
        packed = [image.transpose(2, 0, 1).tobytes() for split in ("train", "val") for image in pack.images(split)]
    theirs = [row.tobytes() for name, batch in batches.items() if name != "test_batch" for row in batch["data"]]
    assert sorted(packed) == sorted(theirs)


def test_equal_to_torchvision_s_reader(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_batches(root)
    # Files made here have other checksums than the published ones; torchvision's reading itself is left as it is.
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    theirs = torchvision.datasets.CIFAR10(str(root), train=False)
    with prepare("cifar10", 28, tmp_path / "packs") as pack:
        np.testing.assert_array_equal(pack.images("test"), theirs.data)
        np.testing.assert_array_equal(pack.labels("test"), theirs.targets)


class Harm:
    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("place", ["data", "labels", "filenames"])
def test_a_malicious_batch_runs_nothing(root: Path, tmp_path: Path, place: str):
    batches = write_batches(root)
    flag = tmp_path / "harmed"
    batch = {**batches["data_batch_3"], place: Harm(flag)}
    (root / FOLDER / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(InputError, match=r"data_batch_3 is not a batch of CIFAR-10 \(it names \w+\.mkdir") as caught:
        prepare("cifar10", 28, tmp_path / "packs")
    assert "\n" not in str(caught.value)
    assert not flag.exists()
    pickle.loads((root / FOLDER / "data_batch_3").read_bytes())  # noqa: S301 - shows that the file would have done it
    assert flag.exists()


def python2(value: object) -> bytes:
    """Opcodes by which Python 2's cPickle wrote protocol 2: every str, bytes or not, as a byte string."""
    if isinstance(value, str | bytes):
        data = value.encode("latin1") if isinstance(value, str) else value
        return (b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))) + data
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"u"
    if value is None:
        return b"N"
    assert isinstance(value, np.ndarray)
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + python2("b") + b"tR"
    dtype = b"cnumpy\ndtype\n" + python2((value.dtype.str.lstrip("|"), 0, 1)) + b"R"
    dtype += python2((3, "|", None, None, None, -1, -1, 0)) + b"b"
    state = python2(1) + python2(value.shape) + dtype + python2(np.isfortran(value)) + python2(value.tobytes("A"))
    return made + b"(" + state + b"tb"


@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_python_2(root: Path, tmp_path: Path, order: str):
    batches = write_batches(root)
    with prepare("cifar10", 28, tmp_path / "expected") as pack:
        digest = pack.info.digest
    for name, batch in batches.items():
        written = b"\x80\x02" + python2({**batch, "data": np.array(batch["data"], order=order)}) + b"."
        np.testing.assert_array_equal(pickle.loads(written, encoding="latin1")["data"], batch["data"])  # noqa: S301
        (root / FOLDER / name).write_bytes(written)
    with prepare("cifar10", 28, tmp_path / "packs") as pack:
        assert pack.info.digest == digest


class Forged:
    """What pickles as the call and state given."""

    def __init__(self, *reduced: Any):
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


RECONSTRUCT = np.zeros(1).__reduce__()[0]


def forged(kind: str) -> bytes:
    """Batches that crash a process whose unpickler calls numpy's own functions, or bring Python itself down."""
    if kind == "object pointers":
        plain = Forged(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
        state = (1, (64, 3072), plain, False, b"\x41" * (64 * 3072 * 8))
        return pickle.dumps({"data": Forged(RECONSTRUCT, (np.ndarray, (0,), b"b"), state), "labels": [0] * 64}, 2)
    if kind == "nested key":
        return b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns."
    if kind == "memo":
        return b"\x80\x02}r" + b"\xff" * 4 + b"."
    assert kind == "state of a class"
    return b"\x80\x02cnumpy\nndarray\n}b."


def _read(packs: Path, queue: multiprocessing.SimpleQueue[str]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
    try:
        prepare("cifar10", 28, packs).images("train").tolist()
    except InputError as error:
        queue.put(str(error))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("object pointers", "an array of O8, not uint8"),
        ("nested key", "it uses TUPLE1 beyond what a batch needs"),
        ("memo", "it uses LONG_BINPUT beyond what a batch needs"),
        ("state of a class", "it changes what it names"),
    ],
)
def test_a_forged_batch_cannot_crash_the_process(root: Path, tmp_path: Path, kind: str, sentence: str):
    write_batches(root)
    (root / FOLDER / "data_batch_1").write_bytes(forged(kind))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_read, args=(tmp_path / "packs", queue))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert not queue.empty(), "it was read"
    assert f"data_batch_1 is not a batch of CIFAR-10 ({sentence}" in queue.get()


FORGED_ARRAYS = [
    ((np.ndarray, (0,), b"b"), (1, (2, 3072), np.dtype("u1"), False, b"\0" * 6143), "do not fit its shape"),
    ((np.ndarray, (0,), b"b"), (1, (-2, -3072), np.dtype("u1"), False, b"\0" * 6144), "without a shape"),
    ((np.ndarray, (0,), b"b"), (1, (2, 3072.0), np.dtype("u1"), False, b"\0" * 6144), "without a shape"),
    ((np.ndarray, (0,), b"b"), (1, (2, 3072), "u1", False, b"\0" * 6144), "of an unknown kind"),
    ((np.ndarray, (0,), b"b"), (2, (2, 3072), np.dtype("u1"), False, b"\0" * 6144), "of an unknown kind"),
    ((np.ndarray, (0,), b"b"), (1, (2, 3072), np.dtype("u1"), False, [0] * 6144), "do not fit its shape"),
    ((np.dtype, (0,), b"b"), (1, (2, 3072), np.dtype("u1"), False, b"\0" * 6144), "of a class of its own"),
]


@pytest.mark.parametrize(("arguments", "state", "sentence"), FORGED_ARRAYS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_forged_arrays_are_told(root: Path, tmp_path: Path, arguments, state, sentence: str, protocol: int):
    write_batches(root)
    batch = {"data": Forged(RECONSTRUCT, arguments, state), "labels": [0, 1]}
    (root / FOLDER / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
    with pytest.raises(InputError, match=rf"test_batch is not a batch of CIFAR-10 \(an array .*{sentence}"):
        prepare("cifar10", 28, tmp_path / "packs")


def test_an_array_that_was_never_filled_is_told(root: Path, tmp_path: Path):
    write_batches(root)
    batch = {"data": Forged(RECONSTRUCT, (np.ndarray, (0,), b"b")), "labels": []}
    (root / FOLDER / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(InputError, match="'data' is not uint8"):
        prepare("cifar10", 28, tmp_path / "packs")


FAULTS = [
    ("data", lambda v: v.astype(np.float32), "an array of f4, not uint8"),
    ("data", lambda v: v[:, :3000], r"'data' is not uint8 \[n, 3072\]"),
    ("data", lambda v: v.tolist(), "'data' is not uint8"),
    ("labels", lambda v: v[:-1], "one number an image"),
    ("labels", lambda v: [10, *v[1:]], "0 to 9"),
    ("labels", lambda v: ["1", *v[1:]], "0 to 9"),
    ("labels", lambda v: None, "no 'data' and 'labels'"),
]


@pytest.mark.parametrize(("field", "change", "sentence"), FAULTS)
def test_wrong_batches_are_told(root: Path, tmp_path: Path, field, change, sentence):
    batch = write_batches(root)["test_batch"]
    changed = change(batch.pop(field))
    if changed is not None:
        batch[field] = changed
    (root / FOLDER / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(InputError, match=sentence) as caught:
        prepare("cifar10", 28, tmp_path / "packs")
    assert "test_batch" in str(caught.value)


def test_cut_off_and_absent_batches_are_told(root: Path, tmp_path: Path):
    write_batches(root)
    path = root / FOLDER / "data_batch_5"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="data_batch_5 is not a batch"):
        prepare("cifar10", 28, tmp_path / "packs")
    path.unlink()
    with pytest.raises(InputError, match="data_batch_5 does not exist"):
        prepare("cifar10", 28, tmp_path / "packs")
