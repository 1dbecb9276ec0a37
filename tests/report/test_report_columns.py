"""Statistics of columns are numpy's, however the column is cut, and however few values are held in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from maehpc.report import columns

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-310, np.inf])
CUT = st.lists(st.integers(0, 60), max_size=5)


def cut(values: np.ndarray, places: list[int]) -> list[np.ndarray]:
    return np.split(values, sorted(place for place in places if place <= len(values)))


@pytest.fixture(params=[columns.HELD, 0, 3])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(columns, "HELD", request.param)
    return int(request.param)


@pytest.mark.usefixtures("held")
class TestWhateverIsHeld:
    @given(arrays.arrays(np.float64, st.integers(1, 60), elements=NUMBERS), CUT)
    def test_order_statistics_are_the_sorted_values(self, values: np.ndarray, places: list[int]) -> None:
        found = columns.order_statistics(cut(values, places), range(len(values)))
        np.testing.assert_array_equal(found, np.sort(values))

    @given(
        arrays.arrays(np.float64, st.integers(0, 60), elements=st.floats(-1e6, 1e6, width=32)),
        CUT,
        st.lists(st.floats(0, 1), max_size=4),
    )
    def test_quantiles_are_numpys(self, values: np.ndarray, places: list[int], parts: list[float]) -> None:
        found = columns.quantiles(cut(values, places), parts)
        expected = np.quantile(values, parts) if len(values) else np.full(len(parts), np.nan)
        np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-12)

    @given(arrays.arrays(np.float64, st.integers(0, 40), elements=st.sampled_from([np.nan, 0.0, 1.0, 2.5])), CUT)
    def test_places_are_those_of_a_stable_sort(self, values: np.ndarray, places: list[int]) -> None:
        ranked = [place for place in np.argsort(values, kind="stable") if not np.isnan(values[place])]
        assert [columns.place_of(cut(values, places), rank) for rank in range(len(ranked))] == ranked


def test_a_rank_too_many_is_refused() -> None:
    with pytest.raises((ValueError, IndexError)):
        columns.place_of([np.array([1.0, np.nan])], 1)


@given(arrays.arrays(np.float64, st.integers(0, 60), elements=st.floats(-1e3, 1e3)), CUT)
def test_moments_are_numpys(values: np.ndarray, places: list[int]) -> None:
    found = columns.moments(cut(values, places))
    assert found.count == len(values) == columns.count(cut(values, places))
    if len(values):
        np.testing.assert_allclose(found.mean, values.mean(), rtol=1e-12, atol=1e-11)
    if len(values) > 1:
        np.testing.assert_allclose(found.std, values.std(ddof=1), rtol=1e-9, atol=1e-9)
    assert np.isnan(found.mean) == (len(values) == 0) and np.isnan(found.std) == (len(values) < 2)


def test_moments_of_one_array_are_numpys_to_the_last_bit() -> None:
    values = np.random.default_rng(3).lognormal(size=1000)
    assert columns.moments([values]).mean == values.mean()


@given(arrays.arrays(np.float64, st.integers(1, 9), elements=st.sampled_from([0.0, 1.0, np.inf, -np.inf])), CUT)
def test_infinite_values_have_numpys_mean_however_they_are_cut(values: np.ndarray, places: list[int]) -> None:
    with np.errstate(invalid="ignore"):
        assert columns.moments(cut(values, places)).mean == pytest.approx(values.mean(), nan_ok=True)


@given(arrays.arrays(np.float64, st.integers(0, 60), elements=st.floats(-2, 2)), CUT)
def test_histograms_and_extremes_are_numpys(values: np.ndarray, places: list[int]) -> None:
    edges = np.linspace(-1.0, 1.0, 9)
    np.testing.assert_array_equal(columns.histogram(cut(values, places), edges), np.histogram(values, edges)[0])
    low, high = columns.extremes(cut(values, places))
    assert (low, high) == (values.min(), values.max()) if len(values) else np.isnan(low) and np.isnan(high)


def test_a_mapped_column_is_computed_each_time_and_only_from_columns_cut_alike() -> None:
    both = columns.mapped(np.add, [np.ones(2), np.ones(1)], [np.ones(2), np.zeros(1)])
    assert [list(values) for values in both] == [list(values) for values in both] == [[2.0, 2.0], [1.0]]
    with pytest.raises(ValueError):
        list(columns.mapped(np.add, [np.ones(2)], [np.ones(1), np.ones(1)]))
