"""From a split's indices to the encoder's input: read, crop, normalise, on the device; and how ranks share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from maehpc import keys
from maehpc.data import CropFlip, Preprocess, Split
from maehpc.data.loading import StreamedSplit
from maehpc.errors import Interrupted
from maehpc.interruption import Stop
from maehpc.training.distributed import World

EVALUATION_BATCH = 256
"""Images a forward pass where no gradient is kept; fixed, so that features do not depend on the training batch."""


class Batches:
    """Normalised images of one split, plain or augmented.

    Images that `ahead` was told of are read by a thread meanwhile.

    Args:
        split: where images come from.
        preprocess: to pixels in [0, 1] at the encoder's size, and to normalised space.
        crop: random resized crop and flip for `augmented`, or None.
        seed: of the run.
        name: of the stage; part of the key of every draw.
    """

    def __init__(self, split: Split, preprocess: Preprocess, crop: CropFlip | None, seed: int, name: str) -> None:
        self.split = split
        self.preprocess = preprocess
        self.crop = crop
        self._seed = seed
        self._name = name
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[Tensor, Future[Tensor]] | None = None

    @property
    def device(self) -> torch.device:
        """Where images and labels are."""
        return self.split.labels.device

    def ahead(self, indices: Tensor) -> None:
        """Begins to read the images at `indices`, which will be asked for next; in memory they are there already."""
        if not isinstance(self.split, StreamedSplit):
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "reader")
        self._ahead = indices, self._reader.submit(self.split.batch, indices)

    def _raw(self, indices: Tensor) -> Tensor:
        """uint8 [B, C, H, W] at source size."""
        told, self._ahead = self._ahead, None
        if told is not None and torch.equal(told[0], indices):
            return told[1].result()
        return self.split.batch(indices)

    def plain(self, indices: Tensor) -> Tensor:
        """Images at `indices` (int64 [B], CPU) as they are: float32 [B, C, S, S], normalised."""
        return self.preprocess.normalise(self.preprocess.pixels(self._raw(indices)))

    def augmented(self, indices: Tensor, step: int, part: int = 0, span: slice = slice(None)) -> Tensor:
        """Images cropped and flipped at random.

        Args:
            indices: int64 [B], CPU: images whose crops are drawn together.
            step: keys the draw.
            part: keys the draw, where a step has several.
            span: which of the images to give; no other is read. Their crops are the same whatever the span.

        Returns:
            float32 [b, C, S, S], normalised.
        """
        if self.crop is None:
            return self.plain(indices[span])
        raw = self.preprocess.unresized(self._raw(indices[span]))
        generator = keys.generator(self._seed, self._name, "crop", step, part)
        crops = self.crop.draw(len(indices), raw.shape[2], raw.shape[3], generator)
        return self.preprocess.normalise(self.crop.apply(raw, crops.part(span)))


@dataclass(frozen=True)
class Part:
    """What one rank computes at once of a step.

    Attributes:
        span: of the step's images.
        weight: of their mean loss in that of the step; 0 where the rank has no image of its own and stands in with
            one of another's, for all must take part in every sum.
        last: whether it is the rank's last in the step.
    """

    span: slice
    weight: float
    last: bool


def parts_of_step(count: int, accumulate: int, world: World) -> list[Part]:
    """Cuts a step's `count` images among the ranks, and each rank's into micro-batches.

    `accumulate` micro-batches of the whole step are meant, so that no rank computes more at once than one alone would.
    """
    start, end = _cuts(0, count, world.size)[world.rank]
    if start == end:
        return [Part(slice(0, 1), 0.0, True)]
    cuts = [(first, last) for first, last in _cuts(start, end, -(-accumulate // world.size)) if first < last]
    return [
        Part(slice(first, last), (last - first) / count, number == len(cuts) - 1)
        for number, (first, last) in enumerate(cuts)
    ]


def augmented_parts(
    batches: Batches, chosen: Callable[[int], Tensor], step: int, accumulate: int, world: World
) -> Iterator[tuple[Part, Tensor]]:
    """This rank's micro-batches of a step with their images; the next one's are read while one is computed.

    Args:
        batches: of the split.
        chosen: from a step to its images, int64 [B] on the CPU.
        step: 0-based.
        accumulate: micro-batches of the whole step.
        world: the ranks.
    """
    indices = chosen(step)
    parts = parts_of_step(len(indices), accumulate, world)
    for part in parts:
        images = batches.augmented(indices, step, span=part.span)
        if part.last:
            following = chosen(step + 1)
            batches.ahead(following[parts_of_step(len(following), accumulate, world)[0].span])
        else:
            batches.ahead(indices[parts[parts.index(part) + 1].span])
        yield part, images


def _cuts(start: int, end: int, parts: int) -> list[tuple[int, int]]:
    """Cuts [start, end) into parts whose sizes differ by one at most, the larger ones first."""
    size, larger = divmod(end - start, parts)
    ends = [start + size * number + min(number, larger) for number in range(parts + 1)]
    return list(pairwise(ends))


def dealt(
    world: World, stop: Stop, work: str, indices: Tensor, compute: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """What `compute` gives for all of `indices`: the ranks take chunks in turn, every rank gets the whole.

    Chunks are the same for any number of ranks, so each row is what one process would have computed.

    Args:
        world: the ranks.
        stop: looked at after each round of chunks.
        work: for the sentence of an interruption.
        indices: int64 [N], CPU; N > 0.
        compute: from the indices of a chunk [n] to a tensor [n, ...].
        device: where the result is wanted, also on ranks that no chunk is dealt to.

    Returns:
        [N, ...].

    Raises:
        Interrupted: somebody wants to stop.
    """
    chunks = indices.split(EVALUATION_BATCH)
    ours = []
    for first in range(0, len(chunks), world.size):
        interrupt_if_asked(world, stop, work)
        if first + world.rank < len(chunks):
            ours.append(compute(chunks[first + world.rank]))
    if world.size == 1:
        return torch.cat(ours).to(device)
    rows = [iter(part.split(EVALUATION_BATCH)) for part in world.gather(torch.cat(ours) if ours else None)]
    return torch.cat([next(rows[number % world.size]).to(device) for number in range(len(chunks))])


def interrupt_if_asked(world: World, stop: Stop, work: str, step: int | None = None) -> None:
    """Ends the work on every rank as soon as one is asked to stop.

    Raises:
        Interrupted: somebody wants to stop.
    """
    if world.largest(stop.reason is not None):
        reasons = world.together(lambda: stop.reason)
        raise Interrupted(work, next(reason for reason in reasons if reason is not None), step)
