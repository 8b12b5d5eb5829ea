"""Versions, in every way of reading: bytes of two versions are never mixed, and a version that stayed is read.

Each kind of validator, and each oddity of a server, meets each way of reading, over s3 and http where both are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import (
    AsyncRangeFetcher,
    MpreaderError,
    ObjectChanged,
    PoolConfig,
    RangeFetcher,
    S3Client,
    S3ClientConfig,
    S3ReaderConstructor,
    TransportError,
)
from mpreader.config import KiB, MiB
from mpreader.dcp import load_checkpoint
from mpreader.fsspec.filesystem import RangeFileSystem
from mpreader.testing import Fault, FaultKind, FaultServer
from mpreader.tools.download.download import copy_to, download
from tests.integration.service import Answer, Service, error

PART = 64 * KiB
OLD, NEW = b"A" * (4 * PART), b"B" * (4 * PART)
PATH = "/bucket/key"
CLIENT = S3ClientConfig("us-east-1", max_attempts=3)
POOL = PoolConfig(1, 1, 16 * MiB, PART)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)  # retries come at once
    with FaultServer({PATH: OLD}) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


# -- ways of reading, each with at least two GETs


def _fetch(uri: str, _: Path) -> bytes:
    with RangeFetcher(CLIENT, POOL) as fetcher:
        return bytes(fetcher.fetch_object(uri))


def _fetch_out(uri: str, _: Path) -> bytes:
    out = bytearray(len(OLD))
    with RangeFetcher(CLIENT, POOL) as fetcher:
        fetcher.fetch_object(uri, out=out)
    return bytes(out)


def _stream(uri: str, _: Path) -> bytes:
    ranges = [(start, start + PART) for start in range(0, len(OLD), PART)]
    with RangeFetcher(CLIENT, POOL) as fetcher:
        return b"".join(bytes(view) for _, view in fetcher.stream(uri, ranges))


def _aio(uri: str, _: Path) -> bytes:
    async def read() -> bytes:
        async with AsyncRangeFetcher(CLIENT, POOL) as fetcher:
            return b"".join(map(bytes, await fetcher.fetch(uri, [(0, None)])))

    return asyncio.run(read())


def _filesystem() -> RangeFileSystem:
    # With the endpoint, since equal arguments give the same instance: that of another test, which has another server.
    return RangeFileSystem(s3client_config=CLIENT, pool_config=POOL, endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])


def _path(uri: str) -> str:
    return uri.removeprefix("s3://")


def _open_file(uri: str, _: Path) -> bytes:
    with contextlib.closing(_filesystem()) as filesystem, filesystem.open(_path(uri), cache_type="none") as file:
        pieces = [file.read(PART)]
        with pickle.loads(pickle.dumps(file)) as copy:  # reads on in another process, say
            pieces += [copy.read(PART) for _ in range(3)]
    return b"".join(pieces)


def _cat_ranges(uri: str, _: Path) -> bytes:
    starts = [*range(0, len(OLD), PART)]
    with contextlib.closing(_filesystem()) as filesystem:
        return b"".join(
            filesystem.cat_ranges(
                [_path(uri)] * len(starts), starts, [start + PART for start in starts], on_error="raise"
            )
        )


def _get_file(uri: str, folder: Path) -> bytes:
    with contextlib.closing(_filesystem()) as filesystem:
        filesystem.get_file(_path(uri), str(folder / "got"))
    return (folder / "got").read_bytes()


def _download(uri: str, folder: Path) -> bytes:
    with RangeFetcher(CLIENT, POOL) as fetcher:
        download(fetcher, uri, folder / "copy", checksum="none")
    return (folder / "copy").read_bytes()


def _copy_to(uri: str, _: Path) -> bytes:
    stream = io.BytesIO()
    with RangeFetcher(CLIENT, POOL) as fetcher:
        copy_to(fetcher, uri, stream, checksum="none")
    return stream.getvalue()


def _reader_of(make: Callable[[], Any]) -> Callable[[str, Path], bytes]:
    def read(uri: str, folder: Path) -> bytes:
        bucket, _, key = _path(uri).partition("/")
        client = S3Client(s3client_config=CLIENT)
        constructor = make()
        if hasattr(constructor, "set_item_ranges_by_file"):
            items = [_Item(start) for start in range(0, len(OLD), PART)]
            constructor.set_item_ranges_by_file(items, {item: item for item in items}, f"s3://{bucket}")
        try:
            with client.get_object(bucket, key, reader_constructor=constructor) as reader:
                pieces = []
                for start in range(0, len(OLD), PART):
                    reader.seek(start)  # each piece by itself: a stream that is broken off is opened anew
                    pieces.append(bytes(reader.read(PART)))
        finally:
            client.close()
            if hasattr(constructor, "close"):
                constructor.close()
        return b"".join(pieces)

    return read


class _Item(NamedTuple):
    """An item of a load plan, and its own place in the file."""

    offset: int
    length: int = PART
    relative_path: str = "key"

    @property
    def storage_index(self) -> _Item:
        return self


Read = Callable[[str, Path], bytes]
READERS: Mapping[str, Callable[[], Any]] = {
    "sequential": S3ReaderConstructor.sequential,
    "range_based": lambda: S3ReaderConstructor.range_based(buffer_size=0),
    "dcp_optimized": lambda: S3ReaderConstructor.dcp_optimized(max_gap_size=0),
    "multiprocess": lambda: S3ReaderConstructor.multiprocess(0, pool_config=POOL, s3client_config=CLIENT),
}
FETCHES: Mapping[str, Read] = {
    "fetch": _fetch,
    "fsspec open": _open_file,
    "download": _download,
}
WAYS: Mapping[str, Read] = {
    **FETCHES,
    "stream": _stream,
    "fsspec cat_ranges": _cat_ranges,
    "fsspec get": _get_file,
    **{name: _reader_of(make) for name, make in READERS.items()},
}
FURTHER_WAYS: Mapping[str, Read] = {"fetch out": _fetch_out, "asyncio": _aio, "copy_to": _copy_to}
CELLS = [
    *(pytest.param("s3", read, id=f"s3 {name}") for name, read in WAYS.items()),
    *(pytest.param("http", read, id=f"http {name}") for name, read in FETCHES.items()),
]
FURTHER_CELLS = [
    *(pytest.param("s3", read, id=f"s3 {name}") for name, read in FURTHER_WAYS.items()),
    *(
        pytest.param("http", read, id=f"http {name}")
        for name, read in {**WAYS, **FURTHER_WAYS}.items()
        if name not in {**FETCHES, **READERS}
    ),
]
FEW_CELLS = [
    pytest.param("s3", _fetch, id="s3 fetch"),
    pytest.param("http", _fetch, id="http fetch"),
    pytest.param("s3", WAYS["sequential"], id="s3 sequential"),
]


def uri_of(server: FaultServer, scheme: str) -> str:
    return f"s3:/{PATH}" if scheme == "s3" else server.url(PATH)


def gets(server: FaultServer) -> list[Any]:
    return [request for request in server.requests if request.method == "GET"]


# -- overwritten between two GETs

# Headers of the old and of the new version. Where nothing else is said the two have different ETags and times.
SAME_TIME = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
NONE = {"ETag": "", "Last-Modified": ""}
KINDS: Mapping[str, tuple[dict[str, str], dict[str, str]]] = {
    "strong ETag": (SAME_TIME, SAME_TIME),
    "weak ETag": ({**SAME_TIME, "ETag": 'W/"1"'}, {**SAME_TIME, "ETag": 'W/"2"'}),
    "Last-Modified": ({"ETag": ""}, {"ETag": ""}),
}
RARE_KINDS: Mapping[str, tuple[dict[str, str], dict[str, str]]] = {
    **{
        name: ({**NONE, name: "1"}, {**NONE, name: "2"})
        for name in (
            "x-amz-version-id",
            "x-amz-checksum-crc32",
            "x-goog-generation",
            "x-goog-hash",
            "x-ms-blob-content-md5",
            "x-oss-hash-crc64ecma",
            "x-bz-content-sha1",
        )
    },
    "ETag stays, x-amz-version-id changes": (
        {**SAME_TIME, "ETag": '"1"', "x-amz-version-id": "1"},
        {**SAME_TIME, "ETag": '"1"', "x-amz-version-id": "2"},
    ),
    "weak ETag stays, Last-Modified changes": ({"ETag": 'W/"1"'}, {"ETag": 'W/"1"'}),
}
for name, values in {"x-goog-hash": ("md5=1", "md5=2")}.items():
    RARE_KINDS[name][0][name], RARE_KINDS[name][1][name] = values


def overwrite_at_the_second_get(
    server: FaultServer, kind: tuple[dict[str, str], dict[str, str]], *faults: Fault
) -> None:
    """Let the first GET break off in the middle, and the object be overwritten just before the second one."""
    old, new = kind
    server.put(PATH, OLD, old)
    server.stage(PATH, NEW, new)
    server.inject(
        Fault(FaultKind.EARLY_CLOSE, at=(1,), after_bytes=PART // 2), Fault(FaultKind.OVERWRITTEN, at=(2,)), *faults
    )


def assert_never_mixed(
    server: FaultServer,
    folder: Path,
    scheme: str,
    read: Read,
    kind: tuple[dict[str, str], dict[str, str]],
    *faults: Fault,
) -> None:
    overwrite_at_the_second_get(server, kind, *faults)
    with pytest.raises(ObjectChanged, match="overwritten"):
        read(uri_of(server, scheme), folder)


@pytest.mark.parametrize(("scheme", "read"), [*CELLS, *FURTHER_CELLS])
@pytest.mark.row("object overwritten between GETs")
def test_overwritten_object_with_a_weak_etag_is_never_mixed(
    server: FaultServer, tmp_path: Path, scheme: str, read: Read
) -> None:
    assert_never_mixed(server, tmp_path, scheme, read, KINDS["weak ETag"])


@pytest.mark.parametrize(("scheme", "read"), CELLS)
@pytest.mark.row("object overwritten between GETs")
def test_overwritten_object_without_etag_is_never_mixed(
    server: FaultServer, tmp_path: Path, scheme: str, read: Read
) -> None:
    assert_never_mixed(server, tmp_path, scheme, read, KINDS["Last-Modified"])
    # A new read finds the new version.
    assert read(uri_of(server, scheme), tmp_path) == NEW


@pytest.mark.parametrize(("scheme", "read"), FEW_CELLS)
@pytest.mark.parametrize("kind", [*RARE_KINDS.values(), KINDS["strong ETag"]], ids=[*RARE_KINDS, "strong ETag"])
@pytest.mark.row("object overwritten between GETs")
def test_object_whose_version_only_a_store_can_name_is_never_mixed(
    server: FaultServer, tmp_path: Path, kind: tuple[dict[str, str], dict[str, str]], scheme: str, read: Read
) -> None:
    assert_never_mixed(server, tmp_path, scheme, read, kind)


@pytest.mark.parametrize(("scheme", "read"), CELLS)
@pytest.mark.row("object overwritten between GETs")
def test_version_that_only_gets_tell_is_pinned_by_the_first_one(
    server: FaultServer, tmp_path: Path, scheme: str, read: Read
) -> None:
    assert_never_mixed(
        server, tmp_path, scheme, read, KINDS["weak ETag"], Fault(FaultKind.NO_VALIDATORS, method="HEAD")
    )


def test_error_of_an_overwritten_object_names_its_new_version(server: FaultServer, tmp_path: Path) -> None:
    for etag in ('"new"', 'W/"new"'):
        overwrite_at_the_second_get(server, ({"ETag": '"old"'}, {"ETag": etag}))
        for read in (_fetch, _reader_of(READERS["range_based"])):
            server.put(PATH, OLD, {"ETag": '"old"'})
            server.inject(Fault(FaultKind.OVERWRITTEN, at=(2,)))
            with pytest.raises(ObjectChanged) as caught:
                read(uri_of(server, "s3"), tmp_path)
            assert f'ETag {etag}, not "old"' in str(caught.value)


# -- no false alarm


STAYED: Mapping[str, tuple[Fault, ...]] = {
    "strong on HEAD": (Fault(FaultKind.WEAK_ETAG),),
    "If-Match is 412": (Fault(FaultKind.NO_IF_MATCH, status=412),),
    "nothing on HEAD": (Fault(FaultKind.NO_VALIDATORS, method="HEAD"),),
}
RARELY_STAYED: Mapping[str, tuple[Fault, ...]] = {
    "weak": (Fault(FaultKind.WEAK_ETAG), Fault(FaultKind.WEAK_ETAG, method="HEAD")),
    "weak on HEAD": (Fault(FaultKind.WEAK_ETAG, method="HEAD"),),
    "If-Match is 400": (Fault(FaultKind.NO_IF_MATCH, status=400, code="InvalidArgument"),),
    "If-Match is 501": (Fault(FaultKind.NO_IF_MATCH, status=501, code="NotImplemented"),),
    **{
        f"If-Match is {status}": (Fault(FaultKind.NO_IF_MATCH, status=status, code="Refused"),)
        for status in (401, 403, 405, 422)
    },
}


@pytest.mark.parametrize(("scheme", "read"), CELLS)
@pytest.mark.parametrize("faults", STAYED.values(), ids=STAYED)
@pytest.mark.row("weak ETags, or If-Match refused, though nothing was overwritten")
def test_object_that_stayed_is_read(
    server: FaultServer, tmp_path: Path, faults: tuple[Fault, ...], scheme: str, read: Read
) -> None:
    server.inject(*faults)
    assert read(uri_of(server, scheme), tmp_path) == OLD
    # The server is asked with a condition that it does not understand once, and not for each part.
    assert sum(request.status >= 400 for request in gets(server)) <= 1


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("answer", [b"", error(500, "InternalError")], ids=["nothing", "500"])
@pytest.mark.row("weak ETags, or If-Match refused, though nothing was overwritten")
@pytest.mark.usefixtures("server")  # for its credentials
def test_object_is_read_though_the_server_hangs_up_or_stumbles_over_if_match(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scheme: str, answer: Answer | bytes
) -> None:
    with Service({PATH: OLD}, lambda call: answer if "if-match" in call.headers else None) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", service.url)
        assert _fetch(f"s3:/{PATH}" if scheme == "s3" else service.url + PATH, tmp_path) == OLD
        assert sum("if-match" in call.headers for call in service.seen) == 1


@pytest.mark.parametrize(("scheme", "read"), [*FEW_CELLS, pytest.param("s3", WAYS["range_based"], id="s3 range_based")])
@pytest.mark.parametrize("faults", RARELY_STAYED.values(), ids=RARELY_STAYED)
@pytest.mark.row("weak ETags, or If-Match refused, though nothing was overwritten")
def test_object_that_stayed_is_read_whatever_the_server_makes_of_conditions(
    server: FaultServer, tmp_path: Path, faults: tuple[Fault, ...], scheme: str, read: Read
) -> None:
    test_object_that_stayed_is_read(server, tmp_path, faults, scheme, read)


@pytest.mark.row("ETag missing or different in a 206")
def test_answer_that_tells_nothing_of_the_version_is_no_proof(server: FaultServer, tmp_path: Path) -> None:
    server.put(PATH, OLD, {"ETag": ""})
    for read in (_fetch, _reader_of(READERS["sequential"])):
        server.inject(Fault(FaultKind.EARLY_CLOSE, at=(1,), after_bytes=PART), Fault(FaultKind.NO_VALIDATORS))
        with pytest.raises(TransportError, match=r"Last-Modified|no Last-Modified") as caught:
            read(uri_of(server, "s3"), tmp_path)
        assert not isinstance(caught.value, ObjectChanged)
        server.inject(Fault(FaultKind.NO_VALIDATORS, at=(2,)))
        assert read(uri_of(server, "s3"), tmp_path) == OLD


@pytest.mark.parametrize(("scheme", "read"), FEW_CELLS)
def test_object_of_a_server_that_tells_nothing_is_read(
    server: FaultServer, tmp_path: Path, scheme: str, read: Read
) -> None:
    server.put(PATH, OLD, NONE)
    assert read(uri_of(server, scheme), tmp_path) == OLD


# -- encodings, and whole objects


@pytest.mark.parametrize(("scheme", "read"), CELLS)
@pytest.mark.row("Content-Encoding: stored with the object, or made on the way")
def test_stored_encoding_is_the_objects_own_affair(
    server: FaultServer, tmp_path: Path, scheme: str, read: Read
) -> None:
    server.put(PATH, OLD, {"Content-Encoding": "gzip"})
    assert read(uri_of(server, scheme), tmp_path) == OLD


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.row("Content-Encoding: stored with the object, or made on the way")
def test_word_of_any_encoding_may_be_stored(server: FaultServer, scheme: str) -> None:
    with RangeFetcher(CLIENT, POOL) as fetcher:
        for encoding in ("zstd", "br", "deflate", "aws-chunked", "aws-chunked,gzip", "utf-8", "identity", "x-own"):
            server.put(PATH, OLD, {"Content-Encoding": encoding})
            assert fetcher.fetch(uri_of(server, scheme), [(5, 50)])[0] == OLD[5:50], encoding


@pytest.mark.parametrize(("scheme", "read"), CELLS)
@pytest.mark.row("Content-Encoding: stored with the object, or made on the way")
def test_body_that_is_compressed_on_the_way_is_refused(
    server: FaultServer, tmp_path: Path, scheme: str, read: Read
) -> None:
    server.inject(Fault(FaultKind.COMPRESSED))
    with pytest.raises(TransportError, match="compresses"):
        read(uri_of(server, scheme), tmp_path)


WHOLE = PoolConfig(1, 1, 16 * MiB, MiB)


@pytest.mark.parametrize(
    ("scheme", "read", "size"),
    [
        *(pytest.param(*cell.values, 300, id=str(cell.id)) for cell in CELLS),
        *(pytest.param(*cell.values, 1, id=f"{cell.id} of one byte") for cell in FEW_CELLS),
    ],
)
def test_whole_object_may_be_answered_with_200(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, read: Read, size: int
) -> None:
    # One part, which is all of the object.
    for name, value in {"OLD": OLD[:size], "PART": size, "POOL": WHOLE}.items():
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setattr(_Item.__new__, "__defaults__", (size, "key"))
    server.put(PATH, OLD)
    server.inject(Fault(FaultKind.WHOLE_OBJECT))
    assert read(uri_of(server, scheme), tmp_path) == OLD
    assert {request.status for request in gets(server)} == {200}


# Not those that ask for all of the object at once.
@pytest.mark.parametrize(
    ("scheme", "read"), [cell for cell in CELLS if cell.values[1] not in (WAYS["sequential"], WAYS["dcp_optimized"])]
)
@pytest.mark.row("200 with the whole object instead of 206")
def test_whole_object_in_place_of_a_part_is_refused(
    server: FaultServer, tmp_path: Path, scheme: str, read: Read
) -> None:
    server.inject(Fault(FaultKind.WHOLE_OBJECT))
    with pytest.raises(MpreaderError, match="whole object in place of a range"):
        read(uri_of(server, scheme), tmp_path)


# -- checkpoints


STATE = {"weight": torch.arange(100_000, dtype=torch.int32)}


@pytest.fixture
def checkpoint(server: FaultServer, tmp_path: Path) -> dict[str, bytes]:
    """Two versions of a checkpoint's file; the first one is served."""
    versions: list[dict[str, bytes]] = []
    for state in (STATE, {"weight": STATE["weight"] + 1}):
        save(dict(state), storage_writer=FileSystemWriter(tmp_path / str(len(versions))), no_dist=True)
        versions.append({file.name: file.read_bytes() for file in (tmp_path / str(len(versions))).iterdir()})
    for name, content in versions[0].items():
        server.put(f"/bucket/run/{name}", content)
    return {"old": versions[0]["__0_0.distcp"], "new": versions[1]["__0_0.distcp"]}


def load() -> torch.Tensor:
    # verify=False: it is the version that must tell, and not the checksum of the tensor.
    state = load_checkpoint("s3://bucket/run", s3client_config=CLIENT, pool_config=POOL, verify=False)
    weight: torch.Tensor = state["weight"]
    return weight


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("head", [(), (Fault(FaultKind.NO_VALIDATORS, method="HEAD"),)], ids=["", "nothing on HEAD"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.row("object overwritten between GETs")
def test_load_of_a_checkpoint_mixes_no_versions(
    server: FaultServer,
    checkpoint: dict[str, bytes],
    kind: tuple[dict[str, str], dict[str, str]],
    head: tuple[Fault, ...],
) -> None:
    path = "/bucket/run/__0_0.distcp"
    assert len(checkpoint["old"]) == len(checkpoint["new"])
    server.put(path, checkpoint["old"], kind[0])
    server.stage(path, checkpoint["new"], kind[1])
    server.inject(Fault(FaultKind.OVERWRITTEN, at=(3,), path=path), *head)
    with pytest.raises(ObjectChanged, match="overwritten"):
        load()
    assert torch.equal(load(), STATE["weight"] + 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("headers", "faults"),
    [
        ({}, (Fault(FaultKind.WEAK_ETAG), Fault(FaultKind.WEAK_ETAG, method="HEAD"))),
        ({}, (Fault(FaultKind.WEAK_ETAG),)),
        ({}, (Fault(FaultKind.NO_IF_MATCH, status=412),)),
        ({"Content-Encoding": "gzip"}, ()),
        ({"Content-Encoding": "aws-chunked"}, ()),
        (NONE, ()),
    ],
)
def test_load_of_a_checkpoint_that_stayed(
    server: FaultServer, checkpoint: dict[str, bytes], headers: dict[str, str], faults: tuple[Fault, ...]
) -> None:
    server.put("/bucket/run/__0_0.distcp", checkpoint["old"], headers)
    server.inject(*faults)
    assert torch.equal(load(), STATE["weight"])
