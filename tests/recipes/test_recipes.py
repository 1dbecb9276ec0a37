"""Recipes: files, includes, overrides, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from maehpc.errors import InputError
from maehpc.recipes import OptimSettings, Recipe, list_recipes, load_recipe, read_recipe, recipe_yaml
from maehpc.recipes.schema import recipe_schema
from maehpc.shipped import shipped_folder


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(recipe))
    assert read_recipe(path) == recipe


def test_the_published_pretraining_recipe() -> None:
    recipe = load_recipe("pretrain/vit-base")
    assert recipe.encoder.dimensions == (768, 12, 12, 16)
    assert (recipe.pretrain.decoder.width, recipe.pretrain.decoder.depth, recipe.pretrain.decoder.heads) == (512, 8, 16)
    assert recipe.pretrain.optim.peak_lr(4096) == pytest.approx(2.4e-3)
    assert (recipe.pretrain.mask_ratio, recipe.pretrain.epochs, recipe.pretrain.batch_size) == (0.75, 800, 4096)
    assert load_recipe("pretrain/vit-large").encoder.dimensions == (1024, 24, 16, 16)
    assert load_recipe("pretrain/vit-huge").encoder.dimensions == (1280, 32, 16, 14)


def test_the_report_protocol() -> None:
    settings = load_recipe("finetune/report").finetune
    assert settings.freeze
    assert settings.representation == "cls"
    assert settings.adapter.layers == 2
    assert (settings.optim.name, settings.optim.lr, settings.epochs, settings.images) == ("adam", 0.1, 20, 1000)


def test_the_published_probe() -> None:
    settings = load_recipe("probe/mae").probe
    assert (settings.optim.name, settings.optim.momentum, settings.optim.weight_decay) == ("lars", 0.9, 0.0)
    assert settings.optim.peak_lr(settings.batch_size) == pytest.approx(6.4)
    assert (settings.epochs, settings.optim.warmup_epochs, settings.optim.schedule) == (90, 10, "cosine")
    assert (settings.batch_size, settings.crop_scale, settings.representation) == (16384, (0.08, 1.0), "cls")


def test_a_probe_of_an_experiment_that_does_not_mention_it_is_the_one_for_small_sets() -> None:
    assert load_recipe("probe/report").probe == Recipe().probe
    published = load_recipe("probe/mae").probe
    assert Recipe().probe.optim.peak_lr(64) == pytest.approx(published.optim.peak_lr(16384))


def test_vit_base_is_the_default() -> None:
    assert Recipe().encoder.name == "vit-base"


def test_an_override_is_looked_up_in_the_stage_first_named() -> None:
    recipe = load_recipe("pipeline/report", ["optim.lr=1e-3", "pretrain.epochs=300", "datasets=[a, b]"], "finetune")
    assert recipe.finetune.optim.lr == 1e-3
    assert recipe.pretrain.epochs == 300
    assert recipe.datasets == ("a", "b")


def test_later_includes_and_own_keys_win(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("seed: 1\nfinetune: {epochs: 2, batch_size: 5}\n")
    (tmp_path / "above.yaml").write_text("include: [below.yaml]\nfinetune: {epochs: 3}\n")
    recipe = load_recipe(str(tmp_path / "above.yaml"))
    assert (recipe.seed, recipe.finetune.epochs, recipe.finetune.batch_size) == (1, 3, 5)


def test_a_recipe_is_laid_over_an_experiment() -> None:
    base = load_recipe("pretrain/vit-tiny", ["seed=7"])
    recipe = load_recipe("finetune/report", ["optim.lr=0.5"], "finetune", base=base)
    assert recipe.pretrain == base.pretrain
    assert recipe.encoder == base.encoder
    assert (recipe.seed, recipe.finetune.optim.lr) == (7, 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("finetune: {epoch: 3}", ["finetune.epoch"]),
        ("finetune: {epochs: many}", ["finetune.epochs", "'many'"]),
        ("finetune: {epochs: 0}", ["finetune.epochs", "greater than 0"]),
        ("finetune: {optim: {lr: .nan}}", ["finetune.optim.lr"]),
        ("data: {image_size: 30}\nencoder: {patch_size: 4}", ["data.image_size 30", "patch size 4"]),
        ("explain: {methods: [saliency, voodoo]}", ["explain.methods", "voodoo", "gradcam"]),
        ("encoder: {name: vit-giant}", ["vit-giant", "vit-huge"]),
        ("encoder: {width: 100, heads: 3}", ["width 100", "heads 3"]),
        ("pretrain: {epochs: 5, optim: {base_lr: 1, warmup_epochs: 5}}", ["pretrain", "warmup_epochs 5", "5 epochs"]),
        ("finetune: {optim: {lr: 1, base_lr: 1}}", ["finetune.optim", "one of lr and base_lr"]),
        ("finetune: {optim: {name: lars}}", ["finetune", "lars", "probe", "adamw, adam or sgd"]),
        ("pretrain: {optim: {name: lars}}", ["pretrain", "lars", "probe"]),
        ("probe: {accumulate: 2}", ["probe", "accumulate", "1"]),
        ("probe: {epochs: 10}", ["probe", "warmup_epochs 10", "10 epochs"]),
        ("probe: {adapter: {layers: 1}}", ["probe.adapter"]),
        ("seed: 2020-13-45", ["not YAML"]),
        ("[" * 5000, ["not YAML"]),
        ("finetune: {layer_decay: 0.5}", ["layer_decay", "freeze: false"]),
        ("include: [pretrain/nothing]", ["pretrain/nothing", "pretrain/vit-base"]),
        ("include: 3", ["include"]),
        ("- a\n- b", ["mapping"]),
        ("a: [1,", ["not YAML"]),
        ("!!python/object/apply:os.system ['true']", ["not YAML"]),
    ],
)
def test_wrong_recipes_are_told_in_one_sentence(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(str(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in [*words, "recipe"]:
        assert word in message


@pytest.mark.parametrize("way", ["loop.yaml", "../{}/loop.yaml"])
def test_a_recipe_that_includes_itself_is_refused(way: str, tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(f"include: [{way.format(tmp_path.name)}]")
    with pytest.raises(InputError, match="includes itself"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "override", ["optim.lr", "=3", "speed=3", "seed=2020-13-45", "finetune.optim.lr=[", "finetune.optim=3"]
)
def test_wrong_overrides_are_told(override: str) -> None:
    with pytest.raises(InputError):
        load_recipe(None, [override])


def test_a_wrong_value_is_told_with_the_place_it_is_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("finetune: {epochs: -1}\nexplain: {batch_size: 0}\n")
    typed = {"explain": {"methods": ("voodoo",)}}
    wrong: dict[str, dict[str, Any]] = {
        "--set: explain.methods: ": {"overrides": ["explain.methods=saliency"]},
        "--set: explain.batch_size: ": {"overrides": ["explain.batch_size=-3"]},
        "--set: there is no setting finetune.lr;": {"overrides": ["lr=-1"], "stage": "finetune"},
        "the command line: explain.methods: ": {"settings": typed},
        f"recipe {file}: finetune.epochs: ": {"name": str(file)},
    }
    for expected, words in wrong.items():
        with pytest.raises(InputError) as refused:
            load_recipe(**words)
        assert str(refused.value).startswith(expected)


def test_a_later_rate_takes_the_place_of_the_earlier_kind() -> None:
    optim = load_recipe("pretrain/vit-base", ["optim.lr=1e-3"], "pretrain").pretrain.optim
    assert (optim.peak_lr(4096), optim.betas) == (1e-3, (0.9, 0.95))
    optim = load_recipe("finetune/report", ["optim.base_lr=1e-3"], "finetune").finetune.optim
    assert (optim.peak_lr(512), optim.name) == (2e-3, "adam")


def test_a_part_of_a_section_is_laid_over_its_defaults() -> None:
    assert load_recipe(None, ["optim.lr=0.5"], "finetune").finetune.optim == OptimSettings(name="adam", lr=0.5)


def test_the_reference_decays_tokens_and_so_do_the_published_recipes() -> None:
    for name in ("base", "large", "huge"):
        assert load_recipe(f"pretrain/vit-{name}").pretrain.optim.decay_tokens


def test_each_method_once_and_none_that_is_unknown() -> None:
    both = load_recipe(None, ["explain.methods=[deeplift, deeplift-captum]"])
    assert both.explain.methods == ("deeplift", "deeplift-captum")
    with pytest.raises(InputError, match="once"):
        load_recipe(None, ["explain.methods=[deeplift, deeplift]"])
    with pytest.raises(InputError, match=r"'lime' is none of .*saliency"):
        load_recipe(None, ["explain.methods=[lime]"])


def test_the_committed_schema_is_the_current_one() -> None:
    committed = json.loads((shipped_folder("jobs") / "recipe.schema.json").read_text())
    assert committed == json.loads(json.dumps(recipe_schema())), "run: maehpc recipe schema > jobs/recipe.schema.json"


def test_every_shipped_file_uses_known_keys_only_in_the_schema() -> None:
    known = set(recipe_schema()["properties"])
    for name in list_recipes():
        keys = set(yaml.safe_load((shipped_folder("jobs") / f"{name}.yaml").read_text()))
        assert keys <= known


@given(lr=st.floats(1e-8, 10), batch=st.integers(1, 10_000))
def test_linear_scaling(lr: float, batch: int) -> None:
    assert OptimSettings(base_lr=lr).peak_lr(batch) == pytest.approx(lr * batch / 256)
    assert OptimSettings(lr=lr).peak_lr(batch) == lr


@given(
    seed=st.integers(0, 2**63 - 1),
    epochs=st.integers(1, 9999),
    ratio=st.floats(0.01, 0.99),
    images=st.none() | st.integers(1, 10**6),
    space=st.sampled_from(["pixel", "normalised"]),
)
def test_any_recipe_survives_yaml(seed: int, epochs: int, ratio: float, images: int | None, space: str) -> None:
    recipe = Recipe.model_validate(
        {
            "seed": seed,
            "pretrain": {"epochs": epochs, "mask_ratio": ratio, "images": images},
            "explain": {"sensitivity": {"space": space}},
        }
    )
    assert Recipe.model_validate(yaml.safe_load(recipe_yaml(recipe))) == recipe


@given(key=st.text(st.characters(categories=["L"]), min_size=1))
def test_no_unknown_key_passes(key: str) -> None:
    if key in Recipe.model_fields:
        return
    with pytest.raises(ValidationError):
        Recipe.model_validate({key: 1})
