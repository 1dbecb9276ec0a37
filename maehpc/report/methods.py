"""How each explanation method is named and drawn, so that tables, figures and page agree.

What a method's own file says of it decides; a new method needs nothing here.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

from maehpc.recipes import plugins


@dataclass(frozen=True)
class Method:
    """One method's appearance.

    Attributes:
        title: its name in print.
        colour: from the palette of Okabe and Ito (2008), told apart by colour-blind readers.
        signed: whether 0 is the middle of the map's range (evidence for and against) or its lower end.
        overlay: whether the map is laid over the image (coarse maps) or stands alone.
        over_channels: how a map stored with channels becomes one value a pixel, as the explain stage reduces it.
    """

    title: str
    colour: str
    signed: bool = True
    overlay: bool = False
    over_channels: Literal["largest", "sum"] = "sum"


_COLOURS = {"saliency": "#0072B2", "gradcam": "#D55E00", "deeplift": "#009E73", "deeplift-captum": "#CC79A7"}
_FURTHER = ("#E69F00", "#56B4E9", "#000000")
"""For all others, by their names: the same in every report. Two may share one, so figures also name what they show."""

_UNKNOWN = "#555555"


def method(name: str) -> Method:
    """The appearance of a method; one that this package does not know is drawn signed, in grey, under its own name."""
    facts = plugins.facts("methods", name)
    if not facts:
        return Method(name, _UNKNOWN)
    return Method(
        title=facts.get("title", name),
        colour=_COLOURS.get(name) or _FURTHER[zlib.crc32(name.encode()) % len(_FURTHER)],
        signed=facts.get("signed", True),
        overlay=facts.get("kind") == "grid",
        over_channels=facts.get("over_channels", "sum"),
    )
