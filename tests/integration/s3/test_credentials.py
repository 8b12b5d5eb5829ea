"""Credentials of an instance's role: asked for by the host process alone, however many workers there are."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mpreader import AccessDenied, PoolConfig, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.testing import Fault, FaultKind, FaultServer

pytestmark = pytest.mark.timeout(60)

KEYS = [f"key{number}" for number in range(4)]
CREDENTIALS = "/latest/meta-data/iam/security-credentials/"


class MetadataServer(ThreadingHTTPServer):
    """An EC2 metadata endpoint (IMDSv2) whose role gets new credentials at each request.

    Attributes:
        log: Method and path of each request.
        lifetimes: How long the first, the second … credentials are good; the last: all that follow.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.log: list[str] = []
        self.lifetimes = [timedelta(hours=6)]
        self._made = 0

    def credentials(self) -> str:
        self._made += 1
        expiration = datetime.now(timezone.utc) + self.lifetimes[min(self._made, len(self.lifetimes)) - 1]
        return json.dumps(
            {
                "Code": "Success",
                "Type": "AWS-HMAC",
                "AccessKeyId": f"AKIAFETCHED{self._made}",
                "SecretAccessKey": "secret",
                "Token": "token",
                "Expiration": f"{expiration:%Y-%m-%dT%H:%M:%SZ}",
            }
        )


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        self._answer("the metadata token" if self.path == "/latest/api/token" else "")

    def do_GET(self) -> None:
        if self.headers["x-aws-ec2-metadata-token"] != "the metadata token":
            self._answer("")
        elif self.path == f"{CREDENTIALS}role":
            self._answer(self.server.credentials())
        else:
            self._answer("role" if self.path == CREDENTIALS else "")

    def _answer(self, text: str) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        self.send_response(200 if text else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def store(metadata: MetadataServer, data: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """An S3 with some objects, for a host whose only credentials are those of its role."""
    with FaultServer({f"/bucket/{key}": data[: 2 * MiB] for key in KEYS}) as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        environment = {
            **server.environment(),
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{metadata.server_port}",
        }
        for name, value in environment.items():
            if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
                monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        yield server


def wait_until(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to pass in {timeout_s} s"
        threading.Event().wait(0.01)


def fetch_all(fetcher: RangeFetcher) -> list[memoryview]:
    views = fetcher.fetch_many({f"s3://bucket/{key}": [(0, 2 * MiB)] for key in KEYS})
    return [view for [view] in views.values()]


def signers(store: FaultServer) -> set[str]:
    """Which keys signed the requests that the host process itself made."""
    heads = [request for request in store.requests if request.method == "HEAD"]
    return {request.headers["authorization"].partition("Credential=")[2].partition("/")[0] for request in heads}


@pytest.mark.row("64 workers with instance-role credentials")
def test_64_workers_share_one_fetch_of_the_roles_credentials(
    metadata: MetadataServer, store: FaultServer, data: bytes
) -> None:
    store.inject(Fault(FaultKind.DELAY, seconds=0.2))  # so slow that every worker gets something to do
    config = PoolConfig(workers=64, connections_per_worker=1, max_memory=16 * MiB, part_size=64 * KiB)
    with RangeFetcher(pool_config=config) as fetcher:
        fetcher._engine.pool.start()
        coordinator = fetcher._engine.pool.coordinator
        assert coordinator is not None
        wait_until(lambda: all(worker.is_ready for worker in coordinator.workers._workers), 20)
        for _ in range(2):
            assert fetch_all(fetcher) == [data[: 2 * MiB]] * len(KEYS)
        assert all(worker.requests for worker in fetcher.stats.workers)
    store.inject()
    with RangeFetcher(pool_config=PoolConfig(workers=1, max_memory=16 * MiB)) as fetcher:
        assert fetch_all(fetcher) == [data[: 2 * MiB]] * len(KEYS)
    assert signers(store) == {"AKIAFETCHED1"}
    assert metadata.log == ["PUT /latest/api/token", f"GET {CREDENTIALS}", f"GET {CREDENTIALS}role"]


def test_credentials_that_are_about_to_expire_are_fetched_once_more(
    metadata: MetadataServer, store: FaultServer, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata.lifetimes = [timedelta(hours=6), timedelta(hours=48)]
    for window in ("advisory", "mandatory"):  # as if a day before the end were what is called about to expire
        monkeypatch.setattr(f"botocore.credentials.RefreshableCredentials._{window}_refresh_timeout", 24 * 3600)
    config = PoolConfig(workers=2, connections_per_worker=2, max_memory=16 * MiB)
    with RangeFetcher(pool_config=config) as fetcher:
        for _ in range(3):
            assert fetch_all(fetcher) == [data[: 2 * MiB]] * len(KEYS)
    assert signers(store) == {"AKIAFETCHED2"}
    assert metadata.log.count(f"GET {CREDENTIALS}role") == 2


def test_credentials_of_the_environment_that_have_expired_are_denied(
    aws_environment: None, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2020-01-01T00:00:00Z")
    with RangeFetcher() as fetcher, pytest.raises(AccessDenied, match="still expired"):
        fetcher.fetch(f"s3://{bucket}/key", [(0, 1)])
