"""What a rank computes on, and how fast that is taken to be: GPUs by their data sheets, CPUs by the core."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from maehpc.launch.profile import LocalProfile, Profile, SlurmProfile

UTILISATION = {"fp32": 0.5, "tf32": 0.35, "bf16": 0.35, "fp16": 0.35}
"""Share of a GPU's peak that training is taken to reach; larger encoders come closer to it than small ones."""

CORE_FLOPS = 50e9
"""Operations a second that one CPU core is taken to sustain in float32."""

RANK_HOURS = "rank-hours"
"""What an hour of some CPU cores is called."""


@dataclass(frozen=True)
class Hardware:
    """What one rank computes on.

    Attributes:
        name: for people.
        unit: what an hour of it is called.
        sustained: operations a second by precision.
        basis: where `sustained` comes from, in words.
    """

    name: str
    unit: str
    sustained: dict[str, float]
    basis: str


_PEAKS = {
    "gh200": ("NVIDIA GH200", 67, 989),
    "h200": ("NVIDIA H200", 67, 989),
    "h100": ("NVIDIA H100", 67, 989),
    "a100": ("NVIDIA A100", 19.5, 312),
    "a40": ("NVIDIA A40", 37.4, 149.7),
    "a30": ("NVIDIA A30", 10.3, 165),
    "l40s": ("NVIDIA L40S", 91.6, 362),
    "l4": ("NVIDIA L4", 30.3, 121),
    "v100": ("NVIDIA V100", 15.7, 15.7),
    "t4": ("NVIDIA T4", 8.1, 8.1),
}
"""Peaks in Tflop/s, float32 outside tensor cores and dense bfloat16, from data sheets. float16 is as fast as bfloat16,
and TF32 half as fast where there is any."""

ASSUMED_GPU = "a100"
"""Where nobody names one."""


def gpu(key: str) -> Hardware:
    """A GPU by its key in the table of peaks, such as `a100`."""
    name, single, half = _PEAKS[key]
    tera = {"fp32": single, "tf32": max(single, half / 2), "bf16": half, "fp16": half}
    peaks = {precision: peak * 1e12 for precision, peak in tera.items()}
    sustained = {precision: peak * UTILISATION[precision] for precision, peak in peaks.items()}
    return Hardware(name, "GPU-hours", sustained, "of its peak")


def hardware_of(text: str) -> Hardware | None:
    """The GPU that a text names (`gpu:a100:4`, `h100&ib`), if it is a known one."""
    words = "".join(character if character.isalnum() else " " for character in text.lower()).split()
    for key in _PEAKS:
        if any(re.fullmatch(rf"(nvidia)?{key}([a-z]\w*)?", word) for word in words):
            return gpu(key)
    return None


def cpu_cores(count: int) -> Hardware:
    """A rank on so many cores."""
    sustained = dict.fromkeys(UTILISATION, CORE_FLOPS * count)
    name = f"{count} CPU core{'s' if count > 1 else ''}"
    return Hardware(name, RANK_HOURS, sustained, f"{CORE_FLOPS / 1e9:g} Gflop/s a core")


def hardware_for(profile: Profile) -> Hardware | None:
    """What a rank of a profile computes on; None where it is a GPU that nothing names."""
    if profile.gpu_teraflops is not None:
        sustained = {precision: profile.gpu_teraflops * 1e12 * share for precision, share in UTILISATION.items()}
        return Hardware(f"a GPU of {profile.gpu_teraflops:g} Tflop/s", "GPU-hours", sustained, "of its peak")
    if isinstance(profile, SlurmProfile):
        if not profile.gpus_per_node or profile.device == "cpu":
            return cpu_cores(profile.threads or profile.cpus_per_task or 1)
        words = (profile.gpu_type, profile.constraint, profile.partition)
        return next((found for word in words if word and (found := hardware_of(word))), None)
    ranks = profile.tasks if isinstance(profile, LocalProfile) else 1
    if profile.device == "cpu" or not Path("/dev/nvidia0").exists():
        return cpu_cores(profile.threads or max(1, len(os.sched_getaffinity(0)) // ranks))
    return None
