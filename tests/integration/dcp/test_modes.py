"""Loads and saves do not depend on torch's modes, such as a default device that holds no bytes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._python_dispatch import TorchDispatchMode

from mpreader import PlanError, PoolConfig, S3ReaderConstructor
from mpreader.config import MiB
from mpreader.dcp import S3StorageReader, S3StorageWriter, dcp_to_torch_save, load_checkpoint
from mpreader.testing import S3Server
from tests.unit.dcp.test_modes import MODES
from tests.unit.dcp.test_tensor import bits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Parts as small as can be, so that tensors are cut.
POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=16 * MiB, part_size=64 * 1024)
TENSORS = {
    "matrix": torch.arange(1200.0).reshape(40, 30),
    "large": torch.arange(100_000, dtype=torch.int32).reshape(100, 1000).t(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.arange(6.0)),
}
ITEM = {"step": 7, "lr": 0.5, "names": ["a", "b"], "seen": {3, 4}}


@pytest.fixture(scope="module")
def checkpoints(s3_server: S3Server) -> dict[str, str]:
    """URIs of checkpoints of TENSORS and ITEM."""
    s3_server.create_bucket("torch-modes")
    uris = {name: f"s3://torch-modes/{name}" for name in ("plain", "compressed")}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        for variable, value in s3_server.environment().items():
            patch.setenv(variable, value)
        save({**TENSORS, "item": ITEM}, storage_writer=S3StorageWriter("us-east-1", uris["plain"]))
        compressed = S3StorageWriter("us-east-1", uris["compressed"], _extensions=[ZStandard()])
        save({**TENSORS, "item": ITEM}, storage_writer=compressed)
    return uris


def targets() -> dict[str, Any]:
    """Targets of other strides and element types than what is stored."""
    state: dict[str, Any] = {name: torch.zeros_like(value.detach()) for name, value in TENSORS.items()}
    state["matrix"] = torch.zeros(30, 40, dtype=torch.float64).t()
    state["item"] = {"step": 0, "lr": 0.0, "names": ["", ""], "seen": set()}
    return state


def assert_loaded(state: dict[str, Any]) -> None:
    for name, value in TENSORS.items():
        loaded = state[name]
        assert loaded.device.type == "cpu", name
        assert bits(loaded.detach()) == bits(value.detach().to(loaded.dtype)), name
    assert state["item"] == ITEM


READERS: dict[str, Callable[[], Any]] = {
    "multiprocess": lambda: S3ReaderConstructor.multiprocess(pool_config=POOL),
    "dcp_optimized": S3ReaderConstructor.dcp_optimized,
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("checkpoint", ["plain", "compressed"])
@pytest.mark.parametrize("mode", MODES)
def test_load_in_a_mode_is_right(
    checkpoints: dict[str, str], aws_environment: None, mode: str, checkpoint: str, kind: str
) -> None:
    state = targets()
    reader = S3StorageReader("us-east-1", checkpoints[checkpoint], reader_constructor=READERS[kind]())
    with reader, MODES[mode]():
        load(state, storage_reader=reader)
    assert_loaded(state)


@pytest.mark.parametrize("mode", MODES)
def test_whole_checkpoint_in_a_mode_comes_onto_the_cpu(
    checkpoints: dict[str, str], aws_environment: None, mode: str, tmp_path: Path
) -> None:
    with MODES[mode]():
        state = load_checkpoint(checkpoints["plain"], pool_config=POOL, weights_only=False)
        dcp_to_torch_save(checkpoints["plain"], tmp_path / "state.pt", pool_config=POOL, weights_only=False)
    assert_loaded(state)
    assert_loaded(torch.load(tmp_path / "state.pt", weights_only=False))


@pytest.mark.parametrize("mode", MODES)
def test_save_in_a_mode_stores_the_same(bucket: str, mode: str) -> None:
    with MODES[mode]():
        save({**TENSORS, "item": ITEM}, storage_writer=S3StorageWriter("us-east-1", f"s3://{bucket}/saved"))
    assert_loaded(load_checkpoint(f"s3://{bucket}/saved", pool_config=POOL, weights_only=False))


def test_load_among_fake_tensors_is_refused(checkpoints: dict[str, str], aws_environment: None) -> None:
    state = targets()
    with S3StorageReader("us-east-1", checkpoints["plain"], pool_config=POOL) as reader:
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(CheckpointException) as caught:
            load(state, storage_reader=reader)
        [(error, _)] = caught.value.failures.values()
        assert isinstance(error, PlanError)
        assert "FakeTensor" in str(error)
        load(state, storage_reader=reader)
    assert_loaded(state)
    with FakeTensorMode(), pytest.raises(PlanError, match="FakeTensor"):
        load_checkpoint(checkpoints["plain"], pool_config=POOL, weights_only=False)


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that looks on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_load_in_a_mode_that_looks_on_is_right(checkpoints: dict[str, str], aws_environment: None) -> None:
    state = targets()
    with S3StorageReader("us-east-1", checkpoints["plain"], pool_config=POOL) as reader, Watched():  # type: ignore[no-untyped-call]
        load(state, storage_reader=reader)
    assert_loaded(state)
