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
from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError, ObjectMissing, PlanError
from mpreader.fetch.fetcher import RangeFetcher, SharedPoolFetcher
from mpreader.fetch.local import LocalFetcher, path_of
from mpreader.formats.safetensors import LENGTH_BYTES, Header, HeaderRefused, decode_header, header_end
from mpreader.pool.background import call_twice_if_slow
from mpreader.pool.source import ObjectVersion
from mpreader.s3 import parse_s3_uri
from mpreader.sources.versions import PinnedSource

__all__ = ["INDEX", "SUFFIX", "FileFetcher", "StoredFile", "fetcher_of", "files_of", "header_pieces", "opened"]

FileFetcher = RangeFetcher | LocalFetcher

INDEX: Final = "model.safetensors.index.json"
SUFFIX: Final = ".safetensors"
_ONLY: Final = "model.safetensors"
# Most headers are shorter, so that one request brings them; what comes behind them costs less than another request.
_FIRST_BYTES: Final = 256 * 1024


class StoredFile(NamedTuple):
    """A file whose header was read; all that is read of it is of the same version.

    Attributes:
        uri: Its URI.
        source: Name of that version, for the fetcher.
        version: That version.
        header: Its header.
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
    """Make what reads a URI: a fetcher on the shared pool of the process, or one of local files. The caller closes it.

    Args:
        uri: ``s3://…``, an http(s) URL, ``file://…``, or a path.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        headers: Further headers for web servers.
        for_host: True: the pool is the one that receives for all ranks of this host.

    Raises:
        ConfigError: It is none of these, or a setting is wrong.
    """
    scheme = _scheme_of(uri)
    if headers and scheme not in ("http", "https"):
        raise ConfigError(f"headers are sent to web servers only, and {uri!r} is none")
    if scheme in ("", "file"):
        return LocalFetcher()
    if scheme not in ("s3", "http", "https"):
        raise ConfigError(f"{uri!r} is none of s3://bucket/key, an http(s) URL, and a local path")
    return SharedPoolFetcher(s3client_config, pool_config, for_host=for_host, http_headers=headers)


def files_of(fetcher: FileFetcher, uri: str, names: Collection[str] | None = None) -> list[str]:
    """Return the URIs of the files of a checkpoint.

    Args:
        fetcher: What reads it.
        uri: URI of a file, which ends with ``.safetensors``, or of a directory. In a directory on a web server, which
            can't be listed, there must be an index or one file ``model.safetensors``.
        names: Names of the tensors that are wanted: files that the index says to have none of them are left out.

    Raises:
        ObjectMissing: There are none.
        PlanError: The index is damaged, or names a file outside of its directory.
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
    files = _names_in(index, f"{directory}/{INDEX}", names)
    if is_url:  # where "?" and "%2e" would be more than letters of a name
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
    # Where a name is not there, all headers are read: the error tells of a tensor that is in none of them.
    if wanted is not None and all(name in files for name in wanted):
        files = {name: files[name] for name in wanted}
    return sorted(set(files.values()))


def _is_inside(name: object) -> bool:
    """Return whether a name is that of a file in a directory, or in one below it."""
    if not isinstance(name, str) or not name.endswith(SUFFIX) or name.startswith("/") or ".." in name.split("/"):
        return False
    try:
        return b"\0" not in name.encode("utf-8")
    except UnicodeEncodeError:  # JSON can name half of a character, which no file has in its name
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
    """Read the headers of files, at the same time; while the context is entered, they can be read.

    Args:
        fetcher: Reads the files.
        uris: URIs of the files.
        has_pieces: True: files may have tensors of the same name, as those do whose tensors were saved in pieces.

    Raises:
        HeaderRefused: A header is damaged; the error names the file.
        PlanError: Two files have a tensor of the same name.
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
    """Return the ranges by which :func:`opened` reads a header: its first bytes, and what is left of it then.

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
    """Returns a range of each file, which may be empty. All of them may be more than shared memory has room for."""
    received = {name: bytearray() for name in names.values()}
    pieces = {names[uri]: list(_pieces(*extent, fetcher.part_size)) for uri, extent in ranges.items()}
    pieces = {name: of_file for name, of_file in pieces.items() if of_file}
    if pieces:
        with contextlib.closing(fetcher.stream_many(pieces)) as stream:
            for name, _, view in stream:
                received[name] += view
                del view  # before the next one is waited for
    return {uri: received[name] for uri, name in names.items()}


def _pieces(start: int, end: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Yields a range in ranges of at most so many bytes."""
    return ((at, min(end, at + nbytes)) for at in range(start, end, nbytes))


def _end_of(uri: str, start: bytearray, nbytes: int) -> int:
    with _naming_file(uri):
        return header_end(bytes(start[:LENGTH_BYTES]), nbytes)


@contextlib.contextmanager
def _naming_file(uri: str) -> Iterator[None]:
    try:
        yield
    except HeaderRefused as error:
        raise HeaderRefused(f"{uri}: {error}") from error.__cause__


def _check_names(files: Sequence[StoredFile]) -> None:
    owner: dict[str, str] = {}
    for file in files:
        for name in file.header.tensors:
            if name in owner:
                raise PlanError(f"tensor {name!r} is in {owner[name]} and in {file.uri}")
            owner[name] = file.uri
