"""Statistics of scores over a data set: what one row of the table says about one method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from maehpc.report.columns import Column, Floats, count, known, mapped, median, moments, quantiles

RESAMPLES = 2000
LEVEL = 0.95
RESAMPLED = 20_000
"""Values that are resampled at most. Of more, the mean is as good as normally distributed, and resampling would take
hours to say so."""


@dataclass(frozen=True)
class Searched:
    """What a search for an adversarial perturbation found, one row an image; NaN where a map is all zero.

    Attributes:
        change: [N] relative change of the map at the perturbation that was kept, the prediction unchanged.
        top: [N] share of the map's top features that are still on top, in [0, 1].
        spearman: [N] rank correlation with the unperturbed map, in [-1, 1].
        centre: [N] shift of the centre of mass, as a share of the image's side.
    """

    change: Column
    top: Column
    spearman: Column
    centre: Column


@dataclass(frozen=True)
class MethodScores:
    """Scores of one method, one row an image; columns of float64.

    Attributes:
        samples: [N, n] relative change of the map a perturbation; NaN where the unperturbed map is all zero.
        maximum: [N] max explanation sensitivity (Yeh et al. 2019, equation 1, over n samples).
        mean: [N] mean over the samples.
        completeness: [N] |sum of the map - (f(x) - f(b))| / |f(x) - f(b)|; NaN where the method promises none.
        floor: [N] relative difference of the map from the one computed in float64; NaN where it was not measured.
        searched: by kind of search.
        metrics: by metric and part ("" for the metric's own value): [N], or [N, k] for parts with k elements.
        elements: k of those that have some.
    """

    samples: Column
    maximum: Column
    mean: Column
    completeness: Column
    floor: Column
    searched: Mapping[str, Searched] = field(default_factory=dict)
    metrics: Mapping[tuple[str, str], Column] = field(default_factory=dict)
    elements: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def sampled(self) -> bool:
        """Whether there are random perturbations."""
        return any(samples.size for samples in self.samples)


def mean_interval(values: Column, rng: np.random.Generator) -> tuple[float, float]:
    """Interval of the mean at `LEVEL`: percentile bootstrap with `RESAMPLES` resamples; of more than `RESAMPLED`
    values, Student's t.

    Args:
        values: without NaN.
        rng: the draws; equal generators give equal intervals.

    Returns:
        Low and high end; NaN for fewer than two values.
    """
    found = moments(values)
    if found.count < 2:
        return np.nan, np.nan
    if found.count > RESAMPLED:
        half = float(stats.t.ppf((1 + LEVEL) / 2, found.count - 1)) * found.std / found.count**0.5
        return found.mean - half, found.mean + half
    result = stats.bootstrap(
        (np.concatenate(list(values)),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _DRAWS_AT_ONCE // found.count),
        confidence_level=LEVEL,
        method="percentile",
        rng=rng,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


_DRAWS_AT_ONCE = 1 << 22  # bounds the bootstrap's memory to about 100 MiB


def flip_free_maximum(samples: Floats, flipped: NDArray[np.bool_]) -> Floats:
    """[N] largest sensitivity over the perturbations that left the prediction alone; NaN where none did.

    Args:
        samples: [N, n] sensitivities.
        flipped: [N, n] whether the perturbation changed the predicted class.
    """
    kept = np.where(flipped, np.nan, samples)
    largest: Floats = np.fmax.reduce(kept, axis=1, initial=np.nan)
    return largest


def summarise(scores: MethodScores, flipped: Column, rng: np.random.Generator) -> dict[str, float]:
    """The statistics of one method over its images, by column name (explained in `maehpc.report.tables`).

    An image whose map is all zero has no sensitivity: it is counted, and left out of every other figure.
    Where nothing was measured a figure is NaN.

    Args:
        scores: of the method.
        flipped: [N, n] whether a perturbation changed the prediction.
        rng: draws of the bootstrap.
    """
    maximum = known(scores.maximum)
    quartiles = quantiles(maximum, [0.25, 0.5, 0.75])
    low, high = mean_interval(maximum, rng)
    spread, floor = moments(maximum), known(scores.floor)
    floors = count(floor)
    return {
        "sensitivity_max_mean": spread.mean,
        "sensitivity_max_ci_low": low,
        "sensitivity_max_ci_high": high,
        "sensitivity_max_std": spread.std,
        "sensitivity_max_median": quartiles[1],
        "sensitivity_max_q25": quartiles[0],
        "sensitivity_max_q75": quartiles[2],
        "sensitivity_mean": _mean(scores.mean),
        "flips": moments(flipped).mean if scores.sampled else np.nan,
        "sensitivity_max_flip_free": median(known(mapped(flip_free_maximum, scores.samples, flipped))),
        "zero_maps": _zero_maps(scores),
        "completeness": median(known(scores.completeness)),
        "noise_floor": median(floor),
        "noise_floor_images": float(floors) if floors else np.nan,
        **_worst(scores, flipped),
    }


def _zero_maps(scores: MethodScores) -> float:
    """Images without sensitivity; not known where nothing was perturbed."""
    if scores.sampled:
        return float(_unknown(scores.maximum))
    return float(_unknown(next(iter(scores.searched.values())).change)) if scores.searched else np.nan


def _unknown(column: Column) -> int:
    return count(column) - count(known(column))


def _worst(scores: MethodScores, flipped: Column) -> dict[str, float]:
    """What the search for the largest change says beside chance, among perturbations that keep the prediction."""
    found = scores.searched.get("pgd")
    if found is None:
        return {"pgd_change_mean": np.nan, "pgd_above_flip_free": np.nan}
    chance = mapped(flip_free_maximum, scores.samples, flipped)
    return {
        "pgd_change_mean": _mean(found.change),
        "pgd_above_flip_free": moments(mapped(_above, found.change, chance)).mean,
    }


def _above(one: Floats, other: Floats) -> Floats:
    """Where both are known: 1 where the one is larger, else 0."""
    both = ~np.isnan(one) & ~np.isnan(other)
    return (one[both] > other[both]).astype(np.float64)


def summarise_search(
    found: Searched, scores: MethodScores, flipped: Column, rng: np.random.Generator
) -> dict[str, float]:
    """The statistics of one kind of search over its images, by column name (explained in `maehpc.report.tables`).

    Ratios are of means over the images that have both numbers, so that an image whose map hardly moves by chance does
    not decide them.
    """
    change = known(found.change)
    low, high = mean_interval(change, rng)
    return {
        "images": float(count(change)),
        "change_mean": _mean(change),
        "change_ci_low": low,
        "change_ci_high": high,
        "change_median": median(change),
        "random_max_mean": moments(mapped(_where_known, scores.maximum, found.change)).mean,
        "ratio_to_random_max": _ratio(found.change, scores.maximum),
        "ratio_to_flip_free_max": _ratio(found.change, mapped(flip_free_maximum, scores.samples, flipped)),
        "top_mean": _mean(found.top),
        "spearman_mean": _mean(found.spearman),
        "centre_mean": _mean(found.centre),
    }


def summarise_metric(values: Column, rng: np.random.Generator | None) -> dict[str, float]:
    """The statistics of a metric over images, by column name (explained in `maehpc.report.tables`).

    Args:
        values: [N]; NaN where the metric is not defined for an image.
        rng: of the bootstrap; None: no interval.
    """
    finite = mapped(finite_values, values)
    low, high = mean_interval(finite, rng) if rng is not None else (np.nan, np.nan)
    found = moments(finite)
    return {"images": float(found.count), "mean": found.mean, "ci_low": low, "ci_high": high, "std": found.std}


def finite_values(values: Floats) -> Floats:
    """Those that are neither NaN nor infinite."""
    return values[np.isfinite(values)]


def _where_known(one: Floats, other: Floats) -> Floats:
    """Of the one, where both are known."""
    return one[~np.isnan(one) & ~np.isnan(other)]


def _ratio(one: Column, other: Column) -> float:
    """Ratio of the means over the images that have both."""
    above, below = moments(mapped(_where_known, one, other)), moments(mapped(_where_known, other, one))
    return above.mean / below.mean if below.count and below.mean > 0 else np.nan


def _mean(column: Column) -> float:
    return moments(known(column)).mean
