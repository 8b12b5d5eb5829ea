"""``mpreader inspect``: prints the contents of a checkpoint, and the requests that a load of it would make.

:func:`mpreader.dcp.describe_checkpoint` finds them out from ``.metadata``, and :mod:`mpreader.tools.safetensors` from
the headers of safetensors files; this module makes tables or JSON of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from mpreader.cli.checkpoint import check_headers, checkpoint_options, naming_both_kinds, refuse_options
from mpreader.cli.options import headers_options, json_option
from mpreader.cli.output import count, human_bytes, print_json, print_limited

if TYPE_CHECKING:
    from mpreader.dcp import CheckpointSummary, ItemSummary
    from mpreader.fetch.summary import HostSummary, LoadSummary, ShardedLoadSummary
    from mpreader.tools.safetensors.inspection import SafetensorsSummary

    Summary = CheckpointSummary | SafetensorsSummary

__all__ = ["command"]

_MOST_TEXT: Final = 60  # characters of a text of a header in the table; --json has all of it


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
@headers_options
@json_option
def command(
    uri: str,
    settings: dict[str, Any],
    headers: dict[str, str] | None,
    parts: bool,
    sort: str,
    limit: int,
    ranks: int | None,
    shard: int,
    as_json: bool,
) -> None:
    """Show what a checkpoint holds, and what a load of it would ask S3 for.

    URI is that of a DCP checkpoint on S3; or of a safetensors file, or a directory of them, on S3, a web server or a
    local disk. Only .metadata, or the headers of the files, are read.

    \b
    Examples:
      mpreader inspect s3://my-bucket/checkpoint --sort size
      mpreader inspect s3://my-bucket/checkpoint --match 'model.layers.0.*' --parts
      mpreader inspect s3://my-bucket/checkpoint --part-size 16MiB --json
      mpreader inspect s3://my-bucket/checkpoint --ranks 4 --shard 0
      mpreader inspect s3://my-bucket/model.safetensors --ranks 4 --shard 1
      mpreader inspect https://example.org/model --header-env HUB_HEADER
    """  # noqa: D301  # click reads the \b
    from mpreader.tools.safetensors.kind import has_safetensors  # imports boto3, for which --help should not wait

    check_headers(uri, headers)
    summary: Summary
    if has_safetensors(uri, settings["s3client_config"]):
        summary = _of_safetensors(uri, settings, headers, ranks, shard)
    else:
        with naming_both_kinds():
            from mpreader.dcp import describe_checkpoint  # imports torch, which safetensors files do without

            summary = describe_checkpoint(uri, ranks=ranks, shard=shard, **settings)
    if as_json:
        print_json(_document(summary, parts=parts))
    else:
        _print(summary, by_size=sort == "size", limit=limit, parts=parts)


def _of_safetensors(
    uri: str, settings: dict[str, Any], headers: dict[str, str] | None, ranks: int | None, shard: int
) -> SafetensorsSummary:
    from mpreader.tools.safetensors.inspection import describe_safetensors

    refuse_options("max_gap_size", "allowed_globals")
    configs = {name: settings[name] for name in ("match", "s3client_config", "pool_config")}
    return describe_safetensors(uri, ranks=ranks, shard=shard, headers=headers, **configs)


def _print(summary: Summary, *, by_size: bool, limit: int, parts: bool) -> None:
    others = getattr(summary, "items", None)  # None: safetensors files have nothing but tensors
    click.echo(
        f"{summary.uri}: {count(len(summary.tensors), 'tensor')} of {human_bytes(summary.nbytes)}"
        f"{_others(others)}; {human_bytes(summary.stored_nbytes)} in {count(len(summary.files), 'file')}"
    )
    _print_files(summary, by_size, limit)
    _print_tensors(summary, by_size, limit)
    if others is None:
        _print_metadata(getattr(summary, "metadata", {}), limit)
    else:
        _print_items(others, by_size, limit)
    if summary.load is not None:
        _print_load(summary.load, limit, has_others=others is not None)
        if parts:
            _print_parts(summary.load, limit)
    if summary.sharded is not None:
        _print_sharded(summary.sharded, limit)


def _others(items: Sequence[object] | None) -> str:
    return "" if items is None else f", {count(len(items), 'other item')}"


def _document(summary: Summary, *, parts: bool) -> dict[str, Any]:
    document = dataclasses.asdict(summary)
    # There may be hundreds of thousands of parts, so they are in the document only if they are asked for.
    if not parts and document["load"] is not None:
        for file in document["load"]["files"]:
            del file["parts"]
    return document


def _print_files(summary: Summary, by_size: bool, limit: int) -> None:
    # By size: the largest first, and by name where sizes are equal. By name: all first keys are 0.
    files = sorted(summary.files, key=lambda file: (-file.nbytes if by_size else 0, file.path))
    rows = [(file.path, file.items, human_bytes(file.nbytes)) for file in files]
    print_limited(("file", "items", "size"), rows, limit)


def _print_tensors(summary: Summary, by_size: bool, limit: int) -> None:
    tensors = [tensor for tensor in summary.tensors if tensor.is_selected]
    tensors.sort(key=lambda tensor: (-tensor.nbytes if by_size else 0, tensor.fqn))
    rows = [
        (tensor.fqn, tensor.dtype, _shape(tensor.shape), human_bytes(tensor.nbytes), tensor.chunks, _few(tensor.files))
        for tensor in tensors
    ]
    print_limited(("tensor", "dtype", "shape", "size", "pieces", "files"), rows, limit)


def _print_metadata(metadata: Mapping[str, Mapping[str, str]], limit: int) -> None:
    files: dict[tuple[str, str], list[str]] = {}  # most files of a directory have the same texts
    for file, of_file in metadata.items():
        for name, text in of_file.items():
            shown = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
            files.setdefault((name, shown), []).append(file)
    print_limited(("metadata", "text", "files"), [(*entry, _few(of)) for entry, of in files.items()], limit)


def _print_items(items: Sequence[ItemSummary], by_size: bool, limit: int) -> None:
    items = [item for item in items if item.is_selected]
    items.sort(key=lambda item: (-item.nbytes if by_size else 0, item.fqn))
    print_limited(
        ("other item", "size", "file"), [(item.fqn, human_bytes(item.nbytes), item.file) for item in items], limit
    )


def _print_load(load: LoadSummary, limit: int, *, has_others: bool) -> None:
    what = "everything" if load.match is None else f"what matches {' or '.join(load.match)}"
    others = f" and {count(load.items, 'other item')}" if has_others else ""
    click.echo(
        f"\nA load of {what}, {count(load.tensors, 'tensor')}{others}, asks for "
        f"{human_bytes(load.fetched_nbytes)} in {count(load.requests, 'GET')} of at most "
        f"{human_bytes(load.part_size)}, {human_bytes(load.over_read_nbytes)} of it over-read; besides "
        f"{count(load.head_requests, 'HEAD')}, and {count(load.metadata_requests, 'GET')} of "
        f"{'.metadata' if has_others else 'headers'}."
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
    print_limited(("file", "range groups", "GETs", "wanted", "fetched", "over-read"), rows, limit)


def _print_parts(load: LoadSummary, limit: int) -> None:
    rows = [(file.path, part.start, part.end, part.size, part.over_read) for file in load.files for part in file.parts]
    print_limited(("file", "first byte", "end", "bytes", "over-read"), rows, limit)


def _print_sharded(sharded: ShardedLoadSummary, limit: int) -> None:
    click.echo(
        f"\nA load by {count(len(sharded.ranks), 'rank')}, each with a shard of every tensor in dimension "
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
    print_limited(("rank", "GETs", "needed", "fetched", "fetched / needed"), rows, limit)
    if sharded.host is not None:
        _print_host(sharded.host)


def _print_host(host: HostSummary) -> None:
    ratio = f", {host.fetched_nbytes / host.nbytes:.2f} times as much" if host.nbytes else ""
    click.echo(
        f"\nIf all of them are on one host, they receive together what they need: {human_bytes(host.nbytes)}, of which "
        f"the host asks for {human_bytes(host.fetched_nbytes)}{ratio}, in {count(host.requests, 'GET')}."
    )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _few(files: Sequence[str]) -> str:
    return ", ".join(files) if len(files) <= 2 else f"{files[0]} and {len(files) - 1} more"
