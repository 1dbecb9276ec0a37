"""Folders of image files: ROOT/{train,val,test}/CLASS/FILE, or ROOT/CLASS/FILE, which is then split here.

Each split is put in a fixed keyed order in which every beginning holds the classes in their proportions: the first N
images of a split, which is what a limited run explains, then stand for all of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from maehpc import files
from maehpc.catalogue import SPLITS, SplitName, dataset_name
from maehpc.data.blocks import blocks
from maehpc.data.sources.raw import Images, ImageStream, Labels, RawSplits, one_line, plain_task
from maehpc.data.subset import stratified_order
from maehpc.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
TEST_FRACTION, VAL_FRACTION = 0.2, 0.1

_GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B"})
_LAYOUT = "ROOT/{train,val,test}/CLASS/*.png or ROOT/CLASS/*.png"


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    """The images directly or deeper inside one class folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image ({one_line(error)}); replace or remove it") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would clip it at 255."""
    if image.mode.startswith("I"):
        scaled = np.rint(np.clip(np.asarray(image).astype(np.float64), 0, 65535) / 257)
        return Image.fromarray(scaled.astype(np.uint8))
    return image


def _decoded(path: Path, size: int, channels: int) -> Images:
    """One image as uint8 [size, size, channels]: upright, centre-cropped to a square, then resized bicubically."""
    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            plain = _eight_bit(upright).convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, struct.error) as error:
            raise InputError(f"{path} is a damaged image ({one_line(error)}); replace or remove it") from error
    fitted = ImageOps.fit(plain, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.uint8).reshape(size, size, channels)


def _decoded_blocks(paths: list[Path], size: int, channels: int) -> Iterator[Images]:
    for part in blocks(len(paths), size * size * channels):
        block = np.empty((part.stop - part.start, size, size, channels), dtype=np.uint8)
        for position, path in enumerate(paths[part]):
            block[position] = _decoded(path, size, channels)
        yield block


def _is_grey(path: Path) -> bool:
    with _opened(path) as image:
        return image.mode in _GREY_MODES


@dataclass(frozen=True)
class FolderSource:
    """A folder of images whose subfolders are the classes; grey where every file is grey, RGB otherwise."""

    root: Path
    size: int

    @property
    def name(self) -> str:
        """The folder's name, made safe."""
        return dataset_name(str(self.root))

    @property
    def pack_name(self) -> str:
        """Name and size."""
        return f"{self.name}-{self.size}"

    def where(self) -> str | None:
        """The folder's path where it exists."""
        return str(self.root) if self.root.is_dir() else None

    @cached_property
    def _presplit(self) -> bool:
        """Whether the folder brings splits of its own.

        Raises:
            InputError: it brings some but not all of them.
        """
        names = {path.name for path in _subfolders(self.root)}
        there = [split for split in SPLITS if split in names]
        if there and len(there) < len(SPLITS):
            missing = next(split for split in SPLITS if split not in names)
            raise InputError(f"{self.root} has a folder {there[0]} but none {missing}; use {_LAYOUT}")
        return bool(there)

    @cached_property
    def _files(self) -> list[tuple[Path, str]]:
        """Every image with its class, in a fixed order."""
        if not self.root.is_dir():
            raise InputError(f"{self.root} does not exist; give a folder laid out as {_LAYOUT}")
        tops = [self.root / split for split in SPLITS] if self._presplit else [self.root]
        found = [(path, folder.name) for top in tops for folder in _subfolders(top) for path in _image_files(folder)]
        if len({label for _, label in found}) < 2:
            raise InputError(f"{self.root} holds images of fewer than two classes; lay it out as {_LAYOUT}")
        return found

    def fingerprint(self) -> str:
        """Digest of every image's path and bytes.

        Raises:
            InputError: the folder is absent or laid out wrongly.
        """
        names = [path.relative_to(self.root).as_posix() for path, _ in self._files]
        with files.reading(self.root):
            return files.digest([[name, files.sha256_file(self.root / name)] for name in names])

    def _indices(self, labels: Labels) -> dict[SplitName, Labels]:
        """Each split's images, in the order of the pack."""
        if self._presplit:
            top = np.array([path.relative_to(self.root).parts[0] for path, _ in self._files])
            members = {split: np.flatnonzero(top == split) for split in SPLITS}
            return {
                split: indices[stratified_order(labels[indices], 0, f"folder {split}")]
                for split, indices in members.items()
            }
        order = stratified_order(labels, 0, "folder split")
        test, val = round(TEST_FRACTION * len(order)), round(VAL_FRACTION * len(order))
        return {"train": order[test + val :], "val": order[test : test + val], "test": order[:test]}

    def read(self) -> RawSplits:
        """The folder's images, decoded as they are taken.

        Raises:
            InputError: the layout or a file is wrong.
        """
        paths = [path for path, _ in self._files]
        classes = sorted({label for _, label in self._files})
        number = {label: index for index, label in enumerate(classes)}
        labels = np.array([number[label] for _, label in self._files], dtype=np.int64)
        chosen = self._indices(labels)
        for split, indices in chosen.items():
            if not len(indices):
                raise InputError(f"{self.root} leaves no image for the {split} split; add images to it")
        channels = 1 if all(_is_grey(path) for path in paths) else 3
        splitting = "its own splits" if self._presplit else "fixed class-wise split of 70/10/20 %"

        def images(split: SplitName) -> ImageStream:
            chosen_paths = [paths[index] for index in chosen[split]]
            shape = (len(chosen_paths), self.size, self.size, channels)
            return ImageStream(shape, _decoded_blocks(chosen_paths, self.size, channels))

        return RawSplits(
            name=self.name,
            title=self.root.absolute().name,
            task=plain_task(len(classes)),
            classes=tuple(classes),
            labels={split: labels[indices] for split, indices in chosen.items()},
            images=images,
            description=f"image folder {self.root.name}, {splitting}, each in a fixed order that mixes the classes",
            fingerprint=self.fingerprint(),
        )
