"""Argument and options that the commands for checkpoints (``inspect``, ``load``, ``convert``) share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from mpreader.cli.options import BYTES, pool_options, s3_options
from mpreader.config import format_bytes
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE

__all__ = ["checkpoint_options"]

Command = TypeVar("Command", bound=Callable[..., Any])


def checkpoint_options(command: Command) -> Command:
    """Add the URI of a checkpoint, and the options for reading it.

    The command gets it as ``uri``, and ``settings``: the keyword arguments that all functions of ``mpreader.dcp`` for
    whole checkpoints take.
    """

    @click.argument("uri", metavar="URI")
    @click.option(
        "--match",
        multiple=True,
        metavar="GLOB",
        help="Only what has a name like this, such as 'model.*'; may be given several times.",
    )
    @click.option(
        "--max-gap-size",
        type=BYTES,
        default=DEFAULT_MAX_GAP_SIZE,
        help="Largest gap between two tensors that are fetched as one; more than 2MiB never is.  "
        f"[default: {format_bytes(DEFAULT_MAX_GAP_SIZE)}]",
    )
    @click.option(
        "--allow-global",
        "allowed_globals",
        multiple=True,
        metavar="NAME",
        help="A class, such as package.module.Name, that .metadata may make besides DCP's own.",
    )
    @s3_options
    @pool_options
    @functools.wraps(command)
    def with_settings(**arguments: Any) -> Any:
        # click gives each option as an argument of its own; the functions of mpreader.dcp take them all.
        names = ("max_gap_size", "allowed_globals", "s3client_config", "pool_config")
        settings = {name: arguments.pop(name) for name in names}
        settings["match"] = arguments.pop("match") or None  # click gives an empty tuple; None means everything
        return command(settings=settings, **arguments)

    return with_settings  # type: ignore[return-value]  # click's decorators keep no signature
