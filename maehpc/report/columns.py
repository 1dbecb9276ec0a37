"""Statistics of a column that need not fit in memory: arrays that come one after the other, as often as asked.

A column is any iterable that may be gone through again: a list of arrays, or what `Gathered` reads from the disk. All
of its arrays together are the values; how they are cut changes no count, no order statistic and no histogram, and
moments within rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = Iterable[NDArray[Any]]
Floats = NDArray[np.float64]

HELD = 1 << 18
"""Values that are sorted in memory; among more, the one that is sought is narrowed down first."""
_DIGIT = 16
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True)
class Mapped:
    """A column computed from others, array by array.

    Attributes:
        function: of one array of each column.
        columns: cut alike.
    """

    function: Callable[..., NDArray[Any]]
    columns: tuple[Column, ...]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self.function(*arrays) for arrays in zip(*self.columns, strict=True))


def mapped(function: Callable[..., NDArray[Any]], *columns: Column) -> Column:
    """A column computed from others that are cut alike, anew each time it is gone through."""
    return Mapped(function, columns)


def known(column: Column) -> Column:
    """A column's values without NaN."""
    return mapped(_known, column)


def _known(values: Floats) -> Floats:
    return values[~np.isnan(values)]


@dataclass(frozen=True)
class Moments:
    """Of n values: their number, mean (NaN of none) and sum of squared deviations from it."""

    count: int
    mean: float
    squares: float

    @property
    def std(self) -> float:
        """The sample standard deviation; NaN for fewer than two values."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan


def moments(column: Column) -> Moments:
    """Number, mean and spread; arrays are put together as Chan, Golub and LeVeque (1979) do."""
    count, mean, squares = 0, math.nan, 0.0
    for values in column:
        if not values.size:
            continue
        ours = float(np.mean(values))
        with np.errstate(invalid="ignore"):
            deviations = float(np.square(values - ours).sum())
        if not count:
            count, mean, squares = values.size, ours, deviations
            continue
        total, apart = count + values.size, ours - mean
        if not math.isfinite(apart):  # of infinite values the sum alone means something
            count, mean, squares = total, mean + ours, math.nan
            continue
        squares += deviations + apart * apart * count * values.size / total
        mean += apart * values.size / total
        count = total
    return Moments(count, mean, squares)


def count(column: Column) -> int:
    """How many values there are."""
    return sum(values.size for values in column)


def extremes(column: Column) -> tuple[float, float]:
    """The least and the largest value; NaN of none."""
    ends = [(values.min(), values.max()) for values in column if values.size]
    return (float(min(low for low, _ in ends)), float(max(high for _, high in ends))) if ends else (math.nan, math.nan)


def histogram(column: Column, edges: Floats) -> NDArray[np.int64]:
    """[len(edges) - 1] how many values lie between two edges, as `np.histogram` counts."""
    counts = np.zeros(len(edges) - 1, np.int64)
    for values in column:
        counts += np.histogram(values, edges)[0]
    return counts


def quantiles(column: Column, parts: Sequence[float]) -> list[float]:
    """Quantiles with linear interpolation, as `np.quantile` has them; NaN of no values.

    Args:
        column: without NaN.
        parts: each in [0, 1].
    """
    number = count(column)
    if not number:
        return [math.nan] * len(parts)
    places = [part * (number - 1) for part in parts]
    ranks = sorted({end for place in places for end in (math.floor(place), math.ceil(place))})
    found = dict(zip(ranks, order_statistics(column, ranks), strict=True))
    return [_between(found[math.floor(place)], found[math.ceil(place)], place - math.floor(place)) for place in places]


def _between(low: float, high: float, part: float) -> float:
    return high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part


def median(column: Column) -> float:
    """The median; NaN of no values."""
    return quantiles(column, (0.5,))[0]


def order_statistics(column: Column, ranks: Sequence[int]) -> list[float]:
    """The values at some places of the sorted column.

    Each time through, sixteen more bits of each value that is sought are settled, until few enough values share them
    to be sorted: twice through is usual, five times the most, and memory does not grow with the column.

    Args:
        column: without NaN.
        ranks: from 0; each less than the number of values.
    """
    sought = [_Sought(rank, count(column)) for rank in ranks]
    while any(one.among > HELD and one.bits < 64 for one in sought):
        prefixes = {(one.bits, one.prefix) for one in sought if one.among > HELD and one.bits < 64}
        tallies = {prefix: np.zeros(1 << _DIGIT, np.int64) for prefix in prefixes}
        for values in column:
            keys = _keys(values)
            for (bits, prefix), tally in tallies.items():
                digits = (_sharing(keys, bits, prefix) >> np.uint64(64 - bits - _DIGIT)) & np.uint64((1 << _DIGIT) - 1)
                tally += np.bincount(digits.astype(np.int64), minlength=len(tally))
        for one in sought:
            if (one.bits, one.prefix) in tallies:
                one.narrow(tallies[one.bits, one.prefix])
    kept: dict[tuple[int, int], list[NDArray[np.uint64]]] = {}
    for one in sought:
        if one.bits < 64:
            kept[one.bits, one.prefix] = []
    for values in column if kept else ():
        keys = _keys(values)
        for (bits, prefix), parts in kept.items():
            parts.append(_sharing(keys, bits, prefix))
    ordered = {prefix: np.sort(np.concatenate(parts)) for prefix, parts in kept.items()}
    found = [one.prefix if one.bits == 64 else int(ordered[one.bits, one.prefix][one.rank]) for one in sought]
    return [float(value) for value in _values(np.array(found, np.uint64))]


@dataclass
class _Sought:
    """One place: its rank among the values whose first `bits` bits are `prefix`, and how many those are."""

    rank: int
    among: int
    bits: int = 0
    prefix: int = 0

    def narrow(self, tally: NDArray[np.int64]) -> None:
        up_to = np.cumsum(tally)
        digit = int(np.searchsorted(up_to, self.rank, side="right"))
        self.rank -= int(up_to[digit - 1]) if digit else 0
        self.among = int(tally[digit])
        self.bits += _DIGIT
        self.prefix = self.prefix << _DIGIT | digit


def _keys(values: NDArray[Any]) -> NDArray[np.uint64]:
    """Integers in the order of the numbers: a negative's bits are turned round, a positive's sign bit is set."""
    bits = np.ascontiguousarray(values, np.float64).ravel().view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _values(keys: NDArray[np.uint64]) -> Floats:
    return np.where(keys & _SIGN, keys & ~_SIGN, ~keys).view(np.float64)


def _sharing(keys: NDArray[np.uint64], bits: int, prefix: int) -> NDArray[np.uint64]:
    return keys[keys >> np.uint64(64 - bits) == prefix] if bits else keys


def place_of(column: Column, rank: int) -> int:
    """Where in a column the value stands that has a rank among those that are not NaN; equal values rank as they stand.

    Args:
        column: may hold NaN.
        rank: from 0; less than the number of values that are not NaN.
    """
    (value,) = order_statistics(known(column), (rank,))
    rank -= sum(int((values < value).sum()) for values in column)
    before = 0
    for values in column:
        equal = np.flatnonzero(values == value)
        if rank < len(equal):
            return before + int(equal[rank])
        rank -= len(equal)
        before += len(values)
    raise ValueError("the column has fewer values")


def value_at(column: Column, place: int) -> float:
    """The value that stands at a place, counted over all arrays."""
    for values in column:
        if place < len(values):
            return float(values[place])
        place -= len(values)
    raise IndexError(place)
