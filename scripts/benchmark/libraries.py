"""Contenders of fetches: each library, used in the way that is fastest for it.

fetches.py measures them. Each maker imports its library when it is called, so that a process imports one of them only.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from checkpoints import BUCKET
from fetches import PART_BYTES, Library, Piece, Take, parts_of
from separate import import_s3fs
from tasks import Job

__all__ = ["library_maker"]

THREADS: Final = 8  # for libraries that must be called from several threads to fetch in parallel
_REGION: Final = "us-east-1"
Ranges = Mapping[str, Sequence[tuple[int, int]]]
LibraryMaker = Callable[[], Library]


def library_maker(job: Job) -> LibraryMaker:
    """Import a contender, which is not timed; returns a function that makes its client, which is."""
    makers: dict[str, Callable[[Job], LibraryMaker]] = {
        "mpreader": _mpreader, "obstore": _obstore, "s3torchconnector": _connector, "boto3": _boto3, "s3fs": _s3fs,
        "floor": _floor,
    }  # fmt: skip
    return makers[job.contender](job)


def _floor(job: Job) -> LibraryMaker:
    from floor import Floor

    floor = Floor(job.site.endpoint_url)  # its memory is warm when the first run begins
    return lambda: floor


def _mpreader(job: Job) -> LibraryMaker:
    from mpreader import PoolConfig, RangeFetcher

    config = PoolConfig(workers=job.workers, connections_per_worker=job.connections)
    return lambda: _Mpreader(RangeFetcher(pool_config=config))


def _obstore(job: Job) -> LibraryMaker:
    from obstore.store import S3Store

    options: Any = {"allow_http": True}
    return lambda: _Obstore(
        S3Store(BUCKET, endpoint=job.site.endpoint_url, region=_REGION, virtual_hosted_style_request=False,
                client_options=options)
    )  # fmt: skip


def _connector(_: Job) -> LibraryMaker:
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client

    return lambda: _Connector(S3Client(_REGION, s3client_config=S3ClientConfig(force_path_style=True)))


def _boto3(_: Job) -> LibraryMaker:
    import boto3
    from botocore.config import Config

    return lambda: _Boto3(boto3.client("s3", config=Config(max_pool_connections=THREADS)))


def _s3fs(job: Job) -> LibraryMaker:
    s3fs = import_s3fs()
    return lambda: _S3fs(s3fs.S3FileSystem(client_kwargs={"endpoint_url": job.site.endpoint_url}))


def _uri(key: str) -> str:
    return f"s3://{BUCKET}/{key}"


def _flat(ranges: Ranges) -> list[tuple[str, int, int]]:
    return [(key, start, end) for key, pairs in ranges.items() for start, end in pairs]


class _Mpreader:
    def __init__(self, fetcher: Any) -> None:
        self._fetcher = fetcher

    def keep(self, sizes: Mapping[str, int]) -> list[Piece]:
        return [Piece(key, 0, self._fetcher.fetch_object(_uri(key))) for key in sizes]

    def stream(self, sizes: Mapping[str, int], take: Take) -> None:
        ranges: dict[str, list[tuple[int, int]]] = {_uri(key): [] for key in sizes}
        for key, start, end in parts_of(sizes):
            ranges[_uri(key)].append((start, end))
        keys = {_uri(key): key for key in sizes}
        for uri, index, view in self._fetcher.stream_many(ranges):
            take(Piece(keys[uri], ranges[uri][index][0], view))

    def scatter(self, ranges: Ranges) -> list[Piece]:
        views = self._fetcher.fetch_many({_uri(key): pairs for key, pairs in ranges.items()})
        return [
            Piece(key, start, view)
            for key, pairs in ranges.items()
            for (start, _), view in zip(pairs, views[_uri(key)], strict=True)
        ]

    def close(self) -> None:
        self._fetcher.close()


class _Threaded(ABC):
    """Library whose calls fetch one part each: called from a pool of threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS)

    @abstractmethod
    def get(self, key: str, start: int, end: int) -> Any:
        """Bytes [start, end) of an object."""

    def keep(self, sizes: Mapping[str, int]) -> list[Piece]:
        return list(self._threads.map(self._piece, parts_of(sizes)))

    def stream(self, sizes: Mapping[str, int], take: Take) -> None:
        for _ in self._threads.map(lambda part: take(self._piece(part)), parts_of(sizes)):
            pass

    def scatter(self, ranges: Ranges) -> list[Piece]:
        return list(self._threads.map(self._piece, _flat(ranges)))

    def close(self) -> None:
        self._threads.shutdown()

    def _piece(self, part: tuple[str, int, int]) -> Piece:
        return Piece(part[0], part[1], self.get(*part))


class _Obstore(_Threaded):
    def __init__(self, store: Any) -> None:
        super().__init__()
        self._store = store

    def get(self, key: str, start: int, end: int) -> Any:
        return self._store.get_range(key, start=start, end=end)

    def scatter(self, ranges: Ranges) -> list[Piece]:
        # get_ranges fetches the ranges of one object in parallel: a call for each object is enough.
        def get(key: str) -> list[Piece]:
            starts, ends = zip(*ranges[key], strict=True)
            found = self._store.get_ranges(key, starts=starts, ends=ends)
            return [Piece(key, start, data) for start, data in zip(starts, found, strict=True)]

        return list(itertools.chain.from_iterable(self._threads.map(get, ranges)))


class _Boto3(_Threaded):
    def __init__(self, client: Any) -> None:
        super().__init__()
        self._client = client
        self._recycled = threading.local()  # a buffer for each thread, which stream() receives into again and again

    def get(self, key: str, start: int, end: int) -> Any:
        return self._read_into(bytearray(end - start), key, start, end)

    def stream(self, sizes: Mapping[str, int], take: Take) -> None:
        def fetch(part: tuple[str, int, int]) -> None:
            if not hasattr(self._recycled, "buffer"):
                self._recycled.buffer = bytearray(PART_BYTES)
            take(Piece(part[0], part[1], self._read_into(self._recycled.buffer, *part)))

        for _ in self._threads.map(fetch, parts_of(sizes)):
            pass

    def _read_into(self, buffer: bytearray, key: str, start: int, end: int) -> memoryview:
        body = self._client.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={start}-{end - 1}")["Body"]
        view = memoryview(buffer)[: end - start]
        received = 0
        while received < len(view):
            count = body.readinto(view[received:])
            if not count:
                raise EOFError(key)
            received += count
        body.close()  # gives the connection back to the client's pool
        return view


class _Connector:
    """s3torchconnector, called from threads. Its client splits large requests into parts, which it gets in parallel."""

    def __init__(self, client: Any) -> None:
        from s3torchconnector import S3ReaderConstructor

        self._client = client
        self._unbuffered = S3ReaderConstructor.range_based(buffer_size=0)
        self._threads = ThreadPoolExecutor(THREADS)
        self._readers = threading.local()

    def keep(self, sizes: Mapping[str, int]) -> list[Piece]:
        return list(self._threads.map(lambda key: Piece(key, 0, self._client.get_object(BUCKET, key).read()), sizes))

    def stream(self, sizes: Mapping[str, int], take: Take) -> None:
        def fetch(key: str) -> None:
            buffer = bytearray(4 * PART_BYTES)  # several parts, so that its client gets them in parallel
            reader = self._reader(key)
            reader.seek(0)
            for start in range(0, sizes[key], len(buffer)):
                take(Piece(key, start, memoryview(buffer)[: reader.readinto(buffer)]))

        for _ in self._threads.map(fetch, sizes):
            pass

    def scatter(self, ranges: Ranges) -> list[Piece]:
        def get(part: tuple[str, int, int]) -> Piece:
            key, start, end = part
            reader = self._reader(key)
            reader.seek(start)
            return Piece(key, start, reader.read(end - start))

        return list(self._threads.map(get, _flat(ranges)))

    def close(self) -> None:
        self._threads.shutdown()

    def _reader(self, key: str) -> Any:
        """The calling thread's reader of an object, kept for all its ranges: a new one asks for the object's size."""
        readers = self._readers.__dict__
        if key not in readers:
            readers[key] = self._client.get_object(BUCKET, key, reader_constructor=self._unbuffered)
        return readers[key]


class _S3fs:
    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def keep(self, sizes: Mapping[str, int]) -> list[Piece]:
        return self._cat(list(parts_of(sizes)))

    def stream(self, sizes: Mapping[str, int], take: Take) -> None:
        parts = list(parts_of(sizes))
        # cat_ranges returns all ranges at once: a few are asked for at a time, so that not all are held.
        for first in range(0, len(parts), 2 * THREADS):
            for piece in self._cat(parts[first : first + 2 * THREADS]):
                take(piece)

    def scatter(self, ranges: Ranges) -> list[Piece]:
        return self._cat(_flat(ranges))

    def close(self) -> None:
        pass

    def _cat(self, parts: list[tuple[str, int, int]]) -> list[Piece]:
        keys, starts, ends = zip(*parts, strict=True)
        found = self._filesystem.cat_ranges([f"{BUCKET}/{key}" for key in keys], starts, ends, on_error="raise")
        return [Piece(key, start, data) for key, start, data in zip(keys, starts, found, strict=True)]
