"""Insertion: how fast the explained class gains its probability as the most attributed pixels are put in."""

from __future__ import annotations

from pydantic import Field

from maehpc.explain.metrics.shared.removal import Fill, Removal


class Insertion(Removal):
    """Area under the probability over the share of pixels put into the blurred image.

    Petsiuk et al. blur by a Gaussian of sigma 5 pixels cut to 11 x 11 pixels, 224 pixels a step; here the Gaussian is
    cut at three sigma and the number of steps is an option, 32 by default.
    """

    title = "Insertion"
    source = "Petsiuk et al. 2018, insertion metric"
    unit = "probability, 0 to 1"
    better = "higher"
    meaning = "Mean probability of the explained class while its most attributed pixels are put into a blurred image"
    forwards_each = 33
    numbers = (("", 1), ("curve", 33))
    inserts = True

    class Options(Removal.Options):
        """How pixels come."""

        fill: Fill = Field("blur", description="what is there without a pixel: 0 in normalised space, black, or blur")
