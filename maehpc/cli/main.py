"""The command `maehpc`: one module a command, imported when it is called.

Nothing heavy is imported here, so that `maehpc --help` and shell completion answer at once.
"""

from __future__ import annotations

import importlib
import sys

import click

from maehpc import __version__
from maehpc.errors import MaehpcError

COMMANDS = {
    "run": ("maehpc.cli.run", "Run a stage here, in the foreground: pretrain, finetune, probe, explain or pipeline."),
    "submit": ("maehpc.cli.submit", "Submit a stage to a cluster, or to this machine in the background."),
    "status": ("maehpc.cli.status", "What the jobs of a results folder, and runs in terminals, do."),
    "logs": ("maehpc.cli.logs", "Print or follow a job's logs."),
    "cancel": ("maehpc.cli.cancel", "End jobs."),
    "resume": ("maehpc.cli.resume", "Submit jobs again that failed or were cancelled."),
    "data": ("maehpc.cli.data", "List, fetch, pack and verify data sets."),
    "aggregate": ("maehpc.cli.aggregate", "Tables, figures and a report over experiments."),
    "maps": ("maehpc.cli.maps", "Export stored explanations: arrays, pictures, volumes."),
    "verify": ("maehpc.cli.verify", "Check stores and checkpoints against their digests."),
    "profile": ("maehpc.cli.profile", "List profiles, show one, print the JSON schema."),
    "recipe": ("maehpc.cli.recipe", "List recipes, show one, print the JSON schema."),
    "doctor": ("maehpc.cli.doctor", "Probe this machine and cluster; draft a profile."),
    "bench": ("maehpc.cli.bench", "Measure speed on this machine: launch, explain."),
    "completion": ("maehpc.cli.completion", "Print the shell's completion script."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are needed, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="maehpc")
def maehpc() -> None:
    """Pretrain masked autoencoders, finetune classifiers, and measure how far their explanations hold.

    Exit codes: 0 done, 1 failed, 2 wrong input, 75 stopped by a signal with everything saved, 130 by Ctrl-C.
    """


def main() -> None:
    """Runs the command line; every expected error is one sentence on stderr."""
    try:
        maehpc.main(prog_name="maehpc", standalone_mode=False)
    except MaehpcError as error:
        click.echo(f"maehpc: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        click.echo(f"maehpc: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    except OSError as error:  # what no part of the program could tell better
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"maehpc: {where}{error.strerror or error}; check the path and run the same command again", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        click.echo("maehpc: interrupted; run the same command again to go on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
