"""Options that several commands share, and the settings made of them.

The decorators collect their options into one configuration object, so that a command takes that instead of each option.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from mpreader.config import SIGNINGS, PoolConfig, S3ClientConfig, format_bytes, parse_bytes
from mpreader.pool.sizing import CONNECTIONS_PER_WORKER

__all__ = [
    "BYTES",
    "headers_options",
    "json_option",
    "pool_options",
    "progress_option",
    "s3_options",
    "timeline_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])


class _Bytes(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A number of bytes, such as ``64MiB``."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a number of bytes from the command line."""
        if isinstance(value, int):  # click also converts the defaults of options, which are numbers
            return value
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


BYTES = _Bytes()  # one is enough: click's types hold no state

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for programs.")
progress_option = click.option(
    "--progress/--no-progress", default=None, help="Show a progress bar.  [default: on a terminal]"
)

timeline_option = click.option(
    "--timeline",
    type=click.Path(dir_okay=False, writable=True),
    help="Write what each connection did when to this file: .png, or .json for chrome://tracing or Perfetto.",
)


class _Header(click.ParamType):  # type: ignore[type-arg]  # likewise
    """A header of HTTP: ``Name: value``."""

    name = "header"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Read a header from the command line."""
        name, colon, text = value.partition(":")
        if not colon:  # the value is not shown: it may be a secret
            self.fail("not a header; write 'Name: value'", param, ctx)
        return name.strip(), text.strip()


class _HeaderVariable(_Header):
    """Name of an environment variable that holds a header."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Read a header from the environment."""
        header = os.environ.get(value)
        if header is None:
            self.fail(f"there is no environment variable {value}", param, ctx)
        return super().convert(header, param, ctx)


def headers_options(command: Command) -> Command:
    """Add the headers for a web server; the command gets them as ``headers``, None if there are none."""

    @click.option(
        "--header",
        "given",
        type=_Header(),
        multiple=True,
        metavar="'NAME: VALUE'",
        help="A header for the web server of a URL; other users of this host can see it. May be given several times.",
    )
    @click.option(
        "--header-env",
        "named",
        type=_HeaderVariable(),
        multiple=True,
        metavar="VARIABLE",
        help="A header that is in an environment variable, such as 'Authorization: Bearer …', which nobody sees.",
    )
    @functools.wraps(command)
    def with_headers(**arguments: Any) -> Any:
        headers = dict([*arguments.pop("named"), *arguments.pop("given")])
        return command(headers=headers or None, **arguments)

    return with_headers  # type: ignore[return-value]  # click's decorators keep no signature


def s3_options(command: Command) -> Command:
    """Add the options of ``S3ClientConfig``; the command gets it as ``s3client_config``."""

    @click.option("--region", help="The bucket's region.  [default: the AWS configuration's]")
    @click.option("--endpoint-url", help="An S3-compatible service.  [default: the AWS configuration's]")
    @click.option("--profile", help="A profile of the AWS configuration files.")
    @click.option("--unsigned", is_flag=True, help="Send no credentials: for public buckets.")
    @click.option("--force-path-style", is_flag=True, help="Put the bucket into the path, not into the host name.")
    @click.option("--requester-pays", is_flag=True, help="Accept to pay for the requests.")
    @click.option(
        "--signing",
        type=click.Choice(SIGNINGS),
        default=S3ClientConfig.signing,
        show_default=True,
        help="Where signatures go: some services take them in headers only.",
    )
    @functools.wraps(command)
    def with_config(**arguments: Any) -> Any:
        # Made here, before the command runs, so that a wrong value is an error before any work is done.
        names = ("region", "endpoint_url", "profile", "unsigned", "force_path_style", "requester_pays", "signing")
        config = S3ClientConfig(**{name: arguments.pop(name) for name in names})
        return command(s3client_config=config, **arguments)

    return with_config  # type: ignore[return-value]  # click's decorators keep no signature


def pool_options(command: Command) -> Command:
    """Add the most used options of ``PoolConfig``; the command gets it as ``pool_config``."""

    @click.option("--workers", type=click.IntRange(1), help="Worker processes.  [default: from the host's cores]")
    @click.option(
        "--connections",
        type=click.IntRange(1),
        help=f"Connections of each worker.  [default: at most {CONNECTIONS_PER_WORKER}, as needed]",
    )
    @click.option("--max-memory", type=BYTES, help="Shared memory, such as 64MiB.  [default: what the host can spare]")
    @click.option(
        "--part-size",
        type=BYTES,
        help=f"Most bytes of one request.  [default: {format_bytes(S3ClientConfig.part_size)}]",
    )
    @functools.wraps(command)
    def with_config(**arguments: Any) -> Any:
        # Options that are not given are None, for which PoolConfig looks at MPREADER_* and then at the host.
        config = PoolConfig(
            workers=arguments.pop("workers"),
            connections_per_worker=arguments.pop("connections"),
            max_memory=arguments.pop("max_memory"),
            part_size=arguments.pop("part_size"),
        )
        return command(pool_config=config, **arguments)

    return with_config  # type: ignore[return-value]  # click's decorators keep no signature
