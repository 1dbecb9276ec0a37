"""Repeated measurements and what is made of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import maehpc

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Figure:
    """One quantity, measured several times.

    Attributes:
        name: what was measured.
        unit: of the values.
        values: as they came.
    """

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def text(self) -> str:
        """Median, and the range where there is one."""
        spread = f" ({_digits(min(self.values))} – {_digits(max(self.values))})" if len(self.values) > 1 else ""
        return f"{_digits(self.median)} {self.unit}{spread}"

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "least": min(self.values),
            "most": max(self.values),
            "values": list(self.values),
        }


def _digits(value: float) -> str:
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Ratio:
    """A figure beside a peer's: what is paid for what a bare program does not do."""

    name: str
    value: float
    meaning: str

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {"name": self.name, "value": self.value, "meaning": self.meaning}


@dataclass(frozen=True)
class Part:
    """One part of a benchmark.

    Attributes:
        name: of the part.
        conditions: what was run, in words.
        figures: measured.
        ratios: of them.
    """

    name: str
    conditions: str
    figures: tuple[Figure, ...]
    ratios: tuple[Ratio, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "name": self.name,
            "conditions": self.conditions,
            "figures": [figure.as_json() for figure in self.figures],
            "ratios": [ratio.as_json() for ratio in self.ratios],
        }

    def lines(self) -> list[str]:
        """For people."""
        rows = [(figure.name, figure.text()) for figure in self.figures]
        rows += [(ratio.name, f"{ratio.value:.3g} ({ratio.meaning})") for ratio in self.ratios]
        width = max(len(name) for name, _ in rows)
        return [f"{self.name}: {self.conditions}", *(f"  {name:{width}}  {text}" for name, text in rows)]


@dataclass(frozen=True)
class Report:
    """A benchmark's parts, and what they are true of.

    Attributes:
        benchmark: its name.
        around: `surroundings`.
        parts: of it.
        results: documented keys, for scripts that read a few numbers.
    """

    benchmark: str
    around: dict[str, Any]
    parts: tuple[Part, ...]
    results: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        parts = [part.as_json() for part in self.parts]
        return {"benchmark": self.benchmark, **self.around, **self.results, "parts": parts}

    def lines(self) -> list[str]:
        """For people."""
        return [line for part in self.parts for line in part.lines()]


def surroundings(device: torch.device | None = None) -> dict[str, Any]:
    """What a figure is true of: the machine, the versions, and how busy the machine was with other work.

    Args:
        device: what computes; a GPU where there is one, if None.
    """
    import torch

    from maehpc.devices import choose_device, machine

    return {
        "machine": machine(device or choose_device("auto")),
        "load_average": list(os.getloadavg()),
        "torch": torch.__version__,
        "maehpc": maehpc.__version__,
    }


def figure(name: str, unit: str, values: Sequence[float]) -> Figure:
    """A figure of measurements in any sequence."""
    assert values, name
    return Figure(name, unit, tuple(values))
