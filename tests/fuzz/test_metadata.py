"""Damaged and hostile ``.metadata``: read or refused; nothing is run, nothing is changed, nothing large is made."""

from __future__ import annotations

import contextlib
import enum
import io
import os
import pickle
import pickletools
import sys
import tracemalloc
from collections.abc import Iterator
from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader.dcp import unpickling as subject
from mpreader.dcp.metadata import MetadataRefused, load_metadata

for _module in subject._CLASSES_BY_MODULE.keys() - {"pathlib._local"}:
    import_module(_module)

if TYPE_CHECKING:
    from tests.fuzz.conftest import Mutant, Mutants

fuzzed = settings(max_examples=int(os.environ.get("MPREADER_FUZZ_EXAMPLES", "200")))

# What unpickling a byte of input may make: an empty set is 216 bytes and one opcode.
MOST_BYTES_PER_BYTE = 1024

DANGEROUS = (
    *("os system", "posix system", "subprocess Popen", "builtins eval", "builtins exec", "builtins __import__"),
    *("builtins getattr", "builtins setattr", "builtins open", "builtins type", "operator attrgetter", "pickle loads"),
    *("torch load", "torch.serialization load", "torch.storage _load_from_bytes", "torch.hub load", "torch onnx"),
    *("pathlib Path.unlink", "pathlib Path.write_text", "collections abc.sys.modules", "builtins set.__init__"),
    *("torch.distributed.checkpoint.metadata os.system", "torch.distributed.checkpoint.metadata Metadata.__init__"),
    *("ctypes CDLL", "socket create_connection", "shutil rmtree", "importlib import_module", "runpy run_path"),
)
# What a checkpoint may need, called with whatever is on the stack.
HARMLESS = tuple(f"{module} {name}" for module, names in subject._CLASSES_BY_MODULE.items() for name in names)
# Stack and object opcodes: BUILD, REDUCE, NEWOBJ, NEWOBJ_EX, DUP, POP, MARK, TUPLE*, DICT, SETITEM(S), APPEND(S), …
LOOSE_OPCODES = tuple(bytes([code]) for code in b"bR\x81\x922010(t)\x85\x86\x87}dsu]lae\x8f\x90\x91N\x88Q\x93o")
LOOSE_ARGUMENTS = (
    b"K\x00",
    b"J\xff\xff\xff\xff",
    b"h\x00",
    b"h\x05",
    b"r\x00\x01\x00\x00",
    b"\x8c\x04name",
    b"M\x00\x10",
)

FORBIDDEN_EVENTS = (
    *("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "marshal.", "object.__setattr__", "object.__delattr__"),
    *("exec", "compile", "open", "import", "pty.", "urllib.", "builtins.input", "code.", "function."),
)

_watched: list[list[str]] = []


def _audit(event: str, _: tuple[Any, ...]) -> None:
    if _watched and event.startswith(FORBIDDEN_EVENTS):
        _watched[-1].append(event)


sys.addaudithook(_audit)  # can't be taken away again; costs nothing while nobody watches


@contextlib.contextmanager
def nothing_happens() -> Iterator[None]:
    """Nothing is opened, started or executed meanwhile, and no class is changed."""
    before = state_of_the_world()
    _watched.append([])
    try:
        yield
    finally:  # also where it is refused
        events = _watched.pop()
        assert events == []
        assert state_of_the_world() == before


def state_of_the_world() -> dict[Any, Any]:
    """The attributes of all that an allowed name gives."""
    state: dict[Any, Any] = {}
    for module, names in subject._CLASSES_BY_MODULE.items():
        for name in names:
            found = getattr(sys.modules.get(module), name, None)
            if isinstance(found, type):
                state[module, name] = (dict(vars(found)), found.__bases__, found.__qualname__)
            elif isinstance(found, FunctionType):
                state[module, name] = (dict(vars(found)), found.__defaults__, found.__code__, found.__kwdefaults__)
            if isinstance(found, type) and issubclass(found, enum.Enum):
                state[module, name, "members"] = {member: dict(vars(member)) for member in found}
    return state


def read(data: bytes) -> Metadata | None:
    """The metadata, or None where it was refused."""
    tracemalloc.start()
    try:
        with nothing_happens():
            metadata = load_metadata(io.BytesIO(data))
    except MetadataRefused:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000 + MOST_BYTES_PER_BYTE * len(data), peak
    return metadata


def check(metadata: Metadata | None) -> None:
    """Check that metadata that is not refused is harmless to whoever goes by it."""
    if metadata is None:
        return
    assert isinstance(metadata, Metadata)
    assert isinstance(metadata.state_dict_metadata, dict)
    stored = getattr(metadata, "storage_data", None)
    if stored is None:
        return
    for place in stored.values():
        whole = os.path.normpath(os.path.join("/checkpoint", place.relative_path))
        assert whole.startswith("/checkpoint/"), place
        assert "\0" not in place.relative_path
        for number in (place.offset, place.length):
            assert type(number) is int, place
            assert number >= 0, place


@pytest.fixture(scope="session")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """``.metadata`` of real checkpoints, in every protocol."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, dtype=torch.bfloat16))
    found = []
    states: list[dict[str, Any]] = [
        {"model": model.state_dict(), "epoch": 3, "list": [torch.ones(2)]},
        {"w": torch.ones(1)},
    ]
    for number, state in enumerate(states):
        folder = tmp_path_factory.mktemp(f"checkpoint{number}")
        save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
        found.append((folder / ".metadata").read_bytes())
    small = pickle.loads(found[1])
    small.storage_data = {"w": _StorageInfo("__0_0.distcp", 0, 10, ["stream.zstd/1"])}
    small.planner_data = {"seen": {1, 2}, "size": 2**40, "path": dcp_metadata._MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST}
    return [*found, *(pickle.dumps(pickle.loads(data), protocol) for data in found for protocol in (3, 5))] + [
        pickle.dumps(small, protocol) for protocol in (3, 4)
    ]


@pytest.fixture(scope="session")
def damaged(mutants: Mutants, pickles: list[bytes]) -> st.SearchStrategy[Mutant]:
    return mutants(pickles)


@pytest.fixture(scope="session")
def opcodes(pickles: list[bytes]) -> list[list[bytes]]:
    """The pickles cut into their opcodes, without frames: they may then change their length."""
    return [list(_opcodes_of(data)) for data in pickles]


def _opcodes_of(data: bytes) -> Iterator[bytes]:
    found = [(opcode.name, position or 0) for opcode, _, position in pickletools.genops(data)]
    ends = [position for _, position in found[1:]] + [len(data)]
    for (name, start), end in zip(found, ends, strict=True):
        if name != "FRAME":
            yield data[start:end]


def as_global(name: str) -> bytes:
    module, _, attribute = name.partition(" ")
    return f"c{module}\n{attribute}\n".encode()


@st.composite
def hostile(draw: st.DrawFn, opcodes: list[list[bytes]]) -> bytes:
    """A pickle of which some opcodes are others, or stand elsewhere."""
    mine = list(draw(st.sampled_from(opcodes)))
    positions = st.integers(0, 10_000)
    foreign = st.one_of(
        st.sampled_from(DANGEROUS).map(as_global),
        st.sampled_from(HARMLESS).map(as_global),
        st.sampled_from(LOOSE_OPCODES),
        st.sampled_from(LOOSE_ARGUMENTS),
        st.just(b"(K\x01\x8c\x04true\x86t"),
        st.just(b"N}\x8c\x04nameK\x01s\x86b"),  # BUILD with slots: setattr(top of the stack, "name", 1)
    )
    for kind in draw(st.lists(st.sampled_from(["replace", "insert", "delete", "move"]), min_size=1, max_size=5)):
        at = draw(positions) % len(mine)
        if kind == "replace":
            mine[at] = draw(foreign)
        elif kind == "insert":
            mine[at:at] = draw(st.lists(foreign, min_size=1, max_size=4))
        elif kind == "move":
            mine.insert(at, mine[draw(positions) % len(mine)])
        elif len(mine) > 1:
            del mine[at]
    return b"".join(mine)


@pytest.fixture(scope="session")
def hostile_pickles(opcodes: list[list[bytes]]) -> st.SearchStrategy[bytes]:
    return hostile(opcodes)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.row("hostile .metadata")
def test_metadata_of_the_corpus_is_read(pickles: list[bytes]) -> None:
    for data in pickles:
        metadata = read(data)
        assert metadata is not None
        check(metadata)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@fuzzed
@given(data=st.data())
def test_metadata_that_is_damaged_is_read_or_refused(data: st.DataObject, damaged: st.SearchStrategy[Mutant]) -> None:
    check(read(data.draw(damaged).data))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@fuzzed
@given(data=st.data())
def test_metadata_with_other_opcodes_does_nothing(
    data: st.DataObject, hostile_pickles: st.SearchStrategy[bytes]
) -> None:
    check(read(data.draw(hostile_pickles)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", DANGEROUS)
def test_metadata_with_a_dangerous_name_anywhere_is_refused(name: str, opcodes: list[list[bytes]]) -> None:
    for pickled in opcodes[:2]:
        for at, opcode in enumerate(pickled):
            if opcode[:1] in (b"c", b"\x93"):
                # In place of a name; what was on the stack for it stays there, and does no harm.
                spoilt = b"".join([*pickled[:at], as_global(name), *pickled[at + 1 :]])
                with pytest.raises(MetadataRefused), nothing_happens():
                    load_metadata(io.BytesIO(spoilt))
