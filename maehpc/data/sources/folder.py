"""Folders of image files: ROOT/{train,val,test}/CLASS/FILE, or ROOT/CLASS/FILE, which is then split here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from maehpc import files
from maehpc.data.catalogue import SPLITS, SplitName, dataset_name
from maehpc.data.sources.raw import Images, Labels, RawSplits, one_line, plain_task
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
    """One image as uint8 [size, size, channels]: centre-cropped to a square, then resized bicubically."""
    with _opened(path) as image:
        try:
            plain = _eight_bit(image).convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{path} is a damaged image ({one_line(error)}); replace or remove it") from error
    fitted = ImageOps.fit(plain, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.uint8).reshape(size, size, channels)


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

    def fingerprint(self) -> str | None:
        """Digest of every image's path and bytes."""
        if not self.root.is_dir():
            return None
        names = [path.relative_to(self.root).as_posix() for path, _ in self._files]
        with files.reading(self.root):
            return files.digest([[name, files.sha256_file(self.root / name)] for name in names])

    def _indices(self, labels: Labels) -> dict[SplitName, Labels]:
        if self._presplit:
            top = [path.relative_to(self.root).parts[0] for path, _ in self._files]
            return {split: np.flatnonzero([name == split for name in top]) for split in SPLITS}
        order = stratified_order(labels, 0, "folder split")
        test, val = round(TEST_FRACTION * len(order)), round(VAL_FRACTION * len(order))
        return {
            "train": np.sort(order[test + val :]),
            "val": np.sort(order[test : test + val]),
            "test": np.sort(order[:test]),
        }

    def read(self) -> RawSplits:
        """The folder's images, decoded a split at a time.

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
        return RawSplits(
            name=self.name,
            title=self.root.absolute().name,
            task=plain_task(len(classes)),
            classes=tuple(classes),
            labels={split: labels[indices] for split, indices in chosen.items()},
            images=lambda split: np.stack([_decoded(paths[index], self.size, channels) for index in chosen[split]]),
            description=f"image folder {self.root.name}, {splitting}",
            fingerprint=self.fingerprint(),
        )
