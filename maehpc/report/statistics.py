"""Statistics of scores over a data set: what one row of the table says about one method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22  # bounds the bootstrap's memory to about 100 MiB, whatever the number of images


@dataclass(frozen=True)
class Searched:
    """What a search for an adversarial perturbation found, one row an image; NaN where a map is all zero.

    Attributes:
        change: [N] relative change of the map at the perturbation that was kept, the prediction unchanged.
        top: [N] share of the map's top features that are still on top, in [0, 1].
        spearman: [N] rank correlation with the unperturbed map, in [-1, 1].
        centre: [N] shift of the centre of mass, as a share of the image's side.
    """

    change: Floats
    top: Floats
    spearman: Floats
    centre: Floats


@dataclass(frozen=True)
class MethodScores:
    """Scores of one method, one row an image.

    Attributes:
        samples: [N, n] relative change of the map a perturbation; NaN where the unperturbed map is all zero.
        maximum: [N] max explanation sensitivity (Yeh et al. 2019, equation 1, over n samples).
        mean: [N] mean over the samples.
        completeness: [N] |sum of the map - (f(x) - f(b))| / |f(x) - f(b)|; NaN where the method promises none.
        floor: [N] relative difference of the map from the one computed in float64; NaN where it was not measured.
        searched: by kind of search.
        metrics: by metric and part ("" for the metric's own value): [N], or [N, k] for parts with k elements.
    """

    samples: Floats
    maximum: Floats
    mean: Floats
    completeness: Floats
    floor: Floats
    searched: Mapping[str, Searched] = field(default_factory=dict)
    metrics: Mapping[tuple[str, str], Floats] = field(default_factory=dict)


def bootstrap_interval(values: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean at `LEVEL`, from `RESAMPLES` resamples.

    Args:
        values: [N] without NaN.
        rng: the draws; equal generators give equal intervals.

    Returns:
        Low and high end; NaN for fewer than two values.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _DRAWS_AT_ONCE // len(values)),
        confidence_level=LEVEL,
        method="percentile",
        rng=rng,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def flip_free_maximum(samples: Floats, flipped: NDArray[np.bool_]) -> Floats:
    """[N] largest sensitivity over the perturbations that left the prediction alone; NaN where none did.

    Args:
        samples: [N, n] sensitivities.
        flipped: [N, n] whether the perturbation changed the predicted class.
    """
    kept = np.where(flipped, np.nan, samples)
    largest: Floats = np.fmax.reduce(kept, axis=1, initial=np.nan)
    return largest


def summarise(scores: MethodScores, flipped: NDArray[np.bool_], rng: np.random.Generator) -> dict[str, float]:
    """The statistics of one method over its images, by column name (explained in `maehpc.report.tables`).

    An image whose map is all zero has no sensitivity: it is counted, and left out of every other figure.
    Where nothing was measured a figure is NaN.
    """
    maximum = _known(scores.maximum)
    quartiles = np.quantile(maximum, [0.25, 0.5, 0.75]) if len(maximum) else [np.nan] * 3
    low, high = bootstrap_interval(maximum, rng)
    measured = scores.samples.size > 0
    floor = _known(scores.floor)
    return {
        "sensitivity_max_mean": _over(np.mean, maximum),
        "sensitivity_max_ci_low": low,
        "sensitivity_max_ci_high": high,
        "sensitivity_max_std": float(np.std(maximum, ddof=1)) if len(maximum) > 1 else np.nan,
        "sensitivity_max_median": float(quartiles[1]),
        "sensitivity_max_q25": float(quartiles[0]),
        "sensitivity_max_q75": float(quartiles[2]),
        "sensitivity_mean": _over(np.mean, _known(scores.mean)),
        "flips": float(flipped.mean()) if measured else np.nan,
        "sensitivity_max_flip_free": _over(np.median, _known(flip_free_maximum(scores.samples, flipped))),
        "zero_maps": _zero_maps(scores),
        "completeness": _over(np.median, _known(scores.completeness)),
        "noise_floor": _over(np.median, floor),
        "noise_floor_images": float(len(floor)) if len(floor) else np.nan,
        **_worst(scores, flipped),
    }


def _zero_maps(scores: MethodScores) -> float:
    """Images without sensitivity; not known where nothing was perturbed."""
    if scores.samples.size:
        return float(np.isnan(scores.maximum).sum())
    changes = [found.change for found in scores.searched.values()]
    return float(np.isnan(changes[0]).sum()) if changes else np.nan


def _worst(scores: MethodScores, flipped: NDArray[np.bool_]) -> dict[str, float]:
    """What the search for the largest change says beside chance, among perturbations that keep the prediction."""
    found = scores.searched.get("pgd")
    if found is None:
        return {"pgd_change_mean": np.nan, "pgd_above_flip_free": np.nan}
    change, chance = _both(found.change, flip_free_maximum(scores.samples, flipped))
    return {
        "pgd_change_mean": _over(np.mean, _known(found.change)),
        "pgd_above_flip_free": _over(np.mean, (change > chance).astype(np.float64)),
    }


def summarise_search(
    found: Searched, scores: MethodScores, flipped: NDArray[np.bool_], rng: np.random.Generator
) -> dict[str, float]:
    """The statistics of one kind of search over its images, by column name (explained in `maehpc.report.tables`).

    Ratios are of means over the images that have both numbers, so that an image whose map hardly moves by chance does
    not decide them.
    """
    change = _known(found.change)
    low, high = bootstrap_interval(change, rng)
    _, random = _both(found.change, scores.maximum)
    return {
        "images": float(len(change)),
        "change_mean": _over(np.mean, change),
        "change_ci_low": low,
        "change_ci_high": high,
        "change_median": _over(np.median, change),
        "random_max_mean": _over(np.mean, random),
        "ratio_to_random_max": _ratio(found.change, scores.maximum),
        "ratio_to_flip_free_max": _ratio(found.change, flip_free_maximum(scores.samples, flipped)),
        "top_mean": _over(np.mean, _known(found.top)),
        "spearman_mean": _over(np.mean, _known(found.spearman)),
        "centre_mean": _over(np.mean, _known(found.centre)),
    }


def summarise_metric(values: Floats, rng: np.random.Generator | None) -> dict[str, float]:
    """The statistics of a metric over images, by column name (explained in `maehpc.report.tables`).

    Args:
        values: [N]; NaN where the metric is not defined for an image.
        rng: of the bootstrap; None: no interval.
    """
    finite = values[np.isfinite(values)]
    low, high = bootstrap_interval(finite, rng) if rng is not None else (np.nan, np.nan)
    return {
        "images": float(len(finite)),
        "mean": _over(np.mean, finite),
        "ci_low": low,
        "ci_high": high,
        "std": float(np.std(finite, ddof=1)) if len(finite) > 1 else np.nan,
    }


def _both(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    known = ~np.isnan(one) & ~np.isnan(other)
    return one[known], other[known]


def _ratio(one: Floats, other: Floats) -> float:
    """Ratio of the means over the images that have both."""
    one, other = _both(one, other)
    return float(one.mean() / other.mean()) if len(other) and other.mean() > 0 else np.nan


def _known(values: Floats) -> Floats:
    return values[~np.isnan(values)]


def _over(statistic: Callable[[Floats], np.floating], values: Floats) -> float:
    return float(statistic(values)) if len(values) else np.nan
