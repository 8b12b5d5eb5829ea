"""Downloads: what is in the file is right, what was there is not fetched again, and what is wrong is removed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from mpreader import (
    AccessDenied,
    ChecksumMismatch,
    ConfigError,
    ObjectChanged,
    ObjectMissing,
    PlanError,
    PoolConfig,
    RangeFetcher,
)
from mpreader.testing import Fault, FaultKind, FaultServer
from mpreader.tools.download.download import copy_to, download, name_of
from mpreader.tools.download.plan import RangeOfObject

DATA = b"".join(number.to_bytes(4, "little") for number in range(250_000))
PART = 64 << 10


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/data.bin": DATA, "/empty": b""}) as server:
        yield server


@pytest.fixture
def fetcher() -> Iterator[RangeFetcher]:
    with RangeFetcher(pool_config=PoolConfig(workers=1, connections_per_worker=2, part_size=PART)) as fetcher:
        yield fetcher


@pytest.fixture
def url(server: FaultServer) -> str:
    return server.url("/data.bin")


def _leave_part(
    path: Path, fetcher: RangeFetcher, url: str, size: int, ranges: list[RangeOfObject] | None = None
) -> None:
    """Leave ``size`` bytes as a call that ended too early does; no request is under way any more."""

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(fetcher, url, path, ranges, on_progress=stop)
    os.truncate(f"{path}.part", size)


def _left(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def _gets(server: FaultServer, since: int = 0) -> list[tuple[int, int]]:
    """First byte and one past the last of each GET, sorted."""
    ranges = [request.range for request in server.requests[since:] if request.method == "GET"]
    pairs = [str(header).removeprefix("bytes=").split("-") for header in ranges]
    return sorted((int(first), int(last) + 1) for first, last in pairs)


def test_download_writes_the_whole_object_and_its_checksum(fetcher: RangeFetcher, url: str, tmp_path: Path) -> None:
    done = download(fetcher, url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    assert (done.bytes, done.resumed_from, done.started_over) == (len(DATA), 0, None)
    assert done.checksum == f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    assert (done.verified_against, done.why_unverified) == (None, "an http server stores no checksum")
    assert _left(tmp_path / "copy") == ["copy"]


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 10)], DATA[:10]),
        ([(500_000, None)], DATA[500_000:]),
        ([(-7, None)], DATA[-7:]),
        ([(-2_000_000, None)], DATA),
        ([(5, 5)], b""),
        ([(len(DATA), None)], b""),
        ([(700_000, 900_000), (0, 3), (0, 3), (-1, None), (100_000, 300_000)], None),
    ],
)
def test_download_puts_ranges_one_behind_the_other(
    fetcher: RangeFetcher, url: str, tmp_path: Path, ranges: list[RangeOfObject], expected: bytes | None
) -> None:
    if expected is None:
        expected = DATA[700_000:900_000] + DATA[:3] * 2 + DATA[-1:] + DATA[100_000:300_000]
    done = download(fetcher, url, tmp_path / "copy", ranges)
    assert (tmp_path / "copy").read_bytes() == expected
    assert done.bytes == len(expected)
    assert done.checksum == f"sha256:{hashlib.sha256(expected).hexdigest()}"


def test_download_of_an_empty_object_makes_an_empty_file(
    fetcher: RangeFetcher, server: FaultServer, tmp_path: Path
) -> None:
    assert download(fetcher, server.url("/empty"), tmp_path / "copy").bytes == 0
    assert (tmp_path / "copy").read_bytes() == b""


def test_download_resumes_at_any_byte_and_asks_only_for_the_rest(
    fetcher: RangeFetcher, server: FaultServer, url: str, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    for kept in (1, 3 * PART, 777_777, len(DATA)):
        path.unlink(missing_ok=True)
        _leave_part(path, fetcher, url, 0)
        Path(f"{path}.part").write_bytes(DATA[:kept])
        before = len(server.requests)
        steps: list[tuple[int, int]] = []
        done = download(fetcher, url, path, on_progress=lambda *step: steps.append(step))  # noqa: B023
        assert path.read_bytes() == DATA
        assert (done.resumed_from, done.started_over) == (kept, None)
        assert done.checksum == f"sha256:{hashlib.sha256(DATA).hexdigest()}"
        gets = _gets(server, before)
        assert sum(end - start for start, end in gets) == len(DATA) - kept
        assert all(start >= kept for start, _ in gets)
        assert (steps[0][0], steps[-1][0]) == (kept, len(DATA))
        assert {total for _, total in steps} == {len(DATA)}


def test_download_of_ranges_resumes_within_the_right_one(
    fetcher: RangeFetcher, server: FaultServer, url: str, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    ranges: list[RangeOfObject] = [(500_000, 600_000), (0, 50_000)]
    expected = DATA[500_000:600_000] + DATA[:50_000]
    _leave_part(path, fetcher, url, 0, ranges)
    Path(f"{path}.part").write_bytes(expected[:120_000])
    before = len(server.requests)
    assert download(fetcher, url, path, ranges).resumed_from == 120_000
    assert path.read_bytes() == expected
    assert _gets(server, before) == [(20_000, 50_000)]


def test_download_starts_over_when_the_object_has_changed(
    fetcher: RangeFetcher, server: FaultServer, url: str, tmp_path: Path
) -> None:
    _leave_part(tmp_path / "copy", fetcher, url, PART)
    server.put("/data.bin", DATA[::-1])
    done = download(fetcher, url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA[::-1]
    assert (done.resumed_from, done.started_over) == (0, "the object was overwritten since")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("source", "http://elsewhere/data.bin", "is of another object"),
        ("size", 5, "the object was overwritten since"),
        ("ranges", [[0, 5]], "is of other ranges"),
        (None, None, "is missing or damaged"),
    ],
)
def test_download_starts_over_when_the_part_is_of_something_else(
    fetcher: RangeFetcher, url: str, tmp_path: Path, key: str | None, value: object, reason: str
) -> None:
    path, state_file = tmp_path / "copy", tmp_path / "copy.part.json"
    _leave_part(path, fetcher, url, PART)
    text = json.dumps({**json.loads(state_file.read_text()), key: value}) if key else '{"source"'
    state_file.write_text(text)
    done = download(fetcher, url, path)
    assert path.read_bytes() == DATA
    assert done.resumed_from == 0
    assert reason in str(done.started_over)


def test_download_starts_over_when_the_part_is_too_large(fetcher: RangeFetcher, url: str, tmp_path: Path) -> None:
    _leave_part(tmp_path / "copy", fetcher, url, 2 * len(DATA))
    assert "larger" in str(download(fetcher, url, tmp_path / "copy").started_over)
    assert (tmp_path / "copy").read_bytes() == DATA


def test_download_without_resume_starts_over(fetcher: RangeFetcher, url: str, tmp_path: Path) -> None:
    _leave_part(tmp_path / "copy", fetcher, url, PART)
    done = download(fetcher, url, tmp_path / "copy", resume=False)
    assert (done.resumed_from, done.started_over) == (0, None)
    assert (tmp_path / "copy").read_bytes() == DATA


def test_download_refuses_an_object_that_changes_meanwhile(
    fetcher: RangeFetcher, server: FaultServer, url: str, tmp_path: Path
) -> None:
    def overwrite(done: int, total: int) -> None:
        if done:
            server.put("/data.bin", DATA[::-1])

    with pytest.raises(ObjectChanged):
        download(fetcher, url, tmp_path / "copy", on_progress=overwrite)
    assert not (tmp_path / "copy").exists()


def test_download_refuses_what_changed_between_stat_and_stream(
    fetcher: RangeFetcher, server: FaultServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is left belongs to the version that stat told of; the stream sees another one, and is consistent with that.
    _leave_part(tmp_path / "copy", fetcher, url, PART)
    stream = fetcher.stream

    def overwrite_first(*arguments: object, **settings: object) -> object:
        server.put("/data.bin", DATA[::-1])
        return stream(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(fetcher, "stream", overwrite_first)
    with pytest.raises(ObjectChanged):
        download(fetcher, url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# Headers of a version, what HEAD leaves out of them, and those of another version of the same size.
WEAK = {"ETag": 'W/"1"', "Last-Modified": ""}
VERSIONS = [
    pytest.param({}, (), {}, id="strong"),
    pytest.param(WEAK, (), {**WEAK, "ETag": 'W/"2"'}, id="weak"),
    pytest.param({"ETag": ""}, (), {"ETag": ""}, id="Last-Modified"),
    pytest.param({**WEAK, "ETag": "", "X-Goog-Generation": "1"}, (), {"X-Goog-Generation": "2"}, id="generation"),
    pytest.param({}, (Fault(FaultKind.NO_VALIDATORS, method="HEAD"),), {}, id="only by GET"),
    pytest.param(WEAK, (Fault(FaultKind.NO_ETAG, method="HEAD"),), {**WEAK, "ETag": 'W/"2"'}, id="weak, only by GET"),
]


@pytest.mark.parametrize(("headers", "faults", "others"), VERSIONS)
def test_download_resumes_a_version_by_whatever_tells_it(
    fetcher: RangeFetcher,
    server: FaultServer,
    url: str,
    tmp_path: Path,
    headers: dict[str, str],
    faults: tuple[Fault, ...],
    others: dict[str, str],
) -> None:
    path = tmp_path / "copy"
    server.put("/data.bin", DATA, headers)
    server.inject(*faults)
    _leave_part(path, fetcher, url, 3 * PART)
    done = download(fetcher, url, path)
    assert (done.resumed_from, done.started_over, path.read_bytes()) == (3 * PART, None, DATA)

    _leave_part(path, fetcher, url, 3 * PART)
    server.put("/data.bin", DATA[::-1], others)
    if faults:  # only the bytes show that it is another version: the error is the first that anybody hears of it
        with pytest.raises(ObjectChanged, match="overwritten"):
            download(fetcher, url, path)
    done = download(fetcher, url, path)
    assert (done.resumed_from, path.read_bytes()) == (0, DATA[::-1])
    assert done.started_over == (None if faults else "the object was overwritten since")


def test_download_starts_over_where_nothing_tells_versions_apart(
    fetcher: RangeFetcher, server: FaultServer, url: str, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    server.put("/data.bin", DATA, {"ETag": "", "Last-Modified": ""})
    _leave_part(path, fetcher, url, PART)
    done = download(fetcher, url, path)
    assert done.resumed_from == 0
    assert "nobody knows" in str(done.started_over)
    assert path.read_bytes() == DATA
    # All is there, but a HEAD does not tell of which version, and there is no GET to be made that would.
    server.put("/data.bin", DATA)
    server.inject(Fault(FaultKind.NO_VALIDATORS, method="HEAD"))
    _leave_part(path, fetcher, url, len(DATA))
    assert "nobody knows" in str(download(fetcher, url, path).started_over)


def test_download_of_a_file_that_another_one_writes_is_refused(fetcher: RangeFetcher, url: str, tmp_path: Path) -> None:
    with (tmp_path / "copy.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is writing"):
            download(fetcher, url, tmp_path / "copy")
    assert download(fetcher, url, tmp_path / "copy").bytes == len(DATA)


def test_download_does_without_locks_where_the_file_system_has_none(
    fetcher: RangeFetcher, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    download(fetcher, url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


def test_download_through_a_link_replaces_the_file_behind_it(fetcher: RangeFetcher, url: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    download(fetcher, url, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == DATA


@pytest.mark.parametrize(
    ("path", "reason"),
    [(".", "is a folder"), ("/dev/null", "is a device"), ("/nowhere/file", "there is no folder '/nowhere'")],
)
def test_download_refuses_what_is_no_file_before_it_asks_for_anything(
    fetcher: RangeFetcher, server: FaultServer, url: str, path: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        download(fetcher, url, path)
    assert server.requests == []


@pytest.mark.parametrize("ranges", [[(5, 4)], [(0, len(DATA) + 1)], [(len(DATA) + 1, None)]])
def test_download_refuses_ranges_outside_of_the_object_before_it_makes_a_file(
    fetcher: RangeFetcher, url: str, tmp_path: Path, ranges: list[RangeOfObject]
) -> None:
    with pytest.raises(PlanError, match="lies outside"):
        download(fetcher, url, tmp_path / "copy", ranges)
    assert _left(tmp_path / "copy") == []


def test_download_that_got_nothing_leaves_nothing(
    fetcher: RangeFetcher, server: FaultServer, url: str, tmp_path: Path
) -> None:
    server.inject(Fault(FaultKind.STATUS, status=403))
    with pytest.raises(AccessDenied):
        download(fetcher, url, tmp_path / "copy")
    assert _left(tmp_path / "copy") == []


def test_download_of_a_missing_object_makes_no_file(fetcher: RangeFetcher, server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing):
        download(fetcher, server.url("/nothing"), tmp_path / "copy")
    assert _left(tmp_path / "copy") == []


def test_part_file_keeps_no_secret_of_the_url(fetcher: RangeFetcher, url: str, tmp_path: Path) -> None:
    secret = url.replace("http://", "http://user:pass-word@") + "?X-Amz-Signature=dead-beef"
    _leave_part(tmp_path / "copy", fetcher, secret, PART)
    assert json.loads((tmp_path / "copy.part.json").read_text())["source"] == url
    # A URL that was signed anew is the same object.
    done = download(fetcher, url + "?X-Amz-Signature=other", tmp_path / "copy")
    assert (done.resumed_from, done.source) == (PART, url)


@pytest.mark.parametrize(
    ("checksum", "expected"),
    [("crc32", f"crc32:{zlib.crc32(DATA):08x}"), ("md5", f"md5:{hashlib.md5(DATA).hexdigest()}"), ("none", None)],
)
def test_copy_to_writes_a_stream_and_computes_what_was_chosen(
    fetcher: RangeFetcher, url: str, checksum: str, expected: str | None
) -> None:
    file = io.BytesIO()
    done = copy_to(fetcher, url, file, checksum=checksum)
    assert file.getvalue() == DATA
    assert done.checksum == expected


class _TakesLittle(io.BytesIO):
    """As a pipe without a buffer may."""

    def write(self, data: Any) -> int:
        return super().write(data[:1000])


def test_copy_to_writes_all_to_a_stream_that_takes_little_at_a_time(fetcher: RangeFetcher, url: str) -> None:
    file = _TakesLittle()
    copy_to(fetcher, url, file)
    assert file.getvalue() == DATA


def test_copy_to_holds_only_a_window_of_a_slow_consumers_bytes(server: FaultServer, url: str) -> None:
    config = PoolConfig(workers=1, connections_per_worker=1, part_size=PART, max_memory=4 * PART)
    reader, writer = os.pipe()
    asked_before_reading = []
    with (
        RangeFetcher(pool_config=config) as fetcher,
        os.fdopen(reader, "rb") as source,
        os.fdopen(writer, "wb") as file,
    ):
        copy = threading.Thread(target=_copy_and_close, args=(fetcher, url, file))
        copy.start()
        server.wait_for_requests(3)
        first = source.read(1)
        asked_before_reading.extend(_gets(server))
        rest = source.read()
        copy.join()
    assert first + rest == DATA
    assert sum(end - start for start, end in asked_before_reading) < len(DATA)  # far from all of it


def _copy_and_close(fetcher: RangeFetcher, url: str, file: BinaryIO) -> None:
    copy_to(fetcher, url, file)
    file.close()


@pytest.mark.parametrize("source", ["data.bin", "s3://bucket", "s3:///key", "ftp://host/data.bin"])
def test_download_says_what_a_source_looks_like(fetcher: RangeFetcher, tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigError, match=r"write s3://bucket/key|not an http\(s\) URL"):
        download(fetcher, source, tmp_path / "copy")


def test_source_without_a_scheme_is_shown_without_secrets(fetcher: RangeFetcher) -> None:
    with pytest.raises(ConfigError, match=r"not a source: 'host/data\.bin'; write"):
        copy_to(fetcher, "user:pass-word@host/data.bin?X-Amz-Signature=dead-beef", io.BytesIO())


def test_unknown_checksum_is_refused(fetcher: RangeFetcher, url: str) -> None:
    with pytest.raises(ConfigError, match="checksum must be one of"):
        copy_to(fetcher, url, io.BytesIO(), checksum="sha3")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("s3://bucket/a/b.bin", "b.bin"),
        ("s3://bucket/a%2Fb", "a%2Fb"),
        ("https://host/a/b%20c.bin?X=/y#z", "b c.bin"),
        ("https://host/a%2Fb", "b"),
    ],
)
def test_name_of_is_the_last_segment(source: str, name: str) -> None:
    assert name_of(source) == name


@pytest.mark.parametrize("source", ["s3://bucket/a/", "https://host", "https://host/a/%2E%2E", "s3://bucket/.."])
def test_name_of_refuses_what_names_no_file(source: str) -> None:
    with pytest.raises(ConfigError, match="name the file"):
        name_of(source)


@pytest.mark.parametrize(
    ("stored", "checksum", "expected"),
    [
        ({"ChecksumAlgorithm": "SHA256"}, "sha256", "the SHA256 that S3 has stored"),
        ({"ChecksumAlgorithm": "SHA256"}, "md5", "the MD5 that is its ETag"),
        ({"ChecksumAlgorithm": "SHA1"}, "crc32", "the SHA1 that S3 has stored"),
        ({"ChecksumAlgorithm": "CRC32"}, "sha256", "the CRC32 that S3 has stored"),
        ({"ChecksumAlgorithm": "SHA256"}, "none", None),
    ],
)
def test_whole_object_is_verified_against_what_s3_has(
    bucket: str, fetcher: RangeFetcher, stored: dict[str, str], checksum: str, expected: str | None
) -> None:
    client = fetcher.client()
    arguments: dict[str, Any] = {"Key": "data", "Body": DATA, **stored}
    client.call("put_object", bucket, **arguments)
    done = copy_to(fetcher, f"s3://{bucket}/data", io.BytesIO(), checksum=checksum)
    assert done.verified_against == expected
    assert (done.why_unverified is None) == (expected is not None)


def test_object_of_parts_says_why_it_is_not_verified(bucket: str, fetcher: RangeFetcher, tmp_path: Path) -> None:
    with fetcher.client().put_object(bucket, "data") as writer:
        writer.write(bytes(20 << 20))
    done = download(fetcher, f"s3://{bucket}/data", tmp_path / "copy")
    assert done.verified_against is None
    assert done.why_unverified == "S3 has stored no checksum of the whole object"


def test_file_that_differs_from_what_s3_has_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetcher: RangeFetcher
) -> None:
    # A flipped bit that TCP does not notice: the server's ETag is the MD5 of the right bytes.
    fault = Fault(FaultKind.FLIPPED_BIT, covering=400_000)
    with FaultServer({"/bucket/data": DATA}, [fault]) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ChecksumMismatch) as caught:
            download(fetcher, "s3://bucket/data", tmp_path / "copy")
        assert (caught.value.bucket, caught.value.key) == ("bucket", "data")
        assert hashlib.md5(DATA).hexdigest() in str(caught.value)
        assert _left(tmp_path / "copy") == []
        server.inject()
        assert download(fetcher, "s3://bucket/data", tmp_path / "copy").verified_against == "the MD5 that is its ETag"


def test_left_part_that_is_damaged_is_found_and_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetcher: RangeFetcher
) -> None:
    with FaultServer({"/bucket/data": DATA}) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        _leave_part(tmp_path / "copy", fetcher, "s3://bucket/data", PART)
        Path(tmp_path / "copy.part").write_bytes(bytes(PART - 1) + b"\1")
        with pytest.raises(ChecksumMismatch):
            download(fetcher, "s3://bucket/data", tmp_path / "copy")
        assert _left(tmp_path / "copy") == []
