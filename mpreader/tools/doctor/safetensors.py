"""Check of safetensors files: their headers, and an index against what the files have. It must work without torch.

:func:`mpreader.tools.doctor.examine.examine` is the caller, once the access to S3 was found to be right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import MpreaderError, ObjectMissing
from mpreader.fetch.safetensors import INDEX, SUFFIX, FileFetcher, StoredFile, fetcher_of, files_of, opened
from mpreader.formats.safetensors import HeaderRefused
from mpreader.tools.doctor.finding import Finding
from mpreader.tools.safetensors.kind import has_safetensors

__all__ = ["safetensors_findings"]

_THREADS: Final = 8
_MOST_FINDINGS: Final = 5  # of one kind; a directory may have hundreds of files, and all may be damaged alike
_WRITE_AGAIN: Final = "upload it again, from where it was written: aws s3 cp"


class _Files(NamedTuple):
    """Files of a checkpoint: those whose headers were read, and the errors of the others.

    Attributes:
        read: The files whose headers are right.
        failed: Errors of the others, by URI.
    """

    read: Sequence[StoredFile]
    failed: Mapping[str, MpreaderError]


def safetensors_findings(source: str, s3client_config: S3ClientConfig, pool_config: PoolConfig) -> list[Finding]:
    """Check the headers of safetensors files, and the index of a directory; there are no findings of anything else.

    Args:
        source: ``s3://`` URI of a file or of a directory.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
    """
    try:
        if not has_safetensors(source, s3client_config):
            return []
        with fetcher_of(source, s3client_config, pool_config) as fetcher:
            index = _try_index(fetcher, source)
            files = _read(fetcher, files_of(fetcher, source))
    except MpreaderError as error:  # of the index, or such as that the pool can't be made
        return [Finding("safetensors", "fail", source, str(error), _WRITE_AGAIN)]
    findings = [*_failures(files, has_index=index is not None), *_duplicates(files.read)]
    if index is not None and not files.failed:
        findings += _index_findings(index, files.read)
    return findings or [_fine(files.read)]


def _try_index(fetcher: FileFetcher, source: str) -> dict[str, Any] | None:
    """Return the index of a directory, whose names ``files_of`` checks; None if there is none."""
    if source.endswith(SUFFIX):
        return None
    try:
        index = json.loads(bytes(fetcher.fetch_object(f"{source.rstrip('/')}/{INDEX}")))
    except (ObjectMissing, ValueError, RecursionError):
        return None
    return index if isinstance(index, dict) else None


def _read(fetcher: FileFetcher, uris: Sequence[str]) -> _Files:
    """Read the headers, each by itself, so that a damaged one hides no other."""

    def try_read(uri: str) -> StoredFile | MpreaderError:
        try:
            with opened(fetcher, [uri]) as [file]:
                return file
        except MpreaderError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as threads:
        results = dict(zip(uris, threads.map(try_read, uris), strict=True))
    return _Files(
        [result for result in results.values() if isinstance(result, StoredFile)],
        {uri: result for uri, result in results.items() if isinstance(result, MpreaderError)},
    )


def _failures(files: _Files, *, has_index: bool) -> Iterator[Finding]:
    for uri, error in list(files.failed.items())[:_MOST_FINDINGS]:
        if isinstance(error, ObjectMissing):
            problem = f"{INDEX} names it, but it is not there" if has_index else str(error)
            yield Finding("safetensors", "fail", uri, problem, _WRITE_AGAIN)
        elif isinstance(error, HeaderRefused):
            yield Finding("safetensors", "fail", uri, str(error).removeprefix(f"{uri}: "), _WRITE_AGAIN)
        else:
            yield Finding("safetensors", "fail", uri, str(error), "correct what it says")
    if len(files.failed) > _MOST_FINDINGS:
        more = f"{len(files.failed) - _MOST_FINDINGS} more files"
        yield Finding("safetensors", "fail", more, "they can't be read either", _WRITE_AGAIN)


def _duplicates(files: Sequence[StoredFile]) -> Iterator[Finding]:
    owners: dict[str, list[str]] = {}
    for file in files:
        for name in file.header.tensors:
            owners.setdefault(name, []).append(file.uri)
    twice = {name: uris for name, uris in owners.items() if len(uris) > 1}
    if twice:
        name, uris = next(iter(twice.items()))
        others = f", and {len(twice) - 1} other tensors likewise" if len(twice) > 1 else ""
        problem = f"tensor {name!r} is in {' and in '.join(uris)}{others}"
        remedy = f"remove the file that does not belong here, such as one of an earlier save; or write {INDEX}"
        value = "a tensor is there twice" if len(twice) == 1 else f"{len(twice)} tensors are there twice"
        yield Finding("safetensors", "fail", value, problem, remedy)


def _index_findings(index: Mapping[str, Any], files: Sequence[StoredFile]) -> Iterator[Finding]:
    names: Mapping[str, str] = index["weight_map"]  # files_of has checked it
    tensors = {name: file.uri.rpartition("/")[2] for file in files for name in file.header.tensors}
    wrong = sorted(name for name, file in names.items() if tensors.get(name) != file)
    if wrong:
        there = tensors.get(wrong[0])
        where = f"it is in {there}" if there else "it is in none of the files"
        problem = f"{wrong[0]!r} is said to be in {names[wrong[0]]}, but {where}{_and_others(wrong)}"
        yield Finding("safetensors", "fail", f"{INDEX} is wrong", problem, "write the index again, from the headers")
    unnamed = sorted(tensors.keys() - names.keys())
    if unnamed:
        problem = f"it does not name {unnamed[0]!r}{_and_others(unnamed)}: who loads by the index misses them"
        yield Finding("safetensors", "warn", f"{INDEX} is not complete", problem, "write it again, from the headers")
    yield from _size_findings(index, sum(_tensor_bytes(file) for file in files))


def _size_findings(index: Mapping[str, Any], nbytes: int) -> Iterator[Finding]:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != nbytes:
        problem = f"its total_size is {total}, but the tensors have {nbytes} bytes: files may be of another save"
        yield Finding("safetensors", "warn", f"{INDEX} is wrong", problem, "write the index again, from the headers")


def _and_others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} others likewise)" if len(names) > 1 else ""


def _tensor_bytes(file: StoredFile) -> int:
    return sum(stored.end - stored.start for stored in file.header.tensors.values())


def _fine(files: Sequence[StoredFile]) -> Finding:
    tensors, nbytes = sum(len(file.header.tensors) for file in files), sum(map(_tensor_bytes, files))
    number = "1 file" if len(files) == 1 else f"{len(files)} files"
    return Finding("safetensors", "ok", f"{number} with {tensors:,} tensors of {nbytes:,} bytes, headers are valid")
