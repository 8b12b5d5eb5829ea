"""``mpreader completion``: prints the script by which a shell completes commands and options."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete

__all__ = ["command"]

_SHELLS: Final = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command("completion", short_help="Print what makes a shell complete commands.")
@click.argument("shell", type=click.Choice(list(_SHELLS)))
def command(shell: str) -> None:
    """Print what makes a shell complete mpreader's commands and options.

    \b
    In this shell only:
      source <(mpreader completion bash)
    In every new one:
      mpreader completion bash >> ~/.bashrc
      mpreader completion zsh >> ~/.zshrc
      mpreader completion fish > ~/.config/fish/completions/mpreader.fish
    """  # noqa: D301  # click reads the \b
    from mpreader.cli.main import cli  # imported here, since main imports the commands

    # The variable is click's convention: the script sets it to ask mpreader for the completions of a line.
    click.echo(_SHELLS[shell](cli, {}, "mpreader", "_MPREADER_COMPLETE").source())
