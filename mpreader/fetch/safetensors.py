"""Files of a safetensors checkpoint: which ones there are, and what their headers say. It must work without torch.

A checkpoint is one file, or a directory of files. A directory may have an index, ``model.safetensors.index.json``,
which names the file of each tensor; without one, all of its ``.safetensors`` files belong to it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from mpreader.errors import ObjectMissing, PlanError
from mpreader.fetch.fetcher import RangeFetcher
from mpreader.formats.safetensors import LENGTH_BYTES, Header, HeaderRefused, decode_header, header_end
from mpreader.s3 import parse_s3_uri

__all__ = ["INDEX", "StoredFile", "files_of", "opened"]

INDEX: Final = "model.safetensors.index.json"
_SUFFIX: Final = ".safetensors"
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


def files_of(fetcher: RangeFetcher, uri: str) -> list[str]:
    """Return the URIs of the files of a checkpoint.

    Args:
        fetcher: Reads the index.
        uri: URI of a file, which ends with ``.safetensors``, or of a directory.

    Raises:
        ObjectMissing: There are none.
        PlanError: The index is damaged, or names a file outside of its directory.
    """
    if uri.endswith(_SUFFIX):
        return [uri]
    directory = uri.rstrip("/")
    try:
        index = bytes(fetcher.fetch_object(f"{directory}/{INDEX}"))
    except ObjectMissing:
        return _listed(fetcher, directory)
    return [f"{directory}/{name}" for name in _names_in(index, f"{directory}/{INDEX}")]


def _names_in(index: bytes, uri: str) -> list[str]:
    try:
        described = json.loads(index)
        names = {str(name) for name in described["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(f"{uri} is damaged: {error!r}") from error
    for name in names:
        if not name.endswith(_SUFFIX) or name.startswith("/") or ".." in name.split("/"):
            raise PlanError(f"{uri} names {name!r}, which is no file of this directory")
    return sorted(names)


def _listed(fetcher: RangeFetcher, directory: str) -> list[str]:
    if not directory.startswith("s3://"):
        raise PlanError(f"{directory} has no {INDEX}, and http(s) can't list a directory: name the files")
    bucket, prefix = parse_s3_uri(f"{directory}/")
    found = [entry.key for page in fetcher.client().list_objects(bucket, prefix, "/") for entry in page.object_info]
    files = [f"s3://{bucket}/{key}" for key in sorted(found) if key.endswith(_SUFFIX)]
    if not files:
        raise ObjectMissing(f"{directory}: no {_SUFFIX} file is there", bucket=bucket, key=prefix)
    return files


@contextlib.contextmanager
def opened(fetcher: RangeFetcher, uris: Sequence[str]) -> Iterator[list[StoredFile]]:
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
