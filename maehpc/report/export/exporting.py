"""From a path and what is wanted of it to files. What is not whole in a store is told; the rest is exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from maehpc import files
from maehpc.errors import InputError, MaehpcError
from maehpc.ownership import turn
from maehpc.progress import Progress, Silent
from maehpc.report.export import npy
from maehpc.report.export.chosen import Chosen, choose, find_stores
from maehpc.report.export.formats import Format
from maehpc.report.export.nifti import NIFTI
from maehpc.report.export.png import PNG

FORMATS: dict[str, Format] = {"npy": npy, "png": PNG, "nifti": NIFTI}


@dataclass(frozen=True)
class Exported:
    """What was written of one data set.

    Attributes:
        dataset: its name.
        folder: of the files.
        methods: whose maps were written.
        images: how many images.
        files: how many files.
    """

    dataset: str
    folder: Path
    methods: tuple[str, ...]
    images: int
    files: int


@dataclass(frozen=True)
class Summary:
    """What an export wrote.

    Attributes:
        exported: a data set each.
        missing: a sentence on each shard or store that was not whole.
    """

    exported: list[Exported]
    missing: list[str]


def export(
    path: Path,
    to: str,
    out: Path | None = None,
    *,
    datasets: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    images: tuple[range, ...] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Writes stored explanations in another format; see `maehpc.report.export` for the files.

    Args:
        path: an experiment's folder, or one of its stores.
        to: a name of `FORMATS`.
        out: a folder a data set is made in it; the experiment's `export` where None.
        datasets: names; all that are explained where None.
        methods: names; all of a store where None.
        images: of the split, as `parse_images` gives them; all that are explained where None.
        progress: told how many files there will be, how far it is, and of each shard that is not whole.

    Raises:
        InputError: something wrong was asked for, or nothing of it is whole in the stores. Nothing is written.
        RunError: `out` cannot be written.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to}: there is no such format; choose among {', '.join(FORMATS)}")
    kind, progress, missing = FORMATS[to], progress or Silent(), []
    experiment, known = find_stores(path)
    for dataset in datasets or ():
        if dataset not in known:
            raise InputError(f"--datasets {dataset}: {path} holds {', '.join(known)}; choose among these")

    def lacks(sentence: str) -> None:
        missing.append(sentence)
        progress.warn(sentence)

    wanted = [dataset for dataset in known if datasets is None or dataset in datasets]
    chosen = choose(experiment, wanted, methods, images, lacks)
    out = experiment.exports if out is None else out
    for each in chosen:
        kind.check(each)
    for each in chosen:
        progress.say(_announced(kind, each, out / each.dataset))
    exported = [_export(kind, each, out / each.dataset, progress, lacks) for each in chosen]
    written = [each for each in exported if each.images]
    if not written:
        raise InputError(f"{path} holds no whole shard of what was chosen; run explain to compute it")
    return Summary(written, missing)


def _announced(kind: Format, chosen: Chosen, folder: Path) -> str:
    absent = set(chosen.store.missing())
    images = sum(len(images) for shard, images in chosen.shards() if shard not in absent)
    return f"{chosen.dataset}: {images} images to {kind.count(chosen, images)} files in {folder}"


def _export(kind: Format, chosen: Chosen, folder: Path, progress: Progress, lacks: Callable[[str], None]) -> Exported:
    names, count = kind.arrays(chosen), 0
    with ExitStack() as until_end:
        bar = until_end.enter_context(progress.bar(f"export {chosen.dataset}", sum(map(len, chosen.images))))
        write = None
        for shard, images in chosen.shards():
            try:
                part = chosen.read(names, shard, images)
            except MaehpcError as error:
                lacks(str(error))
            else:
                if write is None:  # not before there is something to write
                    until_end.enter_context(_folder(folder))
                    write = until_end.enter_context(kind.writing(folder, chosen))
                write(part)
                count += len(images)
            bar.advance(len(images))
    return Exported(chosen.dataset, folder, chosen.methods, count, kind.count(chosen, count))


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Makes the folder; two exports at once write into it one after the other."""
    files.require_writable(folder)
    with turn(folder / ".lock"):
        files.remove_partials(folder)
        yield
