"""The stages together: one result from any run, killed or not, and refusals before anything is written."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from safetensors.numpy import load_file
from tiny import in_child, killed_after, killed_at_shares, killed_when, tiny_context, tiny_recipe
from zarr_stores import arrays_of_store

from maehpc import files, maps
from maehpc.data import Preprocess, open_split, prepare
from maehpc.errors import InputError, Interrupted, RunError
from maehpc.explain import Explainer, NoiseKey
from maehpc.interruption import Stop
from maehpc.maps import MapStore
from maehpc.ownership import own
from maehpc.progress import Bar, Silent, human_bytes
from maehpc.recipes import ExplainSettings, read_recipe
from maehpc.report import aggregate
from maehpc.stages.begin import begin, settled_recipe
from maehpc.stages.context import Context
from maehpc.stages.explain import explain
from maehpc.stages.explanations import evaluations, load_classifier, prepared
from maehpc.stages.finetune import finetune
from maehpc.stages.pipeline import run_stages, stages_of
from maehpc.stages.preflight import check
from maehpc.stages.verify import verify_results

CHAIN = ["pretrain", "finetune", "explain"]


def pipeline(context: Context) -> None:
    with begin(context, ["run", "pipeline"], CHAIN):
        run_stages([context], CHAIN)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): files.sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    context = tiny_context(tmp_path_factory.mktemp("finished"))
    pipeline(context)
    return context


def copy_of(context: Context, folder: Path, *overrides: str) -> Context:
    shutil.copytree(context.experiment.root.parent, folder, dirs_exist_ok=True)
    return tiny_context(folder, *overrides)


def forget_explanations(context: Context) -> None:
    shutil.rmtree(context.experiment.maps("digits"))
    shutil.rmtree(context.experiment.ledger("digits"))


def test_everything_of_the_design_is_on_the_disk(finished: Context) -> None:
    root = finished.experiment.root
    assert read_recipe(root / "recipe.yaml") == finished.recipe
    provenance = json.loads((root / "provenance.json").read_text())["runs"][-1]
    with prepare("digits", 28, finished.packs) as pack:
        assert provenance["data"] == {"digits": pack.info.digest}
    assert provenance["packages"]["torch"] == torch.__version__.split("+")[0]
    assert {"code", "machine", "python", "command"} <= provenance.keys()
    assert maps.verify(finished.experiment.maps("digits"), finished.experiment.ledger("digits")) == []
    assert verify_results(root).problems == []


def test_xarray_opens_the_store_with_names(finished: Context) -> None:
    store = xarray.open_zarr(finished.experiment.maps("digits"), consolidated=False)
    assert dict(store.sizes) == {
        "image": 20, "y": 8, "x": 8, "grid_y": 4, "grid_x": 4, "channel": 3, "score": 10 + 3 + 2 + 3 * (2 + 3) + 1,
    }  # fmt: skip
    assert store.attrs["methods"] == ["saliency", "gradcam", "deeplift"]
    assert list(store["image"].values) == list(range(20))
    scores = store["scores"]
    samples = scores.sel(score=["saliency_sensitivity[0]", "saliency_sensitivity[1]"])
    np.testing.assert_array_equal(scores.sel(score="saliency_sensitivity_max"), samples.max("score"))
    logits = scores.sel(score=[f"logits[{place}]" for place in range(10)])
    np.testing.assert_array_equal(scores.sel(score="prediction"), logits.argmax("score"))


def test_attributes_tell_what_the_columns_of_a_score_stand_for(finished: Context) -> None:
    context = replace(
        finished,
        recipe=tiny_recipe(
            "explain.methods=[saliency, gradcam]",
            "explain.metrics=[deletion, road, randomisation, sparseness]",
            "explain.options={deletion: {steps: 4}, road: {percentiles: [20, 50]}, randomisation: {order: cascading}}",
        ),
    )
    with prepared(context, "digits") as ready:
        layout = ready.layout
    steps, percentiles = [0, 0.25, 0.5, 0.75, 1], [20, 50]
    layers = ["head", "blocks.1", "blocks.0", "embedding"]
    assert layout.attributes["places"] == {
        "deletion_curve": steps,
        "road_morf": percentiles,
        "road_lerf": percentiles,
        "road_morf_kept": percentiles,
        "road_lerf_kept": percentiles,
        "randomisation_by_part": layers,
        "randomisation_absolute_by_part": layers,
        "randomisation_ssim_by_part": layers,
    }
    measured = re.compile(r"(saliency|gradcam)_(deletion|road|randomisation).*\[")
    assert {name for name in layout.column_names if measured.match(name)} == {
        f"{method}_{score}[{place}]"
        for method in ("saliency", "gradcam")
        for score, places in layout.attributes["places"].items()
        for place in range(len(places))
    }


def test_what_xarray_saves_of_a_store_keeps_the_coordinates_that_a_person_gave_it(
    finished: Context, tmp_path: Path
) -> None:
    """A group's attribute `coordinates` would be taken for the CF conventions' own."""
    store = xarray.open_zarr(finished.experiment.maps("digits"), consolidated=False).load().drop_encoding()
    store[["saliency"]].assign_coords(chosen=("mine", [4, 7])).to_zarr(tmp_path / "copy.zarr", consolidated=False)
    assert set(xarray.open_zarr(tmp_path / "copy.zarr", consolidated=False).coords) == {"image", "chosen"}


def test_what_an_image_costs_grows_with_model_methods_and_samples(finished: Context) -> None:
    path = finished.experiment.stage("finetune", "digits") / "classifier.safetensors"
    weights = sum(values.size for name, values in load_file(path).items() if name.startswith("encoder."))
    with prepared(finished, "digits") as ready:
        assert ready.cost == weights * 16 * (3 * 2) * (1 + 2)


def test_a_model_is_run_as_often_as_methods_and_metrics_ask_for() -> None:
    def runs(**settings: Any) -> int:
        return evaluations(ExplainSettings.model_validate({"sensitivity": {"samples": 0}, **settings}), 16)

    assert runs(methods=["saliency"]) == 2
    assert runs(methods=["occlusion"]) == 2 + 16
    assert runs(methods=["rise", "saliency"]) > 500
    both = {"kinds": ["random", "pgd"], "samples": 3, "search": {"steps": 5}}
    assert runs(methods=["saliency"], sensitivity=both) == 2 * (1 + 3 + 5)
    one, two = (runs(methods=methods, metrics=["deletion"]) for methods in (["saliency"], ["saliency", "gradcam"]))
    assert two == 2 * one > 20


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "explain.methods=[saliency,rollout,deeplift]",
            "explain.metrics=[deletion,sparseness]",
            "explain.sensitivity.kinds=[random,pgd]",
            "explain.sensitivity.search.steps=2",
            "explain.maps.channels=full",
            "explain.maps.dtype=float16",
            "explain.images=5",
            "explain.maps.shard_images=2",
        ),
    ],
    ids=["plain", "rich"],
)
def test_zarr_and_xarray_open_every_array_that_explain_writes(
    finished: Context, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    context = finished
    if overrides:
        context = copy_of(finished, tmp_path, *overrides)
        forget_explanations(context)
        explain(context, "digits")
    path = context.experiment.maps("digits")
    store = MapStore.open(path, context.experiment.ledger("digits"))
    stored = arrays_of_store(path)
    assert set(stored) == {"image", *store.layout.arrays}
    with xarray.open_zarr(path, consolidated=False) as data:
        assert (
            set(data.data_vars)
            == set(store.layout.stored)
            == set(context.recipe.explain.methods) | {"pixels", "scores"}
        )
        assert data.image.values.tolist() == list(range(store.layout.images))
        for name, layout in store.layout.arrays.items():
            written = np.concatenate([store.read(name, shard) for shard in store.shards()])
            assert written.shape == (store.layout.images, *layout.shape) and str(written.dtype) == layout.dtype
            assert stored[name].shape == written.shape
            assert stored[name].astype(written.dtype).tobytes() == written.tobytes(), name
            if layout.is_map:
                assert stored[name].dtype == written.dtype
                assert data[name].values.tobytes() == written.tobytes(), name
                assert data[name].dims == ("image", *layout.dims)


def test_the_store_holds_what_the_explainer_says_of_each_image_alone(finished: Context) -> None:
    recipe = finished.recipe
    store = arrays_of_store(finished.experiment.maps("digits"))
    with prepare("digits", 28, finished.packs) as pack:
        classifier = load_classifier(
            finished, pack, finished.experiment.stage("finetune", "digits") / "classifier.safetensors"
        )
        preprocess = Preprocess(recipe.data, pack.info)
        explainer = Explainer(classifier, recipe.explain, preprocess, NoiseKey(recipe.seed, "digits"))
        split = open_split(pack, "test", recipe.data, torch.device("cpu"))
        for index in (0, 7, 8, 19):
            alone = torch.tensor([index])
            pixels = preprocess.pixels(split.batch(alone))
            found = explainer.explain(pixels, alone, split.labels[alone])
            for method, map_ in found.maps.items():
                stored = torch.from_numpy(store[method][index : index + 1])
                torch.testing.assert_close(map_, stored, rtol=1e-4, atol=1e-6)
                sensitivity = torch.from_numpy(store[f"{method}_sensitivity"][index : index + 1])
                assert sensitivity.isfinite().all()
                torch.testing.assert_close(found.sensitivity[method], sensitivity, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_pipeline_killed_at_random_instants_ends_byte_identical(finished: Context, tmp_path: Path) -> None:
    begun = time.monotonic()
    assert not killed_after(lambda: pipeline(tiny_context(tmp_path, name="timed")), seconds=120)
    seconds = time.monotonic() - begun
    broken = tiny_context(tmp_path, name="broken")
    chance = random.Random(0)
    kills = killed_at_shares(
        lambda after: killed_after(lambda: pipeline(broken), after),
        [chance.uniform(0.05, 0.5) for _ in range(8)],
        seconds,
        lambda: shutil.rmtree(broken.experiment.root),
    )
    assert kills
    pipeline(broken)
    same_results(finished, broken)


def same_results(expected: Context, found: Context) -> None:
    for stage in ("pretrain", "finetune"):
        ours, theirs = (tree(context.experiment.stage(stage, "digits")) for context in (expected, found))
        for name in ("done.json", "metrics.jsonl", "stage.json"):
            assert ours[name] == theirs[name], (stage, name)
    assert tree(expected.experiment.maps("digits")) == tree(found.experiment.maps("digits"))
    assert verify_results(found.experiment.root).problems == []


@pytest.mark.parametrize(
    ("stage", "due"),
    [
        ("pretrain", "pretrain/digits/checkpoints/step-00000004"),
        ("pretrain", "pretrain/digits/encoder.safetensors"),
        ("finetune", "finetune/digits/checkpoints/step-00000002"),
        ("explain", "ledger/digits/store.json"),
        ("explain", "ledger/digits/shard-00000.json"),
    ],
)
def test_a_pipeline_killed_in_each_stage_ends_byte_identical(
    stage: str, due: str, finished: Context, tmp_path: Path
) -> None:
    broken = tiny_context(tmp_path, name="broken")
    assert killed_when(lambda: pipeline(broken), (broken.experiment.root / due).exists), f"{stage} was over too soon"
    pipeline(broken)
    same_results(finished, broken)


def test_a_finished_pipeline_computes_nothing_again(finished: Context, tmp_path: Path) -> None:
    again = copy_of(finished, tmp_path)
    before = tree(again.experiment.root)
    pipeline(again)
    after = tree(again.experiment.root)
    changed = {name for name in after if before.get(name) != after[name]}
    assert all("attempts/" in name or name.endswith("/lock") or name == "provenance.json" for name in changed), changed


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_explain_computes_just_the_damaged_shard_again(damage: object, finished: Context, tmp_path: Path) -> None:
    assert callable(damage)
    broken = copy_of(finished, tmp_path)
    expected = tree(broken.experiment.maps("digits"))
    victim = next(
        path for path in (broken.experiment.maps("digits") / "saliency").iterdir() if path.name.startswith("c.1")
    )
    damage(victim)
    assert [problem["shard"] for problem in verify_results(broken.experiment.root).problems] == [1]
    assert explain(broken, "digits")["computed"] == 1
    assert tree(broken.experiment.maps("digits")) == expected


def said(context: Context) -> tuple[Context, list[str]]:
    """The same, and what it is told from now on, bars by their description."""
    lines: list[str] = []

    class Telling(Silent):
        def bar(self, description: str, *counts: int, **words: int) -> AbstractContextManager[Bar]:
            lines.append(description)
            return super().bar(description, *counts, **words)

        def say(self, sentence: str) -> None:
            lines.append(sentence)

    return replace(context, progress=Telling()), lines


def test_a_flipped_bit_in_a_finished_store_is_named_forgotten_and_computed_anew(
    finished: Context, tmp_path: Path
) -> None:
    broken, lines = said(copy_of(finished, tmp_path))
    root = broken.experiment.root
    expected = tree(broken.experiment.maps("digits"))
    victim = broken.experiment.maps("digits") / "scores" / "c.1.0"
    damage_flip(victim)

    assert explain(broken, "digits")["computed"] == 0  # every byte of a finished store is verify's to read
    assert lines == ["explain digits: already done", "explain digits"]
    way_out = f"`maehpc verify --repair {root}` forgets the shard, then run explain again to compute shard 1 anew"
    summary = aggregate(root)
    assert set(summary.rows["images"]) == {12}
    [warning] = [text for text in summary.missing if str(victim) in text]
    assert way_out in warning
    [problem] = verify_results(root).problems
    assert (problem["kind"], problem["shard"], problem["path"]) == ("flipped", 1, str(victim))
    assert way_out in problem["sentence"]
    assert explain(broken, "digits")["computed"] == 0

    assert verify_results(root, repair=True).forgotten == {str(broken.experiment.maps("digits")): [1]}
    assert explain(broken, "digits")["computed"] == 1
    assert tree(broken.experiment.maps("digits")) == expected and verify_results(root).problems == []


def test_a_store_that_is_gone_on_with_is_read_whole_first(finished: Context, tmp_path: Path) -> None:
    broken, lines = said(copy_of(finished, tmp_path))
    expected = tree(broken.experiment.maps("digits"))
    (broken.experiment.ledger("digits") / "shard-00000.json").unlink()
    damage_flip(broken.experiment.maps("digits") / "deeplift" / "c.2.0.0")

    stopped = replace(broken, stop=Stop())
    stopped.stop.request("enough")
    with pytest.raises(Interrupted):
        explain(stopped, "digits")
    assert lines == ["explain digits: reading what is there"]
    lines.clear()
    assert explain(broken, "digits")["computed"] == 2
    arrays = dict(zarr.open_group(str(broken.experiment.maps("digits")), mode="r").arrays())
    del arrays["image"], arrays["score"]
    size = human_bytes(sum(array[:12].nbytes for array in arrays.values()))
    there = {*tree(broken.experiment.maps("digits")), *tree(broken.experiment.ledger("digits"))}
    # A claim of every attempt lies there; an undisturbed run makes one.
    own = sum(not re.search(r"/c\.\d+\.0|shard-\d+|attempts/000[23]", name) for name in there)
    assert lines[:2] == [
        "explain digits: reading what is there",
        f"explain digits: 12 images in 2 shards, {2 * (len(arrays) + 1)} files beside the store's own {own}, "
        f"about {size}",
    ]
    assert tree(broken.experiment.maps("digits")) == expected


def test_shards_and_batches_do_not_change_a_number_beyond_rounding(finished: Context, tmp_path: Path) -> None:
    stores = []
    for overrides in (
        ("explain.maps.shard_images=20", "explain.batch_size=5"),
        ("explain.maps.shard_images=3", "explain.batch_size=3"),
    ):
        folder = tmp_path / overrides[0]
        other = copy_of(finished, folder, *overrides)
        forget_explanations(other)
        explain(other, "digits")
        stores.append(arrays_of_store(other.experiment.maps("digits")))
    reference = arrays_of_store(finished.experiment.maps("digits"))
    for store in stores:
        for name in reference:
            np.testing.assert_allclose(store[name][:], reference[name][:], rtol=2e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("images", [3, 5, 8, 20])
def test_the_cut_into_shards_and_threads_change_no_bit(finished: Context, tmp_path: Path, images: int) -> None:
    """Also where a shard ends inside a group of images (4 here), and with several threads."""
    other = copy_of(finished, tmp_path, f"explain.maps.shard_images={images}")
    forget_explanations(other)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 + images % 2)
    try:
        explain(other, "digits")
    finally:
        torch.set_num_threads(threads)
    reference, store = (arrays_of_store(one.experiment.maps("digits")) for one in (finished, other))
    assert sorted(store) == sorted(reference)
    for name in reference:
        assert store[name][:].tobytes() == reference[name][:].tobytes(), name


def test_a_second_run_on_the_same_store_is_refused(finished: Context, tmp_path: Path) -> None:
    busy = copy_of(finished, tmp_path)
    with own(busy.experiment.ledger("digits")), pytest.raises(InputError, match="is being written by"):
        explain(busy, "digits")


def test_two_at_once_leave_one_valid_store(finished: Context, tmp_path: Path) -> None:
    import os

    contexts = [copy_of(finished, tmp_path) for _ in range(2)]
    forget_explanations(contexts[0])
    children = [in_child(lambda context=context: explain(context, "digits")) for context in contexts]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes.count(0) >= 1
    assert tree(contexts[0].experiment.maps("digits")) == tree(finished.experiment.maps("digits"))


def test_other_explanations_in_the_same_store_are_refused(finished: Context, tmp_path: Path) -> None:
    other = copy_of(finished, tmp_path, "explain.sensitivity.radius=0.5")
    before = tree(other.experiment.maps("digits"))
    with pytest.raises(InputError, match=r"radius.*--name"):
        explain(other, "digits")
    assert tree(other.experiment.maps("digits")) == before


def test_begin_refuses_a_recipe_that_contradicts_the_experiment(finished: Context, tmp_path: Path) -> None:
    other = copy_of(finished, tmp_path, "finetune.epochs=4")
    before = tree(other.experiment.root)
    with pytest.raises(InputError, match=r"finetune.epochs was 3 and is 4 now.*--name"):
        begin(other, [], CHAIN).__enter__()
    assert tree(other.experiment.root) == before


def test_a_live_run_keeps_its_recipe(tmp_path: Path) -> None:
    live = tiny_context(tmp_path)
    with begin(live, [], CHAIN):
        before = tree(live.experiment.root)
        for overrides in (("finetune.epochs=9",), ("explain.sensitivity.radius=0.5", "finetune.representation=mean")):
            with pytest.raises(InputError, match="in use by a run of another recipe"):
                begin(tiny_context(tmp_path, *overrides), [], CHAIN).__enter__()
        assert tree(live.experiment.root) == before
        with begin(tiny_context(tmp_path), [], CHAIN):  # the same recipe, twice at once
            pass
    with begin(tiny_context(tmp_path, "finetune.epochs=9"), [], CHAIN):
        assert read_recipe(live.experiment.recipe).finetune.epochs == 9


def test_results_without_a_recipe_are_not_begun_anew(finished: Context, tmp_path: Path) -> None:
    orphan = copy_of(finished, tmp_path)
    orphan.experiment.recipe.unlink()
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        begin(orphan, [], CHAIN).__enter__()


def test_a_classifier_is_explained_as_it_was_finetuned(finished: Context, tmp_path: Path) -> None:
    for override in ("finetune.representation=mean", "finetune.adapter.activation=gelu"):
        other = copy_of(finished, tmp_path / override, override)
        forget_explanations(other)
        with pytest.raises(InputError, match=r"classifier of another recipe \(finetune"):
            explain(other, "digits")


def test_sensitivity_can_be_left_out(finished: Context, tmp_path: Path) -> None:
    plain = copy_of(finished, tmp_path, "explain.sensitivity.samples=0")
    forget_explanations(plain)
    explain(plain, "digits")
    store = arrays_of_store(plain.experiment.maps("digits"))
    assert {"saliency", "gradcam", "deeplift"} <= set(store)
    assert not [name for name in store if "sensitivity" in name or name == "flipped"]


def test_verify_names_damaged_packs_and_what_nothing_vouches_for(finished: Context, tmp_path: Path) -> None:
    broken = copy_of(finished, tmp_path)
    (pack,) = broken.packs.glob("*.h5")
    damage_flip(pack)
    (broken.experiment.stage("finetune", "digits") / "done.json").unlink()
    (broken.experiment.ledger("digits") / "store.json").unlink()
    broken.experiment.provenance.write_text("{")
    problems = {Path(problem["path"]).name: problem["kind"] for problem in verify_results(tmp_path).problems}
    assert problems == {
        pack.name: "damaged",
        "digits": "unfinished",
        "digits.zarr": "unrecorded",
        "provenance.json": "damaged",
    }


def test_verify_looks_at_all_stores_also_where_one_is_of_another_version(finished: Context, tmp_path: Path) -> None:
    other = copy_of(finished, tmp_path)
    shutil.copytree(other.experiment.root, tmp_path / "later")
    record = other.experiment.ledger("digits") / "store.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 1}))
    damage_flip(tmp_path / "later/maps/digits.zarr/deeplift/c.1.0.0")
    problems = verify_results(tmp_path).problems
    assert [(problem["kind"], Path(problem["path"]).name) for problem in problems] == [
        ("flipped", "c.1.0.0"),
        ("foreign", "store.json"),
    ]


def test_stages_out_of_order_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for stages, missing in ((["finetune"], "pretrain"), (["explain"], "finetune")):
        with pytest.raises(InputError, match=f"no finished {missing}; run `maehpc run {missing}"):
            check(tiny_context(tmp_path), stages)
    with pytest.raises(InputError, match=r"encoder\.weights is scratch"):
        check(tiny_context(tmp_path, "encoder.weights=scratch"), ["pretrain"])
    assert not list(tmp_path.iterdir())


def test_checkpoint_frequency_and_more_data_sets_are_no_contradiction(finished: Context) -> None:
    recipe = tiny_recipe("pretrain.checkpoint.every_steps=9", "datasets=[breastmnist]", "data.resident_bytes=1")
    settled = settled_recipe(finished.experiment, recipe)
    assert settled.datasets == ("digits", "breastmnist")


def test_finetune_without_pretraining_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run `maehpc run pretrain --name tiny` first"):
        finetune(tiny_context(tmp_path), "digits")
    assert not (tmp_path / "tiny").exists()


def test_weights_of_another_shape_are_told_with_both_shapes(finished: Context, tmp_path: Path) -> None:
    weights = finished.experiment.stage("pretrain", "digits") / "encoder.safetensors"
    with pytest.raises(InputError, match=r"16.*32|32.*16"):
        finetune(tiny_context(tmp_path, f"encoder.weights={weights}", "encoder.width=32"), "digits")
    assert not (tmp_path / "tiny/finetune/digits/done.json").exists()


def test_pretraining_is_left_out_where_no_stage_needs_it() -> None:
    assert stages_of("pipeline", "pretrain") == CHAIN
    assert stages_of("pipeline", "scratch") == CHAIN[1:]
    assert stages_of("explain", "pretrain") == ["explain"]


class Counted(Silent):
    """Keeps what a bar was told, and does something each time."""

    def __init__(self, each: Callable[[], object] = lambda: None) -> None:
        self.told: list[int] = []
        self.each = each

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0, images: int = 1) -> Iterator[Any]:
        if description == "explain digits":
            self.told = [total, done]
        yield self

    def advance(self, count: int = 1, **values: float) -> None:
        self.told.append(count)
        self.each()


def test_a_stop_ends_explaining_between_two_batches_and_progress_tells_of_all_images(
    finished: Context, tmp_path: Path
) -> None:
    """20 images in shards of 8, of which the second is stopped in."""
    context = copy_of(finished, tmp_path)
    forget_explanations(context)
    first, stop = Counted(), Stop()
    first.each = lambda: stop.request("the test wants it") if sum(first.told[2:]) >= 12 else None
    with pytest.raises(Interrupted, match="explain digits was interrupted"):
        explain(replace(context, stop=stop, progress=first), "digits")
    assert first.told == [20, 0, 4, 4, 4]
    assert [path.stem for path in context.experiment.ledger("digits").glob("shard-*.json")] == ["shard-00000"]
    second = Counted()
    assert explain(replace(context, progress=second), "digits")["computed"] == 2
    assert second.told[:2] == [20, 8] and sum(second.told[2:]) == 12
    assert tree(context.experiment.maps("digits")) == tree(finished.experiment.maps("digits"))


def test_a_newer_attempt_ends_one_that_explains(finished: Context, tmp_path: Path) -> None:
    context = copy_of(finished, tmp_path)
    forget_explanations(context)
    newer = context.experiment.ledger("digits") / "attempts" / "0002.json"
    with pytest.raises(RunError, match=r"attempt 1 no longer owns .*: attempt 2 has begun; this process stops"):
        explain(replace(context, progress=Counted(newer.touch)), "digits")
    assert not list(context.experiment.ledger("digits").glob("shard-*.json"))


def test_a_stale_attempt_is_fenced(finished: Context, tmp_path: Path) -> None:
    stale = copy_of(finished, tmp_path)
    ledger = stale.experiment.ledger("digits")
    with own(ledger) as owner:
        store = MapStore.open(stale.experiment.maps("digits"), ledger, owner)
        (ledger / "attempts" / f"{owner.attempt + 1:04d}.json").write_text("{}")
        arrays = {name: store.read(name, 0) for name in store.layout.arrays}
        with pytest.raises(Exception, match="no longer owns"):
            store.write_shard(0, arrays)
    assert verify_results(stale.experiment.root).problems == []
