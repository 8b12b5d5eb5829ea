"""Keys, tokens and signatures stay in the host process's memory: whoever sees all else learns none of them."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import stat
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import mpreader
from mpreader import PoolConfig, RangeFetcher, S3Client, S3ClientConfig, S3ReaderConstructor, TransportError
from mpreader.config import KiB, MiB
from mpreader.dcp import S3StorageReader
from mpreader.pool.requests import SlotRead
from mpreader.pool.worker.messages import Fetch
from mpreader.pool.worker.version import ObjectVersion
from mpreader.ranges import Part
from mpreader.s3 import PresignedUrl
from mpreader.sources.http import HttpSource
from mpreader.sources.s3 import S3Source
from mpreader.testing import Fault, FaultKind, FaultServer

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

CONFIG = PoolConfig(workers=1, connections_per_worker=2, max_memory=4 * MiB, part_size=64 * KiB)
WEIGHT = torch.arange(100_000)


@pytest.fixture
def store(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """An S3 with s3://bucket/data and a checkpoint, and credentials for it."""
    save({"w": WEIGHT}, storage_writer=FileSystemWriter(tmp_path))
    objects = {f"/bucket/checkpoint/{file.name}": file.read_bytes() for file in tmp_path.iterdir()}
    with FaultServer({"/bucket/data": data, **objects}) as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        keys = {"AWS_SECRET_ACCESS_KEY": "sesame/secret+key", "AWS_SESSION_TOKEN": "sesame/session+token"}
        for name, value in {**server.environment(), **keys}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def unwanted(store: FaultServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that must be seen nowhere; signatures are added as they are made."""
    found = ["sesame", "X-Amz-Signature", "X-Amz-Security-Token"]
    sign = S3Client.presign

    def presign(client: S3Client, bucket: str, key: str) -> PresignedUrl:
        signed = sign(client, bucket, key)
        found.extend(parse_qs(signed.url.partition("?")[2])["X-Amz-Signature"])
        return signed

    monkeypatch.setattr(S3Client, "presign", presign)
    return found


def assert_clean(texts: list[str], unwanted: list[str]) -> None:
    assert len(unwanted) > 3, "nothing was signed"
    for text in texts:
        assert not [secret for secret in unwanted if secret in text], text


def shown(thing: object) -> Iterator[str]:
    """A thing as people, loggers and debuggers show it."""
    yield from (str(thing), repr(thing))
    if hasattr(thing, "__dict__"):
        yield repr(vars(thing))


def pids(fetcher: RangeFetcher) -> list[int]:
    coordinator = fetcher._engine.pool.coordinator
    assert coordinator is not None
    return coordinator.workers.pids


def told_by_processes(fetcher: RangeFetcher) -> list[str]:
    texts = [Path(f"/proc/{pid}/{file}").read_text() for pid in pids(fetcher) for file in ("cmdline", "environ")]
    assert texts
    assert all(texts)
    return texts


# -- a load


@pytest.mark.row("secrets")
def test_fetch_shows_no_secret_in_logs_reprs_and_processes(
    store: FaultServer, data: bytes, unwanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="mpreader")
    store.inject(Fault(FaultKind.STATUS, at=(2,), status=503), Fault(FaultKind.RESET, at=(4,), after_bytes=1000))
    size = 256 * KiB
    ranges = [(start, start + size) for start in range(0, len(data), size)]
    texts: list[str] = []
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        for index, view in fetcher.stream("s3://bucket/data", ranges):
            assert view == data[index * size :][:size]
            if index == 2:
                texts += told_by_processes(fetcher)
                os.kill(pids(fetcher)[0], signal.SIGKILL)  # that is logged
        texts += told_by_processes(fetcher)  # of the worker that took over
        for thing in (
            fetcher,
            fetcher._engine.pool,
            fetcher._engine.pool.coordinator,
            fetcher.client(),
            fetcher.stats,
            CONFIG,
        ):
            texts.extend(shown(thing))
        assert fetcher.stats.retries >= 2
    formatter = logging.Formatter("%(name)s %(message)s")
    logged = [formatter.format(record) for record in caplog.records if record.name.startswith("mpreader")]
    assert any("worker process" in text for text in logged)
    assert_clean([*texts, *logged], unwanted)


@pytest.mark.row("secrets")
def test_load_shows_no_secret_in_reprs(store: FaultServer, unwanted: list[str]) -> None:
    state = {"w": torch.zeros_like(WEIGHT)}
    with S3StorageReader("us-east-1", "s3://bucket/checkpoint", pool_config=CONFIG) as reader:
        load(state, storage_reader=reader)
        assert torch.equal(state["w"], WEIGHT)
        client = reader._fs.client
        source = S3Source(client, "bucket", "data")
        route = source.route()
        fill = SlotRead(0, 10, (Part(0, 10),))
        kinds = ("sequential", "range_based")
        readers = [
            client.get_object("bucket", "data", reader_constructor=getattr(S3ReaderConstructor, kind)())
            for kind in kinds
        ]
        for opened in readers:
            assert opened.read(10)
        fetch = Fetch(1, route, ObjectVersion(10, ""), 0, 10, 0, 0)
        http = HttpSource("http://me:sesame@127.0.0.1:1/key?X-Amz-Signature=sesame")
        things = (
            reader,
            reader.fs,
            reader._reader_constructor,
            client,
            client._session,
            source,
            route,
            fill,
            fetch,
            http,
            *readers,
        )
        texts = [text for thing in things for text in shown(thing)]
        for opened in readers:
            opened.close()
    assert_clean(texts, unwanted)


# -- errors

FAULTS = {
    "403": [Fault(FaultKind.STATUS, status=403)],
    "403 also to HEAD": [Fault(FaultKind.STATUS, method=method, status=403) for method in ("HEAD", "GET")],
    "404": [Fault(FaultKind.STATUS, status=404)],
    "expired": [Fault(FaultKind.STATUS, status=403, code="ExpiredToken")],
    "503": [Fault(FaultKind.STATUS, status=503)],
    "reset": [Fault(FaultKind.RESET)],
    "other version": [Fault(FaultKind.OTHER_ETAG)],
}


def told(error: BaseException) -> list[str]:
    """An error in all ways in which it is told, stored and sent."""
    return [*shown(error), *traceback.format_exception(error), repr(pickle.dumps(error))]


def locals_of_ours(trace: TracebackType | None) -> list[str]:
    """Local variables of mpreader's functions, as a traceback with ``capture_locals`` shows them."""
    package = str(Path(mpreader.__file__).parent)
    frames = [frame for frame, _ in traceback.walk_tb(trace) if frame.f_code.co_filename.startswith(package)]
    assert frames
    return [f"{name}={value!r}" for frame in frames for name, value in frame.f_locals.items()]


@pytest.mark.row("secrets")
@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("name", FAULTS)
def test_error_holds_no_secret(store: FaultServer, unwanted: list[str], name: str, scheme: str) -> None:
    signed = S3Source(S3Client(), "bucket", "data").route().target
    store.inject(*FAULTS[name])
    uri = "s3://bucket/data" if scheme == "s3" else store.endpoint_url.replace("//", "//me:sesame@") + signed
    with (
        RangeFetcher(S3ClientConfig(max_attempts=2), CONFIG) as fetcher,
        pytest.raises(TransportError) as caught,
    ):
        fetcher.fetch(uri, [(0, 100)])
    texts = told(caught.value)
    if scheme == "s3":  # otherwise the user's own URL is among them
        texts += locals_of_ours(caught.value.__traceback__)
    assert_clean(texts, unwanted)


@pytest.mark.row("secrets")
@pytest.mark.parametrize("path", [None, "/bucket/checkpoint/.metadata"], ids=["data", "metadata"])
def test_error_of_a_load_and_what_torch_logs_of_it_hold_no_secret(
    store: FaultServer, unwanted: list[str], caplog: pytest.LogCaptureFixture, path: str | None
) -> None:
    with S3StorageReader("us-east-1", "s3://bucket/checkpoint", pool_config=CONFIG) as reader:
        load({"w": torch.zeros_like(WEIGHT)}, storage_reader=reader)
        store.inject(Fault(FaultKind.STATUS, path=path, at=None if path else range(2, 99), status=403))
        with pytest.raises(CheckpointException) as caught:
            load({"w": torch.zeros_like(WEIGHT)}, storage_reader=reader)
    logged = [logging.Formatter().format(record) for record in caplog.records]
    texts = [*shown(caught.value), *traceback.format_exception(caught.value), *logged]
    assert any("AccessDenied" in text for text in texts)
    assert_clean(texts, unwanted)
    caplog.clear()  # tracebacks keep clients and their sockets alive


class _EchoHandler(BaseHTTPRequestHandler):
    """Refuses a GET as S3 does a wrong signature: its error document repeats what was signed."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        signature = self.path.partition("X-Amz-Signature=")[2].partition("&")[0]
        self.wfile.write(
            f"<Error><CanonicalRequest>{self.path}</CanonicalRequest><SignatureProvided>{signature}</SignatureProvided>"
            "<Code>SignatureDoesNotMatch</Code><Message>The signature does not match</Message></Error>".encode()
        )

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.row("secrets")
def test_error_repeats_nothing_of_what_a_server_says_was_signed(
    store: FaultServer, unwanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _EchoHandler) as server, contextlib.ExitStack() as stack:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        stack.callback(serving.join)
        stack.callback(server.shutdown)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        with (
            RangeFetcher(pool_config=CONFIG) as fetcher,
            pytest.raises(TransportError, match=r"SignatureDoesNotMatch \(The signature does not match\)") as caught,
        ):
            fetcher.fetch("s3://bucket/data", [(0, 100)])
    assert_clean(told(caught.value), unwanted)


# -- shared memory


@pytest.mark.row("secrets")
def test_shared_memory_has_no_name_and_is_its_owners_alone(
    server: FaultServer, data: bytes, new_shared_memory: Callable[[], set[str]]
) -> None:
    umask = os.umask(0)
    try:
        with RangeFetcher(pool_config=CONFIG) as fetcher:
            views = [
                *fetcher.fetch(server.url("/object"), [(0, 1000)]),
                *fetcher.fetch(server.url("/object"), [(0, MiB)]),  # in a segment of its own
            ]
            coordinator = fetcher._engine.pool.coordinator
            assert coordinator is not None
            segments = list(coordinator._arena.segments.values())
            assert len(segments) >= 2
            for segment in segments:
                status = os.fstat(segment.fd)
                assert stat.S_IMODE(status.st_mode) == 0o600
                assert status.st_nlink == 0
            assert not new_shared_memory()
            assert views == [data[:1000], data[:MiB]]
    finally:
        os.umask(umask)


# -- servers that want to fill the memory

_MOST_BYTES = 64 * MiB  # what an endless answer ends with, should anybody take it all


class EndlessServer:
    """Answers HEAD well, and requests of ``method`` with a head that does not end.

    Attributes:
        sent: How many bytes of it were taken off, answer by answer.
    """

    def __init__(self, method: str, junk: bytes) -> None:
        self.sent: list[int] = []
        self._method = method.encode()
        self._junk = junk * (64 * KiB // len(junk))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/object"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        if not connection.recv(64 * KiB).startswith(self._method):
            connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n')
            return
        self.sent.append(0)
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nX-A: ")
        while self.sent[-1] < _MOST_BYTES:
            connection.sendall(self._junk)
            self.sent[-1] += len(self._junk)


@pytest.mark.parametrize("junk", [b"A", b"A\r\nX-A: "], ids=["one line", "many lines"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_answer_whose_head_does_not_end_is_an_error_in_bounded_memory(method: str, junk: bytes) -> None:
    server = EndlessServer(method, junk)
    try:
        with (
            RangeFetcher(S3ClientConfig(max_attempts=2), CONFIG) as fetcher,
            pytest.raises(TransportError, match=r"127\.0\.0\.1"),
        ):
            fetcher.fetch(server.url, [(0, 100)])
    finally:
        server.close()
    assert 1 <= len(server.sent) <= 2
    assert max(server.sent) < 16 * MiB  # most of it in the buffers of the two sockets
