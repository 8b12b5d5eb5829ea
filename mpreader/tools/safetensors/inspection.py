"""Inspection of safetensors files: summarizes their headers, and the requests of a load. It must work without torch.

``mpreader inspect`` uses it. Only headers, and the index of a directory, are read. The load is planned by the same
functions as the load itself, so that the requests are exactly those that it makes on this host.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError, PlanError
from mpreader.fetch.local import LocalFetcher
from mpreader.fetch.safetensors import FileFetcher, StoredFile, fetcher_of, files_of, opened
from mpreader.fetch.summary import FileSummary, LoadSummary, ShardedLoadSummary, TensorSummary
from mpreader.formats.safetensors import StoredTensor
from mpreader.host import Host
from mpreader.pool.sizing import size_pool
from mpreader.sources.uri import without_secrets
from mpreader.tools.safetensors.requests import load_summary, path_in, sharded_summary

__all__ = ["SafetensorsSummary", "describe_safetensors", "matching"]


@dataclass(frozen=True, slots=True)
class SafetensorsSummary:
    """Contents of safetensors files, and the requests of a load of them.

    Attributes:
        uri: URI of the file or of the directory, without the secrets of a URL.
        nbytes: Bytes of all tensors.
        stored_nbytes: Bytes of all files.
        files: The files, in the order in which they are read; ``nbytes`` is all of a file.
        tensors: The tensors, in the order of the files and of their bytes.
        metadata: Texts that the writer has added, by file, for those files that have any.
        load: Requests of a load of the selected tensors; None for local files, of which nothing is requested.
        sharded: Requests of a load of them by several ranks; None if that was not asked for.
    """

    uri: str
    nbytes: int
    stored_nbytes: int
    files: tuple[FileSummary, ...]
    tensors: tuple[TensorSummary, ...]
    metadata: Mapping[str, Mapping[str, str]]
    load: LoadSummary | None
    sharded: ShardedLoadSummary | None


def describe_safetensors(
    uri: str,
    *,
    match: Collection[str] | None = None,
    ranks: int | None = None,
    shard: int = 0,
    headers: Mapping[str, str] | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> SafetensorsSummary:
    """Summarize the contents of safetensors files and the requests that a load of them makes.

    Args:
        uri: URI, URL or path of a file or of a directory.
        match: Patterns that select the tensors of the load. The contents are summarized for all of them.
        ranks: Number of ranks of a load in shards, which is summarized, too. None: none is.
        shard: Dimension in which each tensor is divided among them.
        headers: Headers for a web server.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool of the load.

    Raises:
        ConfigError: ``ranks`` or ``shard`` is too small, or the files are local, where there are no requests.
        HeaderRefused: A header is damaged.
        PlanError: Nothing matches, or two files have a tensor of the same name.
        TransportError: A header can't be read.
    """
    if (ranks is not None and ranks < 1) or shard < 0:
        raise ConfigError(f"a load in shards needs at least one rank and dimension 0, got {ranks} and {shard}")
    with fetcher_of(uri, s3client_config, pool_config, headers) as fetcher:
        is_local = isinstance(fetcher, LocalFetcher)
        if ranks is not None and is_local:
            raise ConfigError(f"{uri} is on a local disk: a load of it makes no requests, by however many ranks")
        with opened(fetcher, files_of(fetcher, uri)) as files:
            chosen = matching(files, match)
        taken = _files_of_load(fetcher, uri, files, chosen, match)
    load = sharded = None
    if not is_local:
        sizes = size_pool(pool_config or PoolConfig(), s3client_config or S3ClientConfig(), Host.now())
        load = load_summary(taken, chosen, sizes, None if match is None else tuple(match))
        if ranks is not None:
            sharded = sharded_summary(chosen, sizes, shard, ranks, is_shared=uri.startswith("s3://"))
    return _summarize(uri, files, {stored.name for _, stored in chosen}, load, sharded)


def matching(files: Sequence[StoredFile], match: Iterable[str] | None) -> list[tuple[StoredFile, StoredTensor]]:
    """Return the tensors whose names match one of the patterns, in the order of their bytes; None: all of them.

    Raises:
        PlanError: There are tensors, but none of them matches.
    """
    everything = [(file, stored) for file in files for stored in file.header.tensors.values()]
    if match is None:
        return everything
    patterns = tuple(match)
    chosen = [
        (file, stored) for file, stored in everything if any(fnmatchcase(stored.name, pattern) for pattern in patterns)
    ]
    if everything and not chosen:
        raise PlanError(
            f"nothing in {files[0].uri}{' and the other files' if len(files) > 1 else ''} matches "
            f"{' or '.join(map(repr, patterns))}; there are {len(everything)} tensors, the first is "
            f"{everything[0][1].name!r}"
        )
    return chosen


def _files_of_load(
    fetcher: FileFetcher,
    uri: str,
    files: Sequence[StoredFile],
    chosen: Sequence[tuple[StoredFile, StoredTensor]],
    match: object,
) -> Sequence[StoredFile]:
    """Return the files whose headers a load of what was chosen reads: with an index, those that have any of it."""
    if match is None:
        return files
    taken = set(files_of(fetcher, uri, [stored.name for _, stored in chosen]))
    return [file for file in files if file.uri in taken]


def _summarize(
    uri: str,
    files: Sequence[StoredFile],
    selected: set[str],
    load: LoadSummary | None,
    sharded: ShardedLoadSummary | None,
) -> SafetensorsSummary:
    tensors = tuple(
        TensorSummary(
            fqn=stored.name,
            dtype=stored.dtype,
            shape=stored.shape,
            nbytes=stored.end - stored.start,
            stored_nbytes=stored.end - stored.start,
            chunks=1,
            files=(path_in(file.uri),),
            is_selected=stored.name in selected,
        )
        for file in files
        for stored in file.header.tensors.values()
    )
    return SafetensorsSummary(
        uri=without_secrets(uri),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        stored_nbytes=sum(file.version.size for file in files),
        files=tuple(FileSummary(path_in(file.uri), len(file.header.tensors), file.version.size) for file in files),
        tensors=tensors,
        metadata={path_in(file.uri): dict(file.header.metadata) for file in files if file.header.metadata},
        load=load,
        sharded=sharded,
    )
