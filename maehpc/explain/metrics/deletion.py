"""Deletion: how fast the explained class loses its probability as the most attributed pixels are removed."""

from __future__ import annotations

from maehpc.explain.metrics.shared.removal import Removal


class Deletion(Removal):
    """Area under the probability over the share of pixels removed.

    Petsiuk et al. remove 224 pixels at a time of 224 x 224 and replace them by 0 in normalised space; here the number
    of steps is an option, 32 by default. Pixels that a map upsampled from patches makes equal are removed in a random
    order. Quantus' nearest relative, PixelFlipping, removes single channels of a pixel, replaces them by black by
    default, and sums the curve over steps instead of over shares of the image.
    """

    title = "Deletion"
    source = "Petsiuk et al. 2018, deletion metric"
    unit = "probability, 0 to 1"
    better = "lower"
    meaning = "Mean probability of the explained class while its most attributed pixels are removed, step by step"
    forwards_each = 33
    numbers = (("", 1), ("curve", 33))
    inserts = False
