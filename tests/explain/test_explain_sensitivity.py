import numpy as np
import pytest
import torch
from explain_references import images, preprocess

from maehpc.explain.sensitivity import perturbed, relative_change
from maehpc.recipes import SensitivitySettings

PIXELS = images(3, side=8)
NOISE = (images(3, side=8, seed=2) - 0.5) * 2
PREPROCESS = preprocess(side=8)


def result(**settings):
    return perturbed(PIXELS, NOISE, SensitivitySettings(**settings), PREPROCESS)


def denormalised(x):
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (PREPROCESS.mean, PREPROCESS.std))
    return x * std + mean


def test_normalised_space_adds_to_the_encoders_input():
    assert torch.equal(result(), PREPROCESS.normalise(PIXELS) + NOISE)


def test_pixel_space_adds_to_pixels():
    torch.testing.assert_close(denormalised(result(space="pixel")), PIXELS + NOISE)


@pytest.mark.parametrize("space", ["normalised", "pixel"])
def test_clipping_keeps_valid_pixels_and_touches_no_other(space):
    free, clipped = result(space=space), result(space=space, clip=True)
    outside = (denormalised(free) < 0) | (denormalised(free) > 1)
    assert 0.05 < outside.float().mean() < 0.95
    torch.testing.assert_close(denormalised(clipped), denormalised(free).clamp(0, 1), rtol=0, atol=1e-6)
    assert torch.equal(clipped[~outside], free[~outside])


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2), ("linf", np.inf)])
def test_relative_change_equals_numpy(norm, order):
    changed = PIXELS + 0.1 * NOISE
    ours = relative_change(PIXELS, changed, norm)
    for row in range(3):
        one, other = PIXELS[row].double().numpy().ravel(), changed[row].double().numpy().ravel()
        expected = np.linalg.norm(one - other, order) / np.linalg.norm(one, order)
        np.testing.assert_allclose(ours[row].item(), expected, rtol=1e-5)


def test_zero_map_is_not_a_number():
    maps = PIXELS.clone()
    maps[1] = 0
    change = relative_change(maps, NOISE, "l2")
    assert change.isnan().tolist() == [False, True, False]
    assert relative_change(maps, maps, "l2")[1].isnan()


def test_unit_of_the_map_does_not_matter():
    torch.testing.assert_close(
        relative_change(1e4 * PIXELS, 1e4 * NOISE, "l2"), relative_change(PIXELS, NOISE, "l2"), rtol=1e-5, atol=0
    )
