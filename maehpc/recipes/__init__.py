"""Recipes: what to compute. Typed settings, YAML files in jobs/, overrides, a JSON schema."""

from maehpc.recipes.load import list_recipes, load_recipe, read_recipe, recipe_yaml
from maehpc.recipes.settings import (
    AdapterSettings,
    DataSettings,
    DecoderSettings,
    DeepLiftSettings,
    EncoderSettings,
    ExplainSettings,
    FinetuneSettings,
    GradCamSettings,
    MapSettings,
    OptimSettings,
    PretrainSettings,
    ProbeSettings,
    Recipe,
    SensitivitySettings,
)

__all__ = [
    "AdapterSettings",
    "DataSettings",
    "DecoderSettings",
    "DeepLiftSettings",
    "EncoderSettings",
    "ExplainSettings",
    "FinetuneSettings",
    "GradCamSettings",
    "MapSettings",
    "OptimSettings",
    "PretrainSettings",
    "ProbeSettings",
    "Recipe",
    "SensitivitySettings",
    "list_recipes",
    "load_recipe",
    "read_recipe",
    "recipe_yaml",
]
