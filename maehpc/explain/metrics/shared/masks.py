"""Where in an image the object or lesion is: masks or boxes that a user gives by image index."""

from __future__ import annotations

import csv
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from maehpc import files
from maehpc.errors import InputError
from maehpc.explain.methods.base import Options

_COLUMNS = ("image", "x0", "y0", "x1", "y1")


class MaskOptions(Options):
    """Where the object is, of metrics that need to know."""

    masks: str | None = Field(
        None,
        description=".npy or .npz file of masks [image, row, column], or .csv file of boxes, of the whole split",
    )
    box_side: Annotated[int, Field(gt=0)] | None = Field(
        None, description="side of the square image that boxes refer to, pixels; the encoder's where null"
    )


class Masks:
    """Masks of a split at the encoder's image size.

    Arrays hold one mask an image in the order of the split, whose pixels are inside where they are true or not 0. They
    are resized as images are, aspect not kept, to the nearest pixel. A box covers the pixels whose centres lie in
    [x0, x1) x [y0, y1); several boxes of an image count together. Images whose mask is empty, and images without a box,
    have none.

    Args:
        metric: name of the metric, for the sentences.
        options: of the metric.
        side: S, of the encoder's image, pixels.
        images: in the split; not known where None.

    Raises:
        InputError: no file was given, or it cannot serve.
    """

    def __init__(self, metric: str, options: MaskOptions, side: int, images: int | None) -> None:
        self._field = f"explain.options.{metric}.masks"
        self._side = side
        if options.masks is None:
            raise InputError(
                f"{self._field} is missing; name a .npy or .npz file with masks [image, row, column] of the split, or "
                f"a .csv file of boxes with columns {','.join(_COLUMNS)}"
            )
        self.path = files.user_path(options.masks)
        if not self.path.is_file():
            raise InputError(f"{self._field}: there is no file {self.path}; name one that holds masks or boxes")
        self._boxes: dict[int, Tensor] | None = None
        self._array: NDArray[Any] | None = None
        if self.path.suffix.lower() == ".csv":
            self._boxes = self._read_boxes(side / (options.box_side or side), images)
        else:
            self._array = self._read_array(images)

    def __call__(self, indices: Tensor, device: torch.device) -> Tensor:
        """Masks of images, bool [B, S, S]; false everywhere where an image has none.

        Args:
            indices: of the images in the split, int64 [B].
            device: where they are wanted.

        Raises:
            InputError: the file has no mask of that index.
        """
        wanted = indices.tolist()
        if self._boxes is not None:
            return torch.stack([self._drawn(self._boxes.get(index)) for index in wanted]).to(device)
        assert self._array is not None
        if max(wanted) >= len(self._array):
            raise InputError(
                f"{self._field}: {self.path} holds {len(self._array)} masks, none for image {max(wanted)}; give one an "
                f"image of the split"
            )
        chosen = torch.from_numpy(self._array[np.asarray(wanted)] != 0).to(device)
        size = (self._side, self._side)
        return F.interpolate(chosen[:, None].float(), size=size, mode="nearest-exact")[:, 0] > 0

    def _read_array(self, images: int | None) -> NDArray[Any]:
        try:
            with self.path.open("rb") as handle:
                loaded = np.load(handle, allow_pickle=False)
                if isinstance(loaded, np.lib.npyio.NpzFile):
                    name = "masks" if "masks" in loaded.files else loaded.files[0]
                    if len(loaded.files) > 1 and name != "masks":
                        raise InputError(
                            f"{self._field}: {self.path} holds several arrays ({', '.join(loaded.files)}); call that "
                            f"of the masks 'masks'"
                        )
                    loaded = loaded[name]
        except (OSError, ValueError, EOFError, IndexError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{self._field}: {self.path} is no array of NumPy's that can be read; give a .npy, .npz or .csv file"
            ) from error
        if loaded.ndim != 3 or loaded.dtype.kind not in "biu" or not loaded.size:
            raise InputError(
                f"{self._field}: {self.path} holds {loaded.dtype} {list(loaded.shape)}; masks are boolean or whole "
                f"numbers, [image, row, column]"
            )
        if images is not None and len(loaded) != images:
            raise InputError(
                f"{self._field}: {self.path} holds {len(loaded)} masks for {images} images; give one an image of the "
                f"split"
            )
        array: NDArray[Any] = loaded
        return array

    def _read_boxes(self, scale: float, images: int | None) -> dict[int, Tensor]:
        """[n, 4] boxes (x0, y0, x1, y1) by image, in pixels of the encoder's image."""
        found: dict[int, list[list[float]]] = defaultdict(list)
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as handle:
                reader = csv.DictReader(handle)
                missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
                if missing:
                    raise InputError(f"{self._field}: {self.path} has no column {missing[0]}; add it to its first line")
                for row in reader:
                    image, box = _box(row)
                    if image < 0 or (images is not None and image >= images) or box[0] >= box[2] or box[1] >= box[3]:
                        raise ValueError
                    found[image].append([value * scale for value in box])
        except (ValueError, TypeError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise InputError(
                f"{self._field}: line {reader.line_num} of {self.path} is no box; write the image's index in the split "
                f"and x0 < x1, y0 < y1 in pixels"
            ) from error
        except OSError as error:
            raise InputError(f"{self._field}: {self.path} cannot be read; make it readable") from error
        return {image: torch.tensor(boxes) for image, boxes in found.items()}

    def _drawn(self, boxes: Tensor | None) -> Tensor:
        if boxes is None:
            return torch.zeros(self._side, self._side, dtype=torch.bool)
        centre = torch.arange(self._side) + 0.5
        low, high = boxes[:, :2, None], boxes[:, 2:, None]
        within = (centre >= low) & (centre < high)  # [n, (x, y), S]
        return (within[:, 1, :, None] & within[:, 0, None, :]).any(dim=0)


def _box(row: dict[str, str]) -> tuple[int, list[float]]:
    box = [float(row[column]) for column in _COLUMNS[1:]]
    if not all(np.isfinite(box)):
        raise ValueError
    return int(row["image"]), box


def digest(path: Path) -> str:
    """SHA-256 of the file, which decides a metric's values as the recipe does."""
    with files.reading(path):
        return files.sha256_file(path)
