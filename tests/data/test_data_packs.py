from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maehpc.data import Pack, SplitName, prepare, require
from maehpc.data import blocks as blocks_module
from maehpc.data.pack import FORMAT
from maehpc.data.packing import write_pack
from maehpc.data.sources import RawSplits
from maehpc.data.sources.raw import Images, in_memory
from maehpc.errors import InputError, RunError


def raw_splits(shape=(6, 5, 3), counts=(30, 6, 9), classes=3, labels=None, seed=0, **changes) -> RawSplits:
    rng = np.random.default_rng(seed)
    splits = dict(zip(("train", "val", "test"), counts, strict=True))
    images = {split: rng.integers(0, 256, (count, *shape), dtype=np.uint8) for split, count in splits.items()}
    fields = {
        "name": "toy",
        "title": "Toy Ä",
        "task": "multi-class",
        "classes": tuple(f"klasse {index} ß" for index in range(classes)),
        "labels": labels or {split: np.arange(count, dtype=np.int64) % classes for split, count in splits.items()},
        "images": lambda split: in_memory(images[split]),
        "description": "drawn by a test",
    }
    return RawSplits(**{**fields, **changes})


def pixels(raw: RawSplits, split: SplitName) -> Images:
    return np.concatenate(list(raw.images(split).blocks))


def naive_digest(raw: RawSplits) -> str:
    whole = b""
    for split in ("train", "val", "test"):
        for name, array in (("images", pixels(raw, split)), ("labels", raw.labels[split])):
            shape = ",".join(str(side) for side in array.shape)
            whole += f"{split}/{name} {shape} {array.dtype.str}\n".encode() + array.tobytes()
    return hashlib.sha256(whole).hexdigest()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])),
    counts=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    block=st.integers(1, 2000),
)
def test_round_trip_of_any_shape(tmp_path: Path, monkeypatch, shape, counts, block):
    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK_BYTES", block)
        raw = raw_splits(shape, counts)
        path = tmp_path / "toy.h5"
        write_pack(path, raw)
        with Pack(path) as pack:
            pack.verify()
            assert pack.info.digest == naive_digest(raw)
            assert pack.info.shape == shape
            assert (pack.info.name, pack.info.title, pack.info.task) == ("toy", "Toy Ä", "multi-class")
            assert pack.info.classes == raw.classes
            assert (pack.info.source, pack.info.fingerprint) == ("drawn by a test", None)
            for split in ("train", "val", "test"):
                np.testing.assert_array_equal(pack.images(split), pixels(raw, split))
                np.testing.assert_array_equal(pack.labels(split), raw.labels[split])
            train = pixels(raw, "train").astype(np.float64) / 255
            np.testing.assert_allclose(pack.info.mean, train.mean(axis=(0, 1, 2)), rtol=1e-12)
            np.testing.assert_allclose(pack.info.std, train.std(axis=(0, 1, 2)), rtol=1e-9, atol=1e-12)
            grey = train.mean(axis=3)
            np.testing.assert_allclose(pack.info.grey_mean, grey.mean(), rtol=1e-12)
            np.testing.assert_allclose(pack.info.grey_std, grey.std(), rtol=1e-9, atol=1e-12)


def test_one_image_is_one_chunk_of_uint8(tmp_path: Path):
    write_pack(tmp_path / "toy.h5", raw_splits())
    with h5py.File(tmp_path / "toy.h5") as handle:
        for split in ("train", "val", "test"):
            assert handle[split]["images"].chunks == (1, 6, 5, 3)
            assert handle[split]["images"].dtype == np.uint8
            assert handle[split]["labels"].dtype == np.int64
            assert handle[split]["images"].fletcher32 and handle[split]["labels"].fletcher32


def test_images_come_in_the_order_asked_for(tmp_path: Path):
    raw = raw_splits()
    write_pack(tmp_path / "toy.h5", raw)
    with Pack(tmp_path / "toy.h5") as pack:
        indices = np.array([7, 3, 29, 3, 0])
        np.testing.assert_array_equal(pack.images("train", indices), pixels(raw, "train")[indices])
        np.testing.assert_array_equal(pack.images("train", slice(4, 9)), pixels(raw, "train")[4:9])
        assert pack.images("train", np.array([], dtype=np.int64)).shape == (0, 6, 5, 3)
        for outside in (-1, 30):
            with pytest.raises(IndexError, match="train holds images 0 to 29"):
                pack.images("train", np.array([0, outside]))


def test_equal_data_give_equal_bytes(tmp_path: Path):
    write_pack(tmp_path / "a.h5", raw_splits())
    write_pack(tmp_path / "b.h5", raw_splits())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_multi_label(tmp_path: Path):
    labels = {split: np.eye(4, dtype=np.int64)[: n % 5 or 1] for split, n in (("train", 4), ("val", 3), ("test", 2))}
    counts = tuple(len(values) for values in labels.values())
    write_pack(tmp_path / "toy.h5", raw_splits(counts=counts, classes=4, labels=labels, task="multi-label"))
    np.testing.assert_array_equal(Pack(tmp_path / "toy.h5").labels("train"), labels["train"])


@pytest.mark.parametrize(
    ("labels", "task", "sentence"),
    [
        ([0, 1, 3], "multi-class", "train holds a label outside 0 to 2"),
        ([0, 1], "multi-class", "train has 3 images but 2 labels"),
        ([[0, 1], [1, 1], [0, 0]], "multi-label", "train has 2 label columns, not 3"),
        ([[0, 1, 2], [1, 1, 0], [0, 0, 0]], "multi-label", "train holds a label outside 0 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_told(tmp_path: Path, labels, task, sentence):
    array = np.array(labels, dtype=np.int64)
    raw = raw_splits(counts=(3, 3, 3), labels=dict.fromkeys(("train", "val", "test"), array), task=task)
    with pytest.raises(InputError, match=sentence):
        write_pack(tmp_path / "toy.h5", raw)
    assert list(tmp_path.glob("**/*.h5*")) == []


def test_every_flipped_byte_is_noticed_or_changes_nothing(tmp_path: Path):
    path = tmp_path / "toy.h5"
    raw = raw_splits(shape=(4, 4, 1), counts=(6, 2, 2))
    write_pack(path, raw)
    whole = Pack(path)
    info, data = whole.info, path.read_bytes()
    whole.close()
    told = 0
    offsets = random.Random(0).sample(range(len(data)), 400)
    for offset in offsets:
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x04]) + data[offset + 1 :])
        try:
            with Pack(path) as pack:
                assert (pack.info, len(pack.info.classes)) == (info, 3)
                for split in ("train", "val", "test"):
                    np.testing.assert_array_equal(pack.images(split), pixels(raw, split))
                    np.testing.assert_array_equal(pack.labels(split), raw.labels[split])
        except InputError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            told += 1
    assert told > 20


@pytest.mark.parametrize("streamed", [False, True])
def test_a_flipped_byte_of_any_image_or_label_cannot_be_read(tmp_path: Path, streamed: bool):
    path = tmp_path / "toy.h5"
    raw = raw_splits(shape=(5, 3, 1), counts=(6, 2, 2))
    write_pack(path, raw)
    data = path.read_bytes()
    images, labels = pixels(raw, "train")[4].tobytes(), raw.labels["train"].tobytes()
    for found, chunk in ((data.index(images), images), (data.index(labels), labels)):
        for offset in range(found, found + len(chunk)):
            path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x20]) + data[offset + 1 :])
            with (
                Pack(path) as pack,
                pytest.raises(InputError, match=r"toy.h5 is no whole pack .*filter returned failure"),
            ):
                if chunk is labels:
                    pack.labels("train")
                else:
                    pack.images("train", np.array([4]) if streamed else None)


def test_a_changed_image_and_a_changed_label_fail_verification(tmp_path: Path):
    for name, index in (("images", (3, 1, 1, 0)), ("labels", 5)):
        path = tmp_path / f"{name}.h5"
        write_pack(path, raw_splits())
        with h5py.File(path, "r+") as handle:
            handle["train"][name][index] = (int(handle["train"][name][index]) + 1) % 3
        with pytest.raises(InputError, match=rf"{name}.h5 does not match its digest: .*delete it"):
            Pack(path).verify()


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_pack_is_told(tmp_path: Path, part: float):
    path = tmp_path / "toy.h5"
    write_pack(path, raw_splits())
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(InputError, match=r"toy.h5 is no whole pack .*; delete it and run the command again") as caught:
        Pack(path).verify()
    assert "\n" not in str(caught.value)


def test_other_files_are_told(tmp_path: Path):
    path = tmp_path / "other.h5"
    with pytest.raises(InputError, match="does not exist"):
        Pack(path)
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="no whole pack"):
        Pack(path)
    with h5py.File(path, "w") as handle:
        handle["x"] = 1
    with pytest.raises(InputError, match="format None, not 2"):
        Pack(path)
    write_pack(path, raw_splits())
    with h5py.File(path, "r+") as handle:
        del handle["val"]["labels"]
    with pytest.raises(InputError, match="no whole pack"):
        Pack(path)


def _read_some(pack: Pack, queue: multiprocessing.Queue) -> None:
    images = pack.images("train", np.array([5, 2]))
    queue.put((images, pack._process == os.getpid()))


def test_a_pack_may_be_forked_and_pickled(tmp_path: Path):
    write_pack(tmp_path / "toy.h5", raw_splits())
    with Pack(tmp_path / "toy.h5") as pack:
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_read_some, args=(pack, queue))
        child.start()
        expected = pack.images("train", np.array([5, 2]))
        images, opened_anew = queue.get(timeout=60)
        np.testing.assert_array_equal(images, expected)
        assert opened_anew, "HDF5 does not promise that a file opened before a fork can be read after it"
        child.join()
        again = pickle.loads(pickle.dumps(pack))  # noqa: S301 - bytes of this test's own making
        assert again.info == pack.info
        np.testing.assert_array_equal(again.images("train", np.array([5, 2])), expected)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_told(arrays, save_npz, tmp_path: Path):
    source = save_npz(arrays)
    pack = prepare(str(source), 28, tmp_path / "packs")
    pack.close()
    source.chmod(0)
    with pytest.raises(RunError, match=r"cannot read .*own.npz: permission is denied"):
        prepare(str(source), 28, tmp_path / "packs")
    source.chmod(0o600)
    pack.path.chmod(0)
    with pytest.raises(InputError, match=r"cannot read .*own-npz.h5: permission is denied"):
        prepare(str(source), 28, tmp_path / "packs")


def test_a_changed_source_is_packed_again(arrays, save_npz, tmp_path: Path):
    packs = tmp_path / "packs"
    source = save_npz(arrays)
    first = prepare(str(source), 28, packs)
    inode = first.path.stat().st_ino
    assert prepare(str(source), 28, packs).path.stat().st_ino == inode, "not written twice"
    arrays["train_images"][0, 0, 0, 0] ^= 1
    save_npz(arrays)
    second = prepare(str(source), 28, packs)
    assert second.info.digest != first.info.digest
    # The older pack stays readable for whoever still has it open, but is never taken for the one that replaced it.
    first.verify()
    first.close()
    with pytest.raises(InputError, match=r"own-npz.h5 was packed anew from other images"):
        first.labels("train")


def image_folder(root: Path, value: int) -> Path:
    for label in "ab":
        for index in range(5):
            (root / label).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), value + index).save(root / label / f"{index}.png")
    return root


def test_a_path_that_does_not_exist_is_never_served_by_a_pack_of_its_name(arrays, save_npz, tmp_path: Path):
    packs = tmp_path / "packs"
    file, folder = save_npz(arrays), image_folder(tmp_path / "scans", 10)
    for source, absent in ((file, tmp_path / "elsewhere" / "own.npz"), (folder, tmp_path / "elsewhere" / "scans")):
        pack = prepare(str(source), 28, packs)
        before = pack.path.read_bytes()
        with pytest.raises(InputError, match=rf"{absent} does not exist"):
            prepare(str(absent), 28, packs)
        source.rename(source.with_name(f"unmounted-{source.name}"))
        with pytest.raises(InputError, match=rf"{source} does not exist"):
            prepare(str(source), 28, packs)
        assert pack.path.read_bytes() == before


def test_what_is_neither_packed_nor_there_is_refused_as_packing_it_would_be(
    arrays, save_npz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MAEHPC_DATA", raising=False)
    packs = tmp_path / "packs"
    file, folder = save_npz(arrays), image_folder(tmp_path / "scans", 10)
    there = ["digits", str(file), str(folder)]
    absent = ["nosuchset", "nosuch.npz", "no/such", "cifar10", "pathmnist"]
    for packed in (False, True):
        for dataset in there:
            require(dataset, 28, packs)
        for dataset in absent:
            with pytest.raises(InputError) as refused:
                prepare(dataset, 28, packs)
            with pytest.raises(InputError, match=f"^{re.escape(str(refused.value))}$"):
                require(dataset, 28, packs)
        if not packed:
            assert not packs.exists()
            for dataset in there:
                prepare(dataset, 28, packs).close()
    file.unlink()
    folder.rename(tmp_path / "unmounted")
    for path in (file, folder):  # their packs are there, and do not serve without them
        with pytest.raises(InputError, match=rf"^{path} does not exist"):
            require(str(path), 28, packs)
    (packs / "pathmnist-28.h5").touch()  # whose pack serves without the file, and is looked at when it is opened
    require("pathmnist", 28, packs)
    with pytest.raises(InputError, match=r"pathmnist_64\.npz"):
        require("pathmnist", 64, packs)


def test_paths_of_one_name_never_serve_each_other_s_pack(arrays, save_npz, tmp_path: Path):
    packs = tmp_path / "packs"
    (tmp_path / "b").mkdir()
    files = {save_npz(arrays): arrays["test_images"].copy()}
    arrays["test_images"] = 255 - arrays["test_images"]
    files[save_npz(arrays, "b/own.npz")] = arrays["test_images"]
    folders = {image_folder(tmp_path / name / "scans", value): value for name, value in (("a", 10), ("b", 100))}
    for _ in range(2):
        for path, expected in files.items():
            with prepare(str(path), 28, packs) as pack:
                np.testing.assert_array_equal(pack.images("test"), expected)
        for path, value in folders.items():
            with prepare(str(path), 28, packs) as pack:
                assert value <= pack.images("test").min() <= pack.images("test").max() < value + 5


def test_a_user_s_pack_is_never_served_as_a_catalogue_set(arrays, save_npz, tmp_path: Path):
    packs = tmp_path / "packs"
    with prepare(str(save_npz(arrays, "digits-8.npz")), 28, packs) as own:
        pass
    with prepare("digits", 28, packs) as digits:
        assert (digits.info.name, digits.path != own.path) == ("digits", True)
    for name in ("digits-8", "retinamnist-28"):
        shutil.copy(own.path, packs / f"{name}.h5")
    with prepare("digits", 28, packs) as again:
        assert again.info == digits.info
    with pytest.raises(InputError, match=r"retinamnist needs retinamnist.npz, which was not found"):
        prepare("retinamnist", 28, packs)


def set_format(path: Path, number: int) -> None:
    with h5py.File(path, "r+") as handle:
        handle.attrs["format"] = number


def test_a_pack_of_an_older_format_is_packed_again_where_its_source_is(arrays, save_npz, tmp_path: Path):
    packs = tmp_path / "packs"
    for dataset in ("digits", str(save_npz(arrays))):
        pack = prepare(dataset, 28, packs)
        pack.close()
        set_format(pack.path, FORMAT - 1)
        with prepare(dataset, 28, packs) as again:
            assert again.info == pack.info
            again.verify()
        set_format(pack.path, FORMAT + 1)
        with pytest.raises(InputError, match=rf"h5 has pack format {FORMAT + 1}, not {FORMAT}; delete it"):
            prepare(dataset, 28, packs)
    lost = packs / "retinamnist-28.h5"
    shutil.copy(pack.path, lost)
    set_format(lost, FORMAT - 1)
    with pytest.raises(
        InputError, match=rf"format {FORMAT - 1}, not {FORMAT}; run `maehpc data pack` where its source"
    ):
        prepare("retinamnist", 28, packs)
    assert lost.is_file()


@pytest.mark.slow
def test_a_killed_packing_leaves_nothing_half_made(tmp_path: Path):
    path = tmp_path / "packs" / "big.h5"
    raw = raw_splits(shape=(64, 64, 3), counts=(2000, 10, 10))
    rng = random.Random(0)
    start = time.perf_counter()
    write_pack(path, raw)
    duration = time.perf_counter() - start
    expected = path.read_bytes()
    killed = 0
    while killed < 8:
        path.unlink(missing_ok=True)
        child = multiprocessing.get_context("fork").Process(target=write_pack, args=(path, raw))
        begun = time.perf_counter()
        child.start()
        assert child.pid is not None
        time.sleep(rng.uniform(0, 1.2 * duration))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            duration = min(duration, time.perf_counter() - begun)
        assert not path.exists() or path.read_bytes() == expected
    write_pack(path, raw)
    assert path.read_bytes() == expected


@pytest.fixture
def tiny_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("a small file system can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("count", [166, 200, 2000])
def test_a_full_disk_is_told_and_nothing_is_left(tiny_disk: Path, count: int):
    """166: the images just fit, and HDF5's own tables, written while closing, do not."""
    raw = raw_splits(shape=(32, 32, 3), counts=(count, 2, 2))
    with pytest.raises(RunError, match=r"cannot write .*toy.h5: .*disk") as caught:
        write_pack(tiny_disk / "toy.h5", raw)
    assert "\n" not in str(caught.value)
    assert list(tiny_disk.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "packs").write_text("a file")
    with pytest.raises(RunError, match=r"cannot write .*packs"):
        write_pack(tmp_path / "packs" / "toy.h5", raw_splits())
