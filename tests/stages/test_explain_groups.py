"""How a shard is cut into groups, and what happens where a group's pass finds no memory."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maehpc.data import PackInfo, Preprocess
from maehpc.devices import is_out_of_memory
from maehpc.explain import Explainer, NoiseKey
from maehpc.models import build_classifier
from maehpc.recipes import AdapterSettings, DataSettings, EncoderSettings, ExplainSettings
from maehpc.stages.explanations import whole_groups

SIDE = 64
INFO = PackInfo("toy", "Toy", "multi-class", (), "", (0.5,) * 3, (0.25,) * 3, {}, (SIDE, SIDE, 3))


@given(
    images=st.integers(1, 400),
    shard=st.integers(1, 90),
    group=st.integers(1, 40),
    chunk=st.integers(1, 5),
    at=st.data(),
)
def test_an_images_group_is_the_same_in_every_cut(
    images: int, shard: int, group: int, chunk: int, at: st.DataObject
) -> None:
    start = at.draw(st.integers(0, (images - 1) // shard)) * shard
    wanted = range(start, min(start + shard, images))
    chunks = list(whole_groups(wanted, group, chunk * group, images))
    seen = [image for part in chunks for image in part]
    assert seen == sorted(set(seen)) and set(wanted) <= set(seen)
    assert all(part.start % group == 0 and len(part) <= chunk * group for part in chunks)
    assert all(part.stop % group == 0 or part.stop == images for part in chunks)
    outside = [image for image in seen if image not in wanted]
    assert len(outside) <= 2 * (group - 1), "no group is computed that the shard has no image of"


def explainer(rows: int | None) -> Explainer:
    encoder = EncoderSettings(name="vit-tiny", patch_size=4, width=96, depth=4, heads=4, weights="scratch")
    classifier = build_classifier(encoder, AdapterSettings(), "cls", SIDE, 3, 5)
    settings = ExplainSettings.model_validate(
        {"sensitivity": {"samples": 63}, "noise_floor_images": 0, "batch_size": 2}
    )
    data = DataSettings(image_size=SIDE, normalization="dataset")
    made = Explainer(classifier, settings, Preprocess(data, INFO), NoiseKey(0, "toy"))
    if rows is not None:
        made._rows = rows
    return made


def explained(made: Explainer) -> dict[str, torch.Tensor]:
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = made.explain(pixels, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    return {**found.maps, **{f"{name}_sensitivity": values for name, values in found.sensitivity.items()}}


def limit_memory(mebibytes: int) -> None:
    """What this process may take beyond what it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20), resource.RLIM_INFINITY))


def short_of_memory(shortens: bool, result: Path) -> None:
    """Explains by passes of 128 rows, which do not fit; leaves what was found, or what was said of it."""
    torch.set_num_threads(1)
    explained(explainer(rows=2))  # what oneDNN takes at first does not fit beside a pass that failed
    made = explainer(rows=128)
    made.shortens = shortens
    limit_memory(150)
    try:
        found = explained(made)
    except (RuntimeError, MemoryError) as error:
        assert is_out_of_memory(error), error
        found = {}
    torch.save((found, made.take_warnings(), made._rows), result)


def in_fresh_process(shortens: bool, result: Path) -> tuple[dict[str, torch.Tensor], list[str], int]:
    """A fork of this process would have its heap: how much of that is free depends on the tests before."""
    process = multiprocessing.get_context("spawn").Process(target=short_of_memory, args=(shortens, result))
    process.start()
    process.join()
    assert process.exitcode == 0
    found: tuple[dict[str, torch.Tensor], list[str], int] = torch.load(result)
    return found


@pytest.mark.slow
def test_where_passes_must_stay_as_long_the_lack_of_memory_is_told(tmp_path: Path) -> None:
    assert in_fresh_process(False, tmp_path / "result") == ({}, [], 128)


@pytest.mark.slow
def test_where_memory_runs_out_passes_become_shorter(tmp_path: Path) -> None:
    """A real limit of the address space; what is found differs from that without one by rounding alone."""
    plain = explained(explainer(rows=8))
    found, warnings, rows = in_fresh_process(True, tmp_path / "result")
    assert warnings and "out of memory with 128 rows a pass: going on with 64" in warnings[0], warnings
    assert rows < 128 and set(found) == set(plain)
    for name, values in plain.items():
        torch.testing.assert_close(found[name], values, rtol=2e-3, atol=1e-6, msg=name)
