"""NIfTI-1 volumes: a map an image and method, a voxel a value, as viewers and pipelines of medical imaging read them.

Voxel (i, j, k) is column i, row j and slice k of the map; i varies fastest in the file, as the format has it. A map of
two dimensions has one slice. Channels are kept where a store has them, along the fifth dimension, which the format
gives to the values of a vector. World coordinates are pixels of the image that was explained: the affine is the
identity for maps of pixels, and lays the patches of coarser maps over the pixels they cover. Images say nothing of
millimetres or of a patient's left and right, and neither does the header; a viewer that takes y for a direction upwards
shows row 0 at the bottom.
"""

from __future__ import annotations

import gzip
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from maehpc.errors import InputError
from maehpc.report.export.chosen import Chosen, Part
from maehpc.report.export.formats import FilesOfImages

_CHANNEL = "channel"
_DESCRIPTION = 79
"""Characters of a header's `descrip`, which ends in a zero."""


def to_voxels(values: NDArray[Any], dims: tuple[str, ...]) -> NDArray[Any]:
    """A map of one to three spatial dimensions as NIfTI orders it: [x, y, z], or [x, y, z, 1, channel].

    Args:
        values: of one image.
        dims: names of its dimensions, the spatial ones from the slowest to the fastest (`z`, `y`, `x`).
    """
    spatial = [axis for axis, dim in enumerate(dims) if dim != _CHANNEL]
    further = [axis for axis, dim in enumerate(dims) if dim == _CHANNEL]
    turned = values.transpose(*reversed(spatial), *further)
    shape = turned.shape[: len(spatial)] + (1,) * (3 - len(spatial))
    return turned.reshape(*shape, *((1, values.shape[further[0]]) if further else ()))


def to_pixels(shape: tuple[int, ...], sides: tuple[int, ...]) -> NDArray[np.float64]:
    """The affine [4, 4] from voxels to pixels of the image, whose centres have whole numbers from 0 on.

    Args:
        shape: voxels along x, y and, where there is one, z.
        sides: pixels along the same.
    """
    affine = np.eye(4)
    for axis, (voxels, pixels) in enumerate(zip(shape, sides, strict=True)):
        affine[axis, axis] = pixels / voxels
        affine[axis, 3] = (pixels / voxels - 1) / 2
    return affine


def _check(chosen: Chosen) -> None:
    for name in chosen.methods:
        dims = chosen.store.layout.arrays[name].dims
        if not 1 <= len(dims) - (_CHANNEL in dims) <= 3:
            raise InputError(
                f"--to nifti: {name} of {chosen.store.path} has dimensions {', '.join(dims)}, which fit in no volume; "
                "use --to npy"
            )


def _encode(chosen: Chosen, part: Part, place: int, name: str) -> bytes:
    dims = chosen.store.layout.arrays[name].dims
    values = part.arrays[name][place]
    if values.dtype == np.float16:  # which NIfTI does not know
        values = values.astype(np.float32)
    voxels = to_voxels(values, dims)
    spatial = [dim for dim in reversed(dims) if dim != _CHANNEL]
    affine = to_pixels(voxels.shape[: len(spatial)], tuple(chosen.side(dim) for dim in spatial))
    image = nibabel.Nifti1Image(voxels, affine)
    about = f"{name} of image {part.images[place]}, {chosen.dataset} {chosen.attributes.split}"
    image.header["descrip"] = about.encode("ascii", "replace")[:_DESCRIPTION]
    if _CHANNEL in dims:
        image.header.set_intent("vector")
    return gzip.compress(image.to_bytes(), mtime=0)


NIFTI = FilesOfImages(".nii.gz", (), _check, _encode)
