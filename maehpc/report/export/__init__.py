"""Stored explanations in files that other programs read.

OUT/DATASET/METHOD.npy, METHOD_SCORE.npy, label.npy, …, image.npy   one row an image; image.npy says which
OUT/DATASET/image-00017-METHOD.png                                  the map over the image
OUT/DATASET/image-00017-METHOD.nii.gz                               the map, a voxel a value

Files of single images add to those that are there. The arrays are one set: those of an earlier export go, and image.npy
comes last, so that a folder without it holds no whole set. Equal stores give equal files, byte for byte.
"""

from maehpc.report.export.exporting import FORMATS, Exported, Summary, export
from maehpc.report.export.images import parse_images

__all__ = ["FORMATS", "Exported", "Summary", "export", "parse_images"]
