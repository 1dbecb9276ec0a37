"""`maehpc completion SHELL`: the script that completes commands, options and recipe names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script; for bash: eval "$(maehpc completion bash)"."""
    from maehpc.cli.main import maehpc

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(maehpc, {}, "maehpc", "_MAEHPC_COMPLETE").source())
