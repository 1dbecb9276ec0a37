"""What a format is: the arrays it reads, the files it makes of them, and how a shard's images are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maehpc import files
from maehpc.report.export.chosen import Chosen, Part

Write = Callable[[Part], None]
"""Writes chosen images of a shard; shards come in rising order."""


class Format(Protocol):
    """A kind of files."""

    def check(self, chosen: Chosen) -> None:
        """Refuses what cannot be written.

        Raises:
            InputError: a map is not of a kind that the format holds.
        """

    def arrays(self, chosen: Chosen) -> list[str]:
        """Names of the arrays that are read."""

    def count(self, chosen: Chosen, images: int) -> int:
        """Files of so many images."""

    def writing(self, folder: Path, chosen: Chosen) -> AbstractContextManager[Write]:
        """Opens the files in a folder; what is written in the block is there, whole, when it has ended well.

        Raises:
            RunError: the disk refused.
        """


@dataclass(frozen=True)
class FilesOfImages:
    """A file an image and method.

    Attributes:
        suffix: of the files' names.
        beside: names of the arrays that are read beside the maps, as far as a store has them.
        check: refuses what cannot be written.
        encode: (what is exported, a shard's images, place of the image among these, method) to the file's bytes.
    """

    suffix: str
    beside: tuple[str, ...]
    check: Callable[[Chosen], None]
    encode: Callable[[Chosen, Part, int, str], bytes]

    def arrays(self, chosen: Chosen) -> list[str]:
        """The maps, and what stands beside them."""
        return [*chosen.methods, *(name for name in self.beside if name in chosen.store.layout.arrays)]

    def count(self, chosen: Chosen, images: int) -> int:
        """One an image and method."""
        return images * len(chosen.methods)

    @contextmanager
    def writing(self, folder: Path, chosen: Chosen) -> Iterator[Write]:
        """Writes each file whole as soon as it is made."""

        def write(part: Part) -> None:
            for place, image in enumerate(part.images):
                for method in chosen.methods:
                    data = self.encode(chosen, part, place, method)
                    files.write_bytes(folder / f"image-{image:05d}-{method}{self.suffix}", data)

        yield write
