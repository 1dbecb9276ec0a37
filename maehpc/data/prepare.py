"""From the name of a data set to its pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maehpc.data.catalogue import Entry, catalogue
from maehpc.data.pack import Pack
from maehpc.data.packing import write_pack
from maehpc.data.sources import Source, catalogue_source, open_source


def _pack_path(source: Source, packs: Path) -> Path:
    return packs / f"{source.pack_name}.h5"


def prepare(dataset: str, source_size: int, packs: Path) -> Pack:
    """The pack of a data set: the one in `packs`, or a new one where there is none or its source has changed.

    A pack whose source has gone serves as it is.

    Args:
        dataset: a catalogue name, the path of an .npz file in MedMNIST's layout, or a folder of images.
        source_size: side to read where the source leaves a choice (MedMNIST, image folders), pixels.
        packs: the folder of packs.

    Raises:
        InputError: the data set is unknown, absent or wrong, or its pack is damaged.
        RunError: the pack cannot be written.
    """
    source = open_source(dataset, source_size)
    path = _pack_path(source, packs)
    if path.is_file():
        pack = Pack(path)
        if source.fingerprint() in (None, pack.info.fingerprint):
            return pack
        pack.close()
    write_pack(path, source.read())
    return Pack(path)


@dataclass(frozen=True)
class Availability:
    """Whether a catalogue set can be used at one size.

    Attributes:
        entry: the catalogue's entry.
        size: side, pixels.
        state: packed; file (its source was found and will be packed when needed); or missing.
        where: the pack or the source file, None where it is missing.
    """

    entry: Entry
    size: int
    state: Literal["packed", "file", "missing"]
    where: str | None


def available(packs: Path) -> list[Availability]:
    """The state of every catalogue set at every size, in the catalogue's order; no file is opened."""
    result = []
    for entry in catalogue().values():
        for size in entry.sizes:
            source = catalogue_source(entry, size)
            path, where = _pack_path(source, packs), source.where()
            if path.is_file():
                result.append(Availability(entry, size, "packed", str(path)))
            else:
                result.append(Availability(entry, size, "file" if where else "missing", where))
    return result
