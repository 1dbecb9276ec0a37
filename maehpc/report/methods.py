"""How each explanation method is named and drawn, so that tables, figures and page agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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


_METHODS = {
    "saliency": Method("Saliency", "#0072B2", signed=False, over_channels="largest"),
    "gradcam": Method("GradCAM", "#D55E00", overlay=True),
    "deeplift-captum": Method("DeepLIFT (captum)", "#009E73"),
}


def method(name: str) -> Method:
    """The appearance of a method; one without its own is drawn signed, in grey, under its own name."""
    return _METHODS.get(name, Method(name, "#555555"))
