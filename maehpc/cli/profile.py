"""`maehpc profile`: where to compute."""

from __future__ import annotations

import json

import click

from maehpc.cli.options import complete_profile


@click.group("profile")
def command() -> None:
    """List profiles, show one in full, print the JSON schema."""


@command.command("list")
def list_command() -> None:
    """Names of the shipped profiles."""
    from maehpc.launch.profile import list_profiles

    for name in list_profiles():
        click.echo(name)


@command.command("show")
@click.argument("name", shell_complete=complete_profile)
def show_command(name: str) -> None:
    """The whole resolved profile NAME as YAML: what it extends and every default are filled in."""
    import yaml

    from maehpc.launch.profile import load_profile

    click.echo(yaml.safe_dump(load_profile(name).model_dump(mode="json"), sort_keys=False), nl=False)


@command.command("schema")
def schema_command() -> None:
    """The JSON schema of profile files, for editors."""
    from maehpc.launch.profile import profile_schema

    click.echo(json.dumps(profile_schema(), indent=2))
