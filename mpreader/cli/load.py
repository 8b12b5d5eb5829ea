"""``mpreader load``: loads a checkpoint into memory, and prints the time and memory that it took.

:mod:`mpreader.tools.bench.loads` does the work, :mod:`mpreader.tools.ranks` that of several ranks, and
:mod:`mpreader.tools.safetensors` that of safetensors files.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from mpreader.cli.checkpoint import check_headers, checkpoint_options, lacks_metadata, naming_both_kinds, refuse_options
from mpreader.cli.options import headers_options, json_option, progress_option, timeline_option
from mpreader.cli.output import human_bytes, print_json, print_table
from mpreader.errors import AccessDenied, ObjectMissing
from mpreader.telemetry.timeline import timeline_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpreader.dcp.checkpoint import LoadOptions
    from mpreader.telemetry.timeline import Timeline
    from mpreader.tools.bench.loads import TimedLoad
    from mpreader.tools.ranks.job import HostLoad
    from mpreader.tools.ranks.messages import RankLoad

__all__ = ["command"]

_HEADERS: Final = (
    *("load", "seconds", "GB/s", "received", "over-read", "GETs", "retries", "slow, cut"),
    *("network wait, s", "consumer wait, s", "extra memory"),
)
_RANK_HEADERS: Final = (
    *("load", "rank", "seconds", "needed", "received", "from another rank", "GETs", "retries", "slow, cut"),
    *("network wait, s", "verified", "not verified"),
)
_UNVERIFIED: Final = "not verified"
_NO_CHECKSUMS: Final = f"{_UNVERIFIED}: safetensors files hold no checksums"
_HOST_HEADERS: Final = ("load", "seconds", "needed", "received", "received / needed", "GETs", "extra memory")


@click.command("load", short_help="Load a checkpoint into memory: verified, timed.")
@checkpoint_options
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="How many loads.")
@click.option("--no-verify", is_flag=True, help="Do not check the CRC-32 of every tensor.")
@click.option("--ranks", type=click.IntRange(1), help="Load as a job of so many ranks on this machine does.")
@click.option(
    "--shard",
    type=click.IntRange(0),
    help="Dimension in which --ranks divide every tensor.  [default: each rank loads all]",
)
@click.option("--no-share", is_flag=True, help="Let each of --ranks receive by itself, to compare.")
@click.option("--verify-whole", is_flag=True, help="Let --ranks receive whole tensors only, to verify them all.")
@timeline_option
@headers_options
@progress_option
@json_option
def command(
    uri: str,
    settings: dict[str, Any],
    headers: dict[str, str] | None,
    repeat: int,
    no_verify: bool,
    ranks: int | None,
    shard: int | None,
    no_share: bool,
    verify_whole: bool,
    timeline: str | None,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Load a checkpoint into memory, check it, and say how fast that was: what this host can do.

    Its memory is allocated before the clock starts, and used again by every load. The first load also starts the
    worker processes. All items are received whole, and compared with the CRC-32s that torch.save wrote; where there
    are none, the output says how many bytes were not verified. Items that are no tensors are never unpickled.

    URI is that of a DCP checkpoint on S3; or of a safetensors file, or a directory of them, on S3, a web server or a
    local disk. Those hold no checksums, and so are not verified.

    With --ranks so many processes load together, by torch.distributed.checkpoint.load over gloo, and the output also
    says what the host received against what it needed. No launcher is needed. Safetensors files on S3 are loaded in
    the same way, through S3HuggingFaceStorageReader.

    \b
    Examples:
      mpreader load s3://my-bucket/checkpoint --repeat 3
      mpreader load s3://my-bucket/checkpoint --match 'model.layers.0.*' --workers 4 --json
      mpreader load s3://my-bucket/checkpoint --timeline load.png
      mpreader load s3://my-bucket/checkpoint --ranks 4 --shard 0
      mpreader load s3://my-bucket/model.safetensors --ranks 4 --shard 1
      mpreader load https://example.org/model --header-env HUB_HEADER
    """  # noqa: D301  # click reads the \b
    if ranks is None and (shard is not None or no_share or verify_whole):
        raise click.UsageError("--shard, --no-share and --verify-whole say how --ranks load: give --ranks, too")
    if no_verify and verify_whole:
        raise click.UsageError("--no-verify and --verify-whole contradict each other")
    check_headers(uri, headers)
    from mpreader.tools.safetensors.kind import has_files, is_named_so  # imports boto3

    # No region: --region is in the settings already, as a field of s3client_config.
    verify: bool | Literal["whole"] = "whole" if verify_whole else not no_verify
    settings |= {"region": None, "weights_only": True, "verify": verify, "progress": progress}
    settings["share_host"] = not no_share
    # It refuses a wrong path here, before torch is imported, which takes seconds.
    with timeline_to(timeline) as recorded, naming_both_kinds():
        is_dcp = not is_named_so(uri)
        try:
            if is_dcp:
                _load_dcp(uri, settings, ranks, shard, repeat, recorded, as_json=as_json)
        except (ObjectMissing, AccessDenied) as error:
            # Asked for only now, so that the load of a DCP checkpoint makes no request for it.
            if not lacks_metadata(error) or not has_files(uri, settings["s3client_config"]):
                raise
            is_dcp = False
        if not is_dcp:
            refuse_options("max_gap_size", "allowed_globals", "verify_whole")
            if ranks is None:
                _load_safetensors(uri, settings, headers, repeat, as_json=as_json)
            else:
                _load_safetensors_with_ranks(uri, settings, ranks, shard, repeat, recorded, as_json=as_json)


def _load_dcp(
    uri: str,
    settings: dict[str, Any],
    ranks: int | None,
    shard: int | None,
    repeat: int,
    recorded: Timeline | None,
    *,
    as_json: bool,
) -> None:
    from mpreader.dcp.checkpoint import LoadOptions

    options = LoadOptions(**settings)
    if ranks is None:
        _load_alone(uri, options, repeat, as_json=as_json)
    else:
        verdict = None if options.verify else _UNVERIFIED
        _load_with_ranks(uri, options, ranks, shard, repeat, recorded, verdict, as_json=as_json)


def _load_alone(uri: str, options: LoadOptions, repeat: int, *, as_json: bool) -> None:
    from mpreader.tools.bench.loads import time_loads

    loads = list(time_loads(uri, options, repeat))
    if as_json:
        _print_document(uri, loads)
        return
    is_checked = bool(options.verify)
    _print(uri, loads, _verdict(loads[-1].verified_nbytes, loads[-1].unverified_nbytes) if is_checked else _UNVERIFIED)


def _load_safetensors(
    uri: str, settings: dict[str, Any], headers: dict[str, str] | None, repeat: int, *, as_json: bool
) -> None:
    from mpreader.sources.uri import without_secrets
    from mpreader.tools.safetensors.loads import SafetensorsLoad, time_safetensors_loads

    configs = {name: settings[name] for name in ("match", "progress", "s3client_config", "pool_config")}
    loads = list(time_safetensors_loads(SafetensorsLoad(uri, headers=headers, **configs), repeat))
    if as_json:
        _print_document(without_secrets(uri), loads)
    else:
        _print(without_secrets(uri), loads, _NO_CHECKSUMS)


def _load_safetensors_with_ranks(
    uri: str,
    settings: dict[str, Any],
    ranks: int,
    shard: int | None,
    repeat: int,
    recorded: Timeline | None,
    *,
    as_json: bool,
) -> None:
    if not uri.startswith("s3://"):
        raise click.UsageError("--ranks load from s3:// only")
    from mpreader.dcp.checkpoint import LoadOptions

    options = LoadOptions(**{**settings, "verify": False}, safetensors=True)
    _load_with_ranks(uri, options, ranks, shard, repeat, recorded, _NO_CHECKSUMS, as_json=as_json)


def _load_with_ranks(
    uri: str,
    options: LoadOptions,
    ranks: int,
    shard: int | None,
    repeat: int,
    timeline: Timeline | None,
    verdict: str | None,
    *,
    as_json: bool,
) -> None:
    from mpreader.tools.ranks.job import time_rank_loads

    loads = list(time_rank_loads(uri, options, ranks, shard, repeat, timeline))
    if as_json:
        print_json(
            {
                "uri": uri,
                "ranks": ranks,
                "shard": shard,
                "is_shared": any(rank.shared_nbytes for load in loads for rank in load.ranks),
                "is_verified": not any(rank.unverified_nbytes for load in loads for rank in load.ranks),
                "loads": [
                    {**dataclasses.asdict(load), "received_per_needed": load.received_per_needed} for load in loads
                ],
            }
        )
    else:
        _print_ranks(uri, loads, shard, verdict)


def _print_document(uri: str, loads: Sequence[TimedLoad]) -> None:
    print_json(
        {
            "uri": uri,
            "is_verified": not any(load.unverified_nbytes for load in loads),
            "loads": [{**dataclasses.asdict(load), "gb_per_s": load.gb_per_s} for load in loads],
        }
    )


def _print(uri: str, loads: Sequence[TimedLoad], verdict: str) -> None:
    click.echo(f"{uri}: {human_bytes(loads[0].nbytes)} of tensors, {verdict}\n")
    print_table(_HEADERS, [_row(number, load) for number, load in enumerate(loads, start=1)])
    click.echo("(extra memory: what this process and its workers took besides the tensors; shared memory once)")


def _verdict(verified_nbytes: int, unverified_nbytes: int) -> str:
    if not unverified_nbytes:
        return "verified"
    verified, unverified = human_bytes(verified_nbytes), human_bytes(unverified_nbytes)
    return f"{verified} of the items verified, {unverified} not: they were saved without checksums"


def _row(number: int, load: TimedLoad) -> tuple[object, ...]:
    return (
        _name(number, load.starts_workers),
        load.seconds,
        load.gb_per_s,
        human_bytes(load.received_nbytes),
        human_bytes(load.over_read_nbytes),
        load.requests,
        load.retries,
        load.slow_cut,
        load.network_wait_s,
        load.consumer_wait_s,
        human_bytes(load.extra_memory_bytes),
    )


def _name(number: int, starts_workers: bool) -> str:
    return f"{number}, starts workers" if starts_workers else f"{number}"


def _print_ranks(uri: str, loads: Sequence[HostLoad], shard: int | None, verdict: str | None) -> None:
    ranks = loads[-1].ranks
    if verdict is None:
        verdict = _ranks_verdict(
            sum(rank.verified_nbytes for rank in ranks), sum(rank.unverified_nbytes for rank in ranks)
        )
    each = "all of them" if shard is None else f"a shard of each in dimension {shard}"
    who = "1 rank" if len(ranks) == 1 else f"each of {len(ranks)} ranks"
    click.echo(f"{uri}: {human_bytes(loads[0].needed_nbytes)} of tensors; {who} has {each}; {verdict}\n")
    numbered = list(enumerate(loads, start=1))
    print_table(_RANK_HEADERS, [_rank_row(number, rank) for number, load in numbered for rank in load.ranks])
    click.echo("\nThis host:")
    print_table(_HOST_HEADERS, [_host_row(number, load) for number, load in numbered])
    click.echo("(extra memory: what the ranks and their workers took besides the tensors; shared memory once)")


def _ranks_verdict(verified_nbytes: int, unverified_nbytes: int) -> str:
    if not unverified_nbytes:
        return "verified"
    verified, unverified = human_bytes(verified_nbytes), human_bytes(unverified_nbytes)
    return f"{verified} verified, {unverified} not: parts of items, or saved without checksums"


def _rank_row(number: int, rank: RankLoad) -> tuple[object, ...]:
    return (
        str(number),
        rank.rank,
        rank.seconds,
        human_bytes(rank.nbytes),
        human_bytes(rank.received_nbytes),
        human_bytes(rank.shared_nbytes),
        rank.requests,
        rank.retries,
        rank.slow_cut,
        rank.network_wait_s,
        human_bytes(rank.verified_nbytes),
        human_bytes(rank.unverified_nbytes),
    )


def _host_row(number: int, load: HostLoad) -> tuple[object, ...]:
    return (
        _name(number, load.starts_workers),
        load.seconds,
        human_bytes(load.needed_nbytes),
        human_bytes(load.received_nbytes),
        load.received_per_needed,
        sum(rank.requests for rank in load.ranks),
        human_bytes(load.extra_memory_bytes),
    )
