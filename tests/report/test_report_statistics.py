"""Statistics are held to slow versions written again, and to closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from maehpc.report import statistics
from maehpc.report.statistics import (
    MethodScores,
    Searched,
    flip_free_maximum,
    mean_interval,
    summarise,
    summarise_metric,
    summarise_search,
)


def cut(values: np.ndarray) -> list[np.ndarray]:
    """A column of two arrays, as a large store has many."""
    return np.array_split(values, 2)


def scores(samples: np.ndarray, completeness: np.ndarray | None = None) -> MethodScores:
    unknown = np.full(len(samples), np.nan)
    measured = samples.shape[1] > 0
    return MethodScores(
        samples=cut(samples),
        maximum=cut(samples.max(1) if measured else unknown),
        mean=cut(samples.mean(1) if measured else unknown),
        completeness=cut(unknown if completeness is None else completeness),
        floor=cut(unknown),
    )


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_summary_worked_out_by_hand() -> None:
    samples = np.array([[1.0, 3.0], [2.0, 1.0], [np.nan, np.nan], [6.0, 7.0]])
    flipped = np.array([[False, True], [False, False], [True, False], [True, True]])
    result = summarise(scores(samples, np.array([0.1, 0.3, np.nan, 0.2])), cut(flipped), rng())
    assert result["sensitivity_max_mean"] == pytest.approx(4.0)  # of 3, 2, 7
    assert result["sensitivity_max_std"] == pytest.approx(np.sqrt(7.0))  # ((1 + 4 + 9) / 2)
    assert result["sensitivity_max_median"] == 3.0
    assert (result["sensitivity_max_q25"], result["sensitivity_max_q75"]) == (2.5, 5.0)
    assert result["sensitivity_mean"] == pytest.approx((2 + 1.5 + 6.5) / 3)
    assert result["flips"] == 0.5
    assert result["sensitivity_max_flip_free"] == 1.5  # of 1 and 2; the last image always flips
    assert result["zero_maps"] == 1
    assert result["completeness"] == pytest.approx(0.2)
    assert 2.0 <= result["sensitivity_max_ci_low"] < 4.0 < result["sensitivity_max_ci_high"] <= 7.0


def test_what_was_not_measured_is_nan_and_no_zero() -> None:
    result = summarise(scores(np.zeros((3, 0))), cut(np.zeros((3, 0), np.bool_)), rng())
    assert all(np.isnan(value) for value in result.values())


def test_a_search_worked_out_by_hand() -> None:
    samples = np.array([[1.0, 3.0], [2.0, 1.0], [np.nan, np.nan], [6.0, 7.0]])
    flipped = np.array([[False, True], [False, False], [True, False], [True, True]])
    nan = np.nan
    found = Searched(
        change=cut(np.array([4.0, 1.0, nan, 10.0])),
        top=cut(np.array([0.5, 1.0, nan, nan])),
        spearman=cut(np.array([0.5, -0.25, nan, 0.0])),
        centre=cut(np.array([0.0, 0.125, nan, 0.25])),
    )
    floor = cut(np.array([1e-6, nan, nan, 3e-6]))
    whole = replace(scores(samples), searched={"pgd": found, "topk": found}, floor=floor)
    result = summarise_search(found, whole, cut(flipped), rng())
    assert (result["images"], result["change_mean"], result["change_median"]) == (3, 5.0, 4.0)
    assert result["random_max_mean"] == 4.0  # of 3, 2, 7
    assert result["ratio_to_random_max"] == 1.25
    assert result["ratio_to_flip_free_max"] == pytest.approx(2.5 / 1.5)  # of 4 and 1 against 1 and 2
    assert (result["top_mean"], result["centre_mean"]) == (0.75, 0.125)
    assert result["spearman_mean"] == pytest.approx(0.25 / 3)
    assert 1.0 <= result["change_ci_low"] < 5.0 < result["change_ci_high"] <= 10.0
    beside = summarise(whole, cut(flipped), rng())
    assert (beside["pgd_change_mean"], beside["pgd_above_flip_free"]) == (5.0, 0.5)
    assert (beside["noise_floor"], beside["noise_floor_images"]) == (2e-6, 2)


def test_a_search_against_maps_that_never_move_by_chance_has_no_ratio() -> None:
    found = Searched(*(cut(np.array([1.0, 2.0])),) * 4)
    result = summarise_search(found, scores(np.zeros((2, 3))), cut(np.zeros((2, 3), np.bool_)), rng())
    assert result["random_max_mean"] == 0
    assert np.isnan([result["ratio_to_random_max"], result["ratio_to_flip_free_max"]]).all()


def test_metrics_worked_out_by_hand() -> None:
    values = cut(np.array([1.0, np.nan, 3.0, np.inf]))
    result = summarise_metric(values, rng())
    assert (result["images"], result["mean"]) == (2, 2.0)
    assert result["std"] == pytest.approx(np.sqrt(2))
    assert 1.0 <= result["ci_low"] < result["ci_high"] <= 3.0
    assert np.isnan(summarise_metric(values, None)["ci_low"])
    none = summarise_metric(cut(np.full(3, np.nan)), rng())
    assert none.pop("images") == 0
    assert all(np.isnan(value) for value in none.values())


def test_all_maps_zero() -> None:
    result = summarise(scores(np.full((3, 2), np.nan)), cut(np.zeros((3, 2), np.bool_)), rng())
    assert result.pop("zero_maps") == 3
    assert result.pop("flips") == 0
    assert all(np.isnan(value) for value in result.values())


def test_one_image_has_a_mean_but_no_spread() -> None:
    result = summarise(scores(np.array([[0.5, 0.25]])), cut(np.zeros((1, 2), np.bool_)), rng())
    assert result["sensitivity_max_mean"] == 0.5
    assert np.isnan([result["sensitivity_max_std"], result["sensitivity_max_ci_low"]]).all()


@given(
    arrays.arrays(
        np.float64, st.tuples(st.integers(1, 6), st.integers(0, 4)), elements=st.floats(0, 9) | st.just(np.nan)
    ),
    st.randoms(use_true_random=False),
)
def test_flip_free_maximum_equals_a_loop(samples: np.ndarray, random: object) -> None:
    flipped = np.array([[random.random() < 0.5 for _ in row] for row in samples], np.bool_).reshape(samples.shape)
    expected = []
    for row, flips in zip(samples, flipped, strict=True):
        kept = [value for value, flip in zip(row, flips, strict=True) if not flip and not np.isnan(value)]
        expected.append(max(kept) if kept else np.nan)
    np.testing.assert_array_equal(flip_free_maximum(samples, flipped), expected)


def test_bootstrap_agrees_with_resampling_in_a_loop() -> None:
    values = np.random.default_rng(1).lognormal(size=40)
    other = np.random.default_rng(2)
    means = sorted(np.mean([values[other.integers(40)] for _ in range(40)]) for _ in range(4000))
    low, high = mean_interval(cut(values), rng())
    spread = np.std(values) / np.sqrt(40)
    assert low == pytest.approx(means[100], abs=0.12 * spread)
    assert high == pytest.approx(means[3900], abs=0.25 * spread)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(3)
    intervals = [mean_interval(cut(draws.normal(5, 2, 60)), rng()) for _ in range(150)]
    covered = np.mean([low <= 5 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99


def test_bootstrap_is_decided_by_its_generator() -> None:
    values = np.random.default_rng(1).lognormal(size=30)
    assert mean_interval(cut(values), rng()) == mean_interval(cut(values), rng())
    assert mean_interval(cut(values), rng()) != mean_interval(cut(values), np.random.default_rng(8))


def test_bootstrap_of_equal_values_is_that_value() -> None:
    assert mean_interval(cut(np.full(9, 0.25)), rng()) == (0.25, 0.25)


def test_of_many_values_the_interval_is_students_and_the_bootstrap_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).lognormal(size=5000)
    resampled = mean_interval(cut(values), rng())
    monkeypatch.setattr(statistics, "RESAMPLED", 4999)
    found = mean_interval(cut(values), rng())
    expected = scipy.stats.t.interval(0.95, 4999, loc=values.mean(), scale=scipy.stats.sem(values))
    assert found == pytest.approx(expected, rel=1e-12)
    assert found == pytest.approx(resampled, abs=0.1 * (found[1] - found[0]))
