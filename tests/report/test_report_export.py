"""What is exported is what stores hold: arrays bit for bit, pictures pixel by pixel, volumes the right way round."""

from __future__ import annotations

import gzip
import io
import itertools
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from PIL import Image
from report_experiments import GRID, METHODS, Study, store_layout, write_explanations, write_maps
from small_disks import small_disk
from zarr_stores import arrays_of_store

from maehpc.errors import InputError, RunError
from maehpc.experiment import Experiment
from maehpc.maps import ArrayLayout, MapStore, StoreLayout
from maehpc.ownership import own
from maehpc.report.export import FORMATS, export, parse_images
from maehpc.report.figures.colours import colour_map
from maehpc.report.methods import method

Arrays = dict[str, NDArray[Any]]

SIDE = 16
COLOUR = np.random.default_rng(1).integers(0, 256, (10, SIDE, SIDE, 3), np.uint8)
GREY = COLOUR[..., :1]


@pytest.fixture(scope="module")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    root = tmp_path_factory.mktemp("pristine") / "demo"
    return root, write_explanations(root, Study(metrics=("deletion",)))


@pytest.fixture
def demo(_pristine: tuple[Path, Arrays], tmp_path: Path) -> Path:
    """An experiment that explains `digits`: ten images in shards of four; to be damaged."""
    return Path(shutil.copytree(_pristine[0], tmp_path / "demo"))


@pytest.fixture
def arrays(_pristine: tuple[Path, Arrays]) -> Arrays:
    """What its store holds."""
    return _pristine[1]


def arrays_of(folder: Path) -> Arrays:
    return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def shard_file(root: Path, name: str, shard: int) -> Path:
    (path,) = (root / "maps/digits.zarr" / name).glob(f"c.{shard}*")
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Images by their indices


@settings(deadline=None)
@given(st.text("0123456789,- x", max_size=12))
def test_any_text_is_parsed_as_slowly_or_refused(text: str) -> None:
    expected: set[int] | None = set()
    for word in text.split(","):
        ends = [end.strip() for end in word.split("-")]
        if not all(end.isdigit() for end in ends) or len(ends) > 2 or int(ends[0]) > int(ends[-1]):
            expected = None
            break
        if int(ends[-1]) < 10_000:
            expected |= set(range(int(ends[0]), int(ends[-1]) + 1))
        else:
            return
    if expected is None:
        with pytest.raises(InputError, match="neither an index nor a range"):
            parse_images(text)
    else:
        assert set(itertools.chain(*parse_images(text))) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=8))
def test_ranges_rise_and_leave_gaps_however_they_are_typed(spans: list[tuple[int, int]]) -> None:
    text = " , ".join(f"{first}-{first + more}" if more else str(first) for first, more in spans)
    parsed = parse_images(text)
    assert all(before.stop < after.start for before, after in itertools.pairwise(parsed))
    wanted = {image for first, more in spans for image in range(first, first + more + 1)}
    assert list(itertools.chain(*parsed)) == sorted(wanted)


@pytest.mark.parametrize("text", ["", "1,", "5-", "-5", "9-3", "1-2-3", "1.5", "²", "all", "9" * 5000])
def test_what_is_no_image_is_named(text: str) -> None:
    with pytest.raises(InputError, match="--images"):
        parse_images(text)


# Arrays


@pytest.mark.parametrize(
    "study",
    [
        Study(),
        Study(full=True, multi_label=True, metrics=("deletion",), searches=("pgd",), shard_images=3),
        Study(images=GREY, samples=0, pixels=False, shard_images=32),
    ],
    ids=["plain", "rich", "bare"],
)
def test_arrays_are_those_that_zarr_and_xarray_read(study: Study, tmp_path: Path) -> None:
    write_explanations(tmp_path, study)
    summary = export(tmp_path, "npy")
    (exported,) = summary.exported
    found = arrays_of(tmp_path / "export/digits")
    assert (exported.images, exported.files, summary.missing) == (10, len(found), [])
    stored = arrays_of_store(tmp_path / "maps/digits.zarr")
    assert found.keys() == stored.keys()
    with xarray.open_zarr(tmp_path / "maps/digits.zarr", consolidated=False) as data:
        for name, values in found.items():
            assert isinstance(values, np.memmap)
            assert same_bits(values, stored[name].astype(values.dtype))
            if name in data:
                assert same_bits(values, data[name].values)
            written = io.BytesIO()
            np.save(written, values)
            assert (tmp_path / f"export/digits/{name}.npy").read_bytes() == written.getvalue()


@pytest.mark.parametrize("text", ["0", "9", "3-4", "0,2,5-8", "8,1-1,0-2"])
def test_chosen_images_and_methods_alone(text: str, demo: Path, arrays: Arrays) -> None:
    images = parse_images(text)
    export(demo / "maps/digits.zarr", "npy", demo.parent / "out", methods=["gradcam"], images=images)
    found = arrays_of(demo.parent / "out/digits")
    others = {name for name in arrays if name.startswith(("saliency", "deeplift"))}
    assert found.keys() == (arrays.keys() | {"image"}) - others
    chosen = sorted(itertools.chain(*images))
    assert found.pop("image").tolist() == chosen
    assert all(same_bits(values, arrays[name][chosen]) for name, values in found.items())


def test_arrays_take_the_place_of_an_earlier_set(demo: Path, arrays: Arrays) -> None:
    folder = demo / "export/digits"
    export(demo, "npy")
    (folder / "mine.npy").write_bytes(b"somebody else's")
    first = contents(folder)
    export(demo, "npy")
    assert contents(folder) == first
    export(demo, "npy", methods=["saliency"], images=parse_images("4-9"))
    assert (folder / "mine.npy").read_bytes() == b"somebody else's"
    (folder / "mine.npy").unlink()
    assert {len(values) for values in arrays_of(folder).values()} == {6}
    assert not list(folder.glob("gradcam*"))
    assert same_bits(np.load(folder / "saliency.npy"), arrays["saliency"][4:])


def test_a_set_that_is_not_whole_has_no_indices(demo: Path) -> None:
    folder = demo / "export/digits"
    export(demo, "npy")
    (folder / "logits.npy").unlink()
    (folder / "logits.npy/in the way").mkdir(parents=True)
    with pytest.raises(RunError, match=r"logits\.npy: a folder stands where a file is needed"):
        export(demo, "npy")
    assert not (folder / "image.npy").exists()
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    write_explanations(tmp_path, Study(images=COLOUR.repeat(4, 1).repeat(4, 2)))
    with small_disk(tmp_path / "disk") as mount:
        out = mount("size=400k") / "out"
        export(tmp_path, "npy", out, images=parse_images("0"))
        before = contents(out / "digits")
        with pytest.raises(RunError, match="the disk is full"):
            export(tmp_path, "npy", out)
        assert contents(out / "digits") == before
        mount("ro")
        with pytest.raises(RunError, match="read-only"):
            export(tmp_path, "png", out)


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python and NumPy held at most while it ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("to", FORMATS)
def test_memory_does_not_grow_with_the_images(to: str, tmp_path: Path) -> None:
    used = {}
    for count in (8, 32):
        images = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)
        write_explanations(tmp_path / str(count), Study(images=images, shard_images=4))
        export(tmp_path / str(count), to, images=parse_images("0"))  # what is imported or cached on the way
        used[count] = peak(partial(export, tmp_path / str(count), to))
    assert used[32] < 1.25 * used[8]


# Pictures

STOPS = {
    True: ["053061", "4393c3", "ffffff", "d6604d", "67001f"],
    False: ["ffffff", "7fb2d6", "0a559c", "04152b"],
}


def naive_colour(share: float, signed: bool) -> list[float]:
    """One of 256 colours between the stops, each channel 0 to 255."""
    stops = [[int(stop[place : place + 2], 16) for place in (0, 2, 4)] for stop in STOPS[signed]]
    place = min(max(int(share * 256), 0), 255) / 255 * (len(stops) - 1)
    before = min(int(place), len(stops) - 2)
    part = place - before
    return [(1 - part) * a + part * b for a, b in zip(stops[before], stops[before + 1], strict=True)]


def naive_limit(values: NDArray[Any]) -> float:
    ranked = sorted(abs(float(value)) for value in values.ravel())
    place = 0.995 * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low]) or 1.0


def naive_between(values: NDArray[Any], row: int, column: int) -> float:
    """A coarse map at the centre of a pixel, between the centres of the patches around it."""
    rows, columns = values.shape
    y, x = (row + 0.5) * rows / SIDE - 0.5, (column + 0.5) * columns / SIDE - 0.5
    total = 0.0
    for i in range(rows):
        for j in range(columns):
            near_y = abs(min(max(y, 0), rows - 1) - i)
            near_x = abs(min(max(x, 0), columns - 1) - j)
            total += max(0.0, 1 - near_y) * max(0.0, 1 - near_x) * float(values[i, j])
    return total


def naive_overlay(values: NDArray[Any], image: NDArray[Any] | None, signed: bool) -> NDArray[np.float64]:
    limit = naive_limit(values)
    drawn = np.zeros((SIDE, SIDE, 3))
    for row, column in itertools.product(range(SIDE), repeat=2):
        value = naive_between(values, row, column)
        share = (value + limit) / (2 * limit) if signed else value / limit
        colour = naive_colour(share, signed)
        if image is not None:
            pixel = [float(level) for level in image[row, column]]
            luma = pixel[0] if len(pixel) == 1 else 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]
            opaque = 0.1 + 0.75 * min(abs(value) / limit, 1)
            colour = [opaque * level + (1 - opaque) * (0.4 * 255 + 0.6 * luma) for level in colour]
        drawn[row, column] = colour
    return drawn


@pytest.mark.parametrize(
    "study",
    [Study(images=COLOUR), Study(images=GREY, full=True), Study(images=COLOUR, pixels=False)],
    ids=["colour", "grey and channels", "no pixels"],
)
def test_pictures_are_those_of_a_slow_overlay(study: Study, tmp_path: Path) -> None:
    arrays = write_explanations(tmp_path, study)
    export(tmp_path, "png", images=parse_images("2,9"))  # image 2's GradCAM is zero everywhere
    written = sorted((tmp_path / "export/digits").glob("*.png"))
    assert [path.name for path in written] == [
        f"image-{image:05d}-{name}.png" for image in (2, 9) for name in sorted(METHODS)
    ]
    for image, name in itertools.product((2, 9), METHODS):
        values = arrays[name][image]
        if values.ndim == 3:
            values = np.abs(values).max(0) if name == "saliency" else values.sum(0)
        expected = naive_overlay(values, study.images[image] if study.pixels else None, name != "saliency")
        with Image.open(tmp_path / f"export/digits/image-{image:05d}-{name}.png") as picture:
            drawn = np.asarray(picture)
        assert drawn.dtype == np.uint8 and drawn.shape == (SIDE, SIDE, 3)
        difference = np.abs(drawn - expected)
        assert difference.max() < 4  # a neighbour among the 256 colours, where single precision decides
        assert np.percentile(difference, 95) < 0.51


def test_a_picture_says_what_it_shows_and_its_scale(tmp_path: Path) -> None:
    study = Study(multi_label=True, classes=("nævus", "黒色腫", "none of these"))
    arrays = write_explanations(tmp_path, study)
    export(tmp_path, "png", images=parse_images("7"))
    for name in METHODS:
        with Image.open(tmp_path / f"export/digits/image-00007-{name}.png") as picture:
            text = dict(picture.text)
        values, limit = arrays[name][7], naive_limit(arrays[name][7])
        assert float(text.pop("First colour")) == pytest.approx(0 if name == "saliency" else -limit)
        assert float(text.pop("Last colour")) == pytest.approx(limit)
        assert np.float32(text.pop("Map minimum")) == values.min()
        assert np.float32(text.pop("Map maximum")) == values.max()
        labels = [study.classes[number] for number in np.flatnonzero(arrays["label"][7])]
        assert text == {
            "Method": name,
            "Data set": "digits",
            "Split": "test",
            "Image": "7",
            "Label": ", ".join(labels) or "none",
            "Prediction": study.classes[arrays["prediction"][7]],
        }


def lightness(colours: NDArray[Any]) -> NDArray[np.float64]:
    """CIE L* of sRGB colours in [0, 1], [..., 3]."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return 116 * np.where(luminance > 0.008856, np.cbrt(luminance), 7.787 * luminance + 16 / 116) - 16


@pytest.mark.parametrize("name", ["saliency", "deeplift"])
def test_equal_steps_of_evidence_are_about_equal_steps_of_lightness(name: str) -> None:
    look = method(name)
    seen = lightness(colour_map(look)(np.linspace(0, 1, 256))[:, :3])
    arms = [seen[:128][::-1], seen[128:]] if look.signed else [seen]
    for arm in arms:
        steps = -np.diff(arm)
        assert (steps > 0).all()
        assert arm[0] > 98 and arm[-1] < 25
        assert steps.max() < 2 * steps.mean()
    assert not look.signed or np.abs(arms[0] - arms[1]).max() < 10


def test_files_of_images_add_to_those_there_and_are_the_same_again(demo: Path) -> None:
    folder = demo / "export/digits"
    for to in ("png", "nifti"):
        export(demo, to, images=parse_images("0-1"))
        export(demo, to, images=parse_images("1,8"), methods=["gradcam", "saliency"])
    first = contents(folder)
    assert len(first) == 2 * (2 * 3 + 2) + 1  # and the lock
    for to in ("nifti", "png"):
        export(demo, to, images=parse_images("0-1"))
    assert contents(folder) == first


# Volumes


def test_a_volume_is_the_map_with_columns_first(demo: Path, arrays: Arrays) -> None:
    export(demo, "nifti", images=parse_images("5"))
    for name in METHODS:
        path = demo / f"export/digits/image-00005-{name}.nii.gz"
        values = arrays[name][5]
        rows, columns = values.shape
        volume = nibabel.load(path)
        read = np.asarray(volume.dataobj)
        assert read.dtype == np.float32 and read.shape == (columns, rows, 1)
        for row, column in itertools.product(range(rows), range(columns)):
            assert read[column, row, 0] == values[row, column]
        assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
        assert volume.header["descrip"].item() == f"{name} of image 5, digits test".encode()
        # And from the bytes, by the standard's offsets: the first axis varies fastest, and the map's rows follow.
        packed = path.read_bytes()
        assert packed[4:8] == bytes(4)  # no time in the gzip header
        data = gzip.decompress(packed)
        assert struct.unpack_from("<i8h", data, 40 - 4)[1:5] == (3, columns, rows, 1)
        assert struct.unpack_from("<h", data, 70) == (16,)  # float32
        assert data[int(struct.unpack_from("<f", data, 108)[0]) :] == values.tobytes()


def test_world_coordinates_are_pixels(demo: Path) -> None:
    export(demo, "nifti", images=parse_images("5"))
    affine = {
        name: nibabel.load(demo / f"export/digits/image-00005-{name}.nii.gz").affine for name in ("saliency", "gradcam")
    }
    np.testing.assert_array_equal(affine["saliency"], np.eye(4))
    patch = SIDE // GRID
    for i, j in itertools.product(range(GRID), repeat=2):
        centre = [np.arange(i * patch, (i + 1) * patch).mean(), np.arange(j * patch, (j + 1) * patch).mean(), 0]
        np.testing.assert_allclose(apply_affine(affine["gradcam"], (i, j, 0)), centre)


def test_channels_are_a_voxels_vector(tmp_path: Path) -> None:
    arrays = write_explanations(tmp_path, Study(full=True))
    export(tmp_path, "nifti", images=parse_images("1"), methods=["saliency"])
    volume = nibabel.load(tmp_path / "export/digits/image-00001-saliency.nii.gz")
    assert volume.shape == (SIDE, SIDE, 1, 1, 3)
    assert volume.header.get_intent()[0] == "vector"
    read = np.asarray(volume.dataobj)
    for channel, row, column in itertools.product(range(3), range(SIDE), range(SIDE)):
        assert read[column, row, 0, 0, channel] == arrays["saliency"][1, channel, row, column]


def volumetric(root: Path) -> NDArray[np.float16]:
    """A store of one map of three dimensions an image."""
    study = Study(samples=0, pixels=False)
    plain = store_layout(study, {})
    values = np.random.default_rng(3).normal(size=(2, 2, 3, 4)).astype(np.float16)
    layout = StoreLayout(
        images=2,
        shard_images=2,
        arrays={
            "label": ArrayLayout((), (), "int64"),
            "prediction": ArrayLayout((), (), "int64"),
            "saliency": ArrayLayout(("z", "y", "x"), (2, 3, 4), "float16"),
        },
        attributes=plain.attributes | {"methods": ["saliency"]},
    )
    experiment = Experiment(root)
    with own(experiment.ledger("digits")) as owner:
        store = MapStore.create(experiment.maps("digits"), experiment.ledger("digits"), layout, {}, owner)
        zeros = np.zeros(2, np.int64)
        store.write_shard(0, {"label": zeros, "prediction": zeros, "saliency": values})
    return values


def test_a_map_of_three_dimensions_is_a_volume_and_no_picture(tmp_path: Path) -> None:
    values = volumetric(tmp_path)
    export(tmp_path, "nifti")
    volume = nibabel.load(tmp_path / "export/digits/image-00001-saliency.nii.gz")
    read = np.asarray(volume.dataobj)
    assert read.shape == (4, 3, 2)
    np.testing.assert_array_equal(volume.affine, np.eye(4))
    for x, y, z in itertools.product(range(4), range(3), range(2)):
        assert read[x, y, z] == values[1, z, y, x]
    with pytest.raises(InputError, match=r"--to png: saliency of .* has dimensions z, y, x and no picture"):
        export(tmp_path, "png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is not whole, and what is wrong


@pytest.mark.parametrize("to", FORMATS)
def test_shards_that_are_not_whole_are_named_and_the_rest_is_exported(to: str, tmp_path: Path) -> None:
    arrays = write_explanations(tmp_path, Study(shard_images=2, written=(0, 1, 3, 4)))
    flip(shard_file(tmp_path, "gradcam", 3))
    shard_file(tmp_path, "saliency", 0).unlink()
    summary = export(tmp_path, to)
    assert [sentence.split(";")[0].rpartition("digits.zarr")[2] for sentence in summary.missing] == [
        "/saliency/c.0.0.0 is absent",
        " is not recorded",
        "/gradcam/c.3.0.0 is not what its ledger recorded",
    ]
    assert summary.exported[0].images == 4
    files = [path for path in (tmp_path / "export/digits").iterdir() if path.name != ".lock"]
    assert len(files) == summary.exported[0].files
    if to == "npy":
        found = arrays_of(tmp_path / "export/digits")
        assert found.pop("image").tolist() == [2, 3, 8, 9]
        assert all(same_bits(values, arrays[name][[2, 3, 8, 9]]) for name, values in found.items())
    else:
        assert {path.name.split("-")[1] for path in files} == {"00002", "00003", "00008", "00009"}


def test_damage_of_what_is_not_asked_for_is_not_met(demo: Path) -> None:
    flip(shard_file(demo, "gradcam", 0))
    flip(shard_file(demo, "saliency", 1))
    assert export(demo, "npy", methods=["saliency"], images=parse_images("0-3,9")).missing == []


@pytest.mark.parametrize("to", FORMATS)
def test_where_nothing_is_whole_nothing_is_written(to: str, tmp_path: Path) -> None:
    write_explanations(tmp_path, Study(written=(1,)))
    flip(shard_file(tmp_path, "saliency", 1))
    with pytest.raises(InputError, match="holds no whole shard of what was chosen"):
        export(tmp_path, to)
    assert not (tmp_path / "export").exists()


def test_a_store_that_cannot_be_opened_is_named_and_the_others_are_exported(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    for name in ("digits", "broken", "third"):
        write_maps(experiment, Study(name=name))
    flip(tmp_path / "maps/broken.zarr/zarr.json")
    summary = export(tmp_path, "npy", images=parse_images("0"))
    assert [each.dataset for each in summary.exported] == ["digits", "third"]
    (sentence,) = summary.missing
    assert "broken.zarr/zarr.json is not what its ledger recorded" in sentence
    assert [each.dataset for each in export(tmp_path, "npy", datasets=["third"]).exported] == ["third"]
    with pytest.raises(InputError, match=r"broken\.zarr/zarr\.json is not"):
        export(tmp_path, "npy", datasets=["broken"])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"to": "tiff"}, "--to tiff: there is no such format; choose among npy, png, nifti"),
        ({"datasets": ["digits", "other"]}, "--datasets other: .* holds digits; choose among these"),
        ({"methods": ["rise"]}, "--methods rise: .* holds saliency, gradcam, deeplift-captum; choose among these"),
        ({"images": (range(8, 11),)}, "--images 10: .* holds images 0 to 9 of the test split"),
    ],
)
def test_what_is_not_there_is_named_with_the_choices(wrong: dict[str, Any], sentence: str, demo: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        export(demo, **{"to": "npy", **wrong})
    assert not (demo / "export").exists()


@pytest.mark.parametrize(
    "name", ["nowhere", ".", "digits.zarr", "maps/digits.zarr", "demo/maps/other.zarr", "demo/maps"]
)
def test_a_path_must_be_an_experiment_or_a_store(name: str, demo: Path) -> None:
    with pytest.raises(InputError, match=r"is neither an experiment's folder nor one of its stores"):
        export(demo.parent / name, "npy")


def test_an_experiment_may_hold_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match="holds no explanations; run explain first"):
        export(tmp_path, "npy")
