from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from medmnist import INFO

from maehpc.data import available, catalogue, dataset_name, prepare
from maehpc.data.sources import open_source
from maehpc.errors import InputError


def test_catalogue_holds_the_twelve_flat_medmnist_sets_cifar10_and_digits():
    flat = [name for name, info in INFO.items() if "3D" not in info["python_class"]]
    assert list(catalogue()) == [*flat, "cifar10", "digits"]
    assert len(flat) == 12
    for name in flat:
        entry = catalogue()[name]
        assert entry.sizes == (28, 64, 128, 224)
        assert entry.counts == INFO[name]["n_samples"]
        assert len(entry.classes) == len(INFO[name]["label"])
        assert entry.channels == INFO[name]["n_channels"]


def test_tasks_are_told_in_our_words():
    tasks = {name: entry.task for name, entry in catalogue().items()}
    assert tasks["chestmnist"] == "multi-label"
    assert tasks["retinamnist"] == "ordinal-regression"
    assert tasks["breastmnist"] == "binary-class"
    assert set(tasks.values()) == {"multi-class", "binary-class", "ordinal-regression", "multi-label"}


def test_classes_stand_in_the_order_of_their_labels():
    assert catalogue()["breastmnist"].classes == ("malignant", "normal, benign")
    assert catalogue()["organamnist"].classes[10] == INFO["organamnist"]["label"]["10"]  # "10" sorts before "2" as text


def test_unknown_size_and_unknown_name_are_told():
    with pytest.raises(InputError, match=r"retinamnist does not exist at 32 pixels; .*28, 64, 128, 224"):
        open_source("retinamnist", 32)
    with pytest.raises(InputError, match=r"no data set 'retnamnist'; give one of pathmnist"):
        open_source("retnamnist", 28)
    assert open_source("digits", 224).pack_name == "digits-8"


@given(st.text(min_size=1, max_size=30))
@example("~\0")
@example("~a\0/b")
def test_dataset_names_are_safe_or_refused(text: str):
    try:
        name = dataset_name(text)
    except InputError:
        return
    assert re.fullmatch(r"[a-z0-9_-]+", name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("digits", "digits"),
        ("data/Skin Lesions (v2).npz", "skin-lesions-v2"),
        ("/a/b/Röntgen/", "r-ntgen"),
        ("~/My.Images", "my-images"),
        ("x/retinamnist.npz", "retinamnist-own"),
        ("./digits", "digits-own"),
    ],
)
def test_dataset_name(text: str, name: str):
    assert dataset_name(text) == name


def test_a_path_without_a_name_is_refused():
    with pytest.raises(InputError, match="gives no name"):
        dataset_name("日本.npz")


def test_available_tells_packed_found_and_missing(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    packs = tmp_path / "packs"
    root = tmp_path / "mine"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "bloodmnist_64.npz").touch()
    (home / ".medmnist").mkdir()
    (home / ".medmnist" / "pathmnist.npz").touch()
    monkeypatch.setenv("MAEHPC_DATA", str(root))
    prepare("digits", 28, packs)
    states = {(item.entry.name, item.size): (item.state, item.where) for item in available(packs)}
    assert len(states) == 12 * 4 + 2
    assert states.pop(("digits", 8)) == ("packed", str(packs / "digits-8.h5"))
    assert states.pop(("bloodmnist", 64)) == ("file", str(root / "sub" / "bloodmnist_64.npz"))
    assert states.pop(("pathmnist", 28)) == ("file", str(home / ".medmnist" / "pathmnist.npz"))
    assert set(states.values()) == {("missing", None)}


def test_a_wrong_search_folder_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MAEHPC_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"MAEHPC_DATA names .*nowhere, which is not a folder"):
        prepare("retinamnist", 28, tmp_path)


@pytest.mark.parametrize(
    ("name", "size", "file", "option"),
    [
        ("retinamnist", 28, "retinamnist.npz", "fetch retinamnist`"),
        ("retinamnist", 64, "retinamnist_64.npz", "fetch retinamnist --size 64`"),
        ("cifar10", 28, "cifar-10-batches-py", "fetch cifar10`"),
    ],
)
def test_an_absent_file_is_told_with_its_place(
    tmp_path: Path, home: Path, name: str, size: int, file: str, option: str
):
    with pytest.raises(InputError) as caught:
        prepare(name, size, tmp_path)
    sentence = str(caught.value)
    assert file in sentence
    assert str(home / ".medmnist") in sentence
    assert option in sentence
    assert "\n" not in sentence
