"""From the name of a data set to its pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maehpc.catalogue import Entry, catalogue
from maehpc.data.pack import OlderFormatError, Pack
from maehpc.data.packing import write_pack
from maehpc.data.sources import Source, catalogue_source, open_source


def _pack_path(source: Source, packs: Path) -> Path:
    return packs / f"{source.pack_name}.h5"


def prepare(dataset: str, source_size: int, packs: Path) -> Pack:
    """The pack of a data set: the one in `packs`, or a new one where there is none or it came from something else.

    The pack of a catalogue set serves without its source. A set given by its path must be there: its bytes, not its
    name, tell whether a pack was made from it.

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
        expected = source.fingerprint()
        try:
            pack = Pack(path)
        except OlderFormatError:
            if source.where() is None:
                raise
        else:
            if (pack.info.name, pack.info.fingerprint) == (source.name, expected):
                return pack
            pack.close()
    write_pack(path, source.read())
    return Pack(path)


def require(dataset: str, source_size: int, packs: Path) -> None:
    """Refuses a data set of which `prepare` would find neither a pack nor a source; of one that is there, no file is
    opened.

    Args:
        dataset: as for `prepare`.
        source_size: likewise, pixels.
        packs: the folder of packs.

    Raises:
        InputError: the data set is unknown or absent.
    """
    source = open_source(dataset, source_size)
    if source.where() is None:  # what `prepare` would ask of it first tells what is missing
        source.fingerprint() if _pack_path(source, packs).is_file() else source.read()


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
