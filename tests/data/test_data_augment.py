"""Crops held to torchvision's, one image at a time; draws to their distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as vision

from maehpc.data import CropFlip
from maehpc.data.augment import draw_crops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(28, 28, 28), (28, 28, 64), (64, 64, 20), (40, 25, 30), (25, 40, 7)]
)
def test_a_batch_equals_torchvision_one_image_at_a_time(height, width, size, interpolation, device):
    pixels = torch.rand(24, 3, height, width, generator=generator(1)).to(device)
    ours = CropFlip((0.08, 1.0), size, interpolation)(pixels, generator())
    crops = draw_crops(24, height, width, (0.08, 1.0), generator())
    assert 4 < int(crops.flip.sum()) < 20
    for index in range(24):
        box = [int(side[index]) for side in (crops.top, crops.left, crops.height, crops.width)]
        mode = InterpolationMode(interpolation)
        theirs = vision.resized_crop(pixels[index : index + 1], *box, [size, size], mode, antialias=True)[0]
        theirs = vision.hflip(theirs) if crops.flip[index] else theirs
        torch.testing.assert_close(ours[index], theirs.clamp(0, 1), atol=3e-6, rtol=0)


def test_the_draw_of_an_image_depends_on_the_seed_and_its_place_alone():
    many = draw_crops(300, 28, 28, (0.2, 1.0), generator(5))
    for count in (1, 7, 64, 299):
        few = draw_crops(count, 28, 28, (0.2, 1.0), generator(5))
        for name in ("top", "left", "height", "width", "flip"):
            assert torch.equal(getattr(few, name), getattr(many, name)[:count])
    assert not torch.equal(draw_crops(300, 28, 28, (0.2, 1.0), generator(6)).top, many.top)


def test_results_repeat_and_leave_the_global_generator_alone():
    pixels = torch.rand(9, 3, 28, 28, generator=generator(1))
    before = torch.get_rng_state()
    crop = CropFlip((0.2, 1.0), 32)
    first = crop(pixels, generator(3))
    assert torch.equal(first, crop(pixels, generator(3)))
    assert not torch.equal(first, crop(pixels, generator(4)))
    assert torch.equal(before, torch.get_rng_state())
    assert first.shape == (9, 3, 32, 32)
    assert first.min() >= 0 and first.max() <= 1


def test_crops_lie_inside_and_are_distributed_as_torchvision_s():
    count, side, scale = 6000, 96, (0.2, 1.0)
    crops = draw_crops(count, side, side, scale, generator(2))
    assert (crops.top >= 0).all() and (crops.left >= 0).all()
    assert (crops.top + crops.height <= side).all() and (crops.left + crops.width <= side).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(1, side, side)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])
    for ours, reference in (
        (crops.top, theirs[:, 0]),
        (crops.left, theirs[:, 1]),
        (crops.height * crops.width, theirs[:, 2] * theirs[:, 3]),
        (crops.width / crops.height, theirs[:, 3] / theirs[:, 2]),
    ):
        assert stats.ks_2samp(ours.numpy(), reference.numpy()).pvalue > 0.001
    assert stats.binomtest(int(crops.flip.sum()), count).pvalue > 0.001
    assert abs(np.corrcoef(crops.flip.numpy(), crops.top.numpy())[0, 1]) < 0.05


def test_where_nothing_fits_the_largest_centred_crop_is_taken():
    for height, width in ((8, 64), (64, 8)):
        crops = draw_crops(20, height, width, (0.9, 1.0), generator())
        with torch.random.fork_rng():
            expected = RandomResizedCrop.get_params(torch.empty(1, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        for name, value in zip(("top", "left", "height", "width"), expected, strict=True):
            assert (getattr(crops, name) == value).all()


def test_a_whole_crop_changes_nothing_but_the_side():
    pixels = torch.rand(40, 1, 16, 16, generator=generator(1))
    crops = draw_crops(40, 16, 16, (1.0, 1.0), generator())
    whole = (crops.height == 16) & (crops.width == 16)
    result = CropFlip((1.0, 1.0), 16)(pixels, generator())
    assert whole.sum() > 3
    for index in torch.nonzero(whole)[:, 0]:
        expected = pixels[index].flip(2) if crops.flip[index] else pixels[index]
        torch.testing.assert_close(result[index], expected, atol=1e-6, rtol=0)
