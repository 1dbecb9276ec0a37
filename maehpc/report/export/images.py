"""Images of a split by their indices, as typed: `0,5,10-19`."""

from __future__ import annotations

import re

from maehpc.errors import InputError

_WORD = re.compile(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?")


def parse_images(text: str) -> tuple[range, ...]:
    """Indices and ranges, both ends included, with commas between.

    Returns:
        Rising ranges, with a gap between one and the next.

    Raises:
        InputError: a word is neither.
    """
    spans = []
    for word in text.split(","):
        found = _WORD.fullmatch(word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise InputError(
                f"--images {text}: '{word.strip()}' is neither an index nor a range; give those of the split, such as "
                "0,5,10-19"
            )
        spans.append(range(first, last + 1))
    return _merged(spans)


def _merged(spans: list[range]) -> tuple[range, ...]:
    merged: list[range] = []
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, span.stop))
        else:
            merged.append(span)
    return tuple(merged)


def within(images: tuple[range, ...], span: range) -> list[int]:
    """Those of the images that lie in a span, rising."""
    parts = [range(max(part.start, span.start), min(part.stop, span.stop)) for part in images]
    return [image for part in parts for image in part]
