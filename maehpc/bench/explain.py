"""What explaining costs: maps and max sensitivity by our methods, alone and together, beside captum's.

Turns of ours and of captum alternate in one process, and a ratio is the median over rounds of captum's seconds to
ours in the same round, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from maehpc.bench import memory
from maehpc.bench.case import CHANNELS, CLASSES, HEAD, Case, Subject, make_subject, wait_for
from maehpc.bench.figures import Part, Ratio, Report, figure, surroundings
from maehpc.bench.memory import Memory, Spec
from maehpc.bench.peers import Captum
from maehpc.devices import choose_device, settle
from maehpc.errors import InputError
from maehpc.explain import Explainer, Explanation
from maehpc.explain.precision import PRODUCTS, in_precision
from maehpc.launch.flops import Explained, Vit
from maehpc.progress import Progress
from maehpc.recipes.plugins import METHODS as KNOWN

Peer = Literal["captum", "captum-stock", "none"]

METHODS = ("saliency", "gradcam", "deeplift-captum", "deeplift")
TOGETHER = {
    "all": ("saliency", "gradcam", "deeplift-captum"),
    "all_exact": ("saliency", "gradcam", "deeplift"),
}
"""What is also measured in one pass: the course report's three, and the same with exact DeepLIFT."""
COUNTERPARTS: dict[str, tuple[str, ...]] = {
    "saliency": ("saliency",),
    "gradcam": ("gradcam",),
    "deeplift-captum": ("deeplift",),
    "deeplift": ("deeplift",),
    "all": ("saliency", "gradcam", "deeplift"),
    "all_exact": ("saliency", "gradcam", "deeplift"),
}
"""captum's methods beside each of ours."""
LEAST_IMAGES = 8


@dataclass(frozen=True)
class Effort:
    """How long it is measured.

    Attributes:
        repeats: rounds.
        turns: of the long run that watches memory, after its warm-up.
        matrix: side of the matrices by which the machine's rate is measured.
    """

    repeats: int = 5
    turns: int = 10
    matrix: int = 2048


Turn = tuple[list[float], Callable[[], object]]
"""Where its seconds go, and what is timed."""


@dataclass
class Timed:
    """Seconds a turn, by name, in the order of rounds; and of one product of matrices, a round."""

    ours: dict[str, list[float]] = field(default_factory=dict)
    peer: dict[str, list[float]] = field(default_factory=dict)
    product: list[float] = field(default_factory=list)

    def peer_of(self, name: str) -> list[float] | None:
        """Seconds of all of captum's methods beside one of ours, a round; None where one was not measured."""
        methods = COUNTERPARTS.get(name, ())
        if not methods or not set(methods) <= set(self.peer):
            return None
        return [sum(seconds) for seconds in zip(*(self.peer[method] for method in methods), strict=True)]

    def ratio(self, name: str) -> float | None:
        """Median over rounds of captum's seconds to ours."""
        theirs = self.peer_of(name)
        if theirs is None or name not in self.ours:
            return None
        return statistics.median(a / b for a, b in zip(theirs, self.ours[name], strict=True))


def variants(methods: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What of ours is measured: each method alone, and those of `TOGETHER` that have all theirs."""
    together = {name: several for name, several in TOGETHER.items() if set(several) <= set(methods)}
    return {**{method: (method,) for method in methods}, **together}


def check(case: Case, methods: Sequence[str]) -> None:
    """Refuses what cannot be measured, before anything is.

    Raises:
        InputError: the settings do not go together.
    """
    patch = case.encoder.dimensions[3]
    if case.image_size % patch:
        raise InputError(
            f"--image-size {case.image_size} is not divisible by the patch size {patch} of {case.encoder.name}; "
            f"choose a multiple of {patch}"
        )
    if case.precision == "tf32" and case.device != "cuda":
        raise InputError("--precision tf32 needs a GPU; use --precision fp32")
    try:
        case.settings(tuple(methods))
    except ValueError as error:
        wrong = [method for method in methods if method not in KNOWN]
        known = f"choose from {', '.join(KNOWN)}" if wrong or not methods else "name each once"
        raise InputError(f"--methods {','.join(methods)}: {known}, with commas between") from error


def run(
    progress: Progress,
    case: Case,
    methods: Sequence[str] = METHODS,
    peer: Peer = "captum",
    images: int | None = None,
    effort: Effort | None = None,
) -> Report:
    """Measures.

    Args:
        progress: where to report.
        case: what is explained; its number of images is set here.
        methods: of ours.
        peer: captum at the same precision with the same noise; or as it comes, with its own; or none.
        images: a turn; where None, as many as ours computes side by side, and at least `LEAST_IMAGES`.
        effort: how long.

    Raises:
        InputError: the settings do not go together.
        RunError: something that is measured does not work.
    """
    check(case, methods)
    effort = effort or Effort()
    device, threads = choose_device(case.device), torch.get_num_threads()
    settle(device)  # as the stage does
    around = surroundings(device)
    subject = make_subject(case)
    ours = {name: subject.explainer(several) for name, several in variants(methods).items()}
    at_once = {name: each.group * each.workers for name, each in ours.items()}
    most = max(at_once.values())
    subject = subject.with_images(images or -(-LEAST_IMAGES // most) * most)
    case = subject.case
    at_once = {name: min(case.images, count) for name, count in at_once.items()}

    progress.say("bench: a turn of each that is compared, not timed")
    explained = {name: _explain(each, subject) for name, each in ours.items()}
    targets = next(iter(explained.values())).target
    captum, agreement = None, {}
    completeness: dict[str, dict[str, dict[str, float]]] = {"ours": _completeness(explained.values()), "peer": {}}
    if peer != "none":
        captum = Captum(subject.classifier, case.settings(("saliency",)), stock=peer == "captum-stock")
        captum.tune(sorted({method for name in ours for method in COUNTERPARTS.get(name, ())}), subject.x, targets)
        agreement = _agreement(captum, subject, explained.values(), targets)
        if "deeplift" in captum.cuts:
            completeness["peer"]["deeplift"] = _spread(captum.completeness(subject.x, targets))
    del explained

    timed = _rounds(progress, subject, ours, captum, targets, effort)
    progress.say("bench: memory")
    used = _memory(subject, variants(methods), captum, effort.turns, threads)
    cuts = {} if captum is None else captum.cuts
    results = {
        **{f"ratio_{name.replace('-', '_')}": timed.ratio(name) for name in COUNTERPARTS},
        "images_per_second": _speeds(case, timed),
        "agreement": agreement,
        "completeness": completeness,
        **_work(case, timed, variants(methods), effort.matrix),
        **_memory_keys(used, {"ours": at_once, "peer": {"all": max((cut.images for cut in cuts.values()), default=0)}}),
        "images_at_once": at_once,
        "peer": None if captum is None else peer,
        "peer_version": None if captum is None else version("captum"),
        "peer_sub_batches": {method: cut._asdict() for method, cut in cuts.items()},
        "model": case.encoder.name,
        "threads": threads,
        "repeats": effort.repeats,
        **case.model_dump(mode="json", exclude={"encoder"}),
    }
    return Report("explain", around, _parts(case, timed, results), results)


def _explain(explainer: Explainer, subject: Subject) -> Explanation:
    return explainer.explain(subject.pixels, subject.indices, torch.zeros_like(subject.indices))


def _completeness(explained: Iterable[Explanation]) -> dict[str, dict[str, float]]:
    """By method, of a pass that computes it."""
    errors = {method: error for each in explained for method, error in each.completeness.items()}
    return {method: _spread(error) for method, error in errors.items()}


def _spread(errors: Tensor) -> dict[str, float]:
    return {"median": errors.median().item(), "largest": errors.max().item()}


def _agreement(
    captum: Captum, subject: Subject, explained: Iterable[Explanation], targets: Tensor
) -> dict[str, dict[str, float]]:
    """Largest relative differences from captum, over images and every pass of ours that computes a method."""
    x, noise = subject.x, subject.noise()
    found: dict[str, dict[str, float]] = {}
    for ours, theirs in (("saliency", "saliency"), ("gradcam", "gradcam"), ("deeplift-captum", "deeplift")):
        passes = [each for each in explained if ours in each.maps]
        if passes:
            full, changes = captum.maps(theirs, x, targets), captum.sensitivity(theirs, x, targets, noise)
            found[ours] = {
                "maps": max(_difference(each.maps[ours], full) for each in passes),
                "sensitivity": max(_difference(each.sensitivity[ours].amax(dim=1), changes) for each in passes),
            }
    return found


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs| of an image; the largest of all images."""
    rows = (len(theirs), -1)
    difference = (ours.float() - theirs.float()).abs().reshape(rows).amax(dim=1)
    return (difference / theirs.float().abs().reshape(rows).amax(dim=1)).max().item()


def _rounds(
    progress: Progress,
    subject: Subject,
    ours: dict[str, Explainer],
    captum: Captum | None,
    targets: Tensor,
    effort: Effort,
) -> Timed:
    timed, device, threads = Timed(), subject.pixels.device, torch.get_num_threads()
    turns: list[Turn] = [
        (timed.ours.setdefault(name, []), partial(_explain, each, subject)) for name, each in ours.items()
    ]
    if captum is not None:
        x, noise = subject.x, None if captum.stock else subject.noise()
        theirs: list[Turn] = [
            (timed.peer.setdefault(method, []), partial(captum.sensitivity, method, x, targets, noise))
            for method in captum.cuts
        ]
        turns = interleaved(turns, theirs)
    product = _product(subject.case, effort.matrix)
    product()
    with progress.bar("bench explain", effort.repeats * len(turns), images=subject.case.images) as bar:
        for number in range(effort.repeats):
            for seconds, turn in turns if number % 2 == 0 else reversed(turns):
                torch.set_num_threads(threads)
                seconds.append(_seconds(turn, device))
                bar.advance()
            timed.product.append(_seconds(product, device))
    return timed


def interleaved(first: list[Turn], second: list[Turn]) -> list[Turn]:
    """Both lists in their order, spread evenly over one another."""
    placed = [((at + 0.5) / len(turns), turn) for turns in (first, second) for at, turn in enumerate(turns)]
    return [turn for _, turn in sorted(placed, key=lambda pair: pair[0])]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    begun = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - begun


def _product(case: Case, side: int) -> Callable[[], object]:
    """A product of square matrices in the type of the case."""
    a = torch.ones(side, side, device=case.device, dtype=PRODUCTS.get(case.precision, torch.float32))

    def work() -> Tensor:
        with in_precision(case.precision):
            return a @ a

    return work


def _memory(
    subject: Subject, ours: dict[str, tuple[str, ...]], captum: Captum | None, turns: int, threads: int
) -> dict[str, dict[str, Memory]]:
    """Of ours together where there is such a pass, else alone; of captum's one after another. The last of ours runs on.

    Returns:
        By who and name.
    """
    names = [name for name in TOGETHER if name in ours] or list(ours)
    if subject.pixels.device.type == "cuda":
        torch.cuda.empty_cache()
    found: dict[str, dict[str, Memory]] = {"ours": {}, "peer": {}}
    for name in names:
        spec = Spec(case=subject.case, who="ours", methods=ours[name], threads=threads)
        spec = spec.model_copy(update={"turns": turns if name == names[-1] else 0})
        found["ours"][name] = memory.measure(spec, subject)
    if captum is not None and captum.cuts:
        spec = Spec(case=subject.case, who="peer", methods=tuple(captum.cuts), threads=threads)
        spec = spec.model_copy(update={"cuts": captum.cuts, "stock": captum.stock})
        found["peer"]["all"] = memory.measure(spec, subject)
    return found


def _speeds(case: Case, timed: Timed) -> dict[str, dict[str, float]]:
    """Images a second by who and name."""
    theirs = dict(timed.peer)
    if (together := timed.peer_of("all")) is not None:
        theirs["all"] = together
    return {
        who: {name: case.images / statistics.median(seconds) for name, seconds in found.items()}
        for who, found in (("ours", timed.ours), ("peer", theirs))
    }


def _work(case: Case, timed: Timed, ours: dict[str, tuple[str, ...]], side: int) -> dict[str, Any]:
    """Operations an image and a second, by name."""
    vit = Vit.of(case.encoder, case.image_size, CHANNELS)
    flops = {name: Explained(vit, CLASSES, HEAD, case.settings(several)).image for name, several in ours.items()}
    speeds = _speeds(case, timed)["ours"]
    return {
        "flops_per_image": flops,
        "flops_per_second": {name: each * speeds[name] for name, each in flops.items()},
        "matmul_flops_per_second": 2.0 * side**3 / statistics.median(timed.product),
    }


def _memory_keys(used: dict[str, dict[str, Memory]], at_once: dict[str, dict[str, int]]) -> dict[str, Any]:
    peaks = {who: {name: each.peak_bytes for name, each in found.items()} for who, found in used.items()}
    each_image = {
        who: {name: None if peak is None else peak / at_once[who][name] for name, peak in found.items()}
        for who, found in peaks.items()
    }
    long = next(each for each in used["ours"].values() if each.resident_bytes)
    return {
        "peak_memory_bytes": peaks,
        "peak_memory_bytes_per_image": each_image,
        "memory_growth_bytes": long.resident_bytes[-1] - long.resident_bytes[0],
        "device_memory_growth_bytes": long.allocated_bytes[-1] - long.allocated_bytes[0]
        if long.allocated_bytes
        else None,
        "memory_resident_bytes": long.resident_bytes,
    }


def _parts(case: Case, timed: Timed, results: dict[str, Any]) -> tuple[Part, ...]:
    """The same for people, with every measured value."""
    conditions = (
        f"{case.encoder.name} at {case.image_size} px, maps and max sensitivity with {case.samples} perturbations, "
        f"{case.precision}, {case.device}, {results['threads']} threads, "
        f"{results['repeats']} rounds of {case.images} images"
    )
    speeds = [
        figure(f"{who}, {name}", "images/s", [case.images / each for each in seconds])
        for who, found in (("maehpc", timed.ours), ("captum", timed.peer))
        for name, seconds in found.items()
    ]
    if (together := timed.peer_of("all")) is not None:
        speeds.append(figure("captum, all", "images/s", [case.images / each for each in together]))
    ratios = [
        Ratio(f"{name} to captum", ratio, f"times the speed of its {' + '.join(COUNTERPARTS[name])}")
        for name in timed.ours
        if (ratio := timed.ratio(name)) is not None
    ]
    rate = results["matmul_flops_per_second"]
    work = results["flops_per_second"]
    parts = [
        Part("speed", conditions, tuple(speeds), tuple(ratios)),
        Part(
            "work",
            "operations in closed form, beside a product of square matrices of the same type",
            (
                figure("product of matrices", "GFLOP/s", [rate / 1e9]),
                *(figure(name, "GFLOP/s", [each / 1e9]) for name, each in work.items()),
            ),
            tuple(Ratio(f"{name} to the product", each / rate, "share of its rate") for name, each in work.items()),
        ),
    ]
    exact = [
        figure(f"completeness error of {whose} {method}, {which}", "relative", [error])
        for whose, errors in (
            ("maehpc's", results["completeness"]["ours"]),
            ("captum's", results["completeness"]["peer"]),
        )
        for method, both in errors.items()
        for which, error in both.items()
    ]
    differences = [
        figure(f"{method}, {what}", "relative", [value])
        for method, both in results["agreement"].items()
        for what, value in both.items()
    ]
    if exact or differences:
        told = "largest difference from captum, and how far DeepLIFT's maps are from summing to the change of the logit"
        parts.append(Part("agreement", told, (*differences, *exact)))
    peaks = [
        figure(f"{who}, {name}, {what}", "MB", [each / 1e6])
        for key, what in (("peak_memory_bytes", "peak"), ("peak_memory_bytes_per_image", "peak an image"))
        for who, found in (("maehpc", results[key]["ours"]), ("captum", results[key]["peer"]))
        for name, each in found.items()
        if each is not None
    ]
    parts.append(
        Part(
            "memory",
            f"over weights and images; growth over {len(results['memory_resident_bytes']) - 1} further turns",
            (*peaks, figure("growth", "MB", [results["memory_growth_bytes"] / 1e6])),
        )
    )
    return tuple(parts)
