"""The benchmark of explanations runs captum as captum is meant, and records what it measured."""

from __future__ import annotations

import json
import mmap
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import DeepLift, Saliency
from flops import flop_counter
from torch import Tensor

from maehpc.bench import explain, memory
from maehpc.bench.case import CLASSES, HEAD, Case, Subject, make_subject
from maehpc.bench.explain import METHODS, TOGETHER, Effort, Timed, interleaved, run, variants
from maehpc.bench.figures import Report
from maehpc.bench.memory import Memory, Spec
from maehpc.bench.peers import Captum, SubBatch, candidates
from maehpc.cli.main import main
from maehpc.explain import Engine
from maehpc.launch.flops import Explained, Vit
from maehpc.progress import Silent
from maehpc.recipes import EncoderSettings

TINY = EncoderSettings(name="vit-tiny", patch_size=4, width=32, depth=2, heads=4, weights="scratch")
CASE = Case(encoder=TINY, image_size=16, samples=4, images=4)

KEYS = {
    *("ratio_all", "ratio_all_exact", "ratio_deeplift", "ratio_saliency", "ratio_gradcam", "ratio_deeplift_captum"),
    *("images_per_second", "agreement", "completeness"),
    *("flops_per_image", "flops_per_second", "matmul_flops_per_second"),
    *("peak_memory_bytes", "peak_memory_bytes_per_image", "memory_growth_bytes", "device_memory_growth_bytes"),
    *("memory_resident_bytes", "images_at_once", "peer", "peer_version", "peer_sub_batches"),
    *("model", "image_size", "samples", "images", "precision", "device", "seed", "threads", "repeats"),
    *("benchmark", "machine", "load_average", "torch", "maehpc", "parts"),
}
"""The documented ones: a script may count on them."""


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject(CASE)


# What is explained.


def test_a_case_is_the_same_whenever_it_is_made(subject: Subject) -> None:
    again = make_subject(CASE)
    assert all(
        torch.equal(a, b) for a, b in zip(subject.classifier.parameters(), again.classifier.parameters(), strict=True)
    )
    more = again.with_images(6)
    assert more.case.images == 6 and torch.equal(more.pixels[:4], subject.pixels)
    assert len(more.pixels.flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize("name", ["vit-tiny", "vit-small"])
def test_attention_neither_ignores_nor_singles_out(name: str) -> None:
    made = make_subject(Case(encoder=EncoderSettings(name=name, weights="scratch"), image_size=64, images=2))
    block = made.classifier.encoder.blocks[0]
    seen: list[Tensor] = []
    hook = block.attn.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        made.classifier(made.x)
    hook.remove()
    rows, tokens, width = seen[0].shape
    heads = block.attn.num_heads
    q, k, _ = block.attn.qkv(seen[0]).reshape(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    spread = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).std().item()
    assert 0.8 < spread < 3


# captum as the peer.


def naive_map(subject: Subject, method: str, x: Tensor, target: int) -> Tensor:
    """One normalised image [1, C, S, S]: captum's map of it alone, or GradCAM written out."""
    classifier, encoder = subject.classifier, subject.classifier.encoder
    x = x.clone().requires_grad_()
    if method == "gradcam":
        tokens: list[Tensor] = []
        hook = encoder.blocks[-1].norm1.register_forward_hook(lambda module, given, output: tokens.append(output))
        score = classifier(x)[0, target]
        hook.remove()
        (gradient,) = torch.autograd.grad(score, tokens[0])
        weights = gradient[0, 1:].mean(dim=0)
        return (tokens[0][0, 1:] @ weights).reshape(4, 4).detach()
    explainer = Saliency(classifier) if method == "saliency" else DeepLift(classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explainer.attribute(x, target=target).detach()[0]


@pytest.mark.parametrize("method", ["saliency", "gradcam", "deeplift"])
def test_captum_gives_the_sensitivity_of_its_definition(subject: Subject, method: str) -> None:
    """Whatever the sub-batches: bare tensors or noise in another order would show."""
    targets = torch.tensor([0, 3, 1, 3])
    noise = subject.noise()
    assert noise.shape == (4, 4, 3, 16, 16) and 0.019 < noise.abs().max() <= 0.02
    expected = []
    for x, target, moves in zip(subject.x, targets.tolist(), noise, strict=True):
        original = naive_map(subject, method, x[None], target)
        changed = [naive_map(subject, method, (x + move)[None], target) for move in moves]
        expected.append(max((original - each).norm() / original.norm() for each in changed))
    captum = Captum(subject.classifier, CASE.settings(("saliency",)))
    for cut in (SubBatch(1, 1), SubBatch(2, 1), SubBatch(4, 1), SubBatch(4, 2), SubBatch(4, 4)):
        captum.cuts[method] = cut
        found = captum.sensitivity(method, subject.x, targets, noise)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=0)
    maps = captum.maps(method, subject.x, targets)
    first = naive_map(subject, method, subject.x[:1], 0)
    torch.testing.assert_close(maps[0], first, rtol=1e-4, atol=1e-6 * first.abs().max().item())


def test_captum_leaves_the_classifier_and_torch_as_they_were(subject: Subject) -> None:
    captum = Captum(subject.classifier, CASE.settings(("saliency",)), stock=True)
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic)
    torch.use_deterministic_algorithms(True)
    try:
        captum.tune(["gradcam"], subject.x, torch.zeros(4, dtype=torch.long), repeats=1)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == before
    assert captum.cuts["gradcam"] in candidates(4, 4)
    assert not any(module._forward_hooks for module in subject.classifier.modules())
    assert type(subject.classifier.encoder.blocks[-1].norm1) is torch.nn.LayerNorm


def test_its_own_noise_is_another(subject: Subject) -> None:
    captum = Captum(subject.classifier, CASE.settings(("saliency",)), stock=True)
    captum.cuts["saliency"] = SubBatch(4, 2)
    targets = torch.zeros(4, dtype=torch.long)
    given = captum.sensitivity("saliency", subject.x, targets, subject.noise())
    own = captum.sensitivity("saliency", subject.x, targets, None)
    assert not torch.allclose(given, own, rtol=1e-4) and (own > 0).all()


def test_sub_batches_divide_the_work_evenly() -> None:
    assert candidates(6, 10) == [(1, 1), (2, 1), (3, 1), (6, 1), (6, 2), (6, 5), (6, 10)]
    assert candidates(1, 1) == [(1, 1)]


def test_the_fastest_sub_batch_is_chosen_and_a_lack_of_memory_borne(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {SubBatch(1, 1): 5.0, SubBatch(2, 1): 4.0, SubBatch(4, 1): 8.0, SubBatch(4, 2): 8.1, SubBatch(4, 4): 9.0}
    targets = torch.zeros(4, dtype=torch.long)

    def speed(self: Captum, method: str, x: Tensor, targets: Tensor, cut: SubBatch, repeats: int) -> float:
        if cut not in speeds:
            raise MemoryError
        return speeds[cut]

    monkeypatch.setattr(Captum, "_rows_a_second", speed)
    captum = Captum(subject.classifier, CASE.settings(("saliency",)))
    captum.tune(["saliency"], subject.x, targets)
    assert captum.cuts["saliency"] == (4, 4)  # 8.1 is no gain over 8, 9 is
    del speeds[SubBatch(4, 4)]
    captum.tune(["gradcam"], subject.x, targets)
    assert captum.cuts["gradcam"] == (4, 1)
    speeds.clear()
    with pytest.raises(MemoryError):
        captum.tune(["deeplift"], subject.x, targets)


# What is computed about the measurements.


class NoModules:
    """torch's tracker of modules hooks their inputs, which a frozen model's first one cannot bear."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("methods", [*variants(METHODS).values(), METHODS])
def test_operations_are_those_that_torch_counts(
    subject: Subject, methods: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maehpc.explain.rules.attention._MULTIPLE", 1)  # padding is no work that is counted
    baseline = torch.zeros(1, 3, 16, 16)
    engine = Engine(subject.classifier, CASE.settings(methods), baseline)
    counter = flop_counter()
    counter.mod_tracker = NoModules()
    with counter:
        engine.attribute(subject.x)
    found = Explained(Vit.of(TINY, 16, 3), CLASSES, HEAD, CASE.settings(methods)).image
    assert counter.get_total_flops() == pytest.approx(4 * found / (1 + CASE.samples), rel=1e-6)


def test_ratios_pair_what_was_measured_in_the_same_round() -> None:
    timed = Timed(
        ours={"saliency": [1.0, 2.0, 4.0], "all": [2.0, 2.0, 8.0], "all_exact": [3.0, 3.0, 3.0]},
        peer={"saliency": [3.0, 4.0, 20.0], "gradcam": [1.0, 1.0, 1.0], "deeplift": [4.0, 5.0, 3.0]},
    )
    assert timed.ratio("saliency") == 3  # of 3, 2, 5
    assert timed.peer_of("all") == [8, 10, 24]
    assert timed.ratio("all") == 4  # of 4, 5, 3
    assert timed.ratio("gradcam") is None and timed.ratio("smoothgrad") is None


def test_turns_are_spread_over_one_another() -> None:
    ours, theirs = [([], str(n).upper) for n in range(6)], [([], str(n).lower) for n in range(3)]
    order = interleaved(ours, theirs)
    assert [turn for turn in order if turn in ours] == ours and [turn for turn in order if turn in theirs] == theirs
    assert [order.index(turn) for turn in theirs] == [1, 4, 7]


def test_peaks_and_leaks_are_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[mmap.mmap] = []

    def taken(megabytes: int) -> mmap.mmap:
        """Memory straight from the kernel: an allocator may have kept some for later."""
        memory = mmap.mmap(-1, megabytes << 20)
        for place in range(0, megabytes << 20, mmap.PAGESIZE):
            memory[place] = 1
        return memory

    def work() -> None:
        taken(160).close()
        kept.append(taken(40))

    monkeypatch.setattr(memory, "_work", lambda spec, subject: work)
    found = memory._measured(Spec(case=CASE, who="ours", methods=METHODS, turns=3), subject)
    assert found.peak_bytes == pytest.approx(160 << 20, rel=0.1)
    assert len(found.resident_bytes) == 4 and found.allocated_bytes == []
    assert found.resident_bytes[-1] - found.resident_bytes[0] == pytest.approx(120 << 20, rel=0.1)


# The whole.


def no_memory(spec: Spec, subject: Subject) -> Memory:
    return Memory(1000 * len(spec.methods), [1, 3] if spec.turns else [], [])


def measured(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Report:
    monkeypatch.setattr(memory, "measure", no_memory)
    return run(Silent(), CASE, effort=Effort(repeats=2, turns=1, matrix=64), images=4, **options)


def test_everything_is_recorded_beside_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(monkeypatch)
    record = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert record.keys() == KEYS
    speeds = record["images_per_second"]
    assert list(speeds["ours"]) == [*METHODS, *TOGETHER]
    assert speeds["peer"].keys() == {"saliency", "gradcam", "deeplift", "all"}
    assert all(record[key] > 0 for key in KEYS if key.startswith("ratio_"))
    agreement = record["agreement"]
    assert agreement.keys() == {"saliency", "gradcam", "deeplift-captum"}
    assert all(0 <= each["maps"] < 1e-4 and each["sensitivity"] < 5e-3 for each in agreement.values()), agreement
    exact, theirs = record["completeness"]["ours"], record["completeness"]["peer"]["deeplift"]
    assert exact["deeplift"]["largest"] < 1e-4 < theirs["median"]
    assert exact["deeplift-captum"]["median"] == pytest.approx(theirs["median"], rel=1e-2)
    for name, flops in record["flops_per_image"].items():
        assert record["flops_per_second"][name] == pytest.approx(flops * speeds["ours"][name])
    assert record["peak_memory_bytes"] == {"ours": {"all": 3000, "all_exact": 3000}, "peer": {"all": 3000}}
    assert record["peak_memory_bytes_per_image"]["ours"]["all"] == 3000 / record["images_at_once"]["all"]
    assert record["memory_growth_bytes"] == 2
    figures = {figure["name"]: figure["values"] for part in record["parts"] for figure in part["figures"]}
    values = figures["maehpc, all"]
    assert len(values) == 2
    assert speeds["ours"]["all"] == pytest.approx(4 / statistics.median(4 / value for value in values))
    assert any(line.startswith("  all to captum") for line in report.lines())


def test_what_is_not_measured_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(json.dumps(measured(monkeypatch, peer="none", methods=("gradcam",)).as_json()))
    assert record.keys() == KEYS
    assert record["ratio_all"] is None and record["ratio_gradcam"] is None and record["peer"] is None
    assert record["images_per_second"]["peer"] == {} and record["images_per_second"]["ours"].keys() == {"gradcam"}
    assert record["agreement"] == {} and record["completeness"] == {"ours": {}, "peer": {}}


def test_a_turn_is_whole_groups_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", no_memory)
    monkeypatch.setattr(explain, "LEAST_IMAGES", 3)
    case = CASE.model_copy(update={"samples": 31})
    record = run(Silent(), case, ("gradcam",), "none", None, Effort(repeats=1, turns=1, matrix=64)).as_json()
    assert record["images"] >= 3 and record["images"] % record["images_at_once"]["gradcam"] == 0


def refused(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["maehpc", "bench", "explain", *words])
    with pytest.raises(SystemExit) as leave:
        main()
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--peer", "quantus"), "captum"),
        (("--model", "vit-nano"), "choose from vit-tiny, vit-small"),
        (("--methods", "saliency,magic"), "choose from"),
        (("--methods", "saliency,saliency"), "name each once"),
        (("--methods", ","), "choose from"),
        (("--image-size", "30"), "not divisible by the patch size 16 of vit-tiny"),
        (("--precision", "tf32", "--device", "cpu"), "needs a GPU"),
        (("--samples", "0"), "--samples"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_measured(
    words: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused([*words, "--results", str(tmp_path / "results")], monkeypatch, capsys)
    assert line.startswith("maehpc: ") and told in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With memory measured in processes of its own."""
    out = tmp_path / "figures.json"
    words = ["--quick", "--image-size", "32", "--methods", "saliency,gradcam,deeplift", "--threads", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["maehpc", "bench", "explain", *words, "--device", "cpu", "--out", str(out), "-q"])
    main()
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(out.read_text()) and record.keys() == KEYS
    assert record["ratio_all"] is None and record["ratio_all_exact"] > 0
    assert 1e6 < record["peak_memory_bytes"]["ours"]["all_exact"] < 1e9
    assert 1e6 < record["peak_memory_bytes"]["peer"]["all"] < 1e9
    assert len(record["memory_resident_bytes"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
