"""Reading what the training stages left: scores, learning curves, reconstructions. Nothing is taken on trust."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load

from maehpc import files
from maehpc.errors import InputError
from maehpc.report.figures.curves import QUANTITIES, Curve, Curves
from maehpc.report.figures.reconstructions import Reconstructions

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Scores(BaseModel):
    """Scores over one split; None where undefined."""

    loss: float | None = None
    accuracy: float | None = None
    auc: float | None = None


class _DataSet(BaseModel):
    title: str


class Scored(BaseModel):
    """The part of done.json that is reported of a stage that makes a classifier."""

    scores: dict[Split, Scores]
    images: dict[Split, int]
    files: dict[str, str] = {}
    dataset: _DataSet


class _Line(Scores):
    kind: Literal["step", "epoch"]
    step: int
    epoch: float
    split: Split = "train"


AnyModel = TypeVar("AnyModel", bound=BaseModel)


def _parsed(kind: type[AnyModel], data: bytes, place: str) -> AnyModel:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{place} cannot be used: {field}: {first['msg'].lower()}; run that stage again") from error


def _bytes(path: Path) -> bytes | None:
    try:
        with files.reading(path):
            return path.read_bytes()
    except FileNotFoundError:
        return None


def read_scored(path: Path) -> Scored | None:
    """Scores of a finished finetuning or probe, or None where its done.json is absent.

    Raises:
        InputError: the file does not hold them.
        RunError: it cannot be read.
    """
    data = _bytes(path)
    return None if data is None else _parsed(Scored, data, str(path))


def read_curves(path: Path) -> Curves | None:
    """Learning curves from a metrics.jsonl, or None where it is absent or holds no number yet.

    A last line without its newline belongs to a run that is still writing, and is left out.

    Raises:
        InputError: a line is not one of a metrics log.
        RunError: it cannot be read.
    """
    data = _bytes(path)
    if data is None:
        return None
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    steps_an_epoch = 0.0
    for number, text in enumerate(data.split(b"\n")[:-1], start=1):
        line = _parsed(_Line, text, f"{path}, line {number},")
        steps_an_epoch = line.step / line.epoch if line.epoch > 0 else 0.0
        for quantity in QUANTITIES:
            value = getattr(line, quantity)
            if value is not None:
                points[line.kind, quantity, line.split].append((line.epoch, value))
    curves = {key: Curve(*np.array(values, np.float64).T) for key, values in points.items()}
    steps = {quantity: curve for (kind, quantity, _), curve in curves.items() if kind == "step"}
    epochs: dict[str, dict[str, Curve]] = defaultdict(dict)
    for (kind, quantity, split), curve in curves.items():
        if kind == "epoch":
            epochs[quantity][split] = curve
    return Curves(steps, dict(epochs), steps_an_epoch) if curves else None


def read_reconstructions(path: Path) -> Reconstructions | None:
    """The reconstructions of a finished pretraining, or None where there are none.

    The file's bytes are read, and not the file: it may be remote.

    Raises:
        InputError: the file is cut off, or its arrays are not reconstructions.
    """
    data = _bytes(path)
    if data is None:
        return None
    try:
        size = int.from_bytes(data[:8], "little")
        facts = json.loads(data[8 : 8 + size])["__metadata__"]
        result = Reconstructions(**load(data), mask_ratio=float(facts["mask_ratio"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not hold reconstructions ({error}); run pretrain again") from error
    pictures = (result.original, result.masked, result.reconstructed)
    if not all(
        picture.dtype == np.uint8 and picture.ndim == 4 and picture.shape == result.original.shape
        for picture in pictures
    ) or result.index.shape != (len(result.original),):
        raise InputError(f"{path} does not hold reconstructions (wrong shapes or types); run pretrain again")
    return result if len(result.original) else None
