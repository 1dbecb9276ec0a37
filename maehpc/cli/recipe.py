"""`maehpc recipe`: what can be computed."""

from __future__ import annotations

import json

import click

from maehpc.cli.options import complete_recipe


@click.group("recipe")
def command() -> None:
    """List recipes, show one in full, print the JSON schema."""


@command.command("list")
def list_command() -> None:
    """Names of the shipped recipes."""
    from maehpc.recipes import list_recipes

    for name in list_recipes():
        click.echo(name)


@command.command("show")
@click.argument("name", shell_complete=complete_recipe)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
def show_command(name: str, overrides: tuple[str, ...]) -> None:
    """The whole resolved recipe NAME as YAML."""
    from maehpc.recipes import load_recipe, recipe_yaml

    click.echo(recipe_yaml(load_recipe(name, overrides)), nl=False)


@command.command("schema")
def schema_command() -> None:
    """The JSON schema of recipe files, for editors."""
    from maehpc.recipes.schema import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
