"""Statistics of scores over a data set: what one row of the table says about one method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22  # bounds the bootstrap's memory to about 100 MiB, whatever the number of images


@dataclass(frozen=True)
class MethodScores:
    """Scores of one method, one row an image.

    Attributes:
        samples: [N, n] relative change of the map a perturbation; NaN where the unperturbed map is all zero.
        maximum: [N] max explanation sensitivity (Yeh et al. 2019, equation 1, over n samples).
        mean: [N] mean over the samples.
        completeness: [N] |sum of the map - (f(x) - f(b))| / |f(x) - f(b)|; NaN where the method promises none.
    """

    samples: Floats
    maximum: Floats
    mean: Floats
    completeness: Floats


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
        "zero_maps": float(np.isnan(scores.maximum).sum()) if measured else np.nan,
        "completeness": _over(np.median, _known(scores.completeness)),
    }


def _known(values: Floats) -> Floats:
    return values[~np.isnan(values)]


def _over(statistic: Callable[[Floats], np.floating], values: Floats) -> float:
    return float(statistic(values)) if len(values) else np.nan
