"""Sparseness in closed forms; pointing game, attribution localisation and the files of masks against naive versions."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from explain_metric_cases import mask_file, metric, toy, with_maps

from maehpc.errors import InputError
from maehpc.explain.metrics import make_metrics

METHODS = ("saliency", "gradcam", "deeplift")


@pytest.fixture(scope="module")
def given():
    return toy(*METHODS)


def plane(*maps):
    """Maps of one value a pixel as maps of three channels whose sum they are."""
    full = torch.stack(maps)
    return torch.stack([full * share for share in (0.5, 0.2, 0.3)], dim=1)


# Sparseness


def test_sparseness_in_closed_form(given):
    count = 256
    even = torch.full((16, 16), -0.3)
    single = torch.zeros(16, 16)
    single[3, 4] = -2
    half = torch.zeros(16, 16)
    half[:8] = 1
    rising = torch.arange(1.0, count + 1)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    maps = with_maps(given, deeplift=plane(even, single, half, rising.view(16, 16)))
    expected = torch.tensor([0.0, 1 - 1 / count, 0.5, (count - 1) / (3 * count)])
    torch.testing.assert_close(metric(given, "sparseness").measure(maps, "deeplift")[""], expected, rtol=0, atol=1e-6)


def test_sparseness_is_half_the_relative_mean_difference(given):
    """Gini's own definition, over all pairs; of a grid map its patches are the values."""
    ours = metric(given, "sparseness")
    for method, reduced in (
        ("saliency", given.maps["saliency"].amax(dim=1)),
        ("gradcam", given.maps["gradcam"]),
        ("deeplift", given.maps["deeplift"].sum(dim=1)),
    ):
        size = reduced.abs().flatten(1).double()
        pairs = (size[:, :, None] - size[:, None]).abs().mean(dim=(1, 2))
        torch.testing.assert_close(
            ours.measure(given, method)[""].double(), pairs / (2 * size.mean(dim=1)), rtol=1e-5, atol=1e-6
        )


# Pointing game and attribution localisation


def upsampled(grid):
    return torch.nn.functional.interpolate(grid[:, None], size=(16, 16), mode="bilinear")[:, 0]


def one_value(given, method):
    full = given.maps[method]
    if method == "gradcam":
        return upsampled(full)
    return full.amax(dim=1) if method == "saliency" else full.sum(dim=1)


@pytest.mark.parametrize("tolerance", [0, 2.5])
def test_pointing_equals_a_naive_version(tolerance, tmp_path):
    given = toy(*METHODS, pixels=torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    path = mask_file(tmp_path, side=16)
    masks = np.load(path)
    ours = metric(given, "pointing", masks=path, tolerance=tolerance)
    seen = set()
    for method in METHODS:
        for row, hit in enumerate(ours.measure(given, method)[""].tolist()):
            value = one_value(given, method)[row]
            y, x = divmod(int(value.argmax()), 16)
            near = [(y - my) ** 2 + (x - mx) ** 2 <= tolerance**2 for my, mx in zip(*masks[row].nonzero(), strict=True)]
            assert hit == float(any(near))
            seen.add(hit)
    assert seen == {0.0, 1.0}


def test_tolerance_is_a_distance(given, tmp_path):
    masks = np.zeros((4, 16, 16), dtype=bool)
    masks[:, 4, 4] = True
    np.save(tmp_path / "m.npy", masks)
    spots = torch.zeros(4, 16, 16)
    for row, (y, x) in enumerate([(4, 4), (4, 7), (7, 7), (8, 4)]):  # 0, 3, 4.2 and 4 pixels away
        spots[row, y, x] = 1
    maps = with_maps(given, deeplift=plane(*spots))
    for tolerance, hits in ((0, [1, 0, 0, 0]), (3, [1, 1, 0, 0]), (4, [1, 1, 0, 1]), (4.3, [1, 1, 1, 1])):
        ours = metric(given, "pointing", masks=str(tmp_path / "m.npy"), tolerance=tolerance)
        assert ours.measure(maps, "deeplift")[""].tolist() == hits


def test_several_largest_values_count_by_their_share(given, tmp_path):
    masks = np.zeros((4, 16, 16), dtype=bool)
    masks[:, :, :4] = True
    np.save(tmp_path / "m.npy", masks)
    even = torch.full((16, 16), 0.7)
    negative = -torch.ones(16, 16)
    negative[2, 3] = -0.5  # the largest value, if not the largest magnitude
    maps = with_maps(given, deeplift=plane(even, negative, even, even))
    ours = metric(given, "pointing", masks=str(tmp_path / "m.npy"))
    torch.testing.assert_close(ours.measure(maps, "deeplift")[""], torch.tensor([0.25, 1.0, 0.25, 0.25]))


def test_mass_equals_a_naive_version(given, tmp_path):
    path = mask_file(tmp_path)
    masks = np.load(path)
    ours = metric(given, "mass", masks=path)
    for method in METHODS:
        measured = ours.measure(given, method)
        for row in range(4):
            value = one_value(given, method)[row].double().numpy()
            positive = np.maximum(value, 0)
            share = positive[masks[row]].sum() / positive.sum()
            np.testing.assert_allclose(measured[""][row], share, rtol=1e-5)
            np.testing.assert_allclose(
                measured["absolute"][row], np.abs(value[masks[row]]).sum() / np.abs(value).sum(), rtol=1e-5
            )
            np.testing.assert_allclose(measured["weighted"][row], share / masks[row].mean(), rtol=1e-5)


def test_mass_of_maps_known_beforehand(given, tmp_path):
    masks = np.zeros((4, 16, 16), dtype=np.uint8)
    masks[:, :8, :8] = 255
    np.save(tmp_path / "m.npy", masks)
    even, inside = torch.ones(16, 16), torch.zeros(16, 16)
    inside[1, 1] = 4
    both = inside.clone()
    both[12, 12] = -4
    against = -torch.ones(16, 16)
    measured = metric(given, "mass", masks=str(tmp_path / "m.npy")).measure(
        with_maps(given, deeplift=plane(even, inside, both, against)), "deeplift"
    )
    nan = float("nan")
    for part, expected in (("", [0.25, 1, 1, nan]), ("absolute", [0.25, 1, 0.5, 0.25]), ("weighted", [1, 4, 4, nan])):
        torch.testing.assert_close(measured[part], torch.tensor(expected), equal_nan=True, msg=part)


# Files of masks


def mass_in(given, path, part="", **options):
    """Share of an even map inside the masks: their area."""
    even = with_maps(given, deeplift=torch.ones(len(given.x), 3, 16, 16))
    return metric(given, "mass", masks=str(path), **options).measure(even, "deeplift")[part].tolist()


def test_masks_belong_to_images_by_index(given, tmp_path):
    masks = np.zeros((40, 16, 16), dtype=bool)
    for index in range(40):
        masks[index].flat[: index + 1] = True
    np.save(tmp_path / "m.npy", masks)
    np.savez(tmp_path / "m.npz", masks=masks, other=np.zeros(3))
    np.savez_compressed(tmp_path / "one.npz", anything=masks)
    batch = replace(given, indices=torch.tensor([30, 3, 39, 0]))
    for name in ("m.npy", "m.npz", "one.npz"):
        assert mass_in(batch, tmp_path / name) == [31 / 256, 4 / 256, 40 / 256, 1 / 256]


@pytest.mark.parametrize("side", [8, 32, 48])
def test_masks_of_another_size_are_resized_to_the_nearest_pixel(given, side, tmp_path):
    masks = np.zeros((4, side, side), dtype=bool)
    masks[:, : side // 4, : side // 2] = True
    np.save(tmp_path / "m.npy", masks)
    assert mass_in(given, tmp_path / "m.npy") == [0.125] * 4


def test_an_empty_mask_is_none(given, tmp_path):
    masks = np.ones((4, 16, 16), dtype=bool)
    masks[2] = False
    np.save(tmp_path / "m.npy", masks)
    for part in ("", "absolute", "weighted"):
        assert np.isnan(mass_in(given, tmp_path / "m.npy", part)).tolist() == [False, False, True, False]
    hits = metric(given, "pointing", masks=str(tmp_path / "m.npy"), tolerance=3).measure(given, "saliency")[""]
    assert hits.isnan().tolist() == [False, False, True, False]


def boxes(folder, *lines, head="image,x0,y0,x1,y1"):
    path = folder / "boxes.csv"
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return path


def test_boxes_cover_pixels_and_join(given, tmp_path):
    path = boxes(tmp_path, "0,2,3,6,5", "3,0,0,16,1", "3,0,0,1,16", "3,0,0,1,2", "900,0,0,1,1")
    measured = mass_in(given, path)
    assert measured[0] == 8 / 256
    assert measured[3] == 31 / 256
    assert np.isnan(measured[1:3]).all()
    spot = torch.zeros(4, 16, 16)
    spot[0, 4, 5] = spot[3, 9, 0] = 1  # row 4, column 5: the box's last
    hits = metric(given, "pointing", masks=str(path)).measure(with_maps(given, deeplift=plane(*spot)), "deeplift")[""]
    assert hits[[0, 3]].tolist() == [1.0, 1.0]


def test_boxes_cover_pixels_whose_centres_they_hold(given, tmp_path):
    path = boxes(tmp_path, "0,0.6,0,2.4,16", "1,0.4,0,2.6,16", "2,0.5,0,1.5,16", "3,0,0,0.4,16")
    measured = mass_in(given, path)
    assert measured[:3] == [1 / 16, 3 / 16, 1 / 16]
    assert np.isnan(measured[3])


def test_boxes_refer_to_the_side_that_is_given(given, tmp_path):
    path = boxes(tmp_path, *(f"{image},0,0,112,224" for image in range(4)), head="image,x0,y0,x1,y1,comment")
    assert mass_in(given, path, box_side=224) == [0.5] * 4
    assert mass_in(given, path) == [1.0] * 4


@pytest.mark.parametrize("name", ["mass", "pointing"])
def test_masks_must_be_given(given, name):
    with pytest.raises(InputError, match=rf"^explain\.options\.{name}\.masks is missing; name a"):
        metric(given, name)


def write(path: Path, content) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no array", "is no array of NumPy's"),
        (b"", "is no array of NumPy's"),
        (np.array([[[object()]]]), "is no array of NumPy's"),
        (np.zeros((4, 16), dtype=bool), r"holds bool \[4, 16\]"),
        (np.zeros((4, 16, 16)), r"holds float64 \[4, 16, 16\]"),
        (np.zeros((0, 16, 16), dtype=bool), r"holds bool \[0, 16, 16\]"),
    ],
)
def test_files_that_hold_no_masks_are_refused(given, content, said, tmp_path):
    path = write(tmp_path / "m.npy", content)
    with pytest.raises(InputError, match=rf"^explain\.options\.mass\.masks: .*{said}"):
        metric(given, "mass", masks=str(path))


def test_other_mistakes_are_named(given, tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*nowhere\.npy"):
        metric(given, "mass", masks=str(tmp_path / "nowhere.npy"))
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 2, 2), dtype=bool), b=np.zeros((4, 2, 2), dtype=bool))
    with pytest.raises(InputError, match=r"holds several arrays \(a, b\); call that of the masks 'masks'"):
        metric(given, "mass", masks=str(tmp_path / "two.npz"))
    few = mask_file(tmp_path, count=3)
    with pytest.raises(InputError, match="holds 3 masks, none for image 3"):
        metric(given, "mass", masks=few).measure(given, "saliency")
    settings = given.settings.model_copy(update={"metrics": ("mass",), "options": {"mass": {"masks": few}}})
    setup = replace(given.engine.setup, settings=settings)
    with pytest.raises(InputError, match="holds 3 masks for 4 images"):
        make_metrics(setup, images=4)
    make_metrics(setup, images=3)


@pytest.mark.parametrize(
    "line", ["0,1,1,1,2", "0,5,1,2,2", "x,0,0,1,1", "0,0,0,1", "-1,0,0,1,1", "0,0,0,nan,1", "0.5,0,0,1,1"]
)
def test_lines_that_are_no_box_are_named(given, line, tmp_path):
    path = boxes(tmp_path, "0,0,0,1,1", line)
    with pytest.raises(InputError, match=r"^explain\.options\.pointing\.masks: line 3 of .* is no box"):
        metric(given, "pointing", masks=str(path))


def test_columns_that_are_missing_are_named(given, tmp_path):
    with pytest.raises(InputError, match="has no column y1"):
        metric(given, "pointing", masks=str(boxes(tmp_path, "0,0,0,1", head="image,x0,y0,x1")))


def test_a_box_beyond_the_split_is_refused_where_its_size_is_known(given, tmp_path):
    path = boxes(tmp_path, "4,0,0,1,1")
    settings = given.settings.model_copy(update={"metrics": ("mass",), "options": {"mass": {"masks": str(path)}}})
    setup = replace(given.engine.setup, settings=settings)
    make_metrics(setup, images=5)
    with pytest.raises(InputError, match=r"line 2 of .* is no box"):
        make_metrics(setup, images=4)


def test_the_files_bytes_are_among_what_decides_a_value(given, tmp_path):
    path = mask_file(tmp_path)
    expected = {"masks": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    assert metric(given, "mass", masks=path).inputs == metric(given, "pointing", masks=path).inputs == expected
    assert metric(given, "sparseness").inputs == {}
