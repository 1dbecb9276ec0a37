"""The peer of our explanations: captum's attribution methods and its `sensitivity_max`, as well as they can be run.

What is done for captum and a user would have to do too: weights are frozen, so that it keeps no graph for them;
GradCAM sees the patch grid, since captum's sums are meaningless on tokens; its map is handed over as a tuple, since
`sensitivity_max` is wrong for a bare tensor; rows are cut into the sub-batches that are fastest. It is told the target
class and, unless its own is wanted, the noise, and pays for neither.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from captum.attr import DeepLift, LayerGradCam, Saliency
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from maehpc.bench.case import wait_for
from maehpc.devices import is_out_of_memory
from maehpc.explain.last_block import replaced
from maehpc.explain.layers import layer_path
from maehpc.explain.precision import PRODUCTS
from maehpc.models import Classifier, grid_size, num_prefix_tokens
from maehpc.recipes import ExplainSettings

METHODS = ("saliency", "gradcam", "deeplift")
"""What captum is compared by."""

_WORTH = 1.02
"""A larger sub-batch must be faster by this much."""


class SubBatch(NamedTuple):
    """How captum's rows are cut.

    Attributes:
        images: handed to `sensitivity_max` at a time.
        samples: perturbations of each in one forward pass (`max_examples_per_batch` is images times samples).
    """

    images: int
    samples: int


class _OnGrid(nn.Module):
    """A layer of tokens whose patches pass through `grid` as [B, D, h, w], the shape that captum's GradCAM needs."""

    def __init__(self, layer: nn.Module, prefix: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.prefix, self.shape = layer, prefix, shape
        self.grid = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """The layer's tokens, [B, N, D]."""
        prefix, patches = self.layer(tokens).tensor_split([self.prefix], dim=1)
        on_grid: Tensor = self.grid(patches.transpose(1, 2).unflatten(2, self.shape))
        return torch.cat([prefix, on_grid.flatten(2).transpose(1, 2)], dim=1)


class Captum:
    """captum on one classifier.

    Args:
        classifier: is copied.
        settings: GradCAM's layer, perturbations and their radius, precision.
        stock: the precision that PyTorch begins with, and captum's own noise from the CPU's global generator.
    """

    def __init__(self, classifier: Classifier, settings: ExplainSettings, stock: bool = False) -> None:
        self._settings, self.stock = settings, stock
        mine = copy.deepcopy(classifier).eval().requires_grad_(False)
        self._classifier = mine
        path = layer_path(mine.encoder, settings.gradcam.layer)
        layer = mine.encoder.get_submodule(".".join(path))
        on_grid = _OnGrid(layer, num_prefix_tokens(mine.encoder), grid_size(mine.encoder))
        gradcam = LayerGradCam(replaced(mine, ["encoder", *path], on_grid), on_grid.grid)
        saliency, deeplift = Saliency(mine), DeepLift(mine)
        # `sensitivity_max` hands over a tuple of one tensor at first and a tensor afterwards, and wants tuples.
        self._attribute: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "saliency": lambda inputs, target: _tuple(saliency.attribute(inputs, target)),
            "gradcam": lambda inputs, target: _tuple(gradcam.attribute(inputs, target)),
            "deeplift": lambda inputs, target: _tuple(deeplift.attribute(inputs, target=target)),
        }
        self.cuts: dict[str, SubBatch] = {}
        """By method, once `tune` has chosen."""

    def maps(self, method: str, x: Tensor, targets: Tensor) -> Tensor:
        """captum's maps of normalised images [B, C, S, S]: of their shape, or [B, h, w] for GradCAM."""
        count, found = self.cuts[method].images, []
        with self._as_it_runs():
            for rows, target in zip(x.split(count), targets.split(count), strict=True):
                found.append(self._attribute[method](rows, target=target)[0].detach())
        full = torch.cat(found)
        return full[:, 0] if method == "gradcam" else full

    def completeness(self, x: Tensor, targets: Tensor) -> Tensor:
        """|sum(map) - (f(x) - f(0))| / |f(x) - f(0)| of DeepLift's maps, [B]."""
        sums = self.maps("deeplift", x, targets).flatten(1).sum(dim=1)
        with torch.no_grad():
            reference: Tensor = self._classifier(torch.zeros_like(x[:1]))[0, targets]
            change: Tensor = self._classifier(x).gather(1, targets[:, None])[:, 0] - reference
        return (sums - change).abs() / change.abs()

    def sensitivity(self, method: str, x: Tensor, targets: Tensor, noise: Tensor | None) -> Tensor:
        """captum's max sensitivity, [B].

        Args:
            method: of `METHODS`.
            x: normalised images, [B, C, S, S].
            targets: int64 [B].
            noise: [B, n, C, S, S], added to the images; captum's own where None.
        """
        cut, settings = self.cuts[method], self._settings.sensitivity
        found = []
        with self._as_it_runs():
            for start in range(0, len(x), cut.images):
                rows = slice(start, start + cut.images)
                options: dict[str, Any] = {} if noise is None else {"perturb_func": _Given(noise[rows])}
                found.append(
                    sensitivity_max(
                        self._attribute[method],
                        x[rows],
                        perturb_radius=settings.radius,
                        n_perturb_samples=settings.samples,
                        max_examples_per_batch=len(x[rows]) * cut.samples,
                        target=targets[rows],
                        **options,
                    )
                )
        return torch.cat(found)

    def tune(self, methods: Sequence[str], x: Tensor, targets: Tensor, repeats: int = 2) -> None:
        """Chooses each method's sub-batch: the number of rows that it attributes fastest.

        Rows are whole images of the batch first, then several perturbations of all of them. The search ends where two
        larger sizes have brought nothing, or memory runs out.

        Args:
            methods: of `METHODS`.
            x: normalised images, [B, C, S, S].
            targets: int64 [B].
            repeats: of each timing, of which the fastest counts.
        """
        for method in methods:
            best, worse = 0.0, 0
            for cut in candidates(len(x), self._settings.sensitivity.samples):
                try:
                    speed = self._rows_a_second(method, x, targets, cut, repeats)
                except (RuntimeError, MemoryError) as error:
                    if method not in self.cuts or not is_out_of_memory(error):
                        raise
                    break
                worse = worse + 1 if speed < best * _WORTH else 0
                if not worse:
                    best, self.cuts[method] = speed, cut
                if worse == 2:
                    break

    def _rows_a_second(self, method: str, x: Tensor, targets: Tensor, cut: SubBatch, repeats: int) -> float:
        rows = x[: cut.images].repeat_interleave(cut.samples, dim=0)
        target = targets[: cut.images].repeat_interleave(cut.samples)
        seconds = []
        with self._as_it_runs(), torch.no_grad():
            for _ in range(repeats + 1):  # the first takes memory
                wait_for(x.device)
                begun = time.perf_counter()
                self._attribute[method](rows, target=target)
                wait_for(x.device)
                seconds.append(time.perf_counter() - begun)
        return len(rows) / min(seconds[1:])

    @contextmanager
    def _as_it_runs(self) -> Iterator[None]:
        """PyTorch as a script without any settings of its own has it, but for the precision; and captum silent."""
        precision = "fp32" if self.stock else self._settings.precision
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(_flags(tf32=precision == "tf32", cudnn_tf32=self.stock or precision == "tf32"))
            if precision in PRODUCTS:
                device = next(self._classifier.parameters()).device
                stack.enter_context(torch.autocast(device.type, PRODUCTS[precision]))
            yield


class _Given:
    """A `perturb_func` that adds noise made before: sub-batches come one after another, image by image in each."""

    def __init__(self, noise: Tensor) -> None:
        self._noise, self._next = noise, 0

    def __call__(self, inputs: Tensor) -> Tensor:
        samples = len(inputs) // len(self._noise)
        noise = self._noise[:, self._next : self._next + samples]
        self._next += samples
        return inputs + noise.flatten(0, 1)


def candidates(images: int, samples: int) -> list[SubBatch]:
    """Sub-batches of rising numbers of rows that divide the work evenly."""
    whole = [SubBatch(count, 1) for count in range(1, images + 1) if images % count == 0]
    return whole + [SubBatch(images, count) for count in range(2, samples + 1) if samples % count == 0]


@contextmanager
def _flags(tf32: bool, cudnn_tf32: bool) -> Iterator[None]:
    """CUDA's products as captum's side has them; our own determinism is not asked of it."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = tf32, cudnn_tf32, False
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before[:3]
        torch.use_deterministic_algorithms(before[3])


def _tuple(maps: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return maps if isinstance(maps, tuple) else (maps,)
