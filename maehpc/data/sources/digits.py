"""scikit-learn's handwritten digits: 1797 real scans of 8 x 8 pixels that ship inside a dependency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maehpc.catalogue import Entry
from maehpc.data.sources.raw import RawSplits, in_memory
from maehpc.data.subset import stratified_order


@dataclass(frozen=True)
class DigitsSource:
    """The UCI test digits (Alpaydin and Kaynak 1998), 17 grey levels, split here once and for all."""

    entry: Entry

    @property
    def name(self) -> str:
        """The catalogue's name."""
        return self.entry.name

    @property
    def pack_name(self) -> str:
        """Name and size."""
        return f"{self.name}-{self.entry.sizes[0]}"

    def where(self) -> str | None:
        """Always there."""
        return "inside scikit-learn"

    def fingerprint(self) -> str | None:
        """None: the scans are part of scikit-learn."""
        return None

    def read(self) -> RawSplits:
        """The scans, grey levels 0 to 16 stretched to 0 to 255, in a fixed stratified split."""
        from sklearn.datasets import load_digits  # seconds, for a set that is packed once

        bunch = load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = bunch.target.astype(np.int64)
        order = stratified_order(labels, 0, "digits split")
        test, val = self.entry.counts["test"], self.entry.counts["val"]
        index = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
        chosen = {split: np.sort(index[split]) for split in self.entry.counts}
        return RawSplits(
            name=self.name,
            title=self.entry.title,
            task=self.entry.task,
            classes=self.entry.classes,
            labels={split: labels[indices] for split, indices in chosen.items()},
            images=lambda split: in_memory(images[chosen[split]]),
            description="scikit-learn's load_digits, fixed stratified split",
        )
