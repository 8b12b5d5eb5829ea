"""Argument and options that the commands for checkpoints (``inspect``, ``load``, ``convert``) share.

``inspect`` and ``load`` take DCP checkpoints and safetensors files, and find out here which of them a URI names.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from mpreader.cli.options import BYTES, pool_options, s3_options
from mpreader.config import format_bytes
from mpreader.errors import AccessDenied, ConfigError, ObjectMissing, TransportError
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE

__all__ = ["check_headers", "checkpoint_options", "lacks_metadata", "naming_both_kinds", "refuse_options"]

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


def check_headers(uri: str, headers: Mapping[str, str] | None) -> None:
    """Refuse headers for anything but a web server.

    Raises:
        ConfigError: There are headers, but the URI is not that of a web server.
    """
    if headers and not uri.startswith(("http://", "https://")):
        raise ConfigError(f"headers are sent to web servers only, and {uri!r} is none")


@contextlib.contextmanager
def naming_both_kinds() -> Iterator[None]:
    """Let the error of a DCP checkpoint that is not there say that there are no safetensors files either."""
    try:
        yield
    except ObjectMissing as error:
        if lacks_metadata(error):
            error.args = (f"neither a DCP checkpoint nor safetensors files are there: {error}",)
        raise


def lacks_metadata(error: TransportError) -> bool:
    """True if an error says that ``.metadata`` is not there, and not another file of a DCP checkpoint."""
    # S3 denies access to what is missing where listing is not allowed.
    return isinstance(error, (ObjectMissing, AccessDenied)) and error.key.rpartition("/")[2] == ".metadata"


def refuse_options(*names: str) -> None:
    """Refuse options, by their names, that are of no meaning for safetensors files.

    Raises:
        click.UsageError: One of them was given.
    """
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"{option.opts[0]} is for DCP checkpoints, and this is safetensors: leave it out")
