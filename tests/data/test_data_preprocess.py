"""Held to Pillow's resampling in 32-bit floats, and to arithmetic written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maehpc.data import PackInfo, Preprocess, prepare
from maehpc.recipes import DataSettings

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def info(channels: int) -> PackInfo:
    mean, std = (0.2, 0.3, 0.4)[:channels], (0.5, 0.6, 0.0)[:channels]
    counts = {"train": 1, "val": 1, "test": 1}
    return PackInfo("n", "N", "binary-class", ("a", "b"), "0", mean, std, counts, (9, 9, channels), 0.25, 0.125)


def batch(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=draw, dtype=torch.uint8)


def preprocess(stored: int, **settings) -> Preprocess:
    fields = {"normalization": "dataset", **settings}
    return Preprocess(DataSettings(**fields), info(stored))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(28, 28, 64), (28, 28, 224), (64, 64, 24), (30, 50, 33)])
def test_resizing_equals_pillow(height: int, width: int, size: int, interpolation: str):
    images = batch(3, 3, height, width)
    ours = preprocess(3, image_size=size, interpolation=interpolation).pixels(images)
    assert ours.shape == (3, 3, size, size)
    assert ours.dtype == torch.float32
    for image, result in zip(images.numpy(), ours.numpy(), strict=True):
        for plane, channel in zip(image, result, strict=True):
            exact = Image.fromarray(plane.astype(np.float32) / 255)
            theirs = np.asarray(exact.resize((size, size), PILLOW[interpolation])).clip(0, 1)
            np.testing.assert_allclose(channel, theirs, atol=2e-6)


def test_bicubic_overshoot_is_clamped():
    edges = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edges[..., 4:] = 255
    pixels = preprocess(3, image_size=32).pixels(edges)
    assert pixels.min() == 0
    assert pixels.max() == 1
    raw = torch.nn.functional.interpolate(edges.float() / 255, size=32, mode="bicubic", antialias=True)
    assert raw.max() > 1.01


def test_equal_size_is_left_exactly_as_it_is():
    images = batch(2, 3, 16, 16)
    assert torch.equal(preprocess(3, image_size=16).pixels(images), images.float() / 255)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [28, 17, 64])
@pytest.mark.parametrize(("stored", "channels"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_an_image_alone_equals_itself_in_a_batch(stored, channels, size, interpolation, device):
    chain = preprocess(stored, image_size=size, channels=channels, interpolation=interpolation)
    images = batch(13, stored, 28, 28).to(device)
    together = chain.normalise(chain.pixels(images))
    assert together.is_contiguous()
    assert together.shape == (13, channels, size, size)
    for index in range(13):
        assert torch.equal(chain.normalise(chain.pixels(images[index : index + 1])), together[index : index + 1])
    assert torch.equal(chain.normalise(chain.pixels(images[4:9])), together[4:9])
    assert torch.equal(chain.normalise(chain.pixels(images.flip(0))), together.flip(0))


def test_grey_is_repeated_and_colour_averaged():
    grey, colour = batch(2, 1, 8, 8), batch(2, 3, 8, 8)
    repeated = preprocess(1, image_size=8, channels=3).pixels(grey)
    assert torch.equal(repeated, (grey.float() / 255).repeat(1, 3, 1, 1))
    repeated[:, 0] = 0  # channels do not share memory
    assert repeated[:, 1].any()
    averaged = preprocess(3, image_size=8, channels=1).pixels(colour)
    torch.testing.assert_close(averaged, colour.float().mean(dim=1, keepdim=True) / 255)


def test_statistics_are_those_the_recipe_names():
    assert preprocess(3, normalization="imagenet").mean == (0.485, 0.456, 0.406)
    assert preprocess(1, normalization="imagenet").std == (0.229, 0.224, 0.225)
    assert preprocess(3).mean == (0.2, 0.3, 0.4)
    assert preprocess(3).std == (0.5, 0.6, 1 / 255), "a constant channel is not divided by 0"
    assert preprocess(1).mean == (0.2, 0.2, 0.2)
    assert preprocess(1, channels=1).mean == (0.2,)
    assert (preprocess(3, channels=1).mean, preprocess(3, channels=1).std) == ((0.25,), (0.125,))


def test_normalisation_and_its_inverse():
    chain = preprocess(3)
    pixels = batch(2, 3, 5, 5).float() / 255
    expected = (pixels.numpy() - np.float32([0.2, 0.3, 0.4])[:, None, None]) / np.float32([0.5, 0.6, 1 / 255])[
        :, None, None
    ]
    np.testing.assert_allclose(chain.normalise(pixels).numpy(), expected, rtol=1e-6)
    torch.testing.assert_close(chain.denormalise(chain.normalise(pixels)), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_normalised_train_split_has_mean_0_and_deviation_1(arrays, save_npz, tmp_path: Path, channels: int):
    pack = prepare(str(save_npz(arrays)), 28, tmp_path)
    chain = Preprocess(DataSettings(image_size=8, channels=channels, normalization="dataset"), pack.info)
    images = torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2)
    x = chain.normalise(chain.unresized(images)).double()
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(channels).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(dim=(0, 2, 3), correction=0), torch.ones(channels).double(), atol=1e-5, rtol=0)
