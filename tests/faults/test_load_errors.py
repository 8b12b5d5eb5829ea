"""Messages of a ``dcp.load`` that fails: what failed, of which tensor, why, after how many attempts, what to do."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import (
    AccessDenied,
    ChecksumMismatch,
    MpreaderError,
    ObjectChanged,
    ObjectMissing,
    PoolConfig,
    PoolTimeout,
    S3ClientConfig,
    ShortRead,
    TransportError,
)
from mpreader.config import KiB, MiB
from mpreader.dcp import S3StorageReader
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.faults.conftest import Serve

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FILE = "/bucket/run/__0_0.distcp"
STATE = {"layers.0.weight": torch.arange(200_000, dtype=torch.int32)}
NEEDED = r"\[needed for 'layers\.0\.weight'\]"
RANGE = r"s3://bucket/run/__0_0\.distcp bytes \d+-\d+"


@pytest.fixture
def server(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultServer:
    save(dict(STATE), storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    server = serve({f"/bucket/run/{file.name}": file.read_bytes() for file in tmp_path.iterdir()})
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server


def load_from(server: FaultServer, **settings: Any) -> dict[str, torch.Tensor]:
    state = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    client = S3ClientConfig("us-east-1", endpoint_url=server.endpoint_url, force_path_style=True, max_attempts=2)
    config = PoolConfig(1, **{"max_memory": 8 * MiB, "part_size": 256 * KiB, "stall_timeout_s": 0.3, **settings})
    with S3StorageReader("us-east-1", "s3://bucket/run", client, pool_config=config) as reader:
        load(dict(state), storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize(
    ("fault", "settings", "cls", "words"),
    [
        (Fault(FaultKind.OTHER_ETAG), {}, ObjectChanged, r"overwritten.*1 attempt\).*Load again"),
        (Fault(FaultKind.STATUS, status=403), {}, AccessDenied, r"AccessDenied.*1 attempt\).*s3:GetObject"),
        (Fault(FaultKind.STATUS, status=404), {}, ObjectMissing, r"gone.*NoSuchKey.*1 attempt\).*when the load began"),
        (Fault(FaultKind.STATUS, status=503), {}, TransportError, r"SlowDown.*2 attempts\).*max_attempts"),
        (Fault(FaultKind.EARLY_CLOSE), {}, ShortRead, r"kept breaking.*ended after 0.*2 attempts\)"),
        (Fault(FaultKind.STALL, seconds=60), {}, TransportError, r"stalled.*2 attempts\).*MPREADER_STALL_TIMEOUT_S"),
        (
            Fault(FaultKind.TRICKLE, seconds=0.02),
            {"timeout_s": 0.5, "stall_timeout_s": 30},
            PoolTimeout,
            r"within 0\.5 s.*MPREADER_TIMEOUT_S",
        ),
    ],
    ids=lambda value: f"{value.kind.name} {value.status}" if isinstance(value, Fault) else "",
)
@pytest.mark.usefixtures("_no_delays")
def test_failed_load_says_what_why_how_often_and_what_to_do(
    server: FaultServer, fault: Fault, settings: dict[str, Any], cls: type[MpreaderError], words: str
) -> None:
    server.inject(Fault(**{field: getattr(fault, field) for field in fault.__slots__} | {"path": FILE}))
    with pytest.raises(CheckpointException) as caught:
        load_from(server, **settings)
    [(error, _)] = caught.value.failures.values()
    assert type(error) is cls
    for expected in (RANGE, words, NEEDED):
        assert re.search(expected, str(error)), str(error)
        assert re.search(expected, str(caught.value)), "torch's own exception must show it, too"
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), twin.__dict__) == (cls, str(error), error.__dict__)


@pytest.mark.row("bit flipped in a tensor's bytes")
def test_bit_that_flips_once_is_received_again(server: FaultServer) -> None:
    server.inject(Fault(FaultKind.FLIPPED_BIT, at=(2,), path=FILE, after_bytes=1000))
    assert torch.equal(load_from(server)["layers.0.weight"], STATE["layers.0.weight"])
    assert sum(request.fault is not None for request in server.requests) == 1


@pytest.mark.row("bit flipped in a tensor's bytes")
def test_bit_that_stays_flipped_names_the_tensor(server: FaultServer) -> None:
    server.inject(Fault(FaultKind.FLIPPED_BIT, path=FILE, covering=500_000))
    with pytest.raises(CheckpointException) as caught:
        load_from(server)
    [(error, _)] = caught.value.failures.values()
    assert type(error) is ChecksumMismatch
    assert re.search(r"'layers\.0\.weight' is damaged in s3://bucket/run/__0_0\.distcp.*verify=False", str(error))


@pytest.mark.row("one answer among many: its first byte is late")
@pytest.mark.parametrize(
    "slow",
    [
        {"method": "GET", "path": "/bucket/run/.metadata"},
        {"method": "HEAD", "path": FILE},
    ],
    ids=lambda slow: f"{slow['method']} {slow['path']}",
)
@pytest.mark.timeout(50)  # less than the answer takes, and boto3 waits for it
def test_late_answer_about_a_file_is_asked_for_once_more(server: FaultServer, slow: dict[str, str]) -> None:
    server.inject(Fault(FaultKind.DELAY, at=(1,), seconds=3600.0, **slow))  # type: ignore[arg-type]
    assert torch.equal(load_from(server)["layers.0.weight"], STATE["layers.0.weight"])
    asked = [request for request in server.requests if (request.method, request.path) == tuple(slow.values())]
    assert len(asked) == 2
