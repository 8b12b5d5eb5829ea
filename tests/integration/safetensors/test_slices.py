"""Slices, types and targets of loads; a load of torch's own indexing on what was written is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from mpreader import ConfigError, PlanError
from mpreader.safetensors import load_checkpoint, load_file, safe_open
from tests.integration.safetensors.comparison import bits

torch.manual_seed(0)
TENSORS = {
    "matrix": torch.randn(48, 32),
    "cube": torch.randint(-100, 100, (6, 5, 4), dtype=torch.int8),
    "row": torch.arange(9.0, dtype=torch.bfloat16),
    "scalar": torch.tensor(3),
    "half": torch.randn(4, 4).half(),
    "packed": torch.arange(24, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(4, 6),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("slices") / "some.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    return str(path)


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    is_alike = found.dtype == expected.dtype and found.shape == expected.shape
    return is_alike and torch.equal(bits(found), bits(expected))


def one_index(size: int) -> st.SearchStrategy[Any]:
    bound = st.none() | st.integers(-size - 2, size + 2)
    return st.integers(-size, size - 1) | st.builds(slice, bound, bound, st.none() | st.integers(1, 3))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slice_is_what_torch_makes_of_the_whole(path: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["matrix", "cube", "row", "packed"]))
    sizes = TENSORS[name].shape
    index = tuple(data.draw(one_index(size)) for size in sizes[: data.draw(st.integers(0, len(sizes)))])
    if data.draw(st.booleans()):
        index = (..., *(data.draw(one_index(size)) for size in sizes[len(sizes) - len(index) :]))
    expected = TENSORS[name].view(torch.uint8 if name == "packed" else TENSORS[name].dtype)[index]
    with safe_open(path) as file:
        found = file.get_slice(name)[index]
    loaded = load_file(path, slices={name: index}, names=[name])[name]
    assert (found.dtype, loaded.dtype) == (TENSORS[name].dtype, TENSORS[name].dtype)
    assert all(equal(one.view(expected.dtype), expected) for one in (found, loaded) if one.numel())
    assert found.shape == loaded.shape == expected.shape
    assert found.untyped_storage().nbytes() == found.nbytes  # nothing of what was left out is kept


def test_opened_file_tells_what_is_in_it(path: str) -> None:
    with safe_open(path, "pt", "cpu") as file:
        assert file.keys() == sorted(TENSORS)
        assert sorted(file.offset_keys()) == file.keys()
        assert file.metadata() == {"format": "pt"}
        assert (file.get_slice("cube").get_shape(), file.get_slice("cube").get_dtype()) == ([6, 5, 4], "I8")
        assert all(equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())
        for index in ([1], None, "1", slice(None, None, -1), (..., ...), slice("a")):
            with pytest.raises(PlanError, match=r"tensor 'matrix' of shape \[48, 32\]"):
                file.get_slice("matrix")[index]
        for outside in (48, -49, (0, 0, 0)):
            with pytest.raises(PlanError, match=r"outside of a dimension|too many indices"):
                file.get_slice("matrix")[outside]
        with pytest.raises(PlanError, match="no tensor 'nothing'"):
            file.get_slice("nothing")


def test_types_of_ordinary_floating_point_are_converted(path: str) -> None:
    loaded = load_file(path, dtype=torch.bfloat16)
    for name, tensor in TENSORS.items():
        kept = name in ("cube", "scalar", "packed")
        assert equal(loaded[name], tensor if kept else tensor.to(torch.bfloat16)), name


def test_given_tensors_are_filled_whatever_their_layout(path: str) -> None:
    out = {
        "matrix": torch.empty(32, 48, dtype=torch.float64).T,
        "cube": torch.empty(6, 5, 8, dtype=torch.int8)[..., ::2],
        "row": torch.nn.Parameter(torch.empty(9)),
        "half": torch.empty(4, 4, device="meta"),
    }
    loaded = load_file(path, out=out)
    assert {name for name in out if loaded[name] is out[name]} == {"matrix", "cube", "row"}
    assert loaded["half"].device.type == "cpu"
    for name, tensor in loaded.items():
        assert torch.equal(tensor, TENSORS[name].to(tensor.dtype)), name
    column = torch.empty(48)
    load_file(path, out={"matrix": column}, slices=lambda name, shape: (slice(None), shape[1] - 1))
    assert torch.equal(column, TENSORS["matrix"][:, -1])


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(48, 32)
        self.head = torch.nn.Linear(32, 48, bias=False)
        self.head.weight = self.embedding.weight
        self.head.weight.loader = "kept"  # type: ignore[attr-defined]
        self.register_buffer("row", torch.zeros(9))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_module_is_filled_or_made(tmp_path: Path, device: str) -> None:
    with torch.device(device):
        module = Tied()
    before = module.embedding.weight
    save_file(
        {"head.weight": TENSORS["matrix"], "row": TENSORS["row"], "more": TENSORS["half"]}, tmp_path / "m.safetensors"
    )
    loaded = load_file(str(tmp_path / "m.safetensors"), out=module)
    assert sorted(loaded) == ["embedding.weight", "head.weight", "row"]
    assert module.head.weight is module.embedding.weight, "they are tied as before"
    assert (module.head.weight is before) == (device == "cpu")
    assert isinstance(module.head.weight, torch.nn.Parameter)
    assert module.head.weight.loader == "kept"  # type: ignore[attr-defined]
    assert torch.equal(module.head.weight, TENSORS["matrix"])
    assert torch.equal(module.get_buffer("row"), TENSORS["row"].float())
    with pytest.raises(PlanError, match=r"no tensor 'weight' is in the files, nor 1 others of out; give names="):
        load_file(str(tmp_path / "m.safetensors"), out=torch.nn.Linear(2, 2))


def test_subclass_on_meta_is_made_as_a_whole(tmp_path: Path) -> None:
    module = torch.nn.Linear(32, 48, bias=False)
    pair: Any = TwoTensor
    module.weight = torch.nn.Parameter(pair(*[torch.empty(48, 32, device="meta") for _ in range(2)]))
    save_file({"weight": TENSORS["matrix"]}, tmp_path / "m.safetensors")
    load_file(tmp_path / "m.safetensors", out=module)
    made: Any = module.weight
    assert type(made) is TwoTensor
    assert torch.equal(made.a, TENSORS["matrix"])
    assert torch.equal(made.b, TENSORS["matrix"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(48, 32).to_sparse(), "sparse"),
        (torch.zeros(48, 1).expand(48, 32), "share memory"),
        (torch.nn.parameter.UninitializedParameter(), "no shape yet"),
    ],
)
def test_tensors_that_cannot_be_filled_are_refused(path: str, target: torch.Tensor, message: str) -> None:
    with pytest.raises(PlanError, match=rf"'matrix' can't be loaded into .*{message}"):
        load_file(path, out={"matrix": target})


def test_mode_that_makes_tensors_without_memory_is_told(path: str) -> None:
    with FakeTensorMode(), pytest.raises(PlanError, match="torch makes tensors of type FakeTensor here"):
        load_file(path)


def test_wrong_arguments_are_told_before_anything_is_loaded(path: str) -> None:
    target = torch.full((48, 31), 7.0)
    with pytest.raises(PlanError, match=r"'matrix' of shape \[48, 32\] can't be loaded into one of \[48, 31\]"):
        load_file(path, out={"matrix": target})
    assert target.eq(7).all()
    with pytest.raises(ConfigError, match=r"write \['matrix'\]"):
        load_file(path, names="matrix")
    with pytest.raises(ConfigError, match="a collection of names, such as a list, got generator"):
        load_checkpoint(path, names=(name for name in ["matrix"]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave dtype out"):
        load_file(path, out={}, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"out is a state dictionary or a torch\.nn\.Module, got list"):
        load_file(path, out=[target])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="slices has 'b', but no such tensor"):
        load_file(path, slices={"b": 0})
    with pytest.raises(ConfigError, match=r"none of s3://bucket/key, an http\(s\) URL, and a local path"):
        load_file("gs://bucket/a.safetensors")
    with pytest.raises(ConfigError, match="headers are sent to web servers only"):
        load_file(path, headers={"Authorization": "Bearer x"})
