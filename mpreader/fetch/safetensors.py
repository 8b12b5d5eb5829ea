"""Files of a safetensors checkpoint: which ones there are, and what their headers say. It must work without torch.

A checkpoint is one file, or a directory of files. A directory may have an index, ``model.safetensors.index.json``,
which names the file of each tensor; without one, all of its ``.safetensors`` files belong to it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import quote

from mpreader.collector import collector_paused
from mpreader.config import KiB, PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError, ObjectMissing, PlanError
from mpreader.fetch.fetcher import RangeFetcher, SharedPoolFetcher
from mpreader.fetch.local import LocalFetcher, path_of
from mpreader.formats.safetensors import LENGTH_BYTES, Header, HeaderRefused, decode_header, header_end
from mpreader.pool.background import call_twice_if_slow
from mpreader.pool.source import ObjectVersion
from mpreader.s3 import parse_s3_uri
from mpreader.sources.uri import without_secrets
from mpreader.sources.versions import PinnedSource

__all__ = ["INDEX", "SUFFIX", "FileFetcher", "StoredFile", "fetcher_of", "files_of", "header_pieces", "opened"]

FileFetcher = RangeFetcher | LocalFetcher

INDEX: Final = "model.safetensors.index.json"
SUFFIX: Final = ".safetensors"
_ONLY: Final = "model.safetensors"
# Most headers are shorter, so that one request brings them; the bytes behind them cost less than another request.
_FIRST_BYTES: Final = 256 * KiB


class StoredFile(NamedTuple):
    """File whose header was read. Whatever else is read of it is of the same version.

    Attributes:
        uri: URI or path of the file.
        source: Name of this version of the file, for the methods of the fetcher.
        version: The version.
        header: The header.
    """

    uri: str
    source: str
    version: ObjectVersion
    header: Header


def fetcher_of(
    uri: str,
    s3client_config: S3ClientConfig | None,
    pool_config: PoolConfig | None,
    headers: Mapping[str, str] | None = None,
    *,
    for_host: bool = False,
) -> FileFetcher:
    """Make the fetcher for a URI: one on the shared pool of the process, or one of local files. The caller closes it.

    Args:
        uri: ``s3://…``, an http(s) URL, ``file://…``, or a path.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        headers: HTTP headers to add to requests to a web server.
        for_host: True: the pool is the one that receives for all ranks of this host.

    Raises:
        ConfigError: The URI is none of these, there are headers but no web server, or a setting is wrong.
    """
    scheme = _scheme_of(uri)
    if headers and scheme not in ("http", "https"):
        raise ConfigError(f"headers are sent to web servers only, and {without_secrets(uri)!r} is none")
    if scheme in ("", "file"):
        return LocalFetcher()
    if scheme not in ("s3", "http", "https"):
        raise ConfigError(f"{without_secrets(uri)!r} is none of s3://bucket/key, an http(s) URL, and a local path")
    return SharedPoolFetcher(s3client_config, pool_config, for_host=for_host, http_headers=headers)


def files_of(fetcher: FileFetcher, uri: str, names: Collection[str] | None = None) -> list[str]:
    """Return the URIs of the files of a checkpoint.

    Args:
        fetcher: Fetcher that reads the checkpoint.
        uri: URI of a file, which ends with ``.safetensors``, or of a directory. A directory on a web server, which
            can't be listed, must have an index or one file ``model.safetensors``.
        names: Names of the tensors that are wanted: files that have none of them, according to the index, are left out.
            None: all tensors.

    Raises:
        ObjectMissing: There is no safetensors file in the directory.
        PlanError: The index is damaged, or names a file outside of its directory.
        TransportError: The index can't be read, or the directory can't be listed.
    """
    uri = path_of(uri)
    directory, query = uri, ""
    is_url = _scheme_of(uri) in ("http", "https")
    if is_url:
        directory, mark, query = uri.partition("?")
        query = mark + query
    if directory.endswith(SUFFIX) and not (isinstance(fetcher, LocalFetcher) and os.path.isdir(directory)):
        return [uri]
    directory = directory.rstrip("/")
    index_uri = f"{directory}/{INDEX}{query}"
    try:
        index = _read_index(fetcher, index_uri)
    except ObjectMissing:
        if is_url:
            return [f"{directory}/{_ONLY}{query}"]
        return _listed(fetcher, directory)
    files = _names_in(index, without_secrets(f"{directory}/{INDEX}"), names)
    if is_url:  # in a URL "?" and "%2e" would not be taken for parts of a name
        files = [quote(name) for name in files]
    return [f"{directory}/{name}{query}" for name in files]


def _read_index(fetcher: FileFetcher, uri: str) -> bytes:
    if isinstance(fetcher, LocalFetcher) or not uri.startswith("s3://"):
        return bytes(fetcher.fetch_object(uri))
    fetcher.start()  # the workers come up meanwhile
    bucket, key = parse_s3_uri(uri)

    def read() -> bytes:
        with fetcher.client().get_object(bucket, key) as reader:
            return reader.read()

    # By one GET: a fetch of a whole object asks for its size first, and all that follows waits for the index.
    return call_twice_if_slow("mpreader-index", read, lambda _: None)


def _scheme_of(uri: str) -> str:
    """Return the scheme of a URI, in lower case; "" for a path."""
    scheme, colon, _ = uri.partition("://")
    return scheme.lower() if colon else ""


def _names_in(index: bytes, uri: str, wanted: Collection[str] | None) -> list[str]:
    try:
        files = json.loads(index)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanError(f"{uri} is damaged: {error!r}") from error
    if not isinstance(files, dict):
        raise PlanError(f"{uri} is damaged: its weight_map is a {type(files).__name__}, not an object of JSON")
    for name in files.values():
        if not _is_inside(name):
            raise PlanError(f"{uri} names {name!r}, which is no file of this directory")
    # If the index lacks a name, all headers are read, so that the error can say that no file has the tensor.
    if wanted is not None and all(name in files for name in wanted):
        files = {name: files[name] for name in wanted}
    return sorted(set(files.values()))


def _is_inside(name: object) -> bool:
    """Return True if a name of the index is that of a safetensors file in the directory, or in one below it."""
    if not isinstance(name, str) or not name.endswith(SUFFIX) or name.startswith("/") or ".." in name.split("/"):
        return False
    try:
        return b"\0" not in name.encode("utf-8")
    except UnicodeEncodeError:  # JSON can have half of a surrogate pair, which no name of a file has
        return False


def _listed(fetcher: FileFetcher, directory: str) -> list[str]:
    if isinstance(fetcher, LocalFetcher):
        bucket, files = "", [path for path in fetcher.list_files(directory) if path.endswith(SUFFIX)]
    else:
        bucket, prefix = parse_s3_uri(f"{directory}/")
        found = [entry.key for page in fetcher.client().list_objects(bucket, prefix, "/") for entry in page.object_info]
        files = [f"s3://{bucket}/{key}" for key in sorted(found) if key.endswith(SUFFIX)]
    if not files:
        raise ObjectMissing(f"{directory}: no {SUFFIX} file is there", bucket=bucket, key=directory)
    return files


@contextlib.contextmanager
def opened(fetcher: FileFetcher, uris: Sequence[str], *, has_pieces: bool = False) -> Iterator[list[StoredFile]]:
    """Read the headers of files, all at the same time; within the context the fetcher reads the same versions of them.

    Args:
        fetcher: Fetcher that reads the files.
        uris: URIs of the files.
        has_pieces: True: several files may have a tensor of the same name, of which each has a piece.

    Raises:
        HeaderRefused: A header is damaged; the error names the file.
        PlanError: Two files have a tensor of the same name, and ``has_pieces`` is False.
        ObjectMissing: There is no such file.
        TransportError: A header can't be read.
    """
    versions = fetcher.stat_many(uris)
    sizes = {uri: version.size for uri, version in versions.items()}
    with contextlib.ExitStack() as pins:
        pinned = {uri: pins.enter_context(fetcher.pinned(uri, version)) for uri, version in versions.items()}
        names = {uri: name for uri, (name, _) in pinned.items()}
        starts = _fetched(fetcher, names, {uri: (0, min(_FIRST_BYTES, size)) for uri, size in sizes.items()})
        ends = {uri: _end_of(uri, starts[uri], sizes[uri]) for uri in uris}
        rests = _fetched(fetcher, names, {uri: (len(starts[uri]), end) for uri, end in ends.items()})
        files = []
        for uri in uris:
            text = bytes(starts[uri][LENGTH_BYTES : ends[uri]] + rests[uri])
            with _naming_file(uri), collector_paused():  # no garbage, but several objects for each tensor
                header = decode_header(text, sizes[uri])
            source = pinned[uri][1]
            version = source.version if isinstance(source, PinnedSource) else versions[uri]
            files.append(StoredFile(uri, names[uri], version, header))
        del starts, rests
        if not has_pieces:
            _check_names(files)
        yield files


def header_pieces(end: int, nbytes: int, piece_bytes: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the ranges in which :func:`opened` reads a header: those of the first request, and those of what is left.

    Args:
        end: Where the header ends.
        nbytes: Length of the file.
        piece_bytes: Largest number of bytes of a range.
    """
    first = min(_FIRST_BYTES, nbytes)
    return list(_pieces(0, first, piece_bytes)), list(_pieces(first, end, piece_bytes))


def _fetched(
    fetcher: FileFetcher, names: Mapping[str, str], ranges: Mapping[str, tuple[int, int]]
) -> dict[str, bytearray]:
    """Returns the bytes of a range of each file; ranges may be empty, and together larger than shared memory."""
    received = {name: bytearray() for name in names.values()}
    pieces = {names[uri]: list(_pieces(*extent, fetcher.part_size)) for uri, extent in ranges.items()}
    pieces = {name: of_file for name, of_file in pieces.items() if of_file}
    if pieces:
        with contextlib.closing(fetcher.stream_many(pieces)) as stream:
            for name, _, view in stream:
                received[name] += view
                del view  # it would hold its memory while the next one is waited for
    return {uri: received[name] for uri, name in names.items()}


def _pieces(start: int, end: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Yields a range in pieces of at most ``nbytes`` bytes."""
    return ((at, min(end, at + nbytes)) for at in range(start, end, nbytes))


def _end_of(uri: str, start: bytearray, nbytes: int) -> int:
    with _naming_file(uri):
        return header_end(bytes(start[:LENGTH_BYTES]), nbytes)


@contextlib.contextmanager
def _naming_file(uri: str) -> Iterator[None]:
    try:
        yield
    except HeaderRefused as error:
        raise HeaderRefused(f"{without_secrets(uri)}: {error}") from error.__cause__


def _check_names(files: Sequence[StoredFile]) -> None:
    owner: dict[str, str] = {}
    for file in files:
        for name in file.header.tensors:
            if name in owner:
                raise PlanError(f"tensor {name!r} is in {owner[name]} and in {without_secrets(file.uri)}")
            owner[name] = without_secrets(file.uri)
