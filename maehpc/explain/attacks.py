"""Search for the perturbation in a small ball that changes an explanation most, the prediction unchanged.

Projected gradient ascent by sign steps (Ghorbani, Abid and Zou 2019, algorithm 1), in the ball that random sensitivity
samples from:

    delta <- project(delta + step sign(d D(Phi(x), Phi(x + delta)) / d delta))

    pgd       D = ||Phi(x) - Phi(x + delta)|| / ||Phi(x)||, of max sensitivity (Yeh et al. 2019, equation 1)
    topk      D = -(share of the map's mass on the original's top features)
    centre    D = distance of the map's centre of mass from the original's
    targeted  D = share of the map's mass inside a region (for a whole map as target: Dombrowski et al. 2019)

Of all points visited that keep the prediction the one of the largest D is kept; the unperturbed image is one of them.
Whatever is found is a lower bound of what the ball holds. The gradient of D is a second derivative of the network: a
ReLU network's is 0 almost everywhere, while attention, norms and GELU give a transformer's maps their curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from maehpc import keys
from maehpc.data import Preprocess
from maehpc.errors import InputError, RunError
from maehpc.explain.engine import Attribution, Engine
from maehpc.explain.methods import method_class
from maehpc.explain.noise import NoiseKey, uniform
from maehpc.explain.sensitivity import perturbed, relative_change
from maehpc.explain.similarity import centre_of_mass, compare, importance, top_weights
from maehpc.recipes import SensitivitySettings
from maehpc.recipes.plugins import METHODS

_TRAVEL = 2.5
"""All steps together, in radii, where no step size is given: enough to cross the ball once (Madry et al. 2018)."""

_GRAPH = 4
"""Memory of an image in a differentiable pass over that in a plain one: at most 3.9 measured, for DeepLIFT."""

Objective = Callable[[Tensor], Tensor]
"""From maps [B, ...] to what the search maximises, [B]; NaN where it is not defined. Differentiable."""


@dataclass(frozen=True)
class Attacked:
    """How far the kept perturbation moves each image's map; see `Kept`.

    NaN where the original map is zero everywhere; `top`, `spearman` and `centre` also where the changed one is.

    Attributes:
        change: relative change in the settings' norm, [B].
        top: top-k intersection with the original, [B], in [0, 1].
        spearman: rank correlation with the original, [B], in [-1, 1].
        centre: distance of the centres of mass as a share of the image's side, [B].
    """

    change: Tensor
    top: Tensor
    spearman: Tensor
    centre: Tensor


@dataclass(frozen=True)
class Kept:
    """The best perturbation of each image that keeps the prediction.

    Attributes:
        noise: in units of the settings' space, [B, C, S, S]; 0 where nothing visited was better than the image itself.
        maps: of the perturbed images, [B, ...].
        objective: its value there, [B].
    """

    noise: Tensor
    maps: Tensor
    objective: Tensor


def check(methods: Iterable[str], settings: SensitivitySettings) -> None:
    """Refuses to search for the worst case of a method whose maps cannot be differentiated.

    Args:
        methods: names of all methods that the settings apply to.
        settings: with the kinds wanted.

    Raises:
        InputError: a search is among the kinds and one of the methods does not serve.
    """
    if not settings.searches:
        return
    fixed = [name for name in methods if not method_class(name).differentiable]
    if fixed:
        able = ", ".join(name for name in METHODS if method_class(name).differentiable)
        raise InputError(
            f"explain.sensitivity.kinds: {', '.join(settings.searches)} cannot search where explain.methods has "
            f"{', '.join(fixed)}, whose maps cannot be differentiated; take kinds: [random], or of the methods only "
            f"those that can be searched: {able}"
        )


@dataclass(frozen=True)
class Sought:
    """Whose maps are searched, around which images, and where.

    Attributes:
        engine: of the classifier.
        method: whose maps are attacked; one for which `check` passes.
        pixels: images in [0, 1], [B, C, S, S].
        indices: of the images in their split, int64 [B].
        original: what the engine says of the unperturbed images.
        settings: ball, norm and search.
        preprocess: the normalisation.
        key: of the random perturbations' noise; the search's start is drawn from another stream.
    """

    engine: Engine
    method: str
    pixels: Tensor
    indices: Tensor
    original: Attribution
    settings: SensitivitySettings
    preprocess: Preprocess
    key: NoiseKey

    @property
    def maps(self) -> Tensor:
        """Of the unperturbed images, [B, ...]."""
        return self.original.maps[self.method]

    @property
    def over_channels(self) -> Literal["largest", "sum"]:
        """See the method's class."""
        return self.engine.methods[self.method].over_channels

    def cut(self, images: int) -> Iterator[Sought]:
        """The same of so many images at a time."""
        for part in torch.arange(len(self.pixels), device=self.pixels.device).split(images):
            original = Attribution(
                self.original.logits[part], self.original.targets[part], {self.method: self.maps[part]}, {}
            )
            indices = self.indices[part.to(self.indices.device)]
            yield replace(self, pixels=self.pixels[part], indices=indices, original=original)


@torch.no_grad()
def search(sought: Sought, kind: str, rows: int | None = None) -> Attacked:
    """Searches for the worst perturbation of each image and says what it does to the map.

    An image's result depends on (seed, data set, image index) and the settings; on its neighbours by rounding alone.

    Args:
        sought: where.
        kind: `pgd`, `topk`, `centre` or `targeted`.
        rows: images that memory holds in a plain pass; a search takes a quarter of them at a time, or all where None.

    Raises:
        RunError: a map that was met is not finite.
    """
    settings, over, found = sought.settings, sought.over_channels, []
    for part in sought.cut(len(sought.pixels) if rows is None else max(1, rows // _GRAPH)):
        kept = ascend(part, make_objective(kind, part.maps, over, settings))
        alike = compare(part.maps, kept.maps, settings.search.top, over)
        change = relative_change(part.maps, kept.maps, settings.norm)
        found.append((change, alike.top, alike.spearman, alike.centre))
    return Attacked(*(torch.cat(values) for values in zip(*found, strict=True)))


def ascend(sought: Sought, objective: Objective) -> Kept:
    """The search itself, whatever is maximised.

    It begins at a uniform draw and visits `settings.search.steps` further points. From a point that flips the
    prediction the next step goes back towards it: up the gradient of the logits' difference instead of the objective's
    (switching subgradients, Polyak 1967). A search that flipped early would else spend all its steps in vain.

    Args:
        sought: where.
        objective: what is maximised.

    Raises:
        RunError: a map that was met is not finite.
    """
    pixels, settings, key = sought.pixels, sought.settings, sought.key
    search_ = settings.search
    size = search_.step_size or _TRAVEL * settings.radius / search_.steps
    low, high = _ball(sought)
    start = NoiseKey(keys.derive(key.seed, "adversarial search"), key.dataset)
    noise = uniform(start, sought.indices, 0, pixels.shape[1:], settings.radius, pixels.device).to(pixels.dtype)
    noise = noise.clamp(low, high)
    best = Kept(torch.zeros_like(pixels), sought.maps, objective(sought.maps))
    finite = torch.ones_like(sought.original.targets, dtype=torch.bool)
    for step in range(search_.steps + 1):
        x = perturbed(pixels, noise, settings, sought.preprocess)
        seen = _look(sought, objective, x, climbs=step < search_.steps)
        better = seen.same & (seen.objective > best.objective)
        best = Kept(
            _where(better, noise, best.noise),
            _where(better, seen.maps, best.maps),
            _where(better, seen.objective, best.objective),
        )
        finite &= seen.maps.flatten(1).isfinite().all(dim=1)
        if seen.gradient is not None:
            # Normalisation has a positive slope, so the signs at pixels are those at the encoder's input.
            noise = (noise + size * seen.gradient.nan_to_num().sign()).clamp(low, high)
    if not finite.all():
        first = sought.indices[int((~finite).nonzero()[0])].item()
        raise RunError(
            f"the classifier's {sought.method} of image {first}, searched within explain.sensitivity.radius, is not "
            f"finite; finetune it again with a lower optim.lr, or lower explain.sensitivity.radius"
        )
    return best


def make_objective(
    kind: str, original: Tensor, over_channels: Literal["largest", "sum"], settings: SensitivitySettings
) -> Objective:
    """What a kind of search maximises.

    Args:
        kind: `pgd`, `topk`, `centre` or `targeted`.
        original: maps of the unperturbed images, [B, ...].
        over_channels: of the method's class.
        settings: norm, and the search's top and target.
    """
    if kind == "pgd":
        return lambda maps: relative_change(original, maps, settings.norm)
    before = importance(original, over_channels)
    if kind == "centre":
        centre = centre_of_mass(before)
        return _of_mass(lambda now: torch.linalg.vector_norm(centre_of_mass(now) - centre, dim=1), over_channels)
    if kind == "topk":
        top = top_weights(before, settings.search.top)
        return _of_mass(lambda now: -_share(now, top), over_channels)
    assert kind == "targeted", kind
    region = target_region(before, settings.search.target)
    return _of_mass(lambda now: _share(now, region), over_channels)


def target_region(original: Tensor, target: str) -> Tensor:
    """The quarter of the image that `targeted` moves the map to, as the share of each element that lies in it.

    Args:
        original: importance, [B, h, w].
        target: `corner` is the upper left quarter, `opposite` the one of the four in which the original has least mass.

    Returns:
        [B, h, w] in [0, 1]; sums to h w / 4. Of an odd number of rows the one in the middle counts by half.
    """
    first = [(size / 2 - torch.arange(size, device=original.device)).clamp(0, 1) for size in original.shape[1:]]
    quarters = torch.stack(
        [torch.outer(down, across) for down in (first[0], 1 - first[0]) for across in (first[1], 1 - first[1])]
    ).to(original.dtype)
    if target == "corner":
        return quarters[:1].expand_as(original)
    mass = original.flatten(1) @ quarters.flatten(1).T
    return quarters[mass.argmin(dim=1)]


@dataclass(frozen=True)
class _Look:
    """One visited point, without a graph.

    Attributes:
        maps: [B, ...].
        objective: [B].
        same: whether the prediction is that of the unperturbed image, bool [B].
        gradient: at the encoder's input, [B, C, S, S], where it was asked for.
    """

    maps: Tensor
    objective: Tensor
    same: Tensor
    gradient: Tensor | None


def _look(sought: Sought, objective: Objective, x: Tensor, climbs: bool) -> _Look:
    """Visits a point; the graph ends with the call, so that only one is held at a time."""
    engine, method, original = sought.engine, sought.method, sought.original
    x.requires_grad_(climbs)
    with (
        torch.set_grad_enabled(climbs),
        engine.seen(x, original.targets, methods=[method], differentiable=climbs) as seen,
    ):
        maps = engine.methods[method].attribute(seen)
        value = objective(maps)
        prediction = original.logits.argmax(dim=1, keepdim=True)
        same = seen.logits.argmax(dim=1) == prediction[:, 0]
        gradient = None
        if climbs:
            rivals = seen.logits.scatter(1, prediction, -torch.inf).amax(dim=1)
            margin = seen.logits.gather(1, prediction)[:, 0] - rivals
            (gradient,) = torch.autograd.grad(torch.where(same, value, margin).sum(), x)
    return _Look(maps.detach(), value.detach(), same, gradient)


def _ball(sought: Sought) -> tuple[Tensor, Tensor]:
    """Least and largest noise of each element: the radius, and valid pixels where the settings clip to them.

    A perturbation outside valid pixels would be clipped and have no gradient there.
    """
    pixels, settings = sought.pixels, sought.settings
    low, high = pixels.new_tensor(-settings.radius), pixels.new_tensor(settings.radius)
    if not settings.clip:
        return low, high
    black, white, at = torch.zeros_like(pixels[:1]), torch.ones_like(pixels[:1]), pixels
    if settings.space == "normalised":
        black, white, at = (sought.preprocess.normalise(values) for values in (black, white, pixels))
    return torch.maximum(low, black - at), torch.minimum(high, white - at)


def _of_mass(value: Objective, over_channels: Literal["largest", "sum"]) -> Objective:
    """An objective of the importance, undefined where there is none at all."""

    def objective(maps: Tensor) -> Tensor:
        now = importance(maps, over_channels)
        return torch.where(now.flatten(1).any(dim=1), value(now), torch.nan)

    return objective


def _share(values: Tensor, weights: Tensor) -> Tensor:
    """Share of each map's mass that lies under the weights, [B]; 0 where there is no mass."""
    total = values.sum(dim=(1, 2))
    return (values * weights).sum(dim=(1, 2)) / torch.where(total > 0, total, 1)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` image by image."""
    return torch.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
