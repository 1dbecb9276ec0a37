"""The linear probe: its statistics and optimum have references, its result is one for any ranks and any kill."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tiny import in_world, killed_after, killed_at_shares, killed_when, reached, tiny_context
from torch import Tensor

from maehpc.data import Preprocess, open_split, prepare
from maehpc.errors import InputError, Interrupted, RunError
from maehpc.interruption import Stop
from maehpc.progress import Silent
from maehpc.recipes import DataSettings, ProbeSettings
from maehpc.report import aggregate
from maehpc.stages.begin import begin, settled_recipe
from maehpc.stages.context import Context
from maehpc.stages.finetune import finetune
from maehpc.stages.pipeline import run_stages, stages_of
from maehpc.stages.preflight import check
from maehpc.stages.pretrain import pretrain
from maehpc.stages.probe import PROBE, frozen_encoder, probe
from maehpc.stages.verify import verify_results
from maehpc.training.batches import Batches
from maehpc.training.distributed import World
from maehpc.training.finetune import LabelledImages
from maehpc.training.log import read_metrics
from maehpc.training.optim import learning_rate, set_learning_rate
from maehpc.training.probe import LinearProbe, ProbeTask, population

SCRATCH = ("encoder.weights=scratch", "probe.images=300", "probe.checkpoint.every_steps=40")
SAME = (PROBE, "metrics.jsonl", "done.json", "stage.json")


def results_of(context: Context) -> dict[str, bytes]:
    return {name: (context.experiment.stage("probe", "digits") / name).read_bytes() for name in SAME}


def test_statistics_are_those_of_the_population() -> None:
    features = torch.randn(70_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3]) + 100
    mean, variance = population(features)
    exact = features.double().numpy()
    np.testing.assert_allclose(mean.numpy(), exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance.numpy(), exact.var(0), rtol=1e-9)


def test_logits_are_those_of_the_references_head_in_evaluation() -> None:
    features = 5 + 3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    head = LinearProbe(*population(features), classes=4, seed=0)
    norm = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
    norm.running_mean, norm.running_var = features.mean(0), features.var(0, unbiased=False)
    reference = torch.nn.Sequential(norm, torch.nn.Linear(6, 4)).eval()
    reference[1].load_state_dict(head.output.state_dict())
    torch.testing.assert_close(head(features), reference(features), rtol=1e-5, atol=1e-6)


def test_first_weights_are_the_references_and_depend_on_the_seed_alone() -> None:
    mean, variance = torch.zeros(500), torch.ones(500)
    first, second = (LinearProbe(mean, variance, 200, seed) for seed in (3, 3))
    assert torch.equal(first.output.weight, second.output.weight)
    assert not torch.equal(first.output.weight, LinearProbe(mean, variance, 200, 4).output.weight)
    weight = first.output.weight.detach()
    assert float(weight.std()) == pytest.approx(0.01, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=1e-4)
    assert not first.output.bias.any()


def test_a_constant_feature_does_no_harm() -> None:
    features = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    head = LinearProbe(*population(features), classes=2, seed=0)
    normalised = (features - head.mean) / head.deviation
    torch.testing.assert_close(normalised, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), rtol=1e-5, atol=1e-6)


@contextmanager
def pixels_probed(source: str, folder: Path, **settings: Any) -> Iterator[ProbeTask]:
    """A probe on the pixels themselves, 8 x 8 and grey."""
    data = DataSettings(image_size=8, channels=1, normalization="dataset")
    with prepare(source, 28, folder / "packs") as pack:

        def images(split: Any) -> LabelledImages:
            opened = open_split(pack, split, data, torch.device("cpu"))
            return LabelledImages(
                Batches(opened, Preprocess(data, pack.info), None, 0, "probe"), torch.arange(len(opened))
            )

        splits = {split: images(split) for split in ("train", "val", "test")}
        classes = len(pack.info.classes)
        probe_settings = ProbeSettings.model_validate(settings)
        yield ProbeTask(lambda x: x.flatten(1), splits, pack.info.task, classes, probe_settings, 0)


def descend(task: ProbeTask, settings: ProbeSettings) -> None:
    for step in range(settings.epochs * task.steps_per_epoch):
        peak = settings.optim.peak_lr(task.batch_size)
        rate = learning_rate(settings.optim, peak, step, task.steps_per_epoch, settings.epochs)
        set_learning_rate(task.optimizer, rate)
        task.optimizer.zero_grad()
        task.backward(step)
        task.optimizer.step()


def test_the_optimum_is_scikit_learns(tmp_path: Path) -> None:
    """With decay the loss has one optimum: C of scikit-learn is 1 / (images * decay)."""
    settings = ProbeSettings.model_validate(
        {
            "optim": {"name": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.01},
            "epochs": 1500,
            "batch_size": 100_000,
        }
    )
    with pixels_probed("digits", tmp_path, **settings.model_dump()) as task:
        descend(task, settings)
        features, labels = task._features["train"], task._labels["train"].numpy()
        normalised = ((features - task.probe.mean) / task.probe.deviation).numpy().astype(np.float64)
        reference = LogisticRegression(C=1 / (len(labels) * 0.01), tol=1e-8, max_iter=5000).fit(normalised, labels)
        weight = task.probe.output.weight.detach().numpy()
        # the intercept is fixed up to a constant, which no logit's difference shows
        bias = task.probe.output.bias.detach().numpy()
        np.testing.assert_allclose(weight - weight.mean(0), reference.coef_ - reference.coef_.mean(0), atol=2e-3)
        np.testing.assert_allclose(bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=2e-3)
        test = ((task._features["test"] - task.probe.mean) / task.probe.deviation).numpy()
        accuracy = reference.score(test, task._labels["test"].numpy())
        assert task.score("test")["accuracy"] == pytest.approx(accuracy, abs=0.006)


def test_classes_that_a_plane_separates_are_told_apart_without_an_error(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 90), ("val", 21), ("test", 30)):
        labels = np.arange(count) % 3
        images = draw.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        images[np.arange(count), 2, labels * 2] = 200  # one bright pixel says which class
        images[np.arange(count)[:, None], 2, np.array([[2, 4], [0, 4], [0, 2]])[labels]] = 0
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(tmp_path / "planes.npz", **arrays)
    settings = ProbeSettings(batch_size=10)
    with pixels_probed(str(tmp_path / "planes.npz"), tmp_path, batch_size=10) as task:
        descend(task, settings)
        for split in ("train", "val", "test"):
            found = task.score(split)
            assert (found["accuracy"], found["auc"]) == (1.0, 1.0), split
        largest = task.probe.output.weight.detach().argmax(1)
        assert [divmod(int(place), 8) for place in largest] == [(2, 0), (2, 2), (2, 4)]


def test_the_frozen_encoder_gives_cls_or_the_mean_of_patches_and_learns_nothing() -> None:
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features: dict[str, Tensor] = {}
    for representation in ("cls", "mean"):
        context = tiny_context(Path("unused"), "encoder.weights=scratch", f"probe.representation={representation}")
        frozen = frozen_encoder(context.recipe, None)
        assert not frozen.training
        assert not [p for p in frozen.parameters() if p.requires_grad]
        tokens = frozen.encoder.forward_features(images)
        expected = tokens[:, 0] if representation == "cls" else tokens[:, 1:].mean(1)
        features[representation] = frozen.represent(images)
        assert torch.equal(features[representation], expected)
    assert not torch.allclose(features["cls"], features["mean"])


def test_the_stage_from_pretraining_to_report(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "pretrain.epochs=2", "probe.epochs=12")
    stages = ["pretrain", "probe"]
    with begin(context, ["run"], stages):
        record = run_stages([context], stages)[0]["digits"]
    folder = context.experiment.stage("probe", "digits")
    assert json.loads((folder / "done.json").read_text()) == record
    assert record["images"].keys() == record["scores"].keys() == {"train", "val", "test"}
    assert record["scores"]["train"]["accuracy"] > 0.2  # chance is 0.1, and the encoder has hardly learned
    weights = load_file(folder / PROBE)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        "mean": (16,), "deviation": (16,), "output.weight": (10, 16), "output.bias": (10,),
    }  # fmt: skip
    epochs = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["split"] for line in epochs] == ["train", "val"] * 12
    assert {key: epochs[-1][key] for key in ("loss", "accuracy", "auc")} == record["scores"]["val"]

    found = verify_results(context.experiment.root)
    assert (found.problems, found.checked > 3) == ([], True)
    (folder / PROBE).write_bytes(b"damaged")
    assert [problem["kind"] for problem in verify_results(context.experiment.root).problems] == ["flipped"]
    with begin(context, ["run"], ["probe"]):
        assert run_stages([context], ["probe"])[0]["digits"] == record

    scores = aggregate(context.experiment.root).files
    table = next(path for path in scores if path.name == "scores.csv").read_text().splitlines()
    assert f"probe,test,400,{record['scores']['test']['loss']}" in table[-1]


def test_what_is_done_is_found_and_a_changed_recipe_is_refused(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *SCRATCH, "probe.epochs=11")
    with begin(context, ["run"], ["probe"]):
        probe(context, "digits")
    before = results_of(context)
    probe(context, "digits")
    assert results_of(context) == before
    other = tiny_context(tmp_path, *SCRATCH, "probe.epochs=12")
    with pytest.raises(InputError, match=r"probe\.epochs was 11 and is 12 now.*--name"):
        begin(other, ["run"], ["probe"]).__enter__()
    with pytest.raises(InputError, match=r"probe\.epochs was 11 and is 12 now.*--name"):
        probe(other, "digits")
    # what finetuning does is no business of the probe's, nor is the frequency of checkpoints
    free = tiny_context(tmp_path, *SCRATCH, "probe.epochs=11", "finetune.epochs=9", "probe.checkpoint.every_steps=7")
    assert settled_recipe(context.experiment, free.recipe) == free.recipe
    context.experiment.recipe.unlink()
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        begin(context, ["run"], ["probe"]).__enter__()


def test_refusals_before_anything_is_written(tmp_path: Path) -> None:
    for call in (lambda context: check(context, ["probe"]), lambda context: probe(context, "digits")):
        with pytest.raises(InputError, match=r"no finished pretrain; run `maehpc run pretrain"):
            call(tiny_context(tmp_path))
    with pytest.raises(InputError, match=r"encoder\.weights: .*nowhere\.pth does not exist"):
        check(tiny_context(tmp_path, "encoder.weights=nowhere.pth"), ["probe"])
    sizes = "patch_size: null, width: null, depth: null, heads: null"
    no_class_token = (
        f"encoder={{name: timm:vit_medium_patch16_gap_240, weights: scratch, {sizes}}}",
        "data.image_size=32",
    )
    with pytest.raises(InputError, match=r"probe\.representation: cls needs a class token.*set it to mean"):
        check(tiny_context(tmp_path, *no_class_token), ["probe"])
    check(tiny_context(tmp_path, *no_class_token, "probe.representation=mean"), ["probe"])
    assert not list(tmp_path.iterdir())
    assert stages_of("probe", "pretrain") == ["probe"]


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "pretrain.epochs=2")
    pretrain(context, "digits")
    file = context.experiment.stage("pretrain", "digits") / "encoder.safetensors"
    other = tiny_context(tmp_path, f"encoder.weights={file}", "encoder.width=32", name="other")
    for call in (lambda: check(other, ["probe"]), lambda: probe(other, "digits")):
        with pytest.raises(InputError, match=r"16.*32|32.*16"):
            call()
    assert not (other.experiment.stage("probe", "digits") / "done.json").exists()


def test_a_probe_that_diverges_is_told_and_leaves_no_scores(tmp_path: Path) -> None:
    optim = "probe.optim={name: sgd, lr: 1e30, weight_decay: 1e9, warmup_epochs: 0}"
    context = tiny_context(tmp_path, *SCRATCH, optim, "probe.epochs=5")
    with pytest.raises(RunError, match=r"not finite|is (nan|inf).*--name"):
        probe(context, "digits")
    assert not (context.experiment.stage("probe", "digits") / "done.json").exists()


def test_augmented_images_are_learned_from_and_plain_ones_scored(tmp_path: Path) -> None:
    plain, cropped = (
        tiny_context(tmp_path, *SCRATCH, "probe.epochs=11", f"probe.crop_scale={crop}", name=name)
        for name, crop in (("plain", "null"), ("cropped", "[0.3, 1.0]"))
    )
    files = []
    for context in (plain, cropped):
        probe(context, "digits")
        files.append(load_file(context.experiment.stage("probe", "digits") / PROBE))
    assert torch.equal(files[0]["mean"], files[1]["mean"])  # statistics are of whole images
    assert not torch.equal(files[0]["output.weight"], files[1]["output.weight"])


def test_bf16_is_the_encoders_alone(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        context = tiny_context(tmp_path, *SCRATCH, "probe.epochs=11", f"probe.precision={precision}", name=precision)
        losses[precision] = probe(context, "digits")["scores"]["test"]["loss"]
        weights = load_file(context.experiment.stage("probe", "digits") / PROBE)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["null", "[0.3, 1.0]"])
def test_any_number_of_ranks_gives_the_same_bytes(crop: str, tmp_path: Path) -> None:
    overrides = (*SCRATCH, f"probe.crop_scale={crop}", "probe.epochs=11", "probe.batch_size=280")
    alone = tiny_context(tmp_path, *overrides, name="alone")
    probe(alone, "digits")
    for size in (2, 3):
        context = tiny_context(tmp_path, *overrides, name=f"ranks{size}")

        def work(world: World, context: Context = context) -> None:
            record = probe(replace(context, world=world), "digits")
            assert record["images"]["train"] == 300

        in_world(size, work)
        assert results_of(context) == results_of(alone), size


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["null", "[0.3, 1.0]"])
def test_killed_at_random_instants(crop: str, tmp_path: Path) -> None:
    overrides = (*SCRATCH, f"probe.crop_scale={crop}", f"probe.epochs={60 if crop == 'null' else 30}")
    whole, broken = (tiny_context(tmp_path, *overrides, name=name) for name in ("whole", "broken"))
    prepare("digits", 28, whole.packs).close()
    begun = time.monotonic()
    assert not killed_after(lambda: probe(whole, "digits"), seconds=120)
    seconds = time.monotonic() - begun
    chance = random.Random(crop)
    kills = killed_at_shares(
        lambda after: killed_after(lambda: probe(broken, "digits"), after),
        [chance.uniform(0.2, 0.8) for _ in range(6)],
        seconds,
        lambda: shutil.rmtree(broken.experiment.root),
    )
    assert kills, "no attempt was killed while it worked"
    probe(broken, "digits")
    assert results_of(broken) == results_of(whole)


class StopsAfter(Silent):
    """Asks for the end at a bar's unit, or before the first."""

    def __init__(self, stop: Stop, units: int) -> None:
        self._stop = stop
        self._left = units

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> Iterator[StopsAfter]:
        yield self

    def advance(self, count: int = 1, **values: float) -> None:
        self._left -= count
        if self._left <= 0:
            self._stop.request("a test")


@pytest.mark.parametrize("crop", ["null", "[0.3, 1.0]"])
def test_asked_to_stop_it_saves_every_step_and_goes_on(crop: str, tmp_path: Path) -> None:
    overrides = (*SCRATCH, f"probe.crop_scale={crop}", "probe.epochs=11")
    whole, broken = (tiny_context(tmp_path, *overrides, name=name) for name in ("whole", "broken"))
    probe(whole, "digits")
    for units, steps in ((7, 7), (5, 12)):
        stop = Stop()
        with pytest.raises(Interrupted, match="a test") as caught:
            probe(replace(broken, stop=stop, progress=StopsAfter(stop, units)), "digits")
        # the wish is seen with the step that begins after it
        assert caught.value.step is not None and caught.value.step >= steps
    begun_late = Stop()
    begun_late.request("before anything")
    with pytest.raises(Interrupted, match="before anything"):
        probe(replace(broken, stop=begun_late), "digits")
    assert not (broken.experiment.stage("probe", "digits") / "done.json").exists()
    probe(broken, "digits")
    assert results_of(broken) == results_of(whole)


@pytest.mark.slow
def test_killed_after_a_checkpoint_it_goes_on_from_there(tmp_path: Path) -> None:
    whole, broken = (tiny_context(tmp_path, *SCRATCH, "probe.epochs=40", name=name) for name in ("whole", "broken"))
    probe(whole, "digits")
    checkpoints = broken.experiment.stage("probe", "digits") / "checkpoints"
    assert killed_when(lambda: probe(broken, "digits"), reached(checkpoints, 40))
    probe(broken, "digits")
    assert results_of(broken) == results_of(whole)


def test_a_probe_leaves_the_finetuned_classifier_alone(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, *SCRATCH, "probe.epochs=11", "finetune.epochs=1")
    finetune(context, "digits")
    folder = context.experiment.stage("finetune", "digits")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    probe(context, "digits")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
