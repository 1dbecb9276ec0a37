"""Pictures of maps, at the size of their images and over them; the text of each says what it shows and its scale."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from maehpc.errors import InputError
from maehpc.report.explanations import flat_map, label_in_words, picture
from maehpc.report.export.chosen import Chosen, Part
from maehpc.report.export.formats import FilesOfImages
from maehpc.report.figures.colours import GREY_OPACITY, colour_limit, colour_map, colour_range, grey, opacity
from maehpc.report.methods import Method, method

_WHITE = 255.0


def draw_overlay(
    values: NDArray[np.float32], image: NDArray[np.uint8] | None, size: tuple[int, int], look: Method
) -> NDArray[np.uint8]:
    """A map in colours over its image in grey, [H, W, 3]; the map alone where there is no image.

    Args:
        values: [h, w]; a coarser map is enlarged by bilinear interpolation, which adds no extremes of its own.
        image: [H, W] or [H, W, 3].
        size: H and W.
        look: of the map's method.
    """
    limit = colour_limit(values)
    low, high = colour_range(limit, look)
    enlarged = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
    colours = _WHITE * np.asarray(colour_map(look)((enlarged - low) / (high - low)))[..., :3]
    if image is not None:
        beneath = _WHITE - GREY_OPACITY * (_WHITE - grey(image)[..., None])
        opaque = opacity(enlarged, limit)[..., None]
        colours = (1 - opaque) * beneath + opaque * colours
    return np.rint(colours).astype(np.uint8)


def _check(chosen: Chosen) -> None:
    for name in chosen.methods:
        dims = chosen.store.layout.arrays[name].dims
        if len(dims) - ("channel" in dims) != 2:
            raise InputError(
                f"--to png: {name} of {chosen.store.path} has dimensions {', '.join(dims)} and no picture; use --to "
                "nifti or npy"
            )


def _encode(chosen: Chosen, part: Part, place: int, name: str) -> bytes:
    values = flat_map(name, part.arrays[name][place])
    pixels = part.arrays.get("pixels")
    drawn = draw_overlay(
        values,
        None if pixels is None else picture(pixels[place]),
        (chosen.side("y"), chosen.side("x")),
        method(name),
    )
    written = io.BytesIO()
    Image.fromarray(drawn).save(written, "PNG", pnginfo=_text(chosen, part, place, name, values))
    return written.getvalue()


def _text(chosen: Chosen, part: Part, place: int, name: str, values: NDArray[np.float32]) -> PngInfo:
    about, classes = chosen.attributes, chosen.attributes.classes
    low, high = colour_range(colour_limit(values), method(name))
    text = PngInfo()
    for key, value in {
        "Method": name,
        "Data set": chosen.dataset,
        "Split": about.split,
        "Image": str(part.images[place]),
        "Label": label_in_words(part.arrays["label"][place], classes),
        "Prediction": classes[part.arrays["prediction"][place]],
        "Map minimum": str(values.min()),
        "Map maximum": str(values.max()),
        "First colour": str(low),
        "Last colour": str(high),
    }.items():
        text.add_text(key, value)
    return text


PNG = FilesOfImages(".png", ("label", "prediction", "pixels"), _check, _encode)
