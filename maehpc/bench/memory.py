"""How much memory explaining takes, and whether a long run takes ever more.

On a CPU this is told by a process of its own, `python -m maehpc.bench.memory SPEC`: what an allocator has once been
given it seldom gives back, so a process that has measured other things before does not grow. On a GPU PyTorch's
allocator counts, in the process that is there.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from pydantic import Field

from maehpc.bench.case import Case, Subject, make_subject, wait_for
from maehpc.bench.peers import Captum, SubBatch
from maehpc.devices import settle
from maehpc.errors import RunError
from maehpc.recipes.settings import Settings

WARM_UP = 2
"""Turns before memory is expected to stay as it is."""
LIMIT_S = 3600.0


class Spec(Settings):
    """What is measured.

    Attributes:
        case: what is explained.
        who: ours, or captum.
        methods: that one of ours computes together, or captum's one after another.
        cuts: captum's sub-batches by method, images and samples.
        stock: whether captum is as it comes.
        turns: of the long run, after `WARM_UP`; 0 for none.
        threads: of the CPU.
    """

    case: Case
    who: Literal["ours", "peer"]
    methods: tuple[str, ...]
    cuts: dict[str, tuple[int, int]] = Field({})
    stock: bool = False
    turns: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Memory:
    """What was found.

    Attributes:
        peak_bytes: growth at the peak of a first turn, over weights, images and what is computed once: of the resident
            set of a fresh process on a CPU, of tensors on a GPU. None where the system does not tell (Linux does).
        resident_bytes: resident set after the warm-up and after each further turn.
        allocated_bytes: of a GPU's tensors at the same moments; empty on a CPU.
    """

    peak_bytes: int | None
    resident_bytes: list[int]
    allocated_bytes: list[int]


def measure(spec: Spec, subject: Subject | None = None) -> Memory:
    """Measures, in a fresh process where that is the way.

    Args:
        spec: what.
        subject: of the same case, where this process has it on its GPU.

    Raises:
        RunError: the process failed.
    """
    if spec.case.device == "cuda":
        return _measured(spec, subject or make_subject(spec.case))
    command = [sys.executable, "-m", "maehpc.bench.memory", spec.model_dump_json()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"measuring memory took more than {LIMIT_S:.0f} s; use fewer --images") from error
    if done.returncode:
        told = " ".join(done.stderr.split())[-300:]
        raise RunError(f"the process that measures memory ended with {done.returncode} ({told}); use fewer --images")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _measured(spec: Spec, subject: Subject) -> Memory:
    work, device, process = _work(spec, subject), subject.pixels.device, psutil.Process()
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        wait_for(device)
        peak: int | None = torch.cuda.max_memory_allocated(device) - before
    else:
        _forget_highest_resident()
        before = process.memory_info().rss
        work()
        highest = _highest_resident()
        peak = None if highest is None else highest - before
    resident, allocated = [], []
    if spec.turns:
        for turn in range(1, WARM_UP + spec.turns):
            work()
            if turn >= WARM_UP - 1:
                resident.append(process.memory_info().rss)
                allocated += [torch.cuda.memory_allocated(device)] if device.type == "cuda" else []
    return Memory(peak, resident, allocated)


def _work(spec: Spec, subject: Subject) -> Callable[[], object]:
    """One turn."""
    targets = torch.zeros_like(subject.indices)
    if spec.who == "ours":
        explainer = subject.explainer(spec.methods)
        return lambda: explainer.explain(subject.pixels, subject.indices, targets)
    captum = Captum(subject.classifier, subject.case.settings(("saliency",)), spec.stock)
    captum.cuts = {method: SubBatch(*cut) for method, cut in spec.cuts.items()}
    x, noise = subject.x, subject.noise()
    return lambda: [captum.sensitivity(method, x, targets, noise) for method in spec.methods]


def _forget_highest_resident() -> None:
    """What it took to get ready does not count (Linux: proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _highest_resident() -> int | None:
    """The largest resident set since then. (`getrusage` would also count that of the process this one came from.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else None


def main(arguments: list[str]) -> None:
    """Measures in this process and prints what was found as JSON.

    Args:
        arguments: the spec.
    """
    spec = Spec.model_validate_json(arguments[0])
    torch.set_num_threads(spec.threads)
    settle(torch.device(spec.case.device))
    print(json.dumps(asdict(_measured(spec, make_subject(spec.case)))))


if __name__ == "__main__":
    main(sys.argv[1:])
