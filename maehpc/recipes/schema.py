"""The JSON schema of recipe files: any part of a `Recipe`, and `include`."""

from __future__ import annotations

from typing import Any

from maehpc.recipes.settings import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) that editors check jobs/**/*.yaml against."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "maehpc recipe"
    schema["properties"]["include"] = {
        "description": "recipes to start from, merged in order; the file's own keys come last",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return schema
