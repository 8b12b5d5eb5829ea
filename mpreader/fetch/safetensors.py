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

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError, ObjectMissing, PlanError
from mpreader.fetch.fetcher import RangeFetcher, SharedPoolFetcher
from mpreader.fetch.local import LocalFetcher, path_of
from mpreader.formats.safetensors import LENGTH_BYTES, Header, HeaderRefused, decode_header, header_end
from mpreader.s3 import parse_s3_uri

__all__ = ["INDEX", "SUFFIX", "FileFetcher", "StoredFile", "fetcher_of", "files_of", "opened"]

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
        header: Its header.
    """

    uri: str
    source: str
    header: Header


def fetcher_of(
    uri: str,
    s3client_config: S3ClientConfig | None,
    pool_config: PoolConfig | None,
    headers: Mapping[str, str] | None = None,
) -> FileFetcher:
    """Make what reads a URI: a fetcher on the shared pool of the process, or one of local files. The caller closes it.

    Args:
        uri: ``s3://…``, an http(s) URL, ``file://…``, or a path.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        headers: Further headers for web servers.

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
    return SharedPoolFetcher(s3client_config, pool_config, http_headers=headers)


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
    if _scheme_of(uri) in ("http", "https"):
        directory, mark, query = uri.partition("?")
        query = mark + query
    if directory.endswith(SUFFIX) and not (isinstance(fetcher, LocalFetcher) and os.path.isdir(directory)):
        return [uri]
    directory = directory.rstrip("/")
    index_uri = f"{directory}/{INDEX}{query}"
    try:
        index = bytes(fetcher.fetch_object(index_uri))
    except ObjectMissing:
        if query or directory.startswith(("http://", "https://")):
            return [f"{directory}/{_ONLY}{query}"]
        return _listed(fetcher, directory)
    return [f"{directory}/{name}{query}" for name in _names_in(index, f"{directory}/{INDEX}", names)]


def _scheme_of(uri: str) -> str:
    """Return the scheme of a URI, in lower case; "" for a path."""
    scheme, colon, _ = uri.partition("://")
    return scheme.lower() if colon else ""


def _names_in(index: bytes, uri: str, wanted: Collection[str] | None) -> list[str]:
    try:
        files = dict(json.loads(index)["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanError(f"{uri} is damaged: {error!r}") from error
    for name in files.values():
        if not isinstance(name, str) or not name.endswith(SUFFIX) or name.startswith("/") or ".." in name.split("/"):
            raise PlanError(f"{uri} names {name!r}, which is no file of this directory")
    # Where a name is not there, all headers are read: the error tells of a tensor that is in none of them.
    if wanted is not None and all(name in files for name in wanted):
        files = {name: files[name] for name in wanted}
    return sorted(set(files.values()))


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
def opened(fetcher: FileFetcher, uris: Sequence[str]) -> Iterator[list[StoredFile]]:
    """Read the headers of files, at the same time; while the context is entered, they can be read.

    Raises:
        HeaderRefused: A header is damaged; the error names the file.
        PlanError: Two files have a tensor of the same name.
    """
    versions = fetcher.stat_many(uris)
    sizes = {uri: version.size for uri, version in versions.items()}
    with contextlib.ExitStack() as pins:
        sources = {uri: pins.enter_context(fetcher.pinned(uri, version))[0] for uri, version in versions.items()}
        firsts = fetcher.fetch_many({sources[uri]: [(0, min(_FIRST_BYTES, size))] for uri, size in sizes.items()})
        starts = {uri: bytes(firsts[sources[uri]][0]) for uri in uris}
        del firsts  # views of shared memory
        ends = {uri: _end_of(uri, starts[uri], sizes[uri]) for uri in uris}
        longer = {sources[uri]: [(_FIRST_BYTES, end)] for uri, end in ends.items() if end > len(starts[uri])}
        rests = fetcher.fetch_many(longer) if longer else {}
        files = []
        for uri in uris:
            text = starts[uri][LENGTH_BYTES : ends[uri]] + b"".join(map(bytes, rests.get(sources[uri], ())))
            with _naming_file(uri):
                files.append(StoredFile(uri, sources[uri], decode_header(text, sizes[uri])))
        del rests
        _check_names(files)
        yield files


def _end_of(uri: str, start: bytes, nbytes: int) -> int:
    with _naming_file(uri):
        return header_end(start[:LENGTH_BYTES], nbytes)


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
