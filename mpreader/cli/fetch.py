"""``mpreader fetch``: fetches an object, or ranges of it, into a file or a pipe.

:mod:`mpreader.tools.download.download` does the work. This module decides if the output is a file, which can be
resumed, or a stream, and shows the progress and the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import click

from mpreader.cli.options import json_option, pool_options, progress_option, s3_options, timeline_option
from mpreader.cli.output import human_bytes, print_json
from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import MpreaderError, ObjectChanged, ObjectMissing
from mpreader.fetch.fetcher import RangeFetcher
from mpreader.s3 import parse_s3_uri
from mpreader.telemetry.progress import Progress, progress_bar
from mpreader.telemetry.timeline import timeline_to
from mpreader.tools.download.download import Downloaded, copy_to, download, name_of
from mpreader.tools.download.part_file import PartFile
from mpreader.tools.download.plan import CHECKSUMS, RangeOfObject

__all__ = ["command"]

_STDOUT = "-"


class _Range(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A range of bytes: ``A-B``, ``A-`` or ``-N``, as in HTTP, but B excluded."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> RangeOfObject:
        """Read a range from the command line."""
        match = re.fullmatch(r"([0-9]+)-([0-9]*)|-([0-9]+)", value)
        if match is None:
            self.fail(f"not a range: {value!r}; write 0-100, 100- or -100", param, ctx)
        if match[3]:
            return -int(match[3]), None
        start, end = int(match[1]), int(match[2]) if match[2] else None
        if end is not None and end < start:
            self.fail(f"the range {value} ends before it starts", param, ctx)
        return start, end


@click.command("fetch", short_help="Fetch an object, or ranges of it, into a file or a pipe.")
@click.argument("source")
@click.option(
    "--range",
    "ranges",
    type=_Range(),
    multiple=True,
    metavar="A-B",
    help="Bytes A to B, B excluded; A- to the end; -N the last N bytes. Several are put one behind the other.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(allow_dash=True),
    help="The file, replaced if it is there; - is stdout.  [default: the object's name, in this folder]",
)
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on where an interrupted call left FILE.part."
)
@click.option(
    "--checksum",
    type=click.Choice(CHECKSUMS),
    default=CHECKSUMS[0],
    show_default=True,
    help="Of what was fetched; none: do not verify a whole object against what S3 has stored, either.",
)
@progress_option
@timeline_option
@json_option
@s3_options
@pool_options
def command(
    source: str,
    ranges: tuple[RangeOfObject, ...],
    output: str | None,
    resume: bool,
    checksum: str,
    progress: bool | None,
    timeline: str | None,
    as_json: bool,
    s3client_config: S3ClientConfig,
    pool_config: PoolConfig,
) -> None:
    """Fetch an object, or ranges of it, from S3 (s3://bucket/key) or http(s).

    A file grows as FILE.part, and gets its name when it is whole and verified; the same command goes on where an
    interrupted one stopped, if the object is still the same.

    \b
    Examples:
      mpreader fetch s3://my-bucket/data.bin
      mpreader fetch s3://my-bucket/data.bin --range 0-100 --range -8 -o - | xxd
      mpreader fetch s3://my-bucket/model/model-00001-of-00002.safetensors
      mpreader fetch https://example.org/data.bin -o copy.bin --checksum md5 --json
    """  # noqa: D301  # click reads the \b
    if as_json and output == _STDOUT:  # the document would be mixed with the object's bytes
        raise click.UsageError("--json and the bytes can't both go to stdout; name a file with -o FILE")
    path = output or name_of(source)
    with ExitStack() as stack:
        # Entered first, so that the timeline is saved last: after the pool has ended, with all of its requests.
        stack.enter_context(timeline_to(timeline))
        fetcher = stack.enter_context(RangeFetcher(s3client_config, pool_config))
        stack.enter_context(_telling_of_folders(fetcher, source))
        bar = _Bar(stack, progress)
        if _is_plain(path):
            done = _download(
                fetcher, source, path, ranges or None, bar, quiet=as_json, resume=resume, checksum=checksum
            )
        else:
            file: Any = stack.enter_context(click.open_file(path, "wb"))  # knows "-", and does not close stdout
            done = copy_to(fetcher, source, file, ranges or None, checksum=checksum, on_progress=bar)
    if as_json:
        print_json({"path": path, **dataclasses.asdict(done)})
    else:
        _print(done, path)


@contextlib.contextmanager
def _telling_of_folders(fetcher: RangeFetcher, source: str) -> Iterator[None]:
    """Let the error of an object that is not there say that the name is that of a folder, and what takes folders."""
    try:
        yield
    except ObjectMissing as error:
        first = _try_first_below(fetcher, source)
        if first is not None:
            error.args = (
                f"{source} is no object, but a folder, which begins with {first}: fetch takes one object; "
                "`mpreader inspect` and `mpreader load` take the folder of a checkpoint, and `aws s3 sync` copies it",
            )
        raise


def _try_first_below(fetcher: RangeFetcher, source: str) -> str | None:
    if not source.startswith("s3://"):
        return None
    bucket, key = parse_s3_uri(source)
    try:
        page = next(fetcher.client().list_objects(bucket, f"{key.rstrip('/')}/", max_keys=1))
    except MpreaderError:  # the user may not list: the error is told as it is
        return None
    return f"s3://{bucket}/{page.object_info[0].key}" if page.object_info else None


class _Bar:
    """Progress bar that begins when the number of bytes is known; it is called as ``on_progress`` of a download.

    Args:
        stack: Closes the bar at its end, in any case.
        show: As for :func:`~mpreader.telemetry.progress.progress_bar`.
    """

    def __init__(self, stack: ExitStack, show: bool | None) -> None:
        self._stack = stack
        self._show = show
        self._bar: Progress | None = None
        self._done = 0

    @property
    def has_begun(self) -> bool:
        """True once the download has opened its part file, so that ``FILE.part`` is this call's, and no older one."""
        return self._bar is not None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            # The bar shows a rate, and bytes that an earlier call has fetched took no time of this one.
            self._bar = self._stack.enter_context(progress_bar(total - done, "fetch", show=self._show))
        else:
            self._bar.advance(done - self._done)
        self._done = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _download(
    fetcher: RangeFetcher,
    source: str,
    path: str,
    ranges: tuple[RangeOfObject, ...] | None,
    bar: _Bar,
    *,
    quiet: bool,
    **arguments: Any,
) -> Downloaded:
    try:
        return download(fetcher, source, path, ranges, on_progress=bar, **arguments)
    except (KeyboardInterrupt, MpreaderError, OSError) as error:
        bar.close()  # before the message, which would continue the bar's line
        # Nothing is said of a part that can't be gone on with: one of another call, or of an older version.
        left = PartFile.try_size(path) if bar.has_begun and not isinstance(error, ObjectChanged) else None
        if left and not quiet:
            click.echo(f"mpreader: {human_bytes(left)} are in {path}.part; the same command goes on there", err=True)
        raise


def _is_plain(path: str) -> bool:
    """True if ``path`` is a file, or a name for a new one; a device or a pipe is written to as a stream.

    Also true of a folder: :func:`download` refuses it with a message that explains the mistake.
    """
    return path != _STDOUT and (not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path))


def _print(done: Downloaded, path: str) -> None:
    lines = [f"{'stdout' if path == _STDOUT else path}: {human_bytes(done.bytes)} in {done.seconds:.2f} s"]
    if done.resumed_from:
        lines[0] += f", of which {human_bytes(done.resumed_from)} were there already"
    if done.started_over:
        lines.append(f"started over: {done.started_over}")
    if done.checksum:
        lines.append(done.checksum)
    lines.append(
        f"verified against {done.verified_against}" if done.verified_against else f"not verified: {done.why_unverified}"
    )
    for line in lines:
        click.echo(line, err=path == _STDOUT)  # stdout has the object's bytes, and nothing else
