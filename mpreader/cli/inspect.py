"""``mpreader inspect``: prints the contents of a checkpoint, and the requests that a load of it would make.

:func:`mpreader.dcp.describe_checkpoint` finds them out from ``.metadata``; this module makes tables or JSON of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mpreader.cli.checkpoint import checkpoint_options
from mpreader.cli.options import json_option
from mpreader.cli.output import human_bytes, print_json, print_table

if TYPE_CHECKING:
    from mpreader.dcp import CheckpointSummary
    from mpreader.dcp.summary import HostSummary, LoadSummary, ShardedLoadSummary

__all__ = ["command"]


@click.command("inspect", short_help="Show what a checkpoint holds, and what its load requests.")
@checkpoint_options
@click.option("--parts", is_flag=True, help="Show every request of the load, as a range of bytes, its end exclusive.")
@click.option(
    "--sort", type=click.Choice(["name", "size"]), default="name", show_default=True, help="Order of the tables."
)
@click.option(
    "--limit", type=click.IntRange(0), default=40, show_default=True, help="Most rows of a table; 0 shows all."
)
@click.option(
    "--ranks", type=click.IntRange(1), help="Also plan a load by so many ranks, each with a shard of every tensor."
)
@click.option(
    "--shard", type=click.IntRange(0), default=0, show_default=True, help="Dimension in which --ranks divide tensors."
)
@json_option
def command(
    uri: str,
    settings: dict[str, Any],
    parts: bool,
    sort: str,
    limit: int,
    ranks: int | None,
    shard: int,
    as_json: bool,
) -> None:
    """Show what a checkpoint holds, and what a load of it would ask S3 for. Only .metadata is read.

    \b
    Examples:
      mpreader inspect s3://my-bucket/checkpoint --sort size
      mpreader inspect s3://my-bucket/checkpoint --match 'model.layers.0.*' --parts
      mpreader inspect s3://my-bucket/checkpoint --part-size 16MiB --json
      mpreader inspect s3://my-bucket/checkpoint --ranks 4 --shard 0
    """  # noqa: D301  # click reads the \b
    from mpreader.dcp import describe_checkpoint  # imports torch, for which --help should not wait

    summary = describe_checkpoint(uri, ranks=ranks, shard=shard, **settings)
    if as_json:
        print_json(_document(summary, parts=parts))
        return
    by_size = sort == "size"
    click.echo(
        f"{summary.uri}: {_count(len(summary.tensors), 'tensor')} of {human_bytes(summary.nbytes)}, "
        f"{_count(len(summary.items), 'other item')}; {human_bytes(summary.stored_nbytes)} in "
        f"{_count(len(summary.files), 'file')}"
    )
    _print_files(summary, by_size, limit)
    _print_tensors(summary, by_size, limit)
    _print_items(summary, by_size, limit)
    _print_load(summary.load, limit)
    if parts:
        _print_parts(summary.load, limit)
    if summary.sharded is not None:
        _print_sharded(summary.sharded, limit)


def _document(summary: CheckpointSummary, *, parts: bool) -> dict[str, Any]:
    document = dataclasses.asdict(summary)
    # There may be hundreds of thousands of parts, so they are in the document only if they are asked for.
    if not parts:
        for file in document["load"]["files"]:
            del file["parts"]
    return document


def _print_files(summary: CheckpointSummary, by_size: bool, limit: int) -> None:
    # By size: the largest first, and by name where sizes are equal. By name: all first keys are 0.
    files = sorted(summary.files, key=lambda file: (-file.nbytes if by_size else 0, file.path))
    rows = [(file.path, file.items, human_bytes(file.nbytes)) for file in files]
    _print_limited(("file", "items", "size"), rows, limit)


def _print_tensors(summary: CheckpointSummary, by_size: bool, limit: int) -> None:
    tensors = [tensor for tensor in summary.tensors if tensor.is_selected]
    tensors.sort(key=lambda tensor: (-tensor.nbytes if by_size else 0, tensor.fqn))
    rows = [
        (tensor.fqn, tensor.dtype, _shape(tensor.shape), human_bytes(tensor.nbytes), tensor.chunks, _few(tensor.files))
        for tensor in tensors
    ]
    _print_limited(("tensor", "dtype", "shape", "size", "pieces", "files"), rows, limit)


def _print_items(summary: CheckpointSummary, by_size: bool, limit: int) -> None:
    items = [item for item in summary.items if item.is_selected]
    items.sort(key=lambda item: (-item.nbytes if by_size else 0, item.fqn))
    _print_limited(
        ("other item", "size", "file"), [(item.fqn, human_bytes(item.nbytes), item.file) for item in items], limit
    )


def _print_load(load: LoadSummary, limit: int) -> None:
    what = "everything" if load.match is None else f"what matches {' or '.join(load.match)}"
    click.echo(
        f"\nA load of {what}, {_count(load.tensors, 'tensor')} and {_count(load.items, 'other item')}, asks for "
        f"{human_bytes(load.fetched_nbytes)} in {_count(load.requests, 'GET')} of at most "
        f"{human_bytes(load.part_size)}, {human_bytes(load.over_read_nbytes)} of it over-read; besides "
        f"{_count(load.head_requests, 'HEAD')}, and {_count(load.metadata_requests, 'GET')} of .metadata."
    )
    rows = [
        (
            file.path,
            file.groups,
            file.requests,
            *map(human_bytes, (file.wanted_nbytes, file.fetched_nbytes, file.over_read_nbytes)),
        )
        for file in load.files
    ]
    _print_limited(("file", "range groups", "GETs", "wanted", "fetched", "over-read"), rows, limit)


def _print_parts(load: LoadSummary, limit: int) -> None:
    rows = [(file.path, part.start, part.end, part.size, part.over_read) for file in load.files for part in file.parts]
    _print_limited(("file", "first byte", "end", "bytes", "over-read"), rows, limit)


def _print_sharded(sharded: ShardedLoadSummary, limit: int) -> None:
    click.echo(
        f"\nA load by {_count(len(sharded.ranks), 'rank')}, each with a shard of every tensor in dimension "
        f"{sharded.dim}, needs {human_bytes(sharded.nbytes)} and asks for {human_bytes(sharded.fetched_nbytes)}."
    )
    rows = [
        (
            rank.rank,
            rank.requests,
            human_bytes(rank.nbytes),
            human_bytes(rank.fetched_nbytes),
            f"{rank.fetched_nbytes / rank.nbytes:.2f}" if rank.nbytes else None,
        )
        for rank in sharded.ranks
    ]
    _print_limited(("rank", "GETs", "needed", "fetched", "fetched / needed"), rows, limit)
    if sharded.host is not None:
        _print_host(sharded.host)


def _print_host(host: HostSummary) -> None:
    ratio = f", {host.fetched_nbytes / host.nbytes:.2f} times as much" if host.nbytes else ""
    click.echo(
        f"\nIf all of them are on one host, they receive together what they need: {human_bytes(host.nbytes)}, of which "
        f"the host asks for {human_bytes(host.fetched_nbytes)}{ratio}, in {_count(host.requests, 'GET')}."
    )


def _print_limited(headers: Sequence[str], rows: Sequence[Sequence[object]], limit: int) -> None:
    if not rows:
        return
    shown = rows[:limit] if limit else rows
    click.echo()
    print_table(headers, shown)
    if len(shown) < len(rows):
        click.echo(f"… and {len(rows) - len(shown):,} more (--limit 0 shows all)")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _few(files: Sequence[str]) -> str:
    return ", ".join(files) if len(files) <= 2 else f"{files[0]} and {len(files) - 1} more"
