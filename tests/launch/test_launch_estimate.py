"""The closed forms against operations that torch counted, bytes and files against real runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from flops import flop_counter
from timm.layers import set_fused_attn, use_fused_attn
from tiny import tiny_context, tiny_recipe
from torch import Tensor

from maehpc.data import Preprocess
from maehpc.experiment import Experiment
from maehpc.explain import Explainer, NoiseKey
from maehpc.explain.methods import Method, method_class
from maehpc.explain.metrics.base import Metric
from maehpc.explain.metrics.registry import metric_class
from maehpc.launch import flops, footprint
from maehpc.launch.estimate import Cost, _computed, estimate, human_bytes
from maehpc.launch.flops import Vit
from maehpc.launch.hardware import cpu_cores, hardware_for, hardware_of
from maehpc.launch.profile import parse_profile
from maehpc.maps import StoreLayout
from maehpc.models import MaskedAutoencoder, build_classifier, build_encoder
from maehpc.recipes import Recipe, load_recipe, plugins
from maehpc.recipes.plugins import METHODS, METRICS, Folder
from maehpc.stages.begin import begin
from maehpc.stages.explanations import store_layout, whole_groups
from maehpc.stages.pipeline import run_stages
from maehpc.stages.preflight import _NO_DATA

SIZES = (
    ("vit-tiny", 32, 4, 3, {"width": 64, "depth": 3, "heads": 4}, 0.75),
    ("vit-tiny", 48, 8, 1, {"width": 32, "depth": 5, "heads": 2}, 0.6),
)
TOLERANCE = 1e-9
"""The closed form counts the very same products, so rounding alone may differ."""


@pytest.fixture(autouse=True)
def unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zeros that attention pads its keys with are no work that an estimate counts."""
    monkeypatch.setattr("maehpc.explain.rules.attention._MULTIPLE", 1)


class OneModule:
    """In the place of torch's tracker of modules, whose hooks forbid `torch.autograd.grad`."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def counted(work: Any) -> int:
    counter = flop_counter()
    counter.mod_tracker = OneModule()
    with counter:
        work()
    return int(counter.get_total_flops())


def recipe_of(size: tuple[Any, ...], **sections: Any) -> Recipe:
    name, side, patch, channels, shape, ratio = size
    settings = {
        "data": {"image_size": side, "channels": channels, "normalization": "dataset"},
        "encoder": {"name": name, "patch_size": patch, **shape},
        "pretrain": {"decoder": {"width": 16, "depth": 2, "heads": 2}, "mask_ratio": ratio},
    }
    return load_recipe(None, settings={**settings, **sections})


def unfused(model: Any) -> Any:
    """Attention by its two products: torch counts the fused kernel's backward as if it recomputed the forward."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def vit_of(recipe: Recipe) -> Vit:
    return Vit.of(recipe.encoder, recipe.data.image_size, recipe.data.channels)


def images_of(recipe: Recipe, count: int) -> Tensor:
    side, channels = recipe.data.image_size, recipe.data.channels
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(3))


def classifier_of(recipe: Recipe, classes: int) -> Any:
    data, head = recipe.data, recipe.finetune
    encoder = recipe.encoder.model_copy(update={"weights": "scratch"})
    return build_classifier(encoder, head.adapter, head.representation, data.image_size, data.channels, classes)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[1]))
def test_pretraining_step_counts_what_torch_counts(size: tuple[Any, ...]) -> None:
    recipe = recipe_of(size)
    encoder = build_encoder(recipe.encoder, recipe.data.image_size, recipe.data.channels)
    mae = unfused(MaskedAutoencoder(encoder, recipe.pretrain.decoder, norm_pix=True)).train()
    images, ratio = images_of(recipe, 3), recipe.pretrain.mask_ratio
    work = flops.autoencoder(vit_of(recipe), recipe.pretrain.decoder, ratio)

    forward = counted(lambda: mae(images, torch.rand(3, mae.patches), ratio))
    step = counted(lambda: mae(images, torch.rand(3, mae.patches), ratio).loss.backward())

    assert 3 * work.forward == pytest.approx(forward, rel=TOLERANCE)
    assert 3 * work.training == pytest.approx(step, rel=TOLERANCE)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[1]))
@pytest.mark.parametrize("layers", [1, 2])
def test_finetuning_step_counts_what_torch_counts(size: tuple[Any, ...], layers: int) -> None:
    recipe = recipe_of(size, finetune={"adapter": {"layers": layers, "hidden": 48}})
    classifier = unfused(classifier_of(recipe, 7)).train()
    vit, images = vit_of(recipe), images_of(recipe, 3)
    head = flops.adapter(vit.width, 7, recipe.finetune.adapter)
    whole = vit.stem(vit.patches).without_input_gradient + vit.body + head
    assert 3 * whole.training == pytest.approx(counted(lambda: classifier(images).sum().backward()), rel=TOLERANCE)

    features = torch.rand(3, vit.width)
    alone = flops.adapter_alone(vit.width, 7, recipe.finetune.adapter)
    step = counted(lambda: classifier.head(features).sum().backward())
    assert 3 * alone.training == pytest.approx(step, rel=TOLERANCE)


def explained(recipe: Recipe, count: int, classes: int = 5) -> tuple[int, int]:
    """Operations that torch counted while images were explained: before the first image, and for the images."""
    images, made = images_of(recipe, count), []
    classifier = classifier_of(recipe, classes)
    data = Preprocess(recipe.data, _NO_DATA)
    before = counted(lambda: made.append(Explainer(classifier, recipe.explain, data, NoiseKey(0, "none"))))
    labels = torch.zeros(count, dtype=torch.int64)
    return before, counted(lambda: made[0].explain(images, torch.arange(count), labels))


def explanation_of(recipe: Recipe, classes: int = 5) -> flops.Explained:
    return flops.Explained(vit_of(recipe), classes, recipe.finetune, recipe.explain)


def explain_recipe(size: tuple[Any, ...], representation: str = "cls", **explain: Any) -> Recipe:
    defaults = {"batch_size": 4, "noise_floor_images": 0, "sensitivity": {"samples": 0}}
    return recipe_of(size, finetune={"representation": representation}, explain={**defaults, **explain})


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[1]))
@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize(
    "methods",
    [
        ("saliency", "gradcam", "deeplift"),
        ("saliency", "gradcam", "deeplift-captum"),
        ("saliency",),
        ("gradcam",),
        ("deeplift",),
        ("deeplift-captum",),
        ("attnlrp",),
        ("gradcam", "deeplift-captum"),
        ("input-x-gradient", "gradcam-plus-plus", "gradcam", "deeplift", "deeplift-captum", "attnlrp"),
    ],
    ids="+".join,
)
def test_explanation_counts_what_torch_counts(
    size: tuple[Any, ...], representation: str, methods: tuple[str, ...]
) -> None:
    recipe = explain_recipe(size, representation, methods=methods)
    work, (before, images) = explanation_of(recipe), explained(recipe, 2)
    assert work.preparation == pytest.approx(before, rel=TOLERANCE)
    assert 2 * work.image == pytest.approx(images, rel=TOLERANCE)


def test_perturbations_and_the_noise_floor_are_counted() -> None:
    recipe = explain_recipe(SIZES[0], sensitivity={"samples": 2}, noise_floor_images=3)
    work, (_, images) = explanation_of(recipe), explained(recipe, 4)
    assert work.image == pytest.approx(3 * work.attribution, rel=TOLERANCE)
    assert 4 * work.image + 3 * work.attribution + work.preparation == pytest.approx(images, rel=TOLERANCE)


@pytest.mark.parametrize(
    "layer",
    ["blocks.0.norm1", "blocks.-1.norm1", "blocks.1.norm2", "blocks.1.attn", "blocks.1.mlp", "blocks.1", "patch_embed"],
)
def test_class_activation_maps_alone_stop_at_their_layer(layer: str) -> None:
    recipe = explain_recipe(SIZES[0], methods=("gradcam",), gradcam={"layer": layer})
    work, (before, images) = explanation_of(recipe), explained(recipe, 1)
    assert work.preparation == pytest.approx(before, rel=TOLERANCE)
    assert work.image == pytest.approx(images, rel=TOLERANCE)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[1]))
@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize("methods", [("saliency",), ("gradcam",), ("deeplift", "deeplift-captum")], ids="+".join)
def test_searches_count_what_torch_counts(size: tuple[Any, ...], representation: str, methods: tuple[str, ...]) -> None:
    """All but what lies before the first or behind the last function whose derivative depends on the image."""
    sensitivity = {"kinds": ("pgd", "centre"), "search": {"steps": 2}}
    recipe = explain_recipe(size, representation, methods=methods, sensitivity=sensitivity)
    _, images = explained(recipe, 1)
    assert explanation_of(recipe).image == pytest.approx(images, rel=0.001)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "rise" else name for name in METHODS]
)
def test_every_method_counts_about_what_torch_counts(name: str) -> None:
    """Products of attention weights are not counted, nor is the whole image's pass beside those of covered ones."""
    recipe = explain_recipe(SIZES[0], methods=(name,))
    _, images = explained(recipe, 1)
    assert explanation_of(recipe).image == pytest.approx(images, rel=0.02)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("pointing", "mass")])
def test_every_metric_counts_about_what_torch_counts(name: str) -> None:
    recipe = explain_recipe(SIZES[0], methods=("saliency", "gradcam"), metrics=(name,))
    work, (_, images) = explanation_of(recipe), explained(recipe, 2)
    # A metric that explains other weights prepares an engine for them.
    prepared = work.preparation if plugins.facts("metrics", name).get("attributions") == 1 else 0
    assert 2 * work.image + prepared == pytest.approx(images, rel=0.01)


@pytest.mark.parametrize("sensitivity", [{"samples": 10}, {"samples": 9}, {"samples": 10, "norm": "l1"}], ids=str)
def test_perturbations_that_serve_twice_are_counted_once(sensitivity: dict[str, Any]) -> None:
    recipe = explain_recipe(SIZES[0], metrics=("lipschitz",), sensitivity=sensitivity)
    _, images = explained(recipe, 1)
    assert explanation_of(recipe).image == pytest.approx(images, rel=TOLERANCE)


@pytest.mark.parametrize(("folder", "name"), [("methods", n) for n in METHODS] + [("metrics", n) for n in METRICS])
def test_a_plugins_file_says_all_that_its_class_says(folder: Folder, name: str) -> None:
    """Estimates and reports read literals from the file: what a class has from another must be said again."""
    kind: Any = method_class(name) if folder == "methods" else metric_class(name)
    base: Any = Method if folder == "methods" else Metric
    found = plugins.facts(folder, name)
    for fact in get_type_hints(base, globalns=vars(sys.modules[base.__module__])):
        if fact in ("name", "Options"):
            continue
        said = getattr(kind, fact)
        assert found.get(fact, getattr(base, fact, None)) == said, fact


@pytest.mark.parametrize(
    ("shard", "group", "images"), [(8, 4, 20), (6, 4, 20), (5, 16, 20), (20, None, 20), (7, 3, 60)]
)
def test_whole_groups_are_computed(shard: int, group: int | None, images: int) -> None:
    """What a shard cuts off a group is computed with it: against the images that the stage hands to the explainer."""
    settings = tiny_recipe(f"explain.maps.shard_images={shard}").explain.model_copy(update={"batch_size": group})
    expected = []
    for start in range(0, images, shard):
        wanted = range(start, min(start + shard, images))
        chunks = whole_groups(wanted, group or 1, 2 * (group or 1), 60)
        expected.append([image for chunk in chunks for image in chunk])
    assert [list(part) for part in _computed(settings, images, 60)] == expected


OWN_OPTIONS = {"integrated-gradients": {"steps": 7}}


def test_passes_that_options_decide_are_not_guessed() -> None:
    methods = "explain.methods=[saliency, integrated-gradients]"
    cost = cost_of(tiny_recipe(methods, f"explain.options={json.dumps(OWN_OPTIONS)}"), "explain")
    assert (cost.flops, cost.device_hours) == (None, None)
    assert cost.bytes is not None and cost.images == 20
    assert cost.notes == (
        "integrated-gradients: FLOPs and hours are not estimated where explain.options changes the number of passes",
    )
    assert (cost_of(tiny_recipe(methods), "explain").flops or 0) > 10 * (cost_of(tiny_recipe(), "explain").flops or 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"methods": METHODS, "maps": {"channels": "full", "dtype": "float16", "pixels": False}},
        {"methods": METHODS, "gradcam": {"upsample": "bilinear"}},
        {"sensitivity": {"kinds": ("pgd", "topk", "centre", "targeted"), "samples": 7}},
        {"sensitivity": {"kinds": ("random", "pgd"), "samples": 7}},
        {"sensitivity": {"samples": 0}, "metrics": [name for name in METRICS if name not in ("pointing", "mass")]},
    ],
    ids=["defaults", "full", "upsampled", "searched", "both", "metrics"],
)
@pytest.mark.parametrize("task", ["multi-class", "multi-label"])
def test_arrays_are_those_of_the_stage(settings: dict[str, Any], task: str) -> None:
    recipe = explain_recipe(SIZES[0], **{"sensitivity": {}, **settings})
    vit, side, channels = vit_of(recipe), recipe.data.image_size, recipe.data.channels
    data = Preprocess(recipe.data, _NO_DATA)
    explainer = Explainer(classifier_of(recipe, 5), recipe.explain, data, NoiseKey(0, "none"))
    info = SimpleNamespace(name="none", title="None", task=task, classes=["a", "b", "c", "d", "e"])
    height = int(vit.patches**0.5)
    run: Any = SimpleNamespace(recipe=recipe)
    pack: Any = SimpleNamespace(info=info)
    dataset: Any = SimpleNamespace(preprocess=data)
    layout: StoreLayout = store_layout(run, pack, dataset, explainer, (height, height), 20, "0" * 64)
    assert layout.table is not None
    stored = {
        name: footprint.StoredArray(
            math.prod(array.shape), np.dtype((array if array.is_map else layout.table).dtype).itemsize, array.is_map
        )
        for name, array in layout.arrays.items()
    }
    ours = footprint.stored_arrays(recipe.explain, side, channels, vit.patches, 5, task == "multi-label")
    assert ours == stored
    assert list(ours) == list(stored)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def disk(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


@pytest.fixture
def products() -> Any:
    """Attention by its two products in every model that is built."""
    before = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(bool(before))


def cost_of(recipe: Recipe, stage: str) -> Cost:
    (cost,) = estimate(recipe, [stage]).costs
    return cost


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("finetune.freeze=false", "finetune.accumulate=2"),
        ("finetune.crop_scale=[0.5, 1.0]", "finetune.adapter.layers=1", "probe.crop_scale=[0.5, 1.0]"),
        ("explain.target=label", "explain.maps.channels=full", "explain.gradcam.upsample=nearest"),
        ("pretrain.optim={name: sgd, lr: 0.01, momentum: 0.9}", "explain.sensitivity.samples=0"),
        (
            "explain.methods=[saliency, deeplift]",
            "explain.sensitivity.kinds=[random, pgd]",
            "explain.sensitivity.search.steps=2",
            "explain.maps.shard_images=6",
            "explain.metrics=[sparseness, deletion]",
        ),
    ],
    ids=["defaults", "unfrozen", "augmented", "full maps", "sgd", "searched"],
)
def test_stages_cost_what_was_estimated(tmp_path: Path, products: None, overrides: tuple[str, ...]) -> None:
    context = tiny_context(tmp_path, "probe.epochs=3", "probe.optim.warmup_epochs=1", *overrides)
    recipe, experiment = context.recipe, context.experiment
    left = 0
    stages = ("pretrain", "finetune", "probe", "explain")
    for stage in stages:
        cost = cost_of(recipe, stage)
        set_fused_attn(stage == "explain")  # which has its own pullback of it
        with begin(context, [], [stage]):
            operations = counted(lambda stage=stage: run_stages([context], [stage]))
        folders = (
            [experiment.root / stage] if stage != "explain" else [experiment.root / "maps", experiment.root / "ledger"]
        )
        found = [path for folder in folders for path in files_below(folder)]
        left += len(found)
        assert cost.files == len(found), stage
        assert cost.bytes is not None and cost.flops is not None
        assert disk(found) <= cost.bytes <= 2.5 * disk(found), stage
        # Random crops are matrix products too, and are not the model's. Searches are counted a little from above.
        searched = stage == "explain" and recipe.explain.sensitivity.searches
        assert cost.flops <= operations * (1.001 if searched else 1 + TOLERANCE), stage
        cropped = stage == "pretrain" or (stage in ("finetune", "probe") and getattr(recipe, stage).crop_scale)
        assert cost.flops == pytest.approx(operations, rel=0.05 if cropped else 0.002), stage
    # The experiment's own files; and of each stage's job, which there is none of here, ten files and a rank's logs.
    assert estimate(recipe, stages).total.files == left + 4 + len(stages) * (10 + 2)
    assert len(files_below(experiment.root)) == left + 4


@pytest.mark.slow
def test_bytes_of_weights_and_checkpoints_are_near(tmp_path: Path) -> None:
    """Where tensors outweigh their headers, the estimate is close and not only a bound."""
    wide = (
        "encoder.width=192",
        "encoder.heads=4",
        "pretrain.decoder.width=128",
        "pretrain.epochs=2",
        "pretrain.images=64",
    )
    context = tiny_context(tmp_path, *wide)
    with begin(context, [], ["pretrain"]):
        run_stages([context], ["pretrain"])
    cost = cost_of(context.recipe, "pretrain")
    found = disk(files_below(context.experiment.root / "pretrain"))
    assert cost.bytes is not None and found <= cost.bytes <= 1.02 * found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("gpu:a100:4", "NVIDIA A100"),
        ("h100&ib", "NVIDIA H100"),
        ("gpu:nvidia_h200_141gb:8", "NVIDIA H200"),
        ("gh200", "NVIDIA GH200"),
        ("v100-32g", "NVIDIA V100"),
        ("a100sxm", "NVIDIA A100"),
        ("gpu:l40s:2", "NVIDIA L40S"),
        ("gpu:4", None),
        ("a1000", None),
        ("gpu:t400:1", None),
    ],
)
def test_gpus_are_found_in_what_profiles_say(text: str, name: str | None) -> None:
    found = hardware_of(text)
    assert (found.name if found else None) == name


def test_hardware_of_profiles() -> None:
    def hours(**keys: Any) -> float:
        profile = parse_profile({"kind": "slurm", **keys})
        found = estimate(load_recipe("pretrain/vit-base"), ["pretrain"], hardware=hardware_for(profile))
        assert found.total.device_hours is not None
        return found.total.device_hours

    assumed = hours(gpus_per_node=4)
    assert hours(gpus_per_node=4, gpu_type="a100") == assumed
    assert hours(gpus_per_node=4, gpu_teraflops=312) == pytest.approx(assumed)
    assert hours(gpus_per_node=4, constraint="h100") == pytest.approx(assumed * 312 / 989)
    assert hours(cpus_per_task=8) == pytest.approx(hours() / 8)
    local = hardware_for(parse_profile({"kind": "local", "tasks": 2, "threads": 3, "device": "cpu"}))
    assert local == cpu_cores(3)


def test_counts_by_hand() -> None:
    recipe = tiny_recipe("datasets=[retinamnist, digits]", "finetune.batch_size=30")
    found = estimate(recipe, ["pretrain", "finetune", "explain"], ranks=4)
    by_stage = {(cost.stage, cost.dataset): cost for cost in found.costs}
    # 200 images in batches of 32: six whole ones an epoch. 100 images in batches of 30: four, the last one smaller.
    assert by_stage["pretrain", "retinamnist"].steps == 3 * 6
    assert by_stage["pretrain", "digits"].images == 3 * 6 * 32
    assert by_stage["finetune", "digits"].steps == 3 * 4
    assert by_stage["finetune", "digits"].images == 300
    assert by_stage["explain", "digits"].images == 20
    assert found.total.steps == 2 * (18 + 12)
    assert found.total.flops == pytest.approx(sum(cost.flops or 0 for cost in found.costs))
    assert found.hours == pytest.approx((found.total.device_hours or 0) / 4)
    # A data set that is smaller than what is asked for is taken whole.
    whole = estimate(tiny_recipe("pretrain.images=5000", "pretrain.batch_size=5000"), ["pretrain"]).costs[0]
    assert (whole.steps, whole.images) == (3, 3 * 1197)


def test_a_pool_is_told_in_workers() -> None:
    recipe, stages, device = tiny_recipe(), ["pretrain", "finetune", "explain"], cpu_cores(2)

    def told(stages: list[str], ranks: int, hosts: int | None) -> tuple[str, int]:
        found = estimate(recipe, stages, hardware=device, ranks=ranks, pool_hosts=hosts)
        assert found.as_json()["ranks"] == ranks and found.total.files is not None
        assert found.hours == pytest.approx((found.total.device_hours or 0) / ranks)
        return "\n".join(found.lines()), found.total.files

    alone, shared = told(["explain"], 1, None), told(["explain"], 6, 2)
    assert "worker" not in alone[0] and "6 workers of 2 hosts" in shared[0] and "worker-hours" in shared[0]
    assert "rank" not in shared[0]
    # A log's two files on the second host and its word, and pool.jsonl.
    assert shared[1] == alone[1] + 2 + 1 + 1
    assert "6 workers of 1 host," in told(["explain"], 6, 1)[0]
    text, files = told(stages, 6, 2)
    assert "6 ranks (explaining: 6 workers of 2 hosts)" in text and "rank-hours" in text
    assert files == told(stages, 6, None)[1] - 2 * 6 + 2 * 2 + 1 + 1
    assert told(stages[:2], 6, 2) == told(stages[:2], 6, None)


def test_frozen_features_are_computed_once() -> None:
    def flops_of(*overrides: str) -> float:
        return cost_of(tiny_recipe(*overrides), "finetune").flops or 0.0

    once, thrice = flops_of("finetune.epochs=1"), flops_of("finetune.epochs=3")
    assert thrice < 1.1 * once
    assert flops_of("finetune.epochs=3", "finetune.crop_scale=[0.5, 1.0]") > 1.2 * once
    assert flops_of("finetune.epochs=3", "finetune.freeze=false") > 3 * once
    probe = [
        cost_of(tiny_recipe(f"probe.epochs={epochs}", "probe.optim.warmup_epochs=0"), "probe") for epochs in (1, 30)
    ]
    assert 0 < (probe[0].flops or 0) < (probe[1].flops or 0) < 1.5 * (probe[0].flops or 0)


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    unset = "patch_size: null, width: null, depth: null, heads: null"
    timm = cost_of(tiny_recipe(f"encoder={{name: timm:vit_tiny_patch16_224, {unset}}}"), "pretrain")
    assert (timm.flops, timm.device_hours, timm.bytes, timm.files) == (None, None, None, None)
    assert timm.steps == 18 and "timm alone knows" in timm.notes[0]

    folder = tmp_path / "pictures"
    folder.mkdir()
    found = estimate(tiny_recipe(f"datasets=[digits, '{folder}']"), ["pretrain", "explain"])
    unknown = [cost for cost in found.costs if cost.dataset == "pictures"]
    assert all(cost.images is None and cost.flops is None for cost in unknown)
    assert found.total.images is None and found.hours is None and found.total.peak_bytes is None
    assert "pictures: the number of images is unknown until it is packed" in found.lines()
    json.dumps(found.as_json(), allow_nan=False)
    folder.rmdir()
    lines = estimate(tiny_recipe(f"datasets=['{folder}']"), ["pretrain"]).lines()
    assert any(f"nothing lies at {folder}" in line for line in lines)


def test_own_files_are_counted_by_their_headers(tmp_path: Path) -> None:
    arrays = {}
    for split, count in (("train", 70), ("val", 20), ("test", 30)):
        arrays[f"{split}_images"] = np.zeros((count, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = np.zeros((count, 3), np.int64)
    np.savez_compressed(tmp_path / "own.npz", **arrays)
    found = cost_of(tiny_recipe(f"datasets=['{tmp_path / 'own.npz'}']"), "explain")
    assert found.images == 20
    assert cost_of(tiny_recipe(f"datasets=['{tmp_path / 'own.npz'}']", "explain.images=null"), "explain").images == 30
    (tmp_path / "own.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:-100])
    assert cost_of(tiny_recipe(f"datasets=['{tmp_path / 'own.npz'}']"), "explain").images is None


def test_a_measured_speed_is_preferred(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "run")
    recipe = tiny_recipe("datasets=[digits, retinamnist]")
    folder = experiment.stage("pretrain", "digits")
    folder.mkdir(parents=True)
    lines = [
        {"step": 6, "seconds": 1.0, "images_per_second": 400.0, "ranks": 4},
        {"step": 9, "checkpoint_stall_s": 0.1},
    ]
    (folder / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "ima')
    found = estimate(recipe, ["pretrain", "finetune"], experiment=experiment)
    measured = [cost for cost in found.costs if "measured" in cost.basis]
    assert [(cost.stage, cost.dataset) for cost in measured] == [("pretrain", "digits"), ("pretrain", "retinamnist")]
    assert measured[0].device_hours == pytest.approx(3 * 6 * 32 / 100 / 3600)


def test_the_table_can_be_read() -> None:
    found = estimate(load_recipe("pipeline/report"), ["pretrain", "finetune", "explain"])
    lines = found.lines()
    assert all(len(line) <= 110 for line in lines)
    table = lines[: 2 + len(found.costs)]
    assert len({len(line) for line in table}) == 1
    assert "an NVIDIA A100 is assumed" in "\n".join(lines)
    assert [human_bytes(size) for size in (0, 999, 1000, 123_456, 9_995_000, 2.5e12)] == [
        "0 B", "999 B", "1 kB", "123 kB", "9.99 MB", "2.5 TB",
    ]  # fmt: skip


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from maehpc.recipes import load_recipe\n"
        "from maehpc.launch.estimate import estimate\n"
        "estimate(load_recipe('pipeline/report'), ['pretrain', 'finetune', 'probe', 'explain']).lines()\n"
        "heavy = {'torch', 'timm', 'h5py', 'numpy', 'pandas', 'ray', 'medmnist', 'zarr'} & set(sys.modules)\n"
        "print(sorted(heavy), time.perf_counter() - start)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.startswith("[] "), told
    assert float(told.split()[1]) < 2.0
