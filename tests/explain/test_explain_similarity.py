import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from maehpc.explain.similarity import (
    centre_of_mass,
    centre_shift,
    compare,
    importance,
    spearman,
    top_intersection,
    top_weights,
)

SHAPES = [(5, 3, 6, 6), (5, 6, 6), (5, 7, 7)]
FEW_VALUES = arrays.arrays(np.float64, (2, 2, 3, 4), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
"""Two batches of two maps with many ties."""


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_importance(one, over_channels):
    """One image's map, element by element."""
    if one.ndim == 2:
        return np.abs(one)
    height, width = one.shape[1:]
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            values = [float(channel[row, column]) for channel in one]
            result[row, column] = max(map(abs, values)) if over_channels == "largest" else abs(sum(values))
    return result


def naive_top(values, count):
    """Positions of the `count` largest, all different."""
    return set(sorted(range(values.size), key=lambda place: -values.ravel()[place])[:count])


def naive_centre(values):
    total = down = across = 0.0
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            total += values[row, column]
            down += values[row, column] * (row + 0.5) / values.shape[0]
            across += values[row, column] * (column + 0.5) / values.shape[1]
    return down / total, across / total


@pytest.mark.parametrize("over_channels", ["largest", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("top", "counts"), [(0.1, (4, 4, 5)), (0.001, (1, 1, 1)), (1.0, (36, 36, 49))])
def test_equals_loops_over_elements(shape, over_channels, top, counts):
    original, changed = maps(*shape), maps(*shape) + 0.7 * maps(*shape, seed=1)
    count = counts[SHAPES.index(shape)]
    alike = compare(original, changed, top, over_channels)
    for row in range(shape[0]):
        one, other = (naive_importance(values[row].numpy(), over_channels) for values in (original, changed))
        common = len(naive_top(one, count) & naive_top(other, count)) / count
        assert alike.top[row].item() == pytest.approx(common, abs=1e-12)
        assert alike.spearman[row].item() == pytest.approx(stats.spearmanr(one.ravel(), other.ravel())[0], abs=1e-12)
        assert alike.centre[row].item() == pytest.approx(math.dist(naive_centre(one), naive_centre(other)), abs=1e-12)


@given(FEW_VALUES)
def test_spearman_equals_scipy_under_ties(values):
    ours = spearman(*torch.from_numpy(values))
    for row in range(2):
        one, other = (values[side, row].ravel() for side in (0, 1))
        if len(set(one)) == 1 or len(set(other)) == 1:
            assert ours[row].isnan()
        else:
            assert ours[row].item() == pytest.approx(stats.spearmanr(one, other)[0], abs=1e-12)


def test_spearman_of_a_large_map():
    """Squared ranks of 224 x 224 pixels sum to 4e13, which float32 could not hold."""
    original, changed = maps(1, 224, 224).float(), (maps(1, 224, 224) + maps(1, 224, 224, seed=1)).float()
    expected = stats.spearmanr(original.numpy().ravel(), changed.numpy().ravel())[0]
    assert spearman(original, changed).item() == pytest.approx(expected, abs=1e-7)
    assert spearman(original, changed).dtype == torch.float32


@given(FEW_VALUES, st.sampled_from([0.01, 0.3, 0.5, 1.0]))
def test_elements_that_tie_share_the_top(values, top):
    count = max(1, round(12 * top))
    weights = top_weights(torch.from_numpy(values[0]), top)
    for row in range(2):
        flat = values[0, row].ravel()
        for place, value in enumerate(flat):
            larger, equal = (flat > value).sum(), (flat == value).sum()
            expected = min(max((count - larger) / equal, 0), 1)
            assert weights[row].flatten()[place].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.full((2,), float(count)).double())


@given(FEW_VALUES, st.integers(0, 2**32 - 1))
def test_places_of_equal_elements_do_not_matter(values, seed):
    """What is compared by rank alone does not change when both maps are shuffled alike."""
    values[..., 0, 0] += 1
    order = np.random.default_rng(seed).permutation(12)
    shuffled = values.reshape(2, 2, 12)[..., order].reshape(values.shape)
    for measure in (lambda *pair: top_intersection(*pair, 0.3), spearman):
        torch.testing.assert_close(
            measure(*torch.from_numpy(values)), measure(*torch.from_numpy(shuffled)), equal_nan=True
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_map_and_any_unit_of_it(shape):
    original = maps(*shape)
    for changed in (original, 1e-6 * original, -3 * original):
        alike = compare(original, changed, 0.1)
        torch.testing.assert_close(alike.top, torch.ones(5).double())
        torch.testing.assert_close(alike.spearman, torch.ones(5).double())
        torch.testing.assert_close(alike.centre, torch.zeros(5).double())


def test_from_one_corner_to_the_other():
    one = torch.zeros(1, 8, 8)
    other = one.clone()
    one[0, 0, 0] = other[0, 7, 7] = 3
    assert centre_shift(one, other).item() == pytest.approx(7 / 8 * math.sqrt(2))
    assert top_intersection(one, other, 1 / 64).item() == 0
    torch.testing.assert_close(centre_of_mass(one), torch.full((1, 2), 1 / 16))


def test_a_patch_is_measured_by_the_images_side():
    grids = importance(maps(2, 4, 7, 7)[0]), importance(maps(2, 4, 7, 7)[1])
    pixels = (grid.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2) for grid in grids)
    torch.testing.assert_close(centre_shift(*grids), centre_shift(*pixels))


def test_zero_maps_are_not_numbers():
    original, changed = maps(4, 3, 6, 6), maps(4, 3, 6, 6, seed=1)
    original[0], changed[2] = 0, 0
    alike = compare(original, changed, 0.1)
    for values in (alike.top, alike.spearman, alike.centre):
        assert values.isnan().tolist() == [True, False, True, False]


def test_neighbours_do_not_matter():
    original, changed = maps(5, 3, 6, 6), maps(5, 3, 6, 6, seed=1)
    together = compare(original, changed, 0.1)
    alone = compare(original[3:4], changed[3:4], 0.1)
    for name in ("top", "spearman", "centre"):
        torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[3], rtol=1e-14, atol=1e-14)


def test_what_a_search_climbs_has_the_right_gradient():
    values = maps(2, 3, 4, 5).requires_grad_()
    for over_channels in ("largest", "sum"):
        assert torch.autograd.gradcheck(lambda v, over=over_channels: centre_of_mass(importance(v, over)), values)
