"""What is exported: stores by path, and of each the methods and images that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from maehpc.errors import InputError, MaehpcError
from maehpc.experiment import Experiment
from maehpc.maps import MapStore
from maehpc.report.explanations import Attributes, read_attributes
from maehpc.report.export.images import within


@dataclass(frozen=True)
class Part:
    """Chosen images of one shard.

    Attributes:
        images: their indices in the split, rising.
        arrays: by name: [n, *shape], a row an image.
    """

    images: list[int]
    arrays: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Chosen:
    """What is exported of one data set.

    Attributes:
        dataset: its name.
        store: its explanations.
        attributes: of the store.
        methods: in the store's order.
        images: rising ranges of indices in the split.
    """

    dataset: str
    store: MapStore
    attributes: Attributes
    methods: tuple[str, ...]
    images: tuple[range, ...]

    def shards(self) -> Iterator[tuple[int, list[int]]]:
        """Shards that hold chosen images, and those images."""
        for shard in range(self.store.layout.shards):
            images = within(self.images, self.store.images(shard))
            if images:
                yield shard, images

    def read(self, names: Sequence[str], shard: int, images: list[int]) -> Part:
        """Some arrays of chosen images of a shard.

        Raises:
            RunError: the shard is not recorded, or a file is not what was recorded.
        """
        first = self.store.images(shard).start
        rows = [image - first for image in images]
        return Part(images, {name: values[rows] for name, values in self.store.read_arrays(names, shard).items()})

    def side(self, dim: str) -> int:
        """Pixels of an image along a dimension of its maps: `x` or, of patches, `grid_x`."""
        name = dim.removeprefix("grid_")
        for array in self.store.layout.arrays.values():
            if name in array.dims:
                return array.shape[array.dims.index(name)]
        return self.attributes.image_size


def find_stores(path: Path) -> tuple[Experiment, list[str]]:
    """The experiment at a path, and the data sets meant: all that are explained, or the one whose store it is.

    Raises:
        InputError: the path is neither an experiment's folder nor a store.
    """
    experiment = Experiment(path)
    if path.suffix == ".zarr":
        folder = path.absolute().parent if len(path.parts) < 3 else path.parent
        experiment = Experiment(folder.parent)
        if folder.name == "maps" and path.stem in experiment.mapped_datasets():
            return experiment, [path.stem]
    elif experiment.mapped_datasets():
        return experiment, experiment.mapped_datasets()
    elif experiment.recipe.is_file():
        raise InputError(f"{path} holds no explanations; run explain first")
    raise InputError(
        f"{path} is neither an experiment's folder nor one of its stores (maps/DATASET.zarr, with the ledger beside "
        "maps); give one of them"
    )


def choose(
    experiment: Experiment,
    datasets: Sequence[str],
    methods: Sequence[str] | None,
    images: tuple[range, ...] | None,
    missing: Callable[[str], None],
) -> list[Chosen]:
    """Opens the stores of data sets and settles what is exported of each.

    Args:
        experiment: that they belong to.
        datasets: their names.
        methods: names; all where None.
        images: of the split; all explained ones where None.
        missing: told of a store that cannot be opened, which is left out.

    Raises:
        InputError: a method or image is in none of the stores, or no store can be opened.
    """
    opened = {}
    for dataset in datasets:
        try:
            store = MapStore.open(experiment.maps(dataset), experiment.ledger(dataset))
            opened[dataset] = store, read_attributes(store)
        except MaehpcError as error:
            if len(datasets) == 1:
                raise
            missing(str(error))
    if not opened:
        raise InputError(f"{experiment.root} holds no store that can be read; run explain again")
    return [_chosen(dataset, store, about, methods, images) for dataset, (store, about) in opened.items()]


def _chosen(
    dataset: str,
    store: MapStore,
    attributes: Attributes,
    methods: Sequence[str] | None,
    images: tuple[range, ...] | None,
) -> Chosen:
    known = attributes.methods
    for name in methods or ():
        if name not in known:
            raise InputError(f"--methods {name}: {store.path} holds {', '.join(known)}; choose among these")
    explained = store.layout.images
    if images and images[-1].stop > explained:
        raise InputError(
            f"--images {images[-1].stop - 1}: {store.path} holds images 0 to {explained - 1} of the "
            f"{attributes.split} split; choose among these"
        )
    return Chosen(
        dataset=dataset,
        store=store,
        attributes=attributes,
        methods=known if methods is None else tuple(name for name in known if name in methods),
        images=(range(explained),) if images is None else images,
    )
